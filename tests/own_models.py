"""Models of a user's own for `[target] layout = "own_models:..."`: layers whose arrays are moved, and such as are computed of several."""

import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

# The torch modules that each is ported from are in `torch_state` of test_own_layout.
MAPPING = """\
ignore = ["rope.{}.inv_freq"]

[mapping]
"conv" = "conv"
"norm" = "norm"
"up" = "up: ConvTranspose2d"
"cell" = "lstm.l0"
"fc" = "fc"
"fc.kernel" = "fc.weight: o (c h w) -> (h w c) o; h=2, w=3"
"""
EQUINOX = MAPPING.replace('"fc.kernel"', '# "fc.kernel"')


class Net(nnx.Module):
    """Arrays only: nothing here is ever run."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 6, (2, 2), transpose_kernel=True, rngs=rngs)  # torch's has two groups
        self.cell = nnx.OptimizedLSTMCell(5, 4, rngs=rngs)
        self.fc = nnx.Linear(8 * 2 * 3, 10, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def nnx_model() -> Net:
    return Net(nnx.Rngs(0))


class Variables(linen.Module):
    @linen.compact
    def __call__(self, image: Any, vector: Any) -> Any:
        x = linen.BatchNorm(use_running_average=True, name="norm")(linen.Conv(8, (3, 3), name="conv")(image))
        linen.ConvTranspose(6, (2, 2), transpose_kernel=True, name="up")(x)
        cell = linen.OptimizedLSTMCell(4, name="cell")
        cell(cell.initialize_carry(jax.random.key(0), vector.shape), vector)
        return linen.Dense(10, name="fc")(x.reshape(len(x), -1))


def linen_model() -> Any:
    return Variables().init(jax.random.key(0), jnp.ones((1, 2, 3, 3)), jnp.ones((1, 5)))


class Module(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    up: eqx.nn.ConvTranspose2d
    cell: eqx.nn.LSTMCell
    fc: eqx.nn.Linear
    activation: Any

    def __init__(self, key: Any) -> None:
        self.conv = eqx.nn.Conv2d(3, 8, 3, key=key)
        self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch")
        self.up = eqx.nn.ConvTranspose2d(8, 6, 2, groups=2, key=key)
        self.cell = eqx.nn.LSTMCell(5, 4, key=key)
        self.fc = eqx.nn.Linear(48, 10, key=key)
        self.activation = jax.nn.relu


def equinox_model() -> Any:
    return eqx.nn.make_with_state(Module)(jax.random.key(0))


# Functions that are no good


def untraceable() -> Any:
    kernel = np.asarray(jnp.ones((3, 4)))  # an array must be there
    return {"fc": {"weight": kernel}}


def failing() -> Any:
    raise OSError("the weights of the week are not here")


def without_arrays() -> Any:
    return linen.Dense(3)


def dying() -> Any:
    sys.stderr.write("out of luck\n")
    sys.stderr.flush()
    import os

    os._exit(9)


NOT_A_FUNCTION = 3
