"""Logits of converted checkpoints against transformers: seven families, both layouts, scanned and not, through the real parts; and faults.

A checkpoint of random weights is written by transformers, converted (planned, written unit by unit, committed), restored by Orbax onto
eight devices and run. Every comparison is judged as users' are: by the noise that the reference is measured to have.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from test_models import LLAMA, LLAMA3, YARN, torch_model

from shardconv.config import RunOptions, load_config
from shardconv.conversion import run
from shardconv.errors import CheckError, ConfigError, InputError
from shardconv.families import find
from shardconv.family import Layout, LayoutOptions, bind
from shardconv.layouts import LAYOUTS
from shardconv.models.decoder import Weights, weights_of
from shardconv.plan import Plan, PlanOptions, make_plan
from shardconv.planning import plan_from_config
from shardconv.run.finish import custom_metadata
from shardconv.run.job import Job, Place
from shardconv.run.work import Workspace, array_spec, do_unit
from shardconv.sharding import MeshRules
from shardconv.sinks.commit import CommitRequest
from shardconv.sinks.paths import create_stage, final_path
from shardconv.sinks.spec import StoreOptions
from shardconv.source import open_source
from shardconv.verify import agreement, logits, reference
from shardconv.verify.agreement import LogitReport, Measured, compare, measure
from shardconv.verify.differences import gap, in_sum, join, surprise
from shardconv.verify.logit_request import Bounds, Rounding
from shardconv.verify.restoring import mesh_of, restore
from shardconv.verify.roundings import roundings

Table = Callable[[Layout], Layout]
Array = np.ndarray[Any, Any]

SIZES = {**LLAMA, "vocab_size": 62, "num_hidden_layers": 4}
# One model for each family, each with what its published sizes have and tiny ones usually lack.
FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {**SIZES, "rope_scaling": LLAMA3, "rope_theta": 500.0, "tie_word_embeddings": True},
    "mistral": {**SIZES, "model_type": "mistral", "sliding_window": 17},
    "mixtral": {**SIZES, "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2": {**SIZES, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2, "head_dim": None},
    "qwen3": {**SIZES, "model_type": "qwen3", "rope_scaling": YARN},
    "qwen3_moe": {
        **SIZES,
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
    },
    "gemma2": {
        **SIZES,
        "model_type": "gemma2",
        "sliding_window": 17,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
BIASED = {**SIZES, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}
LENGTHS = (64, 80)
NO_BOUNDS = Bounds()
MESH = MeshRules(
    {"fsdp": 4, "tensor": 2}, {"embed": ("fsdp",), "heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",), "vocab": ("tensor",)}
)


@dataclass(frozen=True, eq=False)
class Case:
    """A source, its sample, and what the reference says about it."""

    source: Path
    sample: tuple[Any, ...]
    reference: reference.Reference

    @cache  # noqa: B019  a case lives as long as the tests
    def measured(self, rounded: frozenset[tuple[str, Rounding]]) -> tuple[Measured, ...]:
        return tuple(measure(self.reference, tokens, dict(rounded)) for tokens in self.sample)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """The case of a model, made once."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")

    @cache
    def made(name: str, dtype: str = "float32") -> Case:
        config = BIASED if name == "biased" else FAMILIES[name]
        source = tmp_path_factory.mktemp(name)
        with reference._quiet():
            torch_model(config).to(getattr(torch, dtype)).save_pretrained(source, max_shard_size="100KB")
        return Case(source, logits.random_sample(config["vocab_size"], seed=3, lengths=LENGTHS), reference.load_reference(str(source)))

    return made


def plan_of(source: Path, layout: str, table: Table = lambda table: table, **options: Any) -> Plan:
    opened = open_source(source)
    config = opened.config or {}
    model = bind(find(config), config)
    chosen = LayoutOptions(options.get("scan", True), options.get("rope", "auto"), options.get("vocab", 0), "")
    wanted = PlanOptions(options.get("dtype", "source"), MESH, 8192, 64 << 20)
    return make_plan(opened, model, table(LAYOUTS[layout](model, chosen)), wanted)


