"""Axis names are logical sharding axes: mesh rules turn a target address into a PartitionSpec.

`[mesh] rules` gives an axis the mesh axes that split it, in the way of Flax's and MaxText's logical axis rules: dims are taken from the
left, and a mesh axis that an earlier dim has taken is not used again. A dim of several axes goes by the first of them that has a rule,
since splitting the outermost digit keeps every shard one block.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shardconv.axes import Address
from shardconv.errors import Problem

Spec = tuple[None | str | tuple[str, ...], ...]


@dataclass(frozen=True)
class MeshRules:
    """Mesh axes with their numbers of devices, and for each named axis the mesh axes that split it."""

    axes: Mapping[str, int]
    rules: Mapping[str, tuple[str, ...]]

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return math.prod(self.axes.values())


def partition(address: Address, mesh: MeshRules) -> Spec:
    """The PartitionSpec of an address' tensors, one entry per dim.

    >>> from shardconv.axes import address
    >>> mesh = MeshRules({"fsdp": 4, "tensor": 2}, {"embed": ("fsdp",), "heads": ("tensor",), "mlp": ("fsdp", "tensor")})
    >>> partition(address("q", "embed heads head_dim", {"embed": 8, "heads": 4, "head_dim": 2}), mesh)
    ('fsdp', 'tensor', None)
    """
    taken: set[str] = set()
    spec: list[None | str | tuple[str, ...]] = []
    for dim in address.dims:
        rule = next((mesh.rules[digit.group] for digit in dim if mesh.rules.get(digit.group)), ())
        free = tuple(axis for axis in rule if axis not in taken)
        taken |= set(free)
        spec.append(None if not free else free[0] if len(free) == 1 else free)
    return tuple(spec)


def shards(spec: Spec, mesh: MeshRules) -> tuple[int, ...]:
    """Into how many shards a PartitionSpec cuts each dim."""
    names = [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in spec]
    return tuple(math.prod(mesh.axes[axis] for axis in entry) for entry in names)


def misfits(name: str, address: Address, spec: Spec, mesh: MeshRules) -> list[Problem]:
    """The dims that their mesh axes do not divide; JAX has no uneven shards."""
    problems = []
    for dim, size, count, entry in zip(address.dims, address.shape, shards(spec, mesh), spec, strict=True):
        if size % count:
            axis = next(digit.group for digit in dim if mesh.rules.get(digit.group))
            fact = f"{name}: {axis} is {size}, which {count} shards along {entry} do not divide"
            problems.append(Problem(fact, f'set mesh.rules.{axis} = "" or a mesh axis that divides {size}'))
    return problems
