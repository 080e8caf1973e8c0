import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardconv.runs import byte_runs, coalesce, element_runs

TABLE = [
    ((), (), [(0, 1)]),
    ((5,), ((0, 5),), [(0, 5)]),
    ((5,), ((2, 4),), [(2, 2)]),
    ((5,), ((2, 2),), []),
    ((4, 6), ((0, 4), (0, 6)), [(0, 24)]),
    ((4, 6), ((1, 3), (0, 6)), [(6, 12)]),
    ((4, 6), ((2, 3), (1, 4)), [(13, 3)]),
    ((4, 6), ((1, 3), (1, 4)), [(7, 3), (13, 3)]),
    ((4, 6), ((1, 3), (4, 4)), []),
    ((2, 3, 4), ((0, 2), (1, 3), (0, 4)), [(4, 8), (16, 8)]),
    ((2, 3, 4), ((0, 2), (0, 3), (3, 4)), [(3, 1), (7, 1), (11, 1), (15, 1), (19, 1), (23, 1)]),
    ((2, 1, 4), ((0, 2), (0, 1), (0, 4)), [(0, 8)]),
    ((0, 4), ((0, 0), (0, 4)), []),
]


@pytest.mark.parametrize(("shape", "box", "expected"), TABLE)
def test_runs_of_small_boxes(shape, box, expected):
    assert list(element_runs(shape, box)) == expected
    assert list(byte_runs(shape, box, bits=32)) == [(4 * start, 4 * count) for start, count in expected]


@st.composite
def shapes_and_boxes(draw):
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    box = []
    for n in shape:
        start = draw(st.integers(0, n))
        box.append((start, draw(st.integers(start, n))))
    return shape, tuple(box)


def touched(shape, box) -> list[int]:
    """The positions of a box's elements in the flat array, as NumPy sees them."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers[tuple(slice(*side) for side in box)].reshape(-1).tolist()


def pieces(numbers: list[int]) -> list[tuple[int, int]]:
    """Rising numbers as longest runs of neighbours."""
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and sum(found[-1]) == n:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((n, 1))
    return found


@given(shapes_and_boxes())
def test_runs_are_the_longest_there_are_in_rising_order(case):
    assert list(element_runs(*case)) == pieces(touched(*case))


@given(shapes_and_boxes(), st.sampled_from([4, 8, 16, 32, 64]))
def test_bytes_are_those_that_the_elements_touch(case, bits):
    expected = sorted({bit // 8 for n in touched(*case) for bit in range(n * bits, (n + 1) * bits)})
    found = [byte for start, length in byte_runs(*case, bits=bits) for byte in range(start, start + length)]
    assert found == expected


def test_a_box_of_a_billion_runs_costs_nothing_to_begin():
    runs = byte_runs((10**9, 10**9, 2), ((0, 10**9), (1, 10**9), (1, 2)), bits=16)
    assert list(itertools.islice(runs, 2)) == [(6, 2), (10, 2)]


def test_coalescing_small_examples():
    runs = [(0, 16), (32, 16), (64, 16), (96, 16)]
    assert list(coalesce(runs, gap=15, most=9)) == [[run] for run in runs]
    assert list(coalesce(runs, gap=16, most=9)) == [runs]
    assert list(coalesce(runs, gap=16, most=3)) == [runs[:3], runs[3:]]
    assert list(coalesce([], gap=16, most=3)) == []


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=20), st.integers(0, 9), st.integers(1, 5))
def test_groups_are_the_runs_cut_at_wide_gaps_and_full_groups_only(steps, gap, most):
    runs, at = [], 0
    for skip, length in steps:
        runs.append((at + skip, length))
        at += skip + length
    groups = list(coalesce(runs, gap=gap, most=most))
    assert list(itertools.chain.from_iterable(groups)) == runs
    for group in groups:
        assert 1 <= len(group) <= most
        assert all(b[0] - sum(a) <= gap for a, b in itertools.pairwise(group))
    for left, right in itertools.pairwise(groups):
        assert len(left) == most or right[0][0] - sum(left[-1]) > gap
