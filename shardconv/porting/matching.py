"""Matching: a mapping that nobody wrote, proposed from layers, shapes, names and order, and never guessed.

Each layer of the checkpoint fits some modules of the model: those with arrays that a layer rule fills from its tensors, exactly. Of these
one is taken where

    1. it has the layer's name, spelled as code bases differ (`layer.0.attention.q_proj`, `layers_0.attn.query`), and no other has;
    2. it is the only one that the layer fits, and no other layer fits it;
    3. its name is nearer to the layer's than that of any other, and the layer's is nearer to it than any other's; numbers must agree.

What is left is open, and said to be: Linen's own names (`Conv_3`) say nothing. A function that runs the model settles it
(`agrees`): layers that fit the same modules are tried in the order of both sides, few of them in every order, and what makes
the model compute what PyTorch does is taken if it is one thing only.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardconv.porting.folding import names
from shardconv.porting.layers import layers_of
from shardconv.porting.mapping import matched, written
from shardconv.porting.moves import Bound
from shardconv.porting.resolving import alike, arrays_in, fitting_choices, table_of
from shardconv.porting.rules import Choice, Layer
from shardconv.porting.sources import Weights
from shardconv.porting.trees import Tree

# Assignments that are tried at most by running the model; each is a conversion and a forward.
TRIES = 720

# Words that code bases use for the same thing, and words that say nothing: modules that only hold others.
SYNONYMS = {
    "attention": "attn",
    "batchnorm": "norm",
    "bn": "norm",
    "classifier": "head",
    "conv2d": "conv",
    "dense": "fc",
    "down": "downsample",
    "embedding": "embed",
    "embeddings": "embed",
    "groupnorm": "norm",
    "k": "key",
    "layernorm": "norm",
    "linear": "fc",
    "ln": "norm",
    "out": "o",
    "output": "o",
    "q": "query",
    "v": "value",
    **dict.fromkeys("batch block blocks decoder encoder group h layer layers model module net proj self".split(), ""),
}


@dataclass(frozen=True)
class Open:
    """A layer that has more than one place, or none, with the modules that it fits."""

    layer: Layer
    places: tuple[str, ...]


@dataclass
class Proposal:
    """Moves that are certain, by the layer that they come from, and what is open."""

    choices: dict[str, Choice | None] = field(default_factory=dict)  # None: a layer without a rule, its arrays are alike
    moves: list[Bound] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    open: list[Open] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)  # arrays that nothing fills

    def text(self, tree: Tree, ignore: Sequence[str]) -> str:
        """The proposal as a mapping to edit; what is open is a comment."""
        remarks = {}
        for name in self.empty:
            fits = [one.layer.name for one in self.open if any(name == place or name.startswith(f"{place}.") for place in one.places)]
            said = f"open: fits {', '.join(fits[:8])}{' and others' if len(fits) > 8 else ''}" if fits else "open: nothing fits"
            remarks[name] = (f"{said}; the array is {tree.shapes[name]}",)
        return written([move.move for move in self.moves], remarks, ignore)


Fits = dict[str, dict[str, list[list[Bound]]]]  # layer, module, and the ways in which the one fits the other


@dataclass(frozen=True)
class _Matcher:
    """What is known before anything is decided: the layers' views, and where each fits."""

    weights: Weights
    tree: Tree
    views: Mapping[str, tuple[Layer, ...]]
    fits: Fits
    chosen: dict[tuple[str, str], Choice]


def proposed(weights: Weights, tree: Tree, ignore: Sequence[str] = (), agrees: Callable[[list[Bound]], bool] | None = None) -> Proposal:
    """A mapping for a checkpoint and a model. `agrees` tells whether the model computes what it should under complete moves."""
    matcher = _matcher(weights, tree, ignore)
    places = _by_names_and_shapes(matcher.fits)
    if agrees is not None and (len(places) < len(matcher.fits) or _has_ways(matcher, places)):
        for complete, moves in _tried(matcher, places, agrees):
            return _proposal(matcher, complete, moves)
    moves = [move for layer, place in places.items() if len(ways := matcher.fits[layer][place]) == 1 for move in ways[0]]
    return _proposal(matcher, places, moves)


