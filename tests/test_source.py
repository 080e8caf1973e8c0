import json
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from pydantic import TypeAdapter
from stored import raw_file, save, save_index

from shardconv.boxes import whole
from shardconv.dtypes import dtype_of_code
from shardconv.errors import InputError
from shardconv.formats.reading import Reader
from shardconv.formats.writing import NewTensor, write_checkpoint
from shardconv.source import Source, SourceFile, StoredTensor, check_unchanged, open_source

INDEX = "model.safetensors.index.json"
GIVE = "give the directory that holds the weights"


def ones(*names: str) -> dict[str, np.ndarray]:
    return {name: np.ones(2, np.float32) for name in names}


def failure(path) -> tuple[str, str]:
    """The one problem of a path."""
    with pytest.raises(InputError) as caught:
        open_source(path)
    assert caught.value.title == f"{os.path.abspath(path)} cannot be read as a checkpoint"
    ((fact, remedy),) = [(p.fact, p.remedy) for p in caught.value.problems]
    return fact, remedy


def test_a_directory_with_one_file_and_a_config(tmp_path):
    save(tmp_path / "model.safetensors", ones("a", "b"), {"format": "pt", "tied": "a"})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    source = open_source(tmp_path)
    assert (source.root, source.format, source.config) == (str(tmp_path), "safetensors", {"model_type": "llama"})
    size = (tmp_path / "model.safetensors").stat().st_size
    assert source.tensors == {
        "a": StoredTensor("a", "model.safetensors", "F32", (2,), size - 16, 8),
        "b": StoredTensor("b", "model.safetensors", "F32", (2,), size - 8, 8),
        "tied": StoredTensor("tied", "model.safetensors", "F32", (2,), size - 16, 8),
    }
    (file,) = source.files.values()
    assert (file.name, file.size) == ("model.safetensors", size)
    assert source.total_bytes == 16
    assert source.notes == ()


@pytest.mark.parametrize("spell", [str, lambda path: path, os.path.relpath, lambda path: f"{path}/"])
def test_a_path_in_any_spelling_has_an_absolute_root(spell, tmp_path):
    save(tmp_path / "model.safetensors", ones("a"))
    assert open_source(spell(tmp_path)).root == str(tmp_path)


def test_a_single_file_by_its_path(tmp_path):
    save(tmp_path / "weights.safetensors", ones("a"))
    save(tmp_path / "model.safetensors", ones("b"))
    source = open_source(tmp_path / "weights.safetensors")
    assert (list(source.tensors), list(source.files), source.config) == (["a"], ["weights.safetensors"], None)
    assert source.notes == ()


