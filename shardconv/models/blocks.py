"""What a block is made of: norms, attention, MLP and experts, over (batch, length, ...) arrays in float32.

Every contraction is an einsum at the highest precision, since accelerators otherwise multiply float32 in fewer bits. Experts are
all computed and weighted, the unchosen with zero: more work than sparse dispatch, and nothing to drop or to overflow.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from shardconv.models.description import Decoder, Norm, Routing
from shardconv.models.rope import rotate
from shardconv.models.taps import tap

Arrays = Mapping[str, jax.Array]

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def contract(formula: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum of two arrays at the highest precision."""
    return jnp.einsum(formula, left, right, precision=jax.lax.Precision.HIGHEST)


def along(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A bias or scale with as many dims as `x`, over its last ones."""
    return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)


def linear(formula: str, x: jax.Array, arrays: Arrays, role: str) -> jax.Array:
    """`x` times the kernel of a role, plus its bias where it has one."""
    y = contract(formula, x, arrays[role])
    bias = arrays.get(f"{role}_bias")
    return tap(role, y if bias is None else y + along(bias, y))


def normed(norm: Norm, x: jax.Array, arrays: Arrays, role: str, axes: int | tuple[int, ...] = -1) -> jax.Array:
    """RMS norm or layer norm of `x` over `axes`, by the scale of a role, and its bias where it has one."""
    if norm.kind == "layer":
        x = x - jnp.mean(x, axis=axes, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + norm.eps)
    x = x * along(arrays[role] + norm.shift, x)
    bias = arrays.get(f"{role}_bias")
    return tap(role, x if bias is None else x + along(bias, x))


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """`x` kept softly between -cap and cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention(decoder: Decoder, window: int | None, arrays: Arrays, x: jax.Array) -> jax.Array:
    """Causal attention, each key and value head serving heads / kv_heads query heads in a row."""
    query, key, value = (linear("ble,ehd->blhd", x, arrays, role) for role in ("q", "k", "v"))
    over = (-2, -1) if decoder.head_norm == "all" else -1
    if "q_norm" in arrays:
        query, key = normed(decoder.norm, query, arrays, "q_norm", over), normed(decoder.norm, key, arrays, "k_norm", over)
    if decoder.rope is not None:
        query, key = rotate(decoder.rope, query), rotate(decoder.rope, key)
    grouped = query.reshape(*query.shape[:2], decoder.kv_heads, -1, decoder.head_dim)
    scores = contract("blkgd,bmkd->bkglm", grouped, key) * decoder.query_scale
    scores = capped(scores, decoder.attention_cap)
    seen = visible(x.shape[1], window)[None, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    heads = tap("heads", contract("bkglm,bmkd->blkgd", weights, value).reshape(query.shape))
    return linear("blhd,hde->ble", heads, arrays, "o")


def visible(length: int, window: int | None) -> jax.Array:
    """Which key positions (columns) each position (rows) sees.

    >>> visible(3, 2).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    back = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    return (back >= 0) & (back < (length if window is None else window))


def mlp(decoder: Decoder, arrays: Arrays, x: jax.Array) -> jax.Array:
    """The feed-forward part: gated where there is a gate, of experts where there is a router."""
    if decoder.routing is not None:
        return experts(decoder, decoder.routing, arrays, x)
    act = ACTIVATIONS[decoder.activation]
    up = linear("ble,ef->blf", x, arrays, "up")
    inner = act(linear("ble,ef->blf", x, arrays, "gate")) * up if "gate" in arrays else act(up)
    return linear("blf,fe->ble", tap("inner", inner), arrays, "down")


def experts(decoder: Decoder, routing: Routing, arrays: Arrays, x: jax.Array) -> jax.Array:
    """The weighted sum of the chosen experts."""
    gate, up = contract("ble,xef->blxf", x, arrays["experts_gate"]), contract("ble,xef->blxf", x, arrays["experts_up"])
    inner = ACTIVATIONS[decoder.activation](gate) * up
    scores = tap("router", contract("ble,ex->blx", x, arrays["router"]))
    weights = tap("shares", shares(routing, scores, arrays.get("router_bias")))
    return tap("experts", contract("blxf,xfe->ble", inner * weights[..., None], arrays["experts_down"]))


def shares(routing: Routing, scores: jax.Array, bias: jax.Array | None) -> jax.Array:
    """The weight of every expert, zero for those not chosen; a bias counts in the choice and not in the weight.

    >>> shares(Routing("softmax", 1, normalised=True), jnp.array([[[0.0, 1.0]]]), None).tolist()
    [[[0.0, 1.0]]]
    """
    chances = jax.nn.sigmoid(scores) if routing.kind == "sigmoid" else jax.nn.softmax(scores, axis=-1)
    _, best = jax.lax.top_k(chances if bias is None else chances + along(bias, chances), routing.chosen)
    kept = chances * jax.nn.one_hot(best, chances.shape[-1], dtype=chances.dtype).sum(axis=-2)
    return kept / kept.sum(axis=-1, keepdims=True) if routing.normalised else kept
