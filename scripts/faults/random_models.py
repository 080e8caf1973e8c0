"""Random sound conversions: any family, sizes that fit each other, any layout, dtype, mesh and order of rotary dims."""

import random

from logit_cases import FAMILIES
from pipeline import Conversion

from shardconv.sharding import MeshRules


def random_conversion(seed: int) -> Conversion:
    """The conversion of a seed."""
    choose = random.Random(seed)
    family = choose.choice(sorted(FAMILIES))
    layout = choose.choice(["flat", "maxtext"])
    kv_heads, groups, head_dim = choose.choice([1, 2, 4]), choose.choice([1, 2, 3]), choose.choice([8, 16, 32])
    heads = kv_heads * groups
    embed = heads * head_dim if family == "qwen2" else heads * choose.choice([8, 12, 16, 20])
    vocab = choose.randrange(40, 400)
    settings: dict[str, object] = {
        "hidden_size": embed,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": None if family == "qwen2" else head_dim,
        "intermediate_size": choose.choice([20, 32, 52, 96]),
        "num_hidden_layers": choose.choice([2, 4, 6]) if family == "gemma2" else choose.randrange(1, 7),
        "vocab_size": vocab,
        "rms_norm_eps": choose.choice([1e-6, 1e-5]),
        "tie_word_embeddings": family == "gemma2" or choose.random() < 0.5,
    }
    if family in ("mistral", "qwen2", "gemma2"):
        settings["sliding_window"] = choose.choice([5, 17, 64])
    if family in ("mixtral", "qwen3_moe"):
        experts = choose.choice([3, 4, 6])
        name = "num_local_experts" if family == "mixtral" else "num_experts"
        settings |= {name: experts, "num_experts_per_tok": choose.randrange(1, experts)}
    if family == "llama" and layout == "flat":
        settings |= {"attention_bias": choose.random() < 0.3, "mlp_bias": choose.random() < 0.3}
    if family == "gemma2":
        settings["query_pre_attn_scalar"] = choose.choice([head_dim, 24, 100])
    if family == "qwen2":
        settings["max_window_layers"] = choose.randrange(0, 3)
    fits = [size for size in (1, 2, 4) if embed % size == 0 and kv_heads % size == 0]
    tensor = choose.choice(fits)
    fsdp = choose.choice([size for size in (1, 2, 4, 8) if size * tensor <= 8 and embed % size == 0])
    rules = choose.choice([{}, {"embed": ("fsdp",), "heads": ("tensor",), "kv_heads": ("tensor",)}, {"embed": ("fsdp",)}])
    return Conversion(
        family=family,
        layout=layout,
        stored=choose.choice(["float32", "bfloat16", "float16"]),
        dtype=choose.choice(["source", "source", "float32", "bfloat16"]),
        scanned=choose.random() < 0.6,
        rope=choose.choice(["auto", "auto", "half", "interleaved"]),
        vocab=choose.choice([0, vocab + choose.randrange(1, 60)]),
        mesh=MeshRules({"fsdp": fsdp, "tensor": tensor}, rules),
        settings=settings,
        seed=seed,
    )
