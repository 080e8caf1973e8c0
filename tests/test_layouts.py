"""Every family in every layout: names, shapes and values, against the reference's tables and whole-tensor arithmetic."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hf_models import CONFIGS, DATA, ONE_EACH, Config, header_only, save_random, small
from layout_oracle import leaves, rows, stored_shapes, values

from shardconv.boxes import Box, box_shape, slices, whole
from shardconv.dtypes import dtype_named, dtype_of_code, raw_view
from shardconv.errors import InputError
from shardconv.families import find
from shardconv.family import LayoutOptions, bind
from shardconv.formats.reading import Reader
from shardconv.formats.writing import NewTensor, write_checkpoint
from shardconv.layouts import LAYOUTS
from shardconv.layouts.options import ROTATED
from shardconv.plan import READ_GAP, Leaf, Plan, PlanOptions, make_plan
from shardconv.run.work import Workspace, make_box
from shardconv.sharding import MeshRules
from shardconv.source import Source, open_source

NAMES = json.loads((DATA / "names.json").read_text())

every_family = pytest.mark.parametrize("family", ONE_EACH)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
scanned_or_not = pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])


def plan_of(
    source: Source,
    layout: str,
    *,
    scan: bool = True,
    rope: str = "half",
    vocab: int = 0,
    dtype: str = "source",
    query_dtype: str = "",
    ends_equal: bool | None = None,
) -> Plan:
    model = bind(find(source.config or {}), source.config or {})
    table = LAYOUTS[layout](model, LayoutOptions(scan, rope, vocab, query_dtype))
    return make_plan(source, model, table, PlanOptions(dtype, MeshRules({}, {}), 64 << 20, 1 << 30, (), ends_equal))


def published(name: str) -> Source:
    """A published model's headers, by what transformers saves."""
    config, shapes = CONFIGS[name], {}
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    for key, (count, shape) in NAMES[name].items():
        before = len(shapes)
        for layer in range(config["num_hidden_layers"] if "layers.{}" in key else 1):
            for expert in range(experts if "experts.{}" in key else 1):
                shapes[key.replace("layers.{}", f"layers.{layer}").replace("experts.{}", f"experts.{expert}")] = tuple(shape)
        assert len(shapes) - before == count
    return header_only(shapes, config)


# --- names and shapes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("biased")])
@every_layout
@scanned_or_not
def test_names_and_shapes_of_published_models(name: str, layout: str, scan: bool) -> None:
    config, source = CONFIGS[name], published(name)
    tied = "lm_head.weight" not in NAMES[name]
    table = rows(layout, config, "half")
    plan = plan_of(source, layout, scan=scan)
    assert {leaf.name: (leaf.shape, leaf.exact) for leaf in plan.leaves} == leaves(table, config, scan, 0, tied)
    assert plan.tied == tied
    assert {(leaf.dtype, leaf.zeros) for leaf in plan.leaves} == {("bfloat16", 0)}


@pytest.mark.parametrize(
    ("name", "rope"),
    [("llama2_7b", "half"), ("llama3_8b", "half"), ("llama3_1_70b", "interleaved"), ("llama3_2_1b", "interleaved"),
     ("mistral_7b", "half"), ("mixtral_8x7b", "half"), ("qwen2_5_7b", "half"), ("qwen3_32b", "half"), ("gemma2_27b", "half")],
)  # fmt: skip
@pytest.mark.parametrize("entry", ["rope_scaling", "rope_parameters"])
def test_auto_takes_the_order_that_maxtext_rotates_in(name: str, rope: str, entry: str) -> None:
    config = {key: value for key, value in CONFIGS[name].items() if key != "rope_scaling"}
    config[entry] = CONFIGS[name].get("rope_scaling")
    model = bind(find(config), config)
    assert LAYOUTS["maxtext"](model, LayoutOptions(True, "auto", 0, "")).metadata["rope"] == rope
    assert LAYOUTS["flat"](model, LayoutOptions(True, "auto", 0, "")).metadata["rope"] == "half"


# --- values -----------------------------------------------------------------------------------------------------------------------


