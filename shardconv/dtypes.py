"""Element types, as the file spells them, as NumPy holds them, and how many bits they take.

The table is that of safetensors 0.8.0, in its order: the format sorts tensors by it, so the writer needs the order too.
A type has three spellings: the file's code (`F8_E4M3`), the name that NumPy, ml_dtypes and zarr agree on
(`float8_e4m3fn`), and the NumPy dtype.

Four- and six-bit elements are packed in the file and take a byte each in memory. F4 packs two elements to a byte, the
even one in the low nibble, rows not padded (this is what torch's float4_e2m1fn_x2 holds and what safetensors stores of
it). How F6 elements are packed is written down nowhere: safetensors says their number of bits and no library reads or
writes their data, so `readable` is false for them.

Values never matter here. Bytes are moved as unsigned integers of the same width (`raw_view`), since NumPy moves those
fast and compares them exactly, NaN payloads and signs of zero included.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class DType:
    """An element type: its name in memory, its code in a safetensors file, and the bits an element takes there."""

    name: str
    code: str
    bits: int

    @property
    def numpy(self) -> np.dtype[Any]:
        """The dtype in memory; F4 and F6 take one byte per element there."""
        return _NUMPY[self.code]

    @property
    def readable(self) -> bool:
        """Whether data of this type can be read; a six-bit element's place in the bytes is not defined."""
        return self.bits != 6

    def nbytes(self, shape: Sequence[int]) -> int:
        """The bytes that an array of this shape takes in the file, rounded up.

        >>> dtype_of_code("BF16").nbytes((2, 3)), dtype_of_code("F4").nbytes((4, 16))
        (12, 32)
        """
        return -(-math.prod(shape) * self.bits // 8)


DTYPES: tuple[DType, ...] = (
    DType("bool", "BOOL", 8),
    DType("float4_e2m1fn", "F4", 4),
    DType("float6_e2m3fn", "F6_E2M3", 6),
    DType("float6_e3m2fn", "F6_E3M2", 6),
    DType("uint8", "U8", 8),
    DType("int8", "I8", 8),
    DType("float8_e5m2", "F8_E5M2", 8),
    DType("float8_e4m3fn", "F8_E4M3", 8),
    DType("float8_e8m0fnu", "F8_E8M0", 8),
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", 8),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", 8),
    DType("int16", "I16", 16),
    DType("uint16", "U16", 16),
    DType("float16", "F16", 16),
    DType("bfloat16", "BF16", 16),
    DType("int32", "I32", 32),
    DType("uint32", "U32", 32),
    DType("float32", "F32", 32),
    DType("complex64", "C64", 64),
    DType("float64", "F64", 64),
    DType("int64", "I64", 64),
    DType("uint64", "U64", 64),
)

_NUMPY: dict[str, np.dtype[Any]] = {d.code: np.dtype(getattr(ml_dtypes, d.name, d.name)) for d in DTYPES}
_BY_CODE = {d.code: d for d in DTYPES}
_BY_NAME = {d.name: d for d in DTYPES}
_RAW: dict[int, np.dtype[Any]] = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}

# Packed bytes that are copied aside at a time while they are unpacked in place: small enough for a core's cache, large
# enough that the loop around it costs nothing.
_BLOCK = 1 << 17


def dtype_of_code(code: str) -> DType:
    """The type that a safetensors file calls `code`; KeyError when there is none.

    >>> dtype_of_code("F8_E4M3").name
    'float8_e4m3fn'
    """
    return _BY_CODE[code]


def dtype_named(name: str) -> DType:
    """The type that NumPy, ml_dtypes and zarr call `name`; KeyError when there is none.

    >>> dtype_named("bfloat16").code
    'BF16'
    """
    return _BY_NAME[name]


def raw_view(a: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same bytes, strides and shape as unsigned integers of 1, 2, 4 or 8 bytes.

    >>> raw_view(np.array([1.0, -0.0], np.float16)).tolist()
    [15360, 32768]
    """
    return a.view(_RAW[a.dtype.itemsize])


def unpack_nibbles(packed: npt.NDArray[np.uint8], first: int, out: npt.NDArray[np.uint8]) -> None:
    """Fill `out` (1-D, an element a byte) from 1-D `packed` bytes, low nibbles first, from nibble `first` (0 or 1) on.

    `packed` may lie inside `out`'s memory when it ends no earlier than `out` does: elements are written from the front,
    and a block of bytes is copied aside before anything is written over it.

    >>> out = np.empty(3, np.uint8)
    >>> unpack_nibbles(np.array([0x21, 0x43], np.uint8), 1, out)
    >>> out.tolist()
    [2, 3, 4]
    """
    if first:
        out[:1] = packed[:1] >> 4
        packed, out = packed[1:], out[1:]
    for start in range(0, packed.size, _BLOCK):
        block = packed[start : start + _BLOCK].copy()
        target = out[2 * start : 2 * (start + block.size)]
        target[0::2] = (block & 15)[: (target.size + 1) // 2]
        target[1::2] = (block >> 4)[: target.size // 2]
