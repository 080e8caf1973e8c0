"""Chunks: what one write fills, and what a reader fetches.

Three wishes meet here. No chunk is written twice. A restore onto the target mesh reads each byte once. A block of source rows is read
once. The zarr sharding codec grants all three: the *chunk* is what is written at once, in a shape whose source is whole rows, and the
*inner* chunks in it divide the shards of the mesh.

A chunk starts as the whole tensor and is cut until it fits the limit, first along dims whose axes are in the source's name (layers,
experts: another tensor, not another part of one), then along the slowest dim of the source, so that the part of each source tensor that a
chunk needs stays one block of rows.
"""

import math
from collections.abc import Sequence

from shardconv.axes import Address, Dim

Shape = tuple[int, ...]

# How far below the limit a side may stay for the wishes of the mesh: less than this part of it, and a prime size would end in chunks of
# single rows, many millions of them.
SHORTEST = 8


def choose_chunk(shape: Shape, *, itemsize: int, limit: int, shards: Shape, order: Sequence[int]) -> tuple[Shape, Shape]:
    """The chunk of at most `limit` bytes, cut along dims in `order`, and its inner chunk.

    `shards` is the number of shards of each dim, which divides it. The inner chunk divides the chunk, and the shard too, unless no
    length near the limit does; `limit` is at least one element.

    >>> choose_chunk((4096, 32, 14336), itemsize=2, limit=64 << 20, shards=(8, 1, 1), order=(1, 2, 0))
    ((4096, 1, 7168), (512, 1, 7168))
    """
    chunk = list(shape)
    for dim in order:
        size = math.prod(chunk) * itemsize
        if size <= limit:
            break
        most = max(limit * chunk[dim] // size, 1)
        chunk[dim] = _side(shape[dim], shape[dim] // shards[dim], most)
    inner = (_inner(side, size // count) for side, size, count in zip(chunk, shape, shards, strict=True))
    return tuple(chunk), tuple(inner)


def _side(size: int, shard: int, most: int) -> int:
    """The longest side of at most `most` that fits both the dim and its shards.

    It divides the shard or is several shards, so that an inner chunk need not be shorter. Where that leaves it far from `most` (no
    shards and a prime vocabulary, say), the dim is cut evenly instead, with a shorter chunk at the end.
    """
    fitting = [n for n in divisors(shard) if n <= most] + [n * shard for n in divisors(size // shard) if n * shard <= most]
    best = max(fitting)
    if best * (2 if shard == size else SHORTEST) < most:
        best = -(-size // -(-size // most))
    return best


def _inner(side: int, shard: int) -> int:
    """What a reader fetches along one dim: the shard where it divides the chunk, else the chunk itself."""
    return shard if side % shard == 0 else side


def divisors(n: int) -> list[int]:
    """The divisors of a number, in no order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in small]


def cut_order(target: Address, source: Address) -> tuple[int, ...]:
    """The dims of the target in the order in which cutting them costs the source least.

    >>> from shardconv.axes import address
    >>> axes = {"layers": 2, "embed": 3, "mlp": 4}
    >>> cut_order(address("wi", "embed layers mlp", axes), address("{layers}.up", "mlp embed", axes))
    (1, 2, 0)
    """
    slowness = [digit.axis for hole in source.holes for digit in hole.dim]
    slowness += [digit.axis for dim in source.dims for digit in dim]
    dims = range(len(target.dims))
    return tuple(sorted(dims, key=lambda dim: _slowest(target.dims[dim], slowness)))


def _slowest(dim: Dim, slowness: Sequence[str]) -> int:
    return min((slowness.index(digit.axis) for digit in dim), default=len(slowness))
