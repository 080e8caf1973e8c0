"""`[target] layout = "package.module:make_model"`: a conversion into a user's own model, by the same run, resume and check as any other.

What `convert_module` gives for the same files is the oracle: it moves whole arrays in memory, and is itself held against torch.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax")
pytest.importorskip("equinox")

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import own_models  # noqa: E402
from flax import nnx  # noqa: E402
from logit_cases import SIZES  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_models import torch_model  # noqa: E402
from torch import nn  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import shardconv  # noqa: E402
from shardconv.checking import require, verify  # noqa: E402
from shardconv.cli import app  # noqa: E402
from shardconv.config import Config, RunOptions, load_config  # noqa: E402
from shardconv.conversion import run  # noqa: E402
from shardconv.errors import ConfigError, InputError, ShardconvError  # noqa: E402
from shardconv.planning import plan_from_config  # noqa: E402
from shardconv.porting.making import Asked, made_elsewhere, model_of  # noqa: E402
from shardconv.source import open_source  # noqa: E402
from shardconv.toml import toml_value  # noqa: E402

OPTIONS = RunOptions(restart=False, overwrite=False, verbosity=-1, json_logs=False)
Json = dict[str, Any]


def torch_state() -> dict[str, Any]:
    """The state dict of a PyTorch model with the layers of `own_models`; its norm's statistics are not the first ones."""
    torch.manual_seed(0)
    layers = {
        "conv": nn.Conv2d(3, 8, 3),
        "norm": nn.BatchNorm2d(8),
        "up": nn.ConvTranspose2d(8, 6, 2, groups=2),
        "lstm": nn.LSTM(5, 4),
        "fc": nn.Linear(48, 10),
    }
    layers["norm"](torch.randn(64, 8, 2, 2))
    state = {f"{name}.{inner}": value for name, layer in layers.items() for inner, value in layer.state_dict().items()}
    return {**state, "rope.0.inv_freq": torch.ones(3)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to be in, with a checkpoint and a mapping."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    save_file(torch_state(), tmp_path / "source" / "model.safetensors")
    (tmp_path / "mapping.toml").write_text(own_models.MAPPING)
    return tmp_path


def config(layout: str, *overrides: str, mapping: str = "mapping.toml") -> Config:
    Path("c.toml").write_text(
        f'[source]\npath = "source"\n[target]\nlayout = "{layout}"\nmapping = "{mapping}"\n[output]\npath = "out"\n'
        '[workers]\nexecutor = "local"\ncount = 1\nmemory_budget = "64MiB"\n'
    )
    return load_config("c.toml", overrides)


def arrays(model: Any) -> list[np.ndarray[Any, Any]]:
    if isinstance(model, nnx.Module):
        model = nnx.state(model, nnx.Not(nnx.RngState))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array))]


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(arrays(one), arrays(other), strict=True))
    return len(pairs) > 5 and all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


def converted(layout: str, *overrides: str) -> tuple[Json, Any, Any]:
    """The report of a run, the model with what it wrote, and the model as `convert_module` fills it."""
    report = run(config(layout, *overrides), OPTIONS)
    loaded = shardconv.load_module("out", model_of(layout)[0])
    return report, loaded, shardconv.convert_module("source", model_of(layout)[0], "mapping.toml")


def refused(error: type[ShardconvError], chosen: Config, *, checked: bool = False) -> str:
    with pytest.raises(error) as caught:
        _ = require(chosen, plan_from_config(chosen)) if checked else plan_from_config(chosen)
    return str(caught.value)


