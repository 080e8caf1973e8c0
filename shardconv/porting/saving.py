"""A user's model as an Orbax checkpoint, and back: nested dicts by the names that the model's own arrays have.

What `shardconv run` writes for a layout of the user's own is the same tree, so `load_module` reads either. Anything else that reads Orbax
reads it too: NNX's is the tree of `nnx.to_pure_dict`, Linen's the variables, Equinox' attributes by name, with a State's arrays among them.
"""

import os
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from shardconv.errors import ConfigError, InputError, Problem
from shardconv.mesh.checkpoints import described, restored
from shardconv.mesh.loading import tree_at
from shardconv.porting.convert import SHOWN, UNFIT, with_arrays
from shardconv.porting.sizes import shown
from shardconv.sinks.listing import MANIFEST
from shardconv.verify.forwards import nested

AT_A_TIME = 1 << 30  # bytes that are read at once: Orbax wants a GiB at least
# What is left of a checkpoint whose metadata is not there: it is damaged, and not elsewhere.
MARKS = (MANIFEST, "_CHECKPOINT_METADATA")
WHERE = "a layout of your own is written to output.path itself"


def save_module(path: str | os.PathLike[str], model: Any, *, overwrite: bool = False) -> None:
    """Writes the arrays of a model as an Orbax checkpoint, complete on return; every process of the program calls it.

    `model` is what `convert_module` gives. Raises ConfigError where something is at the path, unless it may be replaced, or the model is
    abstract.

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_module(f"{folder}/net", {"params": {"fc": {"kernel": np.ones((3, 4), np.float32)}}})
    ...     model = load_module(f"{folder}/net", {"params": {"fc": {"kernel": jax.ShapeDtypeStruct((3, 4), "float32")}}})
    >>> float(model["params"]["fc"]["kernel"].sum())
    12.0
    """
    path, tree = os.path.abspath(path), with_arrays(model)
    abstract = [name for name, value in tree.values.items() if isinstance(value, jax.ShapeDtypeStruct)]
    problems = [Problem(_abstract(abstract, len(tree.values)), "save what convert_module gave")] if abstract else []
    if os.path.lexists(path) and not overwrite:
        problems.append(Problem(f"{path} exists", "choose another path, or say overwrite=True"))
    if problems:
        raise ConfigError("the model cannot be saved", problems)
    arrays = nested({".".join(leaf.path): jax.numpy.asarray(tree.values[name]) for name, leaf in tree.leaves.items()})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, arrays, force=overwrite)
        checkpointer.wait_until_finished()


def load_module(path: str | os.PathLike[str], model: Any) -> Any:
    """The model with the arrays of an Orbax checkpoint, which `save_module` or `shardconv run` wrote; every process calls it.

    `path` is the checkpoint's own, or that of a directory with its step and item, as for `shardconv.load`. `model` may be abstract. What
    comes back is the same kind of object, in the model's dtypes and shardings; an NNX module is updated in place.

    Raises InputError where there is no checkpoint or it cannot be read, or with everything that is missing, left over or of another shape,
    and ConfigError where the directory has several.
    """
    tree, found = with_arrays(model), described(_found_at(os.fspath(path)))
    names = {name: ".".join(leaf.path) for name, leaf in tree.leaves.items()}
    problems = []
    for name, leaf in tree.leaves.items():
        kind = found.kinds.get(names[name])
        if kind is None:
            problems.append(Problem(f"{names[name]} {shown(leaf.shape)} is not in the checkpoint"))
        elif tuple(kind.shape) != leaf.shape:
            problems.append(Problem(f"{names[name]} is {shown(kind.shape)} in the checkpoint, and {shown(leaf.shape)} in the model"))
    left = [name for name in found.kinds if name not in names.values()]
    problems += [Problem(f"{name} {shown(found.kinds[name].shape)} is in the checkpoint alone") for name in left]
    if problems:
        raise InputError(UNFIT, problems)
    alone = SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        names[name]: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or alone) for name, leaf in tree.leaves.items()
    }
    arrays: dict[str, Any] = restored(found, wanted, AT_A_TIME)
    return tree.rebuilt({name: arrays[names[name]] for name in tree.leaves})


def _abstract(names: Sequence[str], count: int) -> str:
    """What is wrong with arrays that are shapes alone.

    >>> _abstract(["fc.kernel"], 2), _abstract([f"fc.{n}" for n in range(7)], 9)
    ('fc.kernel is abstract', '7 of 9 arrays are abstract: fc.0, fc.1, fc.2, fc.3, fc.4 and 2 more')
    """
    if len(names) == 1:
        return f"{names[0]} is abstract"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} of {count} arrays are abstract: {', '.join(names[:SHOWN])}{more}"


def _found_at(path: str) -> str:
    """The directory of the checkpoint that is meant by a path; raises InputError where there is none."""
    folder = tree_at(path)
    if folder is None and not any(os.path.exists(os.path.join(path, mark)) for mark in MARKS):
        meant = _meant(path)
        remedy = f"did you mean {meant}? {WHERE}" if meant else WHERE
        raise InputError("the checkpoint cannot be read", [Problem(f"there is no checkpoint at {path}", remedy)])
    return folder or os.path.abspath(path)


def _meant(path: str) -> str:
    """The checkpoint that a path with a step and an item too many leads into, or one beside it with nearly its name; "" for none."""
    parent, name = os.path.split(path.rstrip("/"))
    above = [parent, os.path.dirname(parent)]
    if inside := next((folder for folder in above if folder and tree_at(folder) == os.path.abspath(folder)), ""):
        return inside
    beside = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    close = [os.path.join(parent, one) for one in get_close_matches(name, beside, n=3)]
    return next((one for one in close if tree_at(one)), "")
