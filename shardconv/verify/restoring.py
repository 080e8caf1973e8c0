"""The written checkpoint on a mesh, by plain Orbax calls, as a user's training job restores it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardconv.errors import CheckError, Problem
from shardconv.verify.forwards import nested
from shardconv.verify.stored import LOST, reason


@dataclass(frozen=True)
class Described:
    """What a checkpoint says about itself: its leaves by dotted name, each with its sharding, and the mesh that they belong on."""

    path: str
    leaves: Mapping[str, jax.ShapeDtypeStruct]
    mesh: Mesh
    metadata: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self.leaves.values())


@dataclass(frozen=True)
class Restored:
    """Leaves by dotted name, each sharded as the checkpoint says, the mesh they are on, and what the checkpoint says about itself."""

    leaves: Mapping[str, jax.Array]
    mesh: Mesh
    metadata: Mapping[str, Any]


def describe(path: str, devices: Sequence[jax.Device]) -> Described:
    """The tree at `path` as it belongs on devices, by the PartitionSpecs that the checkpoint carries.

    The mesh is the plan's, or as much of it as there are devices. Raises CheckError where the checkpoint says nothing of itself.
    """
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.metadata(path).item_metadata
    if found is None:  # Orbax's word for a tree whose metadata it cannot read
        raise CheckError("the checkpoint cannot be read back", [Problem(f"{path}: its arrays have no metadata", LOST)])
    metadata = found.custom_metadata or {}
    ours = metadata.get("shardconv")
    if not isinstance(ours, Mapping):
        raise CheckError("the checkpoint cannot be checked", [Problem(f"{path} does not say how it was made", "convert it again")])
    mesh = mesh_of(ours["mesh"], devices)
    kinds = dict(_named(found.tree))
    leaves = {name: _target(kind, mesh, ours["partition_specs"].get(name, ())) for name, kind in kinds.items()}
    return Described(path, leaves, mesh, metadata)


def restore(path: str, devices: Sequence[jax.Device]) -> Restored:
    """Restores the tree at `path` onto devices; raises CheckError as `describe` does, and where an array cannot be read."""
    described = describe(path, devices)
    tree = nested(described.leaves)
    arguments = ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
    with ocp.PyTreeCheckpointer() as checkpointer, readable(described.path):
        leaves = dict(_named(checkpointer.restore(described.path, args=arguments)))
    return Restored(leaves, described.mesh, described.metadata)


@contextmanager
def readable(path: str) -> Iterator[None]:
    """What Orbax and TensorStore raise over a file that is missing, cut off or damaged, as a CheckError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise CheckError("the checkpoint cannot be read back", [Problem(f"{path}: {reason(error)}", LOST)]) from None


def mesh_of(axes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of these axes, each as long as asked or, where devices run out, as its largest divisor that they allow."""
    sizes, left = [], len(devices)
    for size in axes.values():
        fits = max(part for part in range(1, left + 1) if size % part == 0)
        sizes.append(fits)
        left //= fits
    return Mesh(np.array(devices[: math.prod(sizes)]).reshape(sizes), tuple(axes))


def _target(kind: Any, mesh: Mesh, spec: Sequence[Any]) -> jax.ShapeDtypeStruct:
    entries = (tuple(entry) if isinstance(entry, list) else entry for entry in spec)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=NamedSharding(mesh, PartitionSpec(*entries)))


def _named(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts by dotted name."""
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for key, child in tree.items():
        yield from _named(child, f"{prefix}.{key}" if prefix else str(key))
