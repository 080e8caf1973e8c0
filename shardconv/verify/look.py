"""One task of a worker: read boxes of one leaf back, and hold each against what belongs there.

Memory: a slab of the leaf and the next one, some rows of a source tensor, and what becomes of them; all bounded by the task's `memory`,
however large the leaf, the chunk or the tensor. Boxes that are whole chunks are hashed as they were when they were written.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shardconv.formats import ComputedTensor
from shardconv.verify.compare import Odd, bounds, compare, differing
from shardconv.verify.computed import WithComputed
from shardconv.verify.rounding import bits
from shardconv.verify.statement import Block, Box, Reference, blocks, meet, volume, within
from shardconv.verify.stored import Stored, reason
from shardconv.verify.tensors import Tensors, numpy_dtype

Array = npt.NDArray[Any]

# Bytes of source rows at a time: enough that a request and the way here do not show, few enough to be in the cache still when compared.
ROWS = 4 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where both sides are: the pytree's directory, and the source's with the names of its files and the key of tensors in them; and what
    is computed of these."""

    folder: str
    root: str
    files: tuple[str, ...]
    prefix: str = ""
    computed: tuple[ComputedTensor, ...] = ()

    def tensors(self) -> Tensors:
        """The source, open."""
        if self.computed:
            return WithComputed(self.root, self.files, self.prefix, self.computed)
        return Tensors(self.root, self.files, self.prefix)


@dataclass(frozen=True, slots=True)
class Task:
    """Boxes of one leaf, to be compared within about `memory` bytes; `first` is the number of the first where they are chunks in order."""

    place: Place
    reference: Reference
    boxes: tuple[Box, ...]
    memory: int
    first: int | None

    @property
    def nbytes(self) -> int:
        """The bytes of its boxes."""
        return sum(map(volume, self.boxes)) * numpy_dtype(self.reference.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Finding:
    """One element that is wrong: its index, both values with their bits, and the tensor it should be from ("" for padding)."""

    index: tuple[int, ...]
    found: str
    expected: str
    key: str


@dataclass(slots=True)
class Sight:
    """What was seen of a leaf: how much, how much of it is wrong and where, values that are not finite, digests of whole chunks.

    `unreadable` is what the store said of a box that it could not read.
    """

    leaf: str
    elements: int = 0
    wrong: int = 0
    where: Box | None = None
    first: Finding | None = None
    found: Odd = field(default_factory=Odd)
    source: Odd = field(default_factory=Odd)
    digests: dict[int, str] = field(default_factory=dict)
    unreadable: str = ""

    def add(self, other: "Sight") -> None:
        """Take in what another task saw of the same leaf."""
        self.elements += other.elements
        self.wrong += other.wrong
        if other.where is not None:
            self.where = other.where if self.where is None else _around(self.where, other.where)
        self.first = min((f for f in (self.first, other.first) if f is not None), key=lambda f: f.index, default=None)
        self.found, self.source = self.found.plus(other.found), self.source.plus(other.source)
        self.digests |= other.digests
        self.unreadable = self.unreadable or other.unreadable


def _around(a: Box, b: Box) -> Box:
    return tuple((min(p, r), max(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))


@lru_cache(maxsize=1)
def opened(place: Place) -> tuple[Stored, Tensors]:
    """Both sides, open; a worker keeps them from task to task."""
    return Stored(place.folder), place.tensors()


def look(task: Task) -> Sight:
    """Compare the boxes of a task; raises InputError where the source cannot be read."""
    stored, tensors = opened(task.place)
    reference, sight = task.reference, Sight(task.reference.name)
    itemsize = numpy_dtype(reference.dtype).itemsize
    cut = [(number, slab) for number, box in enumerate(task.boxes) for slab in slabs(box, max(task.memory // 4 // itemsize, 1))]
    digests = [xxhash.xxh3_64() for _ in task.boxes]
    arrays = stored.reads(reference.name, [slab for _, slab in cut])
    for number, slab in cut:
        try:
            found = next(arrays)
        except ValueError as error:  # TensorStore's, of a chunk that is missing or broken
            sight.unreadable = reason(error)
            return sight
        digests[number].update(bits(found).data)
        _compare(sight, reference, tensors, slab, found, min(ROWS, task.memory // 32))
    if task.first is not None:
        sight.digests = {task.first + number: digest.hexdigest() for number, digest in enumerate(digests)}
    return sight


def slabs(box: Box, most: int) -> list[Box]:
    """A box cut along its first dim so that no part has more than about `most` elements; in order, they are its bytes in C order."""
    if not box or volume(box) <= most:
        return [box]
    (start, stop), *rest = box
    step = max(most * (stop - start) // volume(box), 1)
    return [((low, min(low + step, stop)), *rest) for low in range(start, stop, step)]


def _compare(sight: Sight, reference: Reference, tensors: Tensors, box: Box, found: Array, most: int) -> None:
    covered = 0
    for block in blocks(reference, tensors, box, most, passing=True):
        there = found[within(block.box, box)]
        covered += there.size
        _block(sight, block, there)
    sight.elements += found.size
    if covered < found.size:
        _padding(sight, reference, box, found)


def _block(sight: Sight, block: Block, found: Array) -> None:
    compared = compare(found.reshape(block.source.shape), block.source, None if block.moves else block.change)
    sight.found, sight.source = sight.found.plus(compared.found), sight.source.plus(compared.source)
    if not compared.same:
        expected = block.values
        _wrong(sight, block.box, differing(found, expected, cast=not block.moves), found, expected, block.key)


def _padding(sight: Sight, reference: Reference, box: Box, found: Array) -> None:
    """What no origin fills must be zero."""
    free = np.ones(found.shape, np.bool_)
    for origin in reference.origins:
        if shared := meet(origin.put, box):
            free[within(shared, box)] = False
    free &= bits(found) != 0
    if free.any():
        _wrong(sight, box, free, found, np.zeros_like(found), "")


def _wrong(sight: Sight, box: Box, mask: Array, found: Array, expected: Array, key: str) -> None:
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))
    index = tuple(i + start for i, (start, _) in zip(place, box, strict=True))
    where = tuple((a + start, b + start) for (a, b), (start, _) in zip(bounds(mask), box, strict=True))
    one = Finding(index, said(found[place]), said(expected[place]), key)
    sight.add(Sight(sight.leaf, wrong=int(mask.sum()), where=where, first=one))


def said(value: Any) -> str:
    """A value and its bits.

    >>> said(np.float32(0.5))
    '0.5 (0x3f000000)'
    """
    array = np.asarray(value)
    text = f"{float(array):.6g}" if "float" in array.dtype.name else str(array)
    return f"{text} (0x{int(bits(array)):0{2 * array.dtype.itemsize}x})"
