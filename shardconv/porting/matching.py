"""Matching: a mapping that nobody wrote, proposed from layers, shapes, names and two followed runs, and never guessed.

Each layer of the checkpoint fits some modules of the model: those with arrays that a layer rule fills from its tensors, exactly; so does a
stack of layers, if the model has one (`stacks`). Where both models have been followed in a run, only places are left that their flow allows
(`flow`). Of these one is taken where

    1. it has the layer's name, spelled as code bases differ (`layer.0.attention.q_proj`, `layers_0.attn.query`), and no other has;
    2. it is the only one that the layer fits, and no other layer fits it;
    3. its name is nearer to the layer's than that of any other, and the layer's is nearer to it than any other's; numbers must agree.

What is left is open, and said to be: Linen's own names (`Conv_3`) say nothing. A function that runs the model settles it
(`agrees`): layers that fit the same modules are tried in the order of both sides, few of them in every order, and taken is what all
have in common that make the model compute what PyTorch does. What the flow has settled is confirmed in the same way.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from shardconv.porting.bare import apart, bare_move
from shardconv.porting.flattening import Suspect, suspects
from shardconv.porting.flow import Flow, Members
from shardconv.porting.folding import names
from shardconv.porting.layers import layers_of
from shardconv.porting.mapping import matched, written
from shardconv.porting.moves import Bound
from shardconv.porting.resolving import alike, arrays_in, fitting_choices, table_of
from shardconv.porting.rules import Choice, Layer
from shardconv.porting.sources import Weights
from shardconv.porting.stacks import AXIS, Stack, stacks
from shardconv.porting.trees import Tree
from shardconv.toml import toml_value

# Assignments that are tried at most by running the model; each is a conversion and a forward.
TRIES = 720

# Words that code bases use for the same thing, and words that say nothing: modules that only hold others.
SYNONYMS = {
    "attention": "attn",
    "batchnorm": "norm",
    "bn": "norm",
    "classifier": "head",
    "cls": "class",
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
    "registers": "register",
    "tokens": "token",
    "v": "value",
    **dict.fromkeys("batch block blocks decoder encoder group h layer layers model module net proj self".split(), ""),
}

# Why a layer that fits several modules is open.
NAMES = "its name does not say which"
BOTH = "neither its name nor the flow of both models says which"


@dataclass(frozen=True)
class Open:
    """A layer that has more than one place, or none, with the modules that it fits; `tensors` are all that are of it. `turned` are modules
    that it fits by its shapes only: what they do with their arrays is something else. `ways` are those in which it fits its only place."""

    layer: Layer
    tensors: tuple[str, ...]
    places: tuple[str, ...]
    turned: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()

    @property
    def how(self) -> str:
        """Of a layer that fits its only place in several ways, these in words."""
        return f" as {', or as '.join(self.ways)}" if len(self.ways) > 1 else ""


@dataclass
class Proposal:
    """Moves that are certain, by the layer that they come from, and what is open."""

    choices: dict[str, Choice | None] = field(default_factory=dict)  # None: a layer without a rule, its arrays are alike
    moves: list[Bound] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    open: list[Open] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)  # arrays that nothing fills
    suspects: Mapping[str, Suspect] = field(default_factory=dict)  # arrays that are filled, perhaps in another order than is flattened
    why: str = NAMES
    untraced: str = ""  # why no run was followed

    def text(self, tree: Tree, ignore: Sequence[str]) -> str:
        """The proposal as a mapping to edit; what is open is a comment."""
        remarks: dict[str, tuple[str, ...]] = {name: suspect.remark for name, suspect in self.suspects.items()}
        for name in self.empty:
            near = [one for one in self.open if any(name == place or name.startswith(f"{place}.") for place in one.places)]
            fits = [one.layer.name + one.how for one in near]
            said = f"open: fits {', '.join(fits[:8])}{' and others' if len(fits) > 8 else ''}" if fits else "open: nothing fits"
            remarks[name] = (f"{said}; the array is {tree.shapes[name]}", f'{toml_value(name)} = ""')
        return written([move.move for move in self.moves if move.move.target not in self.suspects], remarks, ignore)


Fits = dict[str, dict[str, list[list[Bound]]]]  # layer, module, and the ways in which the one fits the other


@dataclass(frozen=True)
class _Matcher:
    """What is known before anything is decided: the layers' views, stacks of them, and where each fits."""

    weights: Weights
    tree: Tree
    views: Mapping[str, tuple[Layer, ...]]
    stacks: Mapping[str, Stack]
    fits: Fits
    shaped: Fits  # by shapes alone
    chosen: dict[tuple[str, str], list[Choice]]

    def tensors(self, layer: str) -> list[list[str]]:
        """The names of a layer's tensors; of a stack those of each member."""
        members = self.stacks[layer].members if layer in self.stacks else self.views[layer][:1]
        return [[name for expression in member.tensors.values() for name in names(expression)] for member in members]


