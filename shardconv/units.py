"""Units: the resumable, repeatable pieces of work, and what each costs.

A unit is a run of whole chunks that no other unit touches. Its bytes and requests are worked out as the reader will make them, from the
shapes in the headers, so that a plan can say what a conversion reads before it reads anything.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardconv.axes import Dim
from shardconv.boxes import Box, box_shape, chunk_box
from shardconv.dtypes import dtype_of_code
from shardconv.formats import Tensor
from shardconv.formats.reading import cost
from shardconv.leaf import Leaf, leaf_pieces

# Bytes between two runs of a box that are read, and thrown away, to save a request: about what a request to a local disk costs.
READ_GAP = 64 << 10

# A unit is about this fraction of the whole, within these bounds: small enough that workers finish together and little is repeated after
# a crash, large enough that opening a database and syncing it (some 20 ms) do not show.
UNITS, UNIT_LEAST, UNIT_MOST = 64, 32 << 20, 256 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """Chunks [start, stop) of leaf number `leaf`, in row-major order of its grid."""

    leaf: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Work that is done or not done: spans of whole chunks, with the bytes and requests it takes."""

    number: int
    spans: tuple[Span, ...]
    bytes_read: int
    bytes_written: int
    requests: int


def cut_units(leaves: Sequence[Leaf], stored: Mapping[str, Tensor]) -> Iterator[Unit]:
    """Cuts the chunks of all leaves, in order, into units of about equal size."""
    total = sum(leaf.nbytes for leaf in leaves)
    wanted = min(max(total // UNITS, UNIT_LEAST), UNIT_MOST)
    number, spans, spent = 0, [], _Cost()
    for place, leaf in enumerate(leaves):
        start, costs = 0, _ChunkCosts(leaf, stored)
        for chunk in range(leaf.chunks):
            spent = spent.plus(costs.of(chunk))
            if spent.written >= wanted:
                spans.append(Span(place, start, chunk + 1))
                yield Unit(number, tuple(spans), spent.read, spent.written, spent.requests)
                number, spans, spent, start = number + 1, [], _Cost(), chunk + 1
        if start < leaf.chunks:
            spans.append(Span(place, start, leaf.chunks))
    if spans:
        yield Unit(number, tuple(spans), spent.read, spent.written, spent.requests)


@dataclass(frozen=True, slots=True)
class _Cost:
    read: int = 0
    written: int = 0
    requests: int = 0

    def plus(self, other: "_Cost") -> "_Cost":
        return _Cost(self.read + other.read, self.written + other.written, self.requests + other.requests)


class _ChunkCosts:
    """What each chunk of a leaf costs; chunks that cut the digits alike cost the same, so few are worked out.

    Not so where tensors differ in dtype, or where two elements share a byte: there it matters which tensor, and which element.
    """

    def __init__(self, leaf: Leaf, stored: Mapping[str, Tensor]) -> None:
        self._leaf, self._stored = leaf, stored
        self._known: dict[object, _Cost] = {}
        codes = [dtype_of_code(code) for part in leaf.parts for code in part.dtypes]
        self._alike = len(codes) == len(leaf.parts) and all(code.bits >= 8 for code in codes)

    def of(self, chunk: int) -> _Cost:
        box = chunk_box(self._leaf.shape, self._leaf.chunk, chunk)
        like = tuple(cut(part.target.dims, box) for part in self._leaf.parts) if self._alike else box
        if like not in self._known:
            self._known[like] = self._work_out(box)
        return self._known[like]

    def _work_out(self, box: Box) -> _Cost:
        costs = [cost(self._stored[piece.key], piece.box, READ_GAP) for _, piece in leaf_pieces(self._leaf, box)]
        written = math.prod(box_shape(box)) * self._leaf.itemsize
        return _Cost(sum(read for read, _ in costs), written, sum(requests for _, requests in costs))


def cut(dims: Sequence[Dim], box: Box) -> tuple[tuple[int, int], ...]:
    """What a box's cost depends on: its sides, and where they start among the inner digits, or among the parts of a sum."""
    cuts = []
    for dim, (start, stop) in zip(dims, box, strict=True):
        inner = math.prod(digit.radix for digit in dim[1:])
        roomy = any(digit.size < digit.radix for digit in dim)
        cuts.append((stop - start, start if roomy else start % inner))
    return tuple(cuts)