def write(plan: Plan, root: Path) -> str:
    """Carries a plan out and commits it where its layout's loader looks; the path of the tree."""
    from shardconv.sinks.orbax_commit import commit

    step, item = (0, "items") if plan.layout == "maxtext" else (None, None)
    out, options = str(root / "out"), StoreOptions()
    stage = create_stage(out, step, item)
    done = [do_unit(plan, unit, stage, f"u{unit.number}", options, lambda _: None, Workspace()) for unit in plan.units]
    metadata = custom_metadata(plan, Job(Place(out, step, item, False), options, {}), [{"digests": one.digests} for one in done])
    attempts = tuple(one.attempt for one in done)
    commit(CommitRequest(out, step, item, tuple(array_spec(leaf) for leaf in plan.leaves), attempts, options, metadata))
    return final_path(out, step, item)


def loaded(made: Case, path: str, rope: str = "auto") -> Weights:
    return logits.restored_weights(path, logits.hf_config(str(made.source)), rope, jax.devices())


def judged(made: Case, weights: Weights, plan: Plan, bounds: Bounds = NO_BOUNDS) -> LogitReport:
    return compare(made.measured(frozenset(roundings(plan).items())), lambda tokens: logits.forward(weights, tokens, max(LENGTHS)), bounds)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("layout", ["flat", "maxtext"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_model_thinks_as_its_source(case: Any, tmp_path: Path, name: str, layout: str, scan: bool) -> None:
    made = case(name)
    plan = plan_of(made.source, layout, scan=scan)
    report = judged(made, loaded(made, write(plan, tmp_path)), plan)
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
    report = judged(made, loaded(made, write(plan, tmp_path), options.get("rope", "auto")), plan)
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
    weights = loaded(made, write(plan, tmp_path))
    report = judged(made, weights, plan)
    assert report.reasons == ()
    assert report.judged.max_abs < 5e-5
    assert (report.jax.max_abs > 5e-3) is rounds and (report.rounded.max_abs > 5e-3) is rounds
    assert judged(made, weights, replace(plan, leaves=())).same is not rounds


def test_a_fault_is_seen_through_rounding(case: Any, tmp_path: Path) -> None:
    made = case("qwen3", "float32")
    plan = plan_of(made.source, "flat", slot("layers.attn.k_norm", scale="query_scale"), dtype="bfloat16")
    assert_seen(judged(made, loaded(made, write(plan, tmp_path)), plan))


# Faults, in tables and in arrays


def slot(param: str, **changes: object) -> Table:
    """A layout's table with another entry for one parameter."""
    return lambda table: replace(table, slots=tuple(replace(one, **changes) if one.param == param else one for one in table.slots))  # type: ignore[arg-type]


def exchanged(a: str, b: str) -> Table:
    other = {a: b, b: a}
    return lambda table: replace(table, slots=tuple(replace(one, param=other.get(one.param, one.param)) for one in table.slots))


def kinds_exchanged(table: Layout) -> Layout:
    return replace(table, axes={**table.axes, "kind": ("global", "local")})


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
    assert_seen(judged(made, loaded(made, write(plan, tmp_path)), plan))


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
    assert_seen(judged(made, weights_of(loaded(made, path).reading, leaves), plan))


@pytest.mark.parametrize(
    ("layout", "written", "read"), [("flat", "interleaved", "half"), ("flat", "half", "interleaved"), ("maxtext", "half", "auto")]
)
def test_another_order_of_rotary_dims_is_seen(case: Any, tmp_path: Path, layout: str, written: str, read: str) -> None:
    made = case("llama")
    plan = plan_of(made.source, layout, rope=written)
    assert_seen(judged(made, loaded(made, write(plan, tmp_path), read), plan))


def assert_seen(report: LogitReport) -> None:
    assert len(report.reasons) == 3
    assert [reason.partition(" is ")[0] for reason in report.reasons] == ["the mean difference", "the largest difference", "the largest KL"]


# What is measured, against NumPy in words


def test_a_gap_by_its_definition() -> None:
    random = np.random.default_rng(0)
    found, expected = (random.standard_normal((5, 9)).astype(np.float32) for _ in range(2))
    found[0] = expected[0]
    measured = gap(found, expected)
    for row in range(5):
        a, b = found[row].astype(float), expected[row].astype(float)
        p, q = np.exp(b) / np.exp(b).sum(), np.exp(a) / np.exp(a).sum()
        assert measured.worst[row] == max(abs(a - b)) and measured.mean[row] == pytest.approx(sum(abs(a - b)) / 9)
        assert measured.kl[row] == pytest.approx(sum(p * np.log(p / q)), abs=1e-15)
        assert measured.cosine[row] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))
        assert measured.top1[row] == (list(a).index(max(a)) == list(b).index(max(b)))
        assert measured.top5[row] == len({*sorted(range(9), key=a.__getitem__)[-5:]} & {*sorted(range(9), key=b.__getitem__)[-5:]}) / 5
    assert measured.kl[0] == 0.0 and measured.kl[1] > 0.01 and measured.top5[0] == 1.0
    kept = np.array([True, True, False, True, False])
    summed = in_sum(measured, kept)
    assert (summed.positions, summed.max_abs, summed.cosine) == (3, max(measured.worst[kept]), min(measured.cosine[kept]))
    assert (summed.mean_kl, summed.top1) == (measured.kl[kept].mean(), measured.top1[kept].mean())
    assert in_sum(join([measured, measured]), np.ones(10, bool)).mean_abs == pytest.approx(measured.mean.mean())