def test_one_of_several_files_by_its_path_is_noted(tmp_path):
    save(tmp_path / "model-00001-of-00002.safetensors", ones("a"))
    save_index(tmp_path / INDEX, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    assert open_source(tmp_path / "model-00001-of-00002.safetensors").notes == (
        f"only model-00001-of-00002.safetensors is read, as asked; {INDEX} beside it describes "
        "a checkpoint in several files",
    )


def test_an_index_by_its_path_or_by_its_directory(tmp_path):
    save(tmp_path / "x.safetensors", ones("a"))
    save(tmp_path / "y.safetensors", ones("b"))
    save_index(tmp_path / "special.safetensors.index.json", {"a": "x.safetensors", "b": "y.safetensors"})
    source = open_source(tmp_path)
    assert {name: t.file for name, t in source.tensors.items()} == {"a": "x.safetensors", "b": "y.safetensors"}
    assert open_source(tmp_path / "special.safetensors.index.json") == source


def test_the_standard_index_comes_before_others(tmp_path):
    save(tmp_path / "x.safetensors", ones("a"))
    save_index(tmp_path / "consolidated.safetensors.index.json", {"b": "y.safetensors"})
    save_index(tmp_path / INDEX, {"a": "x.safetensors"})
    assert list(open_source(tmp_path).tensors) == ["a"]


def test_a_single_file_of_another_name_in_a_directory(tmp_path):
    save(tmp_path / "weights.safetensors", ones("a"))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert list(open_source(tmp_path).files) == ["weights.safetensors"]


def test_links_into_a_store_of_files_are_followed_and_keep_their_names(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save(tmp_path / "blobs" / "c0ffee", ones("a"))
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/c0ffee")
    source = open_source(tmp_path / "snapshot")
    assert (source.root, list(source.files)) == (str(tmp_path / "snapshot"), ["model.safetensors"])


def test_no_such_path_names_the_nearest(tmp_path):
    (tmp_path / "Llama-3.1-8B").mkdir()
    assert failure(tmp_path / "Llama-3.1-8b") == (
        f"{tmp_path}/Llama-3.1-8b does not exist",
        f"did you mean {tmp_path}/Llama-3.1-8B?",
    )
    assert failure(tmp_path / "zzz") == (f"{tmp_path}/zzz does not exist", f"check the path; {tmp_path} exists")
    assert failure(tmp_path / "org" / "model") == (
        f"{tmp_path}/org/model does not exist",
        "give a local path; to convert a model by its id, download it first",
    )


def test_an_empty_directory(tmp_path):
    assert failure(tmp_path) == (f"{tmp_path} is empty", GIVE)


def test_a_directory_without_a_checkpoint(tmp_path):
    for name in "config.json", "README.md":
        (tmp_path / name).write_text("{}")
    assert failure(tmp_path) == (f"{tmp_path} has neither .safetensors nor PyTorch files; it has README.md, config.json", GIVE)


def test_another_kind_of_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert failure(tmp_path / "model.gguf") == (
        "model.gguf is neither a .safetensors file, nor a PyTorch file, nor an index of such files",
        "give a directory, a .safetensors file, a .bin or .pth file, or an index",
    )


def test_several_files_without_an_index(tmp_path):
    for i in (1, 2):
        save(tmp_path / f"model-0000{i}-of-00002.safetensors", ones(str(i)))
    assert failure(tmp_path) == (
        f"{tmp_path} has 2 .safetensors files and no index: "
        "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors",
        f"download {INDEX} too, or give the path of one file",
    )


def test_several_indices_and_no_standard_one(tmp_path):
    for name in "ab":
        save_index(tmp_path / f"{name}.safetensors.index.json", {"a": "x.safetensors"})
    assert failure(tmp_path) == (
        f"{tmp_path} has 2 indices and none is {INDEX}: a.safetensors.index.json, b.safetensors.index.json",
        "give the path of one of them",
    )


def test_an_index_or_config_that_cannot_be_read(tmp_path):
    (tmp_path / INDEX).mkdir()
    assert failure(tmp_path) == (f"{INDEX} cannot be read: Is a directory", "check that it is a file that you may read")
    (tmp_path / INDEX).rmdir()
    save(tmp_path / "model.safetensors", ones("a"))
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    assert failure(tmp_path) == ("config.json has the key a twice", "download this file again")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", INDEX, "config.json"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    save(tmp_path / "weights.safetensors", ones("a"))
    os.mkfifo(tmp_path / name)
    path = tmp_path / "weights.safetensors" if name == "config.json" else tmp_path / name
    assert failure(path) == (f"{name} is a pipe, a socket or a device, not a file", "put it on a disk first")


def test_the_report_over_several_files_as_a_user_sees_it(tmp_path):
    save(tmp_path / "x.safetensors", ones("a"))
    size = (tmp_path / "x.safetensors").stat().st_size
    os.truncate(tmp_path / "x.safetensors", size - 5)
    (tmp_path / "y.safetensors").write_bytes(
        raw_file({"b": {"dtype": "f32", "shape": [], "data_offsets": [0, 4]}}, bytes(4))
    )
    save_index(tmp_path / INDEX, {"a": "x.safetensors", "b": "y.safetensors", "c": "z.safetensors"})
    with pytest.raises(InputError) as caught:
        open_source(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} cannot be read as a checkpoint (3 problems):\n"
        "  1 of the 3 files that model.safetensors.index.json names are missing: z.safetensors\n"
        "      download them; a file may still be on its way\n"
        f"  x.safetensors is truncated: its header declares data through byte {size}, "
        f"but the file has {size - 5} (5 short)\n"
        "      download this file again\n"
        "  y.safetensors: tensor b has dtype f32; safetensors spells it F32\n"
        "      write this file again with the safetensors library"
    )


def test_the_fingerprint_is_of_names_sizes_and_headers(tmp_path):
    for name in "one", "two":
        (tmp_path / name).mkdir()
        save(tmp_path / name / "model.safetensors", ones("a", "b"))
    os.utime(tmp_path / "two" / "model.safetensors", (1, 1))
    first = open_source(tmp_path / "one").fingerprint()
    assert open_source(tmp_path / "two").fingerprint() == first
    save(tmp_path / "two" / "model.safetensors", ones("a", "c"))
    assert open_source(tmp_path / "two").fingerprint() != first
    save(tmp_path / "two" / "model.safetensors", {**ones("a"), "b": np.ones(3, np.float32)})
    assert open_source(tmp_path / "two").fingerprint() != first
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "one" / "b.safetensors")
    assert open_source(tmp_path / "one").fingerprint() != first


