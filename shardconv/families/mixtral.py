"""Mixtral: Mistral with experts; w1 is the gate, w3 the up and w2 the down projection."""

from shardconv.families.llama import ATTENTION, ENDS, LAYER
from shardconv.family import DECODER_AXES, Family, linear

EXPERT = LAYER + "block_sparse_moe.experts.{experts}."
EXPERTS = (
    linear("layers.experts.router", LAYER + "block_sparse_moe.gate.weight", "experts embed"),
    linear("layers.experts.gate", EXPERT + "w1.weight", "mlp embed"),
    linear("layers.experts.up", EXPERT + "w3.weight", "mlp embed"),
    linear("layers.experts.down", EXPERT + "w2.weight", "embed mlp"),
)
AXES = {**DECODER_AXES, "experts": "num_local_experts"}
FAMILY = Family("mixtral", "Mixtral", ("MixtralForCausalLM",), AXES, ATTENTION + EXPERTS + ENDS)
