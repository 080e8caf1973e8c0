"""What is asked of the comparison of logits: plain values that know nothing of how the checkpoint was made, nor of JAX and torch."""

from collections.abc import Mapping
from dataclasses import dataclass

# JAX against torch came to 0.3 to 1.1 times the floor over 24 models; of 24 faults in tables and arrays, the mildest that swaps, shifts or
# leaves something out came to a hundred thousand times the floor, and one projection off by a part in ten thousand to forty times.
FACTOR = 4.0

# Lengths of random sequences: RoPE faults do not show in the first few positions.
LENGTHS = (64, 96, 160)


@dataclass(frozen=True)
class Rounding:
    """A tensor that is stored as its values times `scale` plus `shift`, rounded to `dtype`."""

    dtype: str
    scale: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True)
class Bounds:
    """What the differences of logits may be; None is what the floor allows, `factor` times it."""

    max_abs: float | None = None
    mean_abs: float | None = None
    max_kl: float | None = None
    factor: float = FACTOR


@dataclass(frozen=True, slots=True)
class LogitRequest:
    """Whose logits to compare: those of the pytree in `checkpoint`, run in JAX, and of the PyTorch model in the directory `source`.

    `rope` is the target's order of rotary dims as the config words it, `roundings` are those of tensors whose values the plan does not
    keep (`roundings.roundings`). `forward` is "auto", "torch" for the PyTorch module traced into JAX, or "module:function". The sample is
    random token ids of these `lengths`, chosen by `seed`, and the lines of the file `prompts` if there is one. `trace` asks for the first
    step that departs. `memory` is bytes of arrays that JAX may hold at once: a larger checkpoint goes layer by layer.
    `files` and `prefix` say where the source's tensors are if transformers would find none.
    """

    checkpoint: str
    source: str
    rope: str
    roundings: Mapping[str, Rounding]
    forward: str
    lengths: tuple[int, ...]
    seed: int
    prompts: str | None
    bounds: Bounds
    trace: bool
    memory: int
    files: tuple[str, ...] = ()
    prefix: str = ""
