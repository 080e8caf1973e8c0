"""`shardconv.load`: what is given back, what is refused before anything is read, and what is read and held, in one process or several."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from hf_models import small
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from load_in_process import load_in
from logit_cases import write
from mesh_cases import MESHES, bits, checkpoint, config_of, made, mesh_of, needed, plan_of

import shardconv
from shardconv.boxes import slices
from shardconv.errors import ConfigError, InputError
from shardconv.leaf import Leaf
from shardconv.mesh.choosing import SPARED, choose, host_bytes, source_bytes
from shardconv.placement import device_boxes
from shardconv.plan import Plan
from shardconv.run import python_path
from shardconv.sharding import MeshRules
from shardconv.synth import synthesise

MIB = 1 << 20
AXES, RULES = MESHES["both"]
STRINGS = {axis: rule[0] if len(rule) == 1 else rule for axis, rule in RULES.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(config_of("llama"), tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(config_of("mixtral"), tmp_path_factory.mktemp("mixtral") / "source")


def flat(tree: Any) -> dict[str, jax.Array]:
    return {".".join(step.key for step in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def same(found: dict[str, jax.Array], plan: Plan) -> None:
    assert found.keys() == {leaf.name for leaf in plan.leaves}
    for leaf in plan.leaves:
        assert found[leaf.name].dtype.name == leaf.dtype
        np.testing.assert_array_equal(bits(found[leaf.name]), made(leaf, plan.source.tensors, plan.source.root))


# --- what is given back -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["auto", "device"])
def test_nested_dicts_of_arrays_split_by_the_rules(mixtral: Path, placement: Any) -> None:
    mesh = mesh_of(AXES)
    params = shardconv.load(mixtral, mesh, layout="maxtext", rules=STRINGS, vocab_size=40, placement=placement)
    plan = plan_of(mixtral, "maxtext", "both")
    same(flat(params), plan)
    for leaf in plan.leaves:
        assert flat(params)[leaf.name].sharding == NamedSharding(mesh, PartitionSpec(*leaf.spec))
    assert params["params"]["params"]["decoder"]["layers"]["MoeBlock_0"]["wi_0"].shape == (4, 4, 24, 20)


def test_what_is_planned_is_what_is_loaded(mixtral: Path) -> None:
    planned = shardconv.plan_load(mixtral, mesh_of({"x": 2}), rules={"embed": "x"})
    loaded = planned.read()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), planned.abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), loaded.params
    )
    assert loaded.read is not None and loaded.read.bytes_needed == loaded.read.bytes_read == 2 * sum(
        math.prod(leaf.shape) for leaf in planned.leaves.values()
    )
    assert set(planned.ways.values()) == {"host"}, "one process reads nothing twice"


class Params(NamedTuple):
    """Some user's own tree."""

    embed: Any
    final_norm: Any
    layers: dict[str, Any]
    unembed: Any


def test_a_users_tree_comes_back_with_its_own_shardings(llama: Path) -> None:
    mesh = mesh_of({"a": 2, "b": 4})
    planned = shardconv.plan_load(llama, mesh, rules={})

    def spec(shape: tuple[int, ...]) -> PartitionSpec:
        return PartitionSpec(*["b" if dim == [n % 4 for n in shape].index(0) else None for dim in range(len(shape))])

    tree = planned.abstract
    like = Params(
        *jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec(leaf.shape))),
            (tree["embed"], tree["final_norm"], tree["layers"], tree["unembed"]),
        )
    )
    for asked in (like, jax.tree.map(lambda leaf: leaf.sharding, like)):
        params = shardconv.load(llama, like=asked)
        assert isinstance(params, Params)
        assert jax.tree.map(lambda leaf: leaf.sharding, params) == jax.tree.map(lambda leaf: leaf.sharding, like)
        np.testing.assert_array_equal(bits(params.embed), bits(planned.read().params["embed"]))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
    assert shardconv.load(llama, mesh, like=abstract, rules={"embed": "a"}).embed.sharding.spec == PartitionSpec(None, "a")


