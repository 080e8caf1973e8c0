"""The forward: embed, blocks, head, each jitted on its own.

Blocks that compute the same are compiled once, whatever the number of layers, and only one block's arrays are needed at a time: what
`fetch` brings may come from memory, from devices of a mesh or from disk. Arrays of any float dtype are computed with in float32; where
they are sharded, XLA goes by that.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from shardconv.models.blocks import Arrays, attention, capped, contract, mlp, normed
from shardconv.models.description import Decoder, Place, Reading
from shardconv.models.taps import listening


@dataclass(frozen=True)
class Weights:
    """A reading and how to fetch the array of a place."""

    reading: Reading
    fetch: Callable[[Place], jax.Array]

    def arrays(self, places: Mapping[str, Place]) -> dict[str, jax.Array]:
        """The arrays of some places, by role."""
        return {role: self.fetch(place) for role, place in places.items()}


def weights_of(reading: Reading, leaves: Mapping[str, jax.Array]) -> Weights:
    """Weights whose leaves are at hand."""

    def fetch(place: Place) -> jax.Array:
        leaf = leaves[place.leaf]
        return leaf if place.index is None else _layer(leaf, place.index, axis=place.axis)

    return Weights(reading, fetch)


@partial(jax.jit, static_argnames="axis")
def _layer(leaf: jax.Array, index: int, *, axis: int) -> jax.Array:
    array: jax.Array = jax.lax.dynamic_index_in_dim(leaf, index, axis, keepdims=False)
    return array


def logits(weights: Weights, tokens: jax.Array) -> jax.Array:
    """Logits in float32, (batch, length, rows of the output projection), of token ids (batch, length)."""
    for _, state in states(weights, tokens):  # noqa: B007  the last one is wanted
        pass
    return state


def states(weights: Weights, tokens: jax.Array) -> Iterator[tuple[str, jax.Array]]:
    """What the model holds after each step, by name: "embed", "block 0", "block 1", ..., "logits"."""
    for name, x, _ in hidden(weights, tokens):
        yield name, x
    yield "logits", unembedded(weights)(x)


def hidden(weights: Weights, tokens: jax.Array) -> Iterator[tuple[str, jax.Array, jax.Array | None]]:
    """The states before and after each block, (batch, length, embed), by name: "embed", "block 0", "block 1", ...

    With each comes which experts of the block have a share in a token, (batch, length, experts), or None where there are none.

    Each step is waited for. Several programs in flight over more virtual CPU devices than there are cores take one another's threads and
    wait for each other for ever (seen with 8 devices on 2 cores); and it keeps one block's arrays in memory, not as many as are dispatched.
    """
    reading = weights.reading
    decoder = reading.decoder
    x = jax.block_until_ready(embedded(decoder, weights.arrays(_some(reading.ends, "embed", "positions")), tokens))
    yield "embed", x, None
    for layer, window in enumerate(decoder.windows):
        x, routed = jax.block_until_ready(block(decoder, window, block_arrays(weights, layer), x))
        yield f"block {layer}", x, routed


def block_arrays(weights: Weights, layer: int) -> dict[str, jax.Array]:
    """The arrays of a block by role, in float32; each is fetched and cast before the next."""
    places = weights.reading.blocks[layer]
    return {role: jax.block_until_ready(weights.fetch(place).astype(jnp.float32)) for role, place in places.items()}


def unembedded(weights: Weights) -> Callable[[jax.Array], jax.Array]:
    """The function from what the last block gives to logits; its arrays are fetched once."""
    arrays = head_arrays(weights)
    return lambda x: jax.block_until_ready(head(weights.reading.decoder, arrays, x))


def head_arrays(weights: Weights) -> dict[str, jax.Array]:
    """The arrays of the final norm and the output projection, by role."""
    ends = weights.reading.ends
    return weights.arrays(_some(ends, "final_norm", "final_norm_bias", "unembed" if "unembed" in ends else "embed"))


def _some(places: Mapping[str, Place], *roles: str) -> dict[str, Place]:
    return {role: places[role] for role in roles if role in places}


@partial(jax.jit, static_argnames="decoder")
def embedded(decoder: Decoder, ends: Arrays, tokens: jax.Array) -> jax.Array:
    """The embeddings of tokens, (batch, length, embed)."""
    x = jnp.take(ends["embed"], tokens, axis=0).astype(jnp.float32) * decoder.embed_scale
    return x + ends["positions"][None, : x.shape[1]].astype(jnp.float32) if "positions" in ends else x


def _block(decoder: Decoder, window: int | None, arrays: Arrays, x: jax.Array) -> jax.Array:
    """One block, (batch, length, embed) to the same, with arrays in float32."""
    inner = normed(decoder.norm, x, arrays, "attn_norm")
    y = attention(decoder, window, arrays, inner)
    y = normed(decoder.norm, y, arrays, "attn_post_norm") if "attn_post_norm" in arrays else y
    if decoder.parallel:
        inner = normed(decoder.norm, x, arrays, "mlp_norm") if "mlp_norm" in arrays else inner
        return x + y + mlp(decoder, arrays, inner)
    x = x + y
    y = mlp(decoder, arrays, normed(decoder.norm, x, arrays, "mlp_norm"))
    return x + (normed(decoder.norm, y, arrays, "mlp_post_norm") if "mlp_post_norm" in arrays else y)


def _head(decoder: Decoder, ends: Arrays, x: jax.Array) -> jax.Array:
    """The logits of what the last block gives."""
    arrays = {role: array.astype(jnp.float32) for role, array in ends.items()}
    x = normed(decoder.norm, x, arrays, "final_norm")
    y = contract("ble,ev->blv", x, arrays["unembed"]) if "unembed" in arrays else contract("ble,ve->blv", x, arrays["embed"])
    return capped(y * decoder.logit_scale, decoder.logit_cap)


head = jax.jit(_head, static_argnames="decoder")


@partial(jax.jit, static_argnames=("decoder", "window"))
def block(decoder: Decoder, window: int | None, arrays: Arrays, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """One block, and which experts have a share in each token, (batch, length, experts), None without experts."""
    with listening() as heard:
        out = _block(decoder, window, arrays, x)
    return out, heard["shares"] != 0 if "shares" in heard else None


@partial(jax.jit, static_argnames=("decoder", "window"))
def block_parts(decoder: Decoder, window: int | None, arrays: Arrays, x: jax.Array) -> dict[str, jax.Array]:
    """What each part of a block makes of the state before it, by role; "out" is the state behind it."""
    with listening() as heard:
        out = _block(decoder, window, arrays, x)
    return {role: part for role, part in heard.items() if role != "shares"} | {"out": out}


@partial(jax.jit, static_argnames="decoder")
def head_parts(decoder: Decoder, ends: Arrays, x: jax.Array) -> dict[str, jax.Array]:
    """What the final norm and the output projection make of the state behind the last block."""
    with listening() as heard:
        out = _head(decoder, ends, x)
    return {**heard, "unembed": out}
