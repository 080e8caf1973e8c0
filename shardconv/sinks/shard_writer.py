"""The fast store: zarr 3 shards, uncompressed, in an OCDBT database that is encoded here and written past the page
cache.

One unit is one data file and one manifest. A chunk goes from the caller's memory to the device in one call, with no
copy, where

- its inner chunks lie one after another in memory: they split its leading dims alone, or the caller hands them over
  gathered, and
- its memory starts on a page (`direct.aligned_empty`).

Otherwise it is gathered into scratch memory of the size of a chunk. Short chunks share pages; a long one starts on a
page.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Callable

import numpy as np

from shardconv.boxes import box_shape, grid_shape
from shardconv.dtypes import raw_view
from shardconv.sinks import ocdbt
from shardconv.sinks.counts import WriteCounts
from shardconv.sinks.direct import BUFFER_BYTES, PAGE, LogFile, sync_directory, write_durably
from shardconv.sinks.shard import Array, gather, inner_blocks, shard_index
from shardconv.sinks.spec import (
    MAX_INLINE_BYTES,
    ArraySpec,
    StoreOptions,
    attempt_path,
    chunk_key,
    metadata_key,
    zarr_metadata,
)

Scratch = Callable[[int], Array]


class ShardWriter:
    """The database of one unit attempt; see `chunk_writer.UnitWriter`, which drives it."""

    def __init__(self, stage: str, attempt: str, options: StoreOptions, scratch: Scratch) -> None:
        self._stage = stage
        self._path = attempt_path(stage, attempt)
        self._options = options
        self._values: dict[str, bytes | ocdbt.Stored] = {}
        self._chunks = 0
        self._scratch = scratch
        self._gathered: Array = np.empty(0, np.uint8)
        self._data_file = f"d/{uuid.uuid4().hex}"
        os.makedirs(f"{self._path}/d")
        self._file = LogFile(f"{self._path}/{self._data_file}")

    def put(self, spec: ArraySpec, index: tuple[int, ...], array: Array) -> None:
        """Store one chunk: an array of the chunk's shape."""
        stored = grid_shape(box_shape(spec.box(index)), spec.inner)
        data = self._in_order(raw_view(array), spec.inner)
        inner_bytes = math.prod(spec.inner) * array.itemsize
        table = shard_index(grid_shape(spec.chunk, spec.inner), stored, inner_bytes)
        if metadata_key(spec, self._options) not in self._values:
            document = json.dumps(zarr_metadata(spec, self._options))
            self._store(metadata_key(spec, self._options), np.empty(0, np.uint8), document.encode())
        self._store(chunk_key(spec, self._options, index), data.view(np.uint8), table)
        self._chunks += 1

    def finish(self) -> WriteCounts:
        """Write the tree and the manifest, and make everything durable."""
        node = ocdbt.leaf_node(self._data_file, self._values)
        root = ocdbt.Stored(self._file.append(np.frombuffer(node, np.uint8)), len(node))
        self._file.close()
        manifest = ocdbt.manifest(self._data_file, root, self._values, time.time_ns())
        write_durably(f"{self._path}/manifest.ocdbt", manifest)
        for directory in (f"{self._path}/d", self._path, self._stage):
            sync_directory(directory)
        return WriteCounts(self._chunks, self._file.size + len(manifest), 2)

    def abandon(self) -> None:
        """Let go of the file; without a manifest there is no database."""
        self._file.abandon()

    def _in_order(self, array: Array, inner: tuple[int, ...]) -> Array:
        """The inner chunks one after another, flat: the array's own memory if they lie there like that."""
        blocks = inner_blocks(array, inner)
        if blocks is not None and blocks.flags.c_contiguous and (array.nbytes < BUFFER_BYTES or _on_page(array)):
            return array.reshape(-1)
        count = math.prod(grid_shape(array.shape, inner)) * math.prod(inner)
        if self._gathered.nbytes < count * array.itemsize:
            self._gathered = self._scratch(count * array.itemsize)
        out = self._gathered[: count * array.itemsize].view(array.dtype)
        gather(array, inner, out)
        return out

    def _store(self, key: str, data: Array, tail: bytes) -> None:
        """Put a value, `data` and then `tail`, inline if it is short."""
        if key in self._values:
            raise ValueError(f"{key} is written twice by one attempt")
        length = data.size + len(tail)
        if length <= MAX_INLINE_BYTES:
            self._values[key] = data.tobytes() + tail
            return
        if length >= BUFFER_BYTES:
            self._file.align()
        offset = self._file.append(data)
        self._file.append(np.frombuffer(tail, np.uint8))
        self._values[key] = ocdbt.Stored(offset, length)


def _on_page(array: Array) -> bool:
    return array.ctypes.data % PAGE == 0
