"""DINOv3's vision transformer in Flax NNX, with heads as an axis of its kernels.

    model = nnx.eval_shape(lambda: DINOv3(Sizes(), nnx.Rngs(0)))
    shardconv.convert_module("checkpoints/dinov3-vits16", model, "examples/dinov3_nnx.toml")
    features = jax.vmap(model)(images)                     # images are (batch, height, width, 3)

Files with Meta's names have `dinov3_nnx_meta.toml`. `configs/dinov3_vits16.toml` converts either from the command line.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from examples.dinov3_rope import Sizes, angles, attended


class Block(nnx.Module):
    """Attention and a perceptron, each with a norm before and a scale after."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        heads = (sizes.heads, sizes.head_dim)
        self.norm1 = nnx.LayerNorm(sizes.embed, epsilon=1e-5, rngs=rngs)
        self.query = nnx.LinearGeneral(sizes.embed, heads, rngs=rngs)
        self.key = nnx.LinearGeneral(sizes.embed, heads, use_bias=False, rngs=rngs)
        self.value = nnx.LinearGeneral(sizes.embed, heads, rngs=rngs)
        self.out = nnx.LinearGeneral(heads, sizes.embed, axis=(-2, -1), rngs=rngs)
        self.scale1 = nnx.Param(jnp.ones(sizes.embed))
        self.norm2 = nnx.LayerNorm(sizes.embed, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(sizes.embed, sizes.mlp, rngs=rngs)
        self.down = nnx.Linear(sizes.mlp, sizes.embed, rngs=rngs)
        self.scale2 = nnx.Param(jnp.ones(sizes.embed))

    def __call__(self, x: jax.Array, turn: jax.Array) -> jax.Array:
        """(tokens, embed) to the same."""
        y = self.norm1(x)
        x = x + self.out(attended(self.query(y), self.key(y), self.value(y), turn)) * self.scale1[...][None]
        y = jax.nn.gelu(self.up(self.norm2(x)), approximate=False)
        return x + self.down(y) * self.scale2[...][None]


class DINOv3(nnx.Module):
    """Gives the tokens before the first block, after each, and after the last norm: class, registers, patches."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        self.sizes = sizes
        patch = (sizes.patch, sizes.patch)
        self.patch = nnx.Conv(3, sizes.embed, patch, patch, padding="VALID", rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros(sizes.embed))
        self.registers = nnx.Param(jnp.zeros((sizes.registers, sizes.embed)))
        self.mask_token = nnx.Param(jnp.zeros(sizes.embed))
        self.blocks = nnx.List([Block(sizes, rngs) for _ in range(sizes.layers)])
        self.norm = nnx.LayerNorm(sizes.embed, epsilon=1e-5, rngs=rngs)

    def __call__(self, image: jax.Array, masked: jax.Array | None = None) -> list[jax.Array]:
        """Tokens of an image (height, width, 3); `masked` are its patches, row by row, that the model may not see."""
        grid = self.patch(image[None])[0]
        x = grid.reshape(-1, self.sizes.embed)
        if masked is not None:
            x = jnp.where(masked[:, None], self.mask_token[...][None], x)
        x = jnp.concatenate([self.class_token[...][None], self.registers[...], x])
        found, turn = [x], angles(*grid.shape[:2], self.sizes)
        for block in self.blocks:
            found.append(x := block(x, turn))
        return [*found, self.norm(x)]


def make_model() -> DINOv3:
    """ViT-S/16, as `[target] layout = "examples.dinov3_nnx:make_model"` has it."""
    return DINOv3(Sizes(), nnx.Rngs(0))
