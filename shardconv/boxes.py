"""Boxes: half-open index ranges of an array, as plain tuples of (start, stop), and the chunk grid in which boxes are counted."""

import math
from collections.abc import Sequence
from types import EllipsisType

Interval = tuple[int, int]
Box = tuple[Interval, ...]


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole array.

    >>> whole((2, 3))
    ((0, 2), (0, 3))
    """
    return tuple((0, n) for n in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """The lengths of a box's sides."""
    return tuple(stop - start for start, stop in box)


def box_size(box: Box) -> int:
    """The number of elements in a box."""
    return math.prod(stop - start for start, stop in box)


def slices(box: Box) -> tuple[EllipsisType | slice, ...]:
    """The box as NumPy takes it, with `...`, without which the box of a scalar would give a number, not a view.

    >>> slices(((0, 2), (3, 4)))
    (Ellipsis, slice(0, 2, None), slice(3, 4, None))
    """
    return (..., *(slice(start, stop) for start, stop in box))


def grid_shape(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    """The number of chunks along each dim; the last one may be clipped.

    >>> grid_shape((5, 4), (2, 4))
    (3, 1)
    """
    return tuple(-(-n // c) if c else 0 for n, c in zip(shape, chunk, strict=True))


def chunk_box(shape: Sequence[int], chunk: Sequence[int], number: int) -> Box:
    """The box of chunk `number`, counted in row-major order of the grid, clipped to the array; IndexError outside the grid.

    >>> chunk_box((5, 4), (2, 4), 2)
    ((4, 5), (0, 4))
    """
    grid = grid_shape(shape, chunk)
    if not 0 <= number < math.prod(grid):
        raise IndexError(f"there is no chunk {number} in a grid of {grid}")
    index = []
    for count in reversed(grid):
        number, i = divmod(number, count)
        index.append(i)
    return tuple((i * c, min((i + 1) * c, n)) for i, c, n in zip(reversed(index), chunk, shape, strict=True))
