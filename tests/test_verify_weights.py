"""The check on checkpoints that are as they should be: no alarm, whatever the family, layout and dtype; and what it says and looks at."""

import ast
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hf_models import ONE_EACH, small
from stored import save, save_index
from written import CHOICES, CHUNK, change, checked, make_model, plan_of, save_model, write

from shardconv.errors import CheckError, InputError, RunError
from shardconv.family import Family
from shardconv.plan import Plan
from shardconv.run.heartbeat import read_compared
from shardconv.sharding import MeshRules
from shardconv.sinks.spec import StoreOptions
from shardconv.verify.pool import answers
from shardconv.verify.request import Request
from shardconv.verify.tensors import Tensors
from shardconv.verify.verdict import TITLE, raise_if_unequal, summary
from shardconv.verify.weights import WHOLE_PER_WORKER, check

ROOT = Path(__file__).parent.parent
# What says a second time where everything comes from; it may use none of what says it the first time.
SECOND = ("tensors", "torch_files", "rounding", "rows", "statement", "maxtext", "flat", "second", "compare", "stored", "sampling")


def total(plan: Plan) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in plan.leaves)


@pytest.mark.parametrize("family", ONE_EACH)
@pytest.mark.parametrize("layout", ["flat", "maxtext"])
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
def test_no_false_alarm(family: str, layout: str, scan: bool, tmp_path: Path) -> None:
    make_model(tmp_path / "source", ONE_EACH[family])
    choices = replace(CHOICES, layout=layout, scan_layers=scan, rope="auto")
    plan = plan_of(tmp_path / "source", choices)
    found = checked(plan, write(plan, tmp_path / "out"), choices)
    assert (found.problems, found.notes) == ((), ())
    assert (found.whole, found.independent, found.elements) == (True, True, total(plan))
    assert found.leaves == found.checksums == len(plan.leaves)
    assert found.rounded == sum(not leaf.exact for leaf in plan.leaves)


