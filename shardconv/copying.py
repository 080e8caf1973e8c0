"""The hot kernel: a strided copy that keeps to the cache.

`out[...] = x.T` walks one side with a large stride, so that every element of two bytes costs a cache line of 64: 0.3 GB/s a core. Here
axes that are contiguous on both sides are merged first; if then the two sides run fastest along different axes, the copy goes tile by
tile through a contiguous scratch that stays in the cache: 2 GB/s. NumPy moves one element a nanosecond in such a copy, whatever its
width, so elements of one or two bytes are transposed as words of four and taken apart by truncating casts, which run at the speed of the
cache: 3 GB/s for two bytes.
"""

import sys

import numpy as np

# A tile's rows (along which `out` is contiguous) and columns (along which `block` is), in elements: long enough rows that the loop in
# Python does not show, and the scratch of 512 x 128 two-byte elements, 128 KiB, in the second-level cache. Measured on 16-bit
# elements: 256 x 256 2.7 GB/s, 512 x 128 3.0, 512 x 64 1.9, 128 x 128 1.7.
ROWS, COLUMNS = 512, 128

# Bytes that each scratch row is longer than its data: with rows of a power of two all of them would fall into the same cache sets.
PAD = 64

# Elements below which a plain strided copy is as fast as setting up tiles.
SMALL = 1 << 14

# The length from which an axis is worth a side of a tile.
SHORT = 8


def copy(out: np.ndarray, block: np.ndarray) -> None:
    """`out[...] = block` for equal shapes and dtypes, whatever the strides.

    >>> out = np.empty((3, 2)); copy(out, np.arange(6.0).reshape(2, 3).T); out[:, 1].tolist()
    [3.0, 4.0, 5.0]
    """
    out, block = _merged(out, block)
    i, j = _fastest(out), _fastest(block)
    if i == j or out.size < SMALL:
        out[...] = block
        return
    order = [i, j, *(axis for axis in range(out.ndim) if axis not in (i, j))]
    out, block = out.transpose(order), block.transpose(order)
    copy_tiles = _copy_words if _wordwise(block) else _copy_elements
    for rest in np.ndindex(out.shape[2:]):
        copy_tiles(out[(..., *rest)], block[(..., *rest)])


def _copy_elements(out: np.ndarray, block: np.ndarray) -> None:
    scratch = np.empty((ROWS, COLUMNS + PAD // out.itemsize), out.dtype)
    for a in range(0, out.shape[0], ROWS):
        for b in range(0, out.shape[1], COLUMNS):
            part = block[a : a + ROWS, b : b + COLUMNS]
            tile = scratch[: part.shape[0], : part.shape[1]]
            tile[...] = part
            out[a : a + ROWS, b : b + COLUMNS] = tile


def _wordwise(block: np.ndarray) -> bool:
    """Whether the columns of `block` can be read as words of four bytes whose lowest lane is the first element."""
    if sys.byteorder != "little" or block.dtype not in (np.uint8, np.uint16) or block.strides[1] != block.itemsize:
        return False
    starts = (block.ctypes.data, block.shape[1] * block.itemsize, block.strides[0], *block.strides[2:])
    return all(start % 4 == 0 for start in starts)


def _copy_words(out: np.ndarray, block: np.ndarray) -> None:
    lanes = 4 // out.itemsize
    words = block.view(np.uint32)
    rows = np.empty((ROWS, (COLUMNS + PAD) // lanes), np.uint32)
    columns = np.empty((COLUMNS // lanes, ROWS), np.uint32)
    for a in range(0, out.shape[0], ROWS):
        for b in range(0, out.shape[1], COLUMNS):
            part = words[a : a + ROWS, b // lanes : (b + COLUMNS) // lanes]
            tile = rows[: part.shape[0], : part.shape[1]]
            tile[...] = part
            turned = columns[: part.shape[1], : part.shape[0]]
            turned[...] = tile.T
            for lane in range(lanes):
                place = out[a : a + ROWS, b + lane : b + COLUMNS : lanes]
                np.copyto(place, turned.T, casting="unsafe")
                turned >>= 8 * out.itemsize


def _merged(out: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _fastest(array: np.ndarray) -> int:
    """The axis of the smallest stride among those long enough for a tile: a short one (the two halves of RoPE) is better looped over."""
    long = [axis for axis in range(array.ndim) if array.shape[axis] >= SHORT] or range(array.ndim)
    return min(long, key=lambda axis: abs(array.strides[axis]), default=0)