def random_checkpoint(config: Config, directory: Path, code: str) -> dict[str, np.ndarray]:
    """A checkpoint in several files, and its tensors as arrays; ones, zeros of both signs and large and small numbers among them."""
    tied = config.get("tie_word_embeddings", config["model_type"] == "gemma2")
    shapes = stored_shapes(rows("flat", config, "half"), config, tied)
    dtype = dtype_of_code(code).numpy
    random = np.random.default_rng(7)
    arrays = {}
    for key, shape in shapes.items():
        array = random.standard_normal(shape).astype(np.float32)
        array *= random.choice(np.array([1, 1, 1e-3, 30, 0, -0.0, 1e-39], np.float32), shape)
        arrays[key] = array.astype(dtype)
    tensors = [NewTensor(key, code, array.shape) for key, array in arrays.items()]
    write_checkpoint(directory, tensors, lambda tensor: [arrays[tensor.name].tobytes()], max_file_bytes=3_000 * dtype.itemsize, metadata={})
    (directory / "config.json").write_text(json.dumps(config))
    assert len(list(directory.glob("*.safetensors"))) > 3
    return arrays


def boxes_of(leaf: Leaf, random: np.random.Generator) -> Iterator[Box]:
    """The whole leaf, one element of it, and some boxes."""
    yield whole(leaf.shape)
    for most in (1, None, None, None):
        box = []
        for n in leaf.shape:
            start = int(random.integers(n))
            box.append((start, start + (most or int(random.integers(1, n - start + 1)))))
        yield tuple(box)


def assert_values(plan: Plan, expected: Mapping[str, np.ndarray]) -> None:
    """Every leaf, whole and in boxes, bit for bit."""
    assert {leaf.name for leaf in plan.leaves} == set(expected)
    random, workspace = np.random.default_rng(0), Workspace()
    with Reader(plan.source.root, coalesce_gap=READ_GAP) as reader:
        for leaf in plan.leaves:
            array = expected[leaf.name]
            assert (leaf.shape, leaf.dtype) == (array.shape, array.dtype.name), leaf.name
            for box in boxes_of(leaf, random):
                out = np.full(box_shape(box), 77, dtype_named(leaf.dtype).numpy)
                make_box(leaf, box, plan.source.tensors, reader, workspace, out)
                assert np.array_equal(raw_view(out), raw_view(np.ascontiguousarray(array[slices(box)]))), (leaf.name, box)


@every_family
@every_layout
@scanned_or_not
@pytest.mark.parametrize("rope", ["half", "interleaved"])
def test_values(family: str, layout: str, scan: bool, rope: str, tmp_path: Path) -> None:
    config = small(ONE_EACH[family])
    tensors = random_checkpoint(config, tmp_path, "BF16")
    plan = plan_of(open_source(tmp_path), layout, scan=scan, rope=rope)
    assert_values(plan, values(rows(layout, config, rope), config, tensors, scan, 0, "source"))


@every_family
@every_layout
def test_a_padded_vocabulary_ends_in_zeros(family: str, layout: str, tmp_path: Path) -> None:
    config = small(ONE_EACH[family])
    tensors = random_checkpoint(config, tmp_path, "BF16")
    plan = plan_of(open_source(tmp_path), layout, vocab=48)
    assert_values(plan, values(rows(layout, config, "half"), config, tensors, True, 48, "source"))
    padded = {leaf.parts[0].param: leaf.zeros for leaf in plan.leaves if leaf.zeros}
    assert padded == dict.fromkeys(["embed"] if plan.tied else ["embed", "unembed"], (48 - 37) * 24)
    assert plan.metadata["vocab_rows"] == 37


