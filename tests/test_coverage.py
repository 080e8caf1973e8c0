"""Nothing missing: ties by what is in the file, and one report with all that is missing, unmapped, misshapen or ignored."""

from collections.abc import Mapping
from typing import Any

import pytest
from hf_models import ONE_EACH, Config, header_only, small
from layout_oracle import rows, stored_shapes

from shardconv.coverage import is_tied, require_covered, template
from shardconv.errors import InputError
from shardconv.families import families, find
from shardconv.family import LayoutOptions, Model, bind
from shardconv.layouts import LAYOUTS
from shardconv.plan import Plan, PlanOptions, make_plan
from shardconv.sharding import MeshRules

Shapes = dict[str, tuple[int, ...]]

ANOTHER = "the download may be incomplete, or model.family is another"


def checkpoint(name: str = "mistral_7b", **changes: object) -> tuple[Config, Shapes]:
    """A small model's config, and the tensors that it should have, output projection included."""
    config = small(name, **changes)
    return config, stored_shapes(rows("flat", config, "half"), config, tied=False)


def model_of(config: Config) -> Model:
    return bind(find(config), config)


def covered(config: Config, shapes: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = ()) -> tuple[str, ...]:
    model, stored = model_of(config), header_only(shapes, config).tensors
    return require_covered(model, stored, is_tied(model, stored, None), ignored)


def report(config: Config, shapes: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = ()) -> str:
    with pytest.raises(InputError) as caught:
        covered(config, shapes, ignored)
    return str(caught.value)


@pytest.mark.parametrize("family", ONE_EACH)
def test_a_whole_checkpoint_is_covered(family: str) -> None:
    config, shapes = checkpoint(ONE_EACH[family])
    assert covered(config, shapes) == ()


# --- ties -------------------------------------------------------------------------------------------------------------------------

DIFFERS = "lm_head.weight differs from the embedding although config.json says tied: it is written, and the model is not tied"
EQUAL = "lm_head.weight equals the embedding: tied, no output projection is written"
ABSENT = "lm_head.weight is not in the checkpoint and config.json says tied: the model uses the embedding, no output projection is written"
LATER = "lm_head.weight is in the checkpoint and config.json says tied: run compares it with the embedding and writes it only if it differs"
MISSING = (
    "the {family} family does not describe this checkpoint (1 problem):\n"
    "  lm_head.weight (1 tensor) is in the family, not in the checkpoint; config.json has {said}\n"
    "      if the embeddings are tied, set tie_word_embeddings to true there"
)


def plan_of(config: Config, shapes: Shapes, equal: bool | None) -> Plan:
    source, model = header_only(shapes, config), model_of(config)
    layout = LAYOUTS["flat"](model, LayoutOptions(True, "auto", 0, ""))
    return make_plan(source, model, layout, PlanOptions("source", MeshRules({}, {}), 1 << 20, 1 << 30, (), equal))


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # not tied, and tied, where config.json says nothing
@pytest.mark.parametrize("flag", [True, False, None, "left out"])
@pytest.mark.parametrize(
    ("present", "equal"),
    [(False, None), (False, False), (True, True), (True, False), (True, None)],
    ids=["absent", "absent, whatever was compared", "equal", "different", "not compared"],
)
def test_ties(family: str, flag: Any, present: bool, equal: bool | None) -> None:
    config, shapes = checkpoint(ONE_EACH[family])
    config.pop("tie_word_embeddings", None)
    config |= {} if flag == "left out" else {"tie_word_embeddings": flag}
    if not present:
        del shapes["lm_head.weight"]
    says_tied = family == "gemma2" if flag in (None, "left out") else flag
    if not present and not says_tied:
        said = "tie_word_embeddings = false" if flag is False else "no tie_word_embeddings"
        with pytest.raises(InputError) as caught:
            plan_of(config, shapes, equal)
        assert str(caught.value) == MISSING.format(family=family, said=said)
        return
    plan = plan_of(config, shapes, equal)
    tied = says_tied and (equal is not False or not present)
    assert plan.tied == tied
    assert ("unembed" in {leaf.name for leaf in plan.leaves}) == (not tied)
    note = ABSENT if not present else {True: EQUAL, False: DIFFERS, None: LATER}[equal]
    assert plan.notes == ((note,) if says_tied else ())


