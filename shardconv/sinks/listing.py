"""What an Orbax checkpoint holds, by its metadata alone: names, shapes, dtypes and chunks, without Orbax.

A pytree's directory holds `_METADATA`, with the path of every leaf, and each array's zarr metadata, in an OCDBT database or as files.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import tensorstore as ts

from shardconv.errors import InputError, Problem

METADATA = "_METADATA"


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array of a checkpoint: its path in the tree, what it holds, and the shapes that are written and fetched."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    inner: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array uncompressed; four-bit elements take a byte."""
        bits = "".join(c for c in self.dtype.partition("_")[0] if c.isdigit())
        return math.prod(self.shape) * max(int(bits or 8) // 8, 1)


def pytrees(path: str) -> list[str]:
    """The directories at or under `path`, two levels deep (step, item), that hold a pytree."""
    found = []
    for folder in [path, *_folders(path), *(inner for outer in _folders(path) for inner in _folders(outer))]:
        if os.path.isfile(os.path.join(folder, METADATA)):
            found.append(folder)
    return sorted(found)


def _folders(path: str) -> list[str]:
    return [entry.path for entry in os.scandir(path) if entry.is_dir()] if os.path.isdir(path) else []


def arrays(folder: str) -> Iterator[StoredArray]:
    """The arrays of the pytree in `folder`; raises InputError where its metadata cannot be read."""
    try:
        with open(os.path.join(folder, METADATA), encoding="utf-8") as file:
            metadata = json.load(file)
        paths = [tuple(str(step["key"]) for step in entry["key_metadata"]) for entry in metadata["tree_metadata"].values()]
        store = _open(folder, bool(metadata.get("use_ocdbt", True)))
        for path in paths:
            yield _array(store, path, bool(metadata.get("use_zarr3", False)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        fact = f"{os.path.join(folder, METADATA)}: {type(error).__name__}: {error}"
        raise InputError(f"{folder} is not a readable Orbax checkpoint", [Problem(fact)]) from None


def _open(folder: str, ocdbt: bool) -> ts.KvStore:
    files = {"driver": "file", "path": os.path.join(os.path.abspath(folder), "")}
    return ts.KvStore.open({"driver": "ocdbt", "base": files} if ocdbt else files).result()


def _array(store: ts.KvStore, path: tuple[str, ...], zarr3: bool) -> StoredArray:
    name = ".".join(path)
    key = f"{name}/{'zarr.json' if zarr3 else '.zarray'}"
    value = store.read(key).result()
    if value.state != "value":
        raise ValueError(f"{key} is missing")
    found = json.loads(value.value)
    if not zarr3:
        return StoredArray(path, tuple(found["shape"]), _name(found["dtype"]), tuple(found["chunks"]), tuple(found["chunks"]))
    chunk = tuple(found["chunk_grid"]["configuration"]["chunk_shape"])
    sharding = next((codec for codec in found["codecs"] if codec["name"] == "sharding_indexed"), None)
    inner = tuple(sharding["configuration"]["chunk_shape"]) if sharding else chunk
    return StoredArray(path, tuple(found["shape"]), found["data_type"], chunk, inner)


def _name(dtype: str) -> str:
    """zarr 2's "<f4" as "float32"; names such as "bfloat16" are themselves."""
    kinds = {"f": "float", "i": "int", "u": "uint", "c": "complex"}
    if dtype[:1] in "<>|" and dtype[1:2] in kinds:
        return f"{kinds[dtype[1]]}{int(dtype[2:]) * 8}"
    return "bool" if dtype == "|b1" else dtype
