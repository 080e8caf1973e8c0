"""What the pickles of state dicts are made of: storages, tensors that are views of them, and the names that such a pickle may ask for.

Of each name there is what a call of it gives here: a plain value, made by a function of this module out of plain values.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardconv.formats.strict_json import AGAIN

UNTRUSTED = "if you trust its author, load it with PyTorch and save the state dict alone, as plain tensors: torch.save(state_dict, PATH)"
# More dims than PyTorch's own limit of 64 are no tensor.
_DIMS = 64

# PyTorch's storages and dtypes, and the codes of them that `shardconv.dtypes` has; "" for those that no code is there for.
STORAGES: Mapping[str, str] = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "",
}  # fmt: skip
DTYPES: Mapping[str, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
    "complex128": "", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0", "float4_e2m1fn_x2": "F4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Named:
    """A name that the pickle asks for and may have; `make` is what a call of it gives here, None for what is not called."""

    name: str
    code: str | None = None
    make: Callable[[tuple[object, ...]], object] | None = None


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that no state dict is made of: a device, a set, bytes."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements: the archive's member that has it, and its length in elements, or in bytes where it has no dtype."""

    kind: Named
    key: str
    length: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A view of a storage; offset and strides are in elements of `dtype`, `flags` are pending operations such as "conj"."""

    storage: Storage
    dtype: Named
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    flags: tuple[str, ...]


OPAQUE = Opaque()


class Wrong(Exception):
    """What the pickle gets wrong, in words, and what to do."""

    def __init__(self, what: str, remedy: str = AGAIN) -> None:
        self.remedy = remedy
        super().__init__(what)


# What a call of an allowed name gives. Each takes the tuple of arguments, which are values of the machine.


def _size_of(value: object) -> tuple[int, ...]:
    """A tuple of integers, as sizes and strides are."""
    if type(value) is not tuple or len(value) > _DIMS or any(type(n) is not int for n in value):
        raise Wrong("a size or stride that is no tuple of integers")
    return value


def _tensor(args: tuple[object, ...], dtype: object, metadata: object) -> PickledTensor:
    storage, offset = args[0], args[1]
    if type(storage) is not Storage or type(offset) is not int or type(dtype) is not Named or dtype.code is None:
        raise Wrong("a tensor that is not made of a storage, an offset and a dtype")
    shape, stride = _size_of(args[2]), _size_of(args[3])
    if len(shape) != len(stride) or offset < 0 or min((*shape, *stride), default=0) < 0:
        raise Wrong("a tensor with a negative size, or with more sizes than strides")
    flags = tuple(name for name in ("conj", "neg") if metadata.get(name)) if type(metadata) is dict else ()
    return PickledTensor(storage, dtype, offset, shape, stride, flags)


def _rebuild_tensor_v2(args: tuple[object, ...]) -> object:
    """(storage, offset, size, stride, requires_grad, hooks[, metadata])"""
    storage = args[0]
    if type(storage) is not Storage or storage.kind.name == _UNTYPED:
        raise Wrong("a tensor whose storage has no dtype")
    return _tensor(args, storage.kind, args[6] if len(args) > 6 else None)


def _rebuild_tensor_v3(args: tuple[object, ...]) -> object:
    """(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])"""
    return _tensor(args, args[6], args[7] if len(args) > 7 else None)


def _rebuild_parameter(args: tuple[object, ...]) -> object:
    """(tensor, requires_grad, hooks[, attributes])"""
    if type(args[0]) is not PickledTensor:
        raise Wrong("a parameter that is no tensor")
    return args[0]


def _ordered_dict(args: tuple[object, ...]) -> object:
    if args:
        raise Wrong("an OrderedDict that is made of something")
    return {}


def _opaque(_: tuple[object, ...]) -> object:
    return OPAQUE


_UNTYPED = "torch.storage.UntypedStorage"
_CALLED: Mapping[str, Callable[[tuple[object, ...]], object]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _opaque,
    "torch.device": _opaque,
    "_codecs.encode": _opaque,  # bytes, in protocol 2
    "__builtin__.set": _opaque,
    "builtins.set": _opaque,
    "__builtin__.frozenset": _opaque,
    "builtins.frozenset": _opaque,
}
ALLOWED: Mapping[str, Named] = {
    **{name: Named(name, None, make) for name, make in _CALLED.items()},
    **{f"torch.{name}": Named(name, code) for names in (STORAGES, DTYPES) for name, code in names.items()},
    _UNTYPED: Named(_UNTYPED, ""),
}
