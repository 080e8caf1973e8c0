"""Writing safetensors checkpoints, a block of bytes at a time: one file, or several and their index.

A writer is told names, dtypes and shapes, and asks for a tensor's bytes when it comes to it, so a checkpoint of any
size is written in the memory of one block. Without data it writes real headers and sets each file to its full length
without filling it: a sparse checkpoint that plans and inspects like the real one and takes kilobytes of disk.

Within a file tensors lie in the order of safetensors' own writer (dtypes from the widest, then names), headers are
padded to 8 bytes, and the result is the same bytes. Files appear under their names when they are complete, the index
last.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from shardconv.dtypes import DTYPES, dtype_of_code

_ORDER = {dtype.code: rank for rank, dtype in enumerate(DTYPES)}


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written: its name, its safetensors dtype code and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes it takes in the file."""
        return dtype_of_code(self.dtype).nbytes(self.shape)


# The bytes of a tensor, in order, in blocks of any size.
Blocks = Callable[[NewTensor], Iterable[bytes | memoryview]]


def header(tensors: Sequence[NewTensor], *, metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data of a file that holds `tensors` in this order; no `__metadata__` for empty `metadata`.

    >>> header([NewTensor("a", "F16", (2,))], metadata={})[8:]
    b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}  '
    """
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        described[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def in_file_order(tensors: Iterable[NewTensor]) -> list[NewTensor]:
    """Tensors as safetensors orders them in a file, which keeps every one of them aligned."""
    return sorted(tensors, key=lambda tensor: (-_ORDER[tensor.dtype], tensor.name))


def write_file(
    path: str | os.PathLike[str],
    tensors: Iterable[NewTensor],
    data: Blocks | None,
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write one safetensors file; sparse, all zeros, when `data` is None.

    Raises ValueError when a tensor's blocks are not of its length in all.
    """
    ordered = in_file_order(tensors)
    part = os.fspath(path) + ".part"
    with open(part, "wb") as file:
        file.write(header(ordered, metadata=metadata))
        if data is None:
            file.truncate(file.tell() + sum(tensor.nbytes for tensor in ordered))
        else:
            for tensor in ordered:
                _write_blocks(file, tensor, data(tensor))
    os.replace(part, path)


def _write_blocks(file: BinaryIO, tensor: NewTensor, blocks: Iterable[bytes | memoryview]) -> None:
    written = sum(file.write(block) for block in blocks)
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name} has {tensor.nbytes} bytes, but its blocks have {written}")


def split(tensors: Iterable[NewTensor], *, max_file_bytes: int) -> list[list[NewTensor]]:
    """Distribute tensors over files of at most `max_file_bytes` of data, in order; a larger one gets its own."""
    files: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.nbytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    return files


def write_checkpoint(
    directory: str | os.PathLike[str],
    tensors: Iterable[NewTensor],
    data: Blocks | None,
    *,
    max_file_bytes: int,
    metadata: Mapping[str, str],
) -> list[str]:
    """Write a checkpoint into `directory`, which exists, and return the names of its files.

    It is `model.safetensors` where one file is enough, else `model-00001-of-0000N.safetensors` and so on, and an index
    with their `total_size`. Sparse when `data` is None. Raises ValueError as `write_file` does.
    """
    shards = split(tensors, max_file_bytes=max_file_bytes)
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(os.path.join(directory, name), shard, data, metadata=metadata)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        part = os.path.join(directory, "model.safetensors.index.json.part")
        with open(part, "w", encoding="utf-8") as file:
            json.dump(index, file, indent=2)
            file.write("\n")
        os.replace(part, part.removesuffix(".part"))
    return names
