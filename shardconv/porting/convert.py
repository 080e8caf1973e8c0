"""`convert_module`: a PyTorch model's parameters onto a user's own JAX model; `propose_mapping`: which part would go where."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from shardconv.errors import ConfigError, InputError, Problem
from shardconv.porting.agreement import Agreement
from shardconv.porting.epsilons import other_epsilons
from shardconv.porting.flattening import suspects
from shardconv.porting.flow import Flow
from shardconv.porting.folding import names
from shardconv.porting.landing import landed
from shardconv.porting.mapping import Plan, read_mapping
from shardconv.porting.matching import Proposal, proposed
from shardconv.porting.moves import Bound
from shardconv.porting.resolving import Resolved, collapsed, coverage_problems, resolved, zero_problems
from shardconv.porting.rules import described, required_zeros
from shardconv.porting.sources import Weights, weights_of
from shardconv.porting.trees import Tree, opened

UNFIT = "the checkpoint does not fit the model"
SHOWN = 5  # places that a message lists
Agrees = Callable[[Any], bool]


def convert_module(source: Any, model: Any, mapping: Any = None, *, ignore: Sequence[str] = (), agrees: Agrees | None = None) -> Any:
    """The user's model with the parameters of a PyTorch model.

    `source` is a torch.nn.Module, its state dict, or the path of its files. `model` is Linen's variables, an NNX module or state, an
    Equinox module or the pair of one and its State, or any tree of arrays; it may be abstract. What comes back is the same kind of object
    with real arrays, in the model's dtypes and shardings; an NNX module is updated in place, and it is the same object.

    `mapping` says which part is which (`shardconv.porting.mapping`): a dict, or the path of a TOML file. Without one, it is proposed from
    layers, shapes and names (`shardconv.porting.matching`), and refused where it is not certain; `agrees`, a function that tells of a
    converted model whether it computes what PyTorch does, settles what names leave open. `ignore` are patterns of tensors that the model
    does not need.

    Warns where an epsilon is another than PyTorch's, as far as both sides say theirs, and, without a mapping, where channels may be
    flattened that the model has last. Raises ConfigError where the mapping cannot be read,
    InputError with everything that is missing, left over, open or of another shape; nothing of the model is changed then.

    >>> import numpy as np
    >>> state = {"fc.weight": np.ones((4, 3), np.float32), "fc.bias": np.zeros(4, np.float32)}
    >>> params = {"params": {"Dense_0": {"kernel": np.zeros((3, 4), np.float32), "bias": np.zeros(4, np.float32)}}}
    >>> convert_module(state, params, {"Dense_0": "fc"})["params"]["Dense_0"]["kernel"].shape
    (3, 4)
    """
    weights, tree = weights_of(source), opened_model(model)
    found = fitted(weights, tree, mapping, ignore, agrees)
    if found.problems:
        raise InputError(UNFIT, found.problems)
    arrays = _landed(found.moves, weights, tree)
    if odd := other_epsilons(found.places, weights, tree):
        warnings.warn("the same weights compute something else: " + "; ".join(odd), UserWarning, stacklevel=2)
    return tree.rebuilt(arrays)


def propose_mapping(source: Any, model: Any, *, ignore: Sequence[str] = (), agrees: Agrees | None = None) -> str:
    """The mapping that `convert_module` would use without one, as TOML: all that is certain, and what is open as comments to complete.

    >>> import numpy as np
    >>> state = {"fc.weight": np.ones((4, 3), np.float32)}
    >>> print(propose_mapping(state, {"params": {"Dense_0": {"kernel": np.zeros((3, 4), np.float32)}}}).splitlines()[-1])
    "Dense_0.kernel" = "fc.weight: o i -> i o"
    """
    weights, tree = weights_of(source), opened_model(model)
    return offered(weights, tree, ignore, agrees).text(tree, ignore)


def fitted(weights: Weights, tree: Tree, mapping: Any, ignore: Sequence[str], agrees: Agrees | None) -> Resolved:
    """The moves of a mapping, or of what is proposed where there is none, with every problem there is; raises ConfigError for a mapping
    that cannot be read."""
    if mapping is None:
        proposal = offered(weights, tree, ignore, agrees)
        found = _certain(weights, tree, proposal, ignore)
        for name, suspect in proposal.suspects.items() if not found.problems else ():
            warnings.warn(f"{name}: {suspect.said}", UserWarning, stacklevel=3)
        return found
    plan = read_mapping(mapping, list(tree.leaves))
    found = resolved(replace(plan, ignore=(*plan.ignore, *ignore)), weights, tree)
    for name, suspect in suspects(found.choices).items() if not found.problems else ():
        warnings.warn(f"{name}: {suspect.said}; if not, say {suspect.plain}", UserWarning, stacklevel=3)
    return found


def opened_model(model: Any) -> Tree:
    """A model's arrays by name; ConfigError where two have one name."""
    try:
        return opened(model)
    except ValueError as error:
        raise ConfigError("the model's arrays have no names of their own", [Problem(str(error))]) from None


def _landed(moves: Sequence[Bound], weights: Weights, tree: Tree) -> Any:
    try:
        return landed(moves, weights.tensors, tree.dtypes)
    except ValueError as error:
        raise InputError(UNFIT, [Problem(str(error))]) from None


def offered(weights: Weights, tree: Tree, ignore: Sequence[str], agrees: Agrees | None) -> Proposal:
    """What is proposed where there is no mapping."""

    def tried(moves: list[Bound]) -> bool:
        return agrees is not None and agrees(tree.copied(_landed(moves, weights, tree)))

    flow = agrees.flow(tree) if isinstance(agrees, Agreement) else ""
    found = proposed(weights, tree, ignore, tried if agrees else None, flow if isinstance(flow, Flow) else None)
    return found if isinstance(flow, Flow) else replace(found, untraced=flow)


def _certain(weights: Weights, tree: Tree, proposal: Proposal, ignore: Sequence[str]) -> Resolved:
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
        remedy = "complete what shardconv.propose_mapping or `shardconv init` writes; or pass agrees=, a function that runs the model"
        found.problems.append(Problem(f"{len(proposal.open)} of {len(proposal.open) + len(proposal.choices)} layers are open", remedy))
    return found
