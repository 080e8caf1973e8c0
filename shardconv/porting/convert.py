"""`convert_module`: a PyTorch model's parameters onto a user's own JAX model; `propose_mapping`: which part would go where."""

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shardconv.errors import ConfigError, InputError, Problem
from shardconv.porting.agreement import Agreement, Runs
from shardconv.porting.epsilons import other_epsilons
from shardconv.porting.flattening import suspects
from shardconv.porting.flow import Flow
from shardconv.porting.folding import names
from shardconv.porting.landing import landed
from shardconv.porting.mapping import Plan, read_mapping
from shardconv.porting.matching import TRIES, Proposal, likeness, proposed
from shardconv.porting.moves import Bound
from shardconv.porting.resolving import Resolved, collapsed, coverage_problems, resolved, zero_problems
from shardconv.porting.rules import described, required_zeros
from shardconv.porting.sources import Weights, weights_of
from shardconv.porting.trees import Tree, opened
from shardconv.user_code import said as error_said

UNFIT = "the checkpoint does not fit the model"
DISAGREES = "the converted model does not compute what PyTorch's does"
IN_NO_ARRAY = "see what is in no array: activations, epsilons, padding, the order in which channels are flattened, the call itself"
SHOWN = 5  # places that a message lists
Agrees = Callable[[Any], bool]


def convert_module(source: Any, model: Any, mapping: Any = None, *, ignore: Sequence[str] = (), agrees: Agrees | None = None) -> Any:
    """The user's model with the parameters of a PyTorch model.

    `source` is a torch.nn.Module, its state dict, or the path of its files. `model` is Linen's variables, an NNX module or state, an
    Equinox module or the pair of one and its State, or any tree of arrays; it may be abstract. What comes back is the same kind of object
    with real arrays, in the model's dtypes and shardings; an NNX module is updated in place, and it is the same object.

    `mapping` says which part is which (`shardconv.porting.mapping`): a dict, or the path of a TOML file. Without one, it is proposed from
    layers, shapes and names (`shardconv.porting.matching`), and refused where it is not certain; `agrees`, a function that tells of a
    converted model whether it computes what PyTorch does, settles what names leave open. Where it is given, with a mapping or without, it
    has said so of the very arrays that come back. `ignore` are patterns of tensors that the model does not need.

    Random number generators are left alone, so that those of an NNX module of nnx.eval_shape stay abstract: before you train one with
    dropout, give them keys with `nnx.reseed(model, default=0)`, and a seed for each other stream that it has.

    Warns where an epsilon is another than PyTorch's, as far as both sides say theirs, where finite numbers are too large for the model's
    dtype, and, unless `agrees` has run it, where channels may be flattened that the model has last. Raises ConfigError where the mapping
    cannot be read or the model has no arrays, InputError with everything that is missing, left over, open or of another shape, or where
    `agrees` says that the model does not; nothing of the model is changed then.

    >>> import numpy as np
    >>> state = {"fc.weight": np.ones((4, 3), np.float32), "fc.bias": np.zeros(4, np.float32)}
    >>> params = {"params": {"Dense_0": {"kernel": np.zeros((3, 4), np.float32), "bias": np.zeros(4, np.float32)}}}
    >>> convert_module(state, params, {"Dense_0": "fc"})["params"]["Dense_0"]["kernel"].shape
    (3, 4)
    """
    weights, tree = weights_of(source), with_arrays(model)
    runs = Runs(agrees) if agrees is not None else None
    found, doubts = fitted(weights, tree, mapping, ignore, runs)
    if found.problems:
        raise InputError(UNFIT, found.problems)
    too_large: dict[str, int] = {}
    arrays = _landed(found.moves, weights, tree, too_large)
    large = [_infinite(too_large, tree)] if too_large else []
    epsilons = other_epsilons(found.places, weights, tree)
    if runs and not runs(found.moves, lambda: tree.copied(arrays)):
        raise InputError(DISAGREES, _reasons(runs.said(found.moves), found.places, [*large, *epsilons, *doubts]))
    for doubt in [*large, *(doubts if runs is None else [])]:  # what agrees shows is not in doubt
        warnings.warn(doubt, UserWarning, stacklevel=2)
    if epsilons:
        warnings.warn("the same weights compute something else: " + "; ".join(epsilons), UserWarning, stacklevel=2)
    return tree.rebuilt(arrays)