def test_surprise_is_that_of_the_next_token() -> None:
    sure = np.full((3, 4), -1e9, np.float32)
    sure[[0, 1, 2], [2, 1, 3]] = 0.0
    assert surprise(sure, np.array([0, 2, 1])).tolist() == [0.0, 0.0]
    assert np.exp(surprise(np.zeros((3, 4), np.float32), np.array([0, 2, 1])).mean()) == pytest.approx(4)


def test_another_order_of_sums_changes_bits_and_nothing_else(case: Any) -> None:
    made = case("mixtral")
    tokens = made.sample[0]
    before = made.reference.run(tokens)
    other = made.reference.reordered(tokens, 1)
    assert not np.array_equal(other.logits, before.logits) and not np.array_equal(other.routers, before.routers)
    for one in (reference._sums(1), reference._nudged(made.reference.model, 1)):
        with one:
            assert not np.array_equal(made.reference.run(tokens).logits, before.logits)
    np.testing.assert_allclose(other.logits, before.logits, atol=5e-5)
    np.testing.assert_array_equal(made.reference.run(tokens).logits, before.logits)


def test_weights_are_rounded_as_stored_and_put_back(case: Any) -> None:
    model = case("mixtral").reference.model
    before = {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}
    norm = "model.norm.weight"
    told = {norm: Rounding("bfloat16", 3.0, 1.0), "experts.by.another.name": Rounding("float16")}
    with reference._rounded(model, told):
        during = {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}
    stored = (before[norm].astype(np.float64) * 3.0 + 1.0).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(during.pop(norm), ((stored.astype(np.float64) - 1.0) / 3.0).astype(np.float32))
    for name, weight in during.items():
        np.testing.assert_array_equal(weight, before[name].astype(np.float16).astype(np.float32))
    for name, weight in model.named_parameters():
        np.testing.assert_array_equal(weight.detach().numpy(), before[name])


def test_bounds_can_be_set_and_a_floor_is_taken_where_they_are_not(case: Any, tmp_path: Path) -> None:
    made = case("llama")
    plan = plan_of(made.source, "flat", slot("layers.attn.q", scale="query_scale"))
    weights = loaded(made, write(plan, tmp_path))
    report = judged(made, weights, plan, Bounds(max_abs=100.0, mean_abs=100.0))
    assert (report.bounds.max_abs, report.bounds.mean_abs) == (100.0, 100.0)
    assert report.reasons == (f"the largest KL is {report.judged.max_kl:.3g}, and {report.bounds.max_kl:.3g} is allowed",)
    assert judged(made, weights, plan, Bounds(100.0, 100.0, 100.0)).same
    here = report.worst
    assert abs(here.found - here.reference) == pytest.approx(report.judged.max_abs)
    assert made.measured(frozenset(roundings(plan).items()))[here.sequence].rounded[here.position, here.token] == here.reference


# Routers in doubt


def test_positions_are_judged_up_to_the_first_that_hangs_on_noise() -> None:
    scores = np.tile(np.float32([5.0, 3.0, 1.0]), (2, 6, 1))
    scores[1, 3] = [5.0, 3.0, 2.9999]  # the second of two chosen is hardly better than the third
    logits_ = np.zeros((6, 4), np.float32)
    noise = np.random.default_rng(0).choice([-1e-5, 1e-5], scores.shape).astype(np.float32)
    plain, other = reference.Run(logits_, scores), reference.Run(logits_, scores + noise)
    assert agreement._decided(plain, [other], 2).tolist() == [True, True, True, False, False, False]
    assert agreement._decided(plain, [other], 1).all()
    assert agreement._decided(plain, [other], 3).all()  # all are chosen
    assert agreement._decided(reference.Run(logits_, None), [], 0).all()


