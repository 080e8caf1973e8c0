"""Addresses: where the elements of one named index space live in a checkpoint.

An *address* is a name and a position. `address("model.layers.{layers}.self_attn.q_proj.weight", "(heads head_dim) embed", axes)` says:
element (layers, heads, head_dim, embed) is in the tensor that `layers` names, at row `heads * |head_dim| + head_dim`, column `embed`.
An index is either in the name or in the shape; stacking layers is moving `layers` from one to the other. Two addresses over the same
axes are a bijection between elements, so transpose, reshape, head split, RoPE order, layer and expert stacking and fused tensors are
all one thing, and neither direction of a conversion is privileged.

The notation of dims, outermost first:
    embed            an axis                          (heads head_dim)   axes flattened into one dim, row-major
    (q | kv | kv)    parameters side by side; this address is number `part`; a term may be a number: room that nobody fills
    1                a dim of length one
and of the holes in a name:
    {layers}         in decimal, or as the axis' labels spell it
    {blocks kind}    several axes in one number       {layers+3}  an offset, a number or the size of an axis

`axes` gives each axis a size, a tuple of labels, or a string of finer axes it splits into: `{"head_dim": "half pair"}` lets one side
say `head_dim` where the other says `(pair half)`.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

Axes = Mapping[str, int | tuple[str, ...] | str]


@dataclass(frozen=True, slots=True)
class Digit:
    """One digit of a mixed-radix number: `offset` + the index of `axis`, in [0, `radix`).

    `size` is the axis' own length; where it is less than `radix` the rest is room, filled by other parts of a sum or by nobody.
    `group` is the axis as the table wrote it, before a split: the name that mesh rules go by.
    """

    axis: str
    size: int
    radix: int
    offset: int = 0
    group: str = ""


Dim = tuple[Digit, ...]


@dataclass(frozen=True, slots=True)
class Hole:
    """A number or a label in a tensor's name."""

    dim: Dim
    start: int = 0
    labels: tuple[str, ...] = ()

    def spell(self, index: Mapping[str, int]) -> str:
        """The text that stands in the name for these axis indices."""
        value = encode(self.dim, index)
        return self.labels[value] if self.labels else str(value + self.start)

    def read(self, text: str) -> dict[str, int] | None:
        """The axis indices that `text` spells, or None where it spells none."""
        if self.labels:
            value = self.labels.index(text) if text in self.labels else -1
        else:
            value = int(text) - self.start if str(int(text)) == text else -1
        return decode(self.dim, value) if 0 <= value < math.prod(d.radix for d in self.dim) else None


