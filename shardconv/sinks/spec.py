"""What is stored: arrays as zarr, in the words of TensorStore. Pure; no TensorStore here.

An array is written in *chunks* (one write, one worker) and read in *inner* chunks (what a reader fetches).

- zarr 3 stores a chunk under one key, as a `sharding_indexed` shard of its inner chunks: few keys, small reads.
- zarr 2 has no shards. Its stored chunk is the inner one, so a write puts several keys, and a reader still fetches no
  more than it needs.

With OCDBT all keys lie in a B+tree database; each unit attempt has one of its own, `ocdbt.process_<attempt>`, and the
commit merges the winners by reference. Without OCDBT each key is a file, `<array>/<chunk>`.

Formats: https://zarr-specs.readthedocs.io (core v2 and v3, sharding-indexed v1.0) and
https://google.github.io/tensorstore/driver/zarr3.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from shardconv.boxes import Box, grid_shape

Json = dict[str, Any]

# Orbax merges the databases in directories that match `ocdbt\.process_[A-Za-z0-9]+`.
ATTEMPT_PREFIX = "ocdbt.process_"

# An array's metadata has some 700 bytes and belongs into the tree, where one read finds all of them; chunks do not.
# Orbax's value.
MAX_INLINE_BYTES = 1024
# One leaf node must be able to hold a whole unit's keys. Orbax's value.
MAX_NODE_BYTES = 100_000_000
# A unit should end up in one data file; it is far smaller than this. Orbax's value for disks.
DATA_FILE_BYTES = 2**31


@dataclass(frozen=True)
class StoreOptions:
    """How arrays are stored: zarr 3 or 2, with or without OCDBT, inner chunks plain or through zstd at `level`."""

    zarr: Literal[2, 3] = 3
    ocdbt: bool = True
    compression: Literal["none", "zstd"] = "none"
    level: int = 3

    def __post_init__(self) -> None:
        if self.zarr not in (2, 3) or self.compression not in ("none", "zstd"):
            raise ValueError(f"no such store: {self}")


@dataclass(frozen=True)
class ArraySpec:
    """One array of the checkpoint: its keys in the pytree, and its grids of chunks and inner chunks, in elements.

    >>> spec = ArraySpec(("decoder", "norm"), (6, 4), "float32", chunk=(4, 4), inner=(2, 4))
    >>> spec.name, spec.grid
    ('decoder.norm', (2, 1))
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    inner: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.path or not len(self.shape) == len(self.chunk) == len(self.inner):
            raise ValueError(f"{self.name}: {self.shape} in chunks of {self.chunk} and {self.inner}: not of one rank")
        if any(i < 1 or c % i for c, i in zip(self.chunk, self.inner, strict=True)):
            raise ValueError(f"{self.name}: inner chunk {self.inner} does not divide chunk {self.chunk}")

    @property
    def name(self) -> str:
        """The array's name on disk; Orbax joins the pytree's keys with dots."""
        return ".".join(self.path)

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of chunks along each dim."""
        return grid_shape(self.shape, self.chunk)

    @property
    def numpy(self) -> np.dtype[Any]:
        """The dtype of the elements in memory."""
        return np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))

    def box(self, index: tuple[int, ...]) -> Box:
        """The box of the chunk with this grid index, clipped to the array."""
        return tuple((i * c, min((i + 1) * c, n)) for i, c, n in zip(index, self.chunk, self.shape, strict=True))

    def index(self, box: Box) -> tuple[int, ...]:
        """The grid index of the chunk that fills exactly this box.

        Raises ValueError where the box is not one whole chunk, clipped to the array.
        """
        index = tuple(start // c for (start, _), c in zip(box, self.chunk, strict=True))
        if box != self.box(index) or not all(start < stop for start, stop in box):
            raise ValueError(f"{self.name}: {box} is not one whole chunk of {self.shape} in chunks of {self.chunk}")
        return index


def stored_chunk(spec: ArraySpec, options: StoreOptions) -> tuple[int, ...]:
    """The chunk that has a key of its own."""
    return spec.chunk if options.zarr == 3 else spec.inner


def metadata_key(spec: ArraySpec, options: StoreOptions) -> str:
    """The key of the array's metadata."""
    return f"{spec.name}/{'zarr.json' if options.zarr == 3 else '.zarray'}"


