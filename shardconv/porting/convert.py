"""`convert_module`: a PyTorch model's parameters onto a user's own JAX model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shardconv.errors import ConfigError, InputError, Problem
from shardconv.porting.landing import landed
from shardconv.porting.mapping import read_mapping
from shardconv.porting.resolving import resolved
from shardconv.porting.sources import weights_of
from shardconv.porting.trees import opened


def convert_module(source: Any, model: Any, mapping: Any = None, *, ignore: Sequence[str] = ()) -> Any:
    """The user's model with the parameters of a PyTorch model.

    `source` is a torch.nn.Module or its state dict. `model` is Linen's variables, an NNX module or state, an Equinox module or the pair of
    one and its State, or any tree of arrays; it may be abstract. What comes back is the same kind of object with real arrays, in the
    model's dtypes and shardings; an NNX module is updated in place, and it is the same object.

    `mapping` says which part is which (`shardconv.porting.mapping`): a dict, or the path of a TOML file; without one, it is proposed
    (`shardconv.porting.matching`). `ignore` are patterns of tensors that the model does not need.

    Raises ConfigError where the mapping cannot be read, InputError with everything that is missing, left over or of another shape.
    Nothing of the model is changed then.

    >>> import numpy as np
    >>> state = {"fc.weight": np.ones((4, 3), np.float32), "fc.bias": np.zeros(4, np.float32)}
    >>> params = {"params": {"Dense_0": {"kernel": np.zeros((3, 4), np.float32), "bias": np.zeros(4, np.float32)}}}
    >>> convert_module(state, params, {"Dense_0": "fc"})["params"]["Dense_0"]["kernel"].shape
    (3, 4)
    """
    weights = weights_of(source)
    try:
        tree = opened(model)
    except ValueError as error:
        raise ConfigError("the model's arrays have no names of their own", [Problem(str(error))]) from None
    plan = read_mapping(mapping, list(tree.leaves))
    plan = replace(plan, ignore=(*plan.ignore, *ignore))
    found = resolved(plan, weights, tree)
    if found.problems:
        raise InputError("the checkpoint does not fit the model", found.problems)
    try:
        arrays = landed(found.moves, weights.tensors, tree.dtypes)
    except ValueError as error:
        raise InputError("the checkpoint does not fit the model", [Problem(str(error))]) from None
    return tree.rebuilt(arrays)
