"""Resolving: a mapping, a checkpoint and a model made into moves, and all that is wrong collected.

Moves that the user wrote come first. What they leave of a layer goes where a pair of modules says, by the layer rules; a layer without a
rule gives its tensors to the arrays of the same names and shapes. In the end every array must be filled once, and every tensor be used,
ignored, or the same memory as one that is used.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterable, Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np

from shardconv.boxes import Box, slices, whole
from shardconv.errors import Problem
from shardconv.porting import equinox, linen, nnx
from shardconv.porting.folding import ELEMENTWISE, Call, Expression, computed, names, parsed, renamed
from shardconv.porting.landing import gaps
from shardconv.porting.layers import layers_of
from shardconv.porting.mapping import Pair, Plan, matched, place_of
from shardconv.porting.moves import HOLE, Bound, Move, bound
from shardconv.porting.rules import Choice, Layer, Table, choices, described, lacking, required_zeros
from shardconv.porting.sizes import ALL, shown
from shardconv.porting.sources import Weights
from shardconv.porting.trees import Tree
from shardconv.route import pieces

NUMBER = re.compile(r"(?<![^._])[0-9]+(?![^._])")  # a whole part of a name: `layer.3.fc` and `Conv_3`, not `conv1`
TRANSPOSED = re.compile(r"(?i)^ups?([0-9_]|conv|ampl|$)|deconv|transpose")  # what transposed convolutions are called: `up1`, `upsample`
TABLES = {"linen": linen.TABLE, "nnx": nnx.TABLE, "equinox": equinox.TABLE}


@dataclass
class Resolved:
    """The moves, and by layer the module of the model where it is and the rule that fits; the tensors of which a part is known to be zeros
    that nothing needs; what is wrong, and the tensors that this is about."""

    moves: list[Bound] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    zeros: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


def table_of(tree: Tree) -> Table:
    """The rules for a model; a tree that no library made has the rules of the one whose names it uses."""
    if tree.library:
        return TABLES[tree.library]
    return linen.TABLE if any(name.rpartition(".")[2] in ("kernel", "embedding", "scale") for name in tree.leaves) else equinox.TABLE


def resolved(plan: Plan, weights: Weights, tree: Tree) -> Resolved:
    """The moves of a mapping, with every problem there is."""
    found = Resolved()
    shapes = {name: shape for name, shape in weights.shapes.items() if not matched(name, plan.ignore)}
    for move in plan.moves:
        try:
            found.moves.append(bound(move, weights.shapes, tree.shapes))
        except ValueError as error:
            found.problems.append(Problem(f"{move.target} = {move}: {error}"))
    used = {name for move in found.moves for name in read_by(move)}
    claimed = {name for move in plan.moves for name in _spelt(move, found.moves)}
    broken = {name for move in plan.moves if move.target not in claimed for name in names(move.expression)}
    stacked: set[str] = set()
    layers = layers_of(shapes, weights.kinds)
    found.problems += unheard(plan.pairs, layers_of(weights.shapes, weights.kinds))
    for name, views in layers.items():
        left = [_without(view, used | broken) for view in views]
        placed = place_of(plan.pairs, name)
        if placed is not None and any(view.tensors for view in left) and placed[1] not in stacked:
            stacked |= {placed[1]} if placed[0].stack else set()
            found.places[name] = placed[1]
            before, own = len(found.problems), {name for view in views for one in view.tensors.values() for name in names(one)}
            _place(found, placed, left, weights, tree, claimed)
            if broken & own and len(found.problems) > before:  # what is left of a layer when one of its lines is wrong need not fit
                del found.problems[before:]
                found.told |= own | set(arrays_in(tree, placed[1], claimed).values())
    found.problems += square_problems(found, weights)
    _check_zeros_and_coverage(found, plan, weights, tree, broken)
    return found


def unheard(pairs: Iterable[Pair], layers: Collection[str]) -> list[Problem]:
    """The lines of a mapping whose right side is no layer of the checkpoint, and no module with layers in it."""
    found = []
    for pair in pairs:
        if not any(pair.match(layer) for layer in layers):
            modules = {layer[: dot.start()] for layer in layers for dot in re.finditer(r"\.|$", layer)}
            close = difflib.get_close_matches(pair.there, [*modules, *{NUMBER.sub("{n}", module) for module in modules}], n=1)
            fact = f'"{pair.here}" = "{pair.there}": the checkpoint has no {pair.there}'
            found.append(Problem(fact, f"did you mean {close[0]}?" if close else "leave the line out, or correct it"))
    return found


def square_problems(found: Resolved, weights: Weights) -> list[Problem]:
    """Square weights that were taken as torch's Linear has them, in a checkpoint that has others the way round of transformers' Conv1D."""
    unknown = {name: choice for name, choice in found.choices.items() if not choice.layer.kinds}
    turned = [name for name, choice in unknown.items() if choice.kind == "Conv1D"]
    squares = [choice for choice in unknown.values() if turned and choice.kind == "Linear" and _is_square(choice, weights)]
    problems = []
    for choice in squares:
        place = found.places[choice.layer.name]
        fact = f"{described(choice.layer, weights.shapes)} fits {place} as Linear, or as Conv1D, which {turned[0]} is"
        problems.append(Problem(fact, f'say which: "{place}" = "{choice.layer.name}: Conv1D"'))
    return collapsed(problems)


def _is_square(choice: Choice, weights: Weights) -> bool:
    shapes = [weights.shapes[name] for expression in choice.layer.tensors.values() for name in names(expression)]
    return any(len(shape) == 2 and shape[0] == shape[1] for shape in shapes)


def arrays_in(tree: Tree, module: str, claimed: Iterable[str] = ()) -> dict[str, str]:
    """The arrays of a module of the model: names inside it, with whole names; an array that is no module has itself inside, as ""."""
    prefix, taken = f"{module}." if module else "", set(claimed)
    if module in tree.leaves:
        return {} if module in taken else {"": module}
    return {name.removeprefix(prefix): name for name in tree.leaves if name.startswith(prefix) and name not in taken}


def fitting_choices(
    views: Sequence[Layer],
    module: str,
    weights: Weights,
    tree: Tree,
    claimed: Iterable[str] = (),
    rare: bool = True,
    stack: str = "",
    seen: Set[str] = frozenset(),
) -> list[Choice]:
    """All ways in which a layer fits a module of the model; `rare`, `stack` and `seen` are those of `rules.choices`."""
    table = table_of(tree)
    if any(TRANSPOSED.search(name.rpartition(".")[2]) for name in (views[0].name, module)):
        seen = seen | {kind for kind in table.rules if kind.startswith("ConvTranspose")}
    there = tree.classes.get(module)
    meant = table.classes.get(type(there).__name__, ()) if there is not None else ()
    found = choices(table, views, arrays_in(tree, module, claimed), weights.shapes, tree.shapes, meant, rare, stack, seen)
    turned = getattr(there, "transpose_kernel", None)
    return [choice for choice in found if turned is None or choice.rule.form.startswith(f"transpose_kernel={turned}")]


def _place(found: Resolved, placed: tuple[Pair, str], views: list[Layer], weights: Weights, tree: Tree, claimed: set[str]) -> None:
    """Finds the moves of a layer that has a place in the model."""
    pair, module = placed
    if pair.kind:
        views = [replace(view, kinds=(pair.kind,)) for view in views]
    one, views = views[0], [_stacked(view, pair) for view in views] if pair.stack else views
    ways = fitting_choices(views, module, weights, tree, claimed, stack=pair.stack)
    ways = [way for way in ways if way.rule.form == pair.form] if pair.form else ways
    if len(ways) == 1:
        found.moves += ways[0].moves
        found.choices[one.name] = ways[0]
        found.problems += zero_problems(ways[0], weights)
        found.zeros |= {name for expression, _ in required_zeros(ways[0].rule, ways[0].layer) for name in names(expression)}
        return
    moves = None if ways else alike(views[-1], module, weights, tree, pair.stack)
    if moves is not None:
        found.moves += moves
        return
    found.told |= {name for expression in one.tensors.values() for name in names(expression)}
    if len(ways) > 1:
        listed = ", or as ".join(way.name for way in ways)
        remedy = f'say which: "{module}" = "{one.name}: {ways[0].name}"'
        found.problems.append(Problem(f"{described(one, weights.shapes)} fits {module} as {listed}", remedy))
        return
    if pair.stack:
        one = _several(found, one, pair, weights)
    there = arrays_in(tree, module, claimed)
    if not there and all(name in weights.tied for expression in one.tensors.values() for name in names(expression)):
        found.told -= set(weights.tied)
        return  # the other name of the tensor has a place, or is told of
    arrays = ", ".join(f"{inner} {shown(tree.shapes[name])}" for inner, name in there.items() if inner.count(".") < 2)
    lack = lacking(table_of(tree), views[0])
    remedy = f"{table_of(tree).library}: {lack}" if lack else "make the model's layer like it, or map its arrays one by one"
    fact = f"{described(one, weights.shapes)} does not fit {module or 'the model'} ({arrays or 'which has no arrays'})"
    found.problems.append(Problem(fact, remedy))


def alike(layer: Layer, module: str, weights: Weights, tree: Tree, stack: str = "") -> list[Bound] | None:
    """Moves of a layer without a rule: each tensor to the array of its name and shape; None where one has no such array."""
    found = []
    if any(kind in table_of(tree).rules for kind in layer.kinds):
        return None
    for inner, expression in layer.tensors.items():
        name = f"{module}.{inner}".removeprefix(".")
        if not isinstance(expression, str) or name not in tree.shapes:
            return None
        try:
            found.append(bound(Move(expression, ALL, name, f"{stack} {ALL}".strip()), weights.shapes, tree.shapes))
        except ValueError:
            return None
    return found


def zero_problems(choice: Choice, weights: Weights) -> list[Problem]:
    """What a library has no place for, where it is not zeros."""
    found = []
    for expression, zero in required_zeros(choice.rule, choice.layer):
        values = computed(expression, weights.tensors, ())
        size = values.shape[0] // (zero.dims.count("|") + 1)
        if values[zero.part * size : (zero.part + 1) * size].any():
            found.append(Problem(f"{expression}: its last {size} numbers have no place: {zero.why}"))
    return found


def read_by(move: Bound) -> set[str]:
    """The tensors that a move reads."""
    return {name for key, _ in move.source.keys() for name in names(parsed(key))}


def coverage_problems(moves: Sequence[Bound], zeros: set[str], plan: Plan, weights: Weights, tree: Tree) -> list[Problem]:
    """Arrays that are not filled once, and tensors that are not used in full, but for zeros."""
    remedy = "map it, or make the model without it"
    found = [Problem(f"{name} {shown(tree.shapes[name])}: {fact}", remedy) for name, fact in gaps(moves, tree.shapes).items()]
    masks = mask_problems(moves, weights)
    found += [Problem(f"{key}: {fact}", "load the whole checkpoint") for key, fact in masks.items()]
    broken = {name for key in masks for name in names(parsed(key))}
    left = elements_left([move for move in moves if not broken & read_by(move)], weights)
    used = {name for move in moves for name in read_by(move)}
    for name, shape in weights.shapes.items():
        used_elsewhere = any(other in used for other in weights.tied.get(name, ()))
        if matched(name, plan.ignore) or used_elsewhere or _is_unused(name, used) or name in broken:
            continue
        if name not in used:
            found.append(Problem(f"{name} {shown(shape)} goes nowhere", f'map it, or ignore = ["{name}"]'))
        elif left[name] and name not in zeros:
            found.append(Problem(f"{name}: {left[name]} of its {math.prod(shape)} elements go nowhere", "map all its parts"))
    return found


def collapsed(problems: Iterable[Problem]) -> list[Problem]:
    """One problem for three or more that differ in nothing but numbers in a name, such as a layer's.

    >>> [problem.fact for problem in collapsed([Problem(f"layer.{n}.scale (8) goes nowhere") for n in range(12)])]
    ['layer.0.scale (8) goes nowhere (and 11 more like it)']
    """
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        name, _, rest = problem.fact.partition(" ")
        groups.setdefault((NUMBER.sub("{}", name), rest), []).append(problem)
    found = []
    for (pattern, _), (first, *others) in groups.items():
        name = first.fact.partition(" ")[0]
        alike = Problem(f"{first.fact} (and {len(others)} more like it)", first.remedy.replace(f'"{name}"', f'"{pattern}"'))
        found += [alike] if len(others) > 1 else [first, *others]
    return found


def _check_zeros_and_coverage(found: Resolved, plan: Plan, weights: Weights, tree: Tree, broken: set[str]) -> None:
    """Adds what is missing or left over, but for what another problem is about already."""
    told = " ".join(problem.fact for problem in found.problems)
    more = []
    for problem in coverage_problems(found.moves, found.zeros, plan, weights, tree):
        name = problem.fact.split()[0].rstrip(":")
        layer = name.rpartition(".")[0]
        if name not in broken | found.told and name not in told and not (layer and f"{layer} (" in told):
            more.append(problem)
    found.problems += collapsed(more)


def mask_problems(moves: Sequence[Bound], weights: Weights) -> dict[str, str]:
    """Masks that are none, by the expression that they are in."""
    found = {}
    for key in {key for move in moves if "masked(" in move.move.source for key, _ in move.source.keys()}:
        try:
            computed(parsed(key), weights.tensors, ())
        except ValueError as error:
            found[key] = str(error)
    return found


def elements_left(moves: Sequence[Bound], weights: Weights) -> dict[str, int]:
    """Of each tensor that is read, how many elements are not; what a mask takes away counts as read, since nothing is lost with it."""
    read: dict[str, list[tuple[Expression, Box]]] = {}
    for move in moves:
        for _, index in move.target.keys():
            for piece in pieces(move.target, move.source, index, whole(move.target.shape)):
                expression = parsed(piece.key)
                alike = not isinstance(expression, Call) or expression.function in ELEMENTWISE
                for name in names(expression):
                    same = alike and weights.shapes[name] == move.source.shape
                    read.setdefault(name, []).append((expression, piece.box if same else whole(weights.shapes[name])))
    return {name: _left(name, boxes, weights) for name, boxes in read.items()}


def _left(name: str, boxes: Iterable[tuple[Expression, Box]], weights: Weights) -> int:
    """The elements of a tensor that are in none of the boxes; one tensor at a time, so that no more is held."""
    left = np.ones(weights.shapes[name], bool)
    for expression, box in boxes:
        left[slices(box)] = False
        if isinstance(expression, Call) and expression.function == "masked":
            left &= computed(expression.arguments[1], weights.tensors, ()) != 0
    return int(left.sum())


def _is_unused(name: str, used: Collection[str]) -> bool:
    """Whether a tensor is one that no JAX layer needs: a count beside running statistics that are used."""
    layer, _, inner = name.rpartition(".")
    return inner == "num_batches_tracked" and f"{layer}.running_mean".removeprefix(".") in used


def _without(layer: Layer, used: set[str]) -> Layer:
    return replace(layer, tensors={inner: expression for inner, expression in layer.tensors.items() if not used & set(names(expression))})


def _stacked(layer: Layer, pair: Pair) -> Layer:
    """One of several layers that are stacked, as all of them: with a hole in its tensors' names."""
    meanings: dict[str, Expression] = {
        name: pair.template(layer.name, name) for expression in layer.tensors.values() for name in names(expression)
    }
    return replace(layer, tensors={inner: renamed(expression, meanings) for inner, expression in layer.tensors.items()})


def _several(found: Resolved, one: Layer, pair: Pair, weights: Weights) -> Layer:
    """The layer as a message has it for all that are stacked with it, which are not told of again."""
    templates = {pair.template(one.name, name) for expression in one.tensors.values() for name in names(expression)}
    patterns = [re.compile("[0-9]+".join(map(re.escape, HOLE.sub("{}", template).split("{}")))) for template in templates]
    alike = [name for name in weights.tensors if any(pattern.fullmatch(name) for pattern in patterns)]
    found.told |= set(alike)
    return replace(one, name=f"{pair.template(one.name, one.name)}, of which there are {len(alike) // len(templates)}")


def _spelt(move: Move, moves: Sequence[Bound]) -> list[str]:
    """The arrays that a user's move fills."""
    return [name for other in moves if other.move is move for name, _ in other.target.keys()]
