"""From a Hugging Face config.json to what the model computes; each model type's defaults are those of transformers.

Written from the models' definitions and apart from `shardconv.families`, which says where their tensors are. To add a model type: a
function from `Entries` to a `Decoder`, in `MODELS`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardconv.errors import ConfigError, Problem
from shardconv.models.description import Decoder, Norm, Rope, Routing

ELSEWHERE = 'set check.mode = "weights", or give a forward of your own'

ATTENTION = frozenset({"attn_norm", "q", "k", "v", "o", "mlp_norm"})
GATED = frozenset({"gate", "up", "down"})
PLAIN = frozenset({"up", "down"})
EXPERTS = frozenset({"router", "experts_gate", "experts_up", "experts_down"})
HEAD_NORMS = frozenset({"q_norm", "k_norm"})
QKV_BIASES = frozenset({"q_bias", "k_bias", "v_bias"})


@dataclass(frozen=True)
class Entries:
    """A config.json; None counts as absent."""

    config: Mapping[str, object]

    def get(self, name: str, default: Any) -> Any:
        """An entry, or its default."""
        value = self.config.get(name)
        return default if value is None else value

    def said(self, name: str, default: Any) -> Any:
        """An entry that may be null, which differs from being absent."""
        return self.config.get(name, default)

    def need(self, name: str) -> Any:
        """An entry that must be there; raises ConfigError."""
        if self.config.get(name) is None:
            raise ConfigError("config.json does not say what the model computes", [Problem(f'there is no "{name}"', ELSEWHERE)])
        return self.config[name]


def decoder_of(config: Mapping[str, object]) -> Decoder:
    """What the model of a config.json computes; raises ConfigError for a model type that is not known here."""
    name = config.get("model_type")
    if name not in MODELS:
        fact = f'model_type is {name!r}; known: {", ".join(MODELS)}'
        raise ConfigError("there is no JAX forward for this model", [Problem(fact, ELSEWHERE)])
    return MODELS[str(name)](Entries(config))


def _llama(entries: Entries, *, window: int | None = None, head_dim: int | None = None, base: float = 10_000.0) -> Decoder:
    """Llama, and what the others have in common with it."""
    embed, heads = entries.need("hidden_size"), entries.need("num_attention_heads")
    head_dim = entries.get("head_dim", head_dim or embed // heads)
    tied = bool(entries.get("tie_word_embeddings", False))
    return Decoder(
        name=entries.need("model_type"),
        embed=embed,
        heads=heads,
        kv_heads=entries.get("num_key_value_heads", heads),
        head_dim=head_dim,
        vocab=entries.need("vocab_size"),
        windows=(window,) * entries.need("num_hidden_layers"),
        norm=Norm("rms", entries.get("rms_norm_eps", 1e-6)),
        rope=rope_of(entries, head_dim, base),
        activation=entries.get("hidden_act", "silu"),
        query_scale=head_dim**-0.5,
        block_roles=ATTENTION | GATED | _attention_biases(entries) | _mlp_biases(entries),
        end_roles=frozenset({"embed", "final_norm"} | (set() if tied else {"unembed"})),
        tied=tied,
    )


def _attention_biases(entries: Entries) -> frozenset[str]:
    return QKV_BIASES | {"o_bias"} if entries.get("attention_bias", False) else frozenset()


def _mlp_biases(entries: Entries) -> frozenset[str]:
    return frozenset({"gate_bias", "up_bias", "down_bias"}) if entries.get("mlp_bias", False) else frozenset()


def _mistral(entries: Entries) -> Decoder:
    # An absent entry is transformers' default of 4096; null means no window.
    return replace(_llama(entries, window=entries.said("sliding_window", 4096)), block_roles=ATTENTION | GATED)


def _mixtral(entries: Entries) -> Decoder:
    common = _llama(entries, window=entries.said("sliding_window", None), base=1_000_000.0)
    routing = Routing("softmax", entries.get("num_experts_per_tok", 2), normalised=True)
    return replace(common, block_roles=ATTENTION | EXPERTS, routing=routing, norm=Norm("rms", entries.get("rms_norm_eps", 1e-5)))


def _qwen2(entries: Entries) -> Decoder:
    return replace(_llama(entries), windows=_qwen_windows(entries), block_roles=ATTENTION | GATED | QKV_BIASES)


def _qwen3(entries: Entries) -> Decoder:
    roles = ATTENTION | GATED | HEAD_NORMS | _attention_biases(entries)
    return replace(_llama(entries, head_dim=128), windows=_qwen_windows(entries), block_roles=roles)


def _qwen3_moe(entries: Entries) -> Decoder:
    dense = entries.get("mlp_only_layers", [])
    if dense or entries.get("decoder_sparse_step", 1) != 1:
        fact = "this model has layers without experts (mlp_only_layers, decoder_sparse_step)"
        raise ConfigError("there is no JAX forward for this model", [Problem(fact, ELSEWHERE)])
    window = entries.said("sliding_window", 4096) if entries.get("use_sliding_window", False) else None
    roles = ATTENTION | EXPERTS | HEAD_NORMS | _attention_biases(entries)
    routing = Routing("softmax", entries.get("num_experts_per_tok", 8), normalised=bool(entries.get("norm_topk_prob", False)))
    return replace(_llama(entries, window=window), block_roles=roles, routing=routing)


def _gemma2(entries: Entries) -> Decoder:
    layers = entries.need("num_hidden_layers")
    kinds = entries.get("layer_types", ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)])
    tied = bool(entries.get("tie_word_embeddings", True))
    common = _llama(entries, head_dim=256)
    return replace(
        common,
        windows=_windows(kinds, entries.said("sliding_window", 4096)),
        norm=replace(common.norm, shift=1.0),
        activation=entries.get("hidden_activation", "gelu_pytorch_tanh"),
        query_scale=entries.get("query_pre_attn_scalar", 256) ** -0.5,
        block_roles=ATTENTION | GATED | {"attn_post_norm", "mlp_post_norm"} | _attention_biases(entries),
        end_roles=frozenset({"embed", "final_norm"} | (set() if tied else {"unembed"})),
        tied=tied,
        embed_scale=common.embed**0.5,
        attention_cap=entries.said("attn_logit_softcapping", 50.0),
        logit_cap=entries.said("final_logit_softcapping", 30.0),
    )


def _cohere(entries: Entries) -> Decoder:
    common = _llama(entries, base=500_000.0)
    assert common.rope is not None
    tied = bool(entries.get("tie_word_embeddings", True))
    return replace(
        common,
        norm=Norm("layer", entries.get("layer_norm_eps", 1e-5)),
        rope=replace(common.rope, pairs=True),
        block_roles=ATTENTION - {"mlp_norm"} | GATED | _attention_biases(entries),
        end_roles=frozenset({"embed", "final_norm"} | (set() if tied else {"unembed"})),
        tied=tied,
        parallel=True,
        logit_scale=entries.get("logit_scale", 0.0625),
    )


def _gpt_neox(entries: Entries) -> Decoder:
    common = _llama(entries)
    biases = {"attn_norm_bias", "mlp_norm_bias", "up_bias", "down_bias"}
    return replace(
        common,
        norm=Norm("layer", entries.get("layer_norm_eps", 1e-5)),
        rope=rope_of(entries, common.head_dim, entries.get("rotary_emb_base", 10_000.0), part=entries.get("rotary_pct", 0.25)),
        activation=entries.get("hidden_act", "gelu"),
        block_roles=ATTENTION | PLAIN | biases | (QKV_BIASES | {"o_bias"} if entries.get("attention_bias", True) else frozenset()),
        end_roles=common.end_roles | {"final_norm_bias"},
        parallel=bool(entries.get("use_parallel_residual", True)),
    )


def _gpt2(entries: Entries) -> Decoder:
    named = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "hidden_act": "activation_function"}
    common = _llama(Entries({**entries.config, **{ours: entries.config.get(theirs) for ours, theirs in named.items()}}))
    biases = {"attn_norm_bias", "mlp_norm_bias", "up_bias", "down_bias", "o_bias"} | QKV_BIASES
    return replace(
        common,
        norm=Norm("layer", entries.get("layer_norm_epsilon", 1e-5)),
        rope=None,
        activation=entries.get("activation_function", "gelu_new"),
        block_roles=ATTENTION | PLAIN | biases,
        end_roles=frozenset({"embed", "positions", "final_norm", "final_norm_bias"}),
        tied=True,
    )


def _minimax_m2(entries: Entries) -> Decoder:
    common = _llama(entries, head_dim=128, base=5_000_000.0)
    routing = Routing("sigmoid", entries.get("num_experts_per_tok", 8), normalised=True)
    roles = ATTENTION | EXPERTS | HEAD_NORMS | {"router_bias"}
    rope = rope_of(entries, common.head_dim, 5_000_000.0, dims=entries.get("rotary_dim", common.head_dim))
    return replace(common, block_roles=roles, routing=routing, head_norm="all", rope=rope)


MODELS: Mapping[str, Callable[[Entries], Decoder]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "cohere": _cohere,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
    "minimax_m2": _minimax_m2,
}


def _windows(kinds: list[str], window: int | None) -> tuple[int | None, ...]:
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _qwen_windows(entries: Entries) -> tuple[int | None, ...]:
    """Qwen 2 and 3 have a window from layer `max_window_layers` on, and only where `use_sliding_window` says so."""
    layers, first = entries.need("num_hidden_layers"), entries.get("max_window_layers", 28)
    window = entries.said("sliding_window", 4096) if entries.get("use_sliding_window", False) else None
    kinds = entries.get("layer_types", ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)])
    return _windows(kinds, window)


def rope_of(entries: Entries, head_dim: int, base: float, *, part: float = 1.0, dims: int | None = None) -> Rope:
    """RoPE of a config.json, in the old spelling (`rope_scaling`, `rope_theta`) or that of transformers 5 (`rope_parameters`)."""
    said = Entries(entries.get("rope_parameters", entries.get("rope_scaling", {})))
    kind = said.get("rope_type", said.get("type", "default"))
    part = said.get("partial_rotary_factor", entries.get("partial_rotary_factor", part))
    rope = Rope(said.get("rope_theta", entries.get("rope_theta", base)), dims or int(head_dim * part), scaling=kind)
    longest = entries.get("max_position_embeddings", 0)
    original = entries.get("original_max_position_embeddings", said.get("original_max_position_embeddings", longest))
    if kind == "default":
        return rope
    if kind == "linear":
        return replace(rope, factor=said.need("factor"))
    if kind == "llama3":
        low, high = said.need("low_freq_factor"), said.need("high_freq_factor")
        return replace(rope, factor=said.need("factor"), original_length=original, low=low, high=high)
    if kind == "yarn":
        factor = said.get("factor", longest / original)
        return replace(
            rope,
            factor=factor,
            original_length=original,
            low=said.get("beta_slow", 1),
            high=said.get("beta_fast", 32),
            truncate=said.get("truncate", True),
            magnitude=said.get("attention_factor", _yarn_magnitude(factor, said.get("mscale", 0), said.get("mscale_all_dim", 0))),
        )
    fact = f'rope_type is {kind!r}; known: default, linear, llama3, yarn'
    raise ConfigError("there is no JAX forward for this model", [Problem(fact, ELSEWHERE)])


def _yarn_magnitude(factor: float, mscale: float, mscale_all: float) -> float:
    """The paper's 0.1 ln(factor) + 1 (YaRN, arXiv 2309.00071, section 3.4), or DeepSeek's ratio of two of them."""

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
