import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save
from stored import random_array

from shardconv.dtypes import DTYPES
from shardconv.formats.writing import NewTensor, split, write_checkpoint, write_file

# Types that NumPy has by itself, which is what the library can save from it.
NUMPY = ["BOOL", "U8", "I8", "I16", "U16", "F16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"]

GOLDEN = (
    b"\x90\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},'
    b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"a":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}}'
    b"       \x00\x00\x80\x3f\x01\x02\x03"
)


def test_golden_bytes(tmp_path):
    data = {"a": [b"\x01\x02", memoryview(b"\x03")], "b": [b"\x00\x00\x80\x3f"]}
    tensors = [NewTensor("a", "U8", (3,)), NewTensor("b", "F32", (1,))]
    write_file(tmp_path / "x.safetensors", tensors, lambda t: data[t.name], metadata={"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == GOLDEN
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_same_bytes_as_the_library_writes(tmp_path):
    arrays = {}
    for i, code in enumerate(NUMPY):
        arrays[f"z{i}.é"] = random_array(code, (3, i + 1), i)
        arrays[f"a{i}"] = random_array(code, (), i + 100)
        arrays[f"zero{i}"] = random_array(code, (0, 2), 0)
    codes = {dtype.numpy: dtype.code for dtype in DTYPES}
    tensors = [NewTensor(name, codes[a.dtype], a.shape) for name, a in arrays.items()]
    write_file(tmp_path / "x", tensors, lambda t: [arrays[t.name].tobytes()], metadata={"format": "np"})
    assert (tmp_path / "x").read_bytes() == save(arrays, {"format": "np"})


def test_the_library_reads_every_dtypes_header(tmp_path):
    tensors = [NewTensor(d.code, d.code, (4, 16)) for d in DTYPES]
    write_file(tmp_path / "x", tensors, None, metadata={})
    with safe_open(tmp_path / "x", "numpy") as file:
        slices = {name: file.get_slice(name) for name in list(file.keys())}
        assert {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()} == {
            d.code: (d.code, [4, 16]) for d in DTYPES
        }
        assert file.metadata() is None


def test_blocks_of_the_wrong_length_are_refused_and_leave_no_file(tmp_path):
    tensor = NewTensor("a.weight", "F32", (2, 3))
    with pytest.raises(ValueError, match=r"^a\.weight has 24 bytes, but its blocks have 25$"):
        write_file(tmp_path / "x.safetensors", [tensor], lambda _: [bytes(20), bytes(5)], metadata={})
    assert not (tmp_path / "x.safetensors").exists()


def test_a_sparse_file_has_its_length_and_takes_no_space(tmp_path):
    write_checkpoint(
        tmp_path,
        [NewTensor("a", "BF16", (1 << 20, 1 << 12)), NewTensor("b", "F4", (3, 2))],
        None,
        max_file_bytes=1 << 40,
        metadata={},
    )
    stat = (tmp_path / "model.safetensors").stat()
    with open(tmp_path / "model.safetensors", "rb") as file:
        assert stat.st_size == 8 + int.from_bytes(file.read(8), "little") + 2 * (1 << 32) + 3
    assert stat.st_blocks * 512 < 1 << 16


def test_several_files_and_their_index(tmp_path):
    shapes = {"a": (4,), "b": (8,), "c": (1,), "d": (2, 2)}
    arrays = {name: random_array("F32", shape, i) for i, (name, shape) in enumerate(shapes.items())}
    tensors = [NewTensor(name, "F32", shape) for name, shape in shapes.items()]
    names = write_checkpoint(
        tmp_path, tensors, lambda t: [arrays[t.name].tobytes()], max_file_bytes=20, metadata={"format": "pt"}
    )
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 68},
        "weight_map": {"a": names[0], "b": names[1], "c": names[2], "d": names[2]},
    }
    loaded = {}
    for name in names:
        loaded |= load_file(tmp_path / name)
    assert {name: a.tobytes() for name, a in loaded.items()} == {name: a.tobytes() for name, a in arrays.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]


def test_one_file_has_no_index(tmp_path):
    assert write_checkpoint(tmp_path, [NewTensor("a", "F32", (4,))], None, max_file_bytes=16, metadata={}) == [
        "model.safetensors"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 40))
def test_files_are_as_full_as_order_allows(sizes, limit):
    tensors = [NewTensor(str(i), "U8", (n,)) for i, n in enumerate(sizes)]
    files = split(tensors, max_file_bytes=limit)
    assert [t for file in files for t in file] == tensors
    assert all(files) or not tensors
    totals = [sum(t.nbytes for t in file) for file in files]
    assert all(total <= limit or len(file) == 1 for total, file in zip(totals, files, strict=True))
    for total, following in zip(totals, files[1:], strict=False):
        assert total + following[0].nbytes > limit
