"""What is asked of the check: plain values, so that who asks needs no TensorStore."""

from dataclasses import dataclass

from shardconv.plan import Plan
from shardconv.verify.second import Choices


@dataclass(frozen=True, slots=True)
class Request:
    """What to check: the pytree in `folder` against the source of the plan, as the config chose it.

    `memory` is bytes for each of `workers`; `sample` is boxes per leaf, 0 for every element, None for as the size says.
    """

    folder: str
    plan: Plan
    choices: Choices
    workers: int
    memory: int
    sample: int | None
    seed: int
