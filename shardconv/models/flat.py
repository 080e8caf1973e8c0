"""How code that takes the flat layout reads it.

    embed  final_norm  unembed            unscanned  layers.3.attn.q        scanned  layers.attn.q, layers first

Kernels are [in, out] with heads apart; every value is the published one, so the model scales its query, shifts its norms and scales its
embedding itself. Rotary dims are in the order of the published checkpoint, unless another was asked for.
"""

from collections.abc import Collection
from dataclasses import replace

from shardconv.models.description import Decoder, Place, Reading

ENDS = ("embed", "positions", "final_norm", "final_norm_bias", "unembed")
BLOCK = {
    "attn_norm": "attn_norm",
    "attn_post_norm": "attn_post_norm",
    "mlp_norm": "mlp_norm",
    "mlp_post_norm": "mlp_post_norm",
    **{role: f"attn.{role}" for role in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm")},
    **{role: f"mlp.{role}" for role in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")},
    "router": "experts.router",
    "experts_gate": "experts.gate",
    "experts_up": "experts.up",
    "experts_down": "experts.down",
}


def read(decoder: Decoder, names: Collection[str], scanned: bool, rope: str) -> Reading:
    """Where the flat layout has each role; roles that have no leaf are left out."""
    ends = {role: Place(role) for role in ENDS if role in names}
    blocks = tuple(
        {
            role: Place(f"layers.{leaf}", layer) if scanned else Place(f"layers.{layer}.{leaf}")
            for role, leaf in BLOCK.items()
            if (f"layers.{leaf}" if scanned else f"layers.{layer}.{leaf}") in names
        }
        for layer in range(decoder.layers)
    )
    if rope != "auto" and decoder.rope is not None:
        decoder = replace(decoder, rope=replace(decoder.rope, pairs=rope == "interleaved"))
    return Reading(decoder, ends, blocks)