@pytest.mark.parametrize("name", ["nnx", "linen", "equinox"])
def test_a_run_writes_what_convert_module_gives(here: Path, name: str) -> None:
    if name == "equinox":
        (here / "mapping.toml").write_text(own_models.EQUINOX)
    report, loaded, expected = converted(f"own_models:{name}_model")
    assert same(loaded, expected)
    assert report["check"]["equal"] and report["check"]["weights"]["whole"]
    assert (report["family"], report["layout"]) == ("", f"own_models:{name}_model")
    plan = plan_from_config(config(f"own_models:{name}_model"))
    assert (report["bytes_read"], report["requests"]) == (plan.bytes_read, plan.requests)
    inexact = {"nnx": {"cell.dense_h.bias"}, "equinox": {"cell.bias"}, "linen": {f"params.cell.h{gate}.bias" for gate in "ifgo"}}
    assert {leaf.name for leaf in plan.leaves if not leaf.exact} == inexact[name]


def test_numbers_are_rounded_once_where_another_dtype_is_asked_for(here: Path) -> None:
    report, _, expected = converted("own_models:nnx_model", "target.dtype=bfloat16")
    assert report["check"]["equal"]
    stored = shardconv.load_module("out", jax.tree.map(lambda leaf: leaf, model_of("own_models:nnx_model")[0]))
    rounded = [one.astype(jax.numpy.bfloat16).astype(np.float32) for one in arrays(expected)]
    assert all(np.array_equal(a, b) for a, b in zip(arrays(stored), rounded, strict=True))


def test_what_a_mesh_writes_is_the_same(here: Path) -> None:
    mesh = ("mesh.axes={x=2}", 'mesh.rules={o="x"}', "mesh.placement=mesh", "mesh.platform=cpu")
    report, loaded, expected = converted("own_models:nnx_model", *mesh)
    assert same(loaded, expected) and report["check"]["equal"]
    spec = {leaf.name: leaf.spec for leaf in plan_from_config(config("own_models:nnx_model", *mesh)).leaves}
    assert (spec["conv.kernel"], spec["norm.scale"]) == ((None, None, None, "x"), (None,))


ATTENTION = {name: f"({axis} head_dim) embed -> layers embed {axis} head_dim" for name, axis in (("q", "heads"), ("k", "kv"), ("v", "kv"))}
LLAMA = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "unembed": "lm_head.weight: vocab embed -> embed vocab",
    "layers.attn_norm": "model.layers.{layers}.input_layernorm.weight: embed -> layers embed",
    "layers.mlp_norm": "model.layers.{layers}.post_attention_layernorm.weight: embed -> layers embed",
    **{f"layers.attn.{name}": f"model.layers.{{layers}}.self_attn.{name}_proj.weight: {dims}" for name, dims in ATTENTION.items()},
    "layers.attn.o": "model.layers.{layers}.self_attn.o_proj.weight: embed (heads head_dim) -> layers heads head_dim embed",
    **{f"layers.mlp.{name}": f"model.layers.{{layers}}.mlp.{name}_proj.weight: out in -> layers in out" for name in ("gate", "up", "down")},
}


def test_a_scanned_model_is_compared_by_its_own_forward(here: Path) -> None:
    pytest.importorskip("transformers")
    torch_model(SIZES).save_pretrained(here / "llama")
    (here / "mapping.toml").write_text("[mapping]\n" + "\n".join(f'"{name}" = "{line}"' for name, line in LLAMA.items()))
    (here / "mine.py").write_text(
        "import jax\nimport jax.numpy as jnp\nfrom user_models import LinenLlama\n\n\n"
        "def make():\n    return LinenLlama().init(jax.random.key(0), jnp.zeros((1, 4), int))\n\n\n"
        "def forward(params, tokens):\n    return LinenLlama().apply(params, tokens)\n"
    )
    said = ("source.path=llama", "check.mode=all", 'mesh.axes={x=2}', 'mesh.rules={embed="x"}')
    assert refused(ConfigError, config("mine:make", *said), checked=True) == (
        "the logits cannot be compared (1 problem):\n"
        "  mine:make is a model of your own, which no forward of ours runs\n"
        '      set check.forward = "module:function"; models that are no language models: shardconv.porting.agreement'
    )
    report = run(config("mine:make", *said, "check.forward=mine:forward"), OPTIONS)
    assert report["check"]["equal"] and report["check"]["logits"]["equal"] and report["read_amplification"] == 1.0
    specs = {leaf.name: leaf.spec for leaf in plan_from_config(config("mine:make", *said)).leaves}
    assert specs["params.layers.attn.q"] == (None, "x", None, None)


