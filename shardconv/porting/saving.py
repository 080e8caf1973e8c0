"""A user's model as an Orbax checkpoint, and back: nested dicts by the names that the model's own arrays have.

What `shardconv run` writes for a layout of the user's own is the same tree, so `load_module` reads either. Anything else that reads Orbax
reads it too: NNX's is the tree of `nnx.to_pure_dict`, Linen's the variables, Equinox' attributes by name, with a State's arrays among them.
"""

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from shardconv.errors import ConfigError, InputError, Problem
from shardconv.mesh.checkpoints import described, restored
from shardconv.porting.convert import UNFIT, opened_model
from shardconv.porting.sizes import shown
from shardconv.verify.forwards import nested

AT_A_TIME = 1 << 30  # bytes that are read at once: Orbax wants a GiB at least


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
    path, tree = os.path.abspath(path), opened_model(model)
    problems = [
        Problem(f"{name} is abstract", "save what convert_module gave")
        for name, value in tree.values.items()
        if isinstance(value, jax.ShapeDtypeStruct)
    ]
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

    `model` may be abstract. What comes back is the same kind of object, in the model's dtypes and shardings; an NNX module is updated in
    place. Raises InputError where the checkpoint cannot be read, or with everything that is missing, left over or of another shape.
    """
    tree, found = opened_model(model), described(os.path.abspath(path))
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
