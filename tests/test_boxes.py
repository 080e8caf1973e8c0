"""Boxes and chunk grids against a count of every element."""

import math

import numpy as np
import pytest
from algebra_oracle import laws
from hypothesis import given
from hypothesis import strategies as st

from shardconv.boxes import box_shape, box_size, chunk_box, grid_shape, slices, whole

sides = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 9)), max_size=3)


@laws()
@given(sides)
def test_the_chunks_of_a_grid_cover_an_array_once_in_row_major_order(sides: list[tuple[int, int]]) -> None:
    shape, chunk = tuple(n for n, _ in sides), tuple(c for _, c in sides)
    grid = grid_shape(shape, chunk)
    owner = np.full(shape, -1)
    for number, place in enumerate(np.ndindex(*grid)):
        box = chunk_box(shape, chunk, number)
        assert (owner[slices(box)] == -1).all()
        assert box_shape(box) == owner[slices(box)].shape
        assert all(0 < n <= c for n, c in zip(box_shape(box), chunk, strict=True))
        assert tuple(start // c for (start, _), c in zip(box, chunk, strict=True)) == place
        owner[slices(box)] = number
    assert (owner >= 0).all()


@pytest.mark.parametrize(("number", "grid"), [(6, "(3, 2)"), (-1, "(3, 2)"), (7, "(3, 2)")])
def test_there_is_no_chunk_outside_the_grid(number: int, grid: str) -> None:
    with pytest.raises(IndexError) as caught:
        chunk_box((5, 4), (2, 3), number)
    assert str(caught.value) == f"there is no chunk {number} in a grid of {grid}"


def test_an_empty_array_has_no_chunks() -> None:
    assert grid_shape((0, 4), (0, 2)) == (0, 2)
    assert grid_shape((0, 4), (3, 2)) == (0, 2)
    with pytest.raises(IndexError) as caught:
        chunk_box((0, 4), (3, 2), 0)
    assert str(caught.value) == "there is no chunk 0 in a grid of (0, 2)"


def test_a_scalar_is_one_chunk() -> None:
    assert grid_shape((), ()) == ()
    assert chunk_box((), (), 0) == ()


def test_a_chunk_needs_as_many_dims_as_the_array() -> None:
    with pytest.raises(ValueError, match="zip"):
        grid_shape((4, 4), (2,))


def test_a_box_has_a_shape_and_a_size() -> None:
    box = ((1, 4), (2, 2), (0, 5))
    assert box_shape(box) == (3, 0, 5)
    assert [box_size(box), box_size(((1, 4), (0, 5))), box_size(())] == [0, 15, 1]


@laws(0.1)
@given(st.lists(st.integers(0, 5), max_size=4))
def test_the_whole_box_is_the_array(shape: list[int]) -> None:
    array = np.empty(shape)
    assert box_shape(whole(shape)) == array.shape
    assert box_size(whole(shape)) == math.prod(shape)
    assert array[slices(whole(shape))].shape == array.shape


def test_what_is_sliced_by_a_box_is_a_view_of_a_scalar_too() -> None:
    scalar, array = np.zeros(()), np.zeros((3, 4))
    scalar[slices(())][...] = 5
    array[slices(((1, 3), (0, 2)))][...] = 5
    assert scalar == 5
    assert array.tolist() == [[0, 0, 0, 0], [5, 5, 0, 0], [5, 5, 0, 0]]
