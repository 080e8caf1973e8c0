"""Every case of an index that disagrees with its files, by way of `open_source` on real files."""

import json

import numpy as np
import pytest
from stored import raw_file, save, save_index

from shardconv.errors import InputError
from shardconv.formats.index import parse_index
from shardconv.source import open_source

INDEX = "model.safetensors.index.json"
FIRST, SECOND, THIRD = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
REVISION = "download the index and its files again, all from one revision"


def ones(*names: str) -> dict[str, np.ndarray]:
    return {name: np.ones(2, np.float32) for name in names}


@pytest.fixture
def checkpoint(tmp_path):
    """Three files with a, b; c; d. Their index is written by the test."""
    save(tmp_path / FIRST, ones("a", "b"))
    save(tmp_path / SECOND, ones("c"))
    save(tmp_path / THIRD, ones("d"))
    return tmp_path


def full_map() -> dict[str, str]:
    return {"a": FIRST, "b": FIRST, "c": SECOND, "d": THIRD}


def problems(path) -> list[tuple[str, str]]:
    with pytest.raises(InputError) as caught:
        open_source(path)
    assert caught.value.title == f"{path} cannot be read as a checkpoint"
    return [(p.fact, p.remedy) for p in caught.value.problems]


def test_a_good_index_with_metadata_and_without(checkpoint):
    save_index(checkpoint / INDEX, full_map(), {"total_size": 32, "total_parameters": 8})
    source = open_source(checkpoint)
    assert {name: t.file for name, t in source.tensors.items()} == full_map()
    assert source.notes == ()
    save_index(checkpoint / INDEX, full_map())
    assert open_source(checkpoint) == source


def test_a_tensor_the_index_leaves_out_is_noted_and_left_unused(checkpoint):
    save_index(checkpoint / INDEX, {"a": FIRST, "c": SECOND, "d": THIRD})
    source = open_source(checkpoint)
    assert sorted(source.tensors) == ["a", "c", "d"]
    assert source.notes == (f"{INDEX} does not name 1 tensor of {FIRST}, left unused: b",)


def test_a_tensor_mapped_to_the_wrong_file_is_an_error_with_both_files(checkpoint):
    save_index(checkpoint / INDEX, full_map() | {"a": SECOND})
    assert problems(checkpoint) == [
        (f"{INDEX} maps 1 tensor to {SECOND}, but it is in {FIRST}: a", REVISION),
    ]


def test_tensors_of_one_fate_share_a_message(checkpoint):
    save(checkpoint / FIRST, ones(*"abefghij"))
    save_index(checkpoint / INDEX, full_map() | dict.fromkeys("efghij", SECOND) | dict.fromkeys("xyz", THIRD))
    assert problems(checkpoint) == [
        (f"{INDEX} maps 6 tensors to {SECOND}, but they are in {FIRST}: e, f, g, h, i and 1 more", REVISION),
        (f"{INDEX} maps 3 tensors to {THIRD}, but no file has them: x, y, z", REVISION),
    ]


def test_a_tensor_that_no_file_has_is_an_error(checkpoint):
    save_index(checkpoint / INDEX, full_map() | {"lm_head.weight": THIRD})
    assert problems(checkpoint) == [
        (f"{INDEX} maps 1 tensor to {THIRD}, but no file has it: lm_head.weight", REVISION),
    ]


def test_a_prediction_layer_that_no_file_has_is_noted(checkpoint):
    extra = {"mtp.fc.weight": THIRD, "model.layers.4.eh_proj.weight": THIRD}
    save_index(checkpoint / INDEX, full_map() | extra, {"total_size": 48})
    (checkpoint / "config.json").write_text('{"text_config": {"num_hidden_layers": 4}}')
    source = open_source(checkpoint)
    assert sorted(source.tensors) == ["a", "b", "c", "d"]
    assert source.notes == (
        f"{INDEX} maps 2 tensors to {THIRD}, but no file has them: mtp.fc.weight, model.layers.4.eh_proj.weight",
    )


