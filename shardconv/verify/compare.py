"""Two arrays of one shape, bit by bit: whether they are the same, and what stands where they are not.

The two usually lie in memory the other way round, one being a transpose of a file's rows. NumPy compares such a pair at a tenth of a
GB per second and core; in tiles that fit a core's cache it is five times that. Looking closer costs more and happens where they differ.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.verify.rounding import bits, is_float

Array = npt.NDArray[Any]
Box = tuple[tuple[int, int], ...]

# Elements of a tile along the fastest axis of either array, and in all: 128 kB of bfloat16 twice, which is half of a small core's L2.
ALONG, ACROSS, TILE = 512, 128, 1 << 16


@dataclass(frozen=True, slots=True)
class Odd:
    """Values that are not finite."""

    nan: int = 0
    inf: int = 0

    def plus(self, other: "Odd") -> "Odd":
        """The two together."""
        return Odd(self.nan + other.nan, self.inf + other.inf)


def equal(found: Array, expected: Array) -> bool:
    """Whether all bits are the same."""
    a, b = bits(found), bits(expected)
    return all(bool((a[tile] == b[tile]).all()) for tile in _tiles(a, b))


def _tiles(a: Array, b: Array) -> Iterator[tuple[slice, ...]]:
    """Slices that cover both: long along the axis where each is contiguous, and no larger than a tile."""
    if not a.size:
        return
    fastest = {_fastest(b): ALONG, _fastest(a): ACROSS} if a.ndim else {}
    room, sides = TILE, [1] * a.ndim
    for axis in (*fastest, *(axis for axis in reversed(range(a.ndim)) if axis not in fastest)):
        limit = fastest.get(axis, room) if len(fastest) > 1 else room
        sides[axis] = max(min(a.shape[axis], limit, room), 1)
        room //= sides[axis]
    cuts = (range(0, size, side) for size, side in zip(a.shape, sides, strict=True))
    for corner in itertools.product(*cuts):
        yield tuple(slice(start, start + side) for start, side in zip(corner, sides, strict=True))


def _fastest(a: Array) -> int:
    """The axis along which an array is closest together in memory."""
    long = [axis for axis in range(a.ndim) if a.shape[axis] > 1] or [a.ndim - 1]
    return min(long, key=lambda axis: (a.strides[axis], -axis))


def differing(found: Array, expected: Array, cast: bool) -> Array:
    """Where bits differ; after a cast one NaN is as good as another, since nothing says which bits it should have."""
    mask = np.asarray(bits(found) != bits(expected))
    if cast and is_float(found.dtype.name):
        mask &= ~(np.isnan(found) & np.isnan(expected))
    return mask


def bounds(mask: Array) -> Box:
    """The smallest box that holds all that is true."""
    others = (tuple(other for other in range(mask.ndim) if other != axis) for axis in range(mask.ndim))
    return tuple(_ends(np.asarray(mask.any(axis=axes))) for axes in others)


def _ends(along: Array) -> tuple[int, int]:
    places = np.flatnonzero(along)
    return int(places[0]), int(places[-1]) + 1


def odd(array: Array) -> Odd:
    """How many values are NaN and how many are infinite; integers have neither."""
    if not is_float(array.dtype.name) or not _may_be_odd(array):
        return Odd()
    return Odd(int(np.isnan(array).sum()), int(np.isinf(array).sum()))


# The bits of an exponent that is all ones, by dtype: only such values can be NaN or infinite.
_EXPONENT = {"float64": 0x7FF0 << 48, "float32": 0x7F80 << 16, "float16": 0x7C00, "bfloat16": 0x7F80}


def _may_be_odd(array: Array) -> bool:
    """Whether there is any value that is not finite, at the speed of the cache; true where that cannot be told."""
    exponent = _EXPONENT.get(array.dtype.name)
    if exponent is None:
        return True
    raw = bits(array).reshape(-1) if array.flags.c_contiguous else bits(array)
    if raw.ndim != 1:
        return bool(((raw & raw.dtype.type(exponent)) == exponent).any())
    slabs = (raw[start : start + TILE] for start in range(0, raw.size, TILE))
    return any(int((slab & raw.dtype.type(exponent)).max()) == exponent for slab in slabs)

