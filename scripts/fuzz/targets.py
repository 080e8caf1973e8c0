"""What must hold for any bytes whatever, for each thing that reads them. A target returns in a word what became of an input.

Only the documented error may come out. What is accepted is read again by a reader of another make, and must be the same.
"""

import io
import itertools
import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import einops
import numpy as np
import safetensors
import torch

from shardconv.axes import Address, address, decode, encode, groups
from shardconv.errors import InputError
from shardconv.formats import FileHeader, SourceFile, StoredTensor
from shardconv.formats.index import missing_files, parse_index, reconcile
from shardconv.formats.pytorch import read_torch
from shardconv.formats.safetensors import read_header
from shardconv.verify.torch_files import places

# A file in memory, which is read like any other, by the path that it has in this process.
FILE = os.memfd_create("fuzzed")
FOLDER, NAME = "/proc/self/fd", str(FILE)
MESSAGE = 200_000  # characters that any input of 8 KiB may lead to
# What the safetensors library lets pass, and the reader's docstring says it refuses.
STRICTER = ("twice", "name is empty", "surrogate", "overflows 64 bits", "is not printable", " dims; NumPy", "Exceeds the limit")


def _write(data: bytes) -> None:
    os.ftruncate(FILE, 0)
    os.pwrite(FILE, data, 0)


def _fail(fact: str) -> NoReturn:
    raise AssertionError(fact)


def _said(error: InputError) -> str:
    text = str(error)
    assert error.problems, "an error without a problem"
    assert all(problem.fact for problem in error.problems), "a problem without a fact"
    assert len(text) < MESSAGE, f"a message of {len(text)} characters"
    return text


def read_safetensors(data: bytes) -> str:
    """The first byte chooses: 0, a whole file; else a header, and so many bytes of data but one."""
    data = data[1:] if data[:1] == b"\0" else len(data[1:]).to_bytes(8, "little") + data[1:] + bytes(max(data[:1], default=1) - 1)
    _write(data)
    try:
        theirs = {name: (info["dtype"], tuple(info["shape"]), len(info["data"])) for name, info in safetensors.deserialize(data)}
    except safetensors.SafetensorError:
        theirs = None
    try:
        header = read_header(FOLDER, NAME)
    except InputError as error:
        text = _said(error)
        assert theirs is None or any(word in text for word in STRICTER), f"the library accepts what is refused: {text}"
        return "refused"
    assert theirs is not None, "the library refuses what is accepted"
    ours = {name: (tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in header.tensors.items()}
    assert ours == theirs, (ours, theirs)
    assert all(tensor.offset >= 8 and tensor.offset + tensor.nbytes <= len(data) for tensor in header.tensors.values())
    assert all(alias not in ours and kept in ours for alias, kept in header.aliases.items())
    return "accepted"


def read_index(data: bytes) -> str:
    name = "m.safetensors.index.json"
    try:
        index = parse_index(name, data)
    except InputError as error:
        _said(error)
        return "refused"
    theirs = json.loads(data)
    assert index.weight_map == theirs["weight_map"]
    assert sorted(set(index.weight_map.values())) == list(index.files)
    for file in index.files:
        assert Path("/somewhere", file).resolve().parent == Path("/somewhere")
        assert file.endswith(".safetensors")
    total = (theirs.get("metadata") or {}).get("total_size") if isinstance(theirs.get("metadata"), dict) else None
    assert index.total_size is None or index.total_size == int(total)
    missing_files(index, ())
    # half of the tensors are where they should be
    tensors = [StoredTensor(key, file, "U8", (1,), 0, 1) for key, file in index.weight_map.items()]
    headers = {
        file: FileHeader(SourceFile(file, 9, 0, ""), {t.name: t for t in tensors[::2] if t.file == file}, {}) for file in index.files
    }
    found, problems, notes = reconcile(index, headers, may_miss=lambda key: len(key) % 2 == 0)
    assert set(found) == {tensor.name for tensor in tensors[::2]}
    assert bool(problems) == any(len(tensor.name) % 2 for tensor in tensors[1::2])
    return "accepted" if not notes else "accepted with notes"


def read_pickle(data: bytes) -> str:
    if data[:1] == b"\1":
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as out:
            for name, content in {"x/data.pkl": data[1:], "x/data/0": bytes(range(8)), "x/data/1": bytes(range(16))}.items():
                out.writestr(zipfile.ZipInfo(name), content)
        data = made.getvalue()
    else:
        data = data[1:]
    _write(data)
    try:
        header = read_torch(FOLDER, NAME, "")
    except InputError as error:
        _said(error)
        return "refused"
    tensors = header.tensors
    assert all(tensor.offset + tensor.nbytes <= len(data) for tensor in tensors.values())
    try:
        theirs = dict(places(os.path.join(FOLDER, NAME), ""))
    except InputError:
        return "accepted, not by the check's reader"
    ours = {name: (tensor.dtype, tensor.shape, tensor.offset) for name, tensor in tensors.items()}
    empty = {name for name, tensor in tensors.items() if not tensor.nbytes}  # where no bytes are is nobody's question
    assert {k: v if k not in empty else v[:2] for k, v in ours.items()} == {k: v if k not in empty else v[:2] for k, v in theirs.items()}
    return _as_torch(data, tensors)


def _as_torch(data: bytes, tensors: dict[str, StoredTensor]) -> str:
    """Whether PyTorch, where it takes the file and finds tensors by these very names in it, has these very bytes for them."""
    try:
        loaded = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception:  # noqa: BLE001  PyTorch's own errors are of many kinds
        return "accepted, not by torch"
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(name), torch.Tensor) for name in tensors):
        return "accepted, under other names by torch"
    for name, tensor in tensors.items():
        other = loaded[name].detach()
        bytes_ = other.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if other.numel() else b""
        assert bytes_ == data[tensor.offset : tensor.offset + tensor.nbytes], f"torch has other bytes for {name!r}"
    return "accepted by all"


