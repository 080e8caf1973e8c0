"""The strided copy against np.copyto, on every kind of stride, and when it goes by tiles."""

import math
from random import Random

import ml_dtypes
import numpy as np
import pytest
from algebra_oracle import laws
from hypothesis import given
from hypothesis import strategies as st

from shardconv.copying import PAD, ROWS, SMALL, WIDTH, copy, merged, tile

DTYPES = (np.bool_, np.uint8, np.int8, np.uint16, np.float32, np.int64, np.complex128, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)


def numbers(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Distinct bytes for as long as there are any, with a period that no tile has."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    return np.resize(np.arange(251, dtype=np.uint8), count).view(dtype).reshape(shape)


def assert_copies(out: np.ndarray, block: np.ndarray, base: np.ndarray) -> None:
    """`copy` does to `base`, of which `out` is a view, what NumPy does: no less, and nothing beside it."""
    before, source = base.tobytes(), block.tobytes()
    np.copyto(out, block)
    want = base.tobytes()
    base.reshape(-1).view(np.uint8)[:] = np.frombuffer(before, np.uint8)
    copy(out, block)
    assert base.tobytes() == want
    assert block.tobytes() == source


def some_shape(dice: Random) -> tuple[int, ...]:
    """Few long axes among short ones: some shapes too small for tiles, many of several tiles."""
    short = dice.choices([2, 2, 3, 7, 8, 9, 1], k=dice.randint(0, 3))
    long = dice.choices([600, 257, 130, 64], k=dice.randint(1, 2))
    while math.prod(short) * math.prod(long) > 8 * SMALL:
        (short or long).pop()
    shape = dice.sample([*short, *long], len(short) + len(long))
    return tuple(0 if dice.random() < 0.01 else n for n in shape)


def some_view(dice: Random, shape: tuple[int, ...], dtype: type, broadcast: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """An array of this shape, cut out of a larger one: axes in any order, reversed, stepped over or broadcast; and the larger one."""
    order = dice.sample(range(len(shape)), len(shape))
    lengths, cuts = [], []
    for axis in order:
        n, kind = shape[axis], dice.choice(["all", "all", "all", "inside", "back", "thirds", "one"])
        if kind == "one" and broadcast:
            length, cut = 1, slice(None)
        elif kind == "inside":
            length, cut = n + 3, slice(2, n + 2)
        elif kind == "thirds" and n < 10:
            length, cut = 3 * n + 1, slice(1, None, 3)
        else:
            length, cut = n, slice(None, None, -1 if kind == "back" else None)
        lengths.append(length)
        cuts.append(cut)
    base = numbers(tuple(lengths), dtype)
    view = base[(..., *cuts)].transpose(np.argsort(order))
    return (np.broadcast_to(view, shape) if broadcast else view), base


@laws()
@given(st.randoms(use_true_random=True))
def test_a_copy_is_numpys_whatever_the_strides(dice: Random) -> None:
    shape, dtype = some_shape(dice), dice.choice(DTYPES)
    out, base = some_view(dice, shape, dtype)
    block, _ = some_view(dice, shape, dtype, broadcast=True)
    block = block[...]
    block.flags.writeable = False
    assert_copies(out, block, base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(512, 512), (513, 259), (1030, 33), (31, 1100), (1, 20000), (8, 4001), (7, 4001)])
def test_a_transpose_of_any_size(shape: tuple[int, int], dtype: type) -> None:
    out = np.zeros(shape, dtype)
    copy(out, numbers(shape[::-1], dtype).T)
    assert out.tobytes() == np.ascontiguousarray(numbers(shape[::-1], dtype).T).tobytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int64])
def test_starts_that_are_not_aligned(dtype: type) -> None:
    size = np.dtype(dtype).itemsize
    raw, base = numbers((301 * 203 * size + 1,), np.uint8), np.zeros(301 * 203 * size + 1, np.uint8)
    block, out = (np.frombuffer(buffer, dtype, offset=1).reshape(shape) for buffer, shape in ((raw, (301, 203)), (base, (203, 301))))
    assert not block.flags.aligned
    assert_copies(out, block.T, base)


@pytest.mark.parametrize("pairs_first", [True, False])
def test_rope_halves_and_pairs(pairs_first: bool) -> None:
    stored = numbers((6, 2, 40, 300), np.uint16)
    out = np.zeros((300, 3, 6, 40, 2), np.uint16)
    if pairs_first:
        assert_copies(out[:, 1], stored.transpose(3, 0, 2, 1), out)
    else:
        assert_copies(stored, out[:, 1].transpose(1, 3, 2, 0), stored)


def test_a_scalar() -> None:
    out = np.zeros((), np.uint16)
    copy(out, np.array(7, np.uint16))
    assert out == 7


