"""Gemma 2: four norms a layer, each multiplying by 1 + w; embeddings scaled at run time; local and global layers alternate."""

from shardconv.families.llama import ATTENTION, ENDS, LAYER, MLP
from shardconv.family import DECODER_AXES, Family, renamed, tensor, whole_number

NORMS = (
    tensor("layers.mlp_norm", LAYER + "pre_feedforward_layernorm.weight", "embed"),
    tensor("layers.mlp_post_norm", LAYER + "post_feedforward_layernorm.weight", "embed"),
)
FAMILY = Family(
    "gemma2",
    "Gemma 2",
    ("Gemma2ForCausalLM",),
    DECODER_AXES,
    renamed(ATTENTION, mlp_norm="attn_post_norm") + NORMS + MLP + ENDS,
    tied_by_default=True,
    facts={
        "norm_shift": 1.0,
        "embed_scale": lambda config: whole_number(config, "hidden_size") ** 0.5,
        "query_scale": lambda config: whole_number(config, "query_pre_attn_scalar") ** -0.5,
    },
)
