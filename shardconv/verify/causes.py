"""What a difference looks like: simple mistakes are made on purpose, and the one that gives what was found is named.

Tried on one slice of the leaf, all of one source tensor: single bits, zeros, other factors and summands, casts through other dtypes, bytes
the wrong way round; then elements in other places: transposed, rotary dims in the other order, heads split the other way, copied without
transposing, moved along an axis; then other tensors of the same shape: another layer, another expert, another projection. The first that
explains every bit of the slice is the answer, so one that is named is certain of the slice, if not of its reason.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.verify.compare import equal
from shardconv.verify.look import Place, opened
from shardconv.verify.rounding import bits, changed, is_float, widened
from shardconv.verify.statement import Box, Origin, Reference, axes, blocks, dims, meet, volume, within
from shardconv.verify.tensors import Tensors, numpy_dtype

Array = npt.NDArray[Any]

UNKNOWN = "no simple mistake gives what was found"
TOO_LARGE = "the tensor is too large for the memory budget to look for a cause"
PADDING = "padding must be zeros"
# Tensors that are tried in the place of the right one; each costs a few rows to read.
CANDIDATES = 4096
# An array takes this many times its bytes while hypotheses are tried on it.
COPIES = 8


@dataclass(frozen=True, slots=True)
class Doubt:
    """A leaf that is wrong at an index."""

    place: Place
    reference: Reference
    index: tuple[int, ...]
    memory: int


def explain(doubt: Doubt) -> str:
    """The likely cause of a difference, in words."""
    stored, tensors = opened(doubt.place)
    reference = doubt.reference
    point = tuple((at, at + 1) for at in doubt.index)
    origin = next((origin for origin in reference.origins if meet(point, origin.put)), None)
    if origin is None:
        return PADDING
    names = dims(origin.right)
    box = tuple(
        (at, at + 1) if name in origin.stacked else side for name, at, side in zip(names, doubt.index, origin.put, strict=True)
    )
    if volume(box) * numpy_dtype(reference.dtype).itemsize * COPIES > doubt.memory:
        return TOO_LARGE
    found = stored.read(reference.name, box)
    index = {name: at - side[0] for name, at, side in zip(names, doubt.index, origin.put, strict=True) if name in origin.stacked}
    return next(_Slice(reference, origin, index, box, tensors, found).causes(), UNKNOWN)


@dataclass(frozen=True)
class _Slice:
    reference: Reference
    origin: Origin
    index: Mapping[str, int]
    box: Box
    tensors: Tensors
    found: Array

    def causes(self) -> Iterator[str]:
        """Everything that explains the slice, the simplest first."""
        expected = self.made(self.origin)
        yield from _bits(self.found, expected)
        yield from self._values(expected)
        yield from self._places(expected)
        yield from self._tensors()
        yield from _constants(self.found, expected)

    def made(self, origin: Origin, box: Box | None = None) -> Array:
        """What a box of the leaf would be of another origin; the slice, if not told."""
        box = self.box if box is None else box
        reference = replace(self.reference, origins=(origin,))
        out = np.empty(tuple(stop - start for start, stop in box), numpy_dtype(reference.dtype))
        for block in blocks(reference, self.tensors, box, 1 << 60):
            out[within(block.box, box)] = block.values
        return out

    def is_made_by(self, origin: Origin) -> bool:
        """Whether another origin gives what was found."""
        probe = tuple((start, min(start + 8, stop)) for start, stop in self.box)
        return equal(self.found[within(probe, self.box)], self.made(origin, probe)) and equal(self.found, self.made(origin))

    def _values(self, expected: Array) -> Iterator[str]:
        """The right tensor in the right order, with something else done to its values."""
        origin = self.origin
        if not is_float(expected.dtype.name):
            return
        if origin.scale != 1.0:
            yield from self._if(replace(origin, scale=1.0), f"the factor {origin.scale:.6g} is missing")
            yield from self._if(replace(origin, scale=origin.scale**2), f"the factor {origin.scale:.6g} is there twice")
        if origin.shift != 0.0:
            yield from self._if(replace(origin, shift=0.0), f"the summand {origin.shift:g} is missing")
            yield from self._if(replace(origin, shift=2 * origin.shift), f"the summand {origin.shift:g} is there twice")
        else:
            yield from self._if(replace(origin, shift=1.0), "1 was added")
        for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"):
            if name != expected.dtype.name and equal(self.found, changed(changed(expected, 1.0, 0.0, name), 1.0, 0.0, expected.dtype.name)):
                yield f"rounded through {name}"
        if expected.dtype.name == "bfloat16":
            (block,) = blocks(replace(self.reference, dtype="float32", origins=(origin,)), self.tensors, self.box, 1 << 60)
            cut = (bits(np.ascontiguousarray(block.values)) >> np.uint32(16)).astype(np.uint16)
            if (cut.reshape(self.found.shape) == bits(self.found)).all():
                yield "cut off instead of rounded to nearest"

    def _if(self, origin: Origin, said: str) -> Iterator[str]:
        if self.is_made_by(origin):
            yield said

    def _places(self, expected: Array) -> Iterator[str]:
        """The right values in other places."""
        same: Callable[[Array], bool] = lambda other: other.shape == self.found.shape and equal(self.found, other)  # noqa: E731
        if self.found.itemsize > 1 and same(np.ascontiguousarray(expected.byteswap())):
            yield "the bytes of each value are the wrong way round"
        for a, b in itertools.combinations(range(expected.ndim), 2):
            if expected.shape[a] == expected.shape[b] > 1 and same(expected.swapaxes(a, b)):
                yield f"transposed: axes {a} and {b} are exchanged"
        for axis, size in enumerate(expected.shape):
            if size > 2 and size % 2 == 0:
                if same(_pairs(expected, axis)):
                    yield f"RoPE order: axis {axis} is in pairs, and should be in halves"
                if same(_halves(expected, axis)):
                    yield f"RoPE order: axis {axis} is in halves, and should be in pairs"
        if swapped := _split_otherwise(self.origin):
            yield from self._if(swapped, f"split the wrong way: as {swapped.left}, and should be as {self.origin.left}")
        rows = self.tensors.rows(self.origin.key(self.index), *(self.origin.take[0] if self.origin.take else (0, 1)))
        if rows.size == self.found.size:
            plain = changed(rows, self.origin.scale, self.origin.shift, self.reference.dtype)
            if same(np.ascontiguousarray(plain).reshape(self.found.shape)):
                yield "the tensor as it lies in the file: reshaped, and not transposed"
        for axis in range(expected.ndim):
            yield from _moved(self.found, expected, axis)

    def _tensors(self) -> Iterator[str]:
        """Another tensor of the same shape in the place of the right one."""
        right = self.origin.key(self.index)
        if (entry := self.tensors.entries.get(right)) is None:
            return  # it is computed: the fault may be in any of its inputs
        kind = (entry.shape, entry.dtype)
        others = [key for key, other in self.tensors.entries.items() if key != right and (other.shape, other.dtype) == kind]
        others.sort(key=lambda key: _distance(right, key))
        for other in others[:CANDIDATES]:
            plain = replace(self.origin, tensors=other, numbers=())
            variants = [other for one in (plain, replace(plain, scale=1.0, shift=0.0)) for other in (one, *_rotated(one))]
            if any(self.is_made_by(origin) for origin in variants):
                yield _instead(right, other)


def _bits(found: Array, expected: Array) -> Iterator[str]:
    a, b = bits(found), bits(expected)
    different = a != b
    if different.sum() == 1:
        flipped = int((a ^ b)[different][0])
        if flipped.bit_count() == 1:
            yield f"one bit is flipped: bit {flipped.bit_length() - 1} of {8 * found.itemsize}"
    if different.any() and not a[different].any():
        many = int(different.sum())
        share = "all of it is" if many == found.size else f"{many} elements are"
        yield f"{share} zero: never written, or cut off in the source that was read"


def _constants(found: Array, expected: Array) -> Iterator[str]:
    """One factor, or one summand, that takes everything from the one to the other, as nearly as the dtype can say."""
    if not is_float(found.dtype.name):
        return
    with np.errstate(all="ignore"):
        a, b = (widened(np.ascontiguousarray(array)).astype(np.float64).reshape(-1) for array in (found, expected))
        usual = np.isfinite(a) & np.isfinite(b) & (b != 0) & (a != 0)
        if usual.sum() < 2:
            return
        step = 2.0 ** -{"float32": 20, "float16": 9, "bfloat16": 6}.get(found.dtype.name, 2)
        factor = float(np.median(a[usual] / b[usual]))
        if (np.abs(a - factor * b) <= step * np.abs(factor * b))[usual].all():
            yield f"every value is {factor:.6g} times what it should be"
        summand = float(np.median((a - b)[usual]))
        if summand and (np.abs(a - b - summand) <= step * (np.abs(a) + np.abs(b) + 1e-30))[usual].all() and abs(summand) > step:
            yield f"every value is {summand:.6g} more than it should be"


def _pairs(array: Array, axis: int) -> Array:
    """Halves side by side made pairs: 0 1 2 3 becomes 0 2 1 3."""
    moved = np.moveaxis(array, axis, -1)
    return np.moveaxis(np.ascontiguousarray(moved.reshape(*moved.shape[:-1], 2, -1).swapaxes(-1, -2)).reshape(moved.shape), -1, axis)


def _halves(array: Array, axis: int) -> Array:
    """Pairs made halves: 0 1 2 3 becomes 0 2 1 3 the other way."""
    moved = np.moveaxis(array, axis, -1)
    return np.moveaxis(np.ascontiguousarray(moved.reshape(*moved.shape[:-1], -1, 2).swapaxes(-1, -2)).reshape(moved.shape), -1, axis)


def _moved(found: Array, expected: Array, axis: int) -> Iterator[str]:
    """Rows of an axis in another order, or some of them more than once."""
    size = found.shape[axis]
    if not 1 < size <= 1 << 16:
        return
    places = {row.tobytes(): place for place, row in reversed(list(enumerate(bits(np.moveaxis(expected, axis, 0)))))}
    got = [places.get(row.tobytes()) for row in bits(np.moveaxis(found, axis, 0))]
    if None in got or len(places) < 2:
        return
    where = next(place for place, other in enumerate(got) if other != place)
    if all(other == (place + 1) % size for place, other in enumerate(got)):
        yield f"axis {axis} is moved by one: {where} has what belongs to {got[where]}"
    elif len(set(got)) == len(places):
        yield f"axis {axis} is in another order: {where} has what belongs to {got[where]}"
    else:
        yield f"axis {axis} has something twice: {where} has what belongs to {got[where]}"


def _split_otherwise(origin: Origin) -> Origin | None:
    """The origin with the axes of its brackets in the other order."""
    left = " ".join(f"({' '.join(reversed(axes(dim)))})" if dim.startswith("(") else dim for dim in dims(origin.left))
    return replace(origin, left=left) if left != origin.left else None


def _rotated(origin: Origin) -> Iterator[Origin]:
    """The origin with rotary dims in the other order, where it has any."""
    if "(p two)" in origin.right:
        left, right = origin.left.replace("two p", "h"), origin.right.replace("(p two)", "h")
        yield replace(origin, left=left.replace("(h)", "h"), right=right, sizes={**origin.sizes, "h": 2 * origin.sizes["p"]})
    elif "h" in axes(origin.left) and origin.sizes["h"] % 2 == 0:
        left = origin.left.replace("h", "two p" if "(" in origin.left else "(two p)")
        sizes = {**origin.sizes, "two": 2, "p": origin.sizes["h"] // 2}
        yield replace(origin, left=left, right=origin.right.replace("h", "(p two)"), sizes=sizes)


NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")


def _distance(right: str, other: str) -> tuple[int, int]:
    """How far apart two tensors are: the same name in near layers first, then the same layer, then the rest."""
    a, b = ([int(number) for number in NUMBER.findall(key)] for key in (right, other))
    alike = NUMBER.sub("", right) == NUMBER.sub("", other)
    apart = math.inf if len(a) != len(b) else sum(abs(x - y) for x, y in zip(a, b, strict=True))
    return (0 if alike else 1), int(min(apart, 1 << 40))


def _instead(right: str, other: str) -> str:
    """What it means that one tensor stands where another should."""
    if NUMBER.sub("", right) == NUMBER.sub("", other):
        words, a, b = right.split("."), NUMBER.findall(right), NUMBER.findall(other)
        kinds = [words[place - 1].removesuffix("s") for place, word in enumerate(words) if place and word.isdigit()]
        kind, x, y = next((k, x, y) for k, x, y in zip(kinds, a, b, strict=True) if x != y)
        off = "off by one, exchanged, or there twice" if abs(int(x) - int(y)) == 1 else "exchanged, or there twice"
        return f"it is {other}, of {kind} {y} and not {x}: {off}"
    mine, theirs = (_telling(a, b) for a, b in ((right, other), (other, right)))
    return f"it is {other}: {theirs} stands where {mine} should"


def _telling(key: str, other: str) -> str:
    """The parts of a name that the other has not.

    >>> _telling("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    'gate_proj'
    """
    words = [word for word in key.split(".") if word not in other.split(".") and not word.isdigit()]
    return ".".join(words) or key
