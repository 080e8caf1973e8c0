"""Where a leaf comes from, said a second time: source tensors and an einops pattern, with nothing of the address algebra.

    left "(n h) d"   right "d l n h"   tensors "model.layers.{}.self_attn.q_proj.weight", a number for l

says: of every layer take the whole tensor, rearrange "(n h) d -> d n h", and stack along `l`. Axes that stand on the right only are the
numbers in the tensor's name. Letters are those of the field's tables: d hidden, f intermediate, n query heads, k key and value heads,
h head dim, v vocabulary, x experts, l layers. A leaf may have several origins, side by side (`put`); what no origin fills is zero.

`blocks` gives the values that belong into a box of the leaf, in pieces of bounded size: some rows of one tensor at a time. A block is a
view of the rows that were read: a dim of several axes, `(p two)`, which would have to be copied together, stays several dims, and what is
held against it is cut up instead.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import numpy.typing as npt
from einops import rearrange

from shardconv.verify.rounding import changed
from shardconv.verify.tensors import Tensors, numpy_dtype

Array = npt.NDArray[Any]
Box = tuple[tuple[int, int], ...]
Slices = tuple[EllipsisType | slice | None, ...]  # with `...`, without which those of a scalar would give a number


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a tensor's name: `start` plus the index of each axis times its step."""

    start: int
    steps: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Some tensors and how they lie in the leaf's box `put`: `value * scale + shift` of the elements in each tensor's box `take`."""

    tensors: str
    numbers: tuple[Number, ...]
    left: str
    right: str
    sizes: Mapping[str, int]
    take: Box
    put: Box
    scale: float = 1.0
    shift: float = 0.0

    def key(self, index: Mapping[str, int]) -> str:
        """The tensor's name at the index of the axes that are in it."""
        return self.tensors.format(*(n.start + sum(step * index[axis] for axis, step in n.steps) for n in self.numbers))

    @property
    def stacked(self) -> list[str]:
        """The axes that are in the name."""
        return [dim for dim in dims(self.right) if dim != "1" and axes(dim)[0] not in axes(self.left)]

    def keys(self) -> Iterator[str]:
        """All its tensors."""
        for values in itertools.product(*(range(self.sizes[axis]) for axis in self.stacked)):
            yield self.key(dict(zip(self.stacked, values, strict=True)))


@dataclass(frozen=True, slots=True)
class Reference:
    """A leaf as it should be."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    origins: tuple[Origin, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Block:
    """What belongs into a box of a leaf: `source * scale + shift` as `dtype`, from tensor `key`.

    `source` is in the tensor's dtype, however it lies in memory, and may have several dims for one of the box.
    """

    box: Box
    source: Array
    key: str
    scale: float
    shift: float
    dtype: str

    @property
    def moves(self) -> bool:
        """Whether the bits stay as they are."""
        return self.scale == 1.0 and self.shift == 0.0 and self.source.dtype == numpy_dtype(self.dtype)

    def change(self, source: Array) -> Array:
        """What becomes of some of the source."""
        return changed(source, self.scale, self.shift, self.dtype)

    @property
    def values(self) -> Array:
        """All of what belongs there, in the shape of the box."""
        return self.change(self.source).reshape([stop - start for start, stop in self.box])


def dims(side: str) -> list[str]:
    """The dims of one side of a pattern.

    >>> dims("(n h) d")
    ['(n h)', 'd']
    """
    found: list[str] = []
    inside = False
    for word in side.split():
        if inside:
            found[-1] += f" {word}"
        else:
            found.append(word)
        inside = (inside or word.startswith("(")) and not word.endswith(")")
    return found


def axes(side: str) -> list[str]:
    """The axes of one side of a pattern."""
    return side.replace("(", " ").replace(")", " ").split()


def shape_of(side: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that a side of a pattern has."""
    return tuple(math.prod(sizes[axis] for axis in axes(dim) if axis != "1") for dim in dims(side))


def whole(shape: tuple[int, ...]) -> Box:
    """The box of a whole array."""
    return tuple((0, n) for n in shape)


def meet(a: Box, b: Box) -> Box | None:
    """The box that two boxes share, None where there is none."""
    both = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def volume(box: Box) -> int:
    """The number of elements of a box."""
    return math.prod(stop - start for start, stop in box)


