"""What is asked of the check: plain values, so that who asks needs no TensorStore."""

from dataclasses import dataclass

from shardconv.plan import Plan
from shardconv.verify.second import Choices


@dataclass(frozen=True, slots=True)
class Request:
    """What to check: the pytree in `folder` against the source of the plan, as the config chose it.

    `memory` is bytes for each of `workers` of the executor, 0 for all that the cluster at `address` has; `sample` is boxes per leaf, 0 for
    every element, None for as the size says. How far the check is goes into the directory `progress`, if there is one.
    """

    folder: str
    plan: Plan
    choices: Choices
    workers: int
    memory: int
    sample: int | None
    seed: int
    executor: str = "local"
    address: str | None = None
    progress: str = ""
