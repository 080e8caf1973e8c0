"""A user's tree against what is loaded: names, shapes, dtypes and shardings, with all that does not fit in one report.

`like` is a tree of shardings, or of arrays or `jax.ShapeDtypeStruct`s, such as `jax.eval_shape` makes of a model's initialiser. What it
does not say, be it a dtype or a sharding, is not compared, or comes from the rules. Names are the keys of the tree, joined by dots.

An array that no one has put on devices, such as `jnp.zeros` or an initialiser makes, lies on one because it must lie somewhere. It says
nothing of how it is to be split; were it asked, all of a model would go to the first device.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding

from shardconv.errors import ConfigError, Problem

# Problems of one kind that are listed one by one.
LISTED = 10

Abstract = Mapping[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Wanted:
    """What a tree says of its leaves, by name, and how to make such a tree of others."""

    leaves: Mapping[str, Any]
    structure: Any

    def fill(self, arrays: Mapping[str, Any]) -> Any:
        """The tree with arrays of these names."""
        return jax.tree_util.tree_unflatten(self.structure, [arrays[name] for name in self.leaves])


def wanted(like: Any) -> Wanted:
    """What a user's tree says; raises ConfigError where a leaf of it says nothing of an array."""
    leaves, structure = named(like)
    odd = [name for name, leaf in leaves.items() if not isinstance(leaf, Sharding) and not hasattr(leaf, "shape")]
    if odd:
        raise ConfigError(
            "like is no tree of arrays",
            [
                Problem(f"{name} is {type(leaves[name]).__name__}", "give a sharding, an array or a jax.ShapeDtypeStruct")
                for name in odd[:LISTED]
            ],
        )
    return Wanted(leaves, structure)


def named(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a tree by dotted name, and its structure.

    >>> named({"a": [1, {"b": 2}]})[0]
    {'a.0': 1, 'a.1.b': 2}
    """
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(map(_key, path)): leaf for path, leaf in found}, structure


def _key(step: Any) -> str:
    """One step of a path: the key of a dict, the name of a field, the number in a list."""
    return str(next(getattr(step, name) for name in ("key", "name", "idx") if hasattr(step, name)))


def fitted(leaves: Abstract, like: Wanted | None, what: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves with the shardings that they are loaded with: those of `like`, else their own.

    Raises ConfigError with all that does not fit: names that only one side has, other shapes, other dtypes, shards that are not equal;
    `what` says what is loaded.
    """
    problems = [] if like is None else [*_names(leaves, like, what), *_kinds(leaves, like, what)]
    said = {} if like is None else {name: _sharding(leaf) for name, leaf in like.leaves.items() if _committed(leaf)}
    shardings = {name: said.get(name) or leaf.sharding for name, leaf in leaves.items()}
    problems += _grouped([problem for name, leaf in leaves.items() for problem in _shards(name, leaf.shape, shardings[name])])
    if problems:
        raise ConfigError("the arrays do not fit", problems)
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name]) for name, leaf in leaves.items()}


def _names(leaves: Abstract, like: Wanted, what: str) -> Iterator[Problem]:
    missing = [name for name in like.leaves if name not in leaves]
    unexpected = [name for name in leaves if name not in like.leaves]
    if missing and (prefix := _prefix(leaves, like)):
        steps = prefix.rstrip(".").split(".")
        wrapped = "".join(f'{{"{step}": ' for step in steps) + "like" + "}" * len(steps)
        yield Problem(f"all names of {what} begin with {prefix} and those of like do not", f"give {wrapped}")
        return
    yield from _grouped([Problem(f"{name} is in like and not in {what}", _closest(name, unexpected)) for name in missing])
    yield from _grouped([Problem(f"{name} is in {what} and not in like", "") for name in unexpected])


def _prefix(leaves: Abstract, like: Wanted) -> str:
    """What stands before every name of what is loaded and would make the names of `like` the same; "" for nothing."""
    name = next(iter(like.leaves), "")
    starts = {found[: len(found) - len(name)] for found in leaves if found.endswith("." + name)}
    return next((start for start in starts if {start + one for one in like.leaves} == set(leaves)), "")


def _closest(name: str, names: list[str]) -> str:
    close = get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else ""


def _kinds(leaves: Abstract, like: Wanted, what: str) -> Iterator[Problem]:
    both = {name: (leaf, leaves[name]) for name, leaf in like.leaves.items() if name in leaves and hasattr(leaf, "shape")}
    shapes = [
        Problem(f"{name} is {tuple(mine.shape)} in like and {theirs.shape} in {what}")
        for name, (mine, theirs) in both.items()
        if tuple(mine.shape) != theirs.shape
    ]
    dtypes = [
        Problem(f"{name} is {mine.dtype} in like and {theirs.dtype} in {what}", f'give dtype="{mine.dtype}" to have values converted')
        for name, (mine, theirs) in both.items()
        if getattr(mine, "dtype", theirs.dtype) != theirs.dtype
    ]
    yield from _grouped(shapes)
    yield from _grouped(dtypes)


def _sharding(said: Any) -> Sharding | None:
    """The sharding that a leaf of a user's tree is or has."""
    found = said if isinstance(said, Sharding) else getattr(said, "sharding", None)
    return found if isinstance(found, Sharding) else None


def _committed(said: Any) -> bool:
    """Whether a leaf of a user's tree, if it is an array, was put where it is on purpose.

    JAX's documentation calls this `jax.Array.committed`; where that is not there yet, it is `_committed`, which JAX keeps to itself.
    """
    return not isinstance(said, jax.Array) or bool(getattr(said, "committed", getattr(said, "_committed", True)))


def _shards(name: str, shape: tuple[int, ...], sharding: Sharding | None) -> Iterator[Problem]:
    """What is wrong with the sharding of an array of this shape."""
    if sharding is None:
        yield Problem(f"nothing says how {name} is split", "give a mesh and rules, or a sharding in like")
        return
    if isinstance(sharding, NamedSharding) and not isinstance(sharding.mesh, Mesh):
        fact = f"the sharding of {name} is of {type(sharding.mesh).__name__}, which has no devices"
        yield Problem(fact, "give one of a jax.sharding.Mesh")
        return
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
        yield Problem(f"{name} has {len(shape)} dims, and its PartitionSpec {len(sharding.spec)}: {tuple(sharding.spec)}")
        return
    try:
        sharding.shard_shape(shape)
    except ValueError:
        said = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else sharding
        yield Problem(f"{name} is {shape}, which {said} does not divide", "choose another sharding")


def _grouped(problems: list[Problem]) -> list[Problem]:
    """As many as can be read, and how many more of the kind there are."""
    if len(problems) <= LISTED + 1:
        return problems
    return [*problems[:LISTED], Problem(f"and {len(problems) - LISTED} more like these")]
