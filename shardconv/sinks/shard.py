"""The `sharding_indexed` codec for uncompressed inner chunks: pure byte layout, so that a chunk reaches the disk
without a second copy.

A shard is its inner chunks, C-ordered and little-endian, one after another in row-major order of the inner grid, and an
index: for every inner chunk of a whole, unclipped chunk an (offset, nbytes) pair of u64 little-endian, then the CRC-32C
of those pairs. Where a chunk is clipped at the array's edge, an inner chunk that it only partly fills is stored whole,
zeros behind the edge, and one that lies outside it is not stored: its pair is twice 2^64 - 1. That is what TensorStore
writes too (tests compare).

The inner chunks of a chunk that is split along its leading dims alone are already in this order in memory. Otherwise
they are gathered, one copy, in the writer's own buffer.

Format: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/v1.0.html
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.boxes import grid_shape

Array = npt.NDArray[Any]

_MISSING = np.uint64(2**64 - 1)
_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected: RFC 3720 appendix B.4


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _crc32c_table()


def crc32c(data: bytes) -> int:
    """The CRC-32C of some bytes; meant for kilobytes of metadata (about 10 MB/s).

    >>> hex(crc32c(b"123456789"))  # the check value of every catalogue of CRCs
    '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def inner_blocks(array: Array, inner: tuple[int, ...]) -> Array | None:
    """The array with the inner grid's axes first, as a view of shape (*counts, *inner); None where the inner chunks do
    not fill it exactly.
    """
    if any(n % i for n, i in zip(array.shape, inner, strict=True)):
        return None
    rank = array.ndim
    split = array.reshape([n for size, i in zip(array.shape, inner, strict=True) for n in (size // i, i)])
    return split.transpose(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))


def gather(array: Array, inner: tuple[int, ...], out: Array) -> None:
    """Copy `array` into `out`, inner chunk by inner chunk, zeros where an inner chunk reaches over the edge.

    `out` is flat, of the array's dtype, as long as the inner chunks together.
    """
    counts = grid_shape(array.shape, inner)
    blocks = inner_blocks(array, inner)
    if blocks is not None:
        out.reshape(blocks.shape)[...] = blocks
        return
    chunks = out.reshape(-1, *inner)
    for number, index in enumerate(np.ndindex(*counts)):
        part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, inner, strict=True))]
        chunks[number] = 0
        chunks[number][tuple(slice(0, n) for n in part.shape)] = part


@lru_cache(maxsize=64)
def shard_index(whole: tuple[int, ...], stored: tuple[int, ...], nbytes: int) -> bytes:
    """The index of a shard whose inner grid is `whole`, of which the leading corner `stored` exists, `nbytes` per inner
    chunk.

    >>> shard_index((2,), (1,), 8)[:32].hex(" ", 8)
    '0000000000000000 0800000000000000 ffffffffffffffff ffffffffffffffff'
    """
    pairs = np.full((*whole, 2), _MISSING, "<u8")
    count = math.prod(stored)
    corner = pairs[tuple(slice(0, n) for n in stored)]
    corner[..., 0] = (np.arange(count, dtype=np.uint64) * np.uint64(nbytes)).reshape(stored)
    corner[..., 1] = nbytes
    data = pairs.tobytes()
    return data + crc32c(data).to_bytes(4, "little")
