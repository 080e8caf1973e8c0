"""Transfers: what fills the arrays of a target tree, and the leaves that it makes.

A transfer is two addresses over the same axes: a family and a layout give one for each parameter, a user's mapping one for each move.
Leaves that several transfers fill, side by side, are one leaf of several parts. What is wrong with any of it is collected.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from shardconv.axes import Address, Axes, Dim, encode
from shardconv.boxes import Interval
from shardconv.dtypes import dtype_named, dtype_of_code
from shardconv.errors import Problem
from shardconv.formats import Tensor
from shardconv.leaf import Leaf, Part
from shardconv.sharding import MeshRules, Misfit, Spec, misfits, partition, yielded
from shardconv.values import ValueRule, is_exact, is_float

ONE_DTYPE = 'set target.dtype to one dtype, such as "float32"'
FLAT = 'use target.layout = "flat"'


@dataclass(frozen=True, slots=True)
class Transfer:
    """Elements on their way: `param` from the tensors of `source` to the arrays of `target`, over `axes`.

    `template` names the arrays for people, `paths` says where in the tree each is, by name, if it is not the name's own parts. `dtype` is
    what they are stored as, "source" or a dtype's name; `exact` is false where tensors are computed.
    """

    param: str
    source: Address
    target: Address
    template: str
    axes: Axes
    dtype: str
    rule: ValueRule = field(default_factory=ValueRule)
    exact: bool = True
    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Builder:
    """Makes leaves of transfers, each of one chunk yet, and collects what is wrong with them."""

    stored: Mapping[str, Tensor]
    mesh: MeshRules
    problems: list[Problem] = field(default_factory=list)
    misfits: dict[Misfit, set[str]] = field(default_factory=dict)
    yielded: dict[tuple[str, str, str], set[str]] = field(default_factory=dict)

    def leaves(self, transfer: Transfer) -> Iterator[Leaf]:
        """The leaves that a transfer fills: one, or one for each index in its name."""
        source, target = transfer.source, transfer.target
        spec = partition(target, transfer.axes, self.mesh)
        self._split(transfer)
        codes = {key: self.stored[key].dtype for key, _ in source.keys()}
        plain = len(set(codes.values())) == 1
        wrong: dict[Problem, list[str]] = {}
        for name, index in target.keys():
            used = set(codes.values()) if plain else {codes[key] for key, at in source.keys() if _agree(at, index)}
            part = Part(transfer.param, tuple(sorted(used)), source, target, index, transfer.rule)
            if problem := _disagreement(part, transfer.dtype):
                wrong.setdefault(problem, []).append(name)
            else:
                yield _whole_leaf(transfer, name, part, spec)
        for problem, names in wrong.items():
            said = names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
            self.problems.append(Problem(f"{said} {problem.fact}", problem.remedy))

    def _split(self, transfer: Transfer) -> None:
        """Collect what the mesh rules do not do as they are written, with the arrays in which."""
        names = [name for name, _ in transfer.target.keys()]
        for misfit in misfits(transfer.target, transfer.axes, self.mesh):
            self.misfits.setdefault(misfit, set()).update(names)
        for rule in yielded(transfer.target, transfer.axes, self.mesh):
            self.yielded.setdefault(rule, set()).update(names)

    def merged(self, leaves: Iterable[Leaf]) -> tuple[Leaf, ...]:
        """Leaves of one path made one: the parts of a fused target lie side by side."""
        found: dict[tuple[str, ...], Leaf] = {}
        for leaf in leaves:
            other = found.setdefault(leaf.path, leaf)
            if other is leaf:
                continue
            if leaf.dtype != other.dtype:
                fact = f"{leaf.name} is made of {other.parts[0].param} in {other.dtype} and {leaf.parts[0].param} in {leaf.dtype}"
                self.problems.append(Problem(fact, ONE_DTYPE))
            if leaf.shape != other.shape or not all(_apart(part.target, leaf.parts[0].target) for part in other.parts):
                raise ValueError(f"{leaf.name}: the parts {other.parts[0].param} and {leaf.parts[0].param} do not lie side by side")
            zeros = other.zeros - math.prod(leaf.shape) + leaf.zeros
            parts = other.parts + leaf.parts
            found[leaf.path] = replace(other, parts=parts, exact=other.exact and leaf.exact, zeros=zeros)
        return tuple(found.values())


def _whole_leaf(transfer: Transfer, name: str, part: Part, spec: Spec) -> Leaf:
    """A leaf of one chunk."""
    shape, dtype = part.target.shape, _dtype(part, transfer.dtype)
    exact = transfer.exact and all(is_exact(part.rule, dtype_of_code(code), dtype_named(dtype)) for code in part.dtypes)
    zeros = math.prod(shape) - math.prod(digit.size for dim in part.target.dims for digit in dim)
    path = transfer.paths.get(name) or tuple(name.split("."))
    return Leaf(path, transfer.template, shape, dtype, shape, shape, spec, (part,), exact, zeros)


def _apart(a: Address, b: Address) -> bool:
    """Whether the elements of two addresses of one shape lie apart, side by side along some dim."""
    sides = ((_filled(one), _filled(other)) for one, other in zip(a.dims, b.dims, strict=True))
    return any(one[1] <= other[0] or other[1] <= one[0] for one, other in sides)


def _filled(dim: Dim) -> Interval:
    """The part of a dim that its address fills: room is left by the outermost digit alone."""
    first = {digit.axis: 0 for digit in dim}
    last = {digit.axis: digit.size - 1 for digit in dim}
    return encode(dim, first), encode(dim, last) + 1


def _floats(part: Part) -> bool:
    return all(is_float(dtype_of_code(code)) for code in part.dtypes)


def _dtype(part: Part, wanted: str) -> str:
    """The dtype of a leaf: as wanted for floats, as it is for anything else."""
    return dtype_of_code(part.dtypes[0]).name if wanted == "source" or not _floats(part) else wanted


def _disagreement(part: Part, wanted: str) -> Problem | None:
    """Why a part has no dtype, if it has none."""
    if len(part.dtypes) > 1 and (wanted == "source" or not _floats(part)):
        return Problem(f"is made of tensors of different dtypes: {part.stored}", ONE_DTYPE)
    if not part.rule.moves and not _floats(part):
        return Problem(f"is {part.stored}, and the layout scales it", FLAT)
    return None


def _agree(a: Mapping[str, int], b: Mapping[str, int]) -> bool:
    return all(b.get(axis, i) == i for axis, i in a.items())
