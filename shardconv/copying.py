"""The hot kernel: a strided copy that keeps to the cache.

`out[...] = x.T` walks one side with a large stride, so that every element of two bytes costs a cache line of 64: 0.3 GB/s a core. Here
the copy goes tile by tile through a scratch that stays in the cache: 3 GB/s. The rows of a tile run along the axes that are fastest in
`out`, its columns along those that are fastest in `block`, each over as many axes as it takes to make them long. So the two halves of
RoPE, `(half pair)` to `(pair half)`, meet in the scratch, and `out` is still written in long runs.

Where both sides run fastest along the same axis, NumPy's own copy is as fast as memory and nothing is tiled.
"""

import itertools
import math

import numpy as np

# A tile's rows, in elements, and the bytes of each: 256 KiB of two bytes an element, which the second-level cache holds. Measured on a
# transpose of 4096 x 4096 such elements: 512 x 512 3.3 GB/s, 256 x 512 1.9, 512 x 256 2.5, 512 x 1024 2.8, 1024 x 1024 2.7.
ROWS, WIDTH = 512, 512

# Bytes that each scratch row is longer than its data: with rows of a power of two all of them would fall into the same cache sets.
PAD = 16

# Elements below which a plain strided copy is as fast as setting up tiles.
SMALL = 1 << 14

# The length from which it is better to go along an axis than to loop over it: a call costs as much as copying hundreds of elements.
SHORT = 8

Run = dict[int, int]  # axes, the fastest first, and how much of each is taken at once


def copy(out: np.ndarray, block: np.ndarray) -> None:
    """`out[...] = block` for equal shapes and dtypes, whatever the strides; the two must not overlap.

    >>> out = np.empty((3, 2)); copy(out, np.arange(6.0).reshape(2, 3).T); out[:, 1].tolist()
    [3.0, 4.0, 5.0]
    """
    out, block = merged(out, block)
    rows, columns = tile(out, block)
    if not rows:
        out[...] = block
        return
    for run in rows, columns:
        if math.prod(run.values()) < SHORT:
            axis = next(iter(run))
            for part in zip(np.moveaxis(out, axis, 0), np.moveaxis(block, axis, 0), strict=True):
                copy(*part)
            return
    steps = rows | columns
    order = [*(axis for axis in range(out.ndim) if axis not in steps), *reversed(rows), *reversed(columns)]
    out, block = out.transpose(order), block.transpose(order)
    sides = [range(0, out.shape[place], steps.get(axis, 1)) for place, axis in enumerate(order)]
    for start in itertools.product(*sides):
        box = tuple(slice(at, at + side.step) for at, side in zip(start, sides, strict=True))
        _turn(out[box], block[box], out.ndim - len(columns))


def tile(out: np.ndarray, block: np.ndarray) -> tuple[Run, Run]:
    """The rows and the columns of a tile; both empty where a plain copy is as good.

    A run shorter than SHORT, with nothing to lengthen it, is one to loop over.
    """
    if out.size < SMALL:
        return {}, {}
    i, j = _fastest(out)[0], _fastest(block)[0]
    if i == j:
        return ({}, {}) if out.shape[i] >= SHORT else ({i: out.shape[i]}, {})
    rows = _run(out, ROWS, {j})
    return rows, _run(block, WIDTH // out.itemsize, set(rows))


def _run(array: np.ndarray, length: int, taken: set[int]) -> Run:
    """About `length` elements along the fastest axes of `array`, up to the first that is taken."""
    run: Run = {}
    for axis in _fastest(array):
        if axis in taken or length < 2:
            break
        run[axis] = min(array.shape[axis], length)
        length //= run[axis]
    return run


def _turn(out: np.ndarray, block: np.ndarray, rows: int) -> None:
    """Copies one tile, whose first `rows` axes are its rows: in along the columns, out along the rows."""
    shape = math.prod(block.shape[:rows]), math.prod(block.shape[rows:])
    scratch = np.empty((shape[0], shape[1] + PAD // block.itemsize), block.dtype)
    view = scratch[:, : shape[1]].reshape(block.shape, copy=False)
    view[...] = block
    out[...] = view


def merged(out: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays with every two neighbouring axes that are one run on both sides made one, and axes of length one dropped."""
    shape: list[int] = []
    strides: list[tuple[int, int]] = []
    for n, a, b in sorted(zip(out.shape, out.strides, block.strides, strict=True), key=lambda axis: -abs(axis[1])):
        if n == 1:
            continue
        if shape and strides[-1] == (a * n, b * n):
            shape[-1] *= n
            strides[-1] = (a, b)
        else:
            shape.append(n)
            strides.append((a, b))
    view = np.lib.stride_tricks.as_strided
    return view(out, shape, [a for a, _ in strides]), view(block, shape, [b for _, b in strides], writeable=False)


def _fastest(array: np.ndarray) -> list[int]:
    """The axes of an array from the smallest stride to the largest."""
    return sorted(range(array.ndim), key=lambda axis: abs(array.strides[axis]))
