"""Reading safetensors headers: every tensor's dtype, shape and byte range, and nothing of its data.

A file is a little-endian u64 `n`, `n` bytes of JSON, and data. The JSON maps each name to {dtype, shape, data_offsets:
[begin, end)}, offsets counted from the data's first byte; `__metadata__` maps strings to strings. The ranges cover the
data exactly: no holes, no overlaps, nothing before, between or behind. Order, alignment, the padding of the header and
unknown fields are free.

This is a reader of its own since the library's cannot give fp8 to NumPy, names no file and no numbers in its errors,
and stops at the first. It rejects what safetensors 0.8.0 rejects, and what that lets pass and nobody can use: a key
that stands twice, a tensor without a name or with one that no terminal can be given, half a surrogate pair, a shape
that overflows next to a zero or has over 64 dims. One `stat`
against the last byte that the header declares finds every partial download before any work.

Names that safetensors' `save_model` left out, since two parameters share their memory, stand in `__metadata__` as
{"left out": "kept"}; they come back as aliases.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any, BinaryIO

from shardconv.dtypes import DTYPES, DType
from shardconv.errors import InputError, Problem
from shardconv.formats import FileHeader, SourceFile, StoredTensor
from shardconv.formats.strict_json import AGAIN, few, read_object, unprintable

METADATA = "__metadata__"
# The bound that the format's own library sets, so that a damaged length cannot make a reader allocate. 92k tensors take
# 12 MB.
HEADER_LIMIT = 100_000_000
# Sizes and offsets are 64-bit where they are used, and NumPy's are signed.
SIZE_LIMIT = 2**63
# A header has room for a shape of millions of sizes, and their product would take hours.
DIMS = 64
# What a clone without large files leaves in their place, a few lines of text.
LFS_POINTER = b"version https://git-lfs"

_REWRITE = "write this file again with the safetensors library"
_FIELDS = ("dtype", "shape", "data_offsets")
_CODES: dict[str, DType] = {d.code: d for d in DTYPES}


def read_header(root: str, name: str) -> FileHeader:
    """Read and check the header of `root/name`; InputError with every problem of this file."""
    try:
        with open(os.path.join(root, name), "rb") as file:
            stat = os.fstat(file.fileno())
            raw = _header_bytes(name, stat.st_size, file)
    except OSError as error:
        remedy = AGAIN if isinstance(error, FileNotFoundError) else "check that it is a file that you may read"
        raise _damaged(name, [Problem(f"{name} cannot be read: {error.strerror}", remedy)]) from error
    digest = hashlib.blake2b(raw, digest_size=16).hexdigest()
    tensors, aliases = parse_header(name, stat.st_size, raw)
    return FileHeader(SourceFile(name, stat.st_size, stat.st_mtime_ns, digest), tensors, aliases)


def _header_bytes(name: str, size: int, file: BinaryIO) -> bytes:
    """The first 8 + n bytes of a file of `size` bytes."""
    head = file.read(8)
    if len(head) < 8:
        raise _damaged(name, [_truncated(name, "its header's length ends at byte", 8, size)])
    count = int.from_bytes(head, "little")
    if count > HEADER_LIMIT:
        if LFS_POINTER.startswith(head):
            raise _damaged(name, [Problem(f"{name} is a Git LFS pointer, not the weights", "fetch them: git lfs pull")])
        fact = f"{name} is not a safetensors file: its header would have {count} bytes, over {HEADER_LIMIT}"
        raise _damaged(name, [Problem(fact, AGAIN)])
    if 8 + count > size:
        raise _damaged(name, [_truncated(name, "its header ends at byte", 8 + count, size)])
    return head + file.read(count)


def parse_header(name: str, size: int, raw: bytes) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and aliases of the file `name` of `size` bytes, out of its first 8 + n bytes; pure.

    Raises InputError with every problem found.
    """
    header = read_object(raw[8:], what=f"{name}: its header", at=8, natural=True)
    metadata = header.pop(METADATA, None)
    problems = list(_metadata_problems(name, metadata))
    tensors: dict[str, StoredTensor] = {}
    for key, info in header.items():
        found = _stored(name, len(raw), key, info)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            tensors[key] = found
    # ranges can only be judged when all of them are known
    problems = problems or list(_range_problems(name, size, len(raw), tensors.values()))
    if problems:
        raise _damaged(name, problems)
    aliases = {k: v for k, v in (metadata or {}).items() if v in tensors and k not in tensors}
    return tensors, aliases