@pytest.mark.parametrize(("decided", "unjudged", "reasons"), [(4, 4, 0), (1, 0, 1)])
def test_what_is_in_doubt_does_not_count_and_little_that_is_not_is_not_enough(decided: int, unjudged: int, reasons: int) -> None:
    expected = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    jump = expected.copy()
    jump[4:] += np.float32([1, 0, 0, 0, 0])
    noise = gap(expected * np.float32(1 + 1e-6), expected)
    flags = np.arange(8) < decided
    measured = Measured(np.arange(8) % 5, expected, expected, (noise, noise), noise, flags)
    report = compare([measured], lambda tokens: jump, Bounds())
    assert report.unjudged == unjudged and report.jax.positions == 8 - unjudged
    assert len(report.reasons) == reasons
    assert all(reason.startswith("the mean difference is 0.1, and ") for reason in report.reasons)


# Sources, prompts, meshes, and what goes wrong


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
    report = logits.check_logits(
        f"{tmp_path}/out/0/items",
        str(made.source),
        made.sample,
        rope=chosen.target.rope,
        roundings=roundings(plan_from_config(chosen)),
        bounds=Bounds(),
        devices=jax.devices(),
    )
    assert report.reasons == ()
    assert json.loads(json.dumps(asdict(report)))["lengths"] == list(LENGTHS)


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


def test_random_samples_are_seeded_and_long_enough_for_rope_to_show() -> None:
    sample = logits.random_sample(50, seed=1)
    assert [len(tokens) for tokens in sample] == list(logits.LENGTHS) and min(logits.LENGTHS) >= 64
    assert all(tokens.min() >= 0 and tokens.max() < 50 for tokens in sample)
    again, other = logits.random_sample(50, seed=1), logits.random_sample(50, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(sample, again, strict=True)) and not np.array_equal(sample[0], other[0])


def test_prompts_go_through_the_sources_tokenizer(tmp_path: Path) -> None:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"once": 0, "upon": 1, "a": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    (tmp_path / "prompts.txt").write_text("a a upon\n\nonce upon a time\n")
    sample = logits.prompt_sample(str(tmp_path / "prompts.txt"), str(tmp_path))
    assert [tokens.tolist() for tokens in sample] == [[2, 2, 1], [0, 1, 2, 3]]
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(InputError, match=r"prompts\.txt has no lines"):
        logits.prompt_sample(str(tmp_path / "prompts.txt"), str(tmp_path))
    with pytest.raises(InputError, match="the prompts cannot be read"):
        logits.prompt_sample(str(tmp_path / "none.txt"), str(tmp_path))


def test_a_reference_whose_files_lack_a_weight_is_none(case: Any, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    made = case("mistral")
    stored = {key: value for file in made.source.glob("*.safetensors") for key, value in safetensors.load_file(file).items()}
    lost = stored.pop("model.layers.2.mlp.up_proj.weight")
    safetensors.save_file({**stored, "model.layers.2.mlp.extra": lost}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((made.source / "config.json").read_text())
    with pytest.raises(InputError) as caught:
        reference.load_reference(str(tmp_path))
    assert str(caught.value) == (
        "transformers' model and the checkpoint do not fit each other (2 problems):\n"
        f"  {tmp_path} has no model.layers.2.mlp.up_proj.weight\n"
        f"  {tmp_path} has model.layers.2.mlp.extra, which the model has not"
    )


def test_without_torch_there_is_no_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reference.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(ConfigError) as caught:
        reference.load_reference(str(tmp_path))
    assert str(caught.value) == (
        "comparing logits needs the PyTorch model (1 problem):\n"
        "  torch is not installed\n"
        '      pip install "shardconv[check]", or set check.mode = "weights"'
    )


def test_nothing_to_compare_and_too_little(case: Any) -> None:
    with pytest.raises(ConfigError, match="there are none"):
        compare([], lambda tokens: np.zeros((len(tokens), 3), np.float32), Bounds())
    measured = case("llama").measured(frozenset())
    with pytest.raises(CheckError, match="61 logits a token, and the PyTorch model has 62"):
        compare(measured, lambda tokens: np.zeros((len(tokens), 61), np.float32), Bounds())


def test_a_checkpoint_that_says_nothing_of_itself(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "bare", {"embed": np.ones(3, np.float32)})
    with pytest.raises(CheckError, match="bare does not say how it was made"):
        restore(str(tmp_path / "bare"), jax.devices())
