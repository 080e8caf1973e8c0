"""Value rules: what happens to a value on its way, besides moving.

A rule is `value * scale + shift`, computed in float32 (in float64 from float64 to float64) and rounded once into the target dtype; with
scale 1 and shift 0 it is a cast, or nothing at all. `is_exact` says whether every stored value survives unchanged: the plan prints it per
leaf as `exact` or `rounds`.

A cast rounds to nearest, ties to even. What is too large becomes an infinity; float8_e4m3fn, which has none, takes its largest value, and
the fnuz types NaN. These are torch's casts (2.12 and later; before, float8_e4m3fn took NaN), bit for bit but for the sign and payload of a
NaN, of which torch promises nothing. A value that is only moved keeps all its bits.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.dtypes import DType, raw_view

Array = npt.NDArray[Any]

# Elements converted at a time: the float32 copy of a slab is 1 MiB, which stays in the cache and does not count against a memory budget.
SLAB = 1 << 18

# Types whose casts saturate, and their largest value: the OCP 8-bit float specification leaves it open, torch saturates this one.
SATURATING = {"float8_e4m3fn": 448.0}


@dataclass(frozen=True, slots=True)
class ValueRule:
    """`value * scale + shift`, rounded once."""

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


@cache
def can_hold(stored: DType, target: DType) -> bool:
    """Whether `target`, another type, has every value of `stored`: its infinities, its NaN and its negative zero too.

    False where one of the two is no float. Types of up to 16 bits are tried value by value.

    >>> from shardconv.dtypes import dtype_named
    >>> can_hold(dtype_named("float8_e4m3fn"), dtype_named("float8_e5m2"))
    False
    """
    if not (is_float(stored) and is_float(target)):
        return False
    if stored.numpy.itemsize > 2:
        return target.numpy.itemsize > stored.numpy.itemsize  # float32 in float64
    patterns = np.arange(1 << stored.bits, dtype=np.dtype(f"u{stored.numpy.itemsize}"))
    values = patterns.view(stored.numpy).astype(np.float32)
    with np.errstate(all="ignore"):
        kept = values.astype(target.numpy).astype(np.float32)
    return bool(np.all((raw_view(kept) == raw_view(values)) | (np.isnan(kept) & np.isnan(values))))


def is_float(dtype: DType) -> bool:
    """Whether a dtype is a real floating-point one, of any width."""
    return dtype.name.startswith(("float", "bfloat"))


def convert(block: Array, rule: ValueRule, out: Array) -> None:
    """Applies `rule` to `block` into `out`, both C-contiguous and of one size.

    The two may share memory where the wider one takes all of it, the source lies at its end and the target at its front: slab by slab,
    nothing is written over before it is read.
    """
    source, target = block.reshape(-1), out.reshape(-1)
    wide = np.dtype(np.float64 if source.dtype == target.dtype == np.float64 else np.float32)
    most = SATURATING.get(target.dtype.name)
    with np.errstate(all="ignore"):
        for start in range(0, source.size, SLAB):
            part = source[start : start + SLAB].astype(wide)
            if rule.scale != 1.0:
                part *= wide.type(rule.scale)
            if rule.shift != 0.0:
                part += wide.type(rule.shift)
            if most is not None:
                np.clip(part, -most, most, out=part)
            target[start : start + SLAB] = part.astype(target.dtype)