def test_a_layer_below_the_last_may_not_be_missing(checkpoint):
    extra = {"model.layers.3.eh_proj.weight": THIRD, "vision.layers.9.w": THIRD}
    save_index(checkpoint / INDEX, full_map() | extra)
    (checkpoint / "config.json").write_text('{"num_hidden_layers": 4}')
    assert [fact for fact, _ in problems(checkpoint)] == [
        f"{INDEX} maps 2 tensors to {THIRD}, but no file has them: model.layers.3.eh_proj.weight, vision.layers.9.w"
    ]


def test_a_stale_duplicate_in_a_later_file_is_noted_and_the_index_wins(checkpoint):
    save(checkpoint / THIRD, ones("d") | {"a": np.zeros(7, np.float16)})
    save_index(checkpoint / INDEX, full_map())
    source = open_source(checkpoint)
    assert (source.tensors["a"].file, source.tensors["a"].shape) == (FIRST, (2,))
    assert source.notes == (
        f"{INDEX} maps 1 tensor to {FIRST}, so what has the same name in {THIRD} is left unused: a",
    )


def test_duplicates_in_several_files_are_noted_in_their_order(checkpoint):
    for name, key in (SECOND, "c"), (THIRD, "d"):
        save(checkpoint / name, ones(key, "a", "new"))
    save_index(checkpoint / INDEX, full_map())
    assert open_source(checkpoint).notes == (
        f"{INDEX} maps 1 tensor to {FIRST}, so what has the same name in {SECOND} and {THIRD} is left unused: a",
        f"{INDEX} does not name 1 tensor of {SECOND} and {THIRD}, left unused: new",
    )


def test_missing_files_are_named_all_at_once(checkpoint):
    (checkpoint / FIRST).unlink()
    (checkpoint / THIRD).unlink()
    save_index(checkpoint / INDEX, full_map())
    assert problems(checkpoint) == [
        (
            f"2 of the 3 files that {INDEX} names are missing: {FIRST}, {THIRD}",
            "download them; a file may still be on its way",
        ),
    ]


def test_a_wrong_total_size_is_noted(checkpoint):
    save_index(checkpoint / INDEX, full_map(), {"total_size": 31})
    assert open_source(checkpoint).notes == (f"{INDEX} says total_size 31, but its tensors have 32 bytes",)


def test_a_stray_single_file_is_noted_and_the_index_wins(checkpoint):
    save(checkpoint / "model.safetensors", {"a": np.zeros(9, np.int8)})
    save_index(checkpoint / INDEX, full_map())
    source = open_source(checkpoint)
    assert source.tensors["a"].file == FIRST
    assert source.notes == (f"model.safetensors is left unread, since {INDEX} does not name it",)


def test_an_index_may_name_the_single_file(tmp_path):
    save(tmp_path / "model.safetensors", ones("a"))
    save_index(tmp_path / INDEX, {"a": "model.safetensors"})
    assert open_source(tmp_path).notes == ()


def test_a_tensor_that_the_index_calls_an_alias_and_a_file_has_is_noted(checkpoint):
    save(checkpoint / SECOND, ones("c", "head"))
    save_index(checkpoint / INDEX, full_map(), {"head": "a"})
    source = open_source(checkpoint)
    assert source.tensors["head"].file == FIRST
    assert source.notes == (f"{INDEX} does not name 1 tensor of {SECOND}, left unused: head",)


def test_nothing_else_in_the_directory_is_opened(checkpoint):
    for name in ("consolidated.safetensors", "model-00004-of-00003.safetensors", "consolidated.00.pth"):
        (checkpoint / name).write_bytes(b"not a checkpoint")
    (checkpoint / "original").mkdir()
    save_index(checkpoint / INDEX, full_map())
    source = open_source(checkpoint)
    assert sorted(source.files) == [FIRST, SECOND, THIRD]
    assert source.notes == ()


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b", "..", "", "x\0y"]
)
def test_a_file_name_that_leaves_the_directory_is_refused(name, tmp_path):
    save_index(tmp_path / INDEX, {"a": name})
    assert problems(tmp_path) == [
        (
            f"{INDEX} maps tensors to {name!r}, which is not the name of a file in the same directory",
            "an index may only name files beside it; do not trust this one",
        )
    ]


