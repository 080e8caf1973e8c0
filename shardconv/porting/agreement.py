"""Agreement: whether a converted model computes what the PyTorch model does, for `convert_module(..., agrees=...)`.

No tolerance is guessed: the PyTorch model runs in float32 and in float64, and what the two differ by is noise. A port that is right is off
by a few times that, and one with two layers exchanged by thousands.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# How many times the noise a port may be off by: sound ones came to less than 4, those with two layers exchanged to thousands.
FACTOR = 10.0
HALF_A_PLACE = 2.0**-24  # of the largest result: noise is no less, even where a few numbers happen to agree


def same_outputs(module: Any, inputs: Sequence[Any], call: Callable[[Any], Any]) -> Callable[[Any], bool]:
    """A function that tells of a model of JAX whether it agrees with a torch module.

    `inputs` are the module's tensors, `call` gives the JAX model's result for the same, with torch's order of dims. Multiply matrices in
    float32 there: `jax.default_matmul_precision("highest")`.

    >>> same_outputs(torch_model, [x], lambda model: model(jnp.asarray(x.numpy())))  # doctest: +SKIP
    """
    import torch

    with torch.inference_mode():
        expected = module(*inputs).double().numpy()
        wide = [one.double() if one.is_floating_point() else one for one in inputs]
        truth = copy.deepcopy(module).double()(*wide).numpy()
    bound = FACTOR * max(float(abs(expected - truth).max()), HALF_A_PLACE * float(abs(truth).max()))

    def agrees(model: Any) -> bool:
        found = np.asarray(call(model), np.float64)
        return found.shape == expected.shape and bool(abs(found - expected).max() <= bound)

    return agrees
