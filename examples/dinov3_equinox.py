"""DINOv3's vision transformer in Equinox, channels first.

    model = eqx.filter_eval_shape(DINOv3, Sizes(), jax.random.key(0))
    model = shardconv.convert_module("checkpoints/dinov3-vits16", model, "examples/dinov3_equinox.toml")
    features = jax.vmap(model)(images)                     # images are (batch, 3, height, width)
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from examples.dinov3_rope import Sizes, angles, attended


class Block(eqx.Module):
    """Attention and a perceptron, each with a norm before and a scale after."""

    norm1: eqx.nn.LayerNorm
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    out: eqx.nn.Linear
    scale1: jax.Array
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    scale2: jax.Array
    heads: int = eqx.field(static=True)

    def __init__(self, sizes: Sizes, key: jax.Array) -> None:
        embed, self.heads = sizes.embed, sizes.heads
        self.norm1, self.norm2 = eqx.nn.LayerNorm(embed), eqx.nn.LayerNorm(embed)
        self.query, self.value = eqx.nn.Linear(embed, embed, key=key), eqx.nn.Linear(embed, embed, key=key)
        self.key = eqx.nn.Linear(embed, embed, use_bias=False, key=key)
        self.out = eqx.nn.Linear(embed, embed, key=key)
        self.up, self.down = eqx.nn.Linear(embed, sizes.mlp, key=key), eqx.nn.Linear(sizes.mlp, embed, key=key)
        self.scale1, self.scale2 = jnp.ones(embed), jnp.ones(embed)

    def __call__(self, x: jax.Array, turn: jax.Array) -> jax.Array:
        """(tokens, embed) to the same."""
        y = jax.vmap(self.norm1)(x)
        query, key, value = (jax.vmap(layer)(y).reshape(len(x), self.heads, -1) for layer in (self.query, self.key, self.value))
        x = x + jax.vmap(self.out)(attended(query, key, value, turn).reshape(x.shape)) * self.scale1[None]
        y = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm2)(x)), approximate=False)
        return x + jax.vmap(self.down)(y) * self.scale2[None]


class DINOv3(eqx.Module):
    """Gives the tokens before the first block, after each, and after the last norm: class, registers, patches."""

    patch: eqx.nn.Conv2d
    class_token: jax.Array
    registers: jax.Array
    mask_token: jax.Array
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    sizes: Sizes = eqx.field(static=True)

    def __init__(self, sizes: Sizes, key: jax.Array) -> None:
        self.sizes = sizes
        self.patch = eqx.nn.Conv2d(3, sizes.embed, sizes.patch, sizes.patch, key=key)
        self.class_token, self.mask_token = jnp.zeros(sizes.embed), jnp.zeros(sizes.embed)
        self.registers = jnp.zeros((sizes.registers, sizes.embed))
        self.blocks = [Block(sizes, key) for _ in range(sizes.layers)]
        self.norm = eqx.nn.LayerNorm(sizes.embed)

    def __call__(self, image: jax.Array, masked: jax.Array | None = None) -> list[jax.Array]:
        """Tokens of an image (3, height, width); `masked` are its patches, row by row, that the model may not see."""
        grid = self.patch(image)
        x = grid.reshape(self.sizes.embed, -1).T
        if masked is not None:
            x = jnp.where(masked[:, None], self.mask_token[None], x)
        x = jnp.concatenate([self.class_token[None], self.registers, x])
        found, turn = [x], angles(*grid.shape[1:], self.sizes)
        for block in self.blocks:
            found.append(x := block(x, turn))
        return [*found, jax.vmap(self.norm)(x)]


def make_model() -> DINOv3:
    """ViT-S/16, as `[target] layout = "examples.dinov3_equinox:make_model"` has it."""
    return DINOv3(Sizes(), jax.random.key(0))
