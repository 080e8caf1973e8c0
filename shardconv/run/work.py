"""One unit of work: read rows, put each element in its place, hash, write. A thin loop over the plan.

The buffers belong to the worker's `Workspace` and are reused from chunk to chunk and from unit to unit, since fresh memory costs a page
fault for every page: one for the rows of a piece, two for chunks, so that one is filled while the other is being written, and one in which
the writer gathers inner chunks. A piece that lies in its chunk as it lies in the file is read straight into place.
"""

import itertools
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shardconv.boxes import Box, box_shape, chunk_box
from shardconv.dtypes import dtype_named, dtype_of_code, raw_view
from shardconv.errors import InputError
from shardconv.formats import Tensor
from shardconv.formats.reading import ReadCounts, Reader
from shardconv.plan import READ_GAP, Leaf, Plan, Unit, leaf_pieces
from shardconv.run.heartbeat import memory
from shardconv.sinks.chunk_writer import UnitWriter
from shardconv.sinks.direct import aligned_empty
from shardconv.sinks.spec import ArraySpec, StoreOptions
from shardconv.source import Source, check_unchanged
from shardconv.values import ValueRule, convert

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Done:
    """What a finished unit took; `digests` are (leaf, chunk, xxh3_64 of the chunk's bytes in C order)."""

    unit: int
    attempt: str
    bytes_read: int
    bytes_needed: int
    bytes_written: int
    requests: int
    chunks: int
    files: int
    seconds: float
    cpu_seconds: float
    peak_rss: int
    pid: int
    host: str
    digests: tuple[tuple[int, int, str], ...]


@dataclass
class Workspace:
    """The buffers of one worker process, by name; each grows to the largest array it was asked for."""

    buffers: dict[str, Array] = field(default_factory=dict)

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialised C-ordered array over buffer `name`, which starts on a page."""
        nbytes = math.prod(shape) * dtype.itemsize
        if name not in self.buffers or self.buffers[name].nbytes < nbytes:
            self.buffers.pop(name, None)  # freed before the larger one is made
            self.buffers[name] = aligned_empty((nbytes,), "uint8")
        return self.buffers[name][:nbytes].view(dtype).reshape(shape)

    def scratch(self, nbytes: int) -> Array:
        """The buffer that a writer gathers inner chunks in."""
        return self.array("gathered", (nbytes,), np.dtype(np.uint8))


def do_unit(
    plan: Plan,
    unit: Unit,
    stage: str,
    attempt: str,
    options: StoreOptions,
    tick: Callable[[int], None],
    workspace: Workspace,
) -> Done:
    """Makes every chunk of a unit and writes it under `attempt`; durable on return. `tick` hears the bytes of each chunk.

    Raises InputError where the source is not what was planned, RunError where a disk fails.
    """
    with Reader(plan.source.root, coalesce_gap=READ_GAP) as reader:

        def fill(number: int, box: Box, out: Array) -> None:
            make_box(plan.leaves[number], box, plan.tensors, reader, workspace, out)

        def read() -> ReadCounts:
            require_unchanged(plan.source, reader.touched)
            return reader.counts

        return write_unit(plan, unit, stage, attempt, options, tick, workspace, fill, read)


def write_unit(
    plan: Plan,
    unit: Unit,
    stage: str,
    attempt: str,
    options: StoreOptions,
    tick: Callable[[int], None],
    workspace: Workspace,
    fill: Callable[[int, Box, Array], None],
    read: Callable[[], ReadCounts],
) -> Done:
    """Writes the chunks of a unit, each of which `fill` puts into a buffer, by leaf and box; durable on return.

    `read` is asked when all chunks are there and none counts yet: it says what was read for them, or raises, and nothing was done.
    """
    started, cpu = time.perf_counter(), time.process_time()
    digests = []
    turns = itertools.cycle(("chunk", "other chunk"))
    with UnitWriter(stage, attempt, options, workspace.scratch) as writer:
        for span in unit.spans:
            leaf = plan.leaves[span.leaf]
            spec = array_spec(leaf)
            for number in range(span.start, span.stop):
                box = chunk_box(leaf.shape, leaf.chunk, number)
                out = workspace.array(next(turns), box_shape(box), dtype_named(leaf.dtype).numpy)
                fill(span.leaf, box, out)
                digests.append((span.leaf, number, xxhash.xxh3_64_hexdigest(raw_view(out).data)))
                writer.write(spec, box, out)
                tick(out.nbytes)
        counts = read()
        written = writer.finish()
    return Done(
        unit=unit.number,
        attempt=attempt,
        bytes_read=counts.bytes_read,
        bytes_needed=counts.bytes_needed,
        bytes_written=written.bytes_written,
        requests=counts.requests,
        chunks=written.chunks,
        files=written.files,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu,
        peak_rss=memory()[1],
        pid=os.getpid(),
        host=socket.gethostname(),
        digests=tuple(digests),
    )


def require_unchanged(source: Source, names: Iterable[str]) -> None:
    """Raises InputError where a file that was just read is not, or is no longer, the one that was planned: its bytes may be of both."""
    problems = check_unchanged(source, names)
    if problems:
        raise InputError("the source changed while it was converted", problems)


def array_spec(leaf: Leaf) -> ArraySpec:
    """The leaf as the store sees it."""
    return ArraySpec(leaf.path, leaf.shape, leaf.dtype, leaf.chunk, leaf.inner)


def make_box(
    leaf: Leaf, box: Box, stored: Mapping[str, Tensor], reader: Reader, workspace: Workspace, out: Array
) -> None:
    """Fills `out`, of the box's shape and the leaf's dtype, with a box of a leaf."""
    if leaf.zeros:
        raw_view(out).fill(0)
    for part, piece in leaf_pieces(leaf, box):
        tensor = stored[piece.key]
        if part.rule.moves and dtype_of_code(tensor.dtype).numpy == out.dtype and piece.is_plain(out.shape):
            reader.read(tensor, piece.box, out.reshape(box_shape(piece.box)))
            continue
        piece.land(raw_view(make_rows(part.rule, tensor, piece.box, out.dtype, reader, workspace)), raw_view(out))


def make_rows(
    rule: ValueRule, tensor: Tensor, box: Box, dtype: np.dtype[Any], reader: Reader, workspace: Workspace
) -> Array:
    """A box of a stored tensor as a rule and a dtype want its values, in the workspace's rows, until these are asked for again.

    Rows are read into the end of a buffer as wide as the wider dtype and converted to its front, slab by slab, in place.
    """
    source, shape = dtype_of_code(tensor.dtype).numpy, box_shape(box)
    count = math.prod(shape)
    rows = workspace.array("rows", (count * max(source.itemsize, dtype.itemsize),), np.dtype(np.uint8))
    block: Array = rows[rows.size - count * source.itemsize :].view(source).reshape(shape)
    reader.read(tensor, box, block)
    if rule.moves and source == dtype:
        return block
    converted: Array = rows[: count * dtype.itemsize].view(dtype).reshape(shape)
    convert(block, rule, converted)
    return converted
