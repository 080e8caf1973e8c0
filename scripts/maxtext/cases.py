"""What is tried: tiny models, how shardconv is to convert each, and which MaxText config is to load it.

No two axes of a model have the same length, so that no two can be exchanged unseen; sequences are longer than Gemma 2's local window.
MaxText's own model configs are used, with nothing but sizes overridden (`sizes`): what a name such as "llama3.1-8b" implies is tried too.

A case *agrees* with transformers within its limit, *differs* (it must: a test that cannot tell a wrong RoPE order from a right one is
none), or is *refused*: MaxText's loader raises, or does not ask for a weight that is there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

BATCH, TOKENS = 4, 128

# Largest difference of two logits over the largest logit of the position, in float32. Transformers in float32 is 2e-6 to 4e-6 away from
# itself in float64; what can be wrong with a conversion gives 1e-2 and more.
LIMIT = 1e-5

# A case that must differ does so by more than this: a wrong conversion, or frequencies of RoPE that MaxText cannot compute, which show
# little in the first 128 positions.
WRONG, OTHER_ROPE = 1e-2, 1e-4

# What a layout folds into a weight rounds it again if it is stored in bfloat16: 32 ** -0.5 is no power of two, and 1 + w has less of w.
ROUNDED = 5e-2

DECODER = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 500,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MILLION = {"rope_type": "default", "rope_theta": 1000000.0}
EXPERTS = {"num_experts_per_tok": 2}
LLAMA = {**DECODER, "rms_norm_eps": 1e-5, "rope_parameters": PLAIN_ROPE}
QWEN = {**DECODER, "rms_norm_eps": 1e-6, "rope_parameters": MILLION}
GEMMA = {
    **QWEN,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 36,
    "sliding_window": 40,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
}

# Each as (class in transformers, its config).
MODELS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama3.1": ("LlamaForCausalLM", {**LLAMA, "rope_parameters": LLAMA3_ROPE}),
    "llama3.2": ("LlamaForCausalLM", {**LLAMA, "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0}}),
    "llama-bf16": ("LlamaForCausalLM", LLAMA),
    "llama-unscaled": ("LlamaForCausalLM", LLAMA),
    "mistral": ("MistralForCausalLM", {**LLAMA, "rope_parameters": MILLION, "sliding_window": None}),
    "mixtral": (
        "MixtralForCausalLM",
        {**LLAMA, **EXPERTS, "rope_parameters": MILLION, "sliding_window": None, "num_local_experts": 5},
    ),
    "qwen2": ("Qwen2ForCausalLM", QWEN),
    "qwen3": ("Qwen3ForCausalLM", QWEN),
    "qwen3-tied": ("Qwen3ForCausalLM", {**QWEN, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            **QWEN,
            **EXPERTS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0},
            "num_experts": 5,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma2-bf16": ("Gemma2ForCausalLM", GEMMA),
}

# The MaxText model whose config loads each.
CONFIGS: Mapping[str, str] = {
    "llama": "llama3-8b",
    "llama3.1": "llama3.1-8b",
    "mistral": "mistral-7b",
    "mixtral": "mixtral-8x7b",
    "qwen2": "qwen2.5-7b",
    "qwen3": "qwen3-8b",
    "qwen3-tied": "qwen3-4b",
    "qwen3_moe": "qwen3-30b-a3b",
    "gemma2": "gemma2-2b",
}


@dataclass(frozen=True)
class Case:
    """One conversion and one load. `target`, `output` and `mesh` go into shardconv's config, `settings` over MaxText's config `maxtext`.

    `loader` is "train", the strict one, or "nnx", that of fine-tuning.
    """

    name: str
    model: str
    maxtext: str
    scan: bool = True
    target: Mapping[str, object] = field(default_factory=dict)
    output: Mapping[str, object] = field(default_factory=dict)
    mesh: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    loader: str = "train"
    expects: str = "agrees"
    limit: float = LIMIT

    def sizes(self) -> dict[str, object]:
        """The keys of a MaxText config that this model's config.json decides."""
        hf = dict(MODELS[self.model][1])
        pairs = 2 if self.model.startswith("gemma2") else 1  # a MaxText layer is a local and a global one
        rope = hf["rope_parameters"]
        assert isinstance(rope, Mapping)
        found = {
            "base_emb_dim": hf["hidden_size"],
            "base_mlp_dim": hf["intermediate_size"],
            "base_num_decoder_layers": int(str(hf["num_hidden_layers"])) // pairs,
            "base_num_query_heads": hf["num_attention_heads"],
            "base_num_kv_heads": hf["num_key_value_heads"],
            "head_dim": hf["head_dim"],
            "vocab_size": self.target.get("vocab_size", hf["vocab_size"]),
            "rope_max_timescale": int(rope["rope_theta"]),
        }
        if "num_experts_per_tok" in hf:
            found["num_experts"] = hf.get("num_experts") or hf["num_local_experts"]
            found["num_experts_per_tok"] = hf["num_experts_per_tok"]
            found["base_moe_mlp_dim"] = hf.get("moe_intermediate_size") or hf["intermediate_size"]
        if hf.get("sliding_window"):
            found["sliding_window_size"] = hf["sliding_window"]
        return found


