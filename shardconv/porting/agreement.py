"""Agreement: whether a converted model computes what the PyTorch model does, for `convert_module(..., agrees=...)`.

No tolerance is guessed: the PyTorch model runs in float32 and in float64, and what the two differ by is noise. A port that is right is off
by a few times that, and one with two layers exchanged by thousands.

What is given to compare the two is also what is needed to follow a run of each: `flow`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.porting.flow import Flow
from shardconv.porting.jax_uses import jax_uses
from shardconv.porting.torch_uses import torch_uses
from shardconv.porting.trees import Tree

# How many times the noise a port may be off by: sound ones came to less than 4, those with two layers exchanged to thousands.
FACTOR = 10.0
HALF_A_PLACE = 2.0**-24  # of the largest result: noise is no less, even where a few numbers happen to agree


@dataclass(frozen=True)
class Agreement:
    """A torch module with inputs, a call of the JAX model with the same, and what that must give: `expected`, to within `bound`."""

    module: Any
    inputs: tuple[Any, ...]
    call: Callable[[Any], Any]
    expected: npt.NDArray[Any]
    bound: float

    def __call__(self, model: Any) -> bool:
        """Whether a model of JAX gives what the module does."""
        found = np.asarray(self.call(model), np.float64)
        return found.shape == self.expected.shape and bool(abs(found - self.expected).max() <= self.bound)

    def flow(self, tree: Tree) -> Flow | str:
        """What both models do with their arrays; or why JAX cannot trace the call: one that computes with NumPy, say."""
        import torch

        numbers = [one.detach().cpu().double().numpy() for one in self.inputs if isinstance(one, torch.Tensor)]
        try:
            return Flow(torch_uses(copy.deepcopy(self.module), self.inputs), jax_uses(self.call, tree, numbers))
        except Exception as error:  # noqa: BLE001  the user's code: what cannot be traced is run, as any other function
            return f"{type(error).__name__}: {str(error).partition('.')[0].partition(chr(10))[0]}"


def same_outputs(module: Any, inputs: Sequence[Any], call: Callable[[Any], Any]) -> Agreement:
    """A function that tells of a model of JAX whether it agrees with a torch module.

    `inputs` are the module's tensors, `call` gives the JAX model's result for the same, with torch's order of dims. Multiply matrices in
    float32 there: `jax.default_matmul_precision("highest")`. A call that JAX can trace, with no NumPy on what the model computes, says
    more: its flow is compared with the module's.

    >>> same_outputs(torch_model, [x], lambda model: model(jnp.asarray(x.numpy())))  # doctest: +SKIP
    """
    import torch

    with torch.inference_mode():
        expected = module(*inputs).double().numpy()
        wide = [one.double() if one.is_floating_point() else one for one in inputs]
        truth = copy.deepcopy(module).double()(*wide).numpy()
    bound = FACTOR * max(float(abs(expected - truth).max()), HALF_A_PLACE * float(abs(truth).max()))
    return Agreement(module, tuple(inputs), call, expected, bound)