# --- when it goes by tiles --------------------------------------------------------------------------------------------------------


def runs(out: np.ndarray, block: np.ndarray) -> tuple[tuple[int, ...], dict[int, int], dict[int, int]]:
    """The shape after merging, and the tile that is taken of it."""
    out, block = merged(out, block)
    return (out.shape, *tile(out, block))


def test_a_transpose_goes_by_tiles_of_rows_in_out_and_columns_in_block() -> None:
    for dtype, columns in ((np.uint8, 512), (np.uint16, 256), (np.uint32, 128), (np.uint64, 64)):
        assert runs(np.empty((3000, 2000), dtype), np.empty((2000, 3000), dtype).T) == ((3000, 2000), {1: 512}, {0: columns})


def test_a_stacked_transpose_goes_by_the_same_tiles() -> None:
    out, block = np.empty((4096, 4, 32, 128), np.uint16), np.empty((32, 128, 4096), np.uint16)
    assert runs(out[:, 2], block.transpose(2, 0, 1)) == ((4096, 4096), {1: 512}, {0: 256})


def test_rope_goes_by_rows_of_both_halves_and_several_heads() -> None:
    out, block = np.empty((4096, 32, 64, 2), np.uint16), np.empty((32, 2, 64, 4096), np.uint16)
    assert runs(out, block.transpose(3, 0, 2, 1)) == ((4096, 32, 64, 2), {3: 2, 2: 64, 1: 4}, {0: 256})
    back = np.empty((32, 2, 64, 4096), np.uint16)
    assert runs(back, np.empty((4096, 32, 64, 2), np.uint16).transpose(1, 3, 2, 0)) == ((32, 2, 64, 4096), {3: 512}, {1: 2, 2: 64, 0: 2})


def test_the_same_order_on_both_sides_is_one_plain_copy() -> None:
    assert runs(np.empty((100, 3, 400))[:, 1], np.empty((100, 400))) == ((100, 400), {}, {})
    assert runs(np.empty((3, 100, 400)), np.empty((100, 3, 400)).transpose(1, 0, 2)) == ((3, 100, 400), {}, {})
    assert runs(np.empty((30, 40, 400)), np.empty((30, 40, 400))) == ((480000,), {}, {})


def test_little_is_copied_plainly() -> None:
    assert runs(np.empty((127, 129)), np.empty((129, 127)).T) == ((127, 129), {}, {})
    assert runs(np.empty((128, 128)), np.empty((128, 128)).T) == ((128, 128), {1: 128}, {0: 64})
    assert runs(np.empty((0, 500)), np.empty((500, 0)).T)[1:] == ({}, {})


def test_a_short_axis_with_nothing_beside_it_is_looped_over() -> None:
    both = np.empty((300, 90, 2), np.uint16), np.empty((90, 300, 2), np.uint16).transpose(1, 0, 2)
    assert runs(*both) == ((300, 90, 2), {2: 2}, {})
    beside = np.empty((70, 300, 2), np.uint16), np.empty((70, 2, 300), np.uint16).transpose(0, 2, 1)
    assert runs(*beside) == ((70, 300, 2), {2: 2}, {1: 256})
    for out, block in (both, beside):
        block[...] = numbers(block.shape, np.uint16)
        assert_copies(out, block, out)


def test_axes_that_are_one_run_on_both_sides_are_merged() -> None:
    out, block = merged(np.empty((5, 1, 6, 7)), np.empty((6, 7, 5)).transpose(2, 0, 1)[:, None])
    assert (out.shape, out.strides) == ((5, 42), (336, 8))
    assert (block.shape, block.strides) == ((5, 42), (8, 40))
    assert not block.flags.writeable


@laws()
@given(st.randoms(use_true_random=True))
def test_a_tile_starts_at_the_fastest_axes_and_fits_the_scratch(dice: Random) -> None:
    shape = some_shape(dice)
    out, _ = some_view(dice, shape, np.uint16)
    block, _ = some_view(dice, shape, np.uint16, broadcast=True)
    out, block = merged(out, block)
    rows, columns = tile(out, block)
    assert not rows.keys() & columns.keys()
    assert math.prod(rows.values()) <= ROWS
    assert math.prod(columns.values()) * block.itemsize <= WIDTH
    assert all(0 < step <= out.shape[axis] for axis, step in (rows | columns).items())
    if out.size >= SMALL:
        i, j = (min(range(out.ndim), key=lambda axis, a=array: (abs(a.strides[axis]), axis)) for array in (out, block))
        if i != j:
            assert (next(iter(rows)), next(iter(columns))) == (i, j)


def test_a_row_of_the_scratch_is_no_power_of_two() -> None:
    assert (WIDTH + PAD) & (WIDTH + PAD - 1)
