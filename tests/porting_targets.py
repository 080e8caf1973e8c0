"""Layers of PyTorch, and the same layers of the JAX libraries: what they are made with, and how they are called.

All layers take and give torch's order of dims here; inside, Flax has channels last and Equinox has no batch. The JAX layers are abstract:
all that they compute with comes from the conversion.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

Array = Any
KEY = jax.random.key(0)
QUICK = {"xla_backend_optimization_level": 0}  # XLA takes longer over these layers than they run
SIZES = {1: (9,), 2: (9, 8), 3: (7, 6, 7)}  # of inputs in space


@dataclass(frozen=True)
class Target:
    """A JAX layer: the abstract model, and how it is called with arrays of torch's order. `at` is the layer's place in the model."""

    model: Any
    call: Callable[..., Array]
    at: str = ""


@dataclass(frozen=True)
class Case:
    """A torch layer, its inputs, and the JAX layers by library. `layer` is its name where it is not the whole module.

    `unseen` are arrays that no output shows. `adjust` gives its weights a property.
    """

    module: Callable[[], Any]
    inputs: tuple[Array, ...]
    targets: Mapping[str, Callable[[], Target]]
    layer: str = ""
    unseen: tuple[str, ...] = ()
    adjust: Callable[[Any], Any] = field(default=lambda module: module)
    output: Callable[[Any], Any] = field(default=lambda found: found)


def last(x: Array) -> Array:
    return jnp.moveaxis(x, 1, -1) if x.ndim > 2 else x


def first(x: Array) -> Array:
    return jnp.moveaxis(x, -1, 1) if x.ndim > 2 else x


def numbers(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def in_linen(layer: Any, *example: Array, channels: bool = False, at: str = "", **options: Any) -> Target:
    turn, back = (last, first) if channels else (lambda x: x, lambda x: x)
    model = jax.eval_shape(lambda: layer.init(KEY, *(turn(jnp.asarray(x)) for x in example), **options))
    call = jax.jit(lambda variables, *inputs: back(layer.apply(variables, *map(turn, inputs), **options)), compiler_options=QUICK)
    return Target(model, call, at)


def in_nnx(make: Callable[[], Any], *, channels: bool = False, at: str = "", **options: Any) -> Target:
    turn, back = (last, first) if channels else (lambda x: x, lambda x: x)
    model = nnx.eval_shape(make)
    structure = nnx.graphdef(model)
    call = jax.jit(
        lambda state, *inputs: back(nnx.merge(structure, state)(*map(turn, inputs), **options)), compiler_options=QUICK
    )
    return Target(model, lambda model, *inputs: call(nnx.state(model), *inputs), at)


def in_equinox(make: Callable[[], Any], dims: int = 1, at: str = "") -> Target:
    """`dims` are the leading dims that the layer has no notion of."""

    def call(model: Any, *inputs: Array) -> Array:
        function = model
        for _ in range(dims):
            function = jax.vmap(function)
        return function(*inputs)

    return Target(eqx.filter_eval_shape(make), eqx.filter_jit(call), at)


def rngs() -> Any:
    return nnx.Rngs(0)


def shaken(module: Any) -> Any:
    """A module in eval mode with numbers everywhere: norms are not ones, running statistics not zeros."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point() and not name.endswith(("_u", "_v")):
                value.add_(0.3 * torch.rand(value.shape, generator=source) + 0.05)
    return module.eval()