def proposed(
    weights: Weights,
    tree: Tree,
    ignore: Sequence[str] = (),
    agrees: Callable[[list[Bound]], bool] | None = None,
    flow: Flow | None = None,
) -> Proposal:
    """A mapping for a checkpoint and a model. `agrees` tells whether the model computes what it should under complete moves, `flow` what
    both models do with their arrays."""
    return replace(_best(_matcher(weights, tree, ignore), agrees, flow), why=BOTH if flow else NAMES)


def _best(matcher: _Matcher, agrees: Callable[[list[Bound]], bool] | None, flow: Flow | None) -> Proposal:
    places = _by_names_and_shapes(matcher.fits)
    narrow, found = (matcher, places) if flow is None else _narrowed(matcher, flow)
    changed = narrow.fits != matcher.fits
    if proposal := _settled(narrow, found, agrees, confirm=changed):
        return proposal
    if changed and agrees is not None:  # what the flow says has not been confirmed: names alone may, but only if the model agrees
        if proposal := _settled(matcher, places, agrees, confirm=True):
            return proposal
        found = {layer: place for layer, place in found.items() if places.get(layer) == place}
        found = {layer: place for layer, place in found.items() if narrow.fits[layer][place] == matcher.fits[layer][place]}
    proposal = _proposal(narrow, found)
    seen = flow.jax.inside if flow else {}
    odd = {name: suspect for name, suspect in suspects(proposal.choices).items() if name not in seen}
    if odd and not proposal.open and agrees is not None and agrees(proposal.moves):
        odd = {}
    return replace(proposal, suspects=odd)


def _settled(
    matcher: _Matcher, places: dict[str, str], agrees: Callable[[list[Bound]], bool] | None, confirm: bool = False
) -> Proposal | None:
    """What all assignments have in common with which the model agrees, if something was open, or is to be confirmed."""
    if agrees is None or not (confirm or len(places) < len(matcher.fits) or _has_ways(matcher, places)):
        return None
    agreed = list(_tried(matcher, places, agrees))
    if not agreed:
        return None
    common = {layer: way for layer, way in agreed[0].items() if all(other[layer] == way for other in agreed)}
    moves = [move for _, way in common.values() for move in way]
    return _proposal(matcher, {layer: place for layer, (place, _) in common.items()}, moves)


def _narrowed(matcher: _Matcher, flow: Flow) -> tuple[_Matcher, dict[str, str]]:
    """The places and ways that the flow of both models allows, and what is certain then."""
    shapes = matcher.weights.shapes, matcher.tree.shapes
    fits: Fits = {}
    for layer, found in matcher.fits.items():
        turned = {place: [flow.flattened(way, *shapes) for way in ways if flow.turned(way)] for place, ways in found.items()}
        fits[layer] = {place: ways for place, ways in turned.items() if ways}
    layers = {layer: Members(matcher.tensors(layer), layer in matcher.stacks) for layer in fits}
    arrays = {place: _targets(way) for found in fits.values() for place, ways in found.items() for way in ways}
    members = {place: Members([names]) for place, names in arrays.items()}
    places: dict[str, str] = {}
    while True:
        options = flow.narrowed({layer: list(found) for layer, found in fits.items()}, layers, members, places)
        narrowed = {layer: {place: fits[layer][place] for place in found} for layer, found in options.items()}
        settled = _by_names_and_shapes(narrowed)
        if settled == places and narrowed == fits:
            return replace(matcher, fits=fits), places
        fits, places = narrowed, settled


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


def _matcher(weights: Weights, tree: Tree, ignore: Sequence[str], rare: Set[str] = frozenset()) -> _Matcher:
    """What fits what. Where a layer of a state dict fits as nothing but transformers' Conv1D, square ones may be that too."""
    modules = list(dict.fromkeys(name[: dot.start()] for name in tree.leaves for dot in re.finditer(r"\.", name)))
    rows = [row for rules in table_of(tree).rules.values() for rule in rules for row in rule.rows]
    known = {row.target.rpartition(".")[2] for row in rows}
    stored = {name for row in rows for name in names(row.expression)}  # names of tensors that rules know
    bare = [name for name in tree.leaves if name.rpartition(".")[2] not in known]  # arrays that are no layer's
    kept = [name for name in weights.tensors if not matched(name, ignore)]
    views = apart(layers_of(kept, weights.kinds), stored)
    there = stacks(views, weights.shapes)
    looks = {module: _look(module, tree) for module in ["", *modules, *bare]}
    misfits: set[object] = set()  # what a layer and a module that do not fit look like: most are many times there
    fits: Fits = {}
    chosen: dict[tuple[str, str], list[Choice]] = {}
    for layer, seen in [*views.items(), *((name, stack.views) for name, stack in there.items())]:
        found = {}
        first = there[layer].members[0] if layer in there else seen[-1]
        shapes = tuple((inner, str([weights.shapes[name] for name in names(one)])) for inner, one in first.tensors.items())
        own, axis = (layer in there, seen[0].kinds, shapes), AXIS if layer in there else ""
        for module, look in looks.items():
            ways = [] if (own, look) in misfits else fitting_choices(seen, module, weights, tree, rare=False, stack=axis, seen=rare)
            ways = [way for way in ways if not (axis and way.rule.zeros)]
            if not ways:
                misfits.add((own, look))
            if ways:
                found[module] = [way.moves for way in ways]
                chosen[layer, module] = ways
            elif (moves := alike(seen[-1], module, weights, tree, axis)) is not None:
                found[module] = [moves]
            elif alone := _bare(first, seen[-1], stored, module, weights, tree, axis):
                found[module] = [[alone]]
        if found or (layer not in there and not all(name in weights.tied for one in seen[0].tensors.values() for name in names(one))):
            fits[layer] = found
    if not rare and any(_is_turned(views[layer], looks, weights, tree) for layer, found in fits.items() if not found and layer in views):
        return _matcher(weights, tree, ignore, frozenset({"Conv1D"}))
    kept_stacks, fits = _one_or_all(there, fits)
    return _Matcher(weights, tree, views, kept_stacks, fits, fits, chosen)