def propose_mapping(source: Any, model: Any, *, ignore: Sequence[str] = (), agrees: Agrees | None = None) -> str:
    """The mapping that `convert_module` would use without one, as TOML: all that is certain, and what is open as comments to complete.

    >>> import numpy as np
    >>> state = {"fc.weight": np.ones((4, 3), np.float32)}
    >>> print(propose_mapping(state, {"params": {"Dense_0": {"kernel": np.zeros((3, 4), np.float32)}}}).splitlines()[-1])
    "Dense_0.kernel" = "fc.weight: o i -> i o"
    """
    weights, tree = weights_of(source), with_arrays(model)
    return offered(weights, tree, ignore, Runs(agrees) if agrees is not None else None).text(tree, ignore)


def fitted(weights: Weights, tree: Tree, mapping: Any, ignore: Sequence[str], runs: Runs | None) -> tuple[Resolved, list[str]]:
    """The moves of a mapping, or of what is proposed where there is none, with every problem there is; and where there is none, what is in
    doubt. Raises ConfigError for a mapping that cannot be read."""
    if mapping is None:
        proposal = offered(weights, tree, ignore, runs)
        found = _certain(weights, tree, proposal, ignore, runs)
        doubts = [f"{name}: {suspect.said}" for name, suspect in proposal.suspects.items()]
    else:
        plan = read_mapping(mapping, list(tree.leaves))
        found = resolved(replace(plan, ignore=(*plan.ignore, *ignore)), weights, tree)
        doubts = [f"{name}: {suspect.said}; if not, say {suspect.plain}" for name, suspect in suspects(found.choices).items()]
    return found, [] if found.problems else doubts


def with_arrays(model: Any) -> Tree:
    """A model's arrays by name; ConfigError where it has none, or two have one name."""
    tree = opened_model(model)
    if not tree.leaves:
        is_class = isinstance(model, type)
        fact = f"this is the class {model.__name__}" if is_class else f"this is a {type(model).__name__}"
        raise ConfigError("the model has no arrays", [Problem(fact, without_arrays(model))])
    return tree


def without_arrays(model: Any) -> str:
    """What to give in the place of a model that has no arrays."""
    linen, nnx, equinox, torch = (sys.modules.get(name) for name in ("flax.linen", "flax.nnx", "equinox", "torch"))
    if linen is not None and _is_a(model, linen.Module):
        return "give its variables: jax.eval_shape(model.init, jax.random.key(0), inputs)"
    if nnx is not None and _is_a(model, nnx.Module) and isinstance(model, type):
        return f"make one: nnx.eval_shape(lambda: {model.__name__}(nnx.Rngs(0)))"
    if equinox is not None and _is_a(model, equinox.Module) and isinstance(model, type):
        return f"make one: eqx.filter_eval_shape({model.__name__}, jax.random.key(0))"
    if torch is not None and (_is_a(model, torch.nn.Module) or _has_tensors(torch, model)):
        return "PyTorch's model is the first argument, and the JAX model the second"
    return "give Linen's variables, an NNX or Equinox module, or a tree of arrays"


def _is_a(model: Any, kind: type) -> bool:
    """Whether something is of a class, or is a class that derives from it."""
    return issubclass(model, kind) if isinstance(model, type) else isinstance(model, kind)


def _has_tensors(torch: Any, model: Any) -> bool:
    return isinstance(model, Mapping) and any(isinstance(one, torch.Tensor) for one in model.values())


def opened_model(model: Any) -> Tree:
    """A model's arrays by name; ConfigError where two have one name."""
    try:
        return opened(model)
    except ValueError as error:
        raise ConfigError("the model's arrays have no names of their own", [Problem(str(error))]) from None


def _landed(moves: Sequence[Bound], weights: Weights, tree: Tree, too_large: dict[str, int] | None = None) -> Any:
    try:
        return landed(moves, weights.tensors, tree.dtypes, too_large)
    except ValueError as error:
        raise InputError(UNFIT, [Problem(str(error))]) from None


def _infinite(too_large: Mapping[str, int], tree: Tree) -> str:
    """In words, which arrays have numbers that are too large for their dtype."""
    listed = [
        f"{name}: {count} of its {math.prod(tree.shapes[name])} numbers are too large for {tree.dtypes[name]} and became infinite"
        for name, count in list(too_large.items())[:SHOWN]
    ]
    return "; ".join(listed) + (f"; and so in {len(too_large) - SHOWN} more arrays" if len(too_large) > SHOWN else "")