def test_a_tied_output_projection_may_have_any_shape() -> None:
    """It is not used, unless it differs: then it must fit."""
    config, shapes = checkpoint(tie_word_embeddings=True)
    shapes["lm_head.weight"] = (1, 24)
    assert plan_of(config, shapes, True).tied
    with pytest.raises(InputError, match=r"lm_head.weight in model.safetensors is \(1, 24\)"):
        plan_of(config, shapes, False)


# --- missing ----------------------------------------------------------------------------------------------------------------------


def test_missing_tensors_are_counted_by_template() -> None:
    config, shapes = checkpoint("mixtral_8x7b")
    for key in list(shapes):
        if "self_attn.q_proj" in key or ".2.block_sparse_moe.experts.1.w3" in key or key == "model.norm.weight":
            del shapes[key]
    assert report(config, shapes) == (
        "the mixtral family does not describe this checkpoint (3 problems):\n"
        "  model.layers.{layers}.self_attn.q_proj.weight (4 of 4 tensors) is in the family, not in the checkpoint\n"
        f"      {ANOTHER}\n"
        "  model.layers.{layers}.block_sparse_moe.experts.{experts}.w3.weight (1 of 12 tensors) is in the family, not in the checkpoint; "
        "the first is model.layers.2.block_sparse_moe.experts.1.w3.weight\n"
        f"      {ANOTHER}\n"
        "  model.norm.weight (1 tensor) is in the family, not in the checkpoint\n"
        f"      {ANOTHER}"
    )


def test_a_fused_tensor_that_is_missing_is_told_once() -> None:
    family = families()["llama"]
    fused = {"a": "(heads | kv_heads) embed", "b": "(heads | kv_heads) embed"}
    rows = tuple(type(family.params[0])(f"layers.{name}", "l.{layers}.ab", dims, part) for part, (name, dims) in enumerate(fused.items()))
    config = small("mistral_7b")
    model = bind(type(family)("two", "Two", (), family.axes, rows), config)
    stored = header_only({"l.0.ab": (8, 24), "l.1.ab": (8, 24), "l.2.ab": (8, 25)}, config).tensors
    with pytest.raises(InputError) as caught:
        require_covered(model, stored, False, ())
    assert str(caught.value) == (
        "the two family does not describe this checkpoint (2 problems):\n"
        "  l.{layers}.ab (1 of 4 tensors) is in the family, not in the checkpoint; the first is l.3.ab\n"
        f"      {ANOTHER}\n"
        "  l.2.ab in model.safetensors is (8, 25), but [(heads | kv_heads) embed] is (8, 24)\n"
        "      config.json gives heads = 6, kv_heads = 2, embed = 24; use the config.json that belongs to this checkpoint"
    )


# --- unmapped ---------------------------------------------------------------------------------------------------------------------