def within(box: Box, outer: Box) -> Slices:
    """A box as NumPy takes it, of an array that is the box `outer`."""
    return (..., *(slice(start - at, stop - at) for (start, stop), (at, _) in zip(box, outer, strict=True)))


def blocks(reference: Reference, tensors: Tensors, box: Box, most: int, *, passing: bool = False) -> Iterator[Block]:
    """What belongs into a box of a leaf, in blocks that read at most about `most` bytes of a tensor.

    `passing` blocks lie in memory that the next one uses again.
    """
    for origin in reference.origins:
        shared = meet(box, origin.put)
        if shared is not None:
            yield from _of_origin(origin, reference.dtype, tensors, shared, most, passing)


def _of_origin(origin: Origin, dtype: str, tensors: Tensors, box: Box, most: int, passing: bool) -> Iterator[Block]:
    names = dims(origin.right)
    inner = {name: (a - at, b - at) for name, (a, b), (at, _) in zip(names, box, origin.put, strict=True)}
    stacked = origin.stacked
    for values in itertools.product(*(range(*inner[axis]) for axis in stacked)):
        index = dict(zip(stacked, values, strict=True))
        for cut, rows in _rows(origin, origin.key(index), tensors, inner, most, passing):
            ranges = {name: (index[name], index[name] + 1) if name in index else cut.get(name, inner[name]) for name in names}
            there = tuple((ranges[name][0] + at, ranges[name][1] + at) for name, (at, _) in zip(names, origin.put, strict=True))
            taken_apart = [name for name in names if len(axes(name)) > 1 and inner[name] == (0, *shape_of(name, origin.sizes))]
            moved = _arranged(origin, rows, cut, taken_apart)
            # What was cut already begins at 0; the rest is whole along its axes; a stacked axis is one long.
            picks: list[EllipsisType | slice | None] = [...]
            for name in names:
                if name in taken_apart:
                    picks += [slice(None)] * len(axes(name))
                else:
                    picks.append(None if name in index else slice(None) if name in cut else slice(*inner[name]))
            yield Block(there, moved[tuple(picks)], origin.key(index), origin.scale, origin.shift, dtype)


def _rows(
    origin: Origin, key: str, tensors: Tensors, inner: Mapping[str, tuple[int, int]], most: int, passing: bool
) -> Iterator[tuple[dict[str, tuple[int, int]], Array]]:
    """The rows of a tensor that a box needs, some at a time: the range of the outermost axis, if the box cuts along it, and the rows."""
    if not origin.left:
        yield {}, tensors.rows(key, 0, 1, passing=passing)
        return
    outer, *others = axes(dims(origin.left)[0])
    step = math.prod(origin.sizes[axis] for axis in others)
    first = origin.take[0][0]
    columns: Slices = (..., *(slice(*side) for side in origin.take[1:]))
    if outer not in inner:  # it stands inside brackets on the right
        yield {}, tensors.rows(key, *origin.take[0], passing=passing)[columns]
        return
    row = math.prod(tensors.shape(key)[1:]) * numpy_dtype(tensors.dtype(key)).itemsize
    many = max(most // max(row * step, 1), 1)
    start, stop = inner[outer]
    for low in range(start, stop, many):
        high = min(low + many, stop)
        yield {outer: (low, high)}, tensors.rows(key, first + low * step, first + high * step, passing=passing)[columns]


def _arranged(origin: Origin, rows: Array, cut: Mapping[str, tuple[int, int]], taken_apart: Collection[str]) -> Array:
    """Rows of one tensor as the leaf has them, without the axes that are in the name, and some dims as their axes."""
    own = axes(origin.left)
    sizes = {axis: origin.sizes[axis] for axis in own if axis != "1"} | {axis: high - low for axis, (low, high) in cut.items()}
    kept = [dim for dim in dims(origin.right) if dim == "1" or axes(dim)[0] in own]
    right = " ".join(" ".join(axes(dim)) if dim in taken_apart else dim for dim in kept)
    arranged: Array = rearrange(rows, f"{origin.left} -> {right}", **sizes)
    return arranged
