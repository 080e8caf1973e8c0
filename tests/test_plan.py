"""The plan: what it projects is what happens, memory stays under the budget, and what cannot be done is told before anything is."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import CONFIGS, DATA, ONE_EACH, Config, Shapes, header_only, small
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_oracle import rows, stored_shapes

from shardconv.boxes import box_shape, chunk_box, whole
from shardconv.dtypes import dtype_named, raw_view
from shardconv.errors import ConfigError, InputError
from shardconv.families import families, find
from shardconv.family import DECODER_AXES, Family, Layout, LayoutOptions, Model, Param, Slot, bind, linear
from shardconv.formats.reading import ReadCounts, Reader
from shardconv.formats.writing import NewTensor, write_checkpoint
from shardconv.layouts import LAYOUTS
from shardconv.plan import CHUNKS, LEAST, READ_GAP, Plan, PlanOptions, make_plan, plan_from_json
from shardconv.run.work import Done, Workspace, do_unit, make_box
from shardconv.sharding import MeshRules
from shardconv.sinks.spec import StoreOptions
from shardconv.source import Source, open_source
from shardconv.units import UNIT_LEAST, UNIT_MOST

NAMES = json.loads((DATA / "names.json").read_text())
NO_MESH = MeshRules({}, {})


def mesh_of(devices: int) -> MeshRules:
    """One device, one axis of 8, or 16 times 4: the rules that `shardconv init` writes."""
    axes = {1: {}, 8: {"fsdp": 8}, 64: {"fsdp": 16, "tensor": 4}}[devices]
    rules = {"embed": ("fsdp",)} if axes else {}
    if "tensor" in axes:
        rules |= dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), ("tensor",))
    return MeshRules(axes, rules)


def options(**chosen: Any) -> PlanOptions:
    return PlanOptions(**{"dtype": "source", "mesh": NO_MESH, "chunk_bytes": 64 << 20, "memory_budget": 1 << 30} | chosen)


def plan_of(source: Source, chosen: PlanOptions, layout: str = "maxtext", scan: bool = True, rope: str = "auto", vocab: int = 0) -> Plan:
    config = source.config or {}
    model = bind(find(config), config)
    return make_plan(source, model, LAYOUTS[layout](model, LayoutOptions(scan, rope, vocab, "")), chosen)


def published(name: str) -> Source:
    config = CONFIGS[name]
    return header_only(stored_shapes(rows("flat", config, "half"), config, "lm_head.weight" not in NAMES[name]), config)


def sparse(config: Config, directory: Path, codes: dict[str, str] | str = "BF16") -> Source:
    """A checkpoint of zeros on disk, which takes no space."""
    shapes = stored_shapes(rows("flat", config, "half"), config, tied=False)
    tensors = [NewTensor(key, codes if isinstance(codes, str) else codes.get(key, "F32"), shape) for key, shape in shapes.items()]
    write_checkpoint(directory, tensors, None, max_file_bytes=10 << 20, metadata={})
    (directory / "config.json").write_text(json.dumps(config))
    return open_source(directory)


def execute(plan: Plan, stage: Path, workspace: Workspace) -> list[Done]:
    stage.mkdir()
    ticks: list[int] = []
    done = [do_unit(plan, unit, str(stage), f"u{unit.number}", StoreOptions(), ticks.append, workspace) for unit in plan.units]
    assert sum(ticks) == plan.target_bytes
    return done


def read_all(plan: Plan) -> ReadCounts:
    """Make every chunk, write none; what the reader counted."""
    workspace = Workspace()
    with Reader(plan.source.root, coalesce_gap=READ_GAP) as reader:
        for leaf in plan.leaves:
            for number in range(leaf.chunks):
                box = chunk_box(leaf.shape, leaf.chunk, number)
                out = np.empty(box_shape(box), dtype_named(leaf.dtype).numpy)
                make_box(leaf, box, plan.source.tensors, reader, workspace, out)
    return reader.counts


# A model of 60 MB: several units, chunks that are parts of tensors, whole tensors and several layers.
MEDIUM = {**CONFIGS["llama3_1_70b"], "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
          "num_key_value_heads": 4, "vocab_size": 8000}  # fmt: skip


# --- projected and real -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [100_000, 1 << 20, 64 << 20])
@pytest.mark.parametrize(("scan", "devices"), [(True, 1), (False, 8), (True, 64)])
def test_what_a_unit_reads_and_writes_is_what_was_planned(scan: bool, devices: int, chunk_bytes: int, tmp_path: Path) -> None:
    plan = plan_of(sparse(MEDIUM, tmp_path), options(chunk_bytes=chunk_bytes, mesh=mesh_of(devices)), scan=scan)
    assert len(plan.units) > 1
    for unit, done in zip(plan.units, execute(plan, tmp_path / "stage", Workspace()), strict=True):
        assert (done.bytes_read, done.requests) == (unit.bytes_read, unit.requests)
        assert done.bytes_needed == unit.bytes_read
        assert done.chunks == sum(span.stop - span.start for span in unit.spans) == len(done.digests)
        assert unit.bytes_written <= done.bytes_written <= unit.bytes_written + 300 * done.chunks + 4096 * len(plan.leaves)
    assert plan.bytes_read == plan.source.total_bytes == plan.target_bytes


@pytest.mark.parametrize("family", ONE_EACH)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("chunk_bytes", [64, 700])
def test_what_is_read_is_what_was_planned_for_any_model(
    family: str, layout: str, scan: bool, chunk_bytes: int, tmp_path: Path
) -> None:
    """Chunks of some elements, with pieces that are not whole rows; the gaps between them are counted too."""
    source = sparse(small(ONE_EACH[family], num_hidden_layers=2), tmp_path, "F16")
    plan = plan_of(source, options(chunk_bytes=chunk_bytes, dtype="float32"), layout, scan, "interleaved", 41)
    counts = read_all(plan)
    assert (counts.bytes_read, counts.requests) == (plan.bytes_read, plan.requests)
    assert counts.bytes_needed <= plan.bytes_read


def test_tensors_of_several_dtypes_in_one_leaf_cost_what_each_costs(tmp_path: Path) -> None:
    config = small("mixtral_8x7b")
    codes = {key: "BF16" for key in stored_shapes(rows("flat", config, "half"), config, False) if ".2." in key or ".experts.1." in key}
    plan = plan_of(sparse(config, tmp_path, codes), options(dtype="float32", chunk_bytes=2000))
    (done,) = execute(plan, tmp_path / "stage", Workspace())
    assert (done.bytes_read, done.requests) == (plan.bytes_read, plan.requests)
    assert plan.bytes_read == plan.source.total_bytes < plan.target_bytes


@pytest.mark.parametrize("chunk_bytes", [4, 100, 1 << 20])
def test_four_bit_elements_are_counted_in_the_file_and_in_memory(chunk_bytes: int, tmp_path: Path) -> None:
    """Rows of an odd length: a chunk may start or end in the middle of a byte, which is then read for both."""
    source = sparse(small("mistral_7b", hidden_size=26, intermediate_size=25, num_hidden_layers=1), tmp_path, "F4")
    plan = plan_of(source, options(chunk_bytes=chunk_bytes), "flat")
    assert {leaf.dtype for leaf in plan.leaves} == {"float4_e2m1fn"}
    assert plan.target_bytes == sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    assert source.total_bytes <= plan.bytes_read <= plan.target_bytes
    counts = read_all(plan)
    assert (counts.bytes_read, counts.requests) == (plan.bytes_read, plan.requests)


@pytest.mark.parametrize("name", ["llama3_8b", "llama3_1_70b", "mixtral_8x7b", "qwen3_30b_a3b", "gemma2_27b", "qwen2_5_7b"])
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("devices", [1, 8, 64])
def test_published_models_are_read_once_whatever_the_mesh(name: str, scan: bool, devices: int) -> None:
    plan = plan_of(published(name), options(mesh=mesh_of(devices)), scan=scan)
    assert plan.bytes_read == plan.source.total_bytes
    assert plan.requests <= len(plan.source.tensors) + 2 * sum(leaf.chunks for leaf in plan.leaves)
    for leaf in plan.leaves:
        assert leaf.chunk_bytes <= 64 << 20
        for size, inner, entry in zip(leaf.shape, leaf.inner, leaf.spec, strict=True):
            count = math.prod(plan.mesh.axes[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))
            assert size // count % inner == 0 or count == 1


# --- units ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3_1_70b", "qwen3_30b_a3b", "qwen3_0_6b"])
@pytest.mark.parametrize("scan", [True, False])
def test_every_chunk_is_in_one_unit(name: str, scan: bool) -> None:
    plan = plan_of(published(name), options(mesh=mesh_of(8)), scan=scan)
    assert [unit.number for unit in plan.units] == list(range(len(plan.units)))
    found = [(span.leaf, chunk) for unit in plan.units for span in unit.spans for chunk in range(span.start, span.stop)]
    assert found == [(number, chunk) for number, leaf in enumerate(plan.leaves) for chunk in range(leaf.chunks)]
    assert sum(unit.bytes_written for unit in plan.units) == plan.target_bytes
    wanted = min(max(plan.target_bytes // 64, UNIT_LEAST), UNIT_MOST)
    assert all(wanted <= unit.bytes_written < wanted + (64 << 20) for unit in plan.units[:-1])
    assert plan.units[-1].bytes_written < wanted + (64 << 20)


# --- memory -----------------------------------------------------------------------------------------------------------------------


@given(st.integers(6 * LEAST, 64 << 20), st.sampled_from([1, 3]), st.sampled_from(["source", "float32", "bfloat16", "float8_e5m2"]))
@settings(max_examples=40, deadline=None)
def test_a_budget_is_kept_however_small(budget: int, copies: int, dtype: str) -> None:
    """Also where leaves differ in what they need: the buffers grow to the largest of each."""
    config = {**MEDIUM, "vocab_size": 8191}
    shapes = stored_shapes(rows("flat", config, "half"), config, False)
    codes = {key: "F64" if "mlp.up" in key else "F32" if "embed" in key else "BF16" for key in shapes}
    source = header_only(shapes, config, codes)
    try:
        plan = plan_of(source, options(memory_budget=budget, store_copies=copies, dtype=dtype))
    except ConfigError:
        assert budget < (CHUNKS + copies + 8) * LEAST
        return
    assert plan.peak_bytes <= budget
    widths = [max(dtype_named(leaf.dtype).numpy.itemsize, 8 if "wi_1" in leaf.name else 4 if "embedding" in leaf.name else 2)
              for leaf in plan.leaves]  # fmt: skip
    sizes = [math.prod(leaf.chunk) for leaf in plan.leaves]
    chunks = max(size * leaf.itemsize for size, leaf in zip(sizes, plan.leaves, strict=True))
    assert plan.peak_bytes >= (CHUNKS + copies) * chunks + max(size * width for size, width in zip(sizes, widths, strict=True))


def test_a_worker_holds_no_more_than_was_planned(tmp_path: Path) -> None:
    """A budget far under one tensor, leaves of two dtypes; what the buffers have grown to in the end."""
    config = {**MEDIUM, "vocab_size": 40000, "num_hidden_layers": 2}
    source = sparse(config, tmp_path, {"model.embed_tokens.weight": "F32", "lm_head.weight": "BF16"})
    budget = 4 << 20
    plan = plan_of(source, options(memory_budget=budget, dtype="bfloat16", mesh=mesh_of(64)))
    assert max(leaf.nbytes for leaf in plan.leaves) > 9 * budget
    workspace = Workspace()
    execute(plan, tmp_path / "stage", workspace)
    held = {name: buffer.nbytes for name, buffer in workspace.buffers.items()}
    assert set(held) == {"rows", "chunk", "other chunk", "gathered"}
    assert plan.peak_bytes * 0.9 < sum(held.values()) <= plan.peak_bytes <= budget


@pytest.mark.parametrize(
    ("codes", "dtype", "ratio"),
    [("BF16", "bfloat16", 1), ("BF16", "float32", 1), ("F32", "bfloat16", 2), ("F64", "float8_e5m2", 8), ("BF16 F64", "bfloat16", 4)],
)
def test_rows_are_as_wide_as_the_wider_of_two_dtypes(codes: str, dtype: str, ratio: int, tmp_path: Path) -> None:
    """What the plan says of one leaf, and what the buffer for its rows has grown to."""
    shapes = {f"l.{layer}.gate": (40, 60) for layer in range(2)}
    each = dict(zip(shapes, (codes.split() * 2)[:2], strict=True))
    tensors = [NewTensor(key, each[key], shape) for key, shape in shapes.items()]
    write_checkpoint(tmp_path, tensors, None, max_file_bytes=1 << 20, metadata={})
    source = replace(open_source(tmp_path), config={**CONFIG, "hidden_size": 60, "intermediate_size": 40})
    model = bind(two_in_one(ROWS[:1]).family, source.config or {})
    plan = make_plan(source, model, fused(replace(GATE, dims="layers embed mlp")), options(dtype=dtype))
    (leaf,) = plan.leaves
    assert leaf.rows_ratio == ratio
    assert plan.peak_bytes == (CHUNKS + 1 + ratio) * leaf.nbytes
    workspace = Workspace()
    out = np.empty(leaf.shape, dtype_named(dtype).numpy)
    with Reader(source.root, coalesce_gap=READ_GAP) as reader:
        make_box(leaf, whole(leaf.shape), source.tensors, reader, workspace, out)
    assert workspace.buffers["rows"].nbytes == leaf.nbytes // 2 * ratio  # a piece is one of two layers


def test_more_copies_in_the_store_make_smaller_chunks() -> None:
    source = published("llama3_8b")
    one, three = (plan_of(source, options(memory_budget=32 << 20, store_copies=copies)) for copies in (1, 3))
    assert max(leaf.chunk_bytes for leaf in one.leaves) > max(leaf.chunk_bytes for leaf in three.leaves)
    assert max(one.peak_bytes, three.peak_bytes) <= 32 << 20


@pytest.mark.parametrize(
    ("budget", "copies", "message"),
    [
        (
            100_000,
            1,
            "params.params.decoder.layers.mlp.wi_0.kernel: a chunk of 65536 bytes takes 262144 bytes of memory, "
            "and a worker may take 100000\n      set workers.memory_budget = \"256KiB\" or more",
        ),
        (
            393_215,
            3,
            "params.params.decoder.layers.mlp.wi_0.kernel: a chunk of 65536 bytes takes 393216 bytes of memory, "
            "and a worker may take 393215\n      set workers.memory_budget = \"384KiB\" or more",
        ),
    ],
)  # fmt: skip
def test_a_budget_that_fits_no_chunk_is_told(budget: int, copies: int, message: str) -> None:
    shapes = stored_shapes(rows("flat", MEDIUM, "half"), MEDIUM, False)
    source = header_only(shapes, MEDIUM)
    with pytest.raises(ConfigError) as caught:
        plan_of(source, options(memory_budget=budget, store_copies=copies))
    assert str(caught.value) == f"the memory budget is too small (1 problem):\n  {message}"
    assert plan_of(source, options(memory_budget=(CHUNKS + copies + 1) * LEAST, store_copies=copies))


def test_a_small_model_needs_no_more_than_it_has() -> None:
    config = small("mistral_7b")
    source = header_only(stored_shapes(rows("flat", config, "half"), config, False), config)
    largest = max(leaf.nbytes for leaf in plan_of(source, options()).leaves)
    assert largest < LEAST
    assert plan_of(source, options(memory_budget=4 * largest)).peak_bytes == 4 * largest
    with pytest.raises(ConfigError, match=f"a chunk of {largest} bytes takes {4 * largest} bytes of memory"):
        plan_of(source, options(memory_budget=4 * largest - 1))
    with pytest.raises(ConfigError, match="a chunk of 100 bytes takes 400 bytes of memory"):
        plan_of(source, options(memory_budget=399, chunk_bytes=100))


# --- as JSON, and its digest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3_2_1b", "gemma2_27b", "qwen3_30b_a3b"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scan", [True, False])
def test_a_plan_comes_back_from_json(name: str, layout: str, scan: bool) -> None:
    plan = plan_of(published(name), options(mesh=mesh_of(64)), layout, scan)
    back = plan_from_json(plan.to_json())
    assert back == plan
    assert hash(back.leaves[0].chunk) == hash(plan.leaves[0].chunk)  # tuples, not lists
    assert back.digest() == plan.digest()
    assert back.to_json() == plan.to_json()


def test_what_the_digest_depends_on() -> None:
    source, mesh = published("llama3_8b"), mesh_of(8)
    plan = plan_of(source, options(mesh=mesh))
    same = [
        plan_of(replace(source, root="/elsewhere"), options(mesh=mesh)),
        plan_of(replace(source, notes=("odd",)), options(mesh=mesh)),
        plan_of(source, options(mesh=mesh, memory_budget=2 << 30)),
        plan_of(source, options(mesh=mesh, store_copies=3)),
        plan_of(replace(source, config={**CONFIGS["llama3_8b"], "transformers_version": "4.40"}), options(mesh=mesh)),
    ]
    moved = replace(source.files["model.safetensors"], mtime_ns=5)
    same.append(plan_of(replace(source, files={"model.safetensors": moved}), options(mesh=mesh)))
    assert {other.digest() for other in same} == {plan.digest()}
    another = replace(source.files["model.safetensors"], header_digest="1")
    longer = replace(source.files["model.safetensors"], size=1)
    others = [
        plan_of(source, options(mesh=mesh, dtype="float32")),
        plan_of(source, options(mesh=mesh, chunk_bytes=32 << 20)),
        plan_of(source, options(mesh=mesh_of(64))),
        plan_of(source, options(mesh=MeshRules({"fsdp": 8, "x": 1}, mesh.rules))),
        plan_of(source, options(mesh=mesh, memory_budget=64 << 20)),
        plan_of(source, options(mesh=mesh), "flat"),
        plan_of(source, options(mesh=mesh), scan=False),
        plan_of(source, options(mesh=mesh), rope="interleaved"),
        plan_of(source, options(mesh=mesh), vocab=128264),
        plan_of(replace(source, files={"model.safetensors": another}), options(mesh=mesh)),
        plan_of(replace(source, files={"model.safetensors": longer}), options(mesh=mesh)),
    ]
    assert len({other.digest() for other in [plan, *others]}) == 1 + len(others)


# --- what cannot be ---------------------------------------------------------------------------------------------------------------


def report(source: Source, chosen: PlanOptions, layout: str = "maxtext", scan: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        plan_of(source, chosen, layout, scan)
    return str(caught.value)


@pytest.mark.parametrize("chunk_bytes", [64 << 20, 1000])
def test_dims_that_the_mesh_does_not_divide(chunk_bytes: int) -> None:
    mesh = MeshRules({"fsdp": 3, "tensor": 16}, {"embed": ("fsdp",), "kv_heads": ("tensor",)})
    with pytest.raises(ConfigError) as caught:
        plan_of(published("llama3_8b"), options(mesh=mesh, chunk_bytes=chunk_bytes))
    assert str(caught.value) == (
        "the mesh does not divide the arrays (2 problems):\n"
        "  embed is 4096 in 12 arrays, which 3 shards along fsdp do not divide\n"
        '      set mesh.axes.fsdp to a divisor of 4096, or mesh.rules.embed = ""\n'
        "  kv_heads is 8 in 2 arrays, which 16 shards along tensor do not divide\n"
        '      set mesh.axes.tensor to a divisor of 8, or mesh.rules.kv_heads = ""'
    )


def test_a_mesh_that_does_not_divide_is_told_with_what_else_is_wrong() -> None:
    config = small("mixtral_8x7b")
    shapes = stored_shapes(rows("flat", config, "half"), config, False)
    codes = {key: "F32" if key == "model.layers.1.input_layernorm.weight" else "BF16" for key in shapes}
    message = report(header_only(shapes, config, codes), options(mesh=MeshRules({"fsdp": 5}, {"embed": ("fsdp",)})))
    assert message.startswith("the maxtext layout cannot hold this checkpoint (2 problems):\n")
    assert "which 5 shards along fsdp do not divide" in message


def test_a_rule_that_yields_to_another_is_told() -> None:
    mesh = MeshRules({"fsdp": 2}, {"mlp": ("fsdp",), "embed": ("fsdp",)})
    notes = plan_of(published("llama3_8b"), options(mesh=mesh)).notes
    assert "mesh.rules.embed does not apply in 3 arrays: mesh.rules.mlp comes before it and has fsdp there" in notes


@pytest.mark.parametrize(("equal", "end"), [(None, ", unless run finds the two different"), (True, "")])
def test_advice_for_a_tied_model_waits_for_the_comparison(equal: bool | None, end: str) -> None:
    config = small("llama3_2_1b")
    source = header_only(stored_shapes(rows("flat", config, "half"), config, False), config)
    advice = "load with logits_via_embedding = true in the MaxText config, as there is no logits_dense"
    assert advice + end in plan_of(source, options(ends_equal=equal)).notes


def test_another_family_than_config_json_has_is_told() -> None:
    source = published("llama3_8b")
    model = bind(families()["mistral"], source.config)
    layout = LAYOUTS["maxtext"](model, LayoutOptions(True, "auto", 0, ""))
    said = 'config.json\'s architectures are LlamaForCausalLM, and model.family = "mistral" is for MistralForCausalLM'
    assert said in make_plan(source, model, layout, options()).notes
    assert not any("architectures" in note for note in plan_of(source, options()).notes)


def test_tensors_of_different_dtypes_have_no_source_dtype() -> None:
    config = small("mixtral_8x7b")
    shapes = stored_shapes(rows("flat", config, "half"), config, False)
    codes = {key: "F32" if key == "model.layers.1.input_layernorm.weight" or ".1.block_sparse_moe.experts.2.w1" in key else "BF16"
             for key in shapes}  # fmt: skip
    source = header_only(shapes, config, codes)
    assert report(source, options()) == (
        "the maxtext layout cannot hold this checkpoint (2 problems):\n"
        "  params.params.decoder.layers.pre_self_attention_layer_norm.scale is made of tensors of different dtypes: BF16, F32\n"
        '      set target.dtype to one dtype, such as "float32"\n'
        "  params.params.decoder.layers.MoeBlock_0.wi_0 is made of tensors of different dtypes: BF16, F32\n"
        '      set target.dtype to one dtype, such as "float32"'
    )
    assert report(source, options(), scan=False) == (  # a norm for each layer is a leaf of its own
        "the maxtext layout cannot hold this checkpoint (1 problem):\n"
        "  params.params.decoder.layers_1.MoeBlock_0.wi_0 is made of tensors of different dtypes: BF16, F32\n"
        '      set target.dtype to one dtype, such as "float32"'
    )
    for scan in (True, False):
        plan = plan_of(source, options(dtype="bfloat16"), scan=scan)
        rounds = {leaf.name for leaf in plan.leaves if not leaf.exact and "query" not in leaf.name}
        layer = "layers" if scan else "layers_1"
        assert rounds == {f"params.params.decoder.{layer}.{name}" for name in ("pre_self_attention_layer_norm.scale", "MoeBlock_0.wi_0")}


def test_many_leaves_with_one_problem_are_one_problem() -> None:
    config = small("mixtral_8x7b")
    shapes = stored_shapes(rows("flat", config, "half"), config, False)
    source = header_only(shapes, config, {key: "F16" if ".experts.2." in key else "BF16" for key in shapes})
    assert (
        "  params.params.decoder.layers_0.MoeBlock_0.wi_0 (and 3 more) is made of tensors of different dtypes: BF16, F16\n"
        '      set target.dtype to one dtype, such as "float32"'
    ) in report(source, options(), scan=False)


def test_integers_are_kept_and_not_scaled() -> None:
    config = small("mistral_7b")
    shapes = stored_shapes(rows("flat", config, "half"), config, False)
    source = header_only(shapes, config, {key: "I8" if "q_proj" in key else "BF16" for key in shapes})
    kept = {leaf.name: leaf.dtype for leaf in plan_of(source, options(dtype="float32"), "flat").leaves}
    assert (kept["layers.attn.q"], kept["layers.attn.k"]) == ("int8", "float32")
    assert report(source, options()) == (
        "the maxtext layout cannot hold this checkpoint (1 problem):\n"
        "  params.params.decoder.layers.self_attention.query.kernel is I8, and the layout scales it\n"
        '      use target.layout = "flat"'
    )


# --- fused targets ----------------------------------------------------------------------------------------------------------------

ROWS = (linear("layers.gate", "l.{layers}.gate", "mlp embed"), linear("layers.up", "l.{layers}.up", "mlp embed"))
CONFIG = {"num_hidden_layers": 2, "hidden_size": 6, "intermediate_size": 4}
SHAPES: Shapes = {f"l.{layer}.{name}": (4, 6) for layer in range(2) for name in ("gate", "up")}


def two_in_one(rows: tuple[Param, ...] = ROWS) -> Model:
    axes = {axis: DECODER_AXES[axis] for axis in ("layers", "embed", "mlp")}
    return bind(Family("two", "Two", (), axes, rows), CONFIG)


def fused(*slots: Slot, axes: Any = None) -> Layout:
    return Layout("fused", slots, axes or {})


GATE, UP = Slot("layers.gate", "gate_up", "layers embed (mlp | mlp)"), Slot("layers.up", "gate_up", "layers embed (mlp | mlp)", part=1)


def test_parts_of_a_fused_leaf_lie_side_by_side(tmp_path: Path) -> None:
    arrays = {key: np.random.default_rng(n).standard_normal(shape).astype(np.float32) for n, (key, shape) in enumerate(SHAPES.items())}
    tensors = [NewTensor(key, "F32", shape) for key, shape in SHAPES.items()]
    write_checkpoint(tmp_path, tensors, lambda tensor: [arrays[tensor.name].tobytes()], max_file_bytes=1 << 20, metadata={})
    source = replace(open_source(tmp_path), config=CONFIG)
    plan = make_plan(source, two_in_one(), fused(GATE, UP), options())
    (leaf,) = plan.leaves
    assert (leaf.shape, leaf.zeros, leaf.exact, [part.param for part in leaf.parts]) == ((2, 6, 8), 0, True, ["layers.gate", "layers.up"])
    assert plan.bytes_read == source.total_bytes
    out = np.empty(leaf.shape, np.float32)
    with Reader(source.root, coalesce_gap=0) as reader:
        make_box(leaf, whole(leaf.shape), source.tensors, reader, Workspace(), out)
    layers = [np.concatenate([arrays[f"l.{layer}.gate"].T, arrays[f"l.{layer}.up"].T], axis=1) for layer in range(2)]
    assert np.array_equal(raw_view(out), raw_view(np.stack(layers)))


@pytest.mark.parametrize("chunk_bytes", [3000, 1300, 80, 14])
def test_gaps_that_are_read_and_runs_across_digits_are_counted(chunk_bytes: int, tmp_path: Path) -> None:
    """A fused leaf whose second part is stored the other way round: its chunks are columns, many runs with gaps between them. And a dim
    whose chunks start in the middle of an inner digit: there the number of pieces differs from chunk to chunk."""
    family = Family(
        "two",
        "Two",
        (),
        {"layers": 2, "embed": 1300, "mlp": 5, "a": 7, "b": 5},
        (ROWS[0], Param("layers.up", "l.{layers}.up", "embed mlp"), Param("layers.turned", "l.{layers}.turned", "(b a) mlp")),
    )
    shapes = {"gate": (5, 1300), "up": (1300, 5), "turned": (35, 5)}
    tensors = [NewTensor(f"l.{layer}.{name}", "I8", shape) for layer in range(2) for name, shape in shapes.items()]
    write_checkpoint(tmp_path, tensors, None, max_file_bytes=1 << 20, metadata={})
    layout = fused(GATE, UP, Slot("layers.turned", "turned", "layers (a b) mlp"))
    plan = make_plan(open_source(tmp_path), bind(family, {}), layout, options(chunk_bytes=chunk_bytes))
    counts = read_all(plan)
    assert (counts.bytes_read, counts.requests) == (plan.bytes_read, plan.requests)
    assert counts.bytes_read > counts.bytes_needed


def test_half_of_a_fused_leaf_and_the_rest_zeros() -> None:
    shapes = {key: shape for key, shape in SHAPES.items() if "gate" in key}
    plan = make_plan(header_only(shapes, CONFIG), two_in_one(ROWS[:1]), fused(GATE), options())
    assert plan.leaves[0].zeros == 2 * 6 * 4


def test_no_parameter_is_left_out_by_a_layout() -> None:
    with pytest.raises(InputError) as caught:
        make_plan(header_only(SHAPES, CONFIG), two_in_one(), fused(GATE), options())
    assert str(caught.value) == (
        'the fused layout cannot hold this checkpoint (1 problem):\n  layers.up has no place in it\n      use target.layout = "flat"'
    )


def test_parts_of_different_dtypes_make_no_leaf() -> None:
    source = header_only(SHAPES, CONFIG, {key: "BF16" if "up" in key else "F16" for key in SHAPES})
    with pytest.raises(InputError) as caught:
        make_plan(source, two_in_one(), fused(GATE, UP), options())
    assert str(caught.value) == (
        "the fused layout cannot hold this checkpoint (1 problem):\n"
        "  gate_up is made of layers.gate in float16 and layers.up in bfloat16\n"
        '      set target.dtype to one dtype, such as "float32"'
    )
    (leaf,) = make_plan(source, two_in_one(), fused(GATE, UP), options(dtype="float16")).leaves
    assert not leaf.exact


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ((GATE, replace(UP, part=0)), "gate_up: the parts layers.gate and layers.up do not lie side by side"),
        ((GATE, replace(UP, dims="layers embed mlp", part=0)), "gate_up: the parts layers.gate and layers.up do not lie side by side"),
        (
            (replace(GATE, dims="embed mlp"),),
            r"layers.gate: \[l.\{layers\}.gate mlp embed\] and \[gate_up embed mlp\] are not over the same axes",
        ),
    ],
)
def test_tables_that_are_wrong(slots: tuple[Slot, ...], message: str) -> None:
    """A mistake of a layout, not of a user: no element is written twice."""
    with pytest.raises(ValueError, match=message):
        make_plan(header_only(SHAPES, CONFIG), two_in_one(), fused(*slots), options())
