"""Casts by their definition, against torch's and ml_dtypes' on every pattern that matters; and comparing."""

import ml_dtypes
import numpy as np
import pytest

from shardconv.verify.compare import Comparison, Odd, bounds, compare, differing, equal, odd, pairs
from shardconv.verify.rounding import bits, changed, rounded, widened

EIGHT = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]


def numpy_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def awkward() -> np.ndarray:
    """float32 values around every float16 and bfloat16 value, on and beside the midpoints; infinities, NaN and both zeros among them."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    patterns = np.concatenate([high + offset for offset in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        between = (halves[1:].astype(np.float64) + halves[:-1]) / 2
        return np.concatenate([patterns.view(np.float32), halves, between.astype(np.float32)])


@pytest.mark.parametrize("name", ["bfloat16", "float16", *EIGHT])
def test_rounding_is_that_of_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    values = awkward()
    with np.errstate(all="ignore"):
        found = rounded(values, name)
    kind = getattr(torch, name)
    wanted = torch.from_numpy(values).to(kind).view(torch.int16 if found.itemsize == 2 else torch.uint8).numpy().view(found.dtype)
    same = (bits(found) == bits(wanted)) | (np.isnan(found.astype(np.float32)) & np.isnan(wanted.astype(np.float32)))
    assert same.all(), values[~same][:5]


@pytest.mark.parametrize("name", ["bfloat16", *EIGHT])
def test_widening_keeps_every_value(name: str) -> None:
    dtype = numpy_of(name)
    patterns = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype)
    wanted = patterns.astype(np.float32)
    found = widened(patterns)
    assert ((bits(found) == bits(wanted)) | (np.isnan(found) & np.isnan(wanted))).all()


def test_scale_and_shift_are_rounded_once() -> None:
    values = np.array([1.00390625, 3.14159, -2.5], np.float32)
    found = changed(values, 0.1, 1.0, "bfloat16")
    exact = values.astype(np.float64) * np.float64(np.float32(0.1)) + 1
    assert np.abs(found.astype(np.float64) - exact).max() <= 2.0**-8 * np.abs(exact).max()
    assert changed(values, 1.0, 0.0, "float32") is values


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (130, 600), (2, 1, 300, 5), (4, 129, 2, 64)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_one_bit_anywhere_is_a_difference(shape: tuple[int, ...], order: str) -> None:
    random = np.random.default_rng(0)
    found = random.integers(0, 1 << 16, shape, np.uint16).view(np.float16)
    expected = np.array(found, order=order)
    assert equal(found, expected)
    for _ in range(20):
        place = tuple(int(random.integers(n)) for n in shape)
        other = np.array(expected, order=order)
        raw = other.view(np.uint16)
        raw[place] ^= 1 << int(random.integers(16))
        assert not equal(found, other)
        mask = differing(found, other, cast=False)
        assert mask.sum() == 1
        assert bounds(mask) == tuple((i, i + 1) for i in place)


@pytest.mark.parametrize("seed", range(30))
def test_arrays_of_any_strides_are_compared_whole(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = tuple(int(n) for n in random.choice([1, 2, 3, 16, 33, 70, 300], int(random.integers(1, 6))))
    while np.prod(shape) > 400_000:
        shape = shape[1:]
    dtype = [np.uint8, np.float16, np.float32][seed % 3]

    def lying_somehow(array: np.ndarray) -> np.ndarray:
        order = random.permutation(array.ndim)
        turned = np.empty([array.shape[axis] + int(random.integers(3)) for axis in order], array.dtype)
        view = turned.transpose(np.argsort(order))[tuple(slice(n) for n in array.shape)]
        view[...] = array
        return view

    values = random.integers(0, 200, shape).astype(dtype)
    found, source = lying_somehow(values), lying_somehow(values)
    assert sum(a.size for a, _ in pairs(found, source)) == values.size
    assert compare(found, source, None) == Comparison(True, Odd(), Odd())
    assert compare(found, source, lambda some: some + dtype(0)) == Comparison(True, Odd(), Odd())
    source[tuple(int(random.integers(n)) for n in shape)] += 1
    assert not compare(found, source, None).same and not equal(found, source)
    assert not compare(found, source, lambda some: some + dtype(0)).same


def test_values_that_are_not_finite_are_counted_where_arrays_differ_too() -> None:
    source = np.ones((300, 500), np.float32)
    source[7, 9], source[8, 9] = np.nan, np.inf
    found = np.ascontiguousarray(source.T).astype(np.float16)
    found[20, 30] = 2
    assert compare(found.astype(np.float32), source.T, None) == Comparison(False, Odd(1, 1), Odd(1, 1))
    assert compare(found, source.T, lambda some: some.astype(np.float16)) == Comparison(False, Odd(1, 1), Odd(1, 1))
    found[20, 30] = -np.inf
    assert compare(found.astype(np.float32), source.T, None) == Comparison(False, Odd(1, 2), Odd(1, 1))


def test_nan_is_nan_only_after_a_cast() -> None:
    a, b = (np.array([pattern], np.uint16).view(np.float16) for pattern in (0x7E00, 0x7E01))
    assert differing(a, b, cast=False).any()
    assert not differing(a, b, cast=True).any()


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16", "float8_e5m2"])
def test_values_that_are_not_finite_are_counted(name: str) -> None:
    array = np.ones((300, 500), numpy_of(name))
    assert odd(array) == odd(array.T) == Odd()
    array[7, 9] = np.nan
    array[299, 499], array[0, 0] = np.inf, -np.inf
    assert odd(array) == odd(array.T) == Odd(1, 2)
    assert odd(np.ones(3, np.int8)) == Odd()
