"""Agreement: whether a converted model computes what the PyTorch model does, for `convert_module(..., agrees=...)`.

No tolerance is guessed: the PyTorch model runs in float32 and in float64, and what the two differ by is noise. A port that is right is off
by a few times that, and one with two layers exchanged by thousands.

What is given to compare the two is also what is needed to follow a run of each: `flow`.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.errors import ConfigError, Problem
from shardconv.porting.flow import Flow
from shardconv.porting.jax_uses import jax_uses
from shardconv.porting.moves import Bound, Move
from shardconv.porting.torch_uses import torch_uses
from shardconv.porting.trees import Tree

# How many times the noise a port may be off by: sound ones came to less than 4, those with two layers exchanged to thousands.
FACTOR = 10.0
HALF_A_PLACE = 2.0**-24  # of the largest result: noise is no less, even where a few numbers happen to agree
TITLE = "the results cannot be compared"
Inputs = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """A result of a JAX model beside torch's: both shapes, how many numbers are NaN, as none of torch's are, and by how much the others are
    off at most, where the shapes are the same; `bound` is what noise allows."""

    shape: tuple[int, ...]
    expected: tuple[int, ...]
    size: int
    nans: int
    off: float
    bound: float

    @property
    def agrees(self) -> bool:
        """Whether the two are the same but for noise."""
        return self.is_shaped and not self.nans and self.off <= self.bound

    @property
    def is_shaped(self) -> bool:
        """Whether the two have one shape."""
        return self.shape == self.expected

    @property
    def said(self) -> str:
        """What differs, in words."""
        if not self.is_shaped:
            return f"its result is {self.shape}, and PyTorch's {self.expected}"
        if self.nans:
            return f"{self.nans} of the {self.size} numbers of its result are NaN, and none of PyTorch's"
        return f"its result is off by {self.off:.2g}, and noise allows {self.bound:.2g}"


@dataclass(frozen=True)
class Agreement:
    """A torch module with inputs, a call of the JAX model with the same, and what that must give: `expected`, to within `bound`."""

    module: Any
    inputs: Inputs
    call: Callable[[Any], Any]
    expected: npt.NDArray[Any]
    bound: float

    def __call__(self, model: Any) -> bool:
        """Whether a model of JAX gives what the module does."""
        return self.measured(model).agrees

    def measured(self, model: Any) -> Measured:
        """What a model of JAX gives, beside what the module does; ConfigError where it is no array."""
        given = self.call(model)
        if not hasattr(given, "__array__"):
            remedy = "let the call give one array, which is compared with the first tensor of PyTorch's result"
            raise ConfigError(TITLE, [Problem(f"the call gives a {type(given).__name__}", remedy)])
        found = np.asarray(given, np.float64)
        if found.shape != self.expected.shape:
            return Measured(found.shape, self.expected.shape, found.size, 0, 0.0, self.bound)
        nans = int(np.isnan(found).sum())
        return Measured(found.shape, found.shape, found.size, nans, largest_difference(found, self.expected), self.bound)

    def flow(self, tree: Tree) -> Flow | str:
        """What both models do with their arrays; or why JAX cannot trace the call: one that computes with NumPy, say."""
        import torch

        values = list(self.inputs.values()) if isinstance(self.inputs, Mapping) else self.inputs
        numbers = [one.detach().cpu().double().numpy() for one in values if isinstance(one, torch.Tensor)]
        module = copy.deepcopy(self.module)
        try:
            return Flow(
                torch_uses(_ByName(module, tuple(self.inputs)) if isinstance(self.inputs, Mapping) else module, values),
                jax_uses(self.call, tree, numbers),
            )
        except Exception as error:  # noqa: BLE001  the user's code: what cannot be traced is run, as any other function
            return f"{type(error).__name__}: {str(error).partition('.')[0].partition(chr(10))[0]}"


@dataclass
class Runs:
    """Runs of converted models with a user's function, `agrees`; of the same moves there is one. `measured` has what an Agreement says of
    those that do not agree, by the moves."""

    agrees: Callable[[Any], bool]
    known: dict[frozenset[Move], bool] = field(default_factory=dict)
    measured: dict[frozenset[Move], Measured] = field(default_factory=dict)

    def __call__(self, moves: Iterable[Bound], model: Callable[[], Any]) -> bool:
        """Whether the model that these moves make agrees; `model` makes it."""
        key = frozenset(one.move for one in moves)
        if key not in self.known:
            self.known[key] = False if self.misshaped else self.run(key, model())
        return self.known[key]

    def run(self, key: frozenset[Move], model: Any) -> bool:
        """Whether a model agrees."""
        if not isinstance(self.agrees, Agreement):
            return bool(self.agrees(model))
        found = self.agrees.measured(model)
        if not found.agrees:
            self.measured[key] = found
        return found.agrees

    @property
    def misshaped(self) -> Measured | None:
        """A result of another shape than torch's; no numbers change that, so that nothing more is run then."""
        return next((one for one in self.measured.values() if not one.is_shaped), None)

    @property
    def nearest(self) -> Measured | None:
        """Of the results that do not agree, the one that is off by the least."""
        return min((one for one in self.measured.values() if one.is_shaped and not one.nans), key=lambda one: one.off, default=None)

    def said(self, moves: Iterable[Bound]) -> str:
        """What differs where a model that was run does not agree."""
        found = self.measured.get(frozenset(one.move for one in moves), self.misshaped)
        return found.said if found else "agrees= says so"


