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
MANIFEST = "manifest.ocdbt"
# Bytes of JSON: ten times what a tree of 100k arrays has.
LIMIT = 100_000_000
# Of a key, in characters; a file's name has 255 bytes, a key of a database may be longer.
NAME = 4000
# NumPy has no more.
DIMS = 64
# What metadata that is damaged may end in.
_DAMAGES = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


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
    try:
        return [folder for name in os.listdir(path) if os.path.isdir(folder := os.path.join(path, name))]
    except OSError:  # a file, or a directory that may not be listed: no checkpoint either way
        return []


def arrays(folder: str) -> Iterator[StoredArray]:
    """The arrays of the pytree in `folder`; raises InputError where its metadata cannot be read."""
    try:
        with open(os.path.join(folder, METADATA), "rb") as file:
            metadata = json.loads(_limited(file.read(LIMIT + 1)))
        paths = [tuple(_plain(step["key"]) for step in entry["key_metadata"]) for entry in metadata["tree_metadata"].values()]
        ocdbt = bool(metadata.get("use_ocdbt", True))
        store = _open(folder, ocdbt)
        for path in paths:
            yield _array(store, "" if ocdbt else folder, path, bool(metadata.get("use_zarr3", False)))
    except _DAMAGES as error:
        fact = f"{os.path.join(folder, METADATA)}: {type(error).__name__}: {error}"
        raise InputError(f"{folder} is not a readable Orbax checkpoint", [Problem(fact, "copy the checkpoint again")]) from None


def _limited(raw: bytes) -> bytes:
    if len(raw) > LIMIT:
        raise ValueError(f"it has over {LIMIT} bytes")
    return raw


def _plain(key: object) -> str:
    """A key of the tree as part of a name, which is also part of a path."""
    name = str(key)
    if not name.isprintable() or len(name) > NAME or {"", ".", ".."} & set(name.split("/")):
        raise ValueError(f"the key {name[:60]!a} is no plain name")
    return name


def _open(folder: str, ocdbt: bool) -> ts.KvStore:
    if ocdbt and not os.path.isfile(os.path.join(folder, MANIFEST)):
        raise FileNotFoundError(f"{MANIFEST} is missing beside it")
    files = {"driver": "file", "path": os.path.join(os.path.abspath(folder), "")}
    return ts.KvStore.open({"driver": "ocdbt", "base": files} if ocdbt else files).result()


def _array(store: ts.KvStore, folder: str, path: tuple[str, ...], zarr3: bool) -> StoredArray:
    """An array's metadata; `folder` is where it is a file, "" in a database."""
    name = ".".join(path)
    key = f"{name}/{'zarr.json' if zarr3 else '.zarray'}"
    try:
        if folder and os.path.getsize(os.path.join(folder, key)) > LIMIT:
            raise ValueError(f"it has over {LIMIT} bytes")
        value = store.read(key).result()
        if value.state != "value":
            raise FileNotFoundError("it is missing")
        found = json.loads(value.value)
        if not zarr3:
            stored, inner = _sizes(found["chunks"]), _sizes(found["chunks"])
        else:
            stored = _sizes(found["chunk_grid"]["configuration"]["chunk_shape"])
            sharding = next((codec for codec in found["codecs"] if codec["name"] == "sharding_indexed"), None)
            inner = _sizes(sharding["configuration"]["chunk_shape"]) if sharding else stored
        shape = _sizes(found["shape"])
        if not len(shape) == len(stored) == len(inner) or 0 in (*stored, *inner):
            raise ValueError(f"an array of {list(shape)} in chunks of {list(stored)} and {list(inner)}")
        return StoredArray(path, shape, _name(found["data_type" if zarr3 else "dtype"]), stored, inner)
    except _DAMAGES as error:
        raise ValueError(f"{key}: {type(error).__name__}: {error}") from None


def _sizes(value: object) -> tuple[int, ...]:
    """Sizes as their JSON has them: no true, no 2.0, and elements that 64 bits can count."""
    if not isinstance(value, list) or len(value) > DIMS or any(type(n) is not int or n < 0 for n in value):
        raise ValueError(f"a shape or chunk of {json.dumps(value)[:60]}")
    if math.prod(filter(None, value)) >= 2**63:
        raise ValueError(f"a shape or chunk of {value}, which overflows 64 bits")
    return tuple(value)


def _name(dtype: object) -> str:
    """zarr 2's "<f4" as "float32"; names such as "bfloat16" are themselves. ValueError where nobody has such a dtype."""
    said = str(dtype)
    kinds = {"f": "float", "i": "int", "u": "uint", "c": "complex"}
    if said[:1] in ("<", ">", "|") and said[1:2] in kinds and said[2:] in ("1", "2", "4", "8", "16"):
        said = f"{kinds[said[1]]}{int(said[2:]) * 8}"
    said = "bool" if said == "|b1" else said
    if not hasattr(ts, said) or not isinstance(getattr(ts, said), ts.dtype):
        raise ValueError(f"dtype {said[:60]!a}, which is unknown")
    return said
