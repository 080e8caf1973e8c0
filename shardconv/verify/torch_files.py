"""PyTorch files as the check reads them: by Python's own zip reader and unpickler, where the converter has readers of its own.

The unpickler is given nothing but empty shells: whatever name the pickle asks for is looked up in one short table, and what is not there
ends the reading. A shell takes its arguments and keeps or drops them, and has no attributes that a pickle could set. So the pickle cannot
call anything, and comes out as nested tuples. It is looked through beforehand for instructions that would take memory for nothing.
"""

import io
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NoReturn, TypeVar

from shardconv.errors import InputError, Problem

# The last part of PyTorch's names, in safetensors' codes.
CODES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128", "UntypedStorage": "?",
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "complex128": "C128",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0", "float4_e2m1fn_x2": "F4",
}  # fmt: skip
# Bytes of an element by code.
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "C128": 16, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}

# What torch.compile, FSDP and activation checkpointing put into names.
WRAPPED = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)")

# What pickles of dicts, lists, numbers and tensors are written in.
INSTRUCTIONS = frozenset(
    """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8
    SHORT_BINSTRING BINSTRING SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS LIST EMPTY_DICT SETITEM SETITEMS DICT
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID REDUCE
    BUILD""".split()
)

# What a damaged archive or pickle may end in.
_DAMAGES = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError)

Place = tuple[str, tuple[int, ...], int]
T = TypeVar("T")


class _Tensor(tuple[Any, ...]):
    """What a tensor was rebuilt from: storage, offset, size, stride, and for version 3 the dtype."""

    __slots__ = ()


class _Kind(str):
    """A dtype, by its code."""

    __slots__ = ()


class _Shell(str):
    """What stands for a function of PyTorch: a word for what it gives."""

    __slots__ = ()

    def __call__(self, *args: Any) -> Any:
        return _Tensor(args) if self == "tensor" else args[0] if self == "first" else None


def places(path: str, prefix: str) -> Iterator[tuple[str, Place]]:
    """Each tensor's name, its dtype as a code, its shape and the byte of the file at which it begins.

    Raises InputError where the file cannot be read or has something other than row-major tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            (top,) = (name[: -len("data.pkl")] for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name))
            members = {info.filename: info for info in archive.infolist()}
            state = bare(_load(_bytes(file, members[top + "data.pkl"])), prefix, _Tensor)
            for name, tensor in state.items():
                kind, key, _ = tensor[0]
                code = str(tensor[6] if len(tensor) > 6 and isinstance(tensor[6], _Kind) else kind)
                begin = _begin(file, members[f"{top}data/{key}"])
                if not _is_plain(tensor[2], tensor[3]):
                    _fail(path, f"{name} is not stored row after row")
                shape = tensor[2] if code != "F4" else (*tensor[2][:-1], 2 * tensor[2][-1])  # two to a byte, and bytes are what is counted
                yield name, (code, shape, begin + tensor[1] * WIDTHS.get(code, 1))
    except (*_DAMAGES, OSError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error) as error:
        _fail(path, f"{type(error).__name__}: {error}")


def _fail(path: str, fact: str) -> NoReturn:
    raise InputError("the source cannot be compared", [Problem(f"{path}: {fact}", "run with --check none")]) from None


def _begin(file: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, whose two variable parts have their lengths at its end."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + int(name) + int(extra)


def _bytes(file: io.BufferedReader, info: zipfile.ZipInfo) -> bytes:
    file.seek(_begin(file, info))
    return file.read(info.file_size)


def _is_plain(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    sizes = [(n, step) for n, step in zip(shape, stride, strict=True) if n > 1]
    return all(step == after * n for (_, step), (n, after) in pairwise(sizes)) and all(step == 1 for _, step in sizes[-1:])


class _Shells(pickle.Unpickler):
    """An unpickler that imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in SHELLS:
            return SHELLS[f"{module}.{name}"]
        if module in ("torch", "torch.storage") and name in CODES:
            return _Kind(CODES[name])
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, length = pid
        return kind, key, length


SHELLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _Shell("tensor"),
    "torch._utils._rebuild_tensor_v3": _Shell("tensor"),
    "torch._utils._rebuild_parameter": _Shell("first"),
    "torch._utils._rebuild_parameter_with_state": _Shell("first"),
    **dict.fromkeys(("torch.Size", "torch.device", "_codecs.encode"), _Shell("nothing")),
    **dict.fromkeys(("builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset"), _Shell("nothing")),
}


def _load(raw: bytes) -> Any:
    kept = 0
    for instruction, value, _ in pickletools.genops(raw):
        if instruction.name not in INSTRUCTIONS:
            raise pickle.UnpicklingError(f"it has the instruction {instruction.name}")
        if instruction.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            if value is not None and value > kept:  # the unpickler makes room for all the numbers below it
                raise pickle.UnpicklingError(f"it keeps value {value} after {kept}")
            kept += 1
    return _Shells(io.BytesIO(raw)).load()


def bare(found: Any, prefix: str, kind: type[T]) -> dict[str, T]:
    """The tensors, values of a `kind`, in what a file holds, by the names that the bare model has."""
    if prefix:
        found = _down(found, prefix, kind)
    elif not _tensors(found, kind):
        inner = [child for child in found.values() if isinstance(child, dict)]
        inner = [level for child in inner for level in ([child] if _tensors(child, kind) else child.values()) if isinstance(level, dict)]
        (found,) = (child for child in inner if _tensors(child, kind))
    names = {WRAPPED.sub("", name): tensor for name, tensor in _tensors(found, kind).items()}
    cut = len("module.") if all(name.startswith("module.") for name in names) else 0
    return {name[cut:]: tensor for name, tensor in names.items()}


def _down(found: Any, prefix: str, kind: type) -> Any:
    for key, child in found.items():
        if key == prefix and _tensors(child, kind):
            return child
        if isinstance(key, str) and isinstance(child, dict) and prefix.startswith(f"{key}."):
            return _down(child, prefix[len(key) + 1 :], kind)
    raise KeyError(prefix)


def _tensors(found: Any, kind: type[T]) -> dict[str, T]:
    return {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, kind)}