def test_a_file_that_would_be_there_is_not_opened_through_a_path(checkpoint):
    (checkpoint / "sub").mkdir()
    save_index(checkpoint / "sub" / INDEX, {"a": f"../{FIRST}"})
    assert len(problems(checkpoint / "sub")) == 1


def test_an_index_of_bin_files_is_refused(tmp_path):
    save_index(tmp_path / INDEX, {"a": "pytorch_model-00001-of-00002.bin"})
    assert problems(tmp_path) == [
        (
            f"{INDEX} maps tensors to pytorch_model-00001-of-00002.bin, which is not a .safetensors file",
            "give the index of the .safetensors files",
        )
    ]


@pytest.mark.parametrize("parsed", [{}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": {"a": 3}}])
def test_an_index_without_a_weight_map(parsed, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps(parsed))
    assert problems(tmp_path) == [(f"{INDEX} has no weight_map from tensors to files", "download this file again")]


INVALID = {
    b"\xff": "is not UTF-8 text at byte 0",
    b'{"weight_map": ': "is not JSON: Expecting value at byte 15",
    b"[]": "is JSON, but not an object",
    b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}': "has the key a twice",
}


@pytest.mark.parametrize("raw", INVALID)
def test_an_index_that_is_not_json(raw, tmp_path):
    (tmp_path / INDEX).write_bytes(raw)
    assert problems(tmp_path) == [(f"{INDEX} {INVALID[raw]}", "download this file again")]


def test_an_empty_tensor_name(checkpoint):
    save_index(checkpoint / INDEX, full_map() | {"": FIRST})
    assert problems(checkpoint) == [(f"{INDEX}: a tensor's name is empty", "download this file again")]


def test_problems_of_all_files_come_together(checkpoint):
    (checkpoint / FIRST).write_bytes((checkpoint / FIRST).read_bytes()[:-3])
    (checkpoint / SECOND).unlink()
    save(checkpoint / THIRD, ones("e"))
    save_index(checkpoint / INDEX, full_map())
    (checkpoint / "config.json").write_text("{")
    size = (checkpoint / FIRST).stat().st_size
    assert [fact for fact, _ in problems(checkpoint)] == [
        f"1 of the 3 files that {INDEX} names are missing: {SECOND}",
        f"{FIRST} is truncated: its header declares data through byte {size + 3}, but the file has {size} (3 short)",
        "config.json is not JSON: Expecting property name enclosed in double quotes at byte 1",
        f"{INDEX} maps 1 tensor to {THIRD}, but no file has it: d",
    ]


def test_aliases_stand_in_the_index_of_several_files_or_in_the_files(checkpoint):
    save(checkpoint / SECOND, ones("c"), {"format": "pt", "c.again": "c"})
    save_index(checkpoint / INDEX, full_map(), {"total_size": 32, "head": "a", "note": "no tensor"})
    source = open_source(checkpoint)
    assert sorted(source.tensors) == ["a", "b", "c", "c.again", "d", "head"]
    head, a = source.tensors["head"], source.tensors["a"]
    assert (head.name, head.file, head.offset, head.nbytes) == ("head", a.file, a.offset, a.nbytes)
    assert source.total_bytes == 32
    assert source.notes == ()


def test_an_alias_that_was_written_out_in_another_file_is_that_tensor(checkpoint):
    save(checkpoint / FIRST, ones("a", "b"), {"d": "a"})
    save_index(checkpoint / INDEX, full_map())
    assert open_source(checkpoint).tensors["d"].file == THIRD


def test_a_large_total_size_is_exact(tmp_path):
    raw = json.dumps({"metadata": {"total_size": 2**62 + 1}, "weight_map": {"a": "x.safetensors"}}).encode()
    assert parse_index(INDEX, raw).total_size == 2**62 + 1
    assert parse_index(INDEX, raw.replace(b"4611686018427387905", b'"lots"')).total_size is None


def test_a_shard_with_no_tensors_is_no_problem(checkpoint):
    (checkpoint / THIRD).write_bytes(raw_file({}))
    save_index(checkpoint / INDEX, {"a": FIRST, "b": FIRST, "c": SECOND, "mtp.w": THIRD})
    assert sorted(open_source(checkpoint).tensors) == ["a", "b", "c"]