def test_a_fingerprint_depends_on_sizes_and_not_on_order():
    def fingerprint(*files):
        return Source("/x", "safetensors", {}, {f.name: f for f in files}, None, ()).fingerprint()

    a, b = SourceFile("a", 1, 2, "d"), SourceFile("b", 1, 2, "d")
    assert fingerprint(a, b) == fingerprint(b, a)
    assert fingerprint(a) == fingerprint(SourceFile("a", 1, 77, "d"))
    assert len({fingerprint(f) for f in (a, b, SourceFile("a", 3, 2, "d"), SourceFile("a", 1, 2, "e"))}) == 4


def changes(source) -> list[tuple[str, str]]:
    return [(p.fact, p.remedy) for p in check_unchanged(source)]


def test_what_changed_between_planning_and_running(tmp_path):
    for name in "abcde":
        save(tmp_path / f"{name}.safetensors", ones(name))
    save_index(tmp_path / INDEX, {name: f"{name}.safetensors" for name in "abcde"})
    source = open_source(tmp_path)
    assert changes(source) == []
    size = (tmp_path / "a.safetensors").stat().st_size
    os.truncate(tmp_path / "a.safetensors", size - 1)
    (tmp_path / "b.safetensors").unlink()
    save(tmp_path / "c.safetensors", ones("x"))
    os.utime(tmp_path / "d.safetensors", (1, 1))
    os.utime(tmp_path / "c.safetensors", (1, 1))
    assert changes(source) == [
        (f"a.safetensors changed since it was planned: it had {size} bytes and has {size - 1}", "plan again"),
        ("b.safetensors cannot be read any more: No such file or directory", "put it back, or plan again"),
        ("c.safetensors changed since it was planned: its header is another one", "plan again"),
        (
            "d.safetensors changed since it was planned: it was written to; its size and header are the same",
            "plan again",
        ),
    ]


def test_a_source_goes_through_json_and_pickle(tmp_path):
    save(tmp_path / "model.safetensors", ones("a", "b"), {"tied": "a"})
    (tmp_path / "config.json").write_text(json.dumps({"rope": {"factor": 8.0}, "tie": None, "eos": [1, 2]}))
    source = open_source(tmp_path)
    assert pickle.loads(pickle.dumps(source)) == source
    adapter = TypeAdapter(Source)
    assert adapter.validate_json(adapter.dump_json(source)) == source


def test_what_the_writer_wrote_is_opened_and_read_back(tmp_path):
    data = {f"layers.{i}": np.random.default_rng(i).integers(0, 256, (7, 5), np.uint8) for i in range(6)}
    tensors = [NewTensor(name, "U8", array.shape) for name, array in data.items()]
    names = write_checkpoint(
        tmp_path, tensors, lambda t: [data[t.name].tobytes()], max_file_bytes=80, metadata={"format": "pt"}
    )
    source = open_source(tmp_path)
    assert list(source.files) == names
    assert source.total_bytes == 6 * 35
    assert source.notes == ()
    with Reader(source.root, coalesce_gap=0) as reader:
        for name, tensor in source.tensors.items():
            out = np.empty(tensor.shape, dtype_of_code(tensor.dtype).numpy)
            reader.read(tensor, whole(tensor.shape), out)
            np.testing.assert_array_equal(out, data[name])


def test_a_mixture_of_experts_opens_in_seconds(tmp_path):
    tensors = [
        NewTensor(f"model.layers.{layer}.mlp.experts.{expert}.{name}", "F8_E4M3", (2048, 7168))
        for layer in range(60)
        for expert in range(256)
        for name in ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    ]
    names = write_checkpoint(tmp_path, tensors, None, max_file_bytes=5 << 30, metadata={})
    start = time.perf_counter()
    source = open_source(tmp_path)
    # 0.4 s on an idle machine; ten times that is a loop that grew a square
    assert time.perf_counter() - start < 4
    assert (len(source.tensors), len(source.files)) == (46_080, len(names))
    assert source.total_bytes == 46_080 * 2048 * 7168


def test_opening_and_reading_import_nothing_heavy():
    code = (
        "import sys, shardconv.source, shardconv.formats.reading, shardconv.formats.writing\n"
        "print(*{'torch', 'jax', 'ray', 'tensorstore', 'safetensors', 'orbax'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
