"""Every family against transformers: the names, shapes and ties of published models, and what its tables must keep to.

A family is tested by being listed: a config in `data/configs` is what it needs, see `hf_models`.
"""

import doctest
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hf_models import CONFIGS, DATA, ONE_EACH, Config, header_only, saved_shapes, small, templates

from shardconv.axes import encode
from shardconv.errors import InputError
from shardconv.families import families, find
from shardconv.family import Family, LayoutOptions, Model, bind, fused
from shardconv.layouts import LAYOUTS
from shardconv.plan import PlanOptions, make_plan
from shardconv.sharding import MeshRules

NAMES = json.loads((DATA / "names.json").read_text())
ROOT = Path(__file__).parent.parent

every_family = pytest.mark.parametrize("family", families().values(), ids=list(families()))
every_config = pytest.mark.parametrize("name", CONFIGS)


def model_of(config: Config) -> Model:
    return bind(find(config), config)


def shapes_of(model: Model, tied: bool) -> dict[str, tuple[int, ...]]:
    """The tensors that a family expects on disk."""
    shapes = {}
    for param in model.params:
        if not (tied and param.name == "unembed"):
            address = param.address(model.axes)
            shapes |= {key: address.shape for key, _ in address.keys()}
    return shapes


# --- against transformers ---------------------------------------------------------------------------------------------------------


@every_config
def test_names_and_shapes_are_those_of_the_published_model(name: str) -> None:
    model = model_of(CONFIGS[name])
    assert templates(shapes_of(model, model.says_tied)) == NAMES[name]


@every_config
def test_the_published_names_are_what_transformers_saves(name: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert templates(saved_shapes(CONFIGS[name])) == NAMES[name]


@every_config
def test_a_family_names_every_tensor_and_not_just_its_template(name: str) -> None:
    """Numbers in names run from 0 without a hole, experts too."""
    model = model_of(CONFIGS[name])
    keys = shapes_of(model, model.says_tied)
    assert len(keys) == sum(count for count, _ in NAMES[name].values())
    layers = {int(found[1]) for key in keys if (found := re.search(r"\.layers\.(\d+)\.", key))}
    assert layers == set(range(CONFIGS[name]["num_hidden_layers"]))
    experts = {int(found[1]) for key in keys if (found := re.search(r"\.experts\.(\d+)\.", key))}
    assert experts == set(range(CONFIGS[name].get("num_experts") or CONFIGS[name].get("num_local_experts") or 0))


@every_family
def test_what_no_flag_means_for_ties_is_what_transformers_takes_it_for(family: Family) -> None:
    transformers = pytest.importorskip("transformers")
    assert family.tied_by_default == transformers.AutoConfig.for_model(family.name).tie_word_embeddings


def test_no_flag_and_null_are_the_same_and_false_is_not() -> None:
    config = small("gemma2_27b")
    assert "tie_word_embeddings" not in config
    ties = [model_of({**config, "tie_word_embeddings": said}).says_tied for said in (None, True, False)]
    assert (model_of(config).says_tied, ties) == (True, [True, True, False])


# --- what a table must keep to ----------------------------------------------------------------------------------------------------


def test_every_family_has_a_published_config() -> None:
    assert set(families()) == set(ONE_EACH)


@every_family
def test_a_family_fits_on_a_screen(family: Family) -> None:
    path = ROOT / "shardconv" / "families" / f"{family.name}.py"
    assert len(path.read_text().splitlines()) <= 40


@every_family
def test_canonical_names(family: Family) -> None:
    names = [param.name for param in family.params]
    assert len(set(names)) == len(names)
    for param in family.params:
        assert re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", param.name)
        assert param.name.startswith("layers.") == ("{layers" in param.key)


@every_config
def test_no_element_of_a_tensor_is_left_over_or_has_two_owners(name: str) -> None:
    config = CONFIGS[name] if name.startswith("biased") else small(name)
    model = model_of(config)
    owners: dict[str, np.ndarray] = {}
    for param in model.params:
        address = param.address(model.axes)
        places = np.zeros(address.shape, int)
        filled = np.ix_(*([_places(dim) for dim in address.dims]))
        places[filled] += 1
        owners[param.key] = owners.get(param.key, 0) + places
    for key, count in owners.items():
        assert (count == 1).all(), key


def _places(dim: tuple) -> list[int]:
    sizes = [digit.size for digit in dim]
    return [encode(dim, dict(zip((d.axis for d in dim), index, strict=True))) for index in np.ndindex(*sizes)]


def test_architectures_belong_to_one_family_each() -> None:
    claimed = [architecture for family in families().values() for architecture in family.architectures]
    assert len(set(claimed)) == len(claimed)


# --- numbers ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "axis", "size"),
    [
        ("llama2_7b", "kv_heads", 32),
        ("llama3_8b", "head_dim", 128),  # not in the config: hidden_size / heads
        ("mistral_nemo", "head_dim", 128),  # in the config, and not hidden_size / heads = 160
        ("qwen3_0_6b", "head_dim", 128),
        ("qwen3_30b_a3b", "mlp", 768),
        ("qwen3_30b_a3b", "experts", 128),
        ("mixtral_8x7b", "experts", 8),
        ("gemma2_27b", "layers", 46),
    ],
)
def test_axes_of_published_models(name: str, axis: str, size: int) -> None:
    assert model_of(CONFIGS[name]).axes[axis] == size


def test_grouped_heads_left_out_are_as_many_as_heads() -> None:
    for said in ({}, {"num_key_value_heads": None}):
        config = {key: value for key, value in CONFIGS["llama3_8b"].items() if key != "num_key_value_heads"}
        assert model_of({**config, **said}).axes["kv_heads"] == 32


