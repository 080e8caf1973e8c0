"""`shardconv init`: the config it writes, from nothing but a config.json."""

import json
from pathlib import Path

import pytest

from shardconv.config import load_config
from shardconv.errors import ConfigError, ExitCode, InputError
from shardconv.families import families, find
from shardconv.family import bind
from shardconv.init import mesh_for, parameters, write_config

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "tie_word_embeddings": False,
}
MOE: dict[str, object] = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 128,
    "moe_intermediate_size": 1536,
    "head_dim": 128,
    "hidden_size": 4096,
    "rope_scaling": None,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to be in, with a model that is nothing but its config.json."""
    monkeypatch.chdir(tmp_path)
    model(LLAMA)
    return tmp_path


def model(config: object, name: str = "Llama-3.1-70B") -> None:
    Path(name).mkdir(exist_ok=True)
    Path(name, "config.json").write_text(json.dumps(config))


def test_the_config_of_a_llama(here: Path) -> None:
    text = write_config("Llama-3.1-70B", "maxtext", "configs.toml", force=False)
    assert Path("configs.toml").read_text() == text
    assert text.startswith(
        "# Llama-3.1-70B (LlamaForCausalLM): 70.6 billion parameters, 141.1 GB in bfloat16\n"
        "# layers 80, heads 64, kv_heads 8, head_dim 128, embed 8192, mlp 28672, vocab 128256\n"
        "# Relative paths are relative to the directory the program is started in. Set [mesh] to the mesh you train on.\n"
        "# `shardconv plan configs.toml` shows what this gives, and writes nothing.\n"
        "\n"
        "[source]\n"
        "# A directory of .safetensors or .bin files, one such file, or an index; relative to where the program starts.\n"
        'path = "Llama-3.1-70B"\n'
    )
    config = load_config("configs.toml")
    assert config.model.family == "llama"
    assert (config.target.layout, config.target.rope, config.target.scan_layers) == ("maxtext", "interleaved", True)
    assert config.mesh.axes == {"fsdp": 8, "tensor": 4}
    assert config.mesh.rules == {
        "embed": ("fsdp",),
        "vocab": ("tensor",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
    }
    assert (config.output.path, config.output.step, config.output.item) == ("converted/Llama-3.1-70B", 0, "items")


def test_the_flat_layout_has_no_place_of_its_own_and_keeps_the_order(here: Path) -> None:
    write_config("Llama-3.1-70B", "flat", "c.toml", force=False)
    config = load_config("c.toml")
    assert (config.target.layout, config.target.rope) == ("flat", "half")
    assert (config.output.step, config.output.item) == (None, None)


def test_rotary_halves_without_llama_3_scaling(here: Path) -> None:
    model(LLAMA | {"rope_scaling": None})
    write_config("Llama-3.1-70B", "maxtext", "c.toml", force=False)
    assert load_config("c.toml").target.rope == "half"


def test_experts_are_split_before_heads() -> None:
    mesh = mesh_for(bind(find(MOE), MOE))
    assert mesh.axes == {"fsdp": 16, "expert": 8}
    assert mesh.rules == {"embed": ("fsdp",), "experts": ("expert",)}


def test_a_small_model_is_split_over_embed_only() -> None:
    small = LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    mesh = mesh_for(bind(find(small), small))
    assert (mesh.axes, mesh.rules) == ({"fsdp": 8}, {"embed": ("fsdp",)})


@pytest.mark.parametrize(
    ("change", "axes", "rules"),
    [
        ({"vocab_size": 128255}, {"fsdp": 8, "tensor": 4}, ["embed", "heads", "kv_heads", "mlp"]),
        ({"num_key_value_heads": 2}, {"fsdp": 16, "tensor": 2}, ["embed", "vocab", "heads", "kv_heads", "mlp"]),
        ({"num_key_value_heads": 1}, {"fsdp": 32}, ["embed"]),
        ({"hidden_size": 8196, "head_dim": 128}, {"fsdp": 4, "tensor": 4}, ["embed", "vocab", "heads", "kv_heads", "mlp"]),
    ],
)
def test_a_mesh_axis_divides_what_it_splits(change: dict[str, object], axes: dict[str, int], rules: list[str]) -> None:
    config = LLAMA | change
    mesh = mesh_for(bind(find(config), config))
    assert (mesh.axes, list(mesh.rules)) == (axes, rules)


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({}, 70_553_706_496),  # what the model's makers publish: 70.6B
        ({"tie_word_embeddings": True}, 70_553_706_496 - 128256 * 8192),
    ],
)
def test_parameters(change: dict[str, object], count: int) -> None:
    config = LLAMA | change
    assert parameters(bind(find(config), config)) == count


def test_a_family_that_ties_by_default_counts_its_embedding_once() -> None:
    gemma = LLAMA | {"architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": 128}
    del gemma["tie_word_embeddings"]
    untied = gemma | {"tie_word_embeddings": False}
    counted, all_counted = (parameters(bind(find(config), config)) for config in (gemma, untied))
    assert all_counted - counted == 128256 * 8192


@pytest.mark.parametrize("name", list(families()))
def test_every_family_has_a_flat_config(here: Path, name: str) -> None:
    sizes = MOE | {"num_local_experts": 8, "query_pre_attn_scalar": 256, "architectures": list(families()[name].architectures)}
    model(sizes, name)
    write_config(name, "flat", "c.toml", force=False)
    assert load_config("c.toml").model.family == name


def test_a_config_is_not_overwritten_unless_forced(here: Path) -> None:
    Path("c.toml").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        write_config("Llama-3.1-70B", "flat", "c.toml", force=False)
    assert str(caught.value) == "will not overwrite a config (1 problem):\n  c.toml exists\n      choose another --output, or add --force"
    assert Path("c.toml").read_text() == "mine"
    write_config("Llama-3.1-70B", "flat", "c.toml", force=True)
    assert load_config("c.toml").target.layout == "flat"


def test_an_unknown_layout(here: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        write_config("Llama-3.1-70B", "maxtxt", "c.toml", force=False)
    assert str(caught.value) == (
        'cannot write a config (1 problem):\n  --layout = "maxtxt" is not known\n'
        '      did you mean "maxtext"? there are flat, maxtext; a model of your own is "module:function"'
    )


GIVE = "give the directory that holds the model's config.json"
UNUSED = "x/config.json cannot be used"


@pytest.mark.parametrize(
    ("content", "title", "report"),
    [
        (None, "cannot read the model's config", "x/config.json: No such file or directory\n      " + GIVE),
        ("nope", UNUSED, "x/config.json is not JSON: Expecting value at byte 0\n      download this file again"),
        ("[]", UNUSED, "x/config.json is JSON, but not an object\n      download this file again"),
        ('{"a": 1, "a": 2}', UNUSED, 'x/config.json has the key a twice\n      download this file again'),
    ],
)
def test_a_config_json_that_cannot_be_read(here: Path, content: str | None, title: str, report: str) -> None:
    if content is not None:
        Path("x").mkdir()
        Path("x/config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        write_config("x", "flat", "c.toml", force=False)
    assert str(caught.value) == f"{title} (1 problem):\n  {report}"
    assert caught.value.exit_code == ExitCode.INPUT
    assert not Path("c.toml").exists()


def test_a_model_of_no_known_family(here: Path) -> None:
    model({"architectures": ["RwkvForCausalLM"]}, "x")
    with pytest.raises(InputError, match=r"^no family describes this checkpoint: its config.json says RwkvForCausalLM"):
        write_config("x", "flat", "c.toml", force=False)


@pytest.mark.parametrize(("output", "why"), [("nodir/x.toml", "No such file or directory"), ("Llama-3.1-70B", "Is a directory")])
def test_a_place_that_cannot_be_written(here: Path, output: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        write_config("Llama-3.1-70B", "maxtext", output, force=True)
    assert str(caught.value) == (
        f"cannot write the config (1 problem):\n  {output}: {why}\n"
        "      give --output a file in a directory that is there and can be written"
    )