GPT2 = """
import jax
import jax.numpy as jnp

SHAPES = {"wte": (61, 48), "wpe": (32, 48), "ln_f": {"scale": (48,), "bias": (48,)}, "h": {
    "ln_1": {"scale": (3, 48), "bias": (3, 48)}, "ln_2": {"scale": (3, 48), "bias": (3, 48)},
    "qkv": {"kernel": (3, 48, 144), "bias": (3, 144)}, "o": {"kernel": (3, 48, 48), "bias": (3, 48)},
    "up": {"kernel": (3, 48, 192), "bias": (3, 192)}, "down": {"kernel": (3, 192, 48), "bias": (3, 48)}}}


def make():
    return jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


@jax.jit
@jax.numpy_rank_promotion("allow")
def forward(params, tokens):
    batch, length = tokens.shape
    x = params["wte"][tokens] + params["wpe"][:length]
    for number in range(3):
        p = jax.tree.map(lambda leaf: leaf[number], params["h"])
        q, k, v = jnp.split(dense(p["qkv"], norm(p["ln_1"], x)).reshape(batch, length, 3, 4, 12), 3, axis=2)
        scores = jnp.einsum("bqnhd,bknhd->bhqk", q, k) / jnp.sqrt(12)
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf))
        heads = jnp.einsum("bhqk,bknhd->bqhd", weights, v)
        x = x + dense(p["o"], heads.reshape(batch, length, 48))
        x = x + dense(p["down"], jax.nn.gelu(dense(p["up"], norm(p["ln_2"], x))))
    return norm(params["ln_f"], x) @ params["wte"].T
"""
PLACES = {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
GPT2_MAPPING = {
    "wte": "transformer.wte.weight",
    "wpe": "transformer.wpe.weight",
    **{f"ln_f.{name}": f"transformer.ln_f.{key}" for name, key in (("scale", "weight"), ("bias", "bias"))},
    **{
        f"h.{norm}.{name}": f"transformer.h.{{layers}}.{norm}.{key}: embed -> layers embed"
        for norm in ("ln_1", "ln_2")
        for name, key in (("scale", "weight"), ("bias", "bias"))
    },
    **{f"h.{name}.kernel": f"transformer.h.{{layers}}.{place}.weight: in out -> layers in out" for name, place in PLACES.items()},
    **{f"h.{name}.bias": f"transformer.h.{{layers}}.{place}.bias: out -> layers out" for name, place in PLACES.items()},
}


def test_sequences_are_no_longer_than_the_positions_that_there_are(here: Path) -> None:
    pytest.importorskip("transformers")
    sizes = {"model_type": "gpt2", "n_embd": 48, "n_head": 4, "n_layer": 3, "vocab_size": 61, "n_positions": 32}
    torch_model(sizes).save_pretrained(here / "gpt2")
    (here / "mapping.toml").write_text("[mapping]\n" + "\n".join(f'"{name}" = "{line}"' for name, line in GPT2_MAPPING.items()))
    (here / "tiny_gpt2.py").write_text(GPT2)
    report = run(config("tiny_gpt2:make", "source.path=gpt2", "check.mode=logits", "check.forward=tiny_gpt2:forward"), OPTIONS)
    found = report["check"]["logits"]
    assert found["equal"] and found["sequences"] == [32, 32, 32]
    assert found["notes"] == [
        "sequences are cut to 32 tokens, config.json's n_positions: faults of position encodings beyond do not show"
    ]


def test_damage_is_seen_in_what_is_computed_too(here: Path) -> None:
    run(config("own_models:nnx_model", "check.mode=none", "output.ocdbt=false", "output.zarr=2"), OPTIONS)
    chosen = config("own_models:nnx_model", "output.ocdbt=false", "output.zarr=2")
    assert verify(chosen)["equal"]
    state = torch_state()
    state["lstm.bias_hh_l0"][3] += 1e-3  # the source is another one now, and what is there is not made of it
    save_file(state, here / "source" / "model.safetensors")
    found = verify(chosen)
    assert not found["equal"] and "cell.dense_h.bias[3] is" in found["problems"][0]["fact"]


def test_it_is_loaded_onto_a_mesh_without_a_checkpoint(here: Path) -> None:
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    params = shardconv.load("source", mesh, layout="own_models:nnx_model", mapping="mapping.toml", rules={"o": "x"})
    model = model_of("own_models:nnx_model")[0]
    expected = shardconv.convert_module("source", model, "mapping.toml")
    assert params["conv"]["kernel"].sharding.spec[-1] == "x"
    assert np.array_equal(params["conv"]["kernel"], expected.conv.kernel) and np.array_equal(params["up"]["kernel"], expected.up.kernel)


def test_a_mapping_is_a_dict_too_where_it_is_loaded(here: Path) -> None:
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    written = tomllib.loads(own_models.MAPPING)
    said: Json = {"layout": "own_models:nnx_model", "rules": {"o": "x"}, "ignore": written["ignore"]}
    params = shardconv.load("source", mesh, mapping={**written["mapping"], "fc.bias": ["fc.bias"]}, **said)
    by_file = shardconv.load("source", mesh, mapping="mapping.toml", **said)
    assert params["fc"]["bias"].shape == (10,) and jax.tree.all(jax.tree.map(np.array_equal, params, by_file))


def test_a_plan_says_what_a_run_would_refuse(here: Path) -> None:
    config("own_models:nnx_model")
    said = CliRunner().invoke(app, ["plan", "c.toml", "--set", "check.mode=logits"])
    notes = [line.split(maxsplit=1)[1] for line in said.output.splitlines() if line.startswith("note ")]
    assert said.exit_code == 0 and notes[-1].startswith(
        "a run is refused, as check.mode is 'logits': own_models:nnx_model is a model of your own, which no forward of ours runs; "
        'set check.forward = "module:function"; models that are no language models: shardconv.porting.agreement'
    )
    assert "is refused" not in CliRunner().invoke(app, ["plan", "c.toml"]).output


def test_without_a_mapping_one_is_proposed_or_the_run_refused(here: Path) -> None:
    with pytest.raises(InputError) as caught:
        plan_from_config(config("own_models:nnx_model", mapping="auto"))
    assert str(caught.value) == (
        "the checkpoint does not fit the model (2 problems):\n"
        "  open: rope.0 (inv_freq (3)) fits nothing\n"
        "  1 of 6 layers are open\n"
        "      complete what shardconv.propose_mapping or `shardconv init` writes; or pass agrees=, a function that runs the model"
    )
    state = {name: value for name, value in torch_state().items() if name.startswith(("conv", "norm"))}
    save_file(state, here / "source" / "model.safetensors")
    (here / "small.py").write_text(
        "import jax\nfrom flax import nnx\nfrom own_models import Net\n\n\nclass Small(nnx.Module):\n"
        "    def __init__(self, rngs):\n        net = Net(rngs)\n        self.conv, self.norm = net.conv, net.norm\n\n\n"
        "def make():\n    return Small(nnx.Rngs(0))\n"
    )
    assert run(config("small:make", mapping="auto"), OPTIONS)["check"]["equal"]


def test_init_writes_what_is_proposed_beside_the_config(here: Path) -> None:
    said = CliRunner().invoke(app, ["init", "source", "--layout", "own_models:nnx_model"])
    assert said.output == (
        "wrote source.toml and source.mapping.toml; to complete: 1 line in doubt, 1 layer without a place; "
        "next: shardconv plan source.toml\n"
    )
    written, left = load_config("source.toml"), tomllib.loads(Path("source.mapping.toml").read_text())["mapping"]
    assert (written.source.path, written.target.layout, written.target.mapping) == ("source", "own_models:nnx_model", "source.mapping.toml")
    by_hand = {"fc.kernel": "fc.weight: o (c h w) -> (h w c) o; h=2, w=3"}
    lines = [f"{toml_value(name)} = {toml_value(value)}" for name, value in {**left, **by_hand}.items()]
    Path("source.mapping.toml").write_text('ignore = ["rope.*"]\n[mapping]\n' + "\n".join(lines))
    plans = plan_from_config(written), plan_from_config(config("own_models:nnx_model"))
    chunks = [{leaf.name: (leaf.shape, leaf.dtype, leaf.parts[0].source) for leaf in plan.leaves} for plan in plans]
    assert chunks[0] == chunks[1]
    again = CliRunner().invoke(app, ["init", "source", "--layout", "own_models:nnx_model"])
    assert again.exit_code == 2 and "source.toml exists" in again.output and "source.mapping.toml exists" in again.output


def test_a_model_that_cannot_be_traced_is_made(here: Path) -> None:
    save_file({"fc.weight": torch.arange(12.0).reshape(3, 4)}, here / "source" / "model.safetensors")
    (here / "mapping.toml").write_text('[mapping]\n"fc.weight" = "fc.weight"\n')
    plan = plan_from_config(config("own_models:untraceable"))
    assert plan.notes[0].startswith("own_models:untraceable cannot be traced, so its arrays were made: TracerArrayConversionError: ")


TITLE = "target.layout cannot be used (1 problem):\n  "


WANTED = "\n      name a function that takes nothing and gives your model"
NO_MODULE = "there is no module 'nowhere' in {here}, nor among the installed packages\n      "
NO_NAME = "target.layout is 'own models:make'\n      "
RAISED = "own_models:failing() raised OSError: the weights of the week are not here, at {models}:{line}"
VARIABLES = "\n      give its variables: jax.eval_shape(model.init, jax.random.key(0), inputs)"
NO_LAYOUTS = {
    "nowhere:make": NO_MODULE + "run from the directory that it is in, or install its package",
    "own_models:nowhere": "{models} has no 'nowhere'\n      it has: {names}",
    "own_models.py:make": "target.layout is 'own_models.py:make'\n      write own_models:make, without .py",
    "./models/own.py:make": "target.layout is './models/own.py:make'\n      write models.own:make, without .py",
    "own models:make": NO_NAME + 'say a layout that `shardconv layouts` lists, or "package.module:make_model"',
    "own_models:NOT_A_FUNCTION": f"own_models:NOT_A_FUNCTION is a int, not a function{WANTED}",
    "own_models:failing": RAISED + WANTED,
    "own_models:without_arrays": f"own_models:without_arrays() gave a Dense without arrays{VARIABLES}",
}


@pytest.mark.parametrize(("layout", "said"), NO_LAYOUTS.items())
def test_a_layout_that_is_none(here: Path, layout: str, said: str) -> None:
    models = Path(own_models.__file__)
    lines = models.read_text().splitlines()
    line = 1 + next(number for number, text in enumerate(lines) if "raise OSError" in text)
    with pytest.raises(ConfigError) as caught:
        made_elsewhere(Asked(layout, open_source("source"), None, ()))
    found = str(caught.value)
    names = found.partition("it has: ")[2]
    assert found == TITLE + said.format(here=here, models=models, line=line, names=names)


def test_a_model_that_ends_the_process_is_told_of(here: Path) -> None:
    found = refused(ConfigError, config("own_models:dying"))
    assert re.sub("pid [0-9]+", "pid N", found) == (
        f"{TITLE}the process that made own_models:dying died: its process (pid N) exited with code 9; it said: out of luck"
    )


def test_a_mapping_that_does_not_fit_is_one_report_before_anything_is_written(here: Path) -> None:
    (here / "mapping.toml").write_text(own_models.MAPPING.replace('"norm" = "norm"\n', "").replace("h=2, w=3", "h=2"))
    assert refused(InputError, config("own_models:nnx_model")) == (
        "the checkpoint does not fit the model (10 problems):\n"
        "  fc.kernel = fc.weight: o (c h w) -> (h w c) o; h=2: no shape says how long c, w is: add `; c=..., w=...`; "
        "fc.weight is (10, 48), fc.kernel is (48, 10)\n"
        "  norm.bias (8): nothing fills it\n      map it, or make the model without it\n"
        "  norm.mean (8): nothing fills it\n      map it, or make the model without it\n"
        "  norm.scale (8): nothing fills it\n      map it, or make the model without it\n"
        "  norm.var (8): nothing fills it\n      map it, or make the model without it\n"
        '  norm.num_batches_tracked () goes nowhere\n      map it, or ignore = ["norm.num_batches_tracked"]\n'
        '  norm.bias (8) goes nowhere\n      map it, or ignore = ["norm.bias"]\n'
        '  norm.running_mean (8) goes nowhere\n      map it, or ignore = ["norm.running_mean"]\n'
        '  norm.running_var (8) goes nowhere\n      map it, or ignore = ["norm.running_var"]\n'
        '  norm.weight (8) goes nowhere\n      map it, or ignore = ["norm.weight"]'
    )
    assert sorted(path.name for path in here.iterdir()) == ["c.toml", "mapping.toml", "source"]


def test_keys_that_are_for_other_layouts(here: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config("own_models:nnx_model", "target.rope=half", "target.vocab_size=7")
    assert str(caught.value) == (
        "the config is not valid (2 problems):\n"
        '  --set target.vocab_size=7: [target] vocab_size = 7 does not go with layout = "own_models:nnx_model"\n'
        "      leave it out: your model has its own number of rows\n"
        '  --set target.rope=half: [target] rope = "half" does not go with layout = "own_models:nnx_model"\n'
        "      leave it out: write the order of rotary dims into your mapping"
    )
    with pytest.raises(ConfigError, match=r'mapping = "mapping.toml" does not go with layout = "flat"'):
        config("flat")


def test_a_mesh_rule_for_an_axis_that_the_model_has_not_is_refused(here: Path) -> None:
    said = ("mesh.axes={fsdp=2,tensor=2}", 'mesh.rules={embed="fsdp",out="tensor",o="fsdp"}')
    remedy = "its axes, as the mapping or the layer rules name them, are"
    found = refused(ConfigError, config("own_models:nnx_model", *said))
    axes = "a0, c, from, gates, h, i, input, o, w"
    assert found == (
        "the mesh rules do not fit the model (2 problems):\n"
        "  mesh.rules.embed: no array of own_models:nnx_model has such an axis\n"
        f"      {remedy} {axes}\n"
        "  mesh.rules.out: no array of own_models:nnx_model has such an axis\n"
        f"      {remedy} {axes}"
    )
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    with pytest.raises(ConfigError, match=r"mesh\.rules\.gate: .*\n +did you mean \"gates\"\? its axes"):
        shardconv.load("source", mesh, layout="own_models:nnx_model", mapping="mapping.toml", rules={"gate": "x"})


def test_memory_for_what_is_computed_is_counted(here: Path) -> None:
    plan = plan_from_config(config("own_models:nnx_model"))
    largest = max(tensor.peak_bytes for tensor in plan.computed.values())
    assert largest > 0 and plan.peak_bytes > largest
    found = refused(ConfigError, config("own_models:nnx_model", f"workers.memory_budget={largest + 100}"))
    assert f"with {largest} for tensors that are computed, and a worker may take {largest + 100}" in found


# save_module, load_module


@pytest.mark.parametrize("name", ["nnx", "linen", "equinox"])
def test_a_model_is_saved_and_loaded(here: Path, name: str) -> None:
    mapping = here / "mapping.toml"
    if name == "equinox":
        mapping.write_text(own_models.EQUINOX)
    model = shardconv.convert_module("source", model_of(f"own_models:{name}_model")[0], mapping)
    shardconv.save_module("saved", model)
    assert same(shardconv.load_module("saved", model_of(f"own_models:{name}_model")[0]), model)
    with pytest.raises(ConfigError, match=r"saved exists\n +choose another path, or say overwrite=True"):
        shardconv.save_module("saved", model)
    shardconv.save_module("saved", model, overwrite=True)


def test_a_checkpoint_of_another_model_is_refused(here: Path) -> None:
    shardconv.save_module("saved", {"fc": {"kernel": np.ones((3, 4)), "bias": np.ones(4)}})
    with pytest.raises(InputError) as caught:
        shardconv.load_module("saved", {"fc": {"kernel": np.ones((4, 3)), "scale": np.ones(3)}})
    assert str(caught.value) == (
        "the checkpoint does not fit the model (3 problems):\n"
        "  fc.kernel is (3, 4) in the checkpoint, and (4, 3) in the model\n"
        "  fc.scale (3) is not in the checkpoint\n"
        "  fc.bias (4) is in the checkpoint alone"
    )
    with pytest.raises(ConfigError, match=r"fc\.kernel is abstract\n +save what convert_module gave"):
        shardconv.save_module("other", {"fc": {"kernel": jax.ShapeDtypeStruct((3, 4), "float32")}})


def test_many_arrays_that_are_abstract_are_one_line(here: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        shardconv.save_module("other", {f"fc{n:03}": jax.ShapeDtypeStruct((4,), "float32") for n in range(108)} | {"real": np.ones(3)})
    assert str(caught.value) == (
        "the model cannot be saved (1 problem):\n"
        "  108 of 109 arrays are abstract: fc000, fc001, fc002, fc003, fc004 and 103 more\n"
        "      save what convert_module gave"
    )


def test_a_path_without_a_checkpoint(here: Path) -> None:
    params = {"kernel": np.ones((3, 4), np.float32)}
    for path in ("converted/x", "steps/0/items", "two/0", "two/1", "damaged"):
        shardconv.save_module(path, params)
    (here / "empty" / "0").mkdir(parents=True)
    (here / "damaged" / "_METADATA").unlink()
    said = {
        "/not/there": "a layout of your own is written to output.path itself",
        "empty": "a layout of your own is written to output.path itself",
        "converted/x/0/items": "did you mean converted/x? a layout of your own is written to output.path itself",
        "converted/x/items": "did you mean converted/x? a layout of your own is written to output.path itself",
        "converted/xx": "did you mean converted/x? a layout of your own is written to output.path itself",
        "step": "did you mean steps? a layout of your own is written to output.path itself",
    }
    for path, remedy in said.items():
        with pytest.raises(InputError) as caught:
            shardconv.load_module(path, params)
        assert str(caught.value) == f"the checkpoint cannot be read (1 problem):\n  there is no checkpoint at {path}\n      {remedy}"
    for path in ("converted/x", "steps", "steps/0", "steps/0/items"):
        assert np.array_equal(shardconv.load_module(path, {"kernel": np.zeros((3, 4), np.float32)})["kernel"], params["kernel"])
    with pytest.raises(ConfigError, match=r"^two holds several checkpoints"):
        shardconv.load_module("two", params)
    with pytest.raises(InputError, match=r"damaged: its arrays have no metadata\n +the file is damaged or incomplete: make it again"):
        shardconv.load_module("damaged", params)


def test_it_comes_back_where_the_model_has_it(here: Path) -> None:
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    shardconv.save_module("saved", {"kernel": np.arange(8.0, dtype=np.float32).reshape(4, 2)})
    found = shardconv.load_module("saved", {"kernel": jax.ShapeDtypeStruct((4, 2), "float32", sharding=split)})["kernel"]
    assert found.sharding == split and np.array_equal(found, np.arange(8.0).reshape(4, 2))
