"""The checkpoint as a reader finds it: `_METADATA` and TensorStore, which is what Orbax reads with, and nothing of what wrote it.

Opened at the final directory, so that what Orbax merged is what is read. A read is of one box, decoded, checksums of the index included;
nothing is cached, since nothing is read twice.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts

from shardconv.errors import CheckError, Problem

Array = npt.NDArray[Any]
Box = tuple[tuple[int, int], ...]
LIMIT = 100_000_000  # bytes of metadata: ten times what a tree of 100k arrays has
METADATA = "_METADATA"  # of a pytree: its names, its options, and what its writer keeps with it
# Nothing is cached, and a worker has one core: more threads would each hold a chunk. Files are mapped: to read a chunk into memory of its
# own takes the kernel 1.3 s per GB, for pages that it zeroes first, and the copy out of the map 0.2 s.
LEAN = {
    "cache_pool": {"total_bytes_limit": 0},
    "data_copy_concurrency": {"limit": 1},
    "file_io_concurrency": {"limit": 2},
    "file_io_mode": {"mode": "memmap"},
}

# What to do about an array that cannot be read.
LOST = "the file is damaged or incomplete: convert again with --overwrite"


def reason(error: Exception) -> str:
    """What TensorStore says of an error, without the lines and the brackets in which it repeats what it was asked for.

    >>> reason(ValueError("NOT_FOUND: no such file [tensorstore_spec='{...}'] [source locations='...']"))
    'NOT_FOUND: no such file'
    """
    return str(error).partition("\n")[0].partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]


@dataclass(frozen=True, slots=True)
class StoredLeaf:
    """An array of the checkpoint: `chunk` is the shape that one write filled, if the checkpoint says so, else that which is stored."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]


class Stored:
    """The pytree in a directory, open for reading; raises CheckError where it is none, or where an array cannot be read."""

    def __init__(self, folder: str) -> None:
        self.folder = os.path.abspath(folder)
        try:
            with open(os.path.join(self.folder, METADATA), "rb") as file:
                raw = file.read(LIMIT + 1)
            if len(raw) > LIMIT:
                raise ValueError(f"{METADATA} has over {LIMIT} bytes")
            self._metadata = json.loads(raw)
            self.names = [".".join(str(step["key"]) for step in leaf["key_metadata"]) for leaf in self._metadata["tree_metadata"].values()]
            self.custom: dict[str, Any] = self._metadata.get("custom_metadata") or {}
            if not isinstance(self.custom, dict) or not isinstance(self.custom.get("shardconv") or {}, dict):
                raise TypeError("its custom_metadata is no object")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            fact = f"{METADATA}: {type(error).__name__}: {error}"
            raise CheckError(f"{self.folder} cannot be read as a checkpoint", [Problem(fact)]) from None
        self._context = ts.Context(LEAN)
        self._open: dict[str, ts.TensorStore] = {}
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def leaf(self, name: str) -> StoredLeaf:
        """What an array is."""
        array = self._array(name)
        chunk = array.chunk_layout.write_chunk.shape or ()
        if said := ((self.custom.get("shardconv") or {}).get("chunks") or {}).get(name):
            chunk = said
        return StoredLeaf(tuple(array.shape), array.dtype.name, tuple(size or 1 for size in chunk))

    def read(self, name: str, box: Box) -> Array:
        """A box of an array, in C order, in memory that later reads use again; raises ValueError for a chunk that is missing or broken."""
        return next(self.reads(name, [box]))

    def reads(self, name: str, boxes: Sequence[Box]) -> Iterator[Array]:
        """Boxes of an array, each in memory that is used again for the one after the next: that one is read meanwhile.

        TensorStore would take fresh memory for each, of which the kernel zeroes every page: a third of the time of a read.
        """
        ahead = self._begin(name, boxes[0], 0) if boxes else None
        for number in range(1, len(boxes) + 1):
            if ahead is None:
                return
            array, done = ahead
            ahead = self._begin(name, boxes[number], number % 2) if number < len(boxes) else None
            done.result()
            yield array

    def _begin(self, name: str, box: Box, turn: int) -> tuple[Array, ts.WriteFutures]:
        view = self._array(name)[tuple(slice(*side) for side in box)]
        nbytes = math.prod(view.shape) * view.dtype.numpy_dtype.itemsize
        if self._buffers[turn].nbytes < nbytes:
            self._buffers[turn] = np.empty(nbytes, np.uint8)
        out: Array = self._buffers[turn][:nbytes].view(view.dtype.numpy_dtype).reshape(view.shape)
        source = view.translate_to[(0,) * view.rank] if view.rank else view
        return out, ts.array(out, copy=False, write=True).write(source)

    def _array(self, name: str) -> ts.TensorStore:
        if name not in self._open:
            self._open.clear()  # leaves are looked at one after another; a worker need not keep thousands
            files = {"driver": "file", "path": f"{self.folder}/"}
            base = {"driver": "ocdbt", "base": files} if self._metadata.get("use_ocdbt", True) else files
            spec = {
                "driver": "zarr3" if self._metadata.get("use_zarr3", False) else "zarr",
                "kvstore": base | {"path": f"{base.get('path', '')}{name}/"},
                "fill_missing_data_reads": False,  # a missing chunk is a fault, not zeros
            }
            try:
                self._open[name] = ts.open(spec, open=True, read=True, context=self._context).result()
            except ValueError as error:
                fact = f"{name}: {reason(error)}"
                raise CheckError("the checkpoint cannot be read back", [Problem(fact, LOST)]) from None
        return self._open[name]
