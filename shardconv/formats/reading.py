"""Reading boxes of stored tensors into the caller's memory.

A box is its byte runs; runs with small gaps share a request; a request is one `preadv` whose buffers are the runs'
places in `out` and, for the gaps, one scratch buffer over and over. So the kernel puts every byte where it belongs,
nothing is copied afterwards, a contiguous box is one request however large, and the reader's own memory is the longest
gap. Four-bit elements are read into the end of `out` and spread out from its front, which needs no memory either.

Reads go through the page cache, and what was read is dropped from it behind the reader, so that a checkpoint larger
than RAM pushes nobody else's pages out. A request with gaps is not dropped: its gaps are what the next box needs.

Requests, bytes read and bytes needed are counted; the difference between the last two is the gaps. A `Reader` belongs
to one thread.
"""

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from shardconv.boxes import Box, box_shape, slices, whole
from shardconv.dtypes import dtype_of_code, raw_view, unpack_nibbles
from shardconv.errors import InputError, Problem, RunError
from shardconv.formats import ComputedTensor, StoredTensor, Tensor
from shardconv.formats.strict_json import AGAIN
from shardconv.porting.folding import computed, parsed
from shardconv.runs import RUNS_PER_REQUEST, Run, byte_runs, coalesce, element_runs

# Open files kept: a box of a stacked tensor goes round a few files, and a limit of 256 descriptors per process is met
# in practice.
_OPEN_FILES = 16
# Bytes that may lie in the page cache behind the reader. Dropping a GiB takes 0.01 s in steps of 1 to 16 MiB alike
# (reading it takes 0.13 s from the cache and 0.5 s from a disk), so the step only has to be small against memory.
_DROP_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ReadCounts:
    """What a reader did: requests to the system, bytes they brought, and bytes of those that were asked for."""

    requests: int
    bytes_read: int
    bytes_needed: int


@dataclass(slots=True)
class _OpenFile:
    descriptor: int
    behind: Run = (0, 0)  # the bytes read last that may still be in the page cache