def cases() -> Iterator[Case]:
    """All of them."""
    for model, maxtext in CONFIGS.items():
        yield Case(model, model, maxtext)
        yield Case(f"{model}-unscanned", model, maxtext, scan=False)
    yield from ropes()
    yield from stored()
    yield from fine_tuning()
    yield from controls()


def ropes() -> Iterator[Case]:
    """Both orders of rotary dims, by the keys of a MaxText config instead of by its model's name."""
    plain_pairs = {"rope_type": "llama3.1", "rope_use_scale": False}
    yield Case("llama-pairs", "llama", "llama3-8b", target={"rope": "interleaved"}, settings=plain_pairs)
    yield Case("llama3.3", "llama3.1", "llama3.3-70b", settings={"rope_type": "llama3.1"})


def stored() -> Iterator[Case]:
    """Paddings, dtypes and ways to store."""
    for model in ("llama", "qwen3-tied", "gemma2"):
        yield Case(f"{model}-padded", model, CONFIGS[model], target={"vocab_size": 512})
    yield Case("llama-bf16", "llama-bf16", "llama3-8b", target={"query_dtype": "float32"})
    yield Case("llama-bf16-rounded", "llama-bf16", "llama3-8b", limit=ROUNDED)
    yield Case("gemma2-bf16", "gemma2-bf16", "gemma2-2b", target={"dtype": "float32"})
    yield Case("gemma2-bf16-rounded", "gemma2-bf16", "gemma2-2b", limit=ROUNDED)
    yield Case("llama-zarr2", "llama", "llama3-8b", output={"zarr": 2})
    yield Case("llama-zarr2-files", "llama", "llama3-8b", output={"zarr": 2, "ocdbt": False})
    yield Case("llama-zarr3-files", "llama", "llama3-8b", output={"ocdbt": False})
    yield Case("llama-zstd", "llama", "llama3-8b", output={"compression": "zstd"})
    mesh = {"axes": {"fsdp": 4}, "rules": {"embed": "fsdp"}}
    yield Case("llama3.1-mesh", "llama3.1", "llama3.1-8b", mesh=mesh)
    yield Case("llama-small-chunks", "llama", "llama3-8b", output={"chunk_bytes": "4KiB"})


def fine_tuning() -> Iterator[Case]:
    """The other loader; it is not told whether layers are scanned, the checkpoint's metadata says so."""
    for model in ("llama3.1", "mixtral", "qwen3-tied", "gemma2"):
        yield Case(f"{model}-nnx", model, CONFIGS[model], loader="nnx")
        yield Case(f"{model}-nnx-unscanned", model, CONFIGS[model], scan=False, loader="nnx")


def controls() -> Iterator[Case]:
    """What must not pass: conversions that are wrong, and models that MaxText itself computes otherwise."""
    pairs, halves = {"rope": "interleaved"}, {"rope": "half"}
    yield Case("control-rope-order", "llama", "llama3-8b", target=pairs, expects="differs", limit=WRONG)
    yield Case("control-rope-order-3.1", "llama3.1", "llama3.1-8b", target=halves, expects="differs", limit=WRONG)
    yield Case("control-query-scale", "llama-unscaled", "llama3-8b", expects="differs", limit=WRONG)
    yield Case("control-scan", "llama", "llama3-8b", settings={"scan_layers": False}, expects="refused")
    yield Case("control-missing", "qwen3-tied", "qwen3-4b", settings={"logits_via_embedding": False}, expects="refused")
    yield Case("control-unasked", "llama", "llama3-8b", settings={"logits_via_embedding": True}, expects="refused")
    yield Case("limit-llama3.2", "llama3.2", "llama3.1-8b", expects="differs", limit=OTHER_ROPE)
    yield Case("limit-llama3.3", "llama3.1", "llama3.3-70b", target=halves, expects="differs", limit=OTHER_ROPE)
