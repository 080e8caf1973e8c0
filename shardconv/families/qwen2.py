"""Qwen2 and Qwen2.5, dense: Llama's tensors with biases on query, key and value, whatever config.json says of biases."""

from shardconv.families.llama import ATTENTION, ENDS, LAYER, MLP
from shardconv.family import DECODER_AXES, Family, tensor

BIASES = (
    tensor("layers.attn.q_bias", LAYER + "self_attn.q_proj.bias", "(heads head_dim)"),
    tensor("layers.attn.k_bias", LAYER + "self_attn.k_proj.bias", "(kv_heads head_dim)"),
    tensor("layers.attn.v_bias", LAYER + "self_attn.v_proj.bias", "(kv_heads head_dim)"),
)
FAMILY = Family("qwen2", "Qwen2, Qwen2.5", ("Qwen2ForCausalLM",), DECODER_AXES, ATTENTION + BIASES + MLP + ENDS)