@dataclass(frozen=True, slots=True)
class Address:
    """A name template with `{}` for each hole, and dims; see `address`."""

    name: str
    holes: tuple[Hole, ...]
    dims: tuple[Dim, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each tensor of this address."""
        return tuple(math.prod(digit.radix for digit in dim) for dim in self.dims)

    @property
    def named(self) -> dict[str, int]:
        """The axes that are in the name, with their sizes."""
        return {digit.axis: digit.size for hole in self.holes for digit in hole.dim}

    @property
    def sizes(self) -> dict[str, int]:
        """All axes with their sizes."""
        return self.named | {digit.axis: digit.size for dim in self.dims for digit in dim}

    @property
    def has_room(self) -> bool:
        """Whether its tensors have places that it does not fill."""
        return any(digit.size < digit.radix for dim in self.dims for digit in dim)

    def key(self, index: Mapping[str, int]) -> str:
        """The name of the tensor that holds the element at `index`; axes that are not in the name do not matter.

        >>> address("h.{layers}.w", "embed", {"layers": 2, "embed": 4}).key({"layers": 1})
        'h.1.w'
        """
        return self.name.format(*(hole.spell(index) for hole in self.holes))

    def keys(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Every tensor of this address: its name, and the indices of the axes that are in it."""
        named = self.named
        for values in itertools.product(*(range(size) for size in named.values())):
            index = dict(zip(named, values, strict=True))
            yield self.key(index), index

    def match(self, key: str) -> dict[str, int] | None:
        """The axis indices that `key` spells, or None where it is not a tensor of this address.

        >>> address("h.{layers+3}.w", "embed", {"layers": 2, "embed": 4}).match("h.4.w")
        {'layers': 1}
        """
        found = _pattern(self).fullmatch(key)
        if found is None:
            return None
        index: dict[str, int] = {}
        for hole, text in zip(self.holes, found.groups(), strict=True):
            part = hole.read(text)
            if part is None or any(index.get(axis, i) != i for axis, i in part.items()):
                return None
            index |= part
        return index


@lru_cache(maxsize=4096)
def _pattern(address: Address) -> re.Pattern[str]:
    pieces = [re.escape(text) for text in address.name.split("{}")]
    holes = ["(" + ("|".join(map(re.escape, hole.labels)) or "[0-9]+") + ")" for hole in address.holes]
    return re.compile("".join(text + hole for text, hole in itertools.zip_longest(pieces, holes, fillvalue="")))


def encode(dim: Dim, index: Mapping[str, int]) -> int:
    """The position of `index` along a dim, by Horner's rule."""
    value = 0
    for digit in dim:
        value = value * digit.radix + digit.offset + index[digit.axis]
    return value


def decode(dim: Dim, value: int) -> dict[str, int] | None:
    """The axis indices at a position along a dim, or None where it falls into room."""
    index: dict[str, int] = {}
    for digit in reversed(dim):
        value, place = divmod(value, digit.radix)
        if not 0 <= place - digit.offset < digit.size:
            return None
        index[digit.axis] = place - digit.offset
    return index


def address(name: str, dims: str, axes: Axes, part: int = 0) -> Address:
    """Reads the notation of an address (see the top of this file); raises ValueError that says which token is wrong.

    >>> address("layers.{layers}.qkv", "((heads | kv_heads | kv_heads) head_dim) embed",
    ...         {"layers": 2, "heads": 8, "kv_heads": 2, "head_dim": 4, "embed": 16}, part=1).shape
    (48, 16)
    """
    texts = re.findall(r"\{(.*?)\}", name)
    holes = tuple(_hole(text, axes) for text in texts)
    parsed = tuple(_dim(group, axes, part) for group in groups(dims))
    used = [digit.axis for dim in parsed for digit in dim] + [d.axis for hole in holes for d in hole.dim]
    if twice := {axis for axis in used if used.count(axis) > 1}:
        raise ValueError(f"{name} [{dims}]: axis {', '.join(sorted(twice))} stands twice")
    return Address(re.sub(r"\{.*?\}", "{}", name), holes, parsed)


def groups(dims: str) -> list[str]:
    """Splits dims into their top-level groups.

    >>> groups("(heads head_dim) embed")
    ['(heads head_dim)', 'embed']
    """
    found, depth = [""], 0
    for character in dims:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == " " and depth == 0:
            found.append("")
        else:
            found[-1] += character
    if depth != 0:
        raise ValueError(f"[{dims}]: the brackets do not match")
    return [group for group in found if group]


def _hole(text: str, axes: Axes) -> Hole:
    body, _, start = text.partition("+")
    dim = tuple(digit for token in body.split() for digit in _axis(token, axes))
    if not dim:
        raise ValueError(f"{{{text}}}: a hole needs an axis")
    labels = axes.get(body.strip()) if len(dim) == 1 else None
    return Hole(dim, _length(start.strip(), axes) if start else 0, labels if isinstance(labels, tuple) else ())


def _dim(text: str, axes: Axes, part: int) -> Dim:
    inner = text[1:-1] if text.startswith("(") else text
    tokens = groups(inner)
    if "|" in tokens:
        return _sum(inner, axes, part)
    return tuple(
        digit
        for token in tokens
        if token != "1"
        for digit in (_dim(token, axes, part) if token.startswith("(") else _axis(token, axes))
    )


def _sum(text: str, axes: Axes, part: int) -> Dim:
    """The digits of one term among others: all share the dim, this one starts where those before it end."""
    terms = [term.strip() for term in _terms(text)]
    lengths = [_length(term, axes) for term in terms]
    if not 0 <= part < len(terms) or terms[part].isdigit():
        raise ValueError(f"({text}): there is no axis at part {part}")
    outer, *inner = _dim(f"({terms[part]})", axes, part)
    rest = math.prod(digit.radix for digit in inner)
    total, before = sum(lengths), sum(lengths[:part])
    if total % rest or before % rest:
        raise ValueError(f"({text}): part {part} does not start or end at a multiple of {rest}")
    return (Digit(outer.axis, outer.size, total // rest, before // rest, outer.group), *inner)


def _terms(text: str) -> list[str]:
    found: list[list[str]] = [[]]
    for group in groups(text):
        if group == "|":
            found.append([])
        else:
            found[-1].append(group)
    return [" ".join(term) for term in found]


def _length(text: str, axes: Axes) -> int:
    """The length of a term: a number, an axis, or several axes flattened."""
    if text.isdigit():
        return int(text)
    tokens = groups(text[1:-1] if text.startswith("(") and text.endswith(")") else text)
    return math.prod(digit.radix for token in tokens for digit in _axis(token, axes))


def _axis(token: str, axes: Axes) -> Dim:
    if token not in axes:
        raise ValueError(f"axis {token!r} has no size; known: {', '.join(sorted(axes))}")
    size = axes[token]
    if isinstance(size, str):
        finer = (digit for name in size.split() for digit in _axis(name, axes))
        return tuple(Digit(digit.axis, digit.size, digit.radix, group=token) for digit in finer)
    length = len(size) if isinstance(size, tuple) else size
    return (Digit(token, length, length, group=token),)