@dataclass(frozen=True)
class _ByName:
    """A module whose inputs go by keyword, called as if they did not."""

    module: Any
    names: tuple[str, ...]

    def __call__(self, *values: Any) -> Any:
        return self.module(**dict(zip(self.names, values, strict=True)))

    def state_dict(self, **how: Any) -> Any:
        return self.module.state_dict(**how)


def same_outputs(module: Any, inputs: Inputs, call: Callable[[Any], Any]) -> Agreement:
    """A function that tells of a model of JAX whether it agrees with a torch module.

    `inputs` are what the module is called with, a list, or a dict where they go by keyword. Where the module gives several tensors, in a
    tuple, a dict or an output of transformers, the first is compared. `call` gives the JAX model's array for the same, with torch's order
    of dims. Multiply matrices in float32 there: `jax.default_matmul_precision("highest")`. A call that JAX can trace, with no NumPy on
    what the model computes, says more: its flow is compared with the module's. Raises ConfigError where the module gives no tensor, NaN,
    or numbers that are all noise, as dropout makes them.

    >>> same_outputs(torch_model, [x], lambda model: model(jnp.asarray(x.numpy())))  # doctest: +SKIP
    """
    import torch

    inputs = {**inputs} if isinstance(inputs, Mapping) else tuple(inputs)

    def widened(one: Any) -> Any:
        return one.double() if isinstance(one, torch.Tensor) and one.is_floating_point() else one

    with torch.inference_mode():
        if isinstance(inputs, Mapping):
            given, wide = module(**inputs), copy.deepcopy(module).double()(**{name: widened(one) for name, one in inputs.items()})
        else:
            given, wide = module(*inputs), copy.deepcopy(module).double()(*map(widened, inputs))
        expected, truth = (_first(torch, one).cpu().double().numpy() for one in (given, wide))
    if nans := int(np.isnan(expected).sum()):
        fact = f"{nans} of the {expected.size} numbers of PyTorch's result are NaN"
        raise ConfigError(TITLE, [Problem(fact, "give inputs for which it computes numbers")])
    largest = float(abs(truth[np.isfinite(truth)]).max(initial=0.0))
    bound = FACTOR * max(largest_difference(expected, truth), HALF_A_PLACE * largest)
    if bound > largest:  # zeros would agree
        fact = f"PyTorch's result is up to {largest:.2g}, and in float32 off by {bound / FACTOR:.2g} from what it is in float64"
        raise ConfigError(TITLE, [Problem(fact, "call module.eval(), if it has dropout; or give inputs for which it is stable")])
    return Agreement(module, inputs, call, expected, bound)


def largest_difference(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """By how much two arrays of one shape differ at most, where neither is NaN; equal infinities do not."""
    differ = (found != expected) & ~np.isnan(found) & ~np.isnan(expected)
    return float(abs(found[differ] - expected[differ]).max(initial=0.0))


def _first(torch: Any, given: Any) -> Any:
    """The first tensor of a module's result; ConfigError where there is none."""
    several = given.values() if isinstance(given, Mapping) else given if isinstance(given, list | tuple) else [given]
    found = next((one for one in several if isinstance(one, torch.Tensor)), None)
    if found is None:
        fact = f"PyTorch's module gives a {type(given).__name__} without tensors"
        raise ConfigError(TITLE, [Problem(fact, "wrap it in a torch.nn.Module that gives the tensor to compare")])
    return found
