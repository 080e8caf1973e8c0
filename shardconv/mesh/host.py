"""Host layout: the shards of a leaf are made in the memory of the process whose devices have them, and go to these devices from there.

The shards of one process are seldom apart: two column shards side by side come from the same source rows. So they are joined into few
boxes, and these are cut into tiles as the source lies, not as the mesh does: the rows of a tile are read once, whole where its box has them
whole, and each shard that the tile meets takes its part of them from memory. A process reads each row block once, however its own devices
share the leaf. What another process has of the same rows, it reads again; `choosing` says when that is too much.

Memory besides the result: the source rows of one tile, and the shards of one leaf. A device of the CPU takes a shard's memory over as it
is; for any other the shard is transferred and its memory freed. No array is whole here unless its sharding says so.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from shardconv.boxes import Box, Interval, box_shape, chunk_box, grid_shape, slices
from shardconv.chunks import choose_chunk, cut_order
from shardconv.dtypes import dtype_named, raw_view
from shardconv.errors import ConfigError, Problem
from shardconv.formats import Tensor
from shardconv.formats.reading import Reader
from shardconv.leaf import Leaf, leaf_pieces
from shardconv.placement import merged
from shardconv.route import Piece
from shardconv.run.work import Workspace, make_box, make_rows
from shardconv.sinks.direct import aligned_empty

Array = npt.NDArray[Any]

# Bytes from which an array is mapped by itself; below, an allocation shares its pages with others, of which a process may have 65,530 maps.
MAPPED = 1 << 20


def place(
    leaf: Leaf,
    sharding: NamedSharding,
    stored: Mapping[str, Tensor],
    reader: Reader,
    workspace: Workspace,
    tile_bytes: int,
) -> jax.Array:
    """The leaf as an array of `sharding`, of which this process makes the shards of its own devices, in tiles of at most `tile_bytes`.

    No other process is waited for. Raises InputError or RunError where the source cannot be read, ConfigError where JAX does not hold
    the leaf's dtype.
    """
    require_held(leaf.dtype)
    devices = boxes_here(leaf.shape, sharding)
    shards = {box: empty(box_shape(box), dtype_named(leaf.dtype).numpy) for box in devices.values()}
    for shard in shards.values() if leaf.zeros else ():
        raw_view(shard).fill(0)
    for tile in tiles(leaf, merged(shards), tile_bytes):
        _make(leaf, tile, shards, stored, reader, workspace)
    arrays: dict[jax.Device, jax.Array] = {}
    for box in list(shards):
        shard = shards.pop(box)
        arrays |= {device: jax.device_put(shard, on(device, sharding)) for device, theirs in devices.items() if theirs == box}
        jax.block_until_ready([array for device, array in arrays.items() if devices[device] == box])
        del shard
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, [arrays[device] for device in devices])


def on(device: jax.Device, sharding: Sharding) -> SingleDeviceSharding:
    """One device's part of a sharding, in the memory of the device that the sharding wants."""
    return SingleDeviceSharding(device, memory_kind=sharding.memory_kind)


def boxes_here(shape: Sequence[int], sharding: Sharding) -> dict[jax.Device, Box]:
    """The box of an array that each device of this process has, in the sharding's order of devices."""
    found = sharding.addressable_devices_indices_map(tuple(shape))
    return {device: index_box(index, shape) for device, index in found.items()}


def index_box(index: Sequence[slice] | None, shape: Sequence[int]) -> Box:
    """A shard's index as JAX gives it, as a box.

    >>> index_box((slice(2, 4), slice(None)), (4, 3))
    ((2, 4), (0, 3))
    """
    sides: list[Interval] = []
    for side, length in zip(index or (), shape, strict=True):
        start, stop, _ = side.indices(length)
        sides.append((start, stop))
    return tuple(sides)


def require_held(dtype: str) -> None:
    """Raises ConfigError where a JAX array cannot have this dtype: 64 bits need a switch, without which they are cut to 32 in silence."""
    wanted = dtype_named(dtype).numpy
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        remedy = 'call jax.config.update("jax_enable_x64", True) first, or ask for another dtype'
        raise ConfigError("JAX does not hold this dtype", [Problem(f"{dtype} is of 64 bits, and JAX would cut it to 32", remedy)])


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised array whose memory is its own, so that a device of the CPU may take it over."""
    return aligned_empty(shape, dtype) if math.prod(shape) * dtype.itemsize >= MAPPED else np.empty(shape, dtype)


def tiles(leaf: Leaf, boxes: Sequence[Box], tile_bytes: int) -> Iterator[Box]:
    """Boxes of at most `tile_bytes` that cover these, cut where it costs the source least."""
    order = cut_order(leaf.parts[0].target, leaf.parts[0].source)
    for box in boxes:
        shape = box_shape(box)
        limit = max(tile_bytes, leaf.itemsize)
        tile, _ = choose_chunk(shape, itemsize=leaf.itemsize, limit=limit, shards=(1,) * len(shape), order=order)
        for number in range(math.prod(grid_shape(shape, tile))):
            within = chunk_box(shape, tile, number)
            yield tuple((first + start, first + stop) for (first, _), (start, stop) in zip(box, within, strict=True))


def _make(
    leaf: Leaf, tile: Box, shards: Mapping[Box, Array], stored: Mapping[str, Tensor], reader: Reader, workspace: Workspace
) -> None:
    """Reads the rows of one tile and hands them out to the shards that it meets."""
    meets = {box: common for box in shards if (common := _common(box, tile)) is not None}
    for box, common in meets.items():
        out = shards[box][slices(_within(common, box))]
        if common == tile and out.flags.c_contiguous:  # it is the shard's alone, so it is made in its place
            make_box(leaf, tile, stored, reader, workspace, out)
            return
    # A piece of what a shard has of the tile lies in one piece of the tile: cut finer, and never across.
    waiting: dict[tuple[int, str], list[tuple[Piece, Array]]] = {}
    for box, common in meets.items():
        place = raw_view(shards[box])[slices(_within(common, box))]
        for part, piece in leaf_pieces(leaf, common):
            waiting.setdefault((id(part), piece.key), []).append((piece, place))
    for part, whole in leaf_pieces(leaf, tile):
        rows = raw_view(make_rows(part.rule, stored[whole.key], whole.box, dtype_named(leaf.dtype).numpy, reader, workspace))
        for piece, place in waiting[id(part), whole.key]:
            if _common(piece.box, whole.box) == piece.box:
                piece.land(rows[slices(_within(piece.box, whole.box))], place)


def _common(a: Box, b: Box) -> Box | None:
    """What two boxes have in common; None where they are apart."""
    common = tuple((max(one[0], other[0]), min(one[1], other[1])) for one, other in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _within(box: Box, outer: Box) -> Box:
    """A box as counted from the corner of another."""
    return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(box, outer, strict=True))
