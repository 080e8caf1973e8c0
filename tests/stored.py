"""Files for the tests of formats and sources: raw safetensors files, right or wrong, and checkpoints of arrays."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shardconv.dtypes import DTYPES, dtype_of_code

CODES = {dtype.numpy: dtype.code for dtype in DTYPES}


def raw_file(header: object, data: bytes = b"") -> bytes:
    """A file out of a header (bytes as they are, anything else as JSON) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """A tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """A file of arrays in the order given, their elements not packed; made without the project's writer."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, array in arrays.items():
        begin, data = len(data), data + array.tobytes()
        header[name] = entry(CODES[array.dtype], list(array.shape), begin, len(data))
    return raw_file(header, data)


def save(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of arrays."""
    path.write_bytes(file_of(arrays, metadata))


def save_index(path: Path, weight_map: object, metadata: object = None) -> None:
    """Write an index; without metadata when there is none."""
    index = {"weight_map": weight_map} if metadata is None else {"metadata": metadata, "weight_map": weight_map}
    path.write_text(json.dumps(index))


def random_array(code: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Any bit patterns of a dtype, NaNs and all; four- and six-bit ones within their bits, bools 0 or 1."""
    dtype = dtype_of_code(code)
    size = math.prod(shape) * dtype.numpy.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    if code == "BOOL":
        raw &= 1
    return (raw & (1 << min(dtype.bits, 8)) - 1).view(dtype.numpy).reshape(shape)
