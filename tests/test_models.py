"""The JAX decoder against transformers' models in float32, fed with the model's own tensors, put in place here by hand.

No converter is involved: what fails here is the forward. The bound of every comparison is measured: what the model differs from itself
by when it sums in another order.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_floors import ROOT, imports, modules, under

from shardconv.errors import CheckError, ConfigError
from shardconv.models.blocks import visible
from shardconv.models.decoder import logits, states, weights_of
from shardconv.models.description import Decoder, Place, Reading, Rope
from shardconv.models.hf import Entries, decoder_of, rope_of
from shardconv.models.reading import read
from shardconv.models.rope import frequencies, rotate
from shardconv.models.shapes import DIMS, misshapen

Array = np.ndarray[Any, Any]
Config = dict[str, Any]

LLAMA: Config = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# One model for everything that a decoder can have.
MODELS: Mapping[str, Config] = {
    "plain": LLAMA,
    "biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "one kv head": {**LLAMA, "num_key_value_heads": 1},
    "llama3 rope": {**LLAMA, "rope_scaling": LLAMA3, "rope_theta": 500.0},
    "yarn rope": {**LLAMA, "rope_scaling": YARN},
    "linear rope": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "window": {**LLAMA, "model_type": "mistral", "sliding_window": 9},
    "window from layer 1": {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "window from layer 0": {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    "head norms": {**LLAMA, "model_type": "qwen3", "attention_bias": True},
    "experts": {**LLAMA, "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
    "experts, weights not normalised": {
        **LLAMA,
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": False,
    },
    "sigmoid routing, norms over all heads, part of the head rotated": {
        **LLAMA,
        "model_type": "minimax_m2",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rotary_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "caps, windows in turn, four norms": {
        **LLAMA,
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "sliding_window": 9,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "pairs, layer norm, parallel": {
        **LLAMA,
        "model_type": "cohere",
        "head_dim": None,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
        "tie_word_embeddings": True,
    },
    "layer norm with bias, parallel, part of the head rotated": {
        **LLAMA,
        "model_type": "gpt_neox",
        "head_dim": None,
        "num_key_value_heads": None,
        "hidden_act": "gelu",
        "rotary_pct": 0.5,
    },
    "learned positions": {"model_type": "gpt2", "n_embd": 48, "n_head": 4, "n_layer": 3, "vocab_size": 61, "n_positions": 128},
}


def torch_model(config: Config, seed: int = 0) -> Any:
    """transformers' model of a config, with weights that hide nothing: norms are not ones, biases not zeros."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    settings = transformers.AutoConfig.for_model(**{key: value for key, value in config.items() if value is not None})
    settings._attn_implementation = settings._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(settings).float().eval()
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                weight.add_(0.3 * torch.randn(weight.shape))
            elif "inv_freq" not in name and weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape) * weight.shape[-1] ** -0.5)
    return model


def tokens_for(config: Config, count: int) -> Array:
    return np.random.default_rng(1).integers(0, config["vocab_size"], (count, 96))


def by_hand(model: Any, decoder: Decoder) -> dict[str, Array]:
    """The model's tensors as the decoder takes them, by layer and role."""
    stored = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    found = {}
    for layer in range(decoder.layers):
        roles = HANDS[decoder.name](stored, decoder, layer) if decoder.name in HANDS else llama_like(stored, decoder, layer)
        found.update({f"{layer}.{role}": array for role, array in roles.items()})
    found.update(ends_by_hand(stored, decoder))
    return found


def ends_by_hand(stored: Mapping[str, Array], decoder: Decoder) -> Iterator[tuple[str, Array]]:
    if decoder.name == "gpt2":
        yield from {"embed": stored["transformer.wte.weight"], "positions": stored["transformer.wpe.weight"]}.items()
        yield from {"final_norm": stored["transformer.ln_f.weight"], "final_norm_bias": stored["transformer.ln_f.bias"]}.items()
        return
    root, norm, out = ("gpt_neox.", "final_layer_norm", "lm_head") if decoder.name == "gpt_neox" else ("model.", "norm", "lm_head")
    yield "embed", stored[root + ("embed_in" if decoder.name == "gpt_neox" else "embed_tokens") + ".weight"]
    yield "final_norm", stored[f"{root}{norm}.weight"]
    if f"{root}{norm}.bias" in stored:
        yield "final_norm_bias", stored[f"{root}{norm}.bias"]
    if not decoder.tied:
        yield "unembed", stored[f"{out}.weight"].T