def words(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The words of a name that mean something, and its numbers.

    >>> words("encoder.layer.0.attention.q_proj"), words("layers_0.attn.query")
    ((('attn', 'query'), (0,)), (('attn', 'query'), (0,)))
    """
    parts = re.findall(r"[a-z]+(?:[0-9]d)?|[0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())
    meant = [SYNONYMS.get(part, part) for part in parts if not part.isdigit()]
    return tuple(word for word in meant if word), tuple(int(part) for part in parts if part.isdigit())


def likeness(one: str, other: str) -> float:
    """How alike two names are, from 0 to 1; 0 where their numbers differ."""
    (a, numbers), (b, others) = words(one), words(other)
    if numbers != others:
        return 0.0
    shared = sum(min(a.count(word), b.count(word)) for word in set(a))
    return 2 * shared / (len(a) + len(b)) if a or b else 1.0


def _matcher(weights: Weights, tree: Tree, ignore: Sequence[str]) -> _Matcher:
    modules = list(dict.fromkeys(name[: dot.start()] for name in tree.leaves for dot in re.finditer(r"\.", name)))
    known = {target.rpartition(".")[2] for rules in table_of(tree).rules.values() for rule in rules for target in rule.targets}
    bare = [name for name in tree.leaves if name.rpartition(".")[2] not in known]  # arrays that are no layer's
    kept = [name for name in weights.tensors if not matched(name, ignore)]
    views = layers_of(kept, weights.kinds)
    fits: Fits = {}
    chosen: dict[tuple[str, str], Choice] = {}
    misfits: set[object] = set()  # what a layer and a module that do not fit look like: most are many times there
    looks = {module: _look(module, tree) for module in ["", *modules, *bare]}
    for layer, seen in views.items():
        found = {}
        own = (seen[0].kinds, tuple((inner, str(weights.shapes[names(one)[0]])) for inner, one in seen[-1].tensors.items()))
        for module, look in looks.items():
            ways = [] if (own, look) in misfits else fitting_choices(seen, module, weights, tree, rare=False)
            if not ways:
                misfits.add((own, look))
            if ways:
                found[module] = [way.moves for way in ways]
                chosen[layer, module] = ways[0]
            elif (moves := alike(seen[-1], module, weights, tree)) is not None:
                found[module] = [moves]
        if found or not all(name in weights.tied for expression in seen[0].tensors.values() for name in names(expression)):
            fits[layer] = found
    return _Matcher(weights, tree, views, fits, chosen)


def _look(module: str, tree: Tree) -> object:
    """All of a module that decides which layers fit it: its class, and the names and shapes of its arrays."""
    there = tree.classes.get(module)
    arrays = tuple((inner, tree.shapes[name]) for inner, name in arrays_in(tree, module).items())
    return type(there).__name__, getattr(there, "transpose_kernel", None), arrays


def _by_names_and_shapes(fits: Fits) -> dict[str, str]:
    """The places that are certain; see the top of this file."""
    places: dict[str, str] = {}
    while True:
        free = {layer: [place for place in found if place not in places.values()] for layer, found in fits.items() if layer not in places}
        step = _same_names(free) or _only(free) or _nearest(free)
        if not step:
            return places
        places |= step


def _same_names(free: Mapping[str, Sequence[str]]) -> dict[str, str]:
    found = {layer: [place for place in options if words(place) == words(layer)] for layer, options in free.items()}
    return _unshared({layer: options[0] for layer, options in found.items() if len(options) == 1})


def _only(free: Mapping[str, Sequence[str]]) -> dict[str, str]:
    wanted = [place for options in free.values() for place in options]
    return {layer: options[0] for layer, options in free.items() if len(options) == 1 and wanted.count(options[0]) == 1}


def _nearest(free: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Pairs that prefer each other to all others."""
    likes = {(layer, place): likeness(layer, place) for layer, options in free.items() for place in options}
    found = {}
    for (layer, place), score in likes.items():
        rivals = [other for (a, b), other in likes.items() if (a == layer) != (b == place)]
        if score > max(rivals, default=0.0):
            found[layer] = place
    return found


def _unshared(found: dict[str, str]) -> dict[str, str]:
    """Without the places that more than one layer would take."""
    return {layer: place for layer, place in found.items() if list(found.values()).count(place) == 1}


def _has_ways(matcher: _Matcher, places: Mapping[str, str]) -> bool:
    return any(len(matcher.fits[layer][place]) > 1 for layer, place in places.items())


def _tried(
    matcher: _Matcher, places: dict[str, str], agrees: Callable[[list[Bound]], bool]
) -> Iterator[tuple[dict[str, str], list[Bound]]]:
    """The complete assignment that agrees, if there is one and only one among those that are tried."""
    agreed: list[tuple[dict[str, str], list[Bound]]] = []
    for complete in itertools.islice(_assignments(matcher, places), TRIES):
        ways = [matcher.fits[layer][place] for layer, place in complete.items()]
        for moves in itertools.islice(itertools.product(*ways), TRIES):
            flat = [move for some in moves for move in some]
            if agrees(flat):
                agreed.append((complete, flat))
    if len(agreed) == 1:
        yield agreed[0]


def _assignments(matcher: _Matcher, places: dict[str, str]) -> Iterator[dict[str, str]]:
    """Ways to place the layers that are open: groups that fit the same modules, in order, and small ones in every order."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for layer, found in matcher.fits.items():
        if layer not in places:
            groups.setdefault(tuple(place for place in found if place not in places.values()), []).append(layer)
    if any(len(options) != len(layers) for options, layers in groups.items()):
        return
    total = math.prod(math.factorial(len(layers)) for layers in groups.values())
    orders = []
    for options, layers in groups.items():
        ordered = sorted(options, key=natural)
        every = itertools.permutations(ordered) if total <= TRIES else [tuple(ordered)]
        orders.append([dict(zip(layers, order, strict=True)) for order in every])
    for parts in itertools.product(*orders):
        yield {**places, **{layer: place for part in parts for layer, place in part.items()}}


def natural(name: str) -> list[tuple[int, str]]:
    """The key by which `Conv_10` comes after `Conv_9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"[0-9]+|[^0-9]+", name)]


def _proposal(matcher: _Matcher, places: dict[str, str], moves: list[Bound]) -> Proposal:
    filled = {name for move in moves for name, _ in move.target.keys()}
    settled = {layer for layer in places if all(name in filled for way in matcher.fits[layer][places[layer]] for name in _targets(way))}
    taken = [places[layer] for layer in settled]
    left = [
        Open(matcher.views[layer][0], tuple(place for place in found if place not in taken))
        for layer, found in matcher.fits.items()
        if layer not in settled
    ]
    choices = {layer: matcher.chosen.get((layer, place)) for layer, place in places.items() if layer in settled}
    return Proposal(choices, moves, {layer: places[layer] for layer in settled}, left, [n for n in matcher.tree.leaves if n not in filled])


def _targets(moves: Sequence[Bound]) -> list[str]:
    return [name for move in moves for name, _ in move.target.keys()]
