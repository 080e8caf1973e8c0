"""Every store but the fast one: TensorStore writes the chunks, compressed or not, zarr 2 or 3, with or without OCDBT.

One chunk is written at a time and without a transaction, which would hold the whole unit in memory. With OCDBT, files
are synced once, at the end of the unit, instead of one by one; without, TensorStore syncs each file before it renames
it into place, since the place is shared.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorstore as ts

from shardconv.boxes import grid_shape
from shardconv.errors import Problem, RunError
from shardconv.sinks.counts import MEND, WriteCounts
from shardconv.sinks.direct import sync_directory, sync_file
from shardconv.sinks.shard import Array
from shardconv.sinks.spec import (
    ArraySpec,
    StoreOptions,
    array_spec,
    attempt_path,
    chunk_key,
    metadata_key,
    stored_chunk,
)

# A unit's tree has kilobytes; the cache keeps it from being read back at every commit.
_CACHE_BYTES = 16 * 2**20


class TensorstoreWriter:
    """The store of one unit attempt; see `chunk_writer.UnitWriter`, which drives it."""

    def __init__(self, stage: str, attempt: str, options: StoreOptions) -> None:
        self._stage = stage
        self._attempt = attempt
        self._options = options
        self._arrays: dict[ArraySpec, ts.TensorStore] = {}
        self._keys: set[str] = set()
        self._chunks = 0
        # A context of its own: a shared one remembers the databases of earlier attempts.
        cache = {"total_bytes_limit": _CACHE_BYTES}
        self._context = ts.Context({"cache_pool#ocdbt": cache, "file_io_sync": not options.ocdbt})

    def put(self, spec: ArraySpec, index: tuple[int, ...], array: Array) -> None:
        """Store one chunk: an array of the chunk's shape."""
        box = spec.box(index)
        keys = set(_keys(spec, self._options, index))
        if keys & self._keys:
            raise ValueError(f"{min(keys & self._keys)} is written twice by one attempt")
        try:
            target = self._open(spec)[tuple(slice(a, b) for a, b in box)]
            target.write(array).result()
        except (OSError, ValueError) as error:  # TensorStore's status becomes one of these; its text names the file
            raise RunError(f"cannot write {spec.name}", [Problem(str(error), MEND)]) from error
        self._keys |= keys
        self._chunks += 1

    def finish(self) -> WriteCounts:
        """Make everything durable."""
        if not self._options.ocdbt:
            keys = self._keys | {metadata_key(spec, self._options) for spec in self._arrays}
            files = [Path(self._stage, key) for key in keys]
            return WriteCounts(self._chunks, sum(file.stat().st_size for file in files), len(files))
        root = Path(attempt_path(self._stage, self._attempt))
        files = [path for path in root.rglob("*") if path.is_file()]
        for path in files:
            sync_file(str(path))
        for directory in (root / "d", root, Path(self._stage)):
            sync_directory(str(directory))
        return WriteCounts(self._chunks, sum(file.stat().st_size for file in files), len(files))

    def abandon(self) -> None:
        """Nothing to let go of: no write is in flight."""

    def _open(self, spec: ArraySpec) -> ts.TensorStore:
        if spec not in self._arrays:
            document = array_spec(self._stage, self._attempt, spec, self._options)
            self._arrays[spec] = ts.open(document, open=True, create=True, context=self._context).result()
        return self._arrays[spec]


def _keys(spec: ArraySpec, options: StoreOptions, index: tuple[int, ...]) -> Iterator[str]:
    """The keys of one chunk: its own in zarr 3, those of its inner chunks in zarr 2."""
    counts = grid_shape([b - a for a, b in spec.box(index)], stored_chunk(spec, options))
    first = [i * (c // s) for i, c, s in zip(index, spec.chunk, stored_chunk(spec, options), strict=True)]
    for inner in np.ndindex(*counts):
        yield chunk_key(spec, options, tuple(a + i for a, i in zip(first, inner, strict=True)))
