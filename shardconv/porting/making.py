"""A layout of the user's own: the model that `[target] layout = "package.module:make_model"` makes, and what fills each of its arrays.

`make_model` takes nothing and gives what `convert_module` takes: an NNX module, an Equinox module or the pair of one and its State, Linen's
variables, or any tree of arrays. It is traced, so that no array is made, however large the model; where it cannot be traced it is run. All
of this is done in a process of its own (`made_elsewhere`), which loads JAX and the user's code and ends with them, and of the checkpoint
reads headers, and what a mapping asks for by value: masks, and biases that must be zeros.

What comes back are plain values, of which `shardconv.porting.planned` makes a plan.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardconv.errors import ConfigError, InputError, Problem
from shardconv.porting.moves import Move
from shardconv.run import Failed
from shardconv.run.child import Child, ChildDied
from shardconv.source import Source
from shardconv.user_code import Setting, imported, place, require_function, said

if TYPE_CHECKING:
    from shardconv.porting.trees import Tree

TITLE = "target.layout cannot be used"
LAYOUT = Setting(
    "target.layout",
    TITLE,
    'say a layout that `shardconv layouts` lists, or "package.module:make_model"',
    "name a function that takes nothing and gives your model",
)
# No accelerator is needed to trace a model, and none of its memory is to be taken.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be filled from where: `mapping` is a file's path, or None for one that is proposed; `ignore` are patterns of tensors."""

    layout: str
    source: Source
    mapping: str | None
    ignore: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """An array of the model, and where it is in the tree that is written."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Made:
    """The model's arrays by name, the moves that fill them, and what is worth a note."""

    arrays: Mapping[str, Target]
    moves: tuple[Move, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Proposed:
    """A mapping as a file to edit, of how many arrays, and what is to be done about it in words: nothing where it is complete."""

    text: str
    arrays: int
    todo: tuple[str, ...]


def is_own(layout: str) -> bool:
    """Whether a layout is a function of the user's, and none of ours.

    >>> is_own("flat"), is_own("mymodel:make_model")
    (False, True)
    """
    return ":" in layout


def made_elsewhere(asked: Asked) -> Made:
    """`made`, in a process of its own; raises what it raises, and ConfigError where the process dies."""
    found = _elsewhere("made", asked)
    assert isinstance(found, Made)
    return found


def proposed_elsewhere(asked: Asked) -> Proposed:
    """`proposed`, in a process of its own; raises what it raises, and ConfigError where the process dies."""
    found = _elsewhere("proposed", asked)
    assert isinstance(found, Proposed)
    return found


def _elsewhere(function: str, asked: Asked) -> object:
    require_function(asked.layout, LAYOUT)
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        child = Child("shardconv.run:answer", log.name, ENVIRONMENT, nice=0)
        try:
            child.send(-1, f"{__name__}:{function}", asked)
            found = child.receive()
        except ChildDied as death:
            raise ConfigError(TITLE, [Problem(f"the process that made {asked.layout} died: {death}")]) from None
        finally:
            child.stop()
    if isinstance(found, Failed):
        raise found.report or ConfigError(TITLE, [Problem(found.error)])
    return found


def made(asked: Asked) -> Made:
    """The arrays of the user's model, and the moves that fill them, in this process.

    Raises ConfigError where there is no such model or the mapping cannot be read, InputError with all that is missing, left over, open or
    of another shape.
    """
    from shardconv.porting.convert import UNFIT, fitted
    from shardconv.porting.sources import weights_in

    (tree, notes), weights = _opened(asked.layout), weights_in(asked.source)
    found, doubts = fitted(weights, tree, asked.mapping, asked.ignore, None)
    if asked.mapping is None:  # what is proposed and then run, nobody has looked at
        remedy = "`shardconv init` writes a mapping to complete; give it as target.mapping"
        found.problems += [Problem(doubt, remedy) for doubt in doubts]
    if found.problems:
        raise InputError(UNFIT, found.problems)
    order = {name: place for place, name in enumerate(tree.leaves)}  # the model's, so that a plan is the same in every process
    moves = sorted(found.moves, key=lambda one: (min(order[name] for name, _ in one.target.keys()), one.move.into, str(one.move)))
    return Made(targets(tree), tuple(dict.fromkeys(one.move for one in moves)), (*notes, *doubts))


def proposed(asked: Asked) -> Proposed:
    """The mapping that is proposed for the user's model, in this process; raises ConfigError where there is no such model."""
    from shardconv.porting.convert import offered
    from shardconv.porting.sources import weights_in

    tree, _ = _opened(asked.layout)
    found = offered(weights_in(asked.source), tree, asked.ignore, None)
    todo = {"array": (len(found.empty), "open"), "line": (len(found.suspects), "in doubt"), "layer": (len(found.open), "without a place")}
    said = [f"{count} {what}{'' if count == 1 else 's'} {how}" for what, (count, how) in todo.items() if count]
    return Proposed(found.text(tree, asked.ignore), len(tree.leaves), tuple(said))


def _opened(layout: str) -> tuple["Tree", tuple[str, ...]]:
    """The user's model, opened, and notes."""
    from shardconv.porting.convert import opened_model, without_arrays

    model, notes = model_of(layout)
    tree = opened_model(model)
    if not tree.leaves:
        raise ConfigError(TITLE, [Problem(f"{layout}() gave a {type(model).__name__} without arrays", without_arrays(model))])
    return tree, notes


def targets(tree: "Tree") -> dict[str, Target]:
    """The arrays of an opened model."""
    return {name: Target(leaf.path, leaf.shape, leaf.dtype.name) for name, leaf in tree.leaves.items()}


def model_of(layout: str) -> tuple[Any, tuple[str, ...]]:
    """The user's model, abstract where it can be traced, and notes; ConfigError where there is none."""
    make = imported(layout, LAYOUT)
    try:
        return abstract(make), ()
    except Exception as error:  # noqa: BLE001  it is the user's code, and may do what cannot be traced
        why = said(error)
    try:
        return make(), (f"{layout} cannot be traced, so its arrays were made: {why}",)
    except Exception as error:  # noqa: BLE001  it is the user's code
        raise ConfigError(TITLE, [Problem(f"{layout}() raised {said(error)}{place(error)}", LAYOUT.wanted)]) from None


def abstract(make: Callable[[], Any]) -> Any:
    """What a function gives, with shapes in the place of arrays, none of which is made.

    >>> import jax
    >>> abstract(lambda: {"kernel": jax.numpy.zeros((3, 4)), "name": "fc"})
    {'kernel': ShapeDtypeStruct(shape=(3, 4), dtype=float32), 'name': 'fc'}
    """
    import jax

    structure: Any = None
    graph: Any = None
    rest: list[Any] = []

    def traced() -> list[Any]:
        nonlocal structure, graph
        model = make()
        nnx = sys.modules.get("flax.nnx")
        if nnx is not None and isinstance(model, nnx.Module):
            graph, model = nnx.split(model)
        leaves, structure = jax.tree_util.tree_flatten(model)
        rest[:] = [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    arrays = iter(jax.eval_shape(traced))
    found = jax.tree_util.tree_unflatten(structure, [next(arrays) if leaf is None else leaf for leaf in rest])
    return found if graph is None else sys.modules["flax.nnx"].merge(graph, found)
