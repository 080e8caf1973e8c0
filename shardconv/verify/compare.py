"""Two arrays of one shape, bit by bit: whether they are the same, and what stands where they are not.

The two usually lie in memory the other way round, one being a transpose of a file's rows. NumPy compares such a pair at a tenth of a GB per
second and core. Here it goes in tiles that stay in the cache: a tile of the one is copied by its own rows into a scratch, turned from there
into the order of the other, and compared in that order, ten times as fast. What else must be known of every value (does it change as it
should, is it finite) is asked of the same tile while it is there. Looking closer costs more and happens where they differ.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.verify.rounding import bits, decoded, is_float

Array = npt.NDArray[Any]
Box = tuple[tuple[int, int], ...]

# Elements of a tile along the fastest axes of either array, and in all: 256 kB of bfloat16, so that a scratch and what is turned out of it
# fit a core's second cache. Measured on a transpose of 8192 x 2048: 256 x 512 1.8 GB/s, 256 x 256 1.7, 512 x 512 1.4, 128 x 128 1.1.
ROWS, WIDTH, TILE = 256, 512, 1 << 17
# Elements that each row of a scratch is longer than its data: with rows of a power of two all would fall into the same sets of the cache.
PAD = 8


@dataclass(frozen=True, slots=True)
class Odd:
    """Values that are not finite."""

    nan: int = 0
    inf: int = 0

    def plus(self, other: "Odd") -> "Odd":
        """The two together."""
        return Odd(self.nan + other.nan, self.inf + other.inf)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether the bits are those that were expected, and the values that are not finite: found, and of the source."""

    same: bool
    found: Odd
    source: Odd


def compare(found: Array, source: Array, change: Callable[[Array], Array] | None) -> Comparison:
    """Hold an array against its source: against what `change` makes of it, element by element, or against itself."""
    same, seen, had = True, Odd(), Odd()
    for a, b in pairs(found, source):
        expected = b if change is None else change(b)
        if _same(a, expected):
            mine = odd(expected)  # a copy that lies closer together
        else:
            mine = odd(a)
            same = same and change is not None and not differing(a, expected, cast=True).any()
        seen = seen.plus(mine)
        had = had.plus(mine if expected is b and same else odd(b))
    return Comparison(same, seen, had)


def equal(found: Array, expected: Array) -> bool:
    """Whether all bits are the same."""
    return all(_same(a, b) for a, b in pairs(found, expected))


def _same(a: Array, b: Array) -> bool:
    return not (bits(a) != bits(b)).any()


def pairs(a: Array, b: Array) -> Iterator[tuple[Array, Array]]:
    """Tiles that cover both, of one shape each; those of `b` may be copies, and the next one overwrites them."""
    shape, ours, theirs = _merged(a, b)
    raw_a, raw_b = (_strided(bits(array), shape, strides) for array, strides in ((a, ours), (b, theirs)))
    for one, other in _tiles(raw_a, raw_b) if a.size else ():
        yield one.view(a.dtype), other.view(b.dtype)


def _tiles(a: Array, b: Array) -> Iterator[tuple[Array, Array]]:
    """The same of unsigned integers, with the axes in the order in which they lie in `a`."""
    slow_to_fast = range(a.ndim)
    fastest = min(slow_to_fast, key=lambda axis: (b.strides[axis], -axis), default=0)
    if fastest >= a.ndim - 1:
        for box in _boxes(a.shape, _run(a.shape, slow_to_fast[::-1], TILE, ())):
            yield a[box], b[box]
        return
    along_b = sorted(slow_to_fast, key=lambda axis: b.strides[axis])
    rows = _run(a.shape, slow_to_fast[::-1], ROWS, (fastest,))
    columns = _run(a.shape, along_b, TILE // math.prod(rows.values()), rows)
    if math.prod(columns.values()) < WIDTH:
        rows = _run(a.shape, slow_to_fast[::-1], TILE // math.prod(columns.values()), columns)
    turn = [*(axis for axis in slow_to_fast if axis not in columns), *reversed(columns)]
    back = [turn.index(axis) for axis in slow_to_fast]
    scratch = np.empty(math.prod(rows.values()) * (math.prod(columns.values()) + PAD), b.dtype)
    turned = np.empty(math.prod(rows.values()) * math.prod(columns.values()), b.dtype)
    for box in _boxes(a.shape, rows | columns):
        found, there = a[box], b[box].transpose(turn)
        width = math.prod(there.shape[a.ndim - len(columns) :])
        high = there.size // width
        padded = scratch[: high * (width + PAD)].reshape(high, width + PAD)[:, :width].reshape(there.shape)
        padded[...] = there
        out = turned[: found.size].reshape(found.shape)
        out[...] = padded.transpose(back)
        yield found, out


def _merged(a: Array, b: Array) -> tuple[list[int], list[int], list[int]]:
    """The common shape and the strides of both, slowest in `a` first: axes of one run on both sides are one, those of length 1 left out."""
    shape: list[int] = []
    ours: list[int] = []
    theirs: list[int] = []
    for n, one, other in sorted(zip(a.shape, a.strides, b.strides, strict=True), key=lambda axis: -axis[1]):
        if n == 1:
            continue
        if shape and (ours[-1], theirs[-1]) == (one * n, other * n):
            shape[-1], ours[-1], theirs[-1] = shape[-1] * n, one, other
        else:
            shape, ours, theirs = [*shape, n], [*ours, one], [*theirs, other]
    return shape, ours, theirs


def _strided(array: Array, shape: Sequence[int], strides: Sequence[int]) -> Array:
    return np.lib.stride_tricks.as_strided(array, shape, strides, writeable=False)


def _run(shape: Sequence[int], order: Sequence[int], length: int, taken: Collection[int]) -> dict[int, int]:
    """About `length` elements along axes in this order, up to the first that is taken: how much of each, at least one axis."""
    run: dict[int, int] = {}
    for axis in order:
        if axis in taken or (run and length < 2):
            break
        run[axis] = max(min(shape[axis], length), 1)
        length //= run[axis]
    return run


def _boxes(shape: Sequence[int], steps: Mapping[int, int]) -> Iterator[tuple[EllipsisType | slice, ...]]:
    """Slices in steps, with `...`, without which those of a scalar would give a number."""
    cuts = (range(0, size, steps.get(axis, 1)) for axis, size in enumerate(shape))
    for corner in itertools.product(*cuts):
        yield (..., *(slice(start, start + steps.get(axis, 1)) for axis, start in enumerate(corner)))


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
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of the signalling NaN that it is asked for
        return Odd(int(np.isnan(array).sum()), int(np.isinf(array).sum()))


# The bits of an exponent that is all ones, by dtype: only such values can be NaN or infinite.
_EXPONENT = {"float64": 0x7FF0 << 48, "float32": 0x7F80 << 16, "float16": 0x7C00, "bfloat16": 0x7F80}


def _may_be_odd(array: Array) -> bool:
    """Whether there is any value that is not finite, by its bits alone."""
    raw = bits(array)
    if raw.itemsize == 1:
        return bool(_odd_bytes(array.dtype.name)[raw].any())
    exponent = raw.dtype.type(_EXPONENT[array.dtype.name])
    return bool((raw & exponent).max(initial=0) == exponent)


@cache
def _odd_bytes(dtype: str) -> Array:
    """Which of the 256 patterns are not finite."""
    return ~np.isfinite(decoded(dtype))