def test_arrays_that_nobody_has_placed_do_not_say_how_they_are_split(llama: Path, tmp_path: Path) -> None:
    mesh, rules = mesh_of(AXES), {"embed": "x"}
    write(plan_of(llama, "flat", "both"), tmp_path)
    for source in (llama, tmp_path / "out"):
        ruled = shardconv.plan_load(source, mesh, rules=rules).abstract
        fresh = jax.jit(lambda made=ruled: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), made))()
        fresh["final_norm"] = jax.device_put(fresh["final_norm"], jax.devices()[3])
        params = shardconv.load(source, mesh, rules=rules, like=fresh)
        assert params.pop("final_norm").sharding == SingleDeviceSharding(jax.devices()[3]), "this one somebody has"
        del ruled["final_norm"]
        assert jax.tree.map(lambda leaf: leaf.sharding, params) == jax.tree.map(lambda leaf: leaf.sharding, ruled)
    assert "  nothing says how embed is split\n      give a mesh and rules, or a sharding in like" in refused(llama, like=fresh)


def test_a_single_device_will_do(llama: Path) -> None:
    device = jax.devices()[3]
    like = jax.tree.map(lambda _: SingleDeviceSharding(device), shardconv.plan_load(llama, mesh_of({"x": 1})).abstract)
    params = shardconv.load(llama, like=like, placement="device")
    assert {leaf.device for leaf in jax.tree.leaves(params)} == {device}


def test_a_config_says_it_all_and_arguments_go_before_it(llama: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f'[source]\npath = "{llama}"\n[target]\nlayout = "maxtext"\nscan_layers = false\n[output]\npath = "{tmp_path}/out"\n'
        '[mesh]\naxes = { x = 4, y = 2 }\n[mesh.rules]\nembed = "x"\n'
    )
    params = shardconv.load(config)
    query = params["params"]["params"]["decoder"]["layers_3"]["self_attention"]["query"]["kernel"]
    assert (query.shape, query.sharding.spec, dict(query.sharding.mesh.shape)) == ((24, 6, 8), PartitionSpec("x", None, None), AXES)
    params = shardconv.load(config, mesh_of({"x": 2}), layout="flat", rules={"heads": "x"}, dtype="float32")
    query = params["layers"]["3"]["attn"]["q"]
    assert (query.dtype, query.sharding.spec, query.sharding.mesh.size) == (np.float32, PartitionSpec(None, "x", None), 2)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out*"))


def test_pytorch_files_are_loaded_too(llama: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {}
    for file in llama.glob("*.safetensors"):
        tensors |= safetensors.load_file(file)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    same(flat(shardconv.load(tmp_path, mesh_of(AXES), layout="maxtext", rules=STRINGS, vocab_size=40)), plan_of(llama, "maxtext", "both"))


def test_what_must_be_known_of_the_arrays_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = checkpoint(small("llama3_2_1b"), tmp_path / "source")
    with caplog.at_level(logging.WARNING, "shardconv"):
        shardconv.load(source, mesh_of({"x": 1}), layout="maxtext")
    said = [record.message for record in caplog.records if record.name == "shardconv"]
    planned = shardconv.plan_load(source, mesh_of({"x": 1}), layout="maxtext")
    assert said == list(planned.notes)
    assert any(note.startswith("query and key are in RoPE pairs") for note in said)
    assert any(note.startswith("lm_head.weight is not in the checkpoint and config.json says tied") for note in said)
    facts = {key: planned.metadata[key] for key in ("family", "layout", "tied", "rope", "scan_layers")}
    assert facts == {"family": "llama", "layout": "maxtext", "tied": True, "rope": "interleaved", "scan_layers": True}


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint({**small("llama3_2_1b"), "vocab_size": 40}, tmp_path / "checkpoints" / "Llama-3.2-1B")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "loading.md").read_text()
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(names["params"])} == {names["mesh"]}
    assert names["params"]["layers"]["attn"]["q"].sharding.spec == PartitionSpec(None, "fsdp", None, None)


# --- what is refused --------------------------------------------------------------------------------------------------------------


