"""Sizes: how long each axis is, from dims and the shapes that they stand for.

Tables of layers name axes and no lengths: `((heads | heads | heads) head_dim) embed` stands for one shape in the checkpoint, `embed heads
head_dim` for three numbers in the model, and together they say what heads is. A dim is a sum of products of axes; where all but one axis
is known, that one follows. What no shape says has to be said.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from shardconv.axes import groups

Side = tuple[str, Sequence[int | None]]  # dims, and the shape that they stand for; None for a length that is not known yet
Product = tuple[int, tuple[str, ...]]  # a number times axes
ALL = "..."  # dims that are whatever the stored tensor's are


def solved(sides: Iterable[Side], known: Mapping[str, int]) -> dict[str, int]:
    """The sizes that follow, with those that are known; ValueError where dims and shapes contradict each other.

    >>> solved([("((heads | heads | heads) head_dim) embed", (36, 12)), ("embed heads head_dim", (12, 3, 4))], {})
    {'embed': 12, 'heads': 3, 'head_dim': 4}
    """
    sizes, equations = dict(known), []
    for dims, shape in sides:
        listed = groups(dims)
        if len(listed) != len(shape):
            raise ValueError(f"`{dims}` has {_counted(len(listed))}, the shape {shown(shape)} has {len(shape)}")
        equations += [(group, terms(group), length, shape) for group, length in zip(listed, shape, strict=True) if length is not None]
    while equations:
        left = []
        for group, products, length, shape in equations:
            found = _step(products, length, sizes)
            if found is False:
                raise ValueError(f"`{group}` is not {length}{_because(products, sizes)} in the shape {shown(shape)}")
            if found is None:
                left.append((group, products, length, shape))
        if len(left) == len(equations):
            break
        equations = left
    return sizes


def terms(group: str) -> list[Product]:
    """A dim as a sum of products.

    >>> terms("((heads | kv | kv) head_dim)")
    [(1, ('heads', 'head_dim')), (2, ('kv', 'head_dim'))]
    """
    if not group.startswith("("):
        return [(int(group), ())] if group.isdigit() else [(1, (group,))]
    totals: dict[tuple[str, ...], int] = {}
    for term in _split(groups(group[1:-1])):
        for number, names in _product([terms(token) for token in term]):
            totals[names] = totals.get(names, 0) + number
    return [(number, names) for names, number in totals.items()]


def axes_of(dims: str) -> list[str]:
    """The axes of dims in their order.

    >>> axes_of("o (c h w) 1")
    ['o', 'c', 'h', 'w']
    """
    found = [name for group in groups(dims) for _, names in terms(group) for name in names]
    return list(dict.fromkeys(found))


def spelled(dims: str, rank: int) -> str:
    """Dims with `...` as one axis for each dim of a tensor.

    >>> spelled("layers ...", 2)
    'layers a0 a1'
    """
    return dims.replace(ALL, " ".join(f"a{dim}" for dim in range(rank))).strip()


def shown(shape: Sequence[int | None]) -> str:
    """A shape as a message has it: `(4, 3)`."""
    return "(" + ", ".join("?" if length is None else str(length) for length in shape) + ")"


def _step(products: list[Product], length: int, sizes: dict[str, int]) -> bool | None:
    """Whether a dim agrees with its length; None where it cannot be known yet. The last unknown axis of a dim is solved for."""
    fixed, factor, unknown = 0, 0, set()
    for number, names in products:
        missing = [name for name in names if name not in sizes]
        value = number * math.prod(sizes[name] for name in names if name in sizes)
        if not missing:
            fixed += value
        elif len(missing) > 1:
            return None
        else:
            factor += value
            unknown.add(missing[0])
    if not unknown:
        return fixed == length
    if len(unknown) > 1:
        return None
    if factor == 0 or (length - fixed) % factor or length < fixed:
        return False
    sizes[unknown.pop()] = (length - fixed) // factor
    return True


def _split(tokens: list[str]) -> list[list[str]]:
    """The terms of a sum."""
    found: list[list[str]] = [[]]
    for token in tokens:
        if token == "|":
            found.append([])
        else:
            found[-1].append(token)
    return found


def _product(factors: list[list[Product]]) -> list[Product]:
    found: list[Product] = [(1, ())]
    for factor in factors:
        found = [(a * b, (*left, *right)) for a, left in found for b, right in factor]
    return found


def _because(products: list[Product], sizes: Mapping[str, int]) -> str:
    said = [f"{name} = {sizes[name]}" for name in dict.fromkeys(name for _, names in products for name in names) if name in sizes]
    return f" with {', '.join(said)}" if said else ""


def _counted(number: int) -> str:
    return f"{number} dim{'' if number == 1 else 's'}"
