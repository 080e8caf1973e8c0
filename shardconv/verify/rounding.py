"""Values by their definition: widened to float32, scaled and shifted there, rounded once, to nearest, ties to even.

The converter leaves casts to ml_dtypes. Here bfloat16 is rounded by integer arithmetic on float32's bits, and an 8-bit float by looking
up the two neighbours of a value: its non-negative patterns 0, 1, 2, ... are in the order of their values, so that the number of midpoints
below a value is its pattern, and an even pattern wins a tie. float16 and float64 are NumPy's, which are IEEE's and the processor's.

Too large becomes infinite; float8_e4m3fn takes its largest value instead, and the fnuz types NaN, as torch's casts do.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.verify.tensors import numpy_dtype

Array = npt.NDArray[Any]

SATURATES = ("float8_e4m3fn",)
NO_INFINITY = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz")


def bits(array: Array) -> Array:
    """The same bytes as unsigned integers."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def is_float(name: str) -> bool:
    """Whether a dtype is a real floating-point one."""
    return "float" in name


def changed(array: Array, scale: float, shift: float, dtype: str) -> Array:
    """`array * scale + shift` in float32 (float64 from float64 to float64), rounded once into `dtype`; the array itself if nothing changes.

    >>> changed(np.array([1.00390625, 3.0], np.float32), 1.0, 0.0, "bfloat16").astype(np.float32).tolist()
    [1.0, 3.0]
    """
    if scale == 1.0 and shift == 0.0 and array.dtype == numpy_dtype(dtype):
        return array
    wide = np.dtype(np.float64 if array.dtype == np.float64 and dtype == "float64" else np.float32).type
    with np.errstate(all="ignore"):
        values = widened(array).astype(wide, copy=False)
        if scale != 1.0:
            values = values * wide(scale)
        if shift != 0.0:
            values = values + wide(shift)
        return rounded(values, dtype)


def widened(array: Array) -> Array:
    """The same values as float32; float64 stays."""
    if array.dtype == np.float64 or array.dtype == np.float32:
        return array
    if array.dtype.name == "bfloat16":
        wide = bits(array).astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    if array.dtype.itemsize == 1 and is_float(array.dtype.name):
        return np.asarray(decoded(array.dtype.name)[bits(array)])
    return array.astype(np.float32)


def rounded(values: Array, dtype: str) -> Array:
    """float32 or float64 values in `dtype`."""
    target = numpy_dtype(dtype)
    if not is_float(dtype) or target.itemsize >= 4 or dtype == "float16":
        return values.astype(target, copy=False)
    single = values.astype(np.float32, copy=False)
    if dtype == "bfloat16":
        raw = bits(single)
        sums = raw >> np.uint32(16)
        sums &= np.uint32(1)
        sums += np.uint32(0x7FFF)
        sums += raw
        sums >>= np.uint32(16)
        top, nan = sums.astype(np.uint16), np.isnan(single)
        return (np.where(nan, np.uint16(0x7FC0), top) if nan.any() else np.asarray(top)).view(target)
    return _rounded_to_byte(single, dtype)


def _rounded_to_byte(values: Array, dtype: str) -> Array:
    ladder, nan, over = _ladder(dtype)
    middles = (ladder[1:] + ladder[:-1]) / 2
    size = np.abs(values)
    below, upto = np.searchsorted(middles, size, "left"), np.searchsorted(middles, size, "right")
    code = np.where((below != upto) & (below % 2 == 0), below, upto)  # on a midpoint the two differ by one: the even one wins
    code = np.where(code >= len(ladder) - 1, over, code).astype(np.uint8)
    negative = np.signbit(values)
    if dtype.endswith("fnuz"):
        negative = negative & (code != 0) & (code != nan)  # there is no negative zero, and its pattern is NaN
    code = np.where(negative, code | np.uint8(0x80), code)
    return np.where(np.isnan(values), np.uint8(nan), code).astype(np.uint8).view(numpy_dtype(dtype))


@cache
def decoded(dtype: str) -> Array:
    """The values of all 256 patterns."""
    return np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float32)


@cache
def _ladder(dtype: str) -> tuple[Array, int, int]:
    """The non-negative finite values in order, and the next one there would be; the patterns of NaN and of what is too large."""
    values = decoded(dtype)[:128]
    finite = values[np.isfinite(values)]
    nan = 0x80 if dtype.endswith("fnuz") else 0x7F
    over = len(finite) - 1 if dtype in SATURATES else nan if dtype in NO_INFINITY else len(finite)
    return np.append(finite, 2 * finite[-1] - finite[-2]), nan, over
