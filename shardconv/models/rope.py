"""Rotary position embedding: frequencies, their scalings, and the rotation in both orders of dims.

Frequencies are computed in float64 and rounded once, so they may differ from a float32 computation by a unit in the last place; at
position p that is p units in the angle, as large as the rounding of the product itself.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from shardconv.models.description import Rope


def frequencies(rope: Rope) -> npt.NDArray[np.float32]:
    """The angle per position of each of the dims / 2 rotations, float32.

    >>> frequencies(Rope(base=10_000.0, dims=4))
    array([1.  , 0.01], dtype=float32)
    """
    plain: npt.NDArray[Any] = rope.base ** -(np.arange(0, rope.dims, 2) / rope.dims)
    if rope.scaling == "linear":
        plain = plain / rope.factor
    elif rope.scaling == "llama3":
        plain = _llama3(rope, plain)
    elif rope.scaling == "yarn":
        plain = _yarn(rope, plain)
    return plain.astype(np.float32)


def _llama3(rope: Rope, plain: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Llama 3.1: long waves are slowed down by the factor, short ones kept, those between blended."""
    turns = rope.original_length * plain / (2 * math.pi)  # that a wave makes in the original context
    kept = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
    blended: npt.NDArray[Any] = (1 - kept) * plain / rope.factor + kept * plain
    return blended


def _yarn(rope: Rope, plain: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """YaRN (arXiv 2309.00071, section 3.2): the same idea, blended linearly over dims instead of over turns."""

    def dim_of(turns: float) -> float:
        return rope.dims * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = dim_of(rope.high), dim_of(rope.low)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    slowed = np.clip((np.arange(rope.dims // 2) - low) / (high - low or 0.001), 0, 1)
    blended: npt.NDArray[Any] = slowed * plain / rope.factor + (1 - slowed) * plain
    return blended


def rotate(rope: Rope, x: jax.Array) -> jax.Array:
    """Rotates query or key heads, (batch, length, heads, head_dim), by their positions 0, 1, 2, ..."""
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * jnp.asarray(frequencies(rope))[None, :]
    angles = angles[None, :, None, :]
    cos, sin = jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude
    turned, rest = x[..., : rope.dims], x[..., rope.dims :]
    if rope.pairs:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., : rope.dims // 2], turned[..., rope.dims // 2 :]
    parts = first * cos - second * sin, second * cos + first * sin
    both = jnp.stack(parts, axis=-1).reshape(turned.shape) if rope.pairs else jnp.concatenate(parts, axis=-1)
    return jnp.concatenate((both, rest), axis=-1)