def test_unmapped_tensors_are_counted_by_template() -> None:
    config, shapes = checkpoint("mixtral_8x7b")
    for layer in range(4):
        shapes[f"model.layers.{layer}.self_attn.q_proj.bias"] = (48,)
        for expert in range(3):
            shapes[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight_scale_inv"] = (1, 1)
    shapes["vision.blocks.7.weight"] = (2,)
    shapes["model.extra"] = (2,)
    assert report(config, shapes) == (
        "the mixtral family does not describe this checkpoint (4 problems):\n"
        "  model.layers.{layers}.self_attn.q_proj.bias (4 tensors) is in the checkpoint, not in the family\n"
        '      if the model does not need them, add "model.layers.{}.self_attn.q_proj.bias" to model.ignore\n'
        "  model.layers.{layers}.block_sparse_moe.experts.{experts}.w1.weight_scale_inv (12 tensors) is in the checkpoint, "
        "not in the family\n"
        '      if the model does not need them, add "model.layers.{}.block_sparse_moe.experts.{}.w1.weight_scale_inv" to model.ignore\n'
        "  vision.blocks.{}.weight (1 tensor) is in the checkpoint, not in the family\n"
        '      if the model does not need it, add "vision.blocks.{}.weight" to model.ignore\n'
        "  model.extra (1 tensor) is in the checkpoint, not in the family\n"
        '      if the model does not need it, add "model.extra" to model.ignore'
    )


def test_a_tensor_that_an_entry_of_config_json_would_explain() -> None:
    config, shapes = checkpoint("llama3_8b")
    for layer in range(4):
        shapes[f"model.layers.{layer}.self_attn.o_proj.bias"] = (24,)
    assert report(config, shapes) == (
        "the llama family does not describe this checkpoint (1 problem):\n"
        "  model.layers.{layers}.self_attn.o_proj.bias (4 tensors) is in the checkpoint, "
        "but config.json does not have attention_bias = true\n"
        '      if the model does not need them, add "model.layers.{}.self_attn.o_proj.bias" to model.ignore'
    )


def test_layers_and_experts_beyond_what_config_json_gives() -> None:
    """The next layers that some models predict tokens with, or the config.json of a smaller model."""
    config, shapes = checkpoint("mixtral_8x7b")
    shapes |= {f"model.layers.4.block_sparse_moe.experts.{expert}.w1.weight": (20, 24) for expert in range(3)}
    shapes |= {"model.layers.2.block_sparse_moe.experts.3.w2.weight": (24, 20), "model.layers.4.input_layernorm.weight": (24,)}
    assert report(config, shapes) == (
        "the mixtral family does not describe this checkpoint (2 problems):\n"
        "  config.json has num_hidden_layers = 4, which does not fit the 5 layers in the checkpoint: 4 tensors are beyond; "
        "the first is model.layers.4.block_sparse_moe.experts.0.w1.weight\n"
        "      use the config.json that belongs to this checkpoint, or set num_hidden_layers = 5 in it; "
        'if the model does not need them, add "model.layers.4.*" to model.ignore\n'
        "  model.layers.{layers}.block_sparse_moe.experts.{experts}.w2.weight (1 tensor) is in the checkpoint, "
        "beyond what config.json gives, layers = 4, experts = 3; the first is model.layers.2.block_sparse_moe.experts.3.w2.weight\n"
        '      if the model does not need it, add "model.layers.{}.block_sparse_moe.experts.{}.w2.weight" to model.ignore'
    )


def test_the_rules_told_for_layers_beyond_are_enough() -> None:
    config, shapes = checkpoint()
    shapes |= {f"model.layers.{layer}.{name}": (24,) for layer in (4, 5) for name in ("eh_proj.weight", "input_layernorm.weight")}
    rules = ("model.layers.4.*", "model.layers.5.*")
    assert 'add "model.layers.4.*", "model.layers.5.*" to model.ignore' in report(config, shapes)
    assert len(covered(config, shapes, rules)) == 2
    shapes |= {f"model.layers.{layer}.input_layernorm.weight": (24,) for layer in (6, 7)}
    message = report(config, shapes)
    assert "which does not fit the 8 layers in the checkpoint: 6 tensors are beyond; the first is model.layers.4.eh_proj.weight" in message
    assert message.endswith("or set num_hidden_layers = 8 in it")


# --- another shape ----------------------------------------------------------------------------------------------------------------


def test_another_shape_is_told_with_the_numbers_that_give_ours() -> None:
    config, shapes = checkpoint()
    for layer in (1, 3):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (40, 24)
    shapes["model.norm.weight"] = (24, 1)
    assert report(config, shapes) == (
        "the mistral family does not describe this checkpoint (2 problems):\n"
        "  model.layers.1.self_attn.q_proj.weight (2 tensors) in model.safetensors is (40, 24), but [(heads head_dim) embed] is (48, 24)\n"
        "      config.json gives heads = 6, head_dim = 8, embed = 24; use the config.json that belongs to this checkpoint\n"
        "  model.norm.weight in model.safetensors is (24, 1), but [embed] is (24,)\n"
        "      config.json gives embed = 24; use the config.json that belongs to this checkpoint"
    )


# --- ignored ----------------------------------------------------------------------------------------------------------------------


def test_what_is_ignored_is_told() -> None:
    config, shapes = checkpoint()
    for layer in range(4):
        shapes[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = (4,)
    shapes |= {"model.layers.61.eh_proj": (2,), "vision.a": (2,), "vision.b.c": (2,)}
    assert covered(config, shapes, ("vision.*", "model.layers.61.*")) == (
        "model.layers.{}.self_attn.rotary_emb.inv_freq (4 tensors) ignored",
        "model.layers.61.* (1 tensor) ignored",
        "vision.* (2 tensors) ignored",
    )


def test_a_plan_takes_the_users_rules_and_tells_what_they_ignored() -> None:
    config, shapes = checkpoint()
    shapes |= {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,), "vision.a": (2,)}
    source, model = header_only(shapes, config), model_of(config)
    layout = LAYOUTS["flat"](model, LayoutOptions(True, "auto", 0, ""))
    plan = make_plan(source, model, layout, PlanOptions("source", MeshRules({}, {}), 1 << 20, 1 << 30, ignore=("vision.*",)))
    assert plan.notes == ("model.layers.{}.self_attn.rotary_emb.inv_freq (1 tensor) ignored", "vision.* (1 tensor) ignored")
    assert plan.bytes_read == source.total_bytes - 2 * (4 + 2)


@pytest.mark.parametrize(
    ("key", "rule", "ignored"),
    [
        ("a.1.b", "a.{}.b", True),
        ("a.x.b", "a.{}.b", False),
        ("a.1.2.b", "a.{}.b", False),
        ("a.1.2.b", "a.*.b", True),
        ("a.1.b.c", "a.{}.b", False),
        ("x.a.1.b", "a.{}.b", False),
        ("a.1xb", "a.{}.b", False),  # a dot is a dot
        ("a[0]", "a[0]", True),
        ("a0", "a[0]", False),
    ],
)
def test_rules(key: str, rule: str, ignored: bool) -> None:
    config, shapes = checkpoint()
    shapes[key] = (1,)
    if ignored:
        assert covered(config, shapes, (rule,)) == (f"{rule} (1 tensor) ignored",)
    else:
        assert f"{template(key, families()['mistral'])} (1 tensor) is in the checkpoint" in report(config, shapes, (rule,))


def test_no_rule_ignores_what_the_family_needs() -> None:
    config, shapes = checkpoint()
    assert covered(config, shapes, ("*",)) == ()
    del shapes["model.norm.weight"]
    assert "model.norm.weight (1 tensor) is in the family, not in the checkpoint" in report(config, shapes, ("*",))


# --- templates --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "key", "name"),
    [
        ("llama", "model.layers.7.mlp.up_proj.weight", "model.layers.{layers}.mlp.up_proj.weight"),
        ("llama", "model.layers.7.x.3.y", "model.layers.{layers}.x.{}.y"),
        ("llama", "layers.7.x", "layers.{}.x"),
        ("qwen3_moe", "model.layers.7.mlp.experts.12.z", "model.layers.{layers}.mlp.experts.{experts}.z"),
        ("llama", "12", "{}"),
        ("llama", "model.norm.weight", "model.norm.weight"),
    ],
)
def test_templates(family: str, key: str, name: str) -> None:
    assert template(key, families()[family]) == name


def test_thousands_of_unmapped_tensors_are_a_short_report() -> None:
    config, shapes = checkpoint()
    shapes |= {f"extra.{a}.{b}.w{c}": (1,) for a in range(100) for b in range(100) for c in range(3)}
    assert len(report(config, shapes).splitlines()) == 7
