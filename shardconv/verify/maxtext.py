"""MaxText's tree, transcribed from MaxText 0.2.5's own names and shapes, tensor by tensor; not from `layouts/maxtext.py`.

Scanned leaves have the layers on axis 1, expert leaves the experts on axis 0. Gemma 2 stacks pairs, a local layer 2i and a global 2i + 1.
The query carries head_dim ** -0.5 except in the Qwen families (Gemma 2: query_pre_attn_scalar ** -0.5); Gemma 2's norms are 1 + w and its
embedding is times sqrt(d).
"""

from collections.abc import Mapping
from dataclasses import replace

from shardconv.verify.rows import Row

P, Q = "params.params.decoder.layers.", "model.layers.{l}."

ENDS = (
    Row("params.params.token_embedder.embedding", "model.embed_tokens.weight", "v d", "v d"),
    Row("params.params.decoder.decoder_norm.scale", "model.norm.weight", "d", "d"),
    Row("params.params.decoder.logits_dense.kernel", "lm_head.weight", "v d", "d v", maybe=True),
)
QKVO = (
    Row(P + "self_attention.query.kernel", Q + "self_attn.q_proj.weight", "(n h) d", "d l n h", rotated=True),
    Row(P + "self_attention.key.kernel", Q + "self_attn.k_proj.weight", "(k h) d", "d l k h", rotated=True),
    Row(P + "self_attention.value.kernel", Q + "self_attn.v_proj.weight", "(k h) d", "d l k h"),
    Row(P + "self_attention.out.kernel", Q + "self_attn.o_proj.weight", "d (n h)", "n l h d"),
)
BIASES = (
    Row(P + "self_attention.query.bias", Q + "self_attn.q_proj.bias", "(n h)", "n l h", rotated=True, maybe=True),
    Row(P + "self_attention.key.bias", Q + "self_attn.k_proj.bias", "(k h)", "k l h", rotated=True, maybe=True),
    Row(P + "self_attention.value.bias", Q + "self_attn.v_proj.bias", "(k h)", "k l h", maybe=True),
)
HEAD_NORMS = (
    Row(P + "self_attention.query_norm.scale", Q + "self_attn.q_norm.weight", "h", "h l", rotated=True),
    Row(P + "self_attention.key_norm.scale", Q + "self_attn.k_norm.weight", "h", "h l", rotated=True),
)
TWO_NORMS = (
    Row(P + "pre_self_attention_layer_norm.scale", Q + "input_layernorm.weight", "d", "d l"),
    Row(P + "post_self_attention_layer_norm.scale", Q + "post_attention_layernorm.weight", "d", "d l"),
)
FOUR_NORMS = (
    Row(P + "pre_self_attention_norm.scale", Q + "input_layernorm.weight", "d", "d l", values="+ 1"),
    Row(P + "post_self_attention_norm.scale", Q + "post_attention_layernorm.weight", "d", "d l", values="+ 1"),
    Row(P + "pre_ffw_norm.scale", Q + "pre_feedforward_layernorm.weight", "d", "d l", values="+ 1"),
    Row(P + "post_ffw_norm.scale", Q + "post_feedforward_layernorm.weight", "d", "d l", values="+ 1"),
)
MLP = (
    Row(P + "mlp.wi_0.kernel", Q + "mlp.gate_proj.weight", "f d", "d l f"),
    Row(P + "mlp.wi_1.kernel", Q + "mlp.up_proj.weight", "f d", "d l f"),
    Row(P + "mlp.wo.kernel", Q + "mlp.down_proj.weight", "d f", "f l d"),
)
MIXTRAL = (
    Row(P + "MoeBlock_0.gate.kernel", Q + "block_sparse_moe.gate.weight", "x d", "d l x"),
    Row(P + "MoeBlock_0.wi_0", Q + "block_sparse_moe.experts.{x}.w1.weight", "f d", "x l d f"),
    Row(P + "MoeBlock_0.wi_1", Q + "block_sparse_moe.experts.{x}.w3.weight", "f d", "x l d f"),
    Row(P + "MoeBlock_0.wo", Q + "block_sparse_moe.experts.{x}.w2.weight", "d f", "x l f d"),
)
QWEN_EXPERTS = (
    Row(P + "moe_block.gate.kernel", Q + "mlp.gate.weight", "x d", "d l x"),
    Row(P + "moe_block.wi_0", Q + "mlp.experts.{x}.gate_proj.weight", "f d", "x l d f"),
    Row(P + "moe_block.wi_1", Q + "mlp.experts.{x}.up_proj.weight", "f d", "x l d f"),
    Row(P + "moe_block.wo", Q + "mlp.experts.{x}.down_proj.weight", "d f", "x l f d"),
)


def _query_scaled(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(replace(row, values="* query") if ".query." in row.leaf else row for row in rows)


def _in_pairs(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Gemma 2's rows: `mlp.wi_0` twice, as `mlp_local.wi_0` of every other layer and `mlp_global.wi_0` of those between."""
    found = []
    for kind, first in (("local", 0), ("global", 1)):
        for row in rows:
            block, _, rest = row.leaf.removeprefix(P).partition(".")
            found.append(replace(row, leaf=f"{P}{block}_{kind}.{rest}", first=first, every=2))
    return tuple(found)


GEMMA2_ENDS = (replace(ENDS[0], values="* embed"), replace(ENDS[1], values="+ 1"), ENDS[2])
ROWS: Mapping[str, tuple[Row, ...]] = {
    "llama": ENDS + _query_scaled(QKVO + BIASES) + TWO_NORMS + MLP,
    "mistral": ENDS + _query_scaled(QKVO) + TWO_NORMS + MLP,
    "mixtral": ENDS + _query_scaled(QKVO) + TWO_NORMS + MIXTRAL,
    "qwen2": ENDS + QKVO + BIASES + TWO_NORMS + MLP,
    "qwen3": ENDS + QKVO + BIASES + HEAD_NORMS + TWO_NORMS + MLP,
    "qwen3_moe": ENDS + QKVO + BIASES + HEAD_NORMS + TWO_NORMS + QWEN_EXPERTS,
    "gemma2": GEMMA2_ENDS + _in_pairs(_query_scaled(QKVO) + FOUR_NORMS + MLP),
}


def rows(family: str, scanned: bool) -> tuple[Row, ...] | None:
    """The rows of a family, None where nobody has stated them."""
    known = ROWS.get(family)
    return known if known is None or scanned else tuple(map(_unscanned, known))


def _unscanned(row: Row) -> Row:
    """A layer's row with the layer's number in the leaf's name and not on axis 1."""
    if not row.leaf.startswith(P):
        return row
    return replace(row, leaf=row.leaf.replace("decoder.layers.", "decoder.layers_{l}."), right=row.right.replace(" l", "", 1))
