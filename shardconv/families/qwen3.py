"""Qwen3, dense: a norm per head on query and key, before the rotation."""

from shardconv.families.llama import ATTENTION, BIASES, ENDS, LAYER, MLP
from shardconv.family import DECODER_AXES, Family, tensor

HEAD_NORMS = (
    tensor("layers.attn.q_norm", LAYER + "self_attn.q_norm.weight", "head_dim"),
    tensor("layers.attn.k_norm", LAYER + "self_attn.k_norm.weight", "head_dim"),
)
ROWS = ATTENTION + HEAD_NORMS + MLP + ENDS + BIASES[:4]
FAMILY = Family("qwen3", "Qwen3 (dense)", ("Qwen3ForCausalLM",), DECODER_AXES, ROWS)