def test_experts_as_transformers_5_counts_them() -> None:
    """It writes `num_local_experts` where published checkpoints have `num_experts`."""
    config = CONFIGS["qwen3_30b_a3b"]
    renamed = {**config, "num_local_experts": config["num_experts"], "num_experts": None}
    assert model_of(renamed).axes["experts"] == 128
    assert 'experts: there is no "num_experts"' in report({**config, "num_experts": None})


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("llama3_8b", {"query_scale": 128**-0.5, "norm_shift": 0.0, "embed_scale": 1.0}),
        ("qwen3_0_6b", {"query_scale": 128**-0.5, "norm_shift": 0.0, "embed_scale": 1.0}),
        # 27B alone: its scalar is not its head_dim, 128
        ("gemma2_27b", {"query_scale": 1 / 12, "norm_shift": 1.0, "embed_scale": math.sqrt(4608)}),
    ],
)
def test_facts(name: str, facts: Mapping[str, float]) -> None:
    assert model_of(CONFIGS[name]).facts == pytest.approx(facts, rel=1e-15)


# --- messages ---------------------------------------------------------------------------------------------------------------------


def report(config: Config, family: str = "auto") -> str:
    with pytest.raises(InputError) as caught:
        bind(find(config, family), config)
    return str(caught.value)


def test_everything_that_config_json_lacks_is_one_report() -> None:
    assert report({"architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 2, "vocab_size": 8}) == (
        "config.json does not describe a gemma2 model (4 problems):\n"
        '  heads, kv_heads: there is no "num_attention_heads"\n'
        "      use the config.json that belongs to the checkpoint\n"
        '  head_dim, embed, embed_scale: there is no "hidden_size"\n'
        "      use the config.json that belongs to the checkpoint\n"
        '  mlp: there is no "intermediate_size"\n'
        "      use the config.json that belongs to the checkpoint\n"
        '  query_scale: there is no "query_pre_attn_scalar"\n'
        "      use the config.json that belongs to the checkpoint"
    )


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"vocab_size": "many"}, 'vocab: "vocab_size" is "many", not a positive whole number'),
        ({"vocab_size": 0}, 'vocab: "vocab_size" is 0, not a positive whole number'),
        ({"vocab_size": 8.0}, 'vocab: "vocab_size" is 8.0, not a positive whole number'),
        ({"vocab_size": True}, 'vocab: "vocab_size" is true, not a positive whole number'),
        ({"vocab_size": [8]}, 'vocab: "vocab_size" is [8], not a positive whole number'),
        ({"head_dim": -1}, 'head_dim: "head_dim" is -1, not a positive whole number'),
        (
            {"head_dim": None, "hidden_size": 25},
            'head_dim: there is no "head_dim", and "hidden_size" 25 is no multiple of "num_attention_heads" 6',
        ),
    ],
)
def test_a_number_that_is_none(changes: Config, fact: str) -> None:
    assert report(small("llama3_8b", **changes)) == (
        "config.json does not describe a llama model (1 problem):\n"
        f"  {fact}\n"
        "      use the config.json that belongs to the checkpoint"
    )


@pytest.mark.parametrize(
    ("architectures", "said"),
    [
        (["Qwen3NextForCausalLM", "Another"], "Qwen3NextForCausalLM, Another"),
        (None, "no architecture"),
        ([], "no architecture"),
        ("LlamaForCausalLM", "no architecture"),
    ],
)
def test_no_family_for_an_architecture(architectures: object, said: str) -> None:
    known = ", ".join(f"{name} ({CONFIGS[one]['architectures'][0]})" for name, one in sorted(ONE_EACH.items()))
    assert report({"architectures": architectures}) == (
        f"no family describes this checkpoint: its config.json says {said} (1 problem):\n"
        f"  known: {known}\n"
        "      set model.family, or add a table: docs/adding_a_family.md"
    )


def test_no_family_of_that_name() -> None:
    assert report({}, "lama") == (
        "there is no family 'lama' (1 problem):\n"
        f"  known: {', '.join(sorted(ONE_EACH))}\n"
        "      set model.family to one of these"
    )


def test_a_named_family_is_taken_whatever_the_architecture() -> None:
    assert find({"architectures": ["VicunaForCausalLM"]}, "llama").name == "llama"


# --- the page on adding one -------------------------------------------------------------------------------------------------------


def test_the_page_on_adding_a_family_is_true() -> None:
    """Its blocks run in order; then its family is used in earnest: a plan over its fused tensors reads each byte once."""
    page = (ROOT / "docs" / "adding_a_family.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == page.count("```") // 2 == 3
    world: dict[str, object] = {}
    for number, block in enumerate(blocks):
        if ">>>" not in block:
            exec(block, world)
            continue
        test = doctest.DocTestParser().get_doctest(block, world, f"block {number}", None, None)
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, clear_globs=False)
        assert result.attempted
        assert not result.failed
        world |= test.globs
    model = world["model"]
    assert isinstance(model, Model)
    source = header_only(shapes_of(model, False), world["config"])
    layout = LAYOUTS["flat"](model, LayoutOptions(True, "auto", 0, ""))
    plan = make_plan(source, model, layout, PlanOptions("source", MeshRules({}, {}), 1 << 20, 1 << 30))
    assert plan.bytes_read == plan.target_bytes == source.total_bytes


def test_fused_parts_are_in_the_order_of_the_sum() -> None:
    rows = fused("a b", "k", "(heads | kv_heads) embed")
    starts = [row.address({"heads": 4, "kv_heads": 2, "embed": 3}).dims[0][0].offset for row in rows]
    assert [(row.name, row.part, row.linear) for row in rows] == [("a", 0, True), ("b", 1, True)]
    assert starts == [0, 4]
