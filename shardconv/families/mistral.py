"""Mistral 7B, Nemo, Small (text)."""

from shardconv.families.llama import ATTENTION, ENDS, MLP
from shardconv.family import DECODER_AXES, Family

FAMILY = Family("mistral", "Mistral 7B, Nemo, Small", ("MistralForCausalLM",), DECODER_AXES, ATTENTION + MLP + ENDS)
