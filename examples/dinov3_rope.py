"""What both DINOv3 examples share: its sizes, and where its patches are."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Sizes:
    """A DINOv3 vision transformer; the defaults are ViT-S/16."""

    embed: int = 384
    mlp: int = 1536
    layers: int = 12
    heads: int = 6
    patch: int = 16
    registers: int = 4
    theta: float = 100.0

    @property
    def head_dim(self) -> int:
        """Numbers per head."""
        return self.embed // self.heads


def angles(rows: int, columns: int, sizes: Sizes) -> jax.Array:
    """The angles of rotary position embedding, (patches, head_dim): of the centres of patches, in [-1, 1] both ways."""
    centres = [2 * (jnp.arange(count) + 0.5) / count - 1 for count in (rows, columns)]
    places = jnp.stack(jnp.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2)
    frequencies = sizes.theta ** -jnp.arange(0, 1, 4 / sizes.head_dim)
    half = (2 * jnp.pi * places[:, :, None] * frequencies[None, None, :]).reshape(rows * columns, -1)
    return jnp.concatenate([half, half], axis=-1)


def rotated(x: jax.Array, turn: jax.Array) -> jax.Array:
    """Queries or keys (tokens, heads, head_dim) with the patches among them, the last tokens, rotated by their angles."""
    first, patches = x[: -turn.shape[0]], x[-turn.shape[0] :]
    a, b = jnp.split(patches, 2, axis=-1)
    turned = patches * jnp.cos(turn)[:, None] + jnp.concatenate([-b, a], axis=-1) * jnp.sin(turn)[:, None]
    return jnp.concatenate([first, turned])


def attended(query: jax.Array, key: jax.Array, value: jax.Array, turn: jax.Array) -> jax.Array:
    """Attention of (tokens, heads, head_dim), with rotated queries and keys."""
    query, key = rotated(query, turn), rotated(key, turn)
    scores = jnp.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), value)