def refused(*source: Any, **choices: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        shardconv.plan_load(*source, **choices)
    return str(caught.value)


def test_all_that_does_not_fit_is_one_report(llama: Path) -> None:
    mesh = mesh_of(AXES)
    like = shardconv.plan_load(llama, mesh, rules={}).abstract
    like["extra"] = like.pop("final_norm")
    like["layers"]["attn"]["kk"] = like["layers"]["attn"].pop("k")
    like["embed"] = jax.ShapeDtypeStruct((40, 24), np.float32)
    like["unembed"] = NamedSharding(mesh, PartitionSpec(None, "x"))
    like["layers"]["mlp_norm"] = NamedSharding(mesh, PartitionSpec(None, None, "x"))
    assert refused(llama, mesh, rules={}, like=like) == (
        "the arrays do not fit (8 problems):\n"
        "  extra is in like and not in the checkpoint\n"
        "  layers.attn.kk is in like and not in the checkpoint\n"
        "      did you mean layers.attn.k?\n"
        "  layers.attn.k is in the checkpoint and not in like\n"
        "  final_norm is in the checkpoint and not in like\n"
        "  embed is (40, 24) in like and (37, 24) in the checkpoint\n"
        "  embed is float32 in like and bfloat16 in the checkpoint\n"
        '      give dtype="float32" to have values converted\n'
        "  layers.mlp_norm has 2 dims, and its PartitionSpec 3: (None, None, 'x')\n"
        "  unembed is (24, 37), which (None, 'x') does not divide\n"
        "      choose another sharding"
    )


def test_a_tree_without_its_outer_levels(llama: Path) -> None:
    mesh = mesh_of({"x": 1})
    like = shardconv.plan_load(llama, mesh, layout="maxtext").abstract["params"]["params"]
    assert refused(llama, mesh, layout="maxtext", like=like) == (
        "the arrays do not fit (1 problem):\n"
        "  all names of the checkpoint begin with params.params. and those of like do not\n"
        '      give {"params": {"params": like}}'
    )


def test_what_is_no_array(llama: Path) -> None:
    assert refused(llama, like={"embed": 3.5}) == (
        "like is no tree of arrays (1 problem):\n  embed is float\n      give a sharding, an array or a jax.ShapeDtypeStruct"
    )


def test_many_problems_of_a_kind_are_cut_short(llama: Path) -> None:
    said = refused(llama, mesh_of({"x": 1}), layout="maxtext", scan_layers=False, like={"a": np.zeros(3)})
    assert len(said.splitlines()) < 20 and "  and 29 more like these" in said


def test_nothing_is_put_on_every_device_unless_asked_for(llama: Path) -> None:
    remedy = 'give rules such as {"embed": "fsdp"}, or a tree of shardings as like; rules={} puts all arrays on every device'
    assert refused(llama, mesh_of({"x": 8})) == (
        f"nothing says how arrays are split (1 problem):\n  the mesh has 8 devices and there are no rules\n      {remedy}"
    )
    assert refused(llama) == (
        "there is no mesh (1 problem):\n  neither a mesh nor shardings were given\n      give a mesh and rules, or like"
    )
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(shardconv.load(llama, mesh_of({"x": 2}), rules={})))


NO_RULES = "rules do not say how arrays are split"
AXIS_REMEDY = 'give the mesh axes of each named axis, such as {"embed": "fsdp"}'
RULE_REMEDY = 'give mesh axes: one such as "fsdp", several such as ("fsdp", "tensor"), or None'


