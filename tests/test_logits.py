"""Logits of converted checkpoints against transformers: seven families, both layouts, scanned and not, through the real parts; and faults.

A checkpoint of random weights is written by transformers, converted (planned, written unit by unit, committed), restored by Orbax onto
eight devices and run. Every comparison is judged as users' are: by the noise that the reference is measured to have.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from logit_cases import FAMILIES, LENGTHS, Array, Table, cases, exchanged, judged, kinds_exchanged, plan_of, side_of, slot, write
from test_models import torch_model

from shardconv.config import RunOptions, load_config
from shardconv.conversion import run
from shardconv.errors import CheckError
from shardconv.models.decoder import weights_of
from shardconv.models.description import Place
from shardconv.planning import plan_from_config
from shardconv.verify.agreement import LogitReport
from shardconv.verify.fetching import fetch
from shardconv.verify.logit_request import Bounds, LogitRequest
from shardconv.verify.logits import check
from shardconv.verify.reference import load_reference
from shardconv.verify.restoring import describe, mesh_of, restore
from shardconv.verify.roundings import roundings
from shardconv.verify.sample import random_sample, within
from shardconv.verify.stored import Stored
from shardconv.verify.walking import Side


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cases(tmp_path_factory)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("layout", ["flat", "maxtext"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_model_thinks_as_its_source(case: Any, tmp_path: Path, name: str, layout: str, scan: bool) -> None:
    made = case(name)
    plan = plan_of(made.source, layout, scan=scan)
    report = judged(made, side_of(made, write(plan, tmp_path)), plan).report
    assert report.reasons == () and report.unjudged == 0
    assert report.lengths == LENGTHS and report.jax.positions == sum(LENGTHS)
    # Half of what is allowed would do, and the floor is float32's: far from that of bfloat16 compute.
    assert report.bounds.max_abs is not None and report.judged.max_abs < report.bounds.max_abs / 2 < report.bfloat16.max_abs / 100
    assert report.jax.max_abs < report.bounds.max_abs
    assert report.jax.top1 == report.jax.top5 == 1.0 and report.jax.cosine > 1 - 1e-9
    assert report.perplexity == pytest.approx(report.reference_perplexity, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "layout", "options"),
    [
        ("biased", "flat", {}),
        ("llama", "flat", {"rope": "interleaved"}),
        ("llama", "maxtext", {"rope": "half"}),
        ("qwen3", "maxtext", {"rope": "interleaved", "vocab": 70}),
        ("gemma2", "maxtext", {"vocab": 64}),
    ],
)
def test_what_can_be_asked_of_a_layout(case: Any, tmp_path: Path, name: str, layout: str, options: dict[str, Any]) -> None:
    made = case(name)
    plan = plan_of(made.source, layout, **options)
    report = judged(made, side_of(made, write(plan, tmp_path), options.get("rope", "auto")), plan).report
    assert report.reasons == ()


@pytest.mark.parametrize(
    ("name", "stored", "layout", "dtype", "rounds"),
    [
        ("llama", "bfloat16", "maxtext", "source", False),  # a head_dim of 16: the query scale is a power of two, so nothing is lost
        ("gemma2", "bfloat16", "maxtext", "source", True),
        ("qwen3", "float32", "flat", "bfloat16", True),
        ("mixtral", "float32", "maxtext", "bfloat16", True),
    ],
)
def test_what_the_plan_rounds_is_told_from_faults(
    case: Any, tmp_path: Path, name: str, stored: str, layout: str, dtype: str, rounds: bool
) -> None:
    made = case(name, stored)
    plan = plan_of(made.source, layout, dtype=dtype)
    side = side_of(made, write(plan, tmp_path))
    report = judged(made, side, plan).report
    assert report.reasons == ()
    assert report.judged.max_abs < 5e-5
    assert (report.jax.max_abs > 5e-3) is rounds and (report.rounded.max_abs > 5e-3) is rounds
    assert judged(made, side, replace(plan, leaves=())).report.same is not rounds


def test_a_fault_is_seen_through_rounding(case: Any, tmp_path: Path) -> None:
    made = case("qwen3", "float32")
    plan = plan_of(made.source, "flat", slot("layers.attn.k_norm", scale="query_scale"), dtype="bfloat16")
    assert_seen(judged(made, side_of(made, write(plan, tmp_path)), plan).report)


# Faults, in tables and in arrays


TABLE_FAULTS: Mapping[str, tuple[str, str, Table]] = {
    "query scale missing": ("mistral", "maxtext", slot("layers.attn.q", scale="")),
    "query scale doubled": ("mistral", "flat", slot("layers.attn.q", scale="query_scale")),
    "gate and up swapped": ("llama", "flat", exchanged("layers.mlp.gate", "layers.mlp.up")),
    "gate and up of experts swapped": ("mixtral", "maxtext", exchanged("layers.experts.gate", "layers.experts.up")),
    "k and v swapped": ("llama", "maxtext", exchanged("layers.attn.k", "layers.attn.v")),
    "norms before attention and MLP swapped": ("qwen2", "flat", exchanged("layers.attn_norm", "layers.mlp_norm")),
    "norms of query and key swapped": ("qwen3", "maxtext", exchanged("layers.attn.q_norm", "layers.attn.k_norm")),
    "norm's 1 missing": ("gemma2", "maxtext", slot("layers.attn_norm", shift="")),
    "norm's 1 doubled": ("gemma2", "flat", slot("final_norm", shift="norm_shift")),
    "embedding scale missing": ("gemma2", "maxtext", slot("embed", scale="")),
    "local and global layers swapped": ("gemma2", "maxtext", kinds_exchanged),
}


@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_a_fault_in_a_layouts_table_is_seen(case: Any, tmp_path: Path, fault: str) -> None:
    name, layout, table = TABLE_FAULTS[fault]
    made = case(name)
    plan = plan_of(made.source, layout, table)
    assert_seen(judged(made, side_of(made, write(plan, tmp_path)), plan).report)


def second_for_first(array: Array) -> Array:
    array[0] = array[1]
    return array


ARRAY_FAULTS: Mapping[str, tuple[str, str, str, Callable[[Array], Array]]] = {
    "layers off by one": ("llama", "flat", "layers.attn.o", lambda o: np.roll(o, 1, axis=0)),
    "one layer's norm for another's": ("llama", "flat", "layers.mlp_norm", second_for_first),
    "two layers of MaxText exchanged": ("qwen3", "maxtext", "params.params.decoder.layers.mlp.wo.kernel", lambda o: o[:, [1, 0, 2, 3]]),
    "an expert twice": ("qwen3_moe", "maxtext", "params.params.decoder.layers.moe_block.wo", second_for_first),
    "bias dropped": ("qwen2", "flat", "layers.attn.k_bias", np.zeros_like),
    "router of the layer before": ("mixtral", "flat", "layers.experts.router", lambda router: np.roll(router, 1, axis=0)),
    "rows of zeros": ("mistral", "flat", "unembed", lambda o: np.where(np.arange(62) < 60, o, 0)),
    "not a number": ("llama", "flat", "final_norm", lambda norm: np.where(np.arange(48) == 7, np.nan, norm)),
    "one part in ten thousand": ("llama", "flat", "layers.attn.v", lambda v: v * np.float32(1.0001)),
}


@pytest.mark.parametrize("fault", ARRAY_FAULTS)
def test_a_fault_in_an_array_is_seen(case: Any, tmp_path: Path, fault: str) -> None:
    name, layout, leaf, edit = ARRAY_FAULTS[fault]
    made = case(name)
    plan = plan_of(made.source, layout)
    path = write(plan, tmp_path)
    leaves = dict(restore(path, jax.devices()).leaves)
    leaves[leaf] = jax.device_put(edit(np.array(leaves[leaf])), leaves[leaf].sharding)
    side = side_of(made, path)
    assert_seen(judged(made, Side(weights_of(side.weights.reading, leaves), side.published), plan).report)


@pytest.mark.parametrize(
    ("layout", "written", "read"), [("flat", "interleaved", "half"), ("flat", "half", "interleaved"), ("maxtext", "half", "auto")]
)
def test_another_order_of_rotary_dims_is_seen(case: Any, tmp_path: Path, layout: str, written: str, read: str) -> None:
    made = case("llama")
    plan = plan_of(made.source, layout, rope=written)
    assert_seen(judged(made, side_of(made, write(plan, tmp_path), read), plan).report)


def assert_seen(report: LogitReport) -> None:
    assert len(report.reasons) == 3
    assert [reason.partition(" is ")[0] for reason in report.reasons] == ["the mean difference", "the largest difference", "the largest KL"]


def test_bounds_can_be_set_and_a_floor_is_taken_where_they_are_not(case: Any, tmp_path: Path) -> None:
    made = case("llama")
    plan = plan_of(made.source, "flat", slot("layers.attn.q", scale="query_scale"))
    side = side_of(made, write(plan, tmp_path))
    report = judged(made, side, plan, Bounds(max_abs=100.0, mean_abs=100.0)).report
    assert (report.bounds.max_abs, report.bounds.mean_abs) == (100.0, 100.0)
    assert report.reasons == (f"the largest KL is {report.judged.max_kl:.3g}, and {report.bounds.max_kl:.3g} is allowed",)
    assert judged(made, side, plan, Bounds(100.0, 100.0, 100.0)).report.same
    here = report.worst
    assert abs(here.found - here.reference) == pytest.approx(report.judged.max_abs)


# How long sequences may be

CUT = "sequences are cut to {}: faults of position encodings beyond do not show"
CONFIGS: Mapping[str, tuple[dict[str, Any], list[int], str]] = {
    "llama": ({"max_position_embeddings": 64}, [64, 64, 9], CUT.format("64 tokens, config.json's max_position_embeddings")),
    "gpt2": ({"n_positions": 80, "n_ctx": 20}, [64, 80, 9], CUT.format("80 tokens, config.json's n_positions")),
    "inside": (
        {"max_position_embeddings": 8, "text_config": {"max_position_embeddings": 32}},
        [32, 32, 9],
        CUT.format("32 tokens, config.json's text_config.max_position_embeddings"),
    ),
    "long enough": ({"max_position_embeddings": 96}, [64, 96, 9], ""),
    "without one": ({"vocab_size": 8, "max_position_embeddings": None, "n_positions": "32", "text_config": None}, [64, 96, 9], ""),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_no_sequence_is_longer_than_config_json_allows(name: str) -> None:
    config, lengths, note = CONFIGS[name]
    asked = (*random_sample(62, 0, (64, 96)), np.arange(9))
    found, said = within(asked, config)
    assert ([len(tokens) for tokens in found], said) == (lengths, note)
    assert all(np.array_equal(one, whole[: len(one)]) for one, whole in zip(found, asked, strict=True))


def test_what_the_pytorch_model_raises_is_a_report(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = {"model_type": "gpt2", "n_embd": 48, "n_head": 4, "n_layer": 3, "vocab_size": 61, "n_positions": 32}
    torch_model(sizes).save_pretrained(tmp_path)
    reference = load_reference(str(tmp_path), {})
    with pytest.raises(CheckError) as caught:
        list(reference.steps(random_sample(61, 0, (40,))))
    assert str(caught.value) == (
        "the PyTorch model cannot be run (1 problem):\n"
        "  the embedding raised IndexError: index out of range in self\n"
        "      see that config.json is of these weights, or compare the weights alone with --check weights"
    )


# Whole checks, and where the arrays lie


def test_a_whole_run_through_the_ledger_and_its_check(tmp_path: Path, case: Any) -> None:
    made = case("llama")
    config = tmp_path / "c.toml"
    config.write_text(
        f'[source]\npath = "{made.source}"\n[target]\nlayout = "maxtext"\n[output]\npath = "{tmp_path}/out"\n'
        '[workers]\nexecutor = "local"\ncount = 1\nmemory_budget = "64MiB"\n'
        '[mesh]\naxes = { fsdp = 4, tensor = 2 }\nrules = { embed = "fsdp", heads = "tensor" }\n'
    )
    options = RunOptions(restart=False, overwrite=False, verbosity=-1, json_logs=False)
    chosen = load_config(str(config), ['check.mode="none"'])
    run(chosen, options)
    request = LogitRequest(
        checkpoint=f"{tmp_path}/out/0/items",
        source=str(made.source),
        rope=chosen.target.rope,
        roundings=roundings(plan_from_config(chosen)),
        forward="auto",
        lengths=LENGTHS,
        seed=5,
        prompts=None,
        bounds=Bounds(),
        trace=True,
        memory=1 << 30,
    )
    found = check(request).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["equal"] and found["divergence"] is None
    assert found["problems"] == found["notes"] == found["unrouted"] == found["unseen"] == []
    assert (found["forward"], found["sequences"], found["seed"], found["prompts"]) == ("auto", list(LENGTHS), 5, None)
    assert [one["step"] for one in found["blocks"]] == ["embed", "block 0", "block 1", "block 2", "block 3", "logits"]
    assert (found["platform"], found["devices"], found["mesh"], found["layer_by_layer"]) == ("cpu", 8, {"fsdp": 4, "tensor": 2}, False)
    assert found["pid"] == os.getpid() and found["seconds"] > 0 and found["cpu_seconds"] > 0 and found["peak_rss_bytes"] > 100 << 20
    assert len(found["scatter"]) == 2000 and all(abs(x - y) < 1e-4 for x, y in found["scatter"])
    again = check(replace(request, memory=1 << 10)).to_json()
    assert again["layer_by_layer"]
    for key in ("differences", "bounds", "blocks", "perplexity", "scatter", "worst"):
        assert again[key] == found[key]


def test_a_checkpoint_lies_on_the_mesh_as_its_specs_say(case: Any, tmp_path: Path) -> None:
    restored = restore(write(plan_of(case("llama").source, "maxtext"), tmp_path), jax.devices())
    query = restored.leaves["params.params.decoder.layers.self_attention.query.kernel"]
    assert tuple(query.sharding.spec) == ("fsdp", None, "tensor", None) and dict(restored.mesh.shape) == {"fsdp": 4, "tensor": 2}
    assert {shard.data.shape for shard in query.addressable_shards} == {(12, 4, 3, 16)}
    assert len({shard.device for shard in query.addressable_shards}) == 8


@pytest.mark.parametrize(
    ("axes", "devices", "sizes"),
    [({"a": 4, "b": 2}, 8, [4, 2]), ({"a": 256, "b": 4}, 8, [8, 1]), ({"a": 3, "b": 4}, 8, [3, 2]), ({"a": 9}, 8, [3]), ({}, 8, [])],
)
def test_a_mesh_is_as_much_of_the_plans_as_there_are_devices(axes: dict[str, int], devices: int, sizes: list[int]) -> None:
    assert list(mesh_of(axes, jax.devices()[:devices]).shape.values()) == sizes


def test_a_checkpoint_that_says_nothing_of_itself(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "bare", {"embed": np.ones(3, np.float32)})
    with pytest.raises(CheckError, match="bare does not say how it was made"):
        restore(str(tmp_path / "bare"), jax.devices())


def test_a_damaged_checkpoint_is_no_traceback(case: Any, tmp_path: Path) -> None:
    path = Path(write(plan_of(case("llama").source, "flat"), tmp_path))
    stored, described = Stored(str(path)), describe(str(path), jax.devices())
    for file in path.rglob("d/*"):
        os.truncate(file, 0)
    with pytest.raises(CheckError) as caught:
        fetch(stored, described, Place("embed"))
    assert caught.value.title == "the checkpoint cannot be read back"
