"""One small network, written by hand in torch and in each JAX library: convolution, batch norm, ReLU, flatten, fully connected."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import torch
from flax import linen, nnx

Array = Any
nn = torch.nn
IMAGE = (3, 6, 5)  # channels first; the convolution's result is 4 x 5 x 4
FLAT = 4 * 5 * 4
KEY = jax.random.key(0)


def torch_net() -> Any:
    torch.manual_seed(0)
    found = nn.Sequential()
    found.add_module("conv1", nn.Conv2d(3, 4, 2))
    found.add_module("bn1", nn.BatchNorm2d(4))
    found.add_module("act", nn.ReLU())
    found.add_module("flat", nn.Flatten())
    found.add_module("fc", nn.Linear(FLAT, 2))
    with torch.no_grad():
        for value in [*found.parameters(), found.bn1.running_mean, found.bn1.running_var]:
            value.add_(torch.rand(value.shape) * 0.3)
    return found.eval()


class LinenNet(linen.Module):
    """`turned`: the model itself goes back to channels first before it flattens, as torch flattens."""

    turned: bool

    @linen.compact
    def __call__(self, x: Array) -> Array:
        x = linen.Conv(4, (2, 2), padding="VALID", name="conv1")(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True, epsilon=1e-5, name="bn1")(x))
        x = jnp.transpose(x, (0, 3, 1, 2)) if self.turned else x
        return linen.Dense(2, name="fc")(x.reshape(x.shape[0], -1))


class NnxNet(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        zeros = nnx.initializers.zeros  # what is there before does not matter, and random numbers take XLA seconds to compile
        self.conv1 = nnx.Conv(3, 4, (2, 2), padding="VALID", kernel_init=zeros, rngs=rngs)
        self.bn1 = nnx.BatchNorm(4, use_running_average=True, epsilon=1e-5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.fc = nnx.Linear(FLAT, 2, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.drop(nnx.relu(self.bn1(self.conv1(x))))
        return self.fc(x.reshape(x.shape[0], -1))


class EqxNet(eqx.Module):
    conv1: eqx.nn.Conv2d
    bn1: eqx.nn.BatchNorm
    act: Callable[[Array], Array]
    fc: eqx.nn.Linear

    def __init__(self, key: Array) -> None:
        self.conv1 = eqx.nn.Conv2d(3, 4, 2, key=key)
        self.bn1 = eqx.nn.BatchNorm(4, "batch", mode="batch", inference=True)
        self.act = jax.nn.relu
        self.fc = eqx.nn.Linear(FLAT, 2, key=key)

    def __call__(self, x: Array, state: Any) -> Array:
        x, _ = self.bn1(self.conv1(x), state)
        return self.fc(self.act(x).reshape(-1))