def chunk_key(spec: ArraySpec, options: StoreOptions, index: tuple[int, ...]) -> str:
    """The key of a stored chunk by its grid index.

    >>> spec = ArraySpec(("w",), (6, 4), "int8", chunk=(4, 4), inner=(2, 4))
    >>> chunk_key(spec, StoreOptions(), (1, 0)), chunk_key(spec, StoreOptions(zarr=2), (1, 0))
    ('w/c/1/0', 'w/1.0')
    """
    if options.zarr == 3:
        return "/".join((spec.name, "c", *map(str, index)))
    return f"{spec.name}/{'.'.join(map(str, index)) or '0'}"


def stored_keys(spec: ArraySpec, options: StoreOptions) -> Iterator[str]:
    """Every key that the finished array has, metadata first, chunks in row-major order."""
    yield metadata_key(spec, options)
    for index in np.ndindex(*grid_shape(spec.shape, stored_chunk(spec, options))):
        yield chunk_key(spec, options, index)


def zarr_metadata(spec: ArraySpec, options: StoreOptions) -> Json:
    """The array's metadata document, `zarr.json` or `.zarray`."""
    if options.zarr == 2:
        compressor = {"id": "zstd", "level": options.level} if options.compression == "zstd" else None
        return {
            "zarr_format": 2,
            "shape": [*spec.shape],
            "chunks": [*spec.inner],
            "dtype": _dtype2(spec.numpy),
            "order": "C",
            "fill_value": None,
            "filters": None,
            "compressor": compressor,
            "dimension_separator": ".",
        }
    endian = {"configuration": {"endian": "little"}}
    raw = {"name": "bytes"} | (endian if spec.numpy.itemsize > 1 else {})
    zstd = {"name": "zstd", "configuration": {"level": options.level, "checksum": False}}
    shards = {
        "chunk_shape": [*spec.inner],
        "codecs": [raw, zstd] if options.compression == "zstd" else [raw],
        "index_codecs": [{"name": "bytes"} | endian, {"name": "crc32c"}],  # behind the inner chunks, as is the default
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [*spec.shape],
        "data_type": spec.dtype,
        "fill_value": _fill_value(spec.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [*spec.chunk]}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": shards}],
    }


def _fill_value(dtype: str) -> object:
    if dtype == "bool":
        return False
    if dtype.startswith(("int", "uint")):
        return 0
    return [0.0, 0.0] if dtype.startswith("complex") else 0.0


def _dtype2(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.isbuiltin != 1 else dtype.newbyteorder("<").str


def database_spec(stage: str, attempt: str) -> Json:
    """The OCDBT database of one unit attempt, as a TensorStore kvstore.

    A data file is written once and named at random, so it needs neither a lock nor a rename; the manifest does.
    """
    files = {"driver": "file", "path": f"{attempt_path(stage, attempt)}/"}
    return {
        "driver": "ocdbt",
        "base": files | {"file_io_locking": {"mode": "non_atomic"}},
        "manifest": files,
        "cache_pool": "cache_pool#ocdbt",
        "target_data_file_size": DATA_FILE_BYTES,
        "assume_config": True,
        "config": {
            "max_inline_value_bytes": MAX_INLINE_BYTES,
            "max_decoded_node_bytes": MAX_NODE_BYTES,
            "manifest_kind": "single",
        },
    }


def array_spec(stage: str, attempt: str, spec: ArraySpec, options: StoreOptions) -> Json:
    """The array as TensorStore opens or creates it, in the attempt's database or, without OCDBT, in the stage."""
    files = {"driver": "file", "path": f"{stage}/"}
    kvstore = database_spec(stage, attempt) if options.ocdbt else files
    metadata = zarr_metadata(spec, options)
    if options.zarr == 3:  # TensorStore takes these from `driver` and `dtype`
        metadata = {k: v for k, v in metadata.items() if k in ("shape", "chunk_grid", "codecs")}
    return {
        "driver": "zarr3" if options.zarr == 3 else "zarr",
        "kvstore": kvstore | {"path": f"{kvstore.get('path', '')}{spec.name}/"},
        "metadata": metadata,
        "dtype": spec.dtype,
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        "store_data_equal_to_fill_value": True,  # a missing chunk means a lost chunk, never zeros
    }


def attempt_path(stage: str, attempt: str) -> str:
    """The directory of a unit attempt's database.

    Raises ValueError where the attempt's name is not alphanumeric: Orbax would not merge it.
    """
    if not (attempt.isascii() and attempt.isalnum()):
        raise ValueError(f"an attempt's name must be letters and digits: {attempt!r}")
    return f"{stage}/{ATTEMPT_PREFIX}{attempt}"
