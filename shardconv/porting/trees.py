"""Trees: a user's own model, opened into named arrays and put together again.

    Linen     variables as `init` gives them: names are paths without the collection, `BatchNorm_0.mean` for batch_stats/BatchNorm_0/mean
    NNX       a module, which is updated in place, or a state; random number generators, caches and intermediates are left alone
    Equinox   a module, or a pair (module, state), or any tree with modules in it; running statistics are named by their layer,
              `bn.batch_state_index.0`
    others    any tree of arrays: names are paths

The scale of Flax's `WeightNorm` is named by the array that it scales, wherever that is: `Dense_0.kernel/scale`.

Arrays may be abstract (`jax.eval_shape`, `nnx.eval_shape`, `eqx.filter_eval_shape`): all that is read of them is shape, dtype and sharding,
and the result has real ones in their place. What is no array, such as an activation function, stays.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
COLLECTIONS = {"params", "batch_stats"}


@dataclass(frozen=True)
class Leaf:
    """An array of the model: all that is known before it is filled. `path` is where it is in a checkpoint, as nested dicts have it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sharding: Any
    path: tuple[str, ...]


@dataclass(frozen=True)
class Tree:
    """A model's arrays by name, in the model's order; `rebuilt` gives the user's object with other arrays, `copied` always a new one.

    `library` is "linen", "nnx", "equinox" or "", and `classes` those of its modules by name, as far as a tree has modules. `values` are the
    arrays themselves, which may be abstract.
    """

    library: str
    leaves: Mapping[str, Leaf]
    values: Mapping[str, Any]
    classes: Mapping[str, Any]
    rebuilt: Callable[[Mapping[str, Array]], Any]
    copied: Callable[[Mapping[str, Array]], Any]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays' shapes."""
        return {name: leaf.shape for name, leaf in self.leaves.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """The arrays' dtypes."""
        return {name: leaf.dtype for name, leaf in self.leaves.items()}


def opened(model: Any) -> Tree:
    """A model's arrays by name; ValueError where two have one name.

    >>> opened({"params": {"Dense_0": {"kernel": np.zeros((3, 4))}}}).shapes
    {'Dense_0.kernel': (3, 4)}
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(model, nnx.Module | nnx.State):
        return _nnx(nnx, model)
    equinox = sys.modules.get("equinox")
    if equinox is not None and _has_modules(equinox, model):
        return _equinox(equinox, model)
    linen = isinstance(model, Mapping) and bool(COLLECTIONS & set(model))
    return _plain(model, "linen" if linen else "", _without_collection if linen else _joined)


def _plain(model: Any, library: str, name: Callable[[Any], str]) -> Tree:
    paths, structure = jax.tree_util.tree_flatten_with_path(model)
    names = _scales_named([name(path) if _is_array(leaf) else None for path, leaf in paths])
    split = library == "equinox"  # whose states have no names in the tree
    where = [tuple((name or "").split(".")) if split else _keys(_unboxed(path)) for name, (path, _) in zip(names, paths, strict=True)]
    leaves = _named((name, at, leaf) for name, at, (_, leaf) in zip(names, where, paths, strict=True) if name is not None)

    def rebuilt(arrays: Mapping[str, Array]) -> Any:
        values = [
            leaf if name is None else placed(arrays[name], leaves[name]) for name, (_, leaf) in zip(names, paths, strict=True)
        ]
        return jax.tree_util.tree_unflatten(structure, values)

    values = {name: leaf for name, (_, leaf) in zip(names, paths, strict=True) if name is not None}
    return Tree(library, leaves, values, {}, rebuilt, rebuilt)


def _equinox(equinox: ModuleType, model: Any) -> Tree:
    """Modules by attribute; a state's arrays are named by the module whose index they have."""
    index_of = {}
    classes = {}

    def look(path: Any, node: Any) -> None:
        if isinstance(node, equinox.nn.StateIndex):
            index_of[node.marker] = path
        elif isinstance(node, equinox.Module):
            classes[_joined(path)] = node

    first = model[0] if isinstance(model, tuple) and len(model) == 2 and isinstance(model[1], equinox.nn.State) else None
    _walk(equinox, (), model if first is None else first, look)
    states: dict[int, Any] = {}
    if first is not None:
        states = {place: index_of.get(marker, ()) for place, marker in enumerate(model[1].tree_flatten()[1])}

    def name(path: Any) -> str:
        if first is None:
            return _joined(path)
        if path[0].idx == 0:
            return _joined(path[1:])
        return _joined((*states[path[1].key], *path[2:]))

    tree = _plain(model, "equinox", name)
    return Tree("equinox", tree.leaves, tree.values, classes, tree.rebuilt, tree.copied)


def _walk(equinox: ModuleType, path: tuple[Any, ...], node: Any, look: Callable[[Any, Any], None]) -> None:
    """Calls `look` for every module of a tree, with its path."""
    look(path, node)
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda inner: inner is not node)[0]
    for inner, child in children:
        if inner and not isinstance(node, equinox.nn.StateIndex):
            _walk(equinox, (*path, *inner), child, look)


