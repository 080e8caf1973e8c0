"""A user's own JAX model three times over: a small Llama in Flax Linen, Flax NNX and Equinox. Their forwards are those of `docs/logits.md`.

The parameters of all three have the names of the flat layout, layers stacked.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen, nnx

LAYERS, EMBED, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 48, 40, 6, 2, 16, 62
ATTENTION = {
    "q": (EMBED, HEADS, HEAD_DIM),
    "k": (EMBED, KV_HEADS, HEAD_DIM),
    "v": (EMBED, KV_HEADS, HEAD_DIM),
    "o": (HEADS, HEAD_DIM, EMBED),
}
GATED = {"gate": (EMBED, MLP), "up": (EMBED, MLP), "down": (MLP, EMBED)}
Array = Any


def normed(x: Array, scale: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale[None, None]


def rotated(heads: Array) -> Array:
    frequencies = 10_000.0 ** (-jnp.arange(0, HEAD_DIM, 2, dtype=jnp.float32) / HEAD_DIM)
    angles = jnp.outer(jnp.arange(heads.shape[1], dtype=jnp.float32), frequencies)[None, :, None]
    a, b = jnp.split(heads, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], axis=-1)


def attended(x: Array, q: Array, k: Array, v: Array, o: Array) -> Array:
    queries, keys, values = (jnp.einsum("btd,dnh->btnh", x, kernel) for kernel in (q, k, v))
    found = jax.nn.dot_product_attention(rotated(queries), rotated(keys), values, is_causal=True)
    return jnp.einsum("btnh,nhd->btd", found, o)


def gated(x: Array, gate: Array, up: Array, down: Array) -> Array:
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


# Flax Linen


class LinenAttention(linen.Module):
    @linen.compact
    def __call__(self, x: Array) -> Array:
        return attended(x, *(self.param(name, linen.initializers.normal(), shape) for name, shape in ATTENTION.items()))


class LinenMlp(linen.Module):
    @linen.compact
    def __call__(self, x: Array) -> Array:
        return gated(x, *(self.param(name, linen.initializers.normal(), shape) for name, shape in GATED.items()))


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        ones = linen.initializers.ones
        x = x + LinenAttention(name="attn")(normed(x, self.param("attn_norm", ones, (EMBED,))))
        return x + LinenMlp(name="mlp")(normed(x, self.param("mlp_norm", ones, (EMBED,)))), None


class LinenLlama(linen.Module):
    @linen.compact
    def __call__(self, tokens: Array) -> Array:
        layers = linen.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x = self.param("embed", linen.initializers.normal(), (VOCAB, EMBED))[tokens]
        x, _ = layers(name="layers")(x, None)
        x = normed(x, self.param("final_norm", linen.initializers.ones, (EMBED,)))
        return x @ self.param("unembed", linen.initializers.normal(), (EMBED, VOCAB))


# Flax NNX


class NnxPart(nnx.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], rngs: nnx.Rngs) -> None:
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jax.random.normal(rngs.params(), (LAYERS, *shape))))


class NnxLayers(NnxPart):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__({"attn_norm": (EMBED,), "mlp_norm": (EMBED,)}, rngs)
        self.attn, self.mlp = NnxPart(ATTENTION, rngs), NnxPart(GATED, rngs)

    def __call__(self, x: Array) -> Array:
        for layer in range(LAYERS):
            kernels = [getattr(self.attn, name)[layer] for name in ATTENTION]
            x = x + attended(normed(x, self.attn_norm[layer]), *kernels)
            x = x + gated(normed(x, self.mlp_norm[layer]), *(getattr(self.mlp, name)[layer] for name in GATED))
        return x


class NnxLlama(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, EMBED)))
        self.final_norm = nnx.Param(jnp.ones(EMBED))
        self.unembed = nnx.Param(jax.random.normal(rngs.params(), (EMBED, VOCAB)))
        self.layers = NnxLayers(rngs)

    def __call__(self, tokens: Array) -> Array:
        return normed(self.layers(self.embed[tokens]), self.final_norm[...]) @ self.unembed[...]


# Equinox


class EqxBlock(eqx.Module):
    attn_norm: Array
    mlp_norm: Array
    attn: dict[str, Array]
    mlp: dict[str, Array]

    def __call__(self, x: Array) -> Array:
        x = x + attended(normed(x, self.attn_norm), *(self.attn[name] for name in ATTENTION))
        return x + gated(normed(x, self.mlp_norm), *(self.mlp[name] for name in GATED))


class EqxLlama(eqx.Module):
    embed: Array
    final_norm: Array
    unembed: Array
    layers: EqxBlock

    def __init__(self, key: Array) -> None:
        def stacked(shape: tuple[int, ...]) -> Array:
            return jax.random.normal(key, (LAYERS, *shape))

        self.embed, self.unembed = jax.random.normal(key, (VOCAB, EMBED)), jax.random.normal(key, (EMBED, VOCAB))
        self.final_norm = jnp.ones(EMBED)
        parts = [{name: stacked(shape) for name, shape in shapes.items()} for shapes in (ATTENTION, GATED)]
        self.layers = EqxBlock(stacked((EMBED,)), stacked((EMBED,)), *parts)

    def __call__(self, tokens: Array) -> Array:
        x, _ = jax.lax.scan(lambda x, block: (block(x), None), self.embed[tokens], self.layers)
        return normed(x, self.final_norm) @ self.unembed
