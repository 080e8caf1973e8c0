"""Sources: what a user has of a PyTorch model, as named arrays: a module, or its state dict.

A module says more: which class each layer is of. A state dict may hold torch tensors, NumPy arrays or JAX arrays.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.errors import ConfigError, InputError, Problem
from shardconv.interop.arrays import numpy_of

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
        """The tensors' shapes."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def weights_of(source: Any) -> Weights:
    """The tensors of a torch.nn.Module or of a state dict.

    Raises ConfigError where it is neither, InputError where a module has no weights (torch's meta device).

    >>> weights_of({"fc.weight": np.zeros((4, 3))}).shapes
    {'fc.weight': (4, 3)}
    """
    torch = sys.modules.get("torch")
    kinds: dict[str, tuple[str, ...]] = {}
    epsilons: dict[str, float] = {}
    if torch is not None and isinstance(source, torch.nn.Module):
        kinds = {name: _classes(torch, module) for name, module in source.named_modules()}
        epsilons = {name: module.eps for name, module in source.named_modules() if isinstance(getattr(module, "eps", None), float)}
        source = source.state_dict()
    if not isinstance(source, Mapping):
        problem = Problem(f"this is a {type(source).__name__}", "for a checkpoint's file: load it first")
        raise ConfigError("convert_module takes a torch.nn.Module or a state dict", [problem])
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
    tied = {name: tuple(other for other in names if other != name) for names in places.values() if len(names) > 1 for name in names}
    return Weights(tensors, kinds, tied, epsilons)


def _classes(torch: Any, module: Any) -> tuple[str, ...]:
    """The class of a module and what it derives from, up to torch's own."""
    names = []
    for kind in type(module).__mro__:
        if kind is torch.nn.Module:
            break
        names.append(kind.__name__)
    return tuple(names)
