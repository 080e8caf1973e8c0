"""The last resort: a leaf's origin by the plan's own addresses, for a family that nobody has stated twice.

The addresses are turned into the same kind of statement and evaluated by the same code as any other, which shares none with the
converter: faults of reading, moving, rounding and writing are caught. A wrong table is not, since it is the one that is believed here; the
verdict says so.
"""

import keyword
import math
from collections.abc import Mapping
from dataclasses import replace

from shardconv.axes import Address, Dim
from shardconv.plan import Part, Plan
from shardconv.verify.statement import Number, Origin, Reference


def references(plan: Plan) -> tuple[list[Reference], list[str]]:
    """Every leaf as the plan describes it, and the names of those that cannot be said as an einops pattern."""
    found, lost = [], []
    for leaf in plan.leaves:
        origins = [_origin(part) for part in leaf.parts]
        stated = tuple(origin for origin in origins if origin is not None)
        if len(stated) == len(origins):
            found.append(Reference(leaf.name, leaf.shape, leaf.dtype, stated))
        else:
            lost.append(leaf.name)
    return found, lost


def _origin(part: Part) -> Origin | None:
    spelt = {axis: _spelt(axis, number) for number, axis in enumerate(part.source.sizes)}
    source, target = _renamed(part.source, spelt), _renamed(part.target, spelt)
    index = {spelt[axis]: at for axis, at in part.index.items()}
    numbers = []
    for hole in source.holes:
        if hole.labels:
            return None
        start, steps = hole.start, []
        for place, digit in enumerate(hole.dim):
            step = math.prod(other.radix for other in hole.dim[place + 1 :])
            start += step * (digit.offset + index.get(digit.axis, 0))
            steps += [(digit.axis, step)] * (digit.axis not in index)
        numbers.append(Number(start, tuple(steps)))
    stacked = {axis for number in numbers for axis, _ in number.steps}
    left, right = (" ".join(_words([digit.axis for digit in dim]) for dim in address.dims) for address in (source, target))
    if any(len(dim) > 1 and stacked & {digit.axis for digit in dim} for dim in target.dims):
        return None
    if any(digit.size < digit.radix for address in (source, target) for dim in address.dims for digit in dim[1:]):
        return None
    sizes = {digit.axis: digit.size for address in (source, target) for dim in address.dims for digit in dim}
    take, put = (tuple(_side(dim) for dim in address.dims) for address in (source, target))
    return Origin(source.name, tuple(numbers), left, right, sizes | source.named, take, put, part.rule.scale, part.rule.shift)


def _spelt(axis: str, number: int) -> str:
    """An axis as einops may have it, which refuses Python's words: people write `out in -> in out`.

    >>> _spelt("embed", 0), _spelt("in", 1)
    ('embed', 'axis1')
    """
    return axis if axis.isidentifier() and not keyword.iskeyword(axis) and axis.strip("_") == axis else f"axis{number}"


def _renamed(address: Address, names: Mapping[str, str]) -> Address:
    """The address with other names for its axes."""
    dims = tuple(tuple(replace(digit, axis=names[digit.axis]) for digit in dim) for dim in address.dims)
    holes = tuple(replace(hole, dim=tuple(replace(digit, axis=names[digit.axis]) for digit in hole.dim)) for hole in address.holes)
    return replace(address, holes=holes, dims=dims)


def _words(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"({' '.join(names)})" if names else "1"


def _side(dim: Dim) -> tuple[int, int]:
    """The part of a dim that an address fills."""
    if not dim:
        return 0, 1
    outer, *rest = dim
    inner = math.prod(digit.radix for digit in rest)
    return outer.offset * inner, (outer.offset + outer.size) * inner