AXES = {
    "layers": 4, "heads": 6, "kv": 2, "head_dim": "half pair", "half": 2, "pair": 4, "embed": 3, "mlp": 5, "none": 0,
    "kind": ("local", "global"), "proj": ("w1", "w10", "q|k", "(.*)"), "alias": "kind",
}  # fmt: skip
SIZES = {axis: len(size) if isinstance(size, tuple) else size for axis, size in AXES.items() if not isinstance(size, str)}


def read_address(data: bytes) -> str:
    name, dims, part, key, *_ = [*data.decode(errors="replace").split("\n"), "", "", "", ""]
    try:
        found = address(name, dims, AXES, int(part) if part.isascii() and part.isdigit() and len(part) < 9 else 0)
    except ValueError as error:
        return "refused" if len(str(error)) < MESSAGE else _fail("a message without end")
    matched = found.match(key)
    assert matched is None or found.key(matched) == key, "a key that is matched is spelled in another way"
    sizes = found.sizes
    assert sizes == {axis: SIZES[axis] for axis in sizes}
    if math.prod(sizes.values()) > 600 or math.prod(found.shape) > 5000:
        return "accepted, large"
    _laws(found)
    return _as_einops(found, dims)


def _laws(found: Address) -> None:
    """Every element has a place of its own, inside the shape, and is found again from it."""
    taken = set()
    for values in itertools.product(*map(range, found.sizes.values())):
        index = dict(zip(found.sizes, values, strict=True))
        key = found.key(index)
        assert found.match(key) == {axis: index[axis] for axis in found.named}
        at = tuple(encode(dim, index) for dim in found.dims)
        assert all(0 <= place < size for place, size in zip(at, found.shape, strict=True))
        assert all(decode(dim, place) == {d.axis: index[d.axis] for d in dim} for dim, place in zip(found.dims, at, strict=True))
        assert (key, at) not in taken, "two elements in one place"
        taken.add((key, at))


def _as_einops(found: Address, dims: str) -> str:
    """Whether einops, which reads dims without sums in the same notation, puts every element there too."""
    axes = [digit.axis for dim in found.dims for digit in dim]
    words = " ".join(group if group.startswith("(") else f"({group})" for group in groups(dims))
    words = words.replace("head_dim", "half pair").replace("alias", "kind")
    if not axes or "|" in dims or 0 in found.shape:
        return "accepted"
    numbers = np.arange(math.prod(SIZES[axis] for axis in axes)).reshape([SIZES[axis] for axis in axes])
    shuffled = axes[::-1]
    try:
        theirs = einops.rearrange(numbers.transpose(), f"{' '.join(shuffled)} -> {words}")
    except einops.EinopsError:
        return "accepted"
    assert theirs.shape == found.shape
    for values in np.ndindex(*numbers.shape):
        at = tuple(encode(dim, dict(zip(axes, values, strict=True))) for dim in found.dims)
        assert theirs[at] == numbers[values]
    return "accepted by all"


TARGETS: dict[str, Callable[[bytes], str]] = {
    "safetensors": read_safetensors,
    "index": read_index,
    "pickle": read_pickle,
    "address": read_address,
}