def _is_turned(views: Sequence[Layer], modules: Iterable[str], weights: Weights, tree: Tree) -> bool:
    """Whether a layer of no known class fits some module as a Conv1D, and none otherwise."""
    if views[0].kinds or "weight" not in views[0].tensors:
        return False
    return any(choice.kind == "Conv1D" for module in modules for choice in fitting_choices(views, module, weights, tree))


def _bare(first: Layer, layer: Layer, known: Set[str], array: str, weights: Weights, tree: Tree, stack: str) -> Bound | None:
    """What fills an array of no layer, from a parameter of none, if their names have a word in common; `first` is the layer or, of a stack,
    its first."""
    shape = weights.shapes[names(next(iter(first.tensors.values())))[0]]
    if not set(words(layer.name)[0]) & set(words(array)[0]):
        return None
    return bare_move(layer, known, shape, array, weights.shapes, tree.shapes, stack)


def _one_or_all(there: Mapping[str, Stack], fits: Fits) -> tuple[dict[str, Stack], Fits]:
    """Stacks that have a place in the model, where their members have none in arrays of their own."""
    single = {place for layer, found in fits.items() if layer not in there for place in found}
    kept = {}
    for name, stack in there.items():
        members = [member.name for member in stack.members]
        elsewhere = {place: moves for place, moves in fits.get(name, {}).items() if place not in single}
        if elsewhere and all(member in fits for member in members):
            kept[name] = stack
            fits[name] = elsewhere
            for member in members:
                del fits[member]
    return kept, {layer: found for layer, found in fits.items() if layer not in there or layer in kept}


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
) -> Iterator[dict[str, tuple[str, list[Bound]]]]:
    """The complete assignments that agree, among those that are tried: for each layer its place and its moves."""
    for complete in itertools.islice(_assignments(matcher, places), TRIES):
        ways = [matcher.fits[layer][place] for layer, place in complete.items()]
        for moves in itertools.islice(itertools.product(*ways), TRIES):
            if agrees([move for some in moves for move in some]):
                yield {layer: (place, some) for (layer, place), some in zip(complete.items(), moves, strict=True)}


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


def _proposal(matcher: _Matcher, places: dict[str, str], moves: list[Bound] | None = None) -> Proposal:
    if moves is None:
        moves = [move for layer, place in places.items() if len(ways := matcher.fits[layer][place]) == 1 for move in ways[0]]
    filled = {name for move in moves for name, _ in move.target.keys()}
    settled = [layer for layer in places if all(name in filled for way in matcher.fits[layer][places[layer]] for name in _targets(way))]
    taken = [places[layer] for layer in settled]
    left = []
    for layer, found in matcher.fits.items():
        if layer not in settled:
            shown = matcher.stacks[layer].shown if layer in matcher.stacks else matcher.views[layer][0]
            tensors = tuple(name for member in matcher.tensors(layer) for name in member)
            turned = () if found else tuple(matcher.shaped[layer])
            free = tuple(place for place in found if place not in taken)
            forms = tuple(choice.name for choice in matcher.chosen.get((layer, free[0]), ())) if len(free) == 1 else ()
            left.append(Open(shown, tensors, free, turned, forms))
    choices = {layer: next(iter(matcher.chosen.get((layer, places[layer]), ())), None) for layer in matcher.fits if layer in settled}
    at = {name: places[layer] for layer in settled for name in _members(matcher, layer)}
    return Proposal(choices, moves, at, left, [name for name in matcher.tree.leaves if name not in filled])


def _members(matcher: _Matcher, layer: str) -> list[str]:
    return [member.name for member in matcher.stacks[layer].members] if layer in matcher.stacks else [layer]


def _targets(moves: Sequence[Bound]) -> list[str]:
    return [name for move in moves for name, _ in move.target.keys()]