def _reasons(said: str, places: Mapping[str, str], doubts: Sequence[str]) -> list[Problem]:
    """What a model that was run gives, and all that is known of why it may not be PyTorch's result."""
    found = [Problem(said, IN_NO_ARRAY), *(Problem(doubt) for doubt in doubts)]
    unlike = sorted((likeness(layer, place), place, layer) for layer, place in places.items())
    listed = [f"{place or 'the model'} is {layer or 'the module'}" for alike, place, layer in unlike if alike < 1.0]
    if listed:
        more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
        found.append(Problem(f"names do not say it: {', '.join(listed[:SHOWN])}{more}", "check these lines of the mapping"))
    return found


def offered(weights: Weights, tree: Tree, ignore: Sequence[str], runs: Runs | None) -> Proposal:
    """What is proposed where there is no mapping."""

    def tried(moves: list[Bound]) -> bool:
        filled = {name for move in moves for name, _ in move.target.keys()}  # else it is no model, and refused for that
        return runs is not None and filled == set(tree.leaves) and runs(moves, lambda: tree.copied(_landed(moves, weights, tree)))

    flow = runs.agrees.flow(tree) if runs and isinstance(runs.agrees, Agreement) else ""
    found = proposed(weights, tree, ignore, tried if runs else None, flow if isinstance(flow, Flow) else None)
    return found if isinstance(flow, Flow) else replace(found, untraced=flow)


def _shown_by_running(runs: Runs, proposal: Proposal, tree: Tree) -> Problem:
    """What running the model has shown, where layers are open all the same."""
    tried, agreed = len(runs.known), sum(runs.known.values())
    if not tried and isinstance(runs.agrees, Agreement):
        zeros = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in tree.leaves.items()}
        try:
            runs.run(frozenset(), tree.copied(zeros))
        except Exception as error:  # noqa: BLE001  it is the user's code, and may do what it cannot with zeros
            return Problem(f"the model was run, of zeros: it raised {error_said(error)}", "give a call that runs the model")
    if found := runs.misshaped:
        return Problem(f"the model was run: {found.said}", "let the call give torch's order of dims, or make the model as PyTorch's is")
    if not tried:
        return Problem("the model was not run: in no order do the open layers fill all its arrays")
    if agreed:
        remedy = "give inputs for which they differ, or a mapping"
        return Problem(f"the model was run: {agreed} of the {tried} orders that were tried agree, and differ in these", remedy)
    groups = Counter(one.places for one in proposal.open)
    few = math.prod(math.factorial(count) for count in groups.values()) <= TRIES
    nearest = f"; the nearest: {runs.nearest.said}" if runs.nearest else ""
    all_of = f"none of the {tried} orders that were tried agrees" if tried > 1 else "the only order that was tried does not agree"
    return Problem(f"the model was run: {all_of}{'' if few else ', of too many to try them all'}{nearest}", IN_NO_ARRAY)


def _certain(weights: Weights, tree: Tree, proposal: Proposal, ignore: Sequence[str], runs: Runs | None = None) -> Resolved:
    """A proposal as moves, with a problem for all that it leaves open."""
    found = Resolved(moves=proposal.moves, places=proposal.places)
    for choice in filter(None, proposal.choices.values()):
        found.problems += zero_problems(choice, weights)
        found.zeros |= {name for expression, _ in required_zeros(choice.rule, choice.layer) for name in names(expression)}
    plan = Plan(ignore=tuple(ignore))
    told: set[str] = set()
    for one in proposal.open:
        told |= set(one.tensors)
        places = ", ".join(one.places[:SHOWN]) + (f" and {len(one.places) - SHOWN} more" if len(one.places) > SHOWN else "")
        said = f"fits {places}" + (f", and {proposal.why}" if len(one.places) > 1 else one.how) if places else "fits nothing"
        if one.turned:
            said = f"fits {', '.join(one.turned[:SHOWN])} by its shapes, but is contracted along other axes than that is"
        found.problems.append(Problem(f"open: {described(one.layer, weights.shapes)} {said}"))
    problems = coverage_problems(found.moves, found.zeros, plan, weights, tree)
    found.problems += collapsed(problem for problem in problems if problem.fact.split()[0].rstrip(":") not in told)
    if proposal.open and proposal.untraced:
        remedy = "compute in it with jax.numpy alone, and give jax.jit no compiler_options"
        found.problems.append(Problem(f"the call could not be followed: {proposal.untraced}", remedy))
    if proposal.open:
        remedy = "complete what shardconv.propose_mapping or `shardconv init` writes"
        if runs is None:
            remedy += "; or pass agrees=, a function that runs the model"
        else:
            found.problems.append(_shown_by_running(runs, proposal, tree))
        found.problems.append(Problem(f"{len(proposal.open)} of {len(proposal.open) + len(proposal.choices)} layers are open", remedy))
    return found
