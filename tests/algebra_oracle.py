"""What an address means, written out element by element: the oracle of the algebra's tests. It shares no code with shardconv.

A `Place` is one side of a conversion as trees, and the notation that says the same. The notation goes to `shardconv.axes.address`;
`World.stored` follows the trees: it numbers the elements of the index space and puts each number into its tensor, by Horner's rule, with
-1 where a tensor has room. `worlds` draws two places over the same axes, of every kind the notation has.

SHARDCONV_LAWS chooses how much is tried: `thorough` for a long run; `mutants`, for scripts/mutate.py, tries the same examples each time
and spends no time on making a failure small.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from shardconv.axes import Address, address
from shardconv.boxes import Box
from shardconv.route import pieces

EFFORT = os.environ.get("SHARDCONV_LAWS", "normal")
EXAMPLES = {"mutants": 400, "normal": 1000, "thorough": 30_000}[EFFORT]


def laws(share: float = 1.0) -> settings:
    """Hypothesis' settings for a law: `share` of the usual number of examples."""
    mutants = EFFORT == "mutants"
    return settings(
        max_examples=max(int(EXAMPLES * share), 10),
        deadline=None,
        derandomize=mutants,
        phases=[Phase.explicit, Phase.generate] if mutants else list(Phase),
        suppress_health_check=[HealthCheck.too_slow],
    )


@dataclass(frozen=True)
class Sum:
    """Terms side by side in one dim, of which number `part` is ours."""

    terms: tuple["Tree", ...]
    part: int


# An axis, a number of places that nobody fills, trees flattened (the outermost first), or a sum.
Tree = str | int | tuple["Tree", ...] | Sum


@dataclass(frozen=True)
class Blank:
    """A hole in a name: a number, counted from `start`, or a label."""

    tree: Tree
    start: int = 0
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """One side: in trees `texts`, `blanks` between them and `dims`; in notation `name`, `words` and `part`."""

    texts: tuple[str, ...]
    blanks: tuple[Blank, ...]
    dims: tuple[Tree, ...]
    name: str
    words: str
    part: int


@dataclass(frozen=True)
class World:
    """An index space of `sizes`, and two places in which it is kept; the notation is read with the table `axes`."""

    axes: Mapping[str, int | tuple[str, ...] | str]
    sizes: Mapping[str, int]
    lengths: Mapping[str, int]  # also of the axes that only other terms of a sum have
    source: Place
    target: Place
    dice: Random  # for what else a test chooses

    def address(self, place: Place) -> Address:
        return address(place.name, place.words, self.axes, place.part)

    def indices(self) -> list[dict[str, int]]:
        return [dict(zip(self.sizes, values, strict=True)) for values in np.ndindex(*self.sizes.values())]

    def key(self, place: Place, index: Mapping[str, int]) -> str:
        key = place.texts[0]
        for blank, text in zip(place.blanks, place.texts[1:], strict=True):
            at = position(blank.tree, index, self.lengths)
            key += (blank.labels[at] if blank.labels else f"{at + blank.start:d}") + text
        return key

    def stored(self, place: Place) -> dict[str, np.ndarray]:
        """Every tensor of a place, filled with the numbers of the elements, and with -1 where it has room."""
        shape = [length(dim, self.lengths) for dim in place.dims]
        tensors: dict[str, np.ndarray] = {}
        for number, index in enumerate(self.indices()):
            tensor = tensors.setdefault(self.key(place, index), np.full(shape, -1))
            at = tuple(position(dim, index, self.lengths) for dim in place.dims)
            assert tensor[at] == -1
            tensor[at] = number
        return tensors


def length(tree: Tree, lengths: Mapping[str, int]) -> int:
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return lengths[tree]
    if isinstance(tree, Sum):
        return sum(length(term, lengths) for term in tree.terms)
    return math.prod(length(part, lengths) for part in tree)


def position(tree: Tree, index: Mapping[str, int], lengths: Mapping[str, int]) -> int:
    """Where the element at `index` is along a dim or in a number, by Horner's rule."""
    assert not isinstance(tree, int)
    if isinstance(tree, str):
        return index[tree]
    if isinstance(tree, Sum):
        before = sum(length(term, lengths) for term in tree.terms[: tree.part])
        return before + position(tree.terms[tree.part], index, lengths)
    value = 0
    for part in tree:
        value = value * length(part, lengths) + position(part, index, lengths)
    return value


Token = tuple[str, tuple[str, ...]]  # a word of the notation: an axis or a name for finer ones, and the axes that it stands for
Table = dict[str, int | tuple[str, ...] | str]
LABELS = ("local", "global", "w1", "w10", "0", "7", "a.b", "c+", "q|k", "(d", "[e]", r"\w", ".*", "")


