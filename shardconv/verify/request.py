"""What is asked of the checks: plain values, so that who asks needs no TensorStore, no JAX and no torch."""

from dataclasses import dataclass

from shardconv.plan import Plan
from shardconv.verify.second import Choices

# JAX against torch came to 0.3 to 1.1 times the floor over 24 models; of 24 faults in tables and arrays, the mildest that swaps, shifts or
# leaves something out came to a hundred thousand times the floor, and one projection off by a part in ten thousand to forty times.
FACTOR = 4.0

# Lengths of random sequences: RoPE faults do not show in the first few positions.
LENGTHS = (64, 96, 160)


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


@dataclass(frozen=True)
class Bounds:
    """What the differences of logits may be; None is what the floor allows, `factor` times it."""

    max_abs: float | None = None
    mean_abs: float | None = None
    max_kl: float | None = None
    factor: float = FACTOR


@dataclass(frozen=True, slots=True)
class LogitRequest:
    """Whose logits to compare: the pytree in `folder` run in JAX, and the PyTorch model of the plan's source.

    `forward` is "auto", "torch" for the PyTorch module traced into JAX, or "module:function". The sample is random token ids of these
    `lengths`, chosen by `seed`, and the lines of the file `prompts` if there is one. `trace` asks for the first step that departs.
    `memory` is bytes of arrays that JAX may hold at once: a larger checkpoint goes layer by layer.
    """

    folder: str
    plan: Plan
    rope: str
    forward: str
    lengths: tuple[int, ...]
    seed: int
    prompts: str | None
    bounds: Bounds
    trace: bool
    memory: int
