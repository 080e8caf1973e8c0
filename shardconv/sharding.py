"""Axis names are logical sharding axes: mesh rules turn a target address into a PartitionSpec.

`[mesh] rules` gives an axis the mesh axes that split it, and works as Flax's and MaxText's logical axis rules do: rules are taken in the
order in which they are written; a rule applies to the dim that has its axis, unless that dim has got a rule already, or another dim of
the array one of its mesh axes. What no rule applies to is not split.

Names are those of the family: a dim of several axes answers to each of them, and an axis that a layout has split answers to the whole
(`(pair half)` goes by the rule for `head_dim`, `blocks` by that for `layers`). Shards are contiguous blocks of the stored array.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardconv.axes import Address, Axes
from shardconv.errors import Problem

Spec = tuple[None | str | tuple[str, ...], ...]

PADDABLE = "vocab"  # the axis that may be longer than the model's and leave it the same model: target.vocab_size


@dataclass(frozen=True)
class MeshRules:
    """Mesh axes with their numbers of devices, and for each named axis the mesh axes that split it, first come first served."""

    axes: Mapping[str, int]
    rules: Mapping[str, tuple[str, ...]]

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return math.prod(self.axes.values())


def partition(address: Address, axes: Axes, mesh: MeshRules) -> Spec:
    """The PartitionSpec of an address' tensors, one entry per dim; `axes` says which axes are split into which.

    >>> from shardconv.axes import address
    >>> axes = {"embed": 8, "heads": 4, "head_dim": 2}
    >>> mesh = MeshRules({"fsdp": 4, "tensor": 2}, {"embed": ("fsdp",), "heads": ("tensor",), "head_dim": ("fsdp", "tensor")})
    >>> partition(address("q", "embed heads head_dim", axes), axes, mesh)
    ('fsdp', 'tensor', None)
    """
    governed = _governed(address, axes, mesh)
    entries = (mesh.rules[governed[place]] if place in governed else () for place in range(len(address.dims)))
    return tuple(None if not entry else entry[0] if len(entry) == 1 else entry for entry in entries)


def _governed(address: Address, axes: Axes, mesh: MeshRules) -> dict[int, str]:
    """The dims that a rule applies to, with the axis that the rule is for."""
    names = _answers(address, axes)
    governed: dict[int, str] = {}
    taken: set[str] = set()
    for axis, rule in mesh.rules.items():
        place = next((place for place, answers in enumerate(names) if axis in answers), None)
        if rule and place is not None and place not in governed and taken.isdisjoint(rule):
            governed[place] = axis
            taken.update(rule)
    return governed


def _answers(address: Address, axes: Axes) -> list[set[str]]:
    """The axes that each dim answers to."""
    whole = {finer: axis for axis, size in axes.items() if isinstance(size, str) for finer in size.split()}
    return [{name for digit in dim for name in _names(digit.axis, whole)} for dim in address.dims]


def _names(axis: str, whole: Mapping[str, str]) -> Iterator[str]:
    """An axis, the axis that it is a part of, and so on."""
    yield axis
    if axis in whole:
        yield from _names(whole[axis], whole)


def split_by(spec: Iterable[None | str | Sequence[str]]) -> list[tuple[str, ...]]:
    """The mesh axes that split each dim.

    >>> split_by((None, "x", ("x", "y")))
    [(), ('x',), ('x', 'y')]
    """
    return [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]


def shards(spec: Spec, mesh: MeshRules) -> tuple[int, ...]:
    """Into how many shards a PartitionSpec cuts each dim."""
    return tuple(math.prod(mesh.axes[axis] for axis in names) for names in split_by(spec))


@dataclass(frozen=True, slots=True)
class Misfit:
    """An axis of `size` that its mesh axes do not divide."""

    axis: str
    size: int
    rule: tuple[str, ...]

    def problem(self, arrays: Collection[str], mesh: MeshRules) -> Problem:
        """What is wrong, told once for all the arrays that it is wrong in."""
        count = math.prod(mesh.axes[entry] for entry in self.rule)
        places = f"{len(arrays)} arrays" if len(arrays) > 1 else next(iter(arrays))
        fact = f"{self.axis} is {self.size} in {places}, which {count} shards along {' and '.join(self.rule)} do not divide"
        sizes = " and ".join(f"mesh.axes.{entry}" for entry in self.rule)
        wanted = f"a divisor of {self.size}" if len(self.rule) == 1 else f"numbers whose product divides {self.size}"
        padded = f", or target.vocab_size = {-(-self.size // count) * count} to pad it" if self.axis == PADDABLE else ""
        return Problem(fact, f'set {sizes} to {wanted}, or mesh.rules.{self.axis} = ""{padded}')


def misfits(address: Address, axes: Axes, mesh: MeshRules) -> list[Misfit]:
    """The dims that their mesh axes do not divide; JAX has no uneven shards."""
    governed = ((axis, address.shape[place], mesh.rules[axis]) for place, axis in sorted(_governed(address, axes, mesh).items()))
    return [Misfit(*found) for found in governed if found[1] % math.prod(mesh.axes[entry] for entry in found[2])]


def yielded(address: Address, axes: Axes, mesh: MeshRules) -> list[tuple[str, str, str]]:
    """Rules that do not apply because an earlier one has their mesh axis: (axis, mesh axis, the axis that it splits instead).

    >>> from shardconv.axes import address
    >>> yielded(address("w", "embed mlp", {"embed": 8, "mlp": 4}), {}, MeshRules({"fsdp": 2}, {"mlp": ("fsdp",), "embed": ("fsdp",)}))
    [('embed', 'fsdp', 'mlp')]
    """
    governed = _governed(address, axes, mesh)
    owner = {entry: axis for axis in governed.values() for entry in mesh.rules[axis]}
    found = []
    for place, answers in enumerate(_answers(address, axes)):
        for axis in (axis for axis in mesh.rules if axis in answers and axis not in governed.values() and place not in governed):
            found += [(axis, entry, owner[entry]) for entry in mesh.rules[axis] if entry in owner][:1]
    return found
