"""Placement on a mesh, on paper: the box of an array that each device has, which device writes it, and what is in memory at a time.

A *window* is a run of leaves that are on the mesh together: they are placed, written and freed before the next. Chunks lie within shards
here, so each is written by one process from the memory of one of its devices; of the devices that have a shard, the one with the least to
write so far does it. A unit is what one position of the mesh writes of one window. So a run on a mesh is recorded, resumed, committed and
checked as any other, and any other executor could do its units.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from shardconv.boxes import Box, chunk_box
from shardconv.chunks import divisors
from shardconv.dtypes import dtype_of_code
from shardconv.leaf import CHUNKS, Leaf
from shardconv.sharding import MeshRules, Spec, shards, split_by
from shardconv.units import Span, Unit

NEAR = 8  # a side may stay this many times below the limit: less, and a prime size would end in chunks of single rows


@dataclass(frozen=True, slots=True)
class Window:
    """Leaves `start` to `stop` are on the mesh together; `units` are what is written of them, by the mesh positions that write it."""

    start: int
    stop: int
    units: tuple[tuple[int, int], ...]  # (position in row-major order of the mesh axes, unit)


def device_boxes(shape: Sequence[int], spec: Spec, mesh: MeshRules) -> tuple[Box, ...]:
    """The box of an array that each position of a mesh has, positions in row-major order of the mesh axes.

    >>> device_boxes((4, 6), ("x", None), MeshRules({"x": 2, "y": 1}, {}))
    (((0, 2), (0, 6)), ((2, 4), (0, 6)))
    """
    boxes = []
    for position in range(mesh.devices):
        at = _along(position, mesh.axes)
        box = []
        for length, names in zip(shape, split_by(spec), strict=True):
            shard = 0
            for name in names:
                shard = shard * mesh.axes[name] + at[name]
            side = length // math.prod(mesh.axes[name] for name in names)
            box.append((shard * side, (shard + 1) * side))
        boxes.append(tuple(box))
    return tuple(boxes)


def _along(position: int, axes: Mapping[str, int]) -> dict[str, int]:
    """The place of a position along each mesh axis."""
    at = {}
    for name, size in reversed(tuple(axes.items())):
        position, at[name] = divmod(position, size)
    return at


def merged(boxes: Iterable[Box]) -> tuple[Box, ...]:
    """Few boxes that cover the same elements: boxes that are there twice once, and neighbours with equal sides joined, last dim first.

    The boxes are equal or apart, as shards are.

    >>> merged([((0, 2), (0, 3)), ((0, 2), (3, 6)), ((4, 6), (0, 6))])
    (((0, 2), (0, 6)), ((4, 6), (0, 6)))
    """
    found = sorted(set(boxes))
    for dim in reversed(range(len(found[0]) if found else 0)):
        joined: dict[tuple[Box, Box], list[tuple[int, int]]] = {}
        for box in sorted(found, key=lambda box: box[dim]):
            sides = joined.setdefault((box[:dim], box[dim + 1 :]), [])
            if sides and sides[-1][1] == box[dim][0]:
                sides[-1] = (sides[-1][0], box[dim][1])
            else:
                sides.append(box[dim])
        found = [(*before, side, *after) for (before, after), sides in joined.items() for side in sides]
    return tuple(sorted(found))


def chunk_in_shard(leaf: Leaf, limit: int, mesh: MeshRules, order: Sequence[int]) -> Leaf:
    """The leaf in chunks of about `limit` bytes, each of which lies in one shard; they are cut along dims in `order`.

    Where no divisor of a shard's side comes near the limit from below, the next above it is taken: the shard is in memory anyway.
    """
    shard = [length // count for length, count in zip(leaf.shape, shards(leaf.spec, mesh), strict=True)]
    chunk = list(shard)
    for dim in order:
        size = math.prod(chunk) * leaf.itemsize
        if size <= limit:
            break
        most = max(limit * chunk[dim] // size, 1)
        below = max(n for n in divisors(shard[dim]) if n <= most)
        above = min((n for n in divisors(shard[dim]) if n > most), default=below)
        chunk[dim] = below if below * NEAR >= most else above
    return replace(leaf, chunk=tuple(chunk), inner=tuple(chunk))


def cut_windows(leaves: Sequence[Leaf], mesh: MeshRules, processes: int, budget: int, store_copies: int) -> Iterator[tuple[int, int]]:
    """Runs of leaves (start, stop) that fit the memory budget of each process together; a leaf that does not fit alone is a run of its own.

    See `memory` for what they take.
    """
    start, held = 0, Held()
    for place, leaf in enumerate(leaves):
        alone = _held(leaf, mesh, processes, store_copies)
        if place > start and held.plus(alone).nbytes > budget:
            yield start, place
            start, held = place, Held()
        held = held.plus(alone)
    if leaves:
        yield start, len(leaves)


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of a process: the shards of some leaves, those of the largest in the making, and the buffers of a worker for one chunk."""

    shards: int = 0
    making: int = 0
    buffers: int = 0

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.shards + self.making + self.buffers

    def plus(self, other: "Held") -> "Held":
        """Of the leaves of both; they are made one after another."""
        return Held(self.shards + other.shards, max(self.making, other.making), max(self.buffers, other.buffers))