def _nnx(nnx: ModuleType, model: Any) -> Tree:
    _give_scales(nnx, model)
    state = nnx.state(model) if isinstance(model, nnx.Module) else model
    kept = (nnx.RngState, nnx.Cache, nnx.Intermediate)
    flat = [(path, variable) for path, variable in nnx.to_flat_state(state) if not isinstance(variable, kept)]
    leaves = _named((_dotted(path), tuple(map(str, path)), _value(variable)) for path, variable in flat)
    classes = {}
    if isinstance(model, nnx.Module):
        classes = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}

    def filled(arrays: Mapping[str, Array]) -> Any:
        found = {}
        for path, variable in flat:
            name = _dotted(path)
            array = placed(arrays[name], leaves[name])
            found[path] = variable.replace(array) if isinstance(variable, nnx.Variable) else array
        return found

    def copied(arrays: Mapping[str, Array]) -> Any:
        whole = nnx.from_flat_state({**dict(nnx.to_flat_state(state)), **filled(arrays)})
        return nnx.merge(nnx.graphdef(model), whole) if isinstance(model, nnx.Module) else whole

    def updated(arrays: Mapping[str, Array]) -> Any:
        nnx.update(model, nnx.from_flat_state(filled(arrays)))
        return model

    values = {_dotted(path): _value(variable) for path, variable in flat}
    return Tree("nnx", leaves, values, classes, updated if isinstance(model, nnx.Module) else copied, copied)


def _give_scales(nnx: ModuleType, model: Any) -> None:
    """Zeros for the scales of an abstract model's `WeightNorm`s: `nnx.eval_shape` leaves them as what nnx takes for no arrays."""
    for _, module in nnx.iter_modules(model) if isinstance(model, nnx.Module) else ():
        if isinstance(module, nnx.WeightNorm) and any(isinstance(scale, jax.ShapeDtypeStruct) for scale in (module.scales or {}).values()):
            module.scales = nnx.data({path: jax.numpy.zeros(scale.shape, scale.dtype) for path, scale in module.scales.items()})


def _dotted(path: Sequence[Any]) -> str:
    """The name of an array of NNX; the key of a scale is the path of what it scales, in the layer beside it."""
    if path and isinstance(path[-1], tuple):
        path = (*path[:-2], "layer_instance", *path[-1][:-1], f"{path[-1][-1]}/scale")
    return ".".join(map(str, path))


def _scales_named(names: Sequence[str | None]) -> list[str | None]:
    """Names of Linen's arrays; the key of a scale is a path from the `WeightNorm` that has it, or from the module that this is in."""
    found = []
    for name in names:
        module, _, path = (name or "").rpartition(".")
        if name and path.count("/") > 1 and path.endswith("/scale"):
            inside = path.removesuffix("/scale").replace("/", ".")
            places = [f"{place}.{inside}".removeprefix(".") for place in (module, module.rpartition(".")[0])]
            name = next((f"{place}/scale" for place in places if place in names), name)
        found.append(name)
    return found


def placed(array: Array, leaf: Leaf) -> Any:
    """An array as JAX has it, where the model had its own."""
    return jax.numpy.asarray(array) if leaf.sharding is None else jax.device_put(array, leaf.sharding)


def _value(variable: Any) -> Any:
    return variable.get_value() if hasattr(variable, "get_value") else variable


def _named(leaves: Iterable[tuple[str, tuple[str, ...], Any]]) -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}
    for name, path, leaf in leaves:
        if name in found:
            raise ValueError(f"two arrays of the model are called {name}")
        sharding = getattr(leaf, "sharding", None)
        several = sharding is not None and len(getattr(sharding, "device_set", ())) > 1
        found[name] = Leaf(tuple(leaf.shape), np.dtype(leaf.dtype), sharding if several else None, path)
    return found


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _has_modules(equinox: ModuleType, model: Any) -> bool:
    found = jax.tree_util.tree_leaves(model, is_leaf=lambda node: isinstance(node, equinox.Module | equinox.nn.State))
    return any(isinstance(node, equinox.Module | equinox.nn.State) for node in found)


def _without_collection(path: Any) -> str:
    return _joined(_unboxed(path[1:]))


def _unboxed(path: Any) -> Any:
    """A path without the box of nn.with_partitioning, whose attribute the array is."""
    boxed = len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and isinstance(path[-2], jax.tree_util.DictKey)
    return path[:-1] if boxed else path


def _keys(path: Any) -> tuple[str, ...]:
    """The keys of a path as text."""
    return tuple(next(str(getattr(key, kind)) for kind in ("key", "name", "idx") if hasattr(key, kind)) for key in path)


def _joined(path: Iterable[Any]) -> str:
    """A path of JAX's keys as a dotted name; a state that is still inside its model is named as one beside it."""
    parts = _keys(path)
    found = []
    for place, part in enumerate(parts):
        if not (part == "init" and place and parts[place - 1].endswith(("_index", "batch_counter"))):
            found.append(part)
    return ".".join(found)