def llama_like(stored: Mapping[str, Array], decoder: Decoder, layer: int) -> dict[str, Array]:
    root = f"model.layers.{layer}."
    own = {key.removeprefix(root): value for key, value in stored.items() if key.startswith(root)}
    found = {"attn_norm": own["input_layernorm.weight"]}
    if decoder.name == "gemma2":
        found |= {"attn_post_norm": own["post_attention_layernorm.weight"], "mlp_norm": own["pre_feedforward_layernorm.weight"]}
        found["mlp_post_norm"] = own["post_feedforward_layernorm.weight"]
    elif decoder.name != "cohere":
        found["mlp_norm"] = own["post_attention_layernorm.weight"]
    for role in "qkv":
        found[role] = heads_last(own[f"self_attn.{role}_proj.weight"].T, decoder)
        if f"self_attn.{role}_proj.bias" in own:
            found[f"{role}_bias"] = heads_last(own[f"self_attn.{role}_proj.bias"], decoder)
        if f"self_attn.{role}_norm.weight" in own:
            norm = own[f"self_attn.{role}_norm.weight"]
            found[f"{role}_norm"] = heads_last(norm, decoder) if decoder.head_norm == "all" else norm
    found["o"] = own["self_attn.o_proj.weight"].T.reshape(decoder.heads, decoder.head_dim, decoder.embed)
    if "self_attn.o_proj.bias" in own:
        found["o_bias"] = own["self_attn.o_proj.bias"]
    for role in ("gate", "up", "down"):
        for kind in ("weight", "bias"):
            if f"mlp.{role}_proj.{kind}" in own:
                found[role if kind == "weight" else f"{role}_bias"] = own[f"mlp.{role}_proj.{kind}"].T
    if "mlp.gate.weight" in own:
        gate, up = np.split(own["mlp.experts.gate_up_proj"].transpose(0, 2, 1), 2, axis=2)
        down = own["mlp.experts.down_proj"].transpose(0, 2, 1)
        found |= {"router": own["mlp.gate.weight"].T, "experts_gate": gate, "experts_up": up, "experts_down": down}
    if "mlp.e_score_correction_bias" in own:
        found["router_bias"] = own["mlp.e_score_correction_bias"]
    return found


def heads_last(array: Array, decoder: Decoder) -> Array:
    return array.reshape(*array.shape[:-1], -1, decoder.head_dim)


def neox_like(stored: Mapping[str, Array], decoder: Decoder, layer: int) -> dict[str, Array]:
    root = f"gpt_neox.layers.{layer}."
    fused = stored[root + "attention.query_key_value.weight"].reshape(decoder.heads, 3, decoder.head_dim, decoder.embed)
    bias = stored[root + "attention.query_key_value.bias"].reshape(decoder.heads, 3, decoder.head_dim)
    found = {role: fused[:, place].transpose(2, 0, 1) for place, role in enumerate("qkv")}
    found |= {f"{role}_bias": bias[:, place] for place, role in enumerate("qkv")}
    found["o"] = stored[root + "attention.dense.weight"].T.reshape(decoder.heads, decoder.head_dim, decoder.embed)
    found["o_bias"] = stored[root + "attention.dense.bias"]
    for role, name in {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}.items():
        found |= {role: stored[f"{root}{name}.weight"], f"{role}_bias": stored[f"{root}{name}.bias"]}
    for role, name in {"up": "dense_h_to_4h", "down": "dense_4h_to_h"}.items():
        found |= {role: stored[f"{root}mlp.{name}.weight"].T, f"{role}_bias": stored[f"{root}mlp.{name}.bias"]}
    return found


