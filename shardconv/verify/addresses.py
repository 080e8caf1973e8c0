"""The last resort: a leaf's origin by the plan's own addresses, for a family that nobody has stated twice.

The addresses are turned into the same kind of statement and evaluated by the same code as any other, which shares none with the
converter: faults of reading, moving, rounding and writing are caught. A wrong table is not, since it is the one that is believed here; the
verdict says so.
"""

import math

from shardconv.axes import Dim
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
    source, target = part.source, part.target
    numbers = []
    for hole in source.holes:
        if hole.labels:
            return None
        start, steps = hole.start, []
        for place, digit in enumerate(hole.dim):
            step = math.prod(other.radix for other in hole.dim[place + 1 :])
            start += step * (digit.offset + part.index.get(digit.axis, 0))
            steps += [(digit.axis, step)] * (digit.axis not in part.index)
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


def _words(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"({' '.join(names)})" if names else "1"


def _side(dim: Dim) -> tuple[int, int]:
    """The part of a dim that an address fills."""
    if not dim:
        return 0, 1
    outer, *rest = dim
    inner = math.prod(digit.radix for digit in rest)
    return outer.offset * inner, (outer.offset + outer.size) * inner

