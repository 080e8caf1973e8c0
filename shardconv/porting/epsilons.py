"""Epsilons: where a norm of the model has another epsilon than the norm of PyTorch that it has its arrays from.

An epsilon is in no array, so a wrong one is loaded without an error; Flax's default is not torch's. A torch module says its own, and so
do the modules of NNX and Equinox; of a state dict, and of Linen's variables, nothing is known and nothing is said.
"""

import math
from collections.abc import Mapping

from shardconv.porting.sources import Weights
from shardconv.porting.trees import Tree


def other_epsilons(places: Mapping[str, str], weights: Weights, tree: Tree) -> list[str]:
    """A line for each epsilon that differs; `places` are modules of the model by the layer that is there."""
    found = []
    for layer, module in places.items():
        there = tree.classes.get(module)
        here = getattr(there, "epsilon", getattr(there, "eps", None))
        said = weights.epsilons.get(layer)
        if isinstance(here, float) and said is not None and not math.isclose(here, said, rel_tol=1e-6):  # one of the two may be of float32
            found.append(f"{module or 'the model'} has epsilon {here:g}, {layer or 'the module'} has {said:g}")
    return found
