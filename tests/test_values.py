"""Value rules: casts bit for bit as torch makes them, one rounding, conversion in place, and which casts are exact."""

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

from shardconv.dtypes import DTYPES, DType, dtype_named, raw_view
from shardconv.values import SLAB, ValueRule, can_hold, convert, is_exact, is_float

FLOATS = [dtype for dtype in DTYPES if dtype.name.lstrip("b").startswith("float")]
# F6 has no torch dtype, F4 and F8_E8M0 are the scales and blocks of packed formats, which nobody casts to.
TARGETS = ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]


def every_value(dtype: DType) -> np.ndarray:
    """All bit patterns of a small type; of a large one the edges, halfway cases of every smaller type, and many at random."""
    if dtype.bits <= 16:
        return np.arange(1 << dtype.bits, dtype=f"u{dtype.numpy.itemsize}").view(dtype.numpy)
    random = np.random.default_rng(0)
    patterns = random.integers(0, 1 << dtype.bits, 1 << 16, f"u{dtype.numpy.itemsize}").view(dtype.numpy)
    with np.errstate(all="ignore"):
        return np.concatenate([patterns, *(part.astype(dtype.numpy) for part in _edges(random))])


def _edges(random: np.random.Generator) -> Iterator[np.ndarray]:
    yield np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 448, 464, 464.01, 57344, 61440, 3.4e38, 1e39])
    for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"):
        small = doubles(every_value(dtype_named(name)))
        small = np.unique(small[np.isfinite(small)])
        halfway = (small[1:] + small[:-1]) / 2
        yield halfway
        yield np.nextafter(halfway.astype(np.float32), np.float32(np.inf))
        yield np.nextafter(halfway.astype(np.float32), np.float32(-np.inf))
        yield np.nextafter(halfway, np.inf)  # rounds to halfway in float32: twice rounded, as torch does
    for scale in (1, 1e-6, 1e-39, 1e-44, 3e4, 1e38):
        yield random.standard_normal(1 << 14) * scale


def by_torch(values: np.ndarray, target: str) -> np.ndarray:
    torch = pytest.importorskip("torch")
    raw = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
    given = torch.from_numpy(values.view(raw[values.itemsize]).copy()).view(getattr(torch, values.dtype.name))
    done = given.to(getattr(torch, target))
    return done.view(getattr(torch, raw[done.element_size()])).numpy().view(dtype_named(target).numpy)


def doubles(array: np.ndarray) -> np.ndarray:
    """The array as float64, which holds every value; of a signalling NaN no word is said."""
    with np.errstate(invalid="ignore"):
        return array.astype(np.float64)


def assert_same_bits(out: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit; where one is NaN, the other is, with any payload."""
    nan, wanted = np.isnan(doubles(out)), np.isnan(doubles(expected))
    assert np.array_equal(nan, wanted)
    assert np.array_equal(raw_view(out)[~nan], raw_view(expected)[~nan])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stored", TARGETS)
def test_casts_are_torchs(stored: str, target: str) -> None:
    values = every_value(dtype_named(stored))
    out = np.empty(values.shape, dtype_named(target).numpy)
    convert(values, ValueRule(), out)
    assert_same_bits(out, by_torch(values, target))


@pytest.mark.parametrize(
    ("target", "pairs"),
    [
        ("bfloat16", {1.00390625: 0x3F80, 1.01171875: 0x3F82, 3.4e38: 0x7F80, -0.0: 0x8000, 1e-40: 0x0001, np.inf: 0x7F80}),
        ("float16", {65519.0: 0x7BFF, 65520.0: 0x7C00, -1e9: 0xFC00, 2.9e-8: 0x0000, 3e-8: 0x0001, -0.0: 0x8000}),
        ("float8_e4m3fn", {448.0: 0x7E, 1e9: 0x7E, -np.inf: 0xFE, 2**-10: 0x00, 1.1 * 2**-10: 0x01, -0.0: 0x80, np.nan: 0x7F}),
        ("float8_e5m2", {57344.0: 0x7B, 61439.0: 0x7B, 61440.0: 0x7C, -1e9: 0xFC, -0.0: 0x80}),
    ],
)
def test_casts_by_hand(target: str, pairs: dict[float, int]) -> None:
    """The same without torch: ties to even, overflow, subnormals, the sign of zero."""
    values = np.array(list(pairs), np.float32)
    out = np.empty(values.shape, dtype_named(target).numpy)
    convert(values, ValueRule(), out)
    assert [hex(bits) for bits in raw_view(out).tolist()] == [hex(bits) for bits in pairs.values()]


# --- scale and shift --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", [ValueRule(scale=128**-0.5), ValueRule(scale=4608**0.5), ValueRule(shift=1.0)], ids=str)
def test_a_rule_rounds_once(stored: str, target: str, rule: ValueRule) -> None:
    """Against Python's floats, in which a product of two float32 is exact and a sum is as good: to float32, then to the target."""
    values = every_value(dtype_named(stored))[::37]
    out = np.empty(values.shape, dtype_named(target).numpy)
    convert(values, rule, out)
    constant = float(np.float32(rule.scale if rule.scale != 1.0 else rule.shift))
    for given, found in zip(doubles(values).tolist(), doubles(out).tolist(), strict=True):
        exact = given * constant if rule.scale != 1.0 else given + constant
        with np.errstate(all="ignore"):
            wanted = float(np.float32(exact).astype(dtype_named(target).numpy).astype(np.float64))
        assert found == wanted or (math.isnan(found) and math.isnan(wanted)), (given, found, wanted)


def test_scaling_is_not_done_in_the_stored_type() -> None:
    """In bfloat16 the constant itself would be rounded first; here the two answers differ."""
    values = np.array([1.046875], ml_dtypes.bfloat16)
    out = np.empty(1, ml_dtypes.bfloat16)
    convert(values, ValueRule(scale=128**-0.5), out)
    assert raw_view(out)[0] == raw_view(np.float32(1.046875 * 128**-0.5).astype(ml_dtypes.bfloat16).reshape(1))[0]
    assert raw_view(out)[0] != raw_view(values * np.array([128**-0.5], ml_dtypes.bfloat16))[0]


def test_doubles_stay_doubles() -> None:
    values, out = np.array([1 + 2**-50, 1e300]), np.empty(2)
    convert(values, ValueRule(scale=1 / 3), out)
    assert out.tolist() == [(1 + 2**-50) * (1 / 3), 1e300 * (1 / 3)]
    convert(values, ValueRule(), out)
    assert out.tolist() == values.tolist()


# --- in place ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "target"),
    [
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float8_e4m3fn", "float32"),
        ("float64", "float8_e5m2"),
        ("float16", "bfloat16"),
        ("float8_e5m2", "float64"),
    ],
)
@pytest.mark.parametrize("count", [1, 7, SLAB - 1, SLAB, 3 * SLAB + 5])
def test_conversion_in_place(stored: str, target: str, count: int) -> None:
    """As a worker does it: the source at the end of a buffer as wide as the wider type, the target at its front."""
    a, b = dtype_named(stored).numpy, dtype_named(target).numpy
    values = np.random.default_rng(count).standard_normal(count).astype(a)
    buffer = np.empty(count * max(a.itemsize, b.itemsize), np.uint8)
    block = buffer[buffer.size - count * a.itemsize :].view(a)
    block[:] = values
    out = buffer[: count * b.itemsize].view(b)
    convert(block, ValueRule(scale=3.0), out)
    apart = np.empty(count, b)
    convert(values, ValueRule(scale=3.0), apart)
    assert np.array_equal(raw_view(out), raw_view(apart))


