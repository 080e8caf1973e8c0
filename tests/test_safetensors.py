import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from stored import entry, file_of, random_array, raw_file

from shardconv.dtypes import DTYPES
from shardconv.errors import InputError
from shardconv.formats.safetensors import read_header

FILE = "m.safetensors"
AGAIN = "download this file again"
REWRITE = "write this file again with the safetensors library"
F32 = entry("F32", [2], 0, 8)
KNOWN = "the dtypes of safetensors are " + " ".join(d.code for d in DTYPES)
LONG = "[" + "1, " * 18 + "1,..."


def one(**fields):
    """A file of one tensor `a`, F32 [2], some fields replaced, or left out when None."""
    info = {key: value for key, value in (F32 | fields).items() if value is not None}
    return raw_file({"a": info}, bytes(8))


def two(a, b, size):
    """A file of tensors `a` and `b` and `size` bytes of data; the data begins at byte 200."""
    return raw_file(json.dumps({"a": a, "b": b}).encode().ljust(192), bytes(size))


def text(header):
    return raw_file(header, bytes(8))


# name: (file, fact, remedy)
REJECTED = {
    "no bytes": (b"", f"{FILE} is truncated: its header's length ends at byte 8, but the file has 0 (8 short)", AGAIN),
    "under 8 bytes": (
        b"12345",
        f"{FILE} is truncated: its header's length ends at byte 8, but the file has 5 (3 short)",
        AGAIN,
    ),
    "n over the limit": (
        (100_000_001).to_bytes(8, "little") + b"{}",
        f"{FILE} is not a safetensors file: its header would have 100000001 bytes, over 100000000",
        AGAIN,
    ),
    "not safetensors at all": (
        b"<!DOCTYPE html>",
        f"{FILE} is not a safetensors file: its header would have 5789751444030890300 bytes, over 100000000",
        AGAIN,
    ),
    "a git lfs pointer": (
        b"version https://git-lfs.example/spec/v1\noid sha256:00\n",
        f"{FILE} is a Git LFS pointer, not the weights",
        "fetch them: git lfs pull",
    ),
    "n over the file": (
        (40).to_bytes(8, "little") + b"{}",
        f"{FILE} is truncated: its header ends at byte 48, but the file has 10 (38 short)",
        AGAIN,
    ),
    "n over the file by less than its own 8 bytes": (
        (4).to_bytes(8, "little") + b"{}",
        f"{FILE} is truncated: its header ends at byte 12, but the file has 10 (2 short)",
        AGAIN,
    ),
    "not UTF-8": (text(b'{"\xff": 1}'), f"{FILE}: its header is not UTF-8 text at byte 10", AGAIN),
    "no header": (raw_file(b""), f"{FILE}: its header is not JSON: Expecting value at byte 8", AGAIN),
    "not JSON": (text(b'{"\xc3\xa9": }'), f"{FILE}: its header is not JSON: Expecting value at byte 15", AGAIN),
    "not an object": (raw_file([]), f"{FILE}: its header is JSON, but not an object", AGAIN),
    "junk behind the JSON": (raw_file(b"{}x"), f"{FILE}: its header is not JSON: Extra data at byte 10", AGAIN),
    "a NUL behind the JSON": (raw_file(b"{}\0"), f"{FILE}: its header is not JSON: Extra data at byte 10", AGAIN),
    "NaN": (
        text(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
        f"{FILE}: its header is not JSON: NaN is not a JSON number",
        AGAIN,
    ),
    "nested without end": (
        text(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        f"{FILE}: its header is not JSON: it is nested too deep",
        AGAIN,
    ),
    "half a surrogate pair": (
        text(b'{"a\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        f"{FILE}: its header has half of a surrogate pair in a string",
        AGAIN,
    ),
    "unknown dtype": (one(dtype="F7"), f'{FILE}: tensor a has dtype "F7", which is unknown', KNOWN),
    "dtype not a string": (one(dtype=["F32"]), f'{FILE}: tensor a has dtype ["F32"], which is unknown', KNOWN),
    "lower-case dtype": (one(dtype="bf16"), f"{FILE}: tensor a has dtype bf16; safetensors spells it BF16", REWRITE),
    "no dtype": (one(dtype=None), f"{FILE}: tensor a has no dtype in the header", AGAIN),
    "no shape": (one(shape=None), f"{FILE}: tensor a has no shape in the header", AGAIN),
    "no offsets and no shape": (
        one(data_offsets=None, shape=None),
        f"{FILE}: tensor a has no shape, no data_offsets in the header",
        AGAIN,
    ),
    "entry not an object": (text(b'{"a": 3}'), f"{FILE}: tensor a is 3 in the header, not an object", AGAIN),
    "negative dim": (
        one(shape=[-2]),
        f"{FILE}: tensor a has shape [-2]; a shape is a list of integers from 0 up",
        AGAIN,
    ),
    "float dim": (
        one(shape=[2.0]),
        f"{FILE}: tensor a has shape [2.0]; a shape is a list of integers from 0 up",
        AGAIN,
    ),
    "bool dim": (
        one(shape=[True, 2]),
        f"{FILE}: tensor a has shape [true, 2]; a shape is a list of integers from 0 up",
        AGAIN,
    ),
    "shape not a list": (one(shape=2), f"{FILE}: tensor a has shape 2; a shape is a list of integers from 0 up", AGAIN),
    "a long shape is cut": (
        one(shape=[1] * 40 + [-1]),
        f"{FILE}: tensor a has shape {LONG}; a shape is a list of integers from 0 up",
        AGAIN,
    ),
    "shape overflows": (
        one(shape=[2**32, 2**32]),
        f"{FILE}: tensor a has shape [4294967296, 4294967296], and F32 of this shape overflows 64 bits",
        AGAIN,
    ),
    "shape overflows before a zero": (
        one(shape=[2**62, 4, 0]),
        f"{FILE}: tensor a has shape [4611686018427387904, 4, 0], and F32 of this shape overflows 64 bits",
        AGAIN,
    ),
    "three offsets": (
        one(data_offsets=[0, 8, 9]),
        f"{FILE}: tensor a has data_offsets [0, 8, 9]; they are two integers from 0 up",
        AGAIN,
    ),
    "negative offset": (
        one(data_offsets=[-8, 0]),
        f"{FILE}: tensor a has data_offsets [-8, 0]; they are two integers from 0 up",
        AGAIN,
    ),
    "end before begin": (
        one(data_offsets=[8, 0]),
        f"{FILE}: tensor a has data_offsets [8, 0], which end before they begin",
        AGAIN,
    ),
    "hole at the start": (
        two(entry("F32", [2], 8, 16), entry("F32", [2], 16, 24), 24),
        f"{FILE}: bytes 200 to 208, before tensor a, belong to no tensor",
        REWRITE,
    ),
    "hole between": (
        two(F32, entry("F32", [2], 12, 20), 20),
        f"{FILE}: bytes 208 to 212, before tensor b, belong to no tensor",
        REWRITE,
    ),
    "overlap": (
        two(F32, entry("F32", [2], 4, 12), 12),
        f"{FILE}: tensor b begins at byte 204, inside a (bytes 200 to 208)",
        REWRITE,
    ),
    "a zero-size tensor inside another": (
        two(F32, entry("F32", [0], 4, 4), 8),
        f"{FILE}: tensor b begins at byte 204, inside a (bytes 200 to 208)",
        REWRITE,
    ),
    "the same start": (
        two(F32, entry("F32", [1], 0, 4), 8),
        f"{FILE}: tensor a begins at byte 200, inside b (bytes 200 to 204)",
        REWRITE,
    ),
    "two names on one range": (two(F32, F32, 8), f"{FILE}: tensors a and b share bytes 200 to 208", REWRITE),
    "size is not the shape's": (
        one(shape=[3]),
        f"{FILE}: tensor a is F32 [3], 12 bytes, but its data_offsets [0, 8] hold 8",
        AGAIN,
    ),
    "sub-byte, not whole bytes": (
        one(dtype="F4", shape=[3], data_offsets=[0, 2]),
        f"{FILE}: tensor a is F4 [3], 12 bits, which is not a whole number of bytes",
        REWRITE,
    ),
    "six bits, not whole bytes": (
        one(dtype="F6_E3M2", shape=[2], data_offsets=[0, 2]),
        f"{FILE}: tensor a is F6_E3M2 [2], 12 bits, which is not a whole number of bytes",
        REWRITE,
    ),
    "truncated data": (
        two(F32, entry("F32", [2], 8, 16), 15),
        f"{FILE} is truncated: its header declares data through byte 216, but the file has 215 (1 short)",
        AGAIN,
    ),
    "trailing bytes": (
        two(F32, entry("F32", [2], 8, 16), 19),
        f"{FILE} is too long: its header declares data through byte 216, but the file has 219 (3 more)",
        AGAIN,
    ),
    "metadata with a number": (
        raw_file({"__metadata__": {"epoch": 3}}),
        f"{FILE}: __metadata__ has 3 for epoch; its values are strings",
        REWRITE,
    ),
    "metadata not an object": (
        raw_file({"__metadata__": "pt"}),
        f'{FILE}: __metadata__ is "pt", not an object',
        REWRITE,
    ),
    "a tensor twice": (
        text(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        ),
        f"{FILE}: its header has the key a twice",
        AGAIN,
    ),
    "a field twice": (
        text(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        f"{FILE}: its header has the key dtype twice",
        AGAIN,
    ),
    "empty name": (raw_file({"": F32}, bytes(8)), f"{FILE}: a tensor's name is empty", REWRITE),
}
# What the library lets pass, and nobody can use.
OURS_ALONE = {"a tensor twice", "empty name"}


def rejection(tmp_path, content) -> InputError:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(str(tmp_path), FILE)
    return caught.value


@pytest.mark.parametrize("case", REJECTED)
def test_rejected_with_file_tensor_numbers_and_remedy(case, tmp_path):
    content, fact, remedy = REJECTED[case]
    problems = rejection(tmp_path, content).problems
    assert [(p.fact, p.remedy) for p in problems] == [(fact, remedy)]


@pytest.mark.parametrize("case", sorted(REJECTED.keys() - OURS_ALONE))
def test_the_library_rejects_it_too(case, tmp_path):
    (tmp_path / FILE).write_bytes(REJECTED[case][0])
    with (
        pytest.raises(Exception, match=r"header|offset|metadata|size|slice|overflow|tensor"),
        safe_open(tmp_path / FILE, "numpy"),
    ):
        pass


@pytest.mark.parametrize("case", sorted(OURS_ALONE))
def test_the_library_lets_it_pass(case, tmp_path):
    (tmp_path / FILE).write_bytes(REJECTED[case][0])
    with safe_open(tmp_path / FILE, "numpy") as file:
        assert len(file.keys()) == 1


def test_the_report_as_a_user_sees_it(tmp_path):
    error = rejection(tmp_path, two(entry("f32", [2], 0, 8), entry("F32", [-1], 8, 16), 16))
    assert str(error) == (
        "m.safetensors cannot be read (2 problems):\n"
        "  m.safetensors: tensor a has dtype f32; safetensors spells it F32\n"
        "      write this file again with the safetensors library\n"
        "  m.safetensors: tensor b has shape [-1]; a shape is a list of integers from 0 up\n"
        "      download this file again"
    )


def test_hundreds_of_equal_problems_are_summed_up(tmp_path):
    header = {f"t{i:03}": entry("f32", [2], 8 * i, 8 * i + 8) for i in range(300)}
    facts = [p.fact for p in rejection(tmp_path, raw_file(header, bytes(2400))).problems]
    assert facts[0] == f"{FILE}: tensor t000 has dtype f32; safetensors spells it F32"
    assert facts[8:] == [f"{FILE}: 292 more problems like these"]


def test_three_names_on_one_range_and_a_hole_are_all_said(tmp_path):
    header = {"a": F32, "b": F32, "c": F32, "d": entry("F32", [1], 12, 16)}
    start = len(raw_file(header))
    assert [p.fact for p in rejection(tmp_path, raw_file(header, bytes(16))).problems] == [
        f"{FILE}: tensors a and b share bytes {start} to {start + 8}",
        f"{FILE}: tensors b and c share bytes {start} to {start + 8}",
        f"{FILE}: bytes {start + 8} to {start + 12}, before tensor d, belong to no tensor",
    ]


def test_a_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "dir.safetensors").mkdir()
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError) as caught:
        read_header(str(tmp_path), "dir.safetensors")
    assert [(p.fact, p.remedy) for p in caught.value.problems] == [
        ("dir.safetensors cannot be read: Is a directory", "check that it is a file that you may read")
    ]
    with pytest.raises(InputError) as caught:
        read_header(str(tmp_path), "dangling.safetensors")
    assert [(p.fact, p.remedy) for p in caught.value.problems] == [
        ("dangling.safetensors cannot be read: No such file or directory", AGAIN)
    ]


def padded(before, after=b"", **headers):
    return before + json.dumps(headers or {"a": F32}).encode() + after


ACCEPTED = {
    "no tensors": raw_file({}),
    "leading whitespace": text(padded(b" \n\t\r")),
    "trailing whitespace": text(padded(b"", b"\n \t ")),
    "unaligned header": text(padded(b"", b" " * (7 - len(padded(b"")) % 8))),
    "any order of keys": raw_file({"b": entry("F32", [2], 8, 16), "a": F32}, bytes(16)),
    "unaligned tensors": raw_file({"a": entry("U8", [3], 0, 3), "b": entry("F64", [1], 3, 11)}, bytes(11)),
    "fields of its own": raw_file({"a": {**F32, "strides": [1], "note": None}}, bytes(8)),
    "a scalar": raw_file({"a": entry("I64", [], 0, 8)}, bytes(8)),
    "zero-size in front": raw_file({"a": entry("F32", [0], 0, 0), "b": F32}, bytes(8)),
    "zero-size between": raw_file({"a": F32, "z": entry("F32", [3, 0], 8, 8), "b": entry("U8", [1], 8, 9)}, bytes(9)),
    "zero-size behind, two on one place": raw_file(
        {"a": F32, "y": entry("F32", [0], 8, 8), "z": entry("U8", [0, 9], 8, 8)}, bytes(8)
    ),
    "metadata": raw_file({"__metadata__": {"format": "pt"}, "a": F32}, bytes(8)),
    "metadata null": raw_file({"__metadata__": None, "a": F32}, bytes(8)),
    "names beyond ASCII": raw_file({"\u00e9\U0001f600": F32, "a b": entry("F32", [0], 0, 0)}, bytes(8)),
    "four bits, rows of half bytes": raw_file({"a": entry("F4", [2, 3], 0, 3)}, bytes(3)),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_as_the_library_does(case, tmp_path):
    path = tmp_path / FILE
    path.write_bytes(ACCEPTED[case])
    header = read_header(str(tmp_path), FILE)
    with safe_open(path, "numpy") as file:
        theirs = {
            name: (s.get_dtype(), tuple(s.get_shape())) for name in list(file.keys()) if (s := file.get_slice(name))
        }
    assert {t.name: (t.dtype, t.shape) for t in header.tensors.values()} == theirs
    assert all(key == t.name and t.file == FILE for key, t in header.tensors.items())
    assert sum(t.nbytes for t in header.tensors.values()) == len(ACCEPTED[case]) - data_start(ACCEPTED[case])
    assert header.file.size == len(ACCEPTED[case])
    assert header.file.mtime_ns == path.stat().st_mtime_ns


def data_start(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def test_offsets_count_from_the_start_of_the_file(tmp_path):
    arrays = {"x": random_array("U8", (5,), 1), "y": random_array("BF16", (2, 3), 2), "s": random_array("F32", (), 3)}
    content = file_of(arrays)
    (tmp_path / FILE).write_bytes(content)
    for tensor in read_header(str(tmp_path), FILE).tensors.values():
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == arrays[tensor.name].tobytes()


def test_what_torch_saves_is_found_byte_for_byte(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    names = "bool uint8 int8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64 complex64 "
    names += "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2"
    saved = {}
    for i, name in enumerate(names.split()):
        raw = torch.from_numpy(np.random.default_rng(i).integers(0, 2, (6, 16), np.uint8))
        saved[name] = raw.view(getattr(torch, name)).contiguous()
    save_file(saved, tmp_path / FILE, {"format": "pt"})
    content = (tmp_path / FILE).read_bytes()
    header = read_header(str(tmp_path), FILE)
    loaded = load_file(tmp_path / FILE)
    assert header.tensors.keys() == loaded.keys()
    for name, tensor in header.tensors.items():
        theirs = loaded[name].view(torch.uint8).numpy().tobytes()
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == theirs
        shape = (*loaded[name].shape[:-1], loaded[name].shape[-1] * 2) if name.endswith("_x2") else loaded[name].shape
        assert tensor.shape == tuple(shape)


def test_names_that_save_model_left_out_are_aliases(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_model

    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    save_model(model, str(tmp_path / FILE))
    header = read_header(str(tmp_path), FILE)
    assert list(header.tensors) == ["embed.weight"]
    assert header.aliases == {"head.weight": "embed.weight"}


def test_other_metadata_is_no_alias(tmp_path):
    metadata = {"format": "pt", "a": "b", "c": "b"}
    arrays = {name: np.zeros(1, ml_dtypes.bfloat16) for name in "ab"}
    (tmp_path / FILE).write_bytes(file_of(arrays, metadata))
    assert read_header(str(tmp_path), FILE).aliases == {"c": "b"}


def test_the_digest_is_of_the_header_and_not_of_the_data(tmp_path):
    def digest(content):
        (tmp_path / FILE).write_bytes(content)
        return read_header(str(tmp_path), FILE).file.header_digest

    first = digest(raw_file({"a": F32}, bytes(8)))
    assert digest(raw_file({"a": F32}, b"\1" * 8)) == first
    assert len({first, digest(raw_file({"b": F32}, bytes(8))), digest(text(padded(b" ")))}) == 3
    assert len(first) == 32
