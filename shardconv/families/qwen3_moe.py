"""Qwen3 mixture of experts, with experts in every layer."""

from shardconv.families.llama import ATTENTION, BIASES, ENDS, LAYER
from shardconv.families.qwen3 import HEAD_NORMS
from shardconv.family import DECODER_AXES, Family, either, linear

EXPERT = LAYER + "mlp.experts.{experts}."
EXPERTS = (
    linear("layers.experts.router", LAYER + "mlp.gate.weight", "experts embed"),
    linear("layers.experts.gate", EXPERT + "gate_proj.weight", "mlp embed"),
    linear("layers.experts.up", EXPERT + "up_proj.weight", "mlp embed"),
    linear("layers.experts.down", EXPERT + "down_proj.weight", "embed mlp"),
)
AXES = {**DECODER_AXES, "mlp": "moe_intermediate_size", "experts": either("num_experts", "num_local_experts")}  # the latter since transformers 5
ROWS = ATTENTION + HEAD_NORMS + EXPERTS + ENDS + BIASES[:4]
FAMILY = Family("qwen3_moe", "Qwen3-MoE", ("Qwen3MoeForCausalLM",), AXES, ROWS)