@pytest.fixture(scope="module", params=["safetensors", "orbax"])
def either(request: pytest.FixtureRequest, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, or what it is converted to."""
    return llama if request.param == "safetensors" else Path(write(plan_of(llama, "flat", "both"), tmp_path_factory.mktemp("out")))


def test_rules_that_are_none(either: Path) -> None:
    mesh = mesh_of({"x": 2})
    assert refused(either, mesh, rules={"embed": 2, "heads": ["x", None], 3: "x", "mlp": ("",)}) == (
        f"{NO_RULES} (4 problems):\n"
        f"  rules: 3 is no name of an axis\n      {AXIS_REMEDY}\n"
        f"  rules: 'embed' is split by 2\n      {RULE_REMEDY}\n"
        f"  rules: 'heads' is split by ['x', None]\n      {RULE_REMEDY}\n"
        f"  rules: 'mlp' is split by ('',)\n      {RULE_REMEDY}"
    )
    assert refused(either, mesh, rules="x") == f"{NO_RULES} (1 problem):\n  rules is 'x'\n      {AXIS_REMEDY}"
    assert refused(either, mesh, rules=[("embed", "x")]) == (
        f"{NO_RULES} (1 problem):\n  rules is [('embed', 'x')]\n      {AXIS_REMEDY}"
    )
    assert "      a mesh axis splits a dim once" in refused(either, mesh, rules={"embed": ("x", "x")})


def test_none_splits_nothing(either: Path) -> None:
    mesh = mesh_of({"x": 2})
    none, empty = (shardconv.plan_load(either, mesh, rules={"embed": rule, "mlp": ["x"]}).leaves for rule in (None, ""))
    assert none == empty and none["layers.mlp.gate"].sharding.spec == PartitionSpec(None, None, "x")


def test_what_is_no_mesh(either: Path) -> None:
    def said(name: str) -> str:
        remedy = "give a jax.sharding.Mesh, which has devices, such as jax.make_mesh makes"
        return f"the mesh cannot be used (1 problem):\n  mesh is {name}\n      {remedy}"

    abstract = AbstractMesh((2,), ("x",))
    assert refused(either, {"x": 2}, rules={"embed": "x"}) == said("dict")
    assert refused(either, abstract, rules={"embed": "x"}) == said("AbstractMesh")
    assert refused(either, rules={"embed": "x"}) == (
        "there is no mesh (1 problem):\n  neither a mesh nor shardings were given\n      give a mesh and rules, or like"
    )
    like = shardconv.plan_load(either, mesh_of({"x": 2}), rules={}).abstract
    like["embed"] = NamedSharding(abstract, PartitionSpec("x"))
    assert refused(either, like=like) == (
        "the arrays do not fit (1 problem):\n"
        "  the sharding of embed is of AbstractMesh, which has no devices\n      give one of a jax.sharding.Mesh"
    )


def test_a_dtype_and_a_budget_that_are_none(either: Path) -> None:
    dtypes = "source, float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, float8_e4m3fnuz, float8_e5m2fnuz".split(", ")
    choices = ", ".join(f'"{name}"' for name in dtypes)
    assert refused(either, mesh_of({"x": 2}), rules={}, dtype="nope", memory_budget="lots") == (
        "the config is not valid (2 problems):\n"
        f'  load: [target] dtype = "nope" is not a dtype\n      the choices are {choices}\n'
        '  load: [workers] memory_budget = "lots" (a string), expected a size, such as "2GiB" or "500MB", or "auto"'
    )
    for budget, kind in ((-5, "an integer"), (0, "an integer"), (2.5, "a float")):
        assert refused(either, mesh_of({"x": 2}), rules={}, memory_budget=budget) == (
            "the config is not valid (1 problem):\n"
            f'  load: [workers] memory_budget = {budget} ({kind}), expected a size, such as "2GiB" or "500MB", or "auto"'
        )


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('mesh = "x"\nworkers = 3', '  {path}: workers = 3 (an integer), expected the section [workers]'),
        ('[mesh]\naxes = {{ x = "8" }}', '  {path}: [mesh] axes.x = "8" (a string), expected devices per mesh axis'),
    ],
    ids=["sections", "axes"],
)
def test_a_config_that_is_none(llama: Path, tmp_path: Path, written: str, said: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(written.format() + f'\n[source]\npath = "{llama}"\n[target]\nlayout = "flat"\n[output]\npath = "out"\n')
    assert said.format(path=path) in refused(path, memory_budget="1GiB")


def test_what_is_asked_for_is_checked_as_a_config_is(llama: Path, tmp_path: Path) -> None:
    mesh = mesh_of({"x": 4})
    assert 'load: [mesh] rules.embed = "z": "z" is not a mesh axis' in refused(llama, mesh, rules={"embed": "z"})
    assert 'load: [target] layout = "flax" is not known' in refused(llama, mesh, rules={}, layout="flax")
    assert "heads is 6 in 2 arrays, which 4 shards along x do not divide" in refused(llama, mesh, rules={"heads": "x"})
    assert "placement is 'hots'" in refused(llama, mesh, rules={}, placement="hots")
    with pytest.raises(TypeError, match=r"load\(\) got an unexpected keyword argument 'layot'"):
        shardconv.load(llama, mesh, rules={}, layot="maxtext")
    with pytest.raises(InputError, match="nowhere does not exist"):
        shardconv.load(tmp_path / "nowhere", mesh, rules={})
    (tmp_path / "c.toml").write_text(
        f'[source]\npath = "{llama}"\n[target]\nlayout = "flat"\n[output]\npath = "out"\n[mesh]\naxes = {{ x = 3 }}\n'
    )
    assert refused(tmp_path / "c.toml") == (
        "the mesh cannot be made (1 problem):\n"
        "  [mesh] axes are of 3 devices, and there are 8\n      give a mesh: shardconv.load(config, mesh)"
    )


def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    source = checkpoint(config_of("llama"), tmp_path / "source")
    planned = shardconv.plan_load(source, mesh_of({"x": 1}))
    file = sorted(source.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="the source changed while it was loaded"):
        planned.read()


# --- Orbax checkpoints ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [{"x": 4, "y": 2}, {"x": 2, "y": 2}, {"y": 2}, {"z": 1}], ids=str)
def test_a_converted_checkpoint_on_another_mesh(mixtral: Path, tmp_path: Path, axes: dict[str, int]) -> None:
    plan = plan_of(mixtral, "maxtext", "both")
    write(plan, tmp_path)
    planned = shardconv.plan_load(tmp_path / "out", mesh_of(axes))
    params = planned.read().params
    same(flat(params), plan)
    for leaf in plan.leaves:
        spec = [[name for name in ([entry] if isinstance(entry, str) else entry or ()) if name in axes] for entry in leaf.spec]
        assert flat(params)[leaf.name].sharding == NamedSharding(mesh_of(axes), PartitionSpec(*map(tuple, spec)))
    assert planned.metadata["rope"] == "half" and planned.metadata["family"] == "mixtral"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("mesh", ["both", "columns", "stages"])
def test_rules_split_a_converted_checkpoint_as_they_split_its_source(tmp_path: Path, family: str, mesh: str) -> None:
    source = checkpoint({**config_of(family), "rope_scaling": {"rope_type": "llama3"}}, tmp_path / "source")
    axes, rules = MESHES[mesh]
    wanted = plan_of(source, "maxtext", mesh)
    assert family != "llama" or wanted.metadata["rope"] == "interleaved", "head_dim is split into pairs"
    write(plan_of(source, "maxtext", "rows"), tmp_path)
    planned = shardconv.plan_load(tmp_path / "out", mesh_of(axes), rules=rules)
    for leaf in wanted.leaves:
        assert planned.leaves[leaf.name].sharding == NamedSharding(mesh_of(axes), PartitionSpec(*leaf.spec))
    assert all(leaf.sharding.is_fully_replicated for leaf in shardconv.plan_load(tmp_path / "out", mesh_of(axes), rules={}).leaves.values())


def test_an_orbax_checkpoint_as_a_users_tree(mixtral: Path, tmp_path: Path) -> None:
    plan = plan_of(mixtral, "flat", "both")
    write(plan, tmp_path)
    mesh = mesh_of({"a": 2})
    like = shardconv.plan_load(tmp_path / "out", mesh, rules={}, dtype="float32").abstract
    like["embed"] = NamedSharding(mesh, PartitionSpec("a"))
    params = shardconv.load(tmp_path / "out", like=like, dtype="float32")
    assert params["embed"].sharding.spec == PartitionSpec("a")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    plain = plan_of(mixtral, "flat", "both", dtype="float32")
    leaf = next(leaf for leaf in plain.leaves if leaf.name == "final_norm")
    np.testing.assert_array_equal(np.asarray(params["final_norm"]), made(leaf, plain.source.tensors, plain.source.root).view(np.float32))


def test_what_others_have_saved(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    tree = {
        "w": [jax.device_put(np.arange(64.0, dtype=np.float32).reshape(8, 8), NamedSharding(mesh_of({"x": 8}), PartitionSpec("x")))],
        "n": np.arange(3, dtype=np.int32),
    }
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", tree)
    params = shardconv.load(tmp_path / "theirs", mesh_of({"x": 2}))
    assert params["w"][0].sharding == NamedSharding(mesh_of({"x": 2}), PartitionSpec("x"))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, tree))
    assert refused(tmp_path / "theirs", mesh_of({"x": 2}), rules={"embed": "x"}) == (
        f"{tmp_path}/theirs cannot be split by rules (1 problem):\n"
        "  it does not name the axes of its arrays\n      give like, or rules={} to split nothing"
    )


def test_what_does_not_apply_to_an_orbax_checkpoint(mixtral: Path, tmp_path: Path) -> None:
    write(plan_of(mixtral, "flat", "both"), tmp_path)
    out, mesh = tmp_path / "out", mesh_of({"x": 2})
    assert refused(out, mesh, layout="flat", rules={"embed": "x"}) == (
        f"{out} is an Orbax checkpoint (1 problem):\n"
        "  layout does not apply\n      an Orbax checkpoint is loaded as it was written: leave it out"
    )
    assert refused(out, mesh, rules={"embd": "x", "heads": "z"}) == (
        f"{out} cannot be split by rules (2 problems):\n"
        "  rules: no array has an axis 'embd'\n"
        "      there are embed, experts, head_dim, heads, kv_heads, layers, mlp, vocab\n"
        "  rules: 'z' is not a mesh axis\n      the mesh axes are x"
    )
    assert "nothing says how arrays are split" in refused(out, mesh_of({"other": 2}))
    two = tmp_path / "two"
    for step in ("1", "2"):
        write(plan_of(mixtral, "flat", "both"), two / step)
    assert refused(two, mesh).startswith(f"{two} holds several checkpoints (2 problems):\n  {two}/1/out\n")


def test_a_damaged_orbax_checkpoint(mixtral: Path, tmp_path: Path) -> None:
    path = Path(write(plan_of(mixtral, "flat", "both"), tmp_path))
    for file in (path / "ocdbt.process_u0" / "d").iterdir():
        file.write_bytes(b"")
    # In a process of its own: Orbax leaves its other reads behind, which nobody waits for.
    program = (
        "import jax, numpy, shardconv\nfrom jax.sharding import Mesh\nfrom shardconv.errors import InputError\n"
        f"devices = numpy.array(jax.devices()[:{math.prod(AXES.values())}]).reshape({tuple(AXES.values())})\n"
        f"try:\n    shardconv.load({str(path)!r}, Mesh(devices, {tuple(AXES)}))\nexcept InputError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "the checkpoint cannot be read" in done.stdout, done.stderr


# --- which way --------------------------------------------------------------------------------------------------------------------


def by_process(leaf: Leaf, rules: MeshRules, processes: int) -> list[tuple]:
    boxes = device_boxes(leaf.shape, leaf.spec, rules)
    each = len(boxes) // processes
    return [boxes[each * process : each * (process + 1)] for process in range(processes)]


def test_hosts_do_it_unless_they_would_read_much_more(tmp_path: Path) -> None:
    config = {**small("llama3_8b"), "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 128, "vocab_size": 1024}))
    synthesise(str(tmp_path / "config.json"), str(tmp_path / "source"), sparse=True, seed=0, dtype="bfloat16", shard_bytes=1 << 30)
    rules = MeshRules({"x": 8}, {"embed": ("x",)})
    plan = plan_of(tmp_path / "source", "flat", rules, vocab=0)
    leaves = {leaf.name: leaf for leaf in plan.leaves}
    gate, down, norm = leaves["layers.mlp.gate"], leaves["layers.mlp.down"], leaves["layers.mlp_norm"]
    for leaf in (gate, down, norm):
        assert source_bytes(leaf) == needed(leaf) == sum(plan.source.tensors[key].nbytes for key, _ in leaf.parts[0].source.keys())
    stored = plan.source.tensors
    # `down` is split along its stored rows, `gate` along its stored columns: each process reads all of its rows, but for what lies between
    # two requests.
    assert host_bytes(down, by_process(down, rules, 4), stored) == (down.nbytes // 4,) * 4
    gate_bytes = host_bytes(gate, by_process(gate, rules, 4), stored)
    assert all(0.99 * gate.nbytes <= read <= gate.nbytes for read in gate_bytes)
    assert host_bytes(gate, by_process(gate, rules, 1), stored) == (gate.nbytes,)
    assert choose(gate, by_process(gate, rules, 4), stored) == "device"
    assert choose(down, by_process(down, rules, 4), stored) == "host"
    assert choose(gate, by_process(gate, rules, 1), stored) == "host"
    assert choose(norm, [[((0, 4), (0, 4096))]] * 64, stored) == "host", "copies of what is small are read"
    assert gate.nbytes > SPARED


# --- several processes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["host", "device"])
@pytest.mark.parametrize("processes", [2, 4])
def test_each_process_reads_what_its_devices_need(mixtral: Path, processes: int, placement: str) -> None:
    axes = {"x": 2, "y": processes}
    rules = {"heads": "x", "kv_heads": "x", "mlp": "y", "vocab": "x", "experts": "x", "embed": "y"}
    found = load_in(processes, mixtral, axes, placement=placement, rules=rules, vocab_size=40)
    plan = plan_of(mixtral, "flat", "both")
    whole = {leaf.name: made(leaf, plan.source.tensors, plan.source.root) for leaf in plan.leaves}
    covered = {name: np.zeros(array.shape, int) for name, array in whole.items()}
    for one in found:
        assert set(one["ways"].values()) == {placement}
        for name, box, digest in one["shards"]:
            part = whole[name][slices(box)]
            assert xxhash.xxh3_64_hexdigest(np.ascontiguousarray(part).data) == digest
            covered[name][slices(box)] += 1
            assert part.nbytes < whole[name].nbytes or whole[name].nbytes < 500, "no array is whole on a host, but for norms"
    assert all((times > 0).all() for times in covered.values())
    total = sum(needed(leaf) for leaf in plan.leaves)
    if placement == "device":
        assert sum(one["read"] for one in found) == sum(one["needed"] for one in found) == total, "once, whatever the mesh"
    else:
        assert all(one["needed"] < 0.8 * total for one in found)


def test_one_report_in_all_processes(mixtral: Path) -> None:
    found = load_in(2, mixtral, {"x": 4}, rules={"heads": "x"})
    assert len({one["error"] for one in found}) == 1 and "heads is 6" in found[0]["error"]


@pytest.mark.parametrize(("processes", "placement"), [(1, "host"), (2, "host"), (2, "device")])
def test_memory_is_the_arrays_and_the_budget(tmp_path: Path, processes: int, placement: str) -> None:
    """A stored kernel is 64 MiB, a scanned one 128 in the larger model; their columns are dealt out under a budget of 8."""
    peaks = {}
    for layers in (1, 2):
        root = tmp_path / str(layers)
        root.mkdir()
        config = {**small("llama3_8b"), "hidden_size": 1024, "intermediate_size": 32768, "num_hidden_layers": layers, "vocab_size": 512}
        (root / "config.json").write_text(json.dumps(config))
        synthesise(str(root / "config.json"), str(root / "source"), sparse=True, seed=0, dtype="bfloat16", shard_bytes=1 << 30)
        for file in (root / "source").glob("*.safetensors"):
            _fill(file)
        found = load_in(
            processes, root / "source", {"x": 4}, devices=4 // processes, placement=placement, rules={"embed": "x"}, memory_budget=8 * MIB
        )
        peaks[layers] = max(one["after"] - one["before"] - one["held"] for one in found)
        assert sum(one["held"] for one in found) > layers * 192 * MIB
    # Besides the arrays. XLA takes some 100 MiB for what it compiles; devices hold the rows of a kernel too, and what is in between.
    most = 8 * MIB + (16 * MIB if placement == "host" else 100 * MIB + 4 * 128 * MIB // processes)
    assert peaks[2] <= most
    if placement == "host":
        assert abs(peaks[2] - peaks[1]) < 16 * MIB, "it does not grow with the model"


def _fill(file: Path) -> None:
    """Bytes that are no zeros, for which a kernel need not keep pages."""
    with file.open("r+b") as out:
        start = 8 + int.from_bytes(out.read(8), "little")
        left = out.seek(0, 2) - start
        out.seek(start)
        while left > 0:
            left -= out.write(b"\x3e" * min(left, MIB))
