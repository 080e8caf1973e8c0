"""Moves: what fills an array of a JAX model, as two addresses of one set of elements.

    conv.kernel   =   conv.weight: o i h w -> h w i o
    head.kernel   =   fc.weight: o (c h w) -> (h w c) o; c=512, h=7

On the left an array of the model, then what is stored (a tensor, or an expression of some, see `folding`), the dims of what is stored and
the dims of the array, in the notation of `shardconv.axes`. Names may have holes: `blocks.{layers}.fc.weight: o i -> layers i o` stacks
layers. `part=1` takes the second term of a sum in the stored dims, `into=1` fills the second term of one in the array's dims. A size that
no shape says is given as `c=512`. A move without dims is the same dims on both sides.

`bound` turns a move and the shapes of both sides into two addresses. From there on everything is `shardconv.route`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardconv.axes import Address, address
from shardconv.porting.folding import Call, Expression, names, parsed, shape_of
from shardconv.porting.sizes import ALL, axes_of, shown, solved, spelled

Shapes = Mapping[str, Sequence[int]]
HOLE = re.compile(r"\{(.*?)\}")


@dataclass(frozen=True, slots=True)
class Move:
    """`source`, of dims `dims`, fills array `target`, of dims `to`; `part` and `into` number the terms where these are sums."""

    source: str
    dims: str
    target: str
    to: str
    part: int = 0
    into: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def expression(self) -> Expression:
        """The source, read."""
        return parsed(self.source)

    def __str__(self) -> str:
        """The move as text, without its target.

        >>> str(Move("fc.weight", "o (c h w)", "head.kernel", "(h w c) o", sizes={"c": 4}))
        'fc.weight: o (c h w) -> (h w c) o; c=4'
        """
        if isinstance(self.expression, float):
            return self.source
        dims = "" if self.dims == self.to == ALL else f": {self.dims} -> {self.to}"
        said = {"part": self.part, "into": self.into}
        extra = [f"{key}={value}" for key, value in {**{key: value for key, value in said.items() if value}, **self.sizes}.items()]
        return self.source + dims + ("; " + ", ".join(extra) if extra else "")


def read_move(target: str, text: str) -> Move:
    """A move from its text; ValueError that says what is wrong.

    >>> read_move("conv.kernel", "conv.weight: o i h w -> h w i o").to
    'h w i o'
    """
    body, _, extra = text.partition(";")
    source, colon, dims = body.partition(":")
    before, arrow, after = dims.partition("->")
    if colon and not (arrow and "->" not in after):
        raise ValueError(f"{text!r} has no `dims -> dims` after the colon")
    parsed(source)
    said: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in extra.split(","))):
        key, equals, number = (part.strip() for part in item.partition("="))
        if not equals or not number.isdigit():
            raise ValueError(f"{item!r} is not a size such as c=512")
        said[key] = int(number)
    sides = (before.strip(), after.strip()) if colon else (ALL, ALL)
    return Move(source.strip(), sides[0], target, sides[1], said.pop("part", 0), said.pop("into", 0), said)


@dataclass(frozen=True, slots=True)
class Bound:
    """A move with both its addresses; the source's keys are expressions."""

    move: Move
    source: Address
    target: Address

    @property
    def size(self) -> int:
        """The number of elements that it moves."""
        return math.prod(self.target.sizes.values())


def bound(move: Move, tensors: Shapes, arrays: Shapes) -> Bound:
    """The two addresses of a move; ValueError where a name is not there, or dims do not fit the shapes or each other."""
    expression, holes = move.expression, dict(move.sizes)
    if isinstance(expression, float):
        shape = _found(move.target, arrays, holes, "the model")
        dims = spelled(ALL, len(shape))
        sizes = {**holes, **dict(zip(axes_of(dims), shape, strict=True))}
        return Bound(move, address(move.source, dims, sizes), address(move.target, dims, sizes))
    stored = {name: _found(name, tensors, holes, "the checkpoint") for name in names(expression)}
    wanted = _found(move.target, arrays, holes, "the model")
    shapes = shape_of(expression, stored)
    dims, to = spelled(move.dims, len(shapes)), spelled(_stacked(move), len(shapes))
    if odd := [name for name in move.sizes if name not in {*axes_of(dims), *axes_of(to), *HOLE.findall(move.source)}]:
        raise ValueError(f"there is no axis {', '.join(odd)}")
    try:
        sizes = solved([(to, wanted), (dims, shapes)], holes)
        if missing := [axis for axis in (*axes_of(dims), *axes_of(to)) if axis not in sizes]:
            said = ", ".join(f"{axis}=..." for axis in dict.fromkeys(missing))
            raise ValueError(f"no shape says how long {', '.join(dict.fromkeys(missing))} is: add `; {said}`")
        found = Bound(move, address(move.source, dims, sizes, move.part), address(move.target, to, sizes, move.into))
        if None in shapes and isinstance(expression, Call) and found.source.shape == shape_of(expression.arguments[0], stored):
            raise ValueError("there are no groups to take apart")
    except ValueError as error:
        raise ValueError(f"{error}; {move.source} is {shown(shapes)}, {move.target} is {shown(wanted)}") from None
    if found.source.sizes != found.target.sizes:
        odd = sorted(set(found.source.sizes) ^ set(found.target.sizes))
        raise ValueError(f"axis {', '.join(odd)} is on one side only: {move}")
    return found


def _stacked(move: Move) -> str:
    """The dims of the array; where none are said on either side, with those first that the source's name alone has."""
    more = [axis for axis in dict.fromkeys(HOLE.findall(move.source)) if axis not in HOLE.findall(move.target)]
    return " ".join([*more, ALL]) if move.dims == move.to == ALL else move.to


def _found(name: str, shapes: Shapes, sizes: dict[str, int], where: str) -> Sequence[int]:
    """The shape behind a name, and the sizes of the axes in its holes."""
    if not HOLE.search(name):
        if name not in shapes:
            raise ValueError(f"{name} is not in {where}")
        return shapes[name]
    pattern = re.compile("([0-9]+)".join(map(re.escape, HOLE.sub("{}", name).split("{}"))))
    found = [match for key in shapes if (match := pattern.fullmatch(key))]
    if not found:
        raise ValueError(f"{name} is not in {where}")
    if len(odd := {tuple(shapes[match.string]) for match in found}) > 1:
        raise ValueError(f"{name} has more than one shape: {', '.join(map(shown, sorted(odd)))}")
    for place, text in enumerate(HOLE.findall(name)):
        if re.fullmatch(r"\w+", text):
            sizes.setdefault(text, 1 + max(int(match[place + 1]) for match in found))
    return shapes[found[0].string]
