"""Leaves: the arrays of the target tree, and the parts that they are made of.

A leaf is one array, cut into chunks; a part is one parameter's share of it, with the address where it is stored and the address where it
goes. Most leaves have one part, a fused one several, side by side. All of it is frozen values that a plan carries to workers.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shardconv.axes import Address
from shardconv.boxes import Box, grid_shape
from shardconv.dtypes import dtype_named, dtype_of_code
from shardconv.route import Piece, pieces
from shardconv.sharding import Spec
from shardconv.values import ValueRule

# Chunks that a worker holds, besides what the store holds: the one being filled and the one being written.
CHUNKS = 2


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter's share of a leaf: where it is stored, where it goes, and which one of a template's leaves this is (`index`).

    `dtypes` are the codes of its tensors, sorted; most often one.
    """

    param: str
    dtypes: tuple[str, ...]
    source: Address
    target: Address
    index: Mapping[str, int]
    rule: ValueRule

    @property
    def stored(self) -> str:
        """Its tensors' dtypes as text.

        >>> from shardconv.axes import address
        >>> Part("q", ("BF16", "F32"), address("q", "", {}), address("q", "", {}), {}, ValueRule()).stored
        'BF16, F32'
        """
        return ", ".join(self.dtypes)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of the target tree. `zeros` is the number of elements that no part fills; `template` names all leaves like it."""

    path: tuple[str, ...]
    template: str
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    inner: tuple[int, ...]
    spec: Spec
    parts: tuple[Part, ...]
    exact: bool
    zeros: int

    @property
    def name(self) -> str:
        """The path as one dotted name."""
        return ".".join(self.path)

    @property
    def itemsize(self) -> int:
        """Bytes of an element in memory."""
        return dtype_named(self.dtype).numpy.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.itemsize

    @property
    def chunks(self) -> int:
        """The number of chunks of its grid."""
        return math.prod(grid_shape(self.shape, self.chunk))

    @property
    def rows_ratio(self) -> int:
        """Bytes of source rows that a worker may hold for a byte of a chunk: rows are converted in place, in the wider of two dtypes."""
        widest = max(dtype_of_code(code).numpy.itemsize for part in self.parts for code in part.dtypes)
        return max(widest // self.itemsize, 1)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the largest chunk."""
        return math.prod(self.chunk) * self.itemsize

    @property
    def peak_bytes(self) -> int:
        """What one worker's buffers hold for this leaf; the store's copies come on top."""
        return self.chunk_bytes * (CHUNKS + self.rows_ratio)


def leaf_pieces(leaf: Leaf, box: Box) -> Iterator[tuple[Part, Piece]]:
    """Every piece of a box of a leaf, with the part it belongs to."""
    for part in leaf.parts:
        for piece in pieces(part.target, part.source, part.index, box):
            yield part, piece
