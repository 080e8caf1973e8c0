"""Writing the chunks of one unit, into a place of the unit attempt's own.

`UnitWriter` takes whole chunks and writes them in the background, one at a time, while the caller makes the next one.
What it writes is invisible to readers until `finish`, and durable after it: everything is synced once, there.

How attempts stay out of each other's way:
- OCDBT: every attempt has its own database, `ocdbt.process_<attempt>`. A killed attempt leaves a directory without a
  manifest; a slow one that another has overtaken leaves a complete duplicate. The ledger names the winner, `discard`
  removes the others, the commit merges the rest.
- no OCDBT: all attempts share the stage, one file per key. A file is written beside its place and renamed into it, so
  it is whole or absent; an attempt that writes it again writes the same bytes. There are no losers, only lock files of
  killed writers, which `sweep` removes.

Two writers stand behind it. zarr 3 with OCDBT and no compression, the default, is encoded here and written past the
page cache (`shard_writer`); it holds no copy of a chunk, or one where the inner chunks must be gathered. Every other
store is TensorStore's own writing (`tensorstore_writer`); it holds two or three.
"""

import os
import shutil
import sys
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

from shardconv.boxes import Box, box_shape
from shardconv.errors import Problem, RunError
from shardconv.sinks.counts import MEND, WriteCounts
from shardconv.sinks.direct import aligned_bytes
from shardconv.sinks.shard import Array
from shardconv.sinks.shard_writer import Scratch, ShardWriter
from shardconv.sinks.spec import ATTEMPT_PREFIX, ArraySpec, StoreOptions, attempt_path

# What TensorStore's file driver appends to a file's name while it writes it.
_LOCK_SUFFIX = ".__lock"
_GRAVE = "discarded."


class Writer(Protocol):
    """What stores one unit attempt's chunks, one `put` after another."""

    def put(self, spec: ArraySpec, index: tuple[int, ...], array: Array) -> None: ...
    def finish(self) -> WriteCounts: ...
    def abandon(self) -> None: ...


class UnitWriter:
    """Writes one unit attempt's chunks. Leaving the `with` block without `finish` abandons the attempt.

    At most one write is in flight, so the caller may reuse an array's memory after the next `write` or `finish` has
    returned.

    `scratch` gives memory of so many bytes, page-aligned, for a chunk whose inner chunks must be gathered; a worker
    passes memory that it keeps from unit to unit.

    Raises RunError, from the call after the one that failed, where the disk is full or fails.
    """

    def __init__(self, stage: str, attempt: str, options: StoreOptions, scratch: Scratch = aligned_bytes) -> None:
        attempt_path(stage, attempt)  # complains of a bad name here, not in the background
        self._stage = stage
        self._attempt = attempt
        self._options = options
        self._scratch = scratch
        self._writer: Writer | None = None
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def write(self, spec: ArraySpec, box: Box, array: Array) -> None:
        """Write one whole chunk, clipped to the array: `array` is C-contiguous, has the box's shape and the spec's
        dtype.

        With memory that starts on a page (`direct.aligned_empty`), and inner chunks that split leading dims alone, no
        byte is copied.
        """
        index, shape = spec.index(box), box_shape(box)
        if array.shape != shape or array.dtype != spec.numpy or not array.flags.c_contiguous:
            what = f"C-contiguous {spec.dtype} of shape {shape}"
            raise ValueError(f"{spec.name}: expected {what}, got {array.dtype} of shape {array.shape}")
        self._wait()
        self._pending = self._thread.submit(self._put, spec, index, array)

    def finish(self) -> WriteCounts:
        """Wait for the last write, and make everything durable."""
        self._wait()
        if self._writer is None:
            return WriteCounts(0, 0, 0)
        writer, self._writer = self._writer, None
        try:
            return writer.finish()
        except OSError as error:
            raise _failed(self._stage, error) from error
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None

    def _put(self, spec: ArraySpec, index: tuple[int, ...], array: Array) -> None:
        try:
            if self._writer is None:
                self._writer = self._make()
            self._writer.put(spec, index, array)
        except OSError as error:
            raise _failed(self._stage, error) from error

    def _make(self) -> Writer:
        options = self._options
        if options.zarr == 3 and options.ocdbt and options.compression == "none" and sys.byteorder == "little":
            return ShardWriter(self._stage, self._attempt, options, self._scratch)
        from shardconv.sinks.tensorstore_writer import (
            TensorstoreWriter,  # the fast writer's process never loads TensorStore
        )

        return TensorstoreWriter(self._stage, self._attempt, options)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _failed(stage: str, error: OSError) -> RunError:
    fact = f"{error.filename or stage}: {error.strerror or error}"
    return RunError("cannot write the checkpoint", [Problem(fact, MEND)])


def discard(stage: str, attempt: str) -> None:
    """Remove an attempt's database, if it is there. The directory is renamed first, so that a writer that still runs
    cannot complete it.
    """
    path = attempt_path(stage, attempt)
    grave = f"{stage}/{_GRAVE}{attempt}"
    try:
        os.rename(path, grave)
    except FileNotFoundError:
        return
    shutil.rmtree(grave, ignore_errors=True)


def sweep(stage: str, winners: Collection[str]) -> tuple[str, ...]:
    """Discard every attempt that is not among the winners, and lock files of killed writers; the attempts discarded,
    sorted.
    """
    names = sorted(os.listdir(stage))
    for name in names:
        if name.startswith(_GRAVE):  # a discard was killed
            shutil.rmtree(f"{stage}/{name}")
    attempts = [name.removeprefix(ATTEMPT_PREFIX) for name in names if name.startswith(ATTEMPT_PREFIX)]
    losers = tuple(attempt for attempt in attempts if attempt not in frozenset(winners))
    for attempt in losers:
        discard(stage, attempt)
    for directory, below, files in os.walk(stage):
        below[:] = [name for name in below if not name.startswith(ATTEMPT_PREFIX)]
        for file in files:
            if file.endswith(_LOCK_SUFFIX):
                os.unlink(f"{directory}/{file}")
    return losers