def _stored(file: str, start: int, name: str, info: Any) -> StoredTensor | Problem:
    """The tensor that a header entry describes, in a file whose data begins at byte `start`; or what is wrong."""
    who = f"{file}: tensor {name}"
    if not name or not name.isprintable():
        return Problem(f"{file}: {unprintable(name)}", _REWRITE)
    if not isinstance(info, dict):
        return Problem(f"{who} is {_shown(info)} in the header, not an object", AGAIN)
    missing = [field for field in _FIELDS if field not in info]
    if missing:
        return Problem(f"{who} has no {', no '.join(missing)} in the header", AGAIN)
    code, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    dtype = _CODES.get(code) if isinstance(code, str) else None
    if dtype is None:
        return _unknown_dtype(who, code)
    if not _sizes(shape):
        return Problem(f"{who} has shape {_shown(shape)}; a shape is a list of integers from 0 up", AGAIN)
    if not _sizes(offsets) or len(offsets) != 2:
        return Problem(f"{who} has data_offsets {_shown(offsets)}; they are two integers from 0 up", AGAIN)
    if len(shape) > DIMS:
        return Problem(f"{who} has {len(shape)} dims; NumPy has at most {DIMS}", _REWRITE)
    begin, end = offsets
    if end < begin:
        return Problem(f"{who} has data_offsets {offsets}, which end before they begin", AGAIN)
    bits = math.prod(shape) * dtype.bits
    if bits >= SIZE_LIMIT or (bits == 0 and math.prod(filter(None, shape)) * dtype.bits >= SIZE_LIMIT):
        return Problem(f"{who} has shape {shape}, and {code} of this shape overflows 64 bits", AGAIN)
    if bits % 8:
        return Problem(f"{who} is {code} {shape}, {bits} bits, which is not a whole number of bytes", _REWRITE)
    if bits // 8 != end - begin:
        fact = f"{who} is {code} {shape}, {bits // 8} bytes, but its data_offsets {offsets} hold {end - begin}"
        return Problem(fact, AGAIN)
    return StoredTensor(name, file, code, tuple(shape), start + begin, end - begin)


def _unknown_dtype(who: str, code: Any) -> Problem:
    if isinstance(code, str) and code.upper() in _CODES:
        return Problem(f"{who} has dtype {code}; safetensors spells it {code.upper()}", _REWRITE)
    known = f"the dtypes of safetensors are {' '.join(_CODES)}"
    return Problem(f"{who} has dtype {_shown(code)}, which is unknown", known)


def _sizes(value: Any) -> bool:
    """Whether a parsed value is a list of integers from 0 up (JSON's true and 2.0 are none)."""
    if not isinstance(value, list):
        return False
    for n in value:  # noqa: SIM110 - a generator here costs 0.1 s over 92k tensors
        if type(n) is not int or n < 0:
            return False
    return True


def _range_problems(file: str, size: int, start: int, tensors: Iterable[StoredTensor]) -> Iterator[Problem]:
    """Where the tensors' ranges do not cover bytes `start` to `size` of the file exactly once."""
    end, last = start, None
    for tensor in sorted(tensors, key=attrgetter("offset", "nbytes")):
        begin = tensor.offset
        if begin > end:
            yield Problem(f"{file}: bytes {end} to {begin}, before tensor {tensor.name}, belong to no tensor", _REWRITE)
        elif last is not None and begin < end:
            if (begin, tensor.nbytes) == (last.offset, last.nbytes):
                fact = f"{file}: tensors {last.name} and {tensor.name} share bytes {begin} to {end}"
            else:
                inside = f"inside {last.name} (bytes {last.offset} to {end})"
                fact = f"{file}: tensor {tensor.name} begins at byte {begin}, {inside}"
            yield Problem(fact, _REWRITE)
        if begin + tensor.nbytes >= end:
            end, last = begin + tensor.nbytes, tensor
    if size < end:
        yield _truncated(file, "its header declares data through byte", end, size)
    if size > end:
        declared = f"its header declares data through byte {end}"
        yield Problem(f"{file} is too long: {declared}, but the file has {size} ({size - end} more)", AGAIN)


def _metadata_problems(file: str, metadata: Any) -> Iterator[Problem]:
    """What is wrong with the value of `__metadata__`; null and absent are fine."""
    if metadata is not None and not isinstance(metadata, dict):
        yield Problem(f"{file}: {METADATA} is {_shown(metadata)}, not an object", _REWRITE)
    elif metadata:
        for key, value in metadata.items():
            if not isinstance(value, str):
                yield Problem(f"{file}: {METADATA} has {_shown(value)} for {key}; its values are strings", _REWRITE)


def _shown(value: Any) -> str:
    """A parsed value as JSON, cut to what a message can carry."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _truncated(file: str, what: str, end: int, size: int) -> Problem:
    return Problem(f"{file} is truncated: {what} {end}, but the file has {size} ({end - size} short)", AGAIN)


def _damaged(file: str, problems: list[Problem]) -> InputError:
    return InputError(f"{file} cannot be read", few(file, problems))