class Reader:
    """Reads boxes of the tensors of one source; a context manager.

    `coalesce_gap` is the most bytes between two runs of a box that are read, and thrown away, to save a request.
    `drop_cache` drops what was read from the page cache.
    """

    def __init__(self, root: str, *, drop_cache: bool = True, coalesce_gap: int) -> None:
        self._root = root
        self._drop_cache = drop_cache and hasattr(os, "posix_fadvise")
        self._gap = coalesce_gap
        self._scratch = memoryview(bytearray(coalesce_gap))
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._requests = self._read = self._needed = 0
        self._touched: set[str] = set()

    @property
    def counts(self) -> ReadCounts:
        """What was read since the reader was made."""
        return ReadCounts(self._requests, self._read, self._needed)

    @property
    def touched(self) -> frozenset[str]:
        """The files that were read from since the reader was made."""
        return frozenset(self._touched)

    def read(self, tensor: Tensor, box: Box, out: npt.NDArray[Any]) -> None:
        """Fill `out` with a box of `tensor`, byte for byte; one that is computed is made of all of its inputs.

        `out` is C-contiguous, of the box's shape and the tensor's dtype in memory; ValueError if not. Raises InputError
        when the file is gone or shorter than its header said, or when the tensor's type cannot be read or its inputs do
        not fit together, and RunError when the system fails to read.
        """
        dtype = dtype_of_code(tensor.dtype)
        if out.shape != box_shape(box) or out.dtype != dtype.numpy or not out.flags.c_contiguous:
            raise ValueError(f"{tensor.name} is read as {dtype.name} {box_shape(box)}, out {out.dtype} {out.shape}")
        if not dtype.readable and isinstance(tensor, StoredTensor):
            fact = f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}, whose packing safetensors does not define"
            raise InputError(f"{tensor.name} cannot be read", [Problem(fact, "store it as F8_E4M3, or packed as U8")])
        if isinstance(tensor, ComputedTensor):
            out[...] = self._computed(tensor)[slices(box)]
            return
        place = raw_view(out).reshape(-1).view(np.uint8)
        if dtype.bits >= 8:
            self._fill(tensor, byte_runs(tensor.shape, box, bits=dtype.bits), place.data)
        else:
            self._fill_nibbles(tensor, box, place)

    def whole(self, tensor: StoredTensor) -> npt.NDArray[Any]:
        """All of a tensor, in memory of its own."""
        out = np.empty(tensor.shape, dtype_of_code(tensor.dtype).numpy)
        self.read(tensor, whole(tensor.shape), out)
        return out

    def _computed(self, tensor: ComputedTensor) -> npt.NDArray[Any]:
        inputs = {one.name: self.whole(one) for one in tensor.inputs}
        try:
            found = computed(parsed(tensor.name), inputs, tensor.shape)
        except ValueError as error:
            raise InputError(f"{tensor.name} cannot be computed", [Problem(str(error))]) from None
        return found.astype(dtype_of_code(tensor.dtype).numpy, copy=False)

    def _fill_nibbles(self, tensor: StoredTensor, box: Box, place: npt.NDArray[np.uint8]) -> None:
        """Read four-bit elements packed into the end of `place`, which has a byte for each, and unpack them there."""
        packed = sum(length for _, length in byte_runs(tensor.shape, box, bits=4))
        source = place.size - packed
        self._fill(tensor, byte_runs(tensor.shape, box, bits=4), place[source:].data)
        done = 0
        for start, count in element_runs(tensor.shape, box):
            length = (start + count + 1) // 2 - start // 2
            unpack_nibbles(place[source : source + length], start % 2, place[done : done + count])
            source, done = source + length, done + count

    def _fill(self, tensor: StoredTensor, runs: Iterable[Run], place: memoryview) -> None:
        """Read the runs of a tensor, one after the other, into `place`."""
        file = self._open(tensor)
        done = 0
        for group in coalesce(runs, gap=self._gap, most=RUNS_PER_REQUEST):
            begin, end = group[0][0], group[-1][0] + group[-1][1]
            buffers = []
            at = begin
            for start, length in group:
                if start > at:
                    buffers.append(self._scratch[: start - at])
                buffers.append(place[done : done + length])
                at, done = start + length, done + length
                self._needed += length
            self._request(file, tensor, tensor.offset + begin, tensor.offset + end, buffers)
            if self._drop_cache and len(group) == 1:
                self._drop_behind(file, tensor.offset + begin, tensor.offset + end)

    def _request(self, file: _OpenFile, tensor: StoredTensor, begin: int, end: int, buffers: list[memoryview]) -> None:
        """Read bytes `begin` to `end` of a file into the buffers, going on after a short read."""
        at = begin
        while at < end:
            try:
                count = os.preadv(file.descriptor, buffers, at)
            except OSError as error:
                fact = f"{tensor.file}: reading bytes {at} to {end} for tensor {tensor.name} failed: {error.strerror}"
                problem = Problem(fact, "run the same command again")
                raise RunError(f"{tensor.file} cannot be read", [problem]) from error
            if count == 0:
                raise _cut_short(file, tensor)
            self._requests += 1
            self._read += count
            at += count
            if at < end:
                buffers = list(rest(buffers, count))

    def _open(self, tensor: StoredTensor) -> _OpenFile:
        """The tensor's file, opened, as the one used last."""
        if tensor.file in self._files:
            self._files.move_to_end(tensor.file)
            return self._files[tensor.file]
        try:
            descriptor = os.open(os.path.join(self._root, tensor.file), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            fact = f"{tensor.file} holds tensor {tensor.name} and cannot be opened any more: {error.strerror}"
            raise InputError(f"{tensor.file} cannot be read", [Problem(fact, "put it back, or plan again")]) from error
        self._files[tensor.file] = file = _OpenFile(descriptor)
        self._touched.add(tensor.file)
        if len(self._files) > _OPEN_FILES:
            self._close(self._files.popitem(last=False)[1])
        return file

    def _drop_behind(self, file: _OpenFile, begin: int, end: int) -> None:
        """Note bytes as read, and drop them from the page cache when enough have come together."""
        if begin != file.behind[1]:
            self._drop(file)
            file.behind = (begin, begin)
        file.behind = (file.behind[0], end)
        if end - file.behind[0] >= _DROP_BYTES:
            self._drop(file)
            file.behind = (end, end)

    def _drop(self, file: _OpenFile) -> None:
        begin, end = file.behind
        if end > begin:
            with contextlib.suppress(OSError):  # it is advice; a file system that does not take it reads as well
                os.posix_fadvise(file.descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _close(self, file: _OpenFile) -> None:
        self._drop(file)
        os.close(file.descriptor)

    def close(self) -> None:
        """Close the files; the reader may be used again."""
        while self._files:
            self._close(self._files.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def cost(tensor: Tensor, box: Box, gap: int) -> tuple[int, int]:
    """The bytes and the requests that reading a box takes, without reading it; `gap` is the reader's.

    >>> cost(StoredTensor("w", "f", "F32", (4, 8), 0, 128), ((0, 4), (0, 2)), 0)
    (32, 4)
    """
    if isinstance(tensor, ComputedTensor):
        costs = [cost(one, whole(one.shape), gap) for one in tensor.inputs]
        return sum(read for read, _ in costs), sum(requests for _, requests in costs)
    runs = byte_runs(tensor.shape, box, bits=dtype_of_code(tensor.dtype).bits)
    groups = [sum(group[-1]) - group[0][0] for group in coalesce(runs, gap=gap, most=RUNS_PER_REQUEST)]
    return sum(groups), len(groups)


def rest(buffers: Iterable[memoryview], done: int) -> Iterator[memoryview]:
    """What of the buffers is still to be filled after their first `done` bytes.

    >>> [len(b) for b in rest([memoryview(bytearray(4)), memoryview(bytearray(6))], 5)]
    [5]
    """
    for buffer in buffers:
        if done < len(buffer):
            yield buffer[done:]
        done = max(0, done - len(buffer))


def _cut_short(file: _OpenFile, tensor: StoredTensor) -> InputError:
    """The error for a file that ended before the tensor did."""
    size = os.fstat(file.descriptor).st_size
    end = tensor.offset + tensor.nbytes
    where = f"tensor {tensor.name} is at bytes {tensor.offset} to {end}"
    fact = f"{tensor.file} was cut short since it was planned: {where}, but the file has {size} ({end - size} short)"
    return InputError(f"{tensor.file} cannot be read", [Problem(fact, AGAIN)])