def test_dims_do_not_matter() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    out = np.empty((2, 3, 4), ml_dtypes.bfloat16)
    convert(values, ValueRule(shift=1.0), out)
    assert out.astype(np.float32).tolist() == (values + 1).tolist()


# --- which are exact --------------------------------------------------------------------------------------------------------------


def members(dtype: DType) -> set[tuple[str, float]]:
    """The values of a type, signed zeros apart, all NaNs one."""
    values = doubles(every_value(dtype)).tolist()
    return {("nan", 0.0) if math.isnan(value) else (str(math.copysign(1, value)), value) for value in values}


@pytest.mark.parametrize("stored", [dtype for dtype in FLOATS if dtype.bits <= 16], ids=lambda dtype: dtype.name)
def test_a_cast_is_exact_where_the_target_has_every_value(stored: DType) -> None:
    values = members(stored)
    for target in FLOATS:
        if target.bits <= 16:
            assert can_hold(stored, target) == (values <= members(target)), target.name
        else:
            assert can_hold(stored, target), target.name


@pytest.mark.parametrize(
    ("stored", "target", "exact"),
    [
        ("float32", "float64", True),
        ("float32", "float32", True),
        ("float64", "float64", True),
        ("float64", "float32", False),
        ("float32", "bfloat16", False),
        ("bfloat16", "float16", False),
        ("float16", "bfloat16", False),
        ("float8_e4m3fn", "bfloat16", True),
        ("float8_e4m3fn", "float8_e4m3fnuz", False),  # no negative zero there
        ("int8", "int8", True),
        ("int8", "float32", False),  # is not cast at all
        ("float32", "complex64", False),
        ("bool", "bool", True),
    ],
)
def test_exactness(stored: str, target: str, exact: bool) -> None:
    assert is_exact(ValueRule(), dtype_named(stored), dtype_named(target)) == exact
    assert not is_exact(ValueRule(scale=2.0), dtype_named(stored), dtype_named(target))
    assert not is_exact(ValueRule(shift=1.0), dtype_named(stored), dtype_named(target))


@pytest.mark.parametrize("stored", [dtype for dtype in FLOATS if dtype.bits <= 16], ids=lambda dtype: dtype.name)
def test_what_is_called_exact_comes_out_of_convert_unchanged(stored: DType) -> None:
    values = every_value(stored)
    for target in FLOATS:
        if is_exact(ValueRule(), stored, target):
            out = np.empty(values.shape, target.numpy)
            convert(values, ValueRule(), out)
            assert_same_bits(doubles(out), doubles(values))


def test_what_a_float_is() -> None:
    assert {dtype.name for dtype in DTYPES if not is_float(dtype)} == {
        "bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "complex64", "int64", "uint64"
    }  # fmt: skip
