"""Byte runs: which bytes of a stored, row-major tensor a box is made of, and which of them to request together.

A run is (offset, length) in bytes from the tensor's first byte. The trailing dims that a box takes whole melt together
with the first one that it takes in part, so a box that lies in one piece in the file is one run. Runs come in rising
order and never touch.

Everything is a generator: a box of a million short runs costs no memory, and the reader takes them a request at a time.
Nothing has a default here; what a gap may cost is the reader's policy.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

from shardconv.boxes import Box, box_shape

Run = tuple[int, int]

# A kernel takes 1024 buffers in one preadv (IOV_MAX), and each run but the last may bring a gap with it. The plan
# counts requests by it.
RUNS_PER_REQUEST = 512


def element_runs(shape: Sequence[int], box: Box) -> Iterator[Run]:
    """The runs of a box, as (first element, number of elements) of the flattened tensor.

    >>> list(element_runs((4, 6), ((1, 3), (2, 4))))
    [(8, 2), (14, 2)]
    >>> list(element_runs((4, 6), ((1, 3), (0, 6))))
    [(6, 12)]
    """
    sides = box_shape(box)
    if 0 in sides:
        return
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    # the last dim that is not taken whole; from there on the box lies in one piece
    part = max((dim for dim, n in enumerate(shape) if sides[dim] != n), default=0)
    length = math.prod(sides[part:])
    outer = [range(0, side * stride, stride) for side, stride in zip(sides[:part], strides[:part], strict=True)]
    for offset in _sums(first, outer):
        yield offset, length


def _sums(base: int, steps: Sequence[range]) -> Iterator[int]:
    """`base` plus one step of each range, the last range turning fastest."""
    if not steps:
        yield base
        return
    for step in steps[0]:
        yield from _sums(base + step, steps[1:])


def byte_runs(shape: Sequence[int], box: Box, *, bits: int) -> Iterator[Run]:
    """The runs of a box in bytes, for elements of `bits` bits in the file.

    Runs of four-bit elements that start or end in the middle of a byte take that byte whole.

    >>> list(byte_runs((4, 6), ((1, 3), (2, 4)), bits=16))
    [(16, 4), (28, 4)]
    >>> list(byte_runs((2, 3), ((1, 2), (0, 3)), bits=4))
    [(1, 2)]
    """
    for start, count in element_runs(shape, box):
        begin = start * bits // 8
        yield begin, -(-(start + count) * bits // 8) - begin


def coalesce(runs: Iterable[Run], *, gap: int, most: int) -> Iterator[list[Run]]:
    """Group runs for reading: neighbours at most `gap` bytes apart share a request of at most `most` runs.

    >>> list(coalesce([(0, 4), (6, 4), (20, 4)], gap=2, most=8))
    [[(0, 4), (6, 4)], [(20, 4)]]
    """
    group: list[Run] = []
    end = 0
    for run in runs:
        if group and (run[0] - end > gap or len(group) == most):
            yield group
            group = []
        group.append(run)
        end = run[0] + run[1]
    if group:
        yield group
