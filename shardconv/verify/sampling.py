"""Which boxes of a leaf are looked at where it is too large to look at all of it.

One in every slice of the axes that are stacked (each layer of each expert), so that no tensor of the source is left out; the corners of the
leaf, where what is cut off or padded shows; boxes across the edges of chunks, where what was written apart meets; the rest anywhere. The
choice depends on the seed and on the leaf's name alone, so that the same seed looks at the same places.
"""

import itertools
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from shardconv.verify.statement import Box, Reference, dims

# Elements of a box: along its last dim, along the others, and in all. A store fetches an inner chunk for one element as for thousands.
LAST, OTHERS, MOST = 256, 4, 4096


def boxes(reference: Reference, chunk: Sequence[int], wanted: int, seed: int) -> tuple[Box, ...]:
    """Boxes of a leaf that is written in chunks: `wanted`, or more where it has more slices and corners.

    >>> from shardconv.verify.statement import Origin
    >>> leaf = Reference("w", (3, 8), "float32", (Origin("h.{}", (), "d", "l d", {"l": 3, "d": 8}, ((0, 8),), ((0, 3), (0, 8))),))
    >>> sorted({box[0] for box in boxes(leaf, (3, 8), 1, seed=0)})
    [(0, 1), (1, 2), (2, 3)]
    """
    random = np.random.default_rng([seed, zlib.crc32(reference.name.encode())])
    sides = _sides(reference)
    corners = (_box(reference.shape, sides, corner) for corner in itertools.product(*((0, n) for n in reference.shape)))
    some = [*corners, *_slices(reference, sides, random)]
    edges = list(_edges(reference.shape, chunk, sides, random))
    some += edges[: max((wanted - len(some)) // 2, 1)]
    while len(some) < wanted:
        some.append(_box(reference.shape, sides, [int(random.integers(n)) for n in reference.shape]))
    return tuple(dict.fromkeys(some))


def _stacked(reference: Reference) -> set[int]:
    """The dims of a leaf that number tensors."""
    return {place for origin in reference.origins for place, dim in enumerate(dims(origin.right)) if dim in origin.stacked}


def _sides(reference: Reference) -> list[int]:
    stacked, room, sides = _stacked(reference), MOST, [1] * len(reference.shape)
    for place in reversed(range(len(sides))):
        limit = 1 if place in stacked else LAST if place == len(sides) - 1 else OTHERS
        sides[place] = min(reference.shape[place], limit, room)
        room //= max(sides[place], 1)
    return sides


def _box(shape: Sequence[int], sides: Sequence[int], start: Sequence[int]) -> Box:
    """The box that starts there, moved back into the leaf."""
    starts = [min(at, n - side) for at, n, side in zip(start, shape, sides, strict=True)]
    return tuple((at, at + side) for at, side in zip(starts, sides, strict=True))


def _slices(reference: Reference, sides: Sequence[int], random: np.random.Generator) -> Iterator[Box]:
    stacked = sorted(_stacked(reference))
    for index in itertools.product(*(range(reference.shape[place]) for place in stacked)):
        start = [int(random.integers(n)) for n in reference.shape]
        for place, at in zip(stacked, index, strict=True):
            start[place] = at
        yield _box(reference.shape, sides, start)


def _edges(shape: Sequence[int], chunk: Sequence[int], sides: Sequence[int], random: np.random.Generator) -> Iterator[Box]:
    """Boxes across an edge between two chunks, along each dim that is cut, in turns; at most a handful of each."""
    cut = [place for place in range(len(shape)) if 0 < chunk[place] < shape[place]]
    for _, place in itertools.product(range(8), cut):
        start = [int(random.integers(n)) for n in shape]
        edge = int(random.integers(1, -(-shape[place] // chunk[place]))) * chunk[place]
        start[place] = max(edge - max(sides[place] // 2, 1), 0)
        yield _box(shape, [max(side, 2) if at == place else side for at, side in enumerate(sides)], start)
