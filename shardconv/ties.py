"""Whether two stored tensors hold the same bytes: what decides if a model's output projection is its embedding.

Row blocks of both are read side by side, so that it takes little memory, and the first difference ends it.
"""

import numpy as np

from shardconv.boxes import box_shape, whole
from shardconv.dtypes import dtype_of_code, raw_view
from shardconv.formats import StoredTensor
from shardconv.formats.reading import Reader

# Bytes of each tensor compared at a time.
BLOCK = 16 << 20


def same_bytes(root: str, a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors of the source at `root` are equal: in dtype, in shape, and bit for bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if (a.file, a.offset) == (b.file, b.offset):
        return True
    dtype = dtype_of_code(a.dtype).numpy
    rows = a.shape[0] if a.shape else 1
    step = max(rows * BLOCK // max(a.nbytes, 1), 1)
    with Reader(root, coalesce_gap=0) as reader:
        for start in range(0, rows, step):
            side = ((start, min(start + step, rows)), *whole(a.shape[1:])) if a.shape else ()
            first, second = np.empty(box_shape(side), dtype), np.empty(box_shape(side), dtype)
            reader.read(a, side, first)
            reader.read(b, side, second)
            if not np.array_equal(raw_view(first), raw_view(second)):
                return False
    return True
