"""Value rules: what happens to a value on its way, besides moving.

A rule is `value * scale + shift`, computed in float32 and rounded once into the target dtype; with scale 1 and shift 0 it is a cast, or
nothing at all. `is_exact` says whether every stored value survives unchanged: the plan prints it per leaf as `exact` or `rounds`, and
the check compares raw bits where it says `exact`.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from shardconv.dtypes import DType

# Elements converted at a time: the float32 copy of a slab stays at 1 MiB, in the cache and out of the memory budget.
SLAB = 1 << 18


@dataclass(frozen=True, slots=True)
class ValueRule:
    """`value * scale + shift` in float32, rounded once."""

    scale: float = 1.0
    shift: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether values stay as they are, but for a cast."""
        return self.scale == 1.0 and self.shift == 0.0


def is_exact(rule: ValueRule, stored: DType, target: DType) -> bool:
    """Whether every value of `stored` comes out of the rule as itself in `target`.

    >>> from shardconv.dtypes import dtype_named
    >>> is_exact(ValueRule(), dtype_named("bfloat16"), dtype_named("float32"))
    True
    """
    return rule.moves and (stored == target or can_hold(stored, target))


def can_hold(stored: DType, target: DType) -> bool:
    """Whether `target` can represent every value of `stored`; both must be floats."""
    if not (is_float(stored) and is_float(target)):
        return False
    a, b = ml_dtypes.finfo(stored.numpy), ml_dtypes.finfo(target.numpy)
    special = np.isinf(np.array([np.inf]).astype(target.numpy).astype(np.float32))[0]
    signed = a.min >= 0 or b.min < 0
    fits = float(b.max) >= float(a.max) and float(b.smallest_subnormal) <= float(a.smallest_subnormal) and b.nmant >= a.nmant
    return bool(fits and special and signed)


def is_float(dtype: DType) -> bool:
    """Whether a dtype is a real floating-point one, of any width."""
    return dtype.numpy.kind == "f" or (dtype.numpy.kind == "V" and dtype.name.startswith(("float", "bfloat")))


def convert(block: np.ndarray, rule: ValueRule, out: np.ndarray) -> None:
    """Applies `rule` to `block` into `out`, both C-contiguous and of one size; casts go through float32, as torch's do."""
    source, target = block.reshape(-1), out.reshape(-1)
    for start in range(0, source.size, SLAB):
        part = source[start : start + SLAB].astype(np.float32)
        if rule.scale != 1.0:
            part *= np.float32(rule.scale)
        if rule.shift != 0.0:
            part += np.float32(rule.shift)
        target[start : start + SLAB] = part.astype(out.dtype)