def gpt2_like(stored: Mapping[str, Array], decoder: Decoder, layer: int) -> dict[str, Array]:
    root = f"transformer.h.{layer}."
    weights, biases = np.split(stored[root + "attn.c_attn.weight"], 3, axis=1), np.split(stored[root + "attn.c_attn.bias"], 3)
    found = {role: heads_last(weights[place], decoder) for place, role in enumerate("qkv")}
    found |= {f"{role}_bias": heads_last(biases[place], decoder) for place, role in enumerate("qkv")}
    found["o"] = stored[root + "attn.c_proj.weight"].reshape(decoder.heads, decoder.head_dim, decoder.embed)
    found["o_bias"] = stored[root + "attn.c_proj.bias"]
    for role, name in {"attn_norm": "ln_1", "mlp_norm": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj"}.items():
        found |= {role: stored[f"{root}{name}.weight"], f"{role}_bias": stored[f"{root}{name}.bias"]}
    return found


HANDS: Mapping[str, Callable[[Mapping[str, Array], Decoder, int], dict[str, Array]]] = {"gpt_neox": neox_like, "gpt2": gpt2_like}


def reading_by_hand(decoder: Decoder, arrays: Mapping[str, Array]) -> tuple[Reading, dict[str, Any]]:
    """A reading of these arrays, which must be all that the decoder has roles for."""
    import jax.numpy as jnp

    ends = {role: Place(role) for role in arrays if "." not in role}
    blocks = tuple(
        {role.partition(".")[2]: Place(role) for role in arrays if role.startswith(f"{layer}.")} for layer in range(decoder.layers)
    )
    assert ends.keys() == decoder.end_roles
    assert all(block.keys() == decoder.block_roles for block in blocks)
    return Reading(decoder, ends, blocks), {name: jnp.asarray(array) for name, array in arrays.items()}


def jax_logits(decoder: Decoder, arrays: Mapping[str, Array], tokens: Array) -> Array:
    import jax.numpy as jnp

    reading, leaves = reading_by_hand(decoder, arrays)
    return np.asarray(logits(weights_of(reading, leaves), jnp.asarray(tokens)))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str) -> None:
    from shardconv.verify.noise import ORDERS, computing

    torch = pytest.importorskip("torch")
    config = MODELS[name]
    model, tokens = torch_model(config), tokens_for(config, 1)
    decoder = decoder_of(config)

    def run(kind: str) -> Array:
        with computing(kind, model):
            logits: Array = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits[0].numpy()
        return logits

    expected = run("plain")
    found = jax_logits(decoder, by_hand(model, decoder), tokens)[0]
    floor = max(np.abs(run(order) - expected).max() for order in ORDERS)
    assert np.abs(found - expected).max() < 2 * floor < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_what_config_json_leaves_out_is_what_transformers_takes(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model_type = MODELS[name]["model_type"]
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "n_embd", "n_head", "n_layer")
    little = {key: value for key, value in MODELS[name].items() if key in sizes}
    full_of_windows = {**little, "use_sliding_window": True, "num_hidden_layers": 30} if "qwen" in model_type else little
    for said in (little, full_of_windows, {key: value for key, value in MODELS[name].items() if value is not None and key != "model_type"}):
        full = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(said)).to_dict()
        # An absent number of key and value heads is the number of heads, to published configs; transformers has some number of its own.
        kv_heads = {"num_key_value_heads": full.get("num_key_value_heads")}
        assert decoder_of({**kv_heads, **said, "model_type": model_type}) == decoder_of(full)


def test_rope_of_both_spellings() -> None:
    old = {"rope_theta": 500.0, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    new = {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}}
    assert rope_of(Entries(old), 16, 1.0) == rope_of(Entries(new), 16, 1.0)
    assert rope_of(Entries(old), 16, 1.0).base == 500.0


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 3.0},
        LLAMA3,
        YARN,
        {**YARN, "truncate": False},
        {**YARN, "attention_factor": 0.5},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 1 << 22, "rope_theta": 100.0},
    ],
)
def test_frequencies_are_those_of_transformers(scaling: Config | None) -> None:
    transformers = pytest.importorskip("transformers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = {**LLAMA, "head_dim": 64, "rope_theta": 10_000.0, "rope_scaling": scaling}
    theirs = llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**{key: value for key, value in config.items() if value is not None}))
    rope = decoder_of(config).rope
    assert rope is not None
    np.testing.assert_allclose(frequencies(rope), theirs.inv_freq.numpy(), rtol=4e-7)
    assert rope.magnitude == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dims", [4, 8])
