"""Llama 2, 3, 3.1, 3.2, 3.3 and the many models built like it."""

from shardconv.family import DECODER_AXES, Family, linear, tensor

LAYER = "model.layers.{layers}."
ATTENTION = (
    tensor("layers.attn_norm", LAYER + "input_layernorm.weight", "embed"),
    linear("layers.attn.q", LAYER + "self_attn.q_proj.weight", "(heads head_dim) embed"),
    linear("layers.attn.k", LAYER + "self_attn.k_proj.weight", "(kv_heads head_dim) embed"),
    linear("layers.attn.v", LAYER + "self_attn.v_proj.weight", "(kv_heads head_dim) embed"),
    linear("layers.attn.o", LAYER + "self_attn.o_proj.weight", "embed (heads head_dim)"),
    tensor("layers.mlp_norm", LAYER + "post_attention_layernorm.weight", "embed"),
)
MLP = (
    linear("layers.mlp.gate", LAYER + "mlp.gate_proj.weight", "mlp embed"),
    linear("layers.mlp.up", LAYER + "mlp.up_proj.weight", "mlp embed"),
    linear("layers.mlp.down", LAYER + "mlp.down_proj.weight", "embed mlp"),
)
ENDS = (
    tensor("embed", "model.embed_tokens.weight", "vocab embed"),
    tensor("final_norm", "model.norm.weight", "embed"),
    linear("unembed", "lm_head.weight", "vocab embed"),
)
BIASES = (
    tensor("layers.attn.q_bias", LAYER + "self_attn.q_proj.bias", "(heads head_dim)", when="attention_bias"),
    tensor("layers.attn.k_bias", LAYER + "self_attn.k_proj.bias", "(kv_heads head_dim)", when="attention_bias"),
    tensor("layers.attn.v_bias", LAYER + "self_attn.v_proj.bias", "(kv_heads head_dim)", when="attention_bias"),
    tensor("layers.attn.o_bias", LAYER + "self_attn.o_proj.bias", "embed", when="attention_bias"),
    tensor("layers.mlp.gate_bias", LAYER + "mlp.gate_proj.bias", "mlp", when="mlp_bias"),
    tensor("layers.mlp.up_bias", LAYER + "mlp.up_proj.bias", "mlp", when="mlp_bias"),
    tensor("layers.mlp.down_bias", LAYER + "mlp.down_proj.bias", "embed", when="mlp_bias"),
)
FAMILY = Family("llama", "Llama 2, 3, 3.1, 3.2, 3.3", ("LlamaForCausalLM",), DECODER_AXES, ATTENTION + MLP + ENDS + BIASES)
