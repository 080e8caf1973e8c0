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

# A number in a name. No axis is longer than 18 digits, and Python refuses to read a number of thousands.
DIGITS = 18
DECIMAL = f"([0-9]{{1,{DIGITS}}})"


@dataclass(frozen=True, slots=True)
class Digit:
    """One digit of a mixed-radix number: `offset` + the index of `axis`, in [0, `radix`).

    `size` is the axis' own length; where it is less than `radix` the rest is room, filled by other parts of a sum or by nobody.
    """

    axis: str
    size: int
    radix: int
    offset: int = 0


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
        return decode(self.dim, value)


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
            if part is None:
                return None
            index |= part
        return index


@lru_cache(maxsize=4096)
def _pattern(address: Address) -> re.Pattern[str]:
    pieces = [re.escape(text) for text in address.name.split("{}")]
    holes = ["(" + "|".join(map(re.escape, hole.labels)) + ")" if hole.labels else DECIMAL for hole in address.holes]
    return re.compile("".join(text + hole for text, hole in itertools.zip_longest(pieces, holes, fillvalue="")))


def encode(dim: Dim, index: Mapping[str, int]) -> int:
    """The position of `index` along a dim, by Horner's rule."""
    value = 0
    for digit in dim:
        value = value * digit.radix + digit.offset + index[digit.axis]
    return value


def decode(dim: Dim, value: int) -> dict[str, int] | None:
    """The axis indices at a position along a dim, or None where it falls into room or outside."""
    if not 0 <= value < math.prod(digit.radix for digit in dim):
        return None
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
    try:
        texts, holes = _template(name, axes)
        parsed = tuple(_dim(group, axes, part) for group in groups(dims))
        used = [digit.axis for dim in (*parsed, *(hole.dim for hole in holes)) for digit in dim]
        if twice := sorted({axis for axis in used if used.count(axis) > 1}):
            raise ValueError(f"axis {', '.join(twice)} stands twice")
        if part and "|" not in dims:
            raise ValueError(f"there is no sum to take part {part} of")
    except ValueError as error:
        raise ValueError(f"{name} [{dims}]: {error}") from None
    return Address("{}".join(texts), holes, parsed)


def groups(dims: str) -> list[str]:
    """Splits dims into their top-level groups.

    >>> groups("(heads head_dim) embed")
    ['(heads head_dim)', 'embed']
    """
    found, depth = [""], 0
    for character in dims:
        if depth == 0 and character in " (|":
            found.append("")
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if depth or character != " ":
            found[-1] += character
        if depth == 0 and character in ")|":
            found.append("")
    if depth != 0:
        raise ValueError(f"the brackets of {dims!r} do not match")
    return [group for group in found if group]


def _template(name: str, axes: Axes) -> tuple[list[str], tuple[Hole, ...]]:
    """The texts of a name, and the holes between them."""
    parts = re.split(r"\{(.*?)\}", name)
    texts, holes = parts[::2], parts[1::2]
    if any(brace in part for part in parts for brace in "{}"):
        raise ValueError("the braces do not match")
    if any(not text.strip("0123456789") for text in texts[1:-1]):
        raise ValueError("two holes with nothing but digits between them can be read in two ways")
    return texts, tuple(_hole(text, axes) for text in holes)


def _hole(text: str, axes: Axes) -> Hole:
    body, plus, start = text.partition("+")
    dim = tuple(digit for token in body.split() for digit in _axis(token, axes))
    if not dim:
        raise ValueError(f"{{{text}}} names no axis")
    size = axes[dim[0].axis]
    labels = size if len(dim) == 1 and isinstance(size, tuple) else ()
    if plus and labels:
        raise ValueError(f"{{{text}}}: labels take no offset")
    first = _length([start.strip()], axes) if plus else 0
    if len(str(first + math.prod(digit.size for digit in dim))) > DIGITS:
        raise ValueError(f"{{{text}}}: a number in a name has {DIGITS} digits at most")
    return Hole(dim, first, labels)


def _dim(group: str, axes: Axes, part: int) -> Dim:
    """The digits of one group: an axis, several in brackets, or one term of a sum."""
    if not group.startswith("("):
        return () if group == "1" else _axis(group, axes)
    inner = groups(group[1:-1])
    if "|" in inner:
        return _sum(group, inner, axes, part)
    return tuple(digit for token in inner for digit in _dim(token, axes, part))


def _sum(group: str, inner: list[str], axes: Axes, part: int) -> Dim:
    """The digits of one term among others: all share the dim, this one starts where those before it end."""
    terms = [list(term) for bar, term in itertools.groupby(inner, "|".__eq__) if not bar]
    if len(terms) != inner.count("|") + 1:
        raise ValueError(f"{group} has an empty term")
    if any("|" in token for term in terms for token in term):
        raise ValueError(f"{group} has a sum in a sum")
    if not 0 <= part < len(terms) or all(token.isdigit() for token in terms[part]):
        raise ValueError(f"{group} has no axis at part {part}")
    outer, *rest = (digit for token in terms[part] for digit in _dim(token, axes, part))
    lengths = [_length(term, axes) for term in terms]
    step, total, before = math.prod(digit.radix for digit in rest), sum(lengths), sum(lengths[:part])
    if not step or total % step or before % step:
        raise ValueError(f"{group}: part {part} starts at {before} of {total}, and both must be multiples of {step}")
    return (Digit(outer.axis, outer.size, total // step, before // step), *rest)


def _length(term: list[str], axes: Axes) -> int:
    """The length of a term: a number, an axis, or several axes flattened."""
    return math.prod(
        int(token) if token.isdigit() else math.prod(digit.radix for digit in _dim(token, axes, 0)) for token in term
    )


def _axis(token: str, axes: Axes) -> Dim:
    if token not in axes:
        raise ValueError(f"axis {token!r} has no size; known: {', '.join(sorted(axes))}")
    size = axes[token]
    if isinstance(size, str):
        return tuple(digit for name in size.split() for digit in _axis(name, axes))
    if isinstance(size, tuple) and len(set(size)) < len(size):
        raise ValueError(f"axis {token!r} has a label twice")
    length = len(size) if isinstance(size, tuple) else size
    return (Digit(token, length, length),)