@pytest.mark.parametrize("code", ["F64", "F32", "BF16", "F16", "F8_E4M3"])
@pytest.mark.parametrize("dtype", ["source", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # a scale; a scale, a shift and pairs of layers
def test_values_are_rounded_once_as_torch_rounds(family: str, code: str, dtype: str, tmp_path: Path) -> None:
    config = small(ONE_EACH[family])
    tensors = random_checkpoint(config, tmp_path, code)
    expected = values(rows("maxtext", config, "interleaved"), config, tensors, True, 40, dtype)
    plan = plan_of(open_source(tmp_path), "maxtext", rope="interleaved", vocab=40, dtype=dtype)
    assert_values(plan, expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "gemma2"])
@scanned_or_not
def test_a_folded_query_may_have_a_dtype_of_its_own(family: str, scan: bool, tmp_path: Path) -> None:
    config = small(ONE_EACH[family])
    tensors = random_checkpoint(config, tmp_path, "BF16")
    table = rows("maxtext", config, "half")
    expected = values(table, config, tensors, scan, 0, "source")
    wide = values(table, config, tensors, scan, 0, "float32")
    expected |= {name: wide[name] for name in expected if ".query." in name}
    assert_values(plan_of(open_source(tmp_path), "maxtext", scan=scan, query_dtype="float32"), expected)


@pytest.mark.parametrize(("family", "layout"), [("qwen3", "maxtext"), ("qwen2", "maxtext"), ("llama", "flat")])
def test_a_query_that_carries_no_scale_keeps_its_dtype(family: str, layout: str, tmp_path: Path) -> None:
    config = small(ONE_EACH[family])
    tensors = random_checkpoint(config, tmp_path, "BF16")
    plan = plan_of(open_source(tmp_path), layout, query_dtype="float32")
    assert_values(plan, values(rows(layout, config, "half"), config, tensors, True, 0, "source"))
    reason = "this layout folds no scale into the query" if layout == "flat" else f"MaxText scales the query of {family} models at run time"
    assert f"target.query_dtype changes nothing: {reason}" in plan.notes


@pytest.mark.parametrize("rope", ["half", "interleaved"])
@scanned_or_not
def test_every_bias_that_llama_may_have(rope: str, scan: bool, tmp_path: Path) -> None:
    config = small("biased_llama")
    tensors = random_checkpoint(config, tmp_path, "BF16")
    assert sum("bias" in key for key in tensors) == 7 * 4
    plan = plan_of(open_source(tmp_path), "flat", rope=rope, scan=scan)
    assert_values(plan, values(rows("flat", config, rope), config, tensors, scan, 0, "source"))


def test_layers_of_different_dtypes_meet_in_one_leaf(tmp_path: Path) -> None:
    config = small("mistral_7b")
    tensors = random_checkpoint(config, tmp_path, "F32")
    for layer, dtype in enumerate((ml_dtypes.bfloat16, np.float16, np.float32)):
        key = f"model.layers.{layer}.mlp.up_proj.weight"
        tensors[key] = tensors[key].astype(dtype)
    codes = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    new = [NewTensor(key, codes[array.dtype.name], array.shape) for key, array in tensors.items()]
    write_checkpoint(tmp_path, new, lambda tensor: [tensors[tensor.name].tobytes()], max_file_bytes=20_000, metadata={})
    for dtype, exact in (("float32", True), ("bfloat16", False)):
        plan = plan_of(open_source(tmp_path), "maxtext", dtype=dtype)
        assert_values(plan, values(rows("maxtext", config, "half"), config, tensors, True, 0, dtype))
        (up,) = [leaf for leaf in plan.leaves if leaf.template.endswith("wi_1.kernel")]
        assert up.exact == exact
        assert up.parts[0].stored == "BF16, F16, F32"


@every_family
@every_layout
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_that_transformers_wrote(family: str, layout: str, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = small(ONE_EACH[family])
    save_random(config, tmp_path, dtype)
    source = open_source(tmp_path)
    assert len(source.files) > 3
    tensors = {}
    with Reader(source.root, coalesce_gap=0) as reader:
        for key, tensor in source.tensors.items():
            tensors[key] = np.empty(tensor.shape, dtype_of_code(tensor.dtype).numpy)
            reader.read(tensor, whole(tensor.shape), tensors[key])
    plan = plan_of(source, layout, scan=True, rope="auto")
    rope = str(plan.metadata["rope"])
    assert_values(plan, values(rows(layout, config, rope), config, tensors, True, 0, "source"))
    assert plan.tied == ("lm_head.weight" not in tensors)


# --- what a reader is told --------------------------------------------------------------------------------------------------------


def metadata(name: str, layout: str, options: LayoutOptions) -> Mapping[str, object]:
    return LAYOUTS[layout](bind(find(CONFIGS[name]), CONFIGS[name]), options).metadata


def test_metadata_for_maxtext() -> None:
    options = LayoutOptions(True, "auto", 256128, "")
    said = {"scan_layers": True, "rope": "half", "vocab_rows": 256000}
    folded = {"embed_scale": 4608**0.5, "norm_shift": 1.0, "query_scale": 144**-0.5}
    assert metadata("gemma2_27b", "maxtext", options) == said | {"folded": folded}
    said = {"scan_layers": False, "rope": "interleaved", "vocab_rows": 128256}
    options = LayoutOptions(False, "auto", 0, "")
    assert metadata("llama3_1_70b", "maxtext", options) == said | {"folded": {"query_scale": 128**-0.5}}
    assert metadata("qwen3_32b", "maxtext", options)["folded"] == {}


def test_metadata_of_the_flat_layout_has_what_is_applied_at_run_time() -> None:
    assert metadata("gemma2_27b", "flat", LayoutOptions(True, "auto", 0, "")) == {
        "scan_layers": True,
        "rope": "half",
        "vocab_rows": 256000,
        "query_scale": 144**-0.5,
        "norm_shift": 1.0,
        "embed_scale": 4608**0.5,
    }
    assert metadata("llama3_8b", "flat", LayoutOptions(True, "interleaved", 0, ""))["rope"] == "interleaved"


PAIRS = 'query and key are in RoPE pairs: load with a MaxText config that has rope_type llama3.1 (target.rope = "half" for others)'
HALVES = (
    "query and key are in RoPE halves: load with a MaxText config that has rope_type default "
    '(target.rope = "interleaved" for llama3.1)'
)
NO_ENDS = "lm_head.weight is not in the checkpoint and config.json says tied: the model uses the embedding, no output projection is written"
VIA = "load with logits_via_embedding = true in the MaxText config, as there is no logits_dense"


@pytest.mark.parametrize(
    ("name", "layout", "rope", "notes"),
    [
        ("llama3_1_70b", "maxtext", "auto", (PAIRS,)),
        ("llama3_8b", "maxtext", "auto", (HALVES,)),
        ("llama3_2_1b", "maxtext", "auto", (NO_ENDS, VIA, PAIRS)),
        ("llama3_2_1b", "flat", "auto", (NO_ENDS,)),
        ("qwen3_32b", "maxtext", "auto", ()),
        ("qwen3_32b", "maxtext", "interleaved", (PAIRS,)),
        ("gemma2_27b", "maxtext", "auto", (NO_ENDS, VIA)),
        ("mistral_7b", "flat", "interleaved", ()),
    ],
)
def test_notes(name: str, layout: str, rope: str, notes: tuple[str, ...]) -> None:
    assert plan_of(published(name), layout, rope=rope).notes == notes


# --- messages ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "layout", "options", "message"),
    [
        (
            CONFIGS["biased_llama"],
            "maxtext",
            LayoutOptions(True, "auto", 0, ""),
            "MaxText has no place for some parameters (4 problems):\n"
            '  layers.attn.o_bias\n      use target.layout = "flat"\n'
            '  layers.mlp.down_bias\n      use target.layout = "flat"\n'
            '  layers.mlp.gate_bias\n      use target.layout = "flat"\n'
            '  layers.mlp.up_bias\n      use target.layout = "flat"',
        ),
        (
            small("gemma2_27b", num_hidden_layers=5),
            "maxtext",
            LayoutOptions(True, "auto", 0, ""),
            "MaxText stacks pairs of a local and a global layer (1 problem):\n"
            '  num_hidden_layers is 5, an odd number\n      use target.layout = "flat"',
        ),
        (
            small("llama3_8b"),
            "flat",
            LayoutOptions(True, "auto", 36, ""),
            "the vocabulary would be cut off (1 problem):\n"
            "  target.vocab_size is 36, but the checkpoint has 37 rows\n      set target.vocab_size to 37 or more",
        ),
        (
            small("llama3_8b", head_dim=7),
            "flat",
            LayoutOptions(True, "interleaved", 0, ""),
            'the rotary dims do not come in pairs (1 problem):\n  head_dim is 7\n      set target.rope = "half"',
        ),
    ],
    ids=["homeless", "odd layers", "vocabulary", "odd head"],
)
def test_messages(config: Config, layout: str, options: LayoutOptions, message: str) -> None:
    with pytest.raises(InputError) as caught:
        LAYOUTS[layout](bind(find(config), config), options)
    assert str(caught.value) == message


def test_all_that_rope_touches_is_known() -> None:
    """A parameter with a head's dims is either rotated or one of those that are not."""
    still = {"layers.attn.v", "layers.attn.o", "layers.attn.v_bias"}
    for name in CONFIGS:
        params = bind(find(CONFIGS[name]), CONFIGS[name]).params
        assert {param.name for param in params if "head_dim" in param.dims} <= ROTATED | still
