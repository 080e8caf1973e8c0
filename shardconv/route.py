"""Push-down: which boxes of which stored tensors a box of a target tensor is made of.

A *piece* is one contiguous box of one stored tensor and the strided view of the output buffer that it fills. `pieces` covers a target
box exactly: every element that the source address has comes in one piece, and no piece reads an element that it does not deliver. This
is what makes memory a choice: any box of any target tensor, however it is transposed, stacked or fused, can be made alone.

A box of a dim of several digits is not one range per digit; `digit_boxes` cuts it into at most 2k - 1 boxes that are, as one cuts
[07, 43) into [07, 10), [10, 40) and [40, 43).
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from shardconv.axes import Address, Dim, encode
from shardconv.boxes import Box, Interval, box_shape, box_size, slices
from shardconv.copying import copy


@dataclass(frozen=True, slots=True)
class Piece:
    """`box` of tensor `key`; viewed by source digits and transposed, it fills a strided view of the output buffer."""

    key: str
    box: Box
    digits: tuple[int, ...]  # lengths of the source digits that make up the box
    order: tuple[int, ...]  # those digits, in the order of the target digits
    region: Box  # the part of the output buffer
    split: tuple[int, ...]  # that part, viewed by target digits
    within: Box  # the places among those digits that this piece fills

    def is_plain(self, shape: tuple[int, ...]) -> bool:
        """Whether the piece is all of an output buffer of this shape, element after element as it is stored."""
        if any(side != (0, n) for side, n in zip(self.region, shape, strict=True)):
            return False
        if any(side != (0, n) for side, n in zip(self.within, self.split, strict=True)):
            return False
        moved = [place for place in self.order if self.digits[place] > 1]
        return moved == sorted(moved)

    def land(self, block: np.ndarray, out: np.ndarray) -> None:
        """Copies `block`, the contents of `box`, to its places in `out`, the buffer of the whole target box."""
        region = out[slices(self.region)].reshape(self.split, copy=False)
        target = region[slices(self.within)]
        copy(target, block.reshape(self.digits).transpose(self.order).reshape(target.shape))


def pieces(target: Address, source: Address, index: Mapping[str, int], box: Box) -> Iterator[Piece]:
    """Pushes `box` of the target tensor whose name spells `index` down to boxes of source tensors; both are over the same axes.

    >>> from shardconv.axes import address
    >>> axes = {"layers": 2, "heads": 2, "embed": 3}
    >>> source, target = address("l.{layers}", "heads embed", axes), address("all", "embed layers heads", axes)
    >>> [(piece.key, piece.box) for piece in pieces(target, source, {}, ((0, 3), (1, 2), (0, 2)))]
    [('l.1', ((0, 2), (0, 3)))]
    """
    digits = list(itertools.chain(*target.dims))
    for cover in itertools.product(*(list(digit_boxes(dim, *side)) for dim, side in zip(target.dims, box, strict=True))):
        ranges = {axis: (i, i + 1) for axis, i in index.items()}
        for digit, (start, stop) in zip(digits, itertools.chain(*cover), strict=True):
            ranges[digit.axis] = (max(start - digit.offset, 0), min(stop - digit.offset, digit.size))
        if any(start >= stop for start, stop in ranges.values()):
            continue  # all of it is room: another part's, or padding
        walked = _walked(source, ranges)
        for values in itertools.product(*(range(*ranges[axis]) for axis in walked)):
            single = {axis: (value, value + 1) for axis, value in zip(walked, values, strict=True)}
            yield _piece(target, source, cover, box, ranges | single)


def digit_boxes(dim: Dim, start: int, stop: int) -> Iterator[Box]:
    """Cuts [start, stop) into boxes of digits, each of the form (one, ..., one, a range, all, ..., all), hence contiguous.

    >>> from shardconv.axes import Digit
    >>> list(digit_boxes((Digit("a", 5, 5), Digit("b", 10, 10)), 7, 43))
    [((0, 1), (7, 10)), ((1, 4), (0, 10)), ((4, 5), (0, 3))]
    """
    if start >= stop:
        return
    if not dim:
        yield ()
        return
    inner = math.prod(digit.radix for digit in dim[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last and stop - start < inner:
        for rest in digit_boxes(dim[1:], start - first * inner, stop - first * inner):
            yield ((first, first + 1), *rest)
        return
    if start % inner:
        for rest in digit_boxes(dim[1:], start % inner, inner):
            yield ((first, first + 1), *rest)
        first += 1
    whole = stop // inner
    if whole > first:
        yield ((first, whole), *((0, digit.radix) for digit in dim[1:]))
    if stop % inner:
        for rest in digit_boxes(dim[1:], 0, stop % inner):
            yield ((last, last + 1), *rest)


def _walked(source: Address, ranges: Mapping[str, Interval]) -> list[str]:
    """The axes that must be walked one by one: those in the name, and those outside a partly read inner digit."""
    axes = list(source.named)
    for dim in source.dims:
        contiguous = True
        for digit in reversed(dim):
            length = ranges[digit.axis][1] - ranges[digit.axis][0]
            if not contiguous and length > 1:
                axes.append(digit.axis)
            contiguous = contiguous and length == digit.radix
    return axes


def _piece(
    target: Address, source: Address, cover: tuple[Box, ...], box: Box, ranges: Mapping[str, Interval]
) -> Piece:
    first = {axis: start for axis, (start, _) in ranges.items()}
    last = {axis: stop - 1 for axis, (_, stop) in ranges.items()}
    stored = [digit.axis for dim in source.dims for digit in dim]
    wanted = [digit for dim in target.dims for digit in dim]
    order = [stored.index(digit.axis) for digit in wanted if digit.axis in stored]
    cut = list(itertools.chain(*cover))
    return Piece(
        key=source.key(first),
        box=tuple((encode(dim, first), encode(dim, last) + 1) for dim in source.dims),
        digits=box_shape(tuple(ranges[axis] for axis in stored)),
        order=(*order, *(place for place in range(len(stored)) if place not in order)),
        region=tuple(_side(dim, part, side[0]) for dim, part, side in zip(target.dims, cover, box, strict=True)),
        split=box_shape(tuple(cut)),
        within=tuple(
            (ranges[digit.axis][0] + digit.offset - start, ranges[digit.axis][1] + digit.offset - start)
            for digit, (start, _) in zip(wanted, cut, strict=True)
        ),
    )


def _side(dim: Dim, part: Box, origin: int) -> Interval:
    """The interval of the output buffer, which begins at `origin`, that a contiguous box of digits covers."""
    start = 0
    for digit, (low, _) in zip(dim, part, strict=True):
        start = start * digit.radix + low
    return start - origin, start - origin + box_size(part)