@pytest.mark.parametrize("code", ["F32", "F16", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"])
def test_no_false_alarm_over_casts(code: str, dtype: str, tmp_path: Path) -> None:
    make_model(tmp_path / "source", "gemma2_27b", code)
    choices = replace(CHOICES, layout="maxtext", dtype=dtype, rope="interleaved", vocab_size=41)
    plan = plan_of(tmp_path / "source", choices)
    found = checked(plan, write(plan, tmp_path / "out"), choices)
    assert found.problems == ()


@pytest.mark.parametrize("name", ["biased_llama", "biased_qwen3"])
def test_biases_and_a_query_of_its_own_dtype(name: str, tmp_path: Path) -> None:
    layout = "flat" if name == "biased_llama" else "maxtext"
    changes = {} if layout == "flat" else {"attention_bias": False}
    make_model(tmp_path / "source", name, **changes)
    choices = replace(CHOICES, layout=layout, rope="interleaved", query_dtype="float32")
    plan = plan_of(tmp_path / "source", choices)
    assert checked(plan, write(plan, tmp_path / "out"), choices).problems == ()


@pytest.mark.parametrize("store", [StoreOptions(zarr=2), StoreOptions(ocdbt=False), StoreOptions(compression="zstd")], ids=str)
def test_every_store(store: StoreOptions, tmp_path: Path) -> None:
    make_model(tmp_path / "source", "llama3_8b")
    plan = plan_of(tmp_path / "source", CHOICES, mesh=MeshRules({"fsdp": 4}, {"embed": ("fsdp",)}))
    assert any(leaf.inner != leaf.chunk for leaf in plan.leaves)
    folder = write(plan, tmp_path / "out", store)
    for chunk in (CHUNK, 512):  # the plan is made again, perhaps with another budget: what was written says how
        found = checked(plan_of(tmp_path / "source", CHOICES, chunk=chunk), folder, CHOICES)
        assert (found.problems, found.checksums) == ((), len(plan.leaves))


def test_tied_ends(tmp_path: Path) -> None:
    tensors = make_model(tmp_path / "source", "llama3_8b")
    config = small("llama3_8b", tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_model(tmp_path / "equal", config, tensors)
    plan = plan_of(tmp_path / "equal", CHOICES)
    folder = write(plan, tmp_path / "out")
    assert checked(plan, folder, CHOICES).problems == ()
    other = tensors["lm_head.weight"].copy()
    other[3, 3] += 1
    save_model(tmp_path / "other", config, tensors | {"lm_head.weight": other})
    (problem,) = checked(plan_of(tmp_path / "other", CHOICES), folder, CHOICES).problems
    assert problem.fact == "unembed is not in the checkpoint"


def test_workers_and_little_memory_see_the_same(tmp_path: Path) -> None:
    make_model(tmp_path / "source", "qwen3_0_6b")
    plan = plan_of(tmp_path / "source", CHOICES)
    folder = write(plan, tmp_path / "out")
    change(folder, "layers.attn.k", lambda array: array.__setitem__((3, 2), -array[3, 2]))
    alone, crowd = checked(plan, folder, CHOICES), checked(plan, folder, CHOICES, workers=2, memory=64 << 10)
    assert len(alone.problems) == 1
    assert alone.problems[0].fact == crowd.problems[0].fact
    assert (alone.elements, alone.checksums) == (crowd.elements, crowd.checksums)


def test_a_sample_looks_into_every_layer_and_expert(tmp_path: Path) -> None:
    make_model(tmp_path / "source", "mixtral_8x7b")
    plan = plan_of(tmp_path / "source", CHOICES)
    folder = write(plan, tmp_path / "out")
    found = checked(plan, folder, CHOICES, sample=1)
    assert (found.problems, found.whole, found.checksums) == ((), False, 0)
    assert found.elements < total(plan)

    def double(array: np.ndarray) -> None:
        array[2, 1] = array[2, 0]

    change(folder, "layers.experts.down", double)
    (problem,) = checked(plan, folder, CHOICES, sample=1).problems
    assert "of expert 0 and not 1" in problem.remedy


def test_the_seed_chooses_the_boxes(tmp_path: Path) -> None:
    from shardconv.verify.sampling import boxes
    from shardconv.verify.statement import Number, Origin, Reference

    number = (Number(0, (("l", 1),)),)
    origin = Origin("h.{}", number, "v d", "l v d", {"l": 3, "v": 500, "d": 800}, ((0, 500), (0, 800)), ((0, 3), (0, 500), (0, 800)))
    leaf = Reference("w", (3, 500, 800), "float32", (origin,))
    first = boxes(leaf, (1, 100, 800), 40, seed=1)
    assert first == boxes(leaf, (1, 100, 800), 40, seed=1) != boxes(leaf, (1, 100, 800), 40, seed=2)
    assert {box[0][0] for box in first} == {0, 1, 2}
    corners = {(layer, row, column) for layer in (0, 2) for row in (0, 499) for column in (0, 799)}
    assert all(any(all(a <= i < b for i, (a, b) in zip(corner, box, strict=True)) for box in first) for corner in corners)
    assert any(low < edge < high for box in first for low, high in [box[1]] for edge in range(100, 500, 100))
    assert all(0 <= low < high <= size for box in first for (low, high), size in zip(box, leaf.shape, strict=True))


def test_values_that_became_infinite_are_told(tmp_path: Path) -> None:
    tensors = make_model(tmp_path / "source", "llama3_8b", "F32")
    tensors["model.norm.weight"][3] = 1e6
    tensors["model.norm.weight"][4] = np.nan
    save_model(tmp_path / "source2", small("llama3_8b"), tensors)
    choices = replace(CHOICES, dtype="float16")
    plan = plan_of(tmp_path / "source2", choices)
    found = checked(plan, write(plan, tmp_path / "out"), choices)
    assert (found.problems, found.nan, found.inf) == ((), 1, 1)
    assert found.notes == ("final_norm has 1 NaN and 1 infinite values, its source has 1 and 0: they are too large for its dtype",)


def test_a_family_that_nobody_stated_twice_is_said_to_be_so(tmp_path: Path) -> None:
    make_model(tmp_path / "source", "llama3_8b")

    def other(family: Family) -> Family:
        return replace(family, name="other")

    plan = plan_of(tmp_path / "source", CHOICES, family=other)
    folder = write(plan, tmp_path / "out")
    found = checked(plan, folder, CHOICES)
    assert (found.problems, found.independent, found.elements) == ((), False, total(plan))
    assert found.notes == (
        "no independent statement of other in the flat layout: compared by the plan's own addresses, "
        "which finds damaged values and not a wrong table",
    )
    assert summary(found.to_json()).endswith("; NOT by an independent statement of this model")
    change(folder, "layers.mlp.up", lambda array: array.__setitem__((0, 0, 0), 7))
    (problem,) = checked(plan, folder, CHOICES).problems
    assert problem.fact.startswith("layers.mlp.up[0, 0, 0] is 7 (0x40e0), and should be ")


def test_the_plans_own_addresses_know_padding_pairs_and_fused_tensors(tmp_path: Path) -> None:
    from shardconv.verify.addresses import references
    from shardconv.verify.statement import blocks, whole, within
    from shardconv.verify.tensors import Tensors

    make_model(tmp_path / "source", "llama3_8b")
    choices = replace(CHOICES, rope="interleaved", vocab_size=40)
    plan = plan_of(tmp_path / "source", choices)
    tensors = Tensors(plan.source.root, tuple(plan.source.files))
    found, lost = references(plan)
    assert lost == []
    from shardconv.verify.second import references as stated

    others = {one.name: one for one in stated(tensors, plan.source.config or {}, "llama", choices) or []}
    for one in found:
        arrays = []
        for reference in (one, others[one.name]):
            array = np.zeros(reference.shape, np.float32)
            for block in blocks(reference, tensors, whole(reference.shape), 1000):
                array[within(block.box, whole(reference.shape))] = block.values.astype(np.float32)
            arrays.append(array)
        assert np.array_equal(*arrays)


def test_leaves_that_are_too_many_and_shapes_that_are_others(tmp_path: Path) -> None:
    make_model(tmp_path / "source", "biased_llama")
    make_model(tmp_path / "plain", "llama3_8b", intermediate_size=22)
    plan = plan_of(tmp_path / "source", CHOICES)
    folder = write(plan, tmp_path / "out")
    found = checked(plan_of(tmp_path / "plain", CHOICES), folder, CHOICES, sample=1).problems
    facts = [problem.fact for problem in found]
    assert "layers.attn.k_bias is in the checkpoint" in facts
    assert "layers.mlp.gate has shape 4 x 24 x 20, and should have 4 x 24 x 22" in facts


def test_metadata_of_another_checkpoint(tmp_path: Path) -> None:
    make_model(tmp_path / "source", "llama3_8b")
    plan = plan_of(tmp_path / "source", CHOICES)
    folder = write(plan, tmp_path / "out")
    text = (folder / "_METADATA").read_text()
    import json

    metadata = json.loads(text)
    metadata["custom_metadata"]["shardconv"]["checksums"]["final_norm"] = "0" * 16
    (folder / "_METADATA").write_text(json.dumps(metadata))
    (problem,) = checked(plan, folder, CHOICES).problems
    assert (problem.fact, problem.remedy) == (
        "final_norm has not the checksum that it was written with", "the metadata is of another checkpoint"
    )  # fmt: skip


def test_the_report_and_the_error(tmp_path: Path) -> None:
    make_model(tmp_path / "source", "llama3_8b")
    plan = plan_of(tmp_path / "source", CHOICES)
    folder = write(plan, tmp_path / "out")
    good = checked(plan, folder, CHOICES).to_json()
    raise_if_unequal(good)
    assert good["equal"]
    line = summary({**good, "seconds": 1.25})
    assert line == f"weights equal: all {total(plan):,} elements of 12 leaves, 1.2 s"
    change(folder, "final_norm", lambda array: array.__setitem__(3, 2))
    bad = checked(plan, folder, CHOICES).to_json()
    assert summary({**bad, "seconds": 1.25}) == f"weights differ in 1 place: all {total(plan):,} elements of 12 leaves, 1.2 s"
    with pytest.raises(CheckError) as caught:
        raise_if_unequal({**bad, "weights": bad, "logits": None})
    value = make_text(plan)
    assert str(caught.value) == (
        f"{TITLE} (1 problem):\n"
        f"  final_norm[3] is 2 (0x4000), and should be {value}, from model.norm.weight\n"
        "  1 of 24 elements differ, within [3:4]; its checksum says that it was changed after it was written\n"
        "      no simple mistake gives what was found"
    )


def make_text(plan: Plan) -> str:
    """The value of model.norm.weight[3] as the report has it."""
    tensor = plan.source.tensors["model.norm.weight"]
    raw = int.from_bytes((Path(plan.source.root) / tensor.file).read_bytes()[tensor.offset + 6 :][:2], "little")
    value = np.array([raw << 16], np.uint32).view(np.float32)[0]
    return f"{float(value):.6g} (0x{raw:04x})"


def test_no_checkpoint_and_a_source_that_is_cut_off(tmp_path: Path) -> None:
    make_model(tmp_path / "source", "llama3_8b")
    plan = plan_of(tmp_path / "source", CHOICES)
    with pytest.raises(CheckError, match="nowhere cannot be read as a checkpoint"):
        checked(plan, tmp_path / "nowhere", CHOICES)
    folder = write(plan, tmp_path / "out")
    victim = Path(plan.source.root) / plan.source.tensors["lm_head.weight"].file
    victim.write_bytes(victim.read_bytes()[:-5])
    with pytest.raises(InputError, match="the source cannot be compared"):
        checked(plan, folder, CHOICES)


def test_the_index_says_which_of_two_files_has_a_tensor_and_what_was_left_out(tmp_path: Path) -> None:
    one, two = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 3), np.float32)
    save(tmp_path / "a.safetensors", {"w": one, "u": two}, {"v": "u", "format": "pt"})
    save(tmp_path / "b.safetensors", {"w": two, "x": one})
    files = ("a.safetensors", "b.safetensors")
    for home, array in (("a.safetensors", one), ("b.safetensors", two)):
        index = {"w": home, "u": "a.safetensors", "x": "b.safetensors"}
        save_index(tmp_path / "model.safetensors.index.json", index, {"y": "x", "total_size": 48})
        tensors = Tensors(str(tmp_path), files)
        assert np.array_equal(tensors.rows("w", 0, 2), array)
        assert np.array_equal(tensors.rows("v", 1, 2), two[1:])
        assert np.array_equal(tensors.rows("y", 0, 1), one[:1])
        assert "z" not in tensors and "format" not in tensors


def test_it_says_how_far_it_is(tmp_path: Path) -> None:
    make_model(tmp_path / "source", "llama3_8b")
    plan = plan_of(tmp_path / "source", CHOICES)
    folder = write(plan, tmp_path / "out")
    assert read_compared(str(tmp_path)) is None
    check(Request(str(folder), plan, CHOICES, 1, 64 << 20, None, 0, progress=str(tmp_path)))
    assert read_compared(str(tmp_path)) == (plan.target_bytes, plan.target_bytes)


def test_a_worker_that_dies_is_an_error_of_the_run() -> None:
    with pytest.raises(RunError, match=r"(?s)the check failed.*exited with code 3"):
        list(answers("os:_exit", [3, 3, 3], 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_goes_wrong_in_a_worker_comes_back(workers: int) -> None:
    with pytest.raises(RunError, match="TypeError"):
        list(answers("math:sqrt", ["a word", "another"], workers))


def test_the_limit_of_a_whole_check_is_per_worker() -> None:
    assert WHOLE_PER_WORKER == 16 << 30


def test_the_second_statement_shares_no_code_with_the_first() -> None:
    allowed = {"shardconv.errors", *(f"shardconv.verify.{name}" for name in SECOND), "shardconv.verify"}
    for name in SECOND:
        tree = ast.parse((ROOT / "shardconv" / "verify" / f"{name}.py").read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = [one for one in names if one.startswith("shardconv")]
            assert set(ours) <= allowed, f"{name} imports {ours}"
            others = {one.partition(".")[0] for one in names} - set(sys.stdlib_module_names) - {"shardconv"}
            assert others <= {"numpy", "ml_dtypes", "einops", "tensorstore"}, f"{name} imports {others}"