@st.composite
def worlds(draw: st.DrawFn, smallest: int = 1) -> World:
    """All from one seed: of many small choices hypothesis tries few combinations, and often the same on both sides."""
    dice = draw(st.randoms(use_true_random=True))
    names = list("abcde"[: dice.choice([0, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5])])
    sizes = {name: dice.choice([smallest, 2, 2, 3, 3, 4]) for name in names}
    lengths = {**sizes, "other": dice.randint(0, 3)}
    axes: Table = dict(lengths)
    for name in dice.sample(names, len(names) // 2):
        axes[name] = tuple(dice.sample(LABELS, sizes[name]))
    coarse: list[Token] = []
    free = dice.sample(names, len(names))
    while free and dice.random() < 0.4:
        count = dice.randint(1, min(3, len(free)))
        coarse.append((f"coarse{len(coarse)}", tuple(free[:count])))
        free = free[count:]
    axes |= {word: " ".join(finer) for word, finer in coarse}
    source, target = (_place(tag, dice, axes, lengths, names, coarse) for tag in ("source", "target"))
    return World(axes, sizes, lengths, source, target, dice)


def _place(
    tag: str, dice: Random, axes: Table, lengths: Mapping[str, int], names: Sequence[str], coarse: Sequence[Token]
) -> Place:
    """Deals the axes out to holes and dims in random order and groups, with room around some."""
    tokens = [token for token in coarse if dice.random() < 0.5]
    tokens += [(name, (name,)) for name in names if not any(name in finer for _, finer in tokens)]
    groups: list[list[Token]] = []
    for token in dice.sample(tokens, len(tokens)):
        if groups and dice.random() < 0.4:
            groups[-1].append(token)
        else:
            groups.append([token])
    part = dice.randint(0, 2)
    texts, blanks, name = [tag], [], tag
    dims: list[tuple[Tree, str]] = []
    for group in groups:
        kind = dice.choice(["hole", "dim", "dim", "sum"])
        if kind == "hole":
            between = dice.choice([".", "_", "/x", ".h1.", ".(*)+["])
            blank, word = _blank(dice, axes, lengths, group)
            texts[-1] += between
            texts.append("")
            blanks.append(blank)
            name += between + word
        else:
            dims.append(_sum(dice, lengths, group, part) if kind == "sum" else _flattened(dice, group))
        if dice.random() < 0.1:
            dims.append(((), dice.choice(["1", "()", "(1 1)"])))
    tail = dice.choice(["", ".weight", "2"])
    texts[-1] += tail
    words = dice.choice([" ", "  "]).join(word for _, word in dims)
    trees = tuple(tree for tree, _ in dims)
    return Place(tuple(texts), tuple(blanks), trees, name + tail, words, part if "|" in words else 0)


def _trees(group: Sequence[Token]) -> tuple[str, ...]:
    return tuple(axis for _, finer in group for axis in finer)


def _words(group: Sequence[Token]) -> str:
    return " ".join(word for word, _ in group)


def _flattened(dice: Random, group: Sequence[Token]) -> tuple[Tree, str]:
    inner = _words(group)
    if len(group) == 1:
        return _trees(group), dice.choice(["{}", "({})", "(1 {})", "( {} )"]).format(inner)
    return _trees(group), dice.choice([f"({inner})", f"({_words(group[:1])} ({_words(group[1:])}))"])


def _blank(dice: Random, axes: Table, lengths: Mapping[str, int], group: Sequence[Token]) -> tuple[Blank, str]:
    tree = _trees(group)
    labels = axes[tree[0]] if len(tree) == 1 else ()
    if isinstance(labels, tuple) and labels:
        return Blank(tree, 0, labels), "{" + _words(group) + "}"
    start = dice.choice(["", "", "0", "3", "98", *sorted(lengths)])
    plus = dice.choice(["+", " + "]) + start if start else ""
    return Blank(tree, int(lengths.get(start, start or 0))), "{" + _words(group) + plus + "}"


def _sum(dice: Random, lengths: Mapping[str, int], group: Sequence[Token], part: int) -> tuple[Tree, str]:
    """A dim with a sum whose term number `part` is some of the group; the rest stands before and after the sum."""
    cut = dice.randrange(len(group))
    end = dice.randint(cut + 1, len(group))
    outer, ours, inner = group[:cut], group[cut:end], group[end:]
    step = math.prod(lengths[axis] for axis in _trees(ours)[1:])
    if step == 0:
        return _flattened(dice, group)
    terms: list[tuple[Tree, str]] = []
    for number in range(part + 1 + dice.randint(0, 2)):
        if number == part:
            terms.append(_flattened(dice, ours) if dice.random() < 0.5 else (_trees(ours), _words(ours)))
        elif dice.random() < 0.5:
            room = step * dice.randint(0, 2)
            terms.append((room, str(room)))
        else:
            beside = ("other", *_trees(ours)[1:])
            terms.append((beside, " ".join(beside)))
    word = "(" + dice.choice([" | ", "|"]).join(words for _, words in terms) + ")"
    tree = (*_trees(outer), Sum(tuple(term for term, _ in terms), part), *_trees(inner))
    return tree, word if not outer and not inner else f"({_words(outer)} {word} {_words(inner)})"


def some_box(dice: Random, shape: Sequence[int]) -> Box:
    """Some sides whole, some not, few of them empty."""
    sides = []
    for n in shape:
        start, stop = sorted(dice.choices(range(n + 1), k=2)) if dice.random() < 0.6 else (0, n)
        sides.append((start, stop) if start < stop or dice.random() < 0.1 else (0, n))
    return tuple(sides)


def read(
    target: Address, source: Address, tensors: Mapping[str, np.ndarray], key: str, box: Box, empty: int = -1
) -> tuple[np.ndarray, int]:
    """A box of a target tensor, made of pieces of the source's tensors, and how many elements were read for it."""
    index = target.match(key)
    assert index is not None
    dtype = next((tensor.dtype for tensor in tensors.values()), np.dtype(int))
    out = np.full([stop - start for start, stop in box], empty, dtype)
    count = 0
    for piece in pieces(target, source, index, box):
        block = tensors[piece.key][tuple(slice(*side) for side in piece.box)]
        piece.land(np.ascontiguousarray(block).reshape(block.shape), out)
        count += block.size
    return out, count
