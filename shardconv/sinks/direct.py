"""Files written past the page cache, from the caller's own memory.

Buffered writing copies every byte into the page cache and pays for its pages (0.4 to 2.6 CPU seconds per GB were
measured on small virtual machines, the more the fresher the memory); direct I/O lets the device fetch the bytes where
they lie (0.01). A `LogFile` is append-only. Long runs of page-aligned memory go straight to the device in one call;
everything else (short values, unaligned memory, the bytes behind the last whole page of a long run) passes through one
small aligned buffer. Consecutive appends are always adjacent in the file, except that `align` skips to the next page.

Where a file system refuses direct I/O (`EINVAL`), the same code writes through the page cache, and asks the kernel to
write out and forget what it holds after each long run, so that dirty pages do not pile up.

Nothing is durable until `close` has returned; that one `fsync` covers the file, and `sync_directory` its name.
"""

import contextlib
import errno
import math
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Device blocks are 512 or 4096 bytes; memory pages are 4096 or more. A multiple of both suits every device.
PAGE = 4096
# Large enough that a device writes it at speed, small against a chunk; unaligned memory is copied through it piece by
# piece.
BUFFER_BYTES = 8 * 2**20

_DIRECT = getattr(os, "O_DIRECT", 0)


def aligned_empty(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An uninitialised C-ordered array that starts on a page, so that direct I/O can use its memory; page-locked by
    nobody, freed with it.

    >>> aligned_empty((3, 5), "float32").ctypes.data % PAGE
    0
    """
    kind = np.dtype(dtype)
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(count * kind.itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults
    return np.frombuffer(memory, kind, count).reshape(shape)


def aligned_bytes(nbytes: int) -> npt.NDArray[Any]:
    """So many uninitialised bytes that start on a page."""
    return aligned_empty((nbytes,), np.uint8)


class LogFile:
    """A new file that is only appended to; `append` returns the offset of what it wrote. `direct` says whether to try
    direct I/O at all.

    Raises FileExistsError where the file exists, OSError where the disk is full or fails.
    """

    def __init__(self, path: str, direct: bool = True) -> None:
        self.path = path
        self.direct = direct and _DIRECT != 0
        self._file = self._open()
        self._buffer: npt.NDArray[np.uint8] | None = None
        self._start = 0  # the file offset of the buffer's first byte, on a page
        self._fill = 0  # bytes in the buffer

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        if self.direct:
            try:
                return os.open(self.path, flags | _DIRECT, 0o666)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self.direct = False
                with contextlib.suppress(FileNotFoundError):  # Linux may have created it before it refused
                    os.unlink(self.path)
        return os.open(self.path, flags, 0o666)

    @property
    def size(self) -> int:
        """The bytes appended so far, skipped ones included."""
        return self._start + self._fill

    def align(self) -> None:
        """Skip to the next page."""
        skip = -self.size % PAGE
        if skip:
            self.append(np.zeros(skip, np.uint8))

    def append(self, data: npt.NDArray[np.uint8]) -> int:
        """Write flat, contiguous bytes behind what is there. The memory is free again on return."""
        offset = self.size
        if data.size >= BUFFER_BYTES and offset % PAGE == 0 and data.ctypes.data % PAGE == 0:
            self._flush()
            whole = data.size - data.size % PAGE
            self._write(data[:whole])
            data = data[whole:]
        while data.size:
            if self._buffer is None:
                self._buffer = aligned_empty((BUFFER_BYTES,), np.uint8)
            part = data[: BUFFER_BYTES - self._fill]
            self._buffer[self._fill : self._fill + part.size] = part
            self._fill += part.size
            data = data[part.size :]
            if self._fill == BUFFER_BYTES:
                self._flush()
        return offset

    def close(self) -> None:
        """Write the rest and make the file durable."""
        try:
            size = self.size
            if self._fill and self._buffer is not None:
                self._buffer[self._fill : self._fill + -self._fill % PAGE] = 0
                self._fill += -self._fill % PAGE
                self._flush()
            os.ftruncate(self._file, size)
            os.fsync(self._file)
            self._start = size
        finally:
            os.close(self._file)

    def abandon(self) -> None:
        """Close the file as it is; its contents do not matter any more."""
        os.close(self._file)

    def _flush(self) -> None:
        """Write out the buffer, which holds whole pages."""
        if self._fill and self._buffer is not None:
            fill, self._fill = self._fill, 0
            self._write(self._buffer[:fill])

    def _write(self, data: npt.NDArray[np.uint8]) -> None:
        """Write whole pages at the end; `_fill` is zero."""
        view = data.data
        while view:
            try:
                written = os.pwrite(self._file, view, self._start)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self._go_buffered()
                continue
            self._start += written
            view = view[written:]
        if not self.direct and data.size >= BUFFER_BYTES:
            _write_out(self._file)

    def _go_buffered(self) -> None:
        """Reopen without direct I/O: this file system took the flag at `open` and refuses it at `write`."""
        self.direct = False
        os.close(self._file)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)


def _write_out(file: int) -> None:
    """Have the kernel write what it buffers of the file, and forget it."""
    getattr(os, "fdatasync", os.fsync)(file)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def write_durably(path: str, data: bytes) -> None:
    """Write a small new file and sync it; its name is durable after `sync_directory`."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]
        os.fsync(file)
    finally:
        os.close(file)


def sync_file(path: str) -> None:
    """Make a file's contents durable, or, for a directory, the names in it."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


sync_directory = sync_file
