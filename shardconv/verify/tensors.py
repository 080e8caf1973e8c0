"""The source as the check reads it: a safetensors reader of its own, so that a fault of the converter's reader does not cancel out.

A file is 8 bytes of length, a JSON header of that length, and data; a tensor is row-major at its offsets. PyTorch's files are read by
`torch_files`. Rows are read by `pread` into fresh arrays: a memory map would count every page that was looked at as ours. An index, where
there is one, says which file has a tensor; a name that a writer left out for an equal tensor is in a header's `__metadata__`, or in the
index' metadata.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shardconv.errors import InputError, Problem
from shardconv.verify.torch_files import places

Array = npt.NDArray[Any]

# Codes of safetensors, and what NumPy or ml_dtypes call them.
NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor's place: `at` counts bytes from the file's beginning."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    at: int


class Tensors:
    """The tensors of a checkpoint: a directory and the names of its files; `prefix` is where in PyTorch's the state dict is."""

    def __init__(self, root: str, files: tuple[str, ...], prefix: str = "") -> None:
        self.entries: dict[str, Entry] = {}
        self._open: dict[str, int] = {}
        self._room = np.empty(0, np.uint8)
        index = _index(root, files)
        homes: Mapping[str, str] = index.get("weight_map", {})
        aliases: dict[str, object] = {}
        for file in files:
            path = os.path.join(root, file)
            if not file.endswith(".safetensors"):
                self.entries |= {key: Entry(path, *place) for key, place in places(path, prefix) if homes.get(key, file) == file}
                continue
            header, data = _header(path)
            aliases.update(header.pop("__metadata__", None) or {})
            for key, entry in header.items():
                if homes.get(key, file) == file:
                    self.entries[key] = Entry(path, entry["dtype"], tuple(entry["shape"]), data + entry["data_offsets"][0])
        aliases.update(index.get("metadata") or {})
        for alias, kept in aliases.items():
            if isinstance(kept, str) and kept in self.entries:
                self.entries.setdefault(alias, self.entries[kept])

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.entries[key].shape

    def dtype(self, key: str) -> str:
        """The name of its dtype; raises InputError for one that takes no whole bytes."""
        code = self.entries[key].dtype
        if code not in NAMES:
            fact = f"{key} is {code}, which the check cannot read"
            raise InputError("the source cannot be compared", [Problem(fact, "run with --check none")])
        return NAMES[code]

    def rows(self, key: str, start: int, stop: int, *, passing: bool = False) -> Array:
        """Rows [start, stop) of a tensor along its first dim; all of a scalar. Raises InputError where the file ends before them.

        `passing` gives them in memory that the next such call uses again: the kernel zeroes fresh pages before a read fills them.
        """
        entry, dtype = self.entries[key], numpy_dtype(self.dtype(key))
        row = math.prod(entry.shape[1:]) * dtype.itemsize
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        out = self._passing(math.prod(shape) * dtype.itemsize) if passing else np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        view, at = out.data, entry.at + start * row
        while view:
            got = os.preadv(self._file(entry.file), [view], at)
            if not got:
                fact = f"{entry.file} ends at byte {at}, inside {key}"
                raise InputError("the source cannot be compared", [Problem(fact, "download the file again")])
            view, at = view[got:], at + got
        # What follows is most often wanted next; the kernel may fetch it while these rows are looked at.
        os.posix_fadvise(self._file(entry.file), at, out.nbytes, os.POSIX_FADV_WILLNEED)
        return out.view(dtype).reshape(shape)

    def _passing(self, nbytes: int) -> Array:
        if self._room.nbytes < nbytes:
            self._room = np.empty(0, np.uint8)  # freed before the larger one is made
            self._room = np.empty(nbytes, np.uint8)
        return self._room[:nbytes]

    def _file(self, path: str) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[path]

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype that NumPy or ml_dtypes call `name`."""
    return np.dtype(getattr(ml_dtypes, name, name))


def _header(path: str) -> tuple[dict[str, Any], int]:
    """A file's header, and where its data begin."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(size)), 8 + size
    except (OSError, ValueError) as error:
        raise InputError("the source cannot be compared", [Problem(f"{path}: {error}")]) from None


def _index(root: str, files: tuple[str, ...]) -> Mapping[str, Any]:
    """The index that names exactly these files, if there is one."""
    for name in sorted(os.listdir(root)):
        if name.endswith((".safetensors.index.json", ".bin.index.json")):
            with open(os.path.join(root, name), encoding="utf-8") as file:
                found: dict[str, Any] = json.load(file)
            if set(found["weight_map"].values()) == set(files):
                return found
    return {}
