"""Orbax checkpoints onto a mesh of any shape, by plain Orbax calls: each process reads what its own devices need.

Any checkpoint of a pytree will do, ours or another's. How its arrays are split is said by who loads it; where nothing is said, by the
PartitionSpecs that the checkpoint carries, ours in its metadata, others in the shardings that they were saved with. Those are taken by the
names of mesh axes, for the mesh may have other sizes; a name that the mesh has not splits nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardconv.axes import Address, Digit
from shardconv.errors import ConfigError, InputError, Problem
from shardconv.families import families
from shardconv.mesh.abstract import named
from shardconv.sharding import MeshRules, partition
from shardconv.verify.stored import reason

GIB = 1 << 30

# What layouts split an axis into; a rule for the axis is one for these too.
FINER = {"head_dim": "half pair", "layers": "blocks kind"}


@dataclass(frozen=True)
class Described:
    """What a checkpoint says of itself: its tree, its arrays by dotted name, the PartitionSpecs it carries, and its metadata."""

    path: str
    tree: Any
    kinds: Mapping[str, Any]
    specs: Mapping[str, tuple[Any, ...]]
    metadata: Mapping[str, Any]

    def known(self, mesh: Mesh | None) -> bool:
        """Whether it says for this mesh how arrays are split: by one of its axes, or there is nothing to split."""
        if mesh is None or mesh.size == 1:
            return mesh is not None
        return any(any(_entries(spec, mesh)) for spec in self.specs.values())

    def abstract(self, mesh: Mesh | None, *, split: bool) -> dict[str, jax.ShapeDtypeStruct]:
        """Its arrays, each with the sharding that its PartitionSpec gives on a mesh; without one where it has none and `split` is false."""
        found = {}
        for name, kind in self.kinds.items():
            spec = self.specs.get(name)
            known = mesh is not None and (spec is not None or split)
            sharding = NamedSharding(mesh, PartitionSpec(*_entries(spec or (), mesh))) if known and mesh is not None else None
            found[name] = jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=sharding)
        return found


def ruled(found: Described, rules: Mapping[str, tuple[str, ...]], mesh: Mesh) -> Described:
    """The checkpoint as it is split by rules for named axes, which ours name in their metadata; raises ConfigError where it does not."""
    ours = found.metadata.get("shardconv")
    axes = ours.get("named_axes") if isinstance(ours, Mapping) else None
    title = f"{found.path} cannot be split by rules"
    if not isinstance(axes, Mapping):
        raise ConfigError(title, [Problem("it does not name the axes of its arrays", "give like, or rules={} to split nothing")])
    own = {axis for dims in axes.values() for dim in dims for axis in dim} | FINER.keys()
    known = own.union(*(family.axes for family in families().values()))  # rules are often written for several models
    remedy = f"there are {', '.join(sorted(own))}"
    problems = [Problem(f"rules: no array has an axis {axis!r}", remedy) for axis in rules if axis not in known]
    odd = sorted({name for rule in rules.values() for name in rule if name not in mesh.shape})
    problems += [Problem(f"rules: {name!r} is not a mesh axis", f"the mesh axes are {', '.join(map(str, mesh.shape))}") for name in odd]
    twice = [(axis, name) for axis, rule in rules.items() for name in dict.fromkeys(rule) if rule.count(name) > 1]
    problems += [Problem(f"rules: {axis!r} has {name!r} twice", "a mesh axis splits a dim once") for axis, name in twice]
    if problems:
        raise ConfigError(title, problems)
    table = MeshRules({str(name): size for name, size in mesh.shape.items()}, rules)
    specs = {name: partition(_address(name, dims), FINER, table) for name, dims in axes.items() if name in found.kinds}
    return replace(found, specs=specs)


def _address(name: str, dims: Sequence[Sequence[str]]) -> Address:
    """An address that has the names of an array's dims, and no sizes."""
    return Address(name, (), tuple(tuple(Digit(axis, 1, 1) for axis in dim) for dim in dims))


def described(path: str) -> Described:
    """The tree at a path; raises InputError where its metadata cannot be read."""
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.metadata(path).item_metadata
    except (ValueError, OSError) as error:
        raise _unreadable(path, reason(error)) from None
    if found is None:  # Orbax's word for a tree whose metadata it cannot read
        raise _unreadable(path, "its arrays have no metadata")
    metadata = found.custom_metadata or {}
    kinds, _ = named(found.tree)
    odd = [name for name, kind in kinds.items() if getattr(kind, "dtype", None) is None or getattr(kind, "shape", None) is None]
    if odd:
        raise InputError(f"{path} cannot be loaded", [Problem(f"{name} is no array: {type(kinds[name]).__name__}") for name in odd])
    ours = metadata.get("shardconv")
    said = ours.get("partition_specs", {}) if isinstance(ours, Mapping) else {}
    specs = {name: tuple(said[name]) if name in said else _saved_spec(kind) for name, kind in kinds.items()}
    return Described(path, found.tree, kinds, {name: spec for name, spec in specs.items() if spec is not None}, metadata)


def restored(found: Described, leaves: Mapping[str, jax.ShapeDtypeStruct], budget: int) -> dict[str, jax.Array]:
    """The arrays with these shardings and dtypes; every process of the program calls it. Raises InputError where one cannot be read.

    `budget` bounds what is read at a time, in whole GiB, of which Orbax wants at least one.
    """
    _, structure = named(found.tree)
    tree = jax.tree_util.tree_unflatten(structure, [leaves[name] for name in found.kinds])
    arguments = ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=max(budget // GIB, 1))
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            arrays, _ = named(checkpointer.restore(found.path, args=arguments))
    except Exception as error:  # noqa: BLE001  Orbax raises a bare one over an array that cannot be read
        raise _unreadable(found.path, reason(error).partition(" See full TensorStore details")[0]) from None
    jax.block_until_ready(arrays)
    return arrays


def _unreadable(path: str, fact: str) -> InputError:
    return InputError("the checkpoint cannot be read", [Problem(f"{path}: {fact}", "the file is damaged or incomplete: make it again")])


def _saved_spec(kind: Any) -> tuple[Any, ...] | None:
    """The PartitionSpec that an array was saved with."""
    spec = getattr(getattr(kind, "sharding", None), "partition_spec", None)
    return None if spec is None else tuple(spec)


def _entries(spec: Sequence[Any], mesh: Mesh | None) -> Iterator[tuple[str, ...]]:
    for entry in spec:
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        yield tuple(name for name in names if mesh is not None and name in mesh.shape)
