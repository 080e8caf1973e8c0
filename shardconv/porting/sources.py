"""Sources: what a user has of a PyTorch model, as named arrays: a module, its state dict, or files.

A module says more: which class each layer is of, and what its epsilon is. A state dict may hold torch tensors, NumPy arrays or JAX arrays.
Files are those that a conversion reads, safetensors and PyTorch's own, and are read as it reads them: without torch, running nothing.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.errors import ConfigError, InputError, Problem
from shardconv.formats.reading import Reader
from shardconv.interop.arrays import numpy_of
from shardconv.source import Source, open_source

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Weights:
    """Tensors by name. `kinds` are the classes of modules, each with those it derives from; `tied` has the names of tensors that are the
    same memory as others, with these; `epsilons` are those of modules, which are in no tensor."""

    tensors: Mapping[str, Array]
    kinds: Mapping[str, tuple[str, ...]]
    tied: Mapping[str, tuple[str, ...]]
    epsilons: Mapping[str, float]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes, for which no tensor is read."""
        stored = self.tensors.stored if isinstance(self.tensors, Files) else self.tensors
        return {name: tuple(tensor.shape) for name, tensor in stored.items()}


class Files(Mapping[str, Array]):
    """The tensors of a checkpoint's files, each of which is read whenever it is asked for."""

    def __init__(self, source: Source) -> None:
        self.stored = source.tensors
        self._root = source.root

    def __getitem__(self, name: str) -> Array:
        with Reader(self._root, coalesce_gap=0) as reader:
            return reader.whole(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def weights_of(source: Any) -> Weights:
    """The tensors of a torch.nn.Module, of a state dict, or of the files at a path.

    Raises ConfigError where it is none of these, InputError where files cannot be read or a module has no weights (torch's meta device).

    >>> weights_of({"fc.weight": np.zeros((4, 3))}).shapes
    {'fc.weight': (4, 3)}
    """
    if isinstance(source, str | os.PathLike):
        return weights_in(open_source(source))
    torch = sys.modules.get("torch")
    kinds: dict[str, tuple[str, ...]] = {}
    epsilons: dict[str, float] = {}
    if torch is not None and isinstance(source, torch.nn.Module):
        kinds = {name: _classes(torch, module) for name, module in source.named_modules()}
        epsilons = {name: eps for name, module in source.named_modules() if (eps := _epsilon(torch, module)) is not None}
        source = source.state_dict()
    if not isinstance(source, Mapping):
        problem = Problem(f"this is {type(source).__name__}", "give one of these")
        raise ConfigError("convert_module takes a torch.nn.Module, a state dict or a path", [problem])
    tensors: dict[str, Array] = {}
    places: dict[object, list[str]] = {}
    empty = []
    for name, value in source.items():
        is_tensor = torch is not None and isinstance(value, torch.Tensor)
        if is_tensor and value.device.type == "meta":
            empty.append(Problem(f"{name} is on the meta device"))
        elif is_tensor or hasattr(value, "__array__"):
            tensors[name] = array = numpy_of(value) if is_tensor else np.asarray(value)
            place = (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype) if array.size else name
            places.setdefault(place, []).append(name)
    if empty:
        raise InputError("the module has no weights", [*empty[:5], Problem(f"{len(empty)} in all", "load the checkpoint into it first")])
    return Weights(tensors, kinds, _tied(places.values()), epsilons)


def weights_in(source: Source) -> Weights:
    """All tensors of a checkpoint's files; of its modules nothing is known."""
    places: dict[object, list[str]] = {}
    for name, tensor in source.tensors.items():
        places.setdefault((tensor.file, tensor.offset, tensor.nbytes) if tensor.nbytes else name, []).append(name)
    return Weights(Files(source), {}, _tied(places.values()), {})


def _tied(places: Iterable[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The names that share a place, each with the others."""
    return {name: tuple(other for other in names if other != name) for names in places if len(names) > 1 for name in names}


def _epsilon(torch: Any, module: Any) -> float | None:
    """A module's epsilon; of an RMSNorm that has none of its own, that of its dtype, which torch takes then."""
    found = getattr(module, "eps", None)
    if found is None and isinstance(module, torch.nn.RMSNorm) and module.weight is not None:
        found = torch.finfo(module.weight.dtype).eps
    return found if isinstance(found, float) else None


def _classes(torch: Any, module: Any) -> tuple[str, ...]:
    """The class of a module and what it derives from, up to torch's own."""
    names = []
    for kind in type(module).__mro__:
        if kind is torch.nn.Module:
            break
        names.append(kind.__name__)
    return tuple(names)