def test_a_rotation_is_a_product_of_complex_numbers(pairs: bool, dims: int) -> None:
    import jax.numpy as jnp

    heads = np.random.default_rng(0).standard_normal((1, 70, 2, 8), np.float32)
    found = np.asarray(rotate(Rope(100.0, dims, pairs, magnitude=2.0), jnp.asarray(heads)))
    order = np.arange(dims).reshape((-1, 2) if pairs else (2, -1))
    first, second = (order[:, 0], order[:, 1]) if pairs else order
    turns = np.exp(1j * np.arange(70)[:, None] * 100.0 ** (-np.arange(0, dims, 2) / dims))[None, :, None, :]
    turned = 2.0 * turns * (heads[..., first] + 1j * heads[..., second])
    expected = heads.copy()
    expected[..., first], expected[..., second] = turned.real, turned.imag
    np.testing.assert_allclose(found, expected, atol=3e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_a_position_sees_a_window_back_and_nothing_ahead(window: int | None) -> None:
    found = np.asarray(visible(7, window))
    for row in range(7):
        assert set(np.flatnonzero(found[row])) == {key for key in range(7) if key <= row and row - key < (window or 7)}


def test_states_are_those_of_transformers_block_by_block() -> None:
    import jax.numpy as jnp

    torch = pytest.importorskip("torch")
    model = torch_model(LLAMA)
    decoder, tokens = decoder_of(LLAMA), tokens_for(LLAMA, 1)
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(tokens), output_hidden_states=True).hidden_states
    reading, leaves = reading_by_hand(decoder, by_hand(model, decoder))
    ours = list(states(weights_of(reading, leaves), jnp.asarray(tokens)))
    assert [name for name, _ in ours] == ["embed", "block 0", "block 1", "block 2", "logits"]
    for (_, found), expected in zip(ours[:-2], theirs, strict=False):  # transformers' last state is behind the final norm
        np.testing.assert_allclose(np.asarray(found), expected.numpy(), atol=2e-5)


def test_what_has_no_forward() -> None:
    with pytest.raises(ConfigError) as caught:
        decoder_of({"model_type": "mamba"})
    assert str(caught.value) == (
        "there is no JAX forward for this model (1 problem):\n"
        "  model_type is 'mamba'; known: llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma2, cohere, gpt_neox, gpt2, minimax_m2\n"
        '      set check.mode = "weights", or give a forward of your own'
    )
    with pytest.raises(ConfigError, match="rope_type is 'longrope'; known: default, linear, llama3, yarn"):
        decoder_of({**LLAMA, "rope_scaling": {"rope_type": "longrope"}})
    with pytest.raises(ConfigError, match="this model has layers without experts"):
        decoder_of({**LLAMA, "model_type": "qwen3_moe", "mlp_only_layers": [1]})
    with pytest.raises(ConfigError, match='there is no "vocab_size"'):
        decoder_of({key: value for key, value in LLAMA.items() if key != "vocab_size"})


# Readers

FLAT = [
    "embed",
    "final_norm",
    "unembed",
    *(f"layers.{leaf}" for leaf in ("attn_norm", "mlp_norm", "attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")),
]


def test_a_reader_wants_every_role_and_has_a_use_for_every_leaf() -> None:
    decoder = decoder_of(LLAMA)
    assert read("flat", decoder, FLAT, scanned=True, rope="auto").decoder == decoder
    assert "unembed" in read("flat", decoder_of({**LLAMA, "tie_word_embeddings": True}), FLAT, scanned=True, rope="auto").ends
    names = [*FLAT[:-1], "layers.attn.q_norm", "layers.3.attn.q"]
    with pytest.raises(CheckError) as caught:
        read("flat", decoder, names, scanned=True, rope="auto")
    assert str(caught.value) == (
        "the checkpoint is not what flat code reads (3 problems):\n"
        "  layer 0 has no down\n"
        "  layers.3.attn.q is in the checkpoint, and a llama model has no use for it\n"
        "  layers.attn.q_norm is in the checkpoint, and a llama model has no use for it"
    )
    with pytest.raises(CheckError, match="the checkpoint has no unembed"):
        read("flat", decoder, [name for name in FLAT if name != "unembed"], scanned=True, rope="auto")


def test_a_layout_without_a_reader() -> None:
    with pytest.raises(ConfigError, match="there is no reader for the layout 'levanter'"):
        read("levanter", decoder_of(LLAMA), FLAT, scanned=True, rope="auto")


