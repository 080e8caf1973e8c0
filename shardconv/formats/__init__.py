"""File formats: where each tensor of a checkpoint lies, found by reading headers only.

A format turns files into `StoredTensor`s, one per tensor: a name, a file, a dtype, a shape and a byte range of the
file. Nothing after that knows the format: a row-major range is read the same way whatever header described it. A new
format is one module here that gives the same two types; one that packs, compresses or strides its data needs a reader
of its own too.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint: row-major data of `shape`, at bytes `offset` to `offset + nbytes` of `file`.

    `file` is relative to the source's root, `dtype` is a safetensors code ("BF16"), `offset` counts from the file's
    first byte.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ComputedTensor:
    """A tensor that no file has: what an expression, which is its name, makes of `inputs`, which files have (`shardconv.porting.folding`).

    It is made whole, however small the box that is wanted of it; `dtype` and `shape` are those of what comes out.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[StoredTensor, ...]

    @property
    def peak_bytes(self) -> int:
        """The most that is in memory while it is made: the inputs as they are, and four arrays of float64, the result among them."""
        largest = max([math.prod(self.shape), *(math.prod(one.shape) for one in self.inputs)])
        return sum(one.nbytes for one in self.inputs) + 4 * 8 * largest


Tensor = StoredTensor | ComputedTensor


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a checkpoint as it was when its header was read; the digest covers the header's bytes."""

    name: str
    size: int
    mtime_ns: int
    header_digest: str


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What one file holds: its tensors by name, the names left out for an equal tensor (alias -> kept), and what is odd about it."""

    file: SourceFile
    tensors: dict[str, StoredTensor]
    aliases: dict[str, str]
    notes: tuple[str, ...] = ()
