"""The flat layout by its own rule, from the roles that tensors have in transformers' names; not from `layouts/flat.py`.

A Linear's weight, [out, in], is stored [in, out]; heads have a dim of their own; everything else is as it is. Layers are stacked on the
first axis, experts after them; unscanned, layer 3 is `layers.3`. No value changes.
"""

from collections.abc import Mapping

from shardconv.verify.rows import Row
from shardconv.verify.statement import axes, dims

# A tensor of a layer by what follows "model.layers.{l}.": its role, its dims, and "linear" where it is a Linear's weight.
ATTENTION = {
    "self_attn.q_proj.weight": ("attn.q", "(n h) d", "linear rotated"),
    "self_attn.k_proj.weight": ("attn.k", "(k h) d", "linear rotated"),
    "self_attn.v_proj.weight": ("attn.v", "(k h) d", "linear"),
    "self_attn.o_proj.weight": ("attn.o", "d (n h)", "linear"),
    "input_layernorm.weight": ("attn_norm", "d", ""),
}
BIASES = {
    "self_attn.q_proj.bias": ("attn.q_bias", "(n h)", "rotated maybe"),
    "self_attn.k_proj.bias": ("attn.k_bias", "(k h)", "rotated maybe"),
    "self_attn.v_proj.bias": ("attn.v_bias", "(k h)", "maybe"),
    "self_attn.o_proj.bias": ("attn.o_bias", "d", "maybe"),
    "mlp.gate_proj.bias": ("mlp.gate_bias", "f", "maybe"),
    "mlp.up_proj.bias": ("mlp.up_bias", "f", "maybe"),
    "mlp.down_proj.bias": ("mlp.down_bias", "d", "maybe"),
}
HEAD_NORMS = {"self_attn.q_norm.weight": ("attn.q_norm", "h", "rotated"), "self_attn.k_norm.weight": ("attn.k_norm", "h", "rotated")}
MLP_NORM = {"post_attention_layernorm.weight": ("mlp_norm", "d", "")}
GEMMA2_NORMS = {
    "post_attention_layernorm.weight": ("attn_post_norm", "d", ""),
    "pre_feedforward_layernorm.weight": ("mlp_norm", "d", ""),
    "post_feedforward_layernorm.weight": ("mlp_post_norm", "d", ""),
}
MLP = {
    "mlp.gate_proj.weight": ("mlp.gate", "f d", "linear"),
    "mlp.up_proj.weight": ("mlp.up", "f d", "linear"),
    "mlp.down_proj.weight": ("mlp.down", "d f", "linear"),
}
MIXTRAL = {
    "block_sparse_moe.gate.weight": ("experts.router", "x d", "linear"),
    "block_sparse_moe.experts.{x}.w1.weight": ("experts.gate", "f d", "linear"),
    "block_sparse_moe.experts.{x}.w2.weight": ("experts.down", "d f", "linear"),
    "block_sparse_moe.experts.{x}.w3.weight": ("experts.up", "f d", "linear"),
}
QWEN_EXPERTS = {
    "mlp.gate.weight": ("experts.router", "x d", "linear"),
    "mlp.experts.{x}.gate_proj.weight": ("experts.gate", "f d", "linear"),
    "mlp.experts.{x}.down_proj.weight": ("experts.down", "d f", "linear"),
    "mlp.experts.{x}.up_proj.weight": ("experts.up", "f d", "linear"),
}
ROLES: Mapping[str, Mapping[str, tuple[str, str, str]]] = {
    "llama": ATTENTION | BIASES | MLP_NORM | MLP,
    "mistral": ATTENTION | MLP_NORM | MLP,
    "mixtral": ATTENTION | MLP_NORM | MIXTRAL,
    "qwen2": ATTENTION | BIASES | MLP_NORM | MLP,
    "qwen3": ATTENTION | BIASES | HEAD_NORMS | MLP_NORM | MLP,
    "qwen3_moe": ATTENTION | BIASES | HEAD_NORMS | MLP_NORM | QWEN_EXPERTS,
    "gemma2": ATTENTION | GEMMA2_NORMS | MLP,
}
ENDS = (
    Row("embed", "model.embed_tokens.weight", "v d", "v d"),
    Row("final_norm", "model.norm.weight", "d", "d"),
    Row("unembed", "lm_head.weight", "v d", "d v", maybe=True),
)


def rows(family: str, scanned: bool) -> tuple[Row, ...] | None:
    """The rows of a family, None where nobody has stated them."""
    if family not in ROLES:
        return None
    return ENDS + tuple(_row(suffix, *role, scanned) for suffix, role in ROLES[family].items())


def _row(suffix: str, name: str, left: str, words: str, scanned: bool) -> Row:
    order = dims(left)[::-1] if "linear" in words else dims(left)
    stacked = ["l"] * scanned + ["x"] * ("{x}" in suffix)
    right = " ".join(stacked + [axis for dim in order for axis in axes(dim)])
    leaf = f"layers.{name}" if scanned else f"layers.{{l}}.{name}"
    return Row(leaf, "model.layers.{l}." + suffix, left, right, rotated="rotated" in words, maybe="maybe" in words)
