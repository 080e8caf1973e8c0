"""What the logits of a user's own forward do not depend on, by measurement: nobody but the forward knows how it reads the checkpoint.

A few calls and a gradient (`porting.unseen`) for each sequence, after the comparison. That may take as long as the comparison took and no
longer, and is left out, with a word about it, where arrays of float32 and a gradient of them would not fit in memory beside the checkpoint.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardconv.porting.unseen import CALLS, Call, Index, insensitive
from shardconv.verify.differences import Tokens
from shardconv.verify.forwards import users_forward
from shardconv.verify.unseen import Unseen, part

# Calls per sequence that are needed at least, a gradient counting as three: as it is, nudged, the gradient, all that it proposes changed.
NEEDED = 6
# What is always spent, in seconds: for small models, nearly all of it is compilation.
FREE = 10.0
# In float32: the leaves, and the same again changed, or as a gradient, and what is on the way to it.
COPIES = 3
# Columns to which logits are added up, with signs: those of all sequences are held at once.
COLUMNS = 1024
WHY = "changed by half, they move no judged logit by more than noise"


def insensitive_leaves(
    name: str, leaves: Mapping[str, jax.Array], judged: Sequence[Tokens], memory: int, seconds: float
) -> tuple[tuple[Unseen, ...] | None, str]:
    """The leaves that move no logit of the forward `name` at the `judged` tokens; None, and why, where that was not measured.

    `memory` is bytes that JAX may hold at once, `seconds` what the comparison took.
    """
    needed = COPIES * 4 * sum(leaf.size for leaf in leaves.values())
    if needed > memory:
        return None, f"that takes {needed / 1e9:.1f} GB for copies of the arrays and a gradient (check.memory)"
    forward = users_forward(name)
    longest = max(map(len, judged))

    def call(arrays: Mapping[str, Any], given: Any) -> jax.Array:
        tokens, inside = given
        return jnp.where(inside, _folded(forward(arrays, tokens)[0]), 0)

    inputs = [_padded(tokens, longest) for tokens in judged]
    one = _timed(call, dict(leaves), inputs[0])
    allowed = max(seconds, FREE)
    expected = one * len(inputs) * NEEDED
    if expected > allowed:
        return None, f"that takes about {expected:.0f} s, and the comparison took {seconds:.0f} s"
    calls = min(CALLS, 1 + int((allowed - expected) / max(one * len(inputs), 1e-9)))
    try:
        found = insensitive(call, leaves, inputs, calls=calls, one_by_one=False)
    except (TypeError, ValueError, NotImplementedError) as error:
        return None, f"JAX cannot differentiate {name} ({type(error).__name__})"
    return tuple(_entries(found, leaves)), ""


def _padded(tokens: Tokens, longest: int) -> tuple[jax.Array, jax.Array]:
    """A sequence as long as the longest, (1, longest), and which of its positions are its own, (longest, 1)."""
    padded = np.pad(tokens, (0, longest - len(tokens)))[None]
    return jnp.asarray(padded, jnp.int32), (jnp.arange(longest) < len(tokens))[:, None]


def _timed(call: Call, leaves: dict[str, Any], given: Any) -> float:
    """Seconds of a call that has been compiled."""
    jax.block_until_ready(call(leaves, given))
    start = time.perf_counter()
    jax.block_until_ready(call(leaves, given))
    return time.perf_counter() - start


@jax.jit
def _folded(logits: jax.Array) -> jax.Array:
    """Logits (length, rows) in at most COLUMNS columns: sums of several, each with a sign of its own, so that none cancels another."""
    length, rows = logits.shape
    if rows <= COLUMNS:
        return logits
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), rows)
    signed = jnp.pad(logits.astype(jnp.float32) * signs[None], ((0, 0), (0, -rows % COLUMNS)))
    return signed.reshape(length, -1, COLUMNS).sum(axis=1)


def _entries(found: Mapping[str, tuple[Index, ...]], leaves: Mapping[str, jax.Array]) -> Iterable[Unseen]:
    wholes = tuple(name for name, indices in found.items() if indices == ((),))
    parts = tuple(part(name, indices, leaves[name].shape) for name, indices in found.items() if name not in wholes)
    if wholes:
        yield Unseen("arrays", wholes, WHY, len(wholes), len(leaves))
    if parts:
        yield Unseen("arrays, in part,", parts, WHY, len(parts), len(leaves))