def _held(leaf: Leaf, mesh: MeshRules, processes: int, store_copies: int) -> Held:
    own = resident(leaf, mesh, processes)
    return Held(own, own * leaf.rows_ratio, leaf.chunk_bytes * (CHUNKS + store_copies + leaf.rows_ratio))


def memory(leaves: Sequence[Leaf], mesh: MeshRules, processes: int, store_copies: int) -> int:
    """The most bytes that a process holds while it places and writes these leaves together.

    The shards of all of them on its devices (which on a CPU are in the same memory), those of one in the making, and the buffers of a
    worker for one chunk.
    """
    return reduce(Held.plus, (_held(leaf, mesh, processes, store_copies) for leaf in leaves)).nbytes


def resident(leaf: Leaf, mesh: MeshRules, processes: int) -> int:
    """Bytes that the devices of one process have of a leaf, replicas among them counted."""
    return leaf.nbytes // math.prod(shards(leaf.spec, mesh)) * (mesh.devices // processes)


def mesh_units(leaves: Sequence[Leaf], mesh: MeshRules, windows: Iterable[tuple[int, int]]) -> tuple[tuple[Window, ...], tuple[Unit, ...]]:
    """What each position of the mesh writes of each window; bytes read are those that the chunks are made of, each once."""
    made: list[Window] = []
    units: list[Unit] = []
    load = [0] * mesh.devices
    for start, stop in windows:
        spans: dict[int, list[Span]] = {}
        for number in range(start, stop):
            for position, chunks in _owned(leaves[number], mesh, load).items():
                spans.setdefault(position, []).extend(Span(number, *run) for run in _runs(chunks))
        mine = []
        for position, own in sorted(spans.items()):
            mine.append((position, len(units)))
            written = sum(_bytes(leaves[span.leaf], span) for span in own)
            units.append(Unit(len(units), tuple(own), sum(_source_bytes(leaves[span.leaf], span) for span in own), written, 0))
        made.append(Window(start, stop, tuple(mine)))
    return tuple(made), tuple(units)


def _owned(leaf: Leaf, mesh: MeshRules, load: list[int]) -> dict[int, list[int]]:
    """The chunks that each position writes, and their bytes added to its `load`."""
    holders: dict[Box, list[int]] = {}
    for position, box in enumerate(device_boxes(leaf.shape, leaf.spec, mesh)):
        holders.setdefault(box, []).append(position)
    owned: dict[int, list[int]] = {}
    sides = [length // count for length, count in zip(leaf.shape, shards(leaf.spec, mesh), strict=True)]
    for chunk in range(leaf.chunks):
        corner = [start for start, _ in chunk_box(leaf.shape, leaf.chunk, chunk)]
        shard = tuple((at // side * side, at // side * side + side) for at, side in zip(corner, sides, strict=True))
        writer = min(holders[shard], key=lambda position: (load[position], position))
        load[writer] += leaf.chunk_bytes
        owned.setdefault(writer, []).append(chunk)
    return owned


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as half-open runs.

    >>> list(_runs([1, 2, 5]))
    [(1, 3), (5, 6)]
    """
    start = before = numbers[0]
    for number in numbers[1:]:
        if number != before + 1:
            yield start, before + 1
            start = number
        before = number
    yield start, before + 1


def _bytes(leaf: Leaf, span: Span) -> int:
    return (span.stop - span.start) * leaf.chunk_bytes  # chunks within shards are all of one size


def _source_bytes(leaf: Leaf, span: Span) -> int:
    """What the source stores of these chunks, rooms left out as far as they are even."""
    elements = _bytes(leaf, span) // leaf.itemsize
    bits = max(dtype_of_code(code).bits for part in leaf.parts for code in part.dtypes)
    filled = 1 - leaf.zeros / math.prod(leaf.shape) if leaf.shape else 1
    return int(elements * bits * filled) // 8