@pytest.mark.parametrize(
    ("scaling", "rope", "pairs"), [(None, "auto", False), (LLAMA3, "auto", True), (LLAMA3, "half", False), (None, "interleaved", True)]
)
def test_maxtext_rotates_pairs_with_llama3_scaling(scaling: Config | None, rope: str, pairs: bool) -> None:
    decoder = decoder_of({**LLAMA, "rope_scaling": scaling})
    names = [
        "params.params.token_embedder.embedding",
        "params.params.decoder.decoder_norm.scale",
        "params.params.decoder.logits_dense.kernel",
        *(f"params.params.decoder.layers.self_attention.{role}.kernel" for role in ("query", "key", "value", "out")),
        *(f"params.params.decoder.layers.{side}_self_attention_layer_norm.scale" for side in ("pre", "post")),
        *(f"params.params.decoder.layers.mlp.{role}.kernel" for role in ("wi_0", "wi_1", "wo")),
    ]
    found = read("maxtext", decoder, names, scanned=True, rope=rope)
    assert found.decoder.rope == replace(decoder.rope, pairs=pairs)
    assert found.decoder.query_scale == 1.0
    assert found.blocks[2]["q"] == Place("params.params.decoder.layers.self_attention.query.kernel", 2, axis=1)


def test_arrays_of_other_shapes_are_named() -> None:
    decoder = decoder_of(LLAMA)
    reading = read("flat", decoder, FLAT, scanned=True, rope="auto")
    sizes = {"embed": 48, "heads": 6, "kv_heads": 2, "head_dim": 16, "mlp": 40, "vocab": 64}
    by_leaf = {place.leaf: (role, place) for block in (reading.ends, *reading.blocks) for role, place in block.items()}
    leaves = {
        leaf: (3,) * (place.index is not None) + tuple(sizes[dim] for dim in DIMS[role].split()) for leaf, (role, place) in by_leaf.items()
    }
    assert list(misshapen(reading, leaves)) == []
    wrong = leaves | {"layers.attn.q": (3, 48, 16, 6), "layers.mlp.down": (3, 39, 48), "final_norm": (48, 1), "unembed": (64, 48)}
    assert [problem.fact for problem in misshapen(reading, wrong)] == [
        "final_norm gives final_norm as 48 x 1, and should as embed 48",
        "unembed gives unembed as 64 x 48, and should as embed 48 x vocab",
        "layers.attn.q gives q as 48 x 16 x 6, and should as embed 48 x heads 6 x head_dim 16",
        "layers.mlp.down gives down as 39 x 48, and should as mlp 40 x embed 48",
    ]


# Independence: a forward that used the converter's tables would find them right whatever they say.

# What the traced module is fed by: the second statement of where everything comes from, which imports nothing but itself either.
SECOND = tuple(f"shardconv.verify.{name}" for name in ("flat", "rows", "statement", "rounding", "tensors", "torch_files"))
CHECK = tuple(
    f"shardconv.verify.{name}"
    for name in (
        "logits",
        "logit_request",
        "logit_verdict",
        "agreement",
        "apart",
        "differences",
        "divergence",
        "fetching",
        "forwards",
        "noise",
        "published",
        "reference",
        "restoring",
        "routing",
        "sample",
        "stored",
        "tracing",
        "unseen",
        "walking",
    )
)


def reached(start: str, root: Path) -> set[str]:
    """The modules of the package that a module imports, and those that these import."""
    known, seen, left = modules(root), set[str](), [start]
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            left += [name for _, name in imports(module, known[module], known) if name in known]
    return seen


@pytest.mark.parametrize("module", [name for name in modules(ROOT) if under(name, "shardconv.models") or name in CHECK])
def test_the_forward_knows_nothing_of_how_the_checkpoint_was_made(module: str) -> None:
    measured = {"shardconv.verify.insensitive", "shardconv.porting.unseen", "shardconv.porting.trees"}  # of a forward of the user's own
    allowed = {"shardconv", "shardconv.errors", "shardconv.user_code", "shardconv.verify", *measured, *CHECK, *SECOND}
    own = ("shardconv.models", "shardconv.interop")
    assert [name for name in reached(module, ROOT) if not any(under(name, one) for one in own) and name not in allowed] == []


def test_what_it_should_not_know_would_be_seen(tmp_path: Path) -> None:
    for name, text in {"models/flat": "from shardconv.models import names", "models/names": "import shardconv.axes", "axes": ""}.items():
        (tmp_path / "shardconv" / "models").mkdir(parents=True, exist_ok=True)
        (tmp_path / "shardconv" / f"{name}.py").write_text(text)
    assert "shardconv.axes" in reached("shardconv.models.flat", tmp_path)
