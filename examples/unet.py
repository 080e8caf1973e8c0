"""A small U-Net in Flax Linen with transposed convolutions; its modules have the PyTorch one's names, so that its mapping is `{"": ""}`.

    variables = jax.eval_shape(UNet().init, jax.random.key(0), jnp.ones((1, 64, 64, 3)))
    variables = shardconv.convert_module(torch_unet, variables, {"": ""})
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from shardconv.porting.conventions import transposed_padding


class Double(nn.Module):
    """Two 3 x 3 convolutions, each with a norm and a ReLU."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) to the same of `width` channels."""
        for number in (1, 2):
            x = nn.Conv(self.width, (3, 3), padding=1, use_bias=False, name=f"conv{number}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5, name=f"norm{number}")(x))
        return x


class UNet(nn.Module):
    """Down by max pooling, up by transposed convolutions of 4 x 4 with stride 2, with what was seen on the way down beside it."""

    widths: Sequence[int] = (8, 16, 32)
    classes: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, Any]:
        """Features of images (batch, height, width, 3) by name; "out" has their size."""
        features, seen = {}, []
        for level, width in enumerate(self.widths):
            x = features[f"down{level}"] = Double(width, name=f"down{level}")(x)
            if level < len(self.widths) - 1:
                seen.append(x)
                x = nn.max_pool(x, (2, 2), (2, 2))
        sides = transposed_padding((4, 4), (1, 1), (0, 0), (1, 1))
        for level, width in reversed(list(enumerate(self.widths[:-1]))):
            x = nn.ConvTranspose(width, (4, 4), (2, 2), padding=sides, transpose_kernel=True, name=f"up{level}")(x)
            x = features[f"merge{level}"] = Double(width, name=f"merge{level}")(jnp.concatenate([seen[level], x], axis=-1))
        return {**features, "out": nn.Conv(self.classes, (1, 1), name="out")(x)}


def make_model() -> Any:
    """Its variables, as `[target] layout = "examples.unet:make_model"` has it."""
    return UNet().init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))
