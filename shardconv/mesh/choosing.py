"""Which way a leaf takes onto the mesh: laid out by the hosts, or by the devices.

    host     each process makes the shards of its own devices, and reads the source rows that they are made of
    device   the processes read the source once between them, as it lies, and the devices exchange what they have

The host's way needs no exchange, no compiling and no memory on the devices but the result's. What speaks against it is reading: where the
shards of several processes are made of the same rows, because they are cut along columns or are copies of each other, each of them reads
these rows. A process that needs a part of each row reads the rows, since to skip runs of some kilobytes costs more than to read them. So
the bytes are counted for every process as its reader will read them, and the devices are asked where that is more than SPARED per process
above what there is to read. All processes come to the same answer, for it depends on the plan and the mesh alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from shardconv.boxes import Box
from shardconv.dtypes import dtype_named, dtype_of_code
from shardconv.formats import Tensor
from shardconv.formats.reading import cost
from shardconv.leaf import Leaf, Part, leaf_pieces
from shardconv.placement import merged
from shardconv.units import READ_GAP
from shardconv.units import cut as likeness

Way = Literal["host", "device"]

# What a process reads in the time that an exchange takes to compile and to begin: about 0.1 s, at hundreds of MB/s.
SPARED = 32 << 20

# Bits of the elements that devices move as unsigned integers; wider ones need a switch of JAX's, narrower ones share a byte.
MOVED = (8, 16, 32)


def choose(leaf: Leaf, boxes: Sequence[Sequence[Box]], stored: Mapping[str, Tensor]) -> Way:
    """The way of a leaf, by the boxes that the devices of each process have of it."""
    if len(boxes) == 1 or not can_exchange(leaf):
        return "host"
    return "device" if sum(host_bytes(leaf, boxes, stored)) - source_bytes(leaf) > SPARED * len(boxes) else "host"


def can_exchange(leaf: Leaf) -> bool:
    """Whether devices can lay the leaf out."""
    return dtype_named(leaf.dtype).bits in MOVED


def host_bytes(leaf: Leaf, boxes: Sequence[Sequence[Box]], stored: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Bytes that each process reads where it makes the shards of its devices itself."""
    known: dict[object, int] = {}
    return tuple(sum(_bytes(leaf, box, stored, known) for box in merged(theirs)) for theirs in boxes)


def source_bytes(leaf: Leaf) -> int:
    """Bytes of the source that the leaf is made of: what the processes read between them where the devices lay it out."""
    return sum(math.prod(digit.size for dim in part.target.dims for digit in dim) * _bits(part) // 8 for part in leaf.parts)


def _bits(part: Part) -> int:
    return max(dtype_of_code(code).bits for code in part.dtypes)


def _bytes(leaf: Leaf, box: Box, stored: Mapping[str, Tensor], known: dict[object, int]) -> int:
    """Bytes read for a box. Boxes that cut the digits alike cost the same, and so do tensors that differ in nothing but a number."""
    one, times = _of_one_name(leaf, box)
    alike = all(len(part.dtypes) == 1 and dtype_of_code(part.dtypes[0]).bits >= 8 for part in leaf.parts)
    like = tuple(likeness(part.target.dims, one) for part in leaf.parts) if alike else one
    if like not in known:
        known[like] = sum(cost(stored[piece.key], piece.box, READ_GAP)[0] for _, piece in leaf_pieces(leaf, one))
    return known[like] * times


def _of_one_name(leaf: Leaf, box: Box) -> tuple[Box, int]:
    """The box without all but the first index of dims that choose a tensor by its name, and how many such there are in the box."""
    if len(leaf.parts) > 1 or len(leaf.parts[0].dtypes) > 1:
        return box, 1
    named, times, one = leaf.parts[0].source.named, 1, []
    for dim, (start, stop) in zip(leaf.parts[0].target.dims, box, strict=True):
        if len(dim) == 1 and dim[0].axis in named and dim[0].size == dim[0].radix:
            times, stop = times * (stop - start), start + 1
        one.append((start, stop))
    return tuple(one), times
