"""What torch.save writes, read without torch: every byte where torch.load has it, and every other thing refused by name."""

import math
import pickle
import subprocess
import sys
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from torch_zips import Raw, archive, one, write

from shardconv.errors import InputError
from shardconv.formats import FileHeader
from shardconv.formats.pytorch import read_torch
from shardconv.verify.tensors import Tensors
from shardconv.verify.torch_files import places

torch = pytest.importorskip("torch")

FILE = "m.bin"
AGAIN = "download this file again"
ANEW = f'write it anew, in Python: import torch; torch.save(torch.load("{FILE}", weights_only=True), "{FILE}")'
PLAIN = "save it anew as plain tensors: torch.save({name: tensor.contiguous() for name, tensor in state_dict.items()}, PATH)"
DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32", "int64": "I64",
    "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0", "float4_e2m1fn_x2": "F4",
}  # fmt: skip


def header(root: Path, prefix: str = "") -> FileHeader:
    return read_torch(str(root), FILE, prefix)


def refusal(root: Path, prefix: str = "") -> list[tuple[str, str]]:
    with pytest.raises(InputError) as caught:
        header(root, prefix)
    assert caught.value.title == f"{FILE} cannot be read"
    return [(problem.fact, problem.remedy) for problem in caught.value.problems]


def save(root: Path, value: object, **options: object) -> None:
    torch.save(value, root / FILE, **options)


def raw_bytes(tensor: "torch.Tensor") -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def agree(root: Path, prefix: str = "", *, weights_only: bool = True) -> FileHeader:
    """The header, after a look at every byte with torch.load, and at what the check's own reader says."""
    found = header(root, prefix)
    loaded = torch.load(root / FILE, weights_only=weights_only)
    for key in prefix.split(".") if prefix else ():
        loaded = loaded[key]
    wanted = {name: tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}
    content = (root / FILE).read_bytes()
    assert found.tensors.keys() == wanted.keys()
    for name, tensor in found.tensors.items():
        theirs = wanted[name]
        shape = (*theirs.shape[:-1], 2 * theirs.shape[-1]) if theirs.dtype == torch.float4_e2m1fn_x2 else tuple(theirs.shape)
        assert (tensor.name, tensor.file, tensor.dtype, tensor.shape) == (name, FILE, DTYPES[str(theirs.dtype)[6:]], shape)
        assert tensor.nbytes == theirs.numel() * theirs.element_size()
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == raw_bytes(theirs)
    ours = {name: (tensor.dtype, tensor.shape, tensor.offset) for name, tensor in found.tensors.items()}
    again = dict(places(str(root / FILE), prefix))
    assert {name: place for name, place in again.items() if math.prod(place[1])} == {
        name: place for name, place in ours.items() if math.prod(place[1])
    }
    assert again.keys() == ours.keys()
    return found


# What is read


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_in_every_protocol(protocol: int, tmp_path: Path) -> None:
    saved = {}
    for i, name in enumerate(DTYPES):
        raw = torch.from_numpy(np.random.default_rng(i).integers(0, 2, (6, 16), np.uint8))
        saved[name] = raw.view(getattr(torch, name)).contiguous()
    save(tmp_path, saved, pickle_protocol=protocol)
    found = agree(tmp_path, weights_only=protocol < 4)  # beyond that, torch reads what it wrote itself only so
    assert [tensor.dtype for tensor in found.tensors.values()] == list(DTYPES.values())
    assert found.notes == ()


def test_shapes_from_scalars_to_nothing(tmp_path: Path) -> None:
    shapes = [(), (1,), (0,), (2, 0, 3), (1, 1, 5), (2, 3, 4, 5)]
    save(tmp_path, {str(shape): torch.rand(shape) for shape in shapes})
    agree(tmp_path)


def test_contiguous_views_and_shared_storages_are_ranges(tmp_path: Path) -> None:
    base = torch.rand(6, 4)
    odd = torch.as_strided(base, (1, 4), (77, 1), 8)  # the stride of a dim of one element says nothing
    q, k = torch.rand(8, 4).chunk(2)
    save(tmp_path, {"all": base, "row": base[2], "rows": base[1:4], "again": base, "flat": base.view(-1), "odd": odd, "q": q, "k": k})
    tensors = agree(tmp_path).tensors
    assert tensors["again"].offset == tensors["all"].offset == tensors["row"].offset - 32
    assert tensors["k"].offset == tensors["q"].offset + 64


def test_tied_weights_are_two_names_of_one_range(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    save(tmp_path, model.state_dict())
    embed, head = agree(tmp_path).tensors.values()
    assert (embed.offset, embed.nbytes, embed.name, head.name) == (head.offset, head.nbytes, "embed.weight", "head.weight")


def test_parameters_with_hooks_and_attributes(tmp_path: Path) -> None:
    kept = torch.nn.Parameter(torch.rand(3))
    kept.tag = {"sharding": ["x", 3]}  # type: ignore[attr-defined]
    save(tmp_path, OrderedDict(plain=torch.nn.Parameter(torch.rand(2)), kept=kept, fixed=torch.nn.Parameter(torch.ones(1), False)))
    agree(tmp_path)


def test_a_large_file_of_many_tensors(tmp_path: Path) -> None:
    save(tmp_path, {f"layers.{i}.w": torch.full((3,), float(i)) for i in range(1000)})
    assert len(agree(tmp_path).tensors) == 1000


def test_what_is_no_tensor_is_left_out_with_a_note(tmp_path: Path) -> None:
    other = {
        "epoch": 3, "loss": 0.5, "who": "me", "none": None, "done": True, "lr": [0.1, 0.2], "size": torch.Size([2]),
        "dtype": torch.bfloat16, "device": torch.device("cpu"),
        "set": {1, 2}, "raw": b"\0\xff", "big": 2**70, "less": -(2**40), "args": {"a": {"b": (1, (2, 3))}},
    }  # fmt: skip
    save(tmp_path, {"w": torch.ones(2), **other, 7: "a number as a key"})
    assert agree(tmp_path).notes == ("m.bin: 14 entries that are no tensors are left out: epoch, loss, who, none, done and 9 more",)
    save(tmp_path, {"w": torch.ones(2), "epoch": 3})
    assert agree(tmp_path).notes == ("m.bin: 1 entry that is no tensor is left out: epoch",)


def test_no_checksums_where_torch_was_told_not_to_compute_them(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        save(tmp_path, {"w": torch.ones(2)})
    finally:
        torch.serialization.set_crc32_options(True)
    agree(tmp_path)


def test_an_archive_by_another_tool_is_read_where_it_is_not_compressed(tmp_path: Path) -> None:
    write(tmp_path / FILE, one(), {"data/0": np.array([1.5, -2.0], np.float32).tobytes(), "version": b"3"})
    (tensor,) = agree(tmp_path).tensors.values()
    assert tensor.nbytes == 8


def test_a_file_whose_name_is_not_ascii_gives_its_members_that_name(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "модель.bin")
    (tensor,) = read_torch(str(tmp_path), "модель.bin", "").tensors.values()
    assert dict(places(str(tmp_path / "модель.bin"), "")) == {"w": ("F32", (2,), tensor.offset)}


def test_only_the_directory_the_pickle_and_local_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardconv.formats import pytorch

    save(tmp_path, {"a": torch.rand(1 << 20), "b": torch.rand(1 << 20)})
    taken: list[int] = []
    real = pytorch.os.pread

    def pread(descriptor: int, count: int, at: int) -> bytes:
        taken.append(len(found := real(descriptor, count, at)))
        return found

    monkeypatch.setattr(pytorch.os, "pread", pread)
    header(tmp_path)
    assert sum(taken) < 100_000
    assert (tmp_path / FILE).stat().st_size > 8 << 20


# Which tensors


def test_a_training_checkpoint_with_one_state_dict_needs_no_prefix(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    save(tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3})
    found = header(tmp_path)
    assert (list(found.tensors), found.notes) == (["weight", "bias"], ("m.bin: the tensors are those under 'model'",))
    assert agree(tmp_path, "model").notes == ()
    assert dict(places(str(tmp_path / FILE), "")).keys() == found.tensors.keys()


def test_with_several_state_dicts_one_must_be_chosen(tmp_path: Path) -> None:
    save(tmp_path, {"ema": {"w": torch.zeros(2)}, "state": {"inner.most": {"w": torch.ones(2)}}, "steps": {"w": 3}})
    assert refusal(tmp_path) == [
        (f"{FILE} has tensors under ema, state.inner.most, and none beside them", 'choose one: source.prefix = "ema"')
    ]
    found = header(tmp_path, "state.inner.most").tensors
    assert list(found) == ["w"]
    assert dict(places(str(tmp_path / FILE), "state.inner.most"))["w"][2] == found["w"].offset
    assert refusal(tmp_path, "model") == [(f"{FILE} has no tensors under 'model'", "it has tensors under ema, state.inner.most")]


def test_a_prefix_that_a_flat_file_has_not(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(2)})
    assert refusal(tmp_path, "model") == [
        (f"{FILE} has no tensors under 'model'", 'it has no tensors under any key; source.prefix = "auto" takes those under none')
    ]


def test_a_prefix_with_tensors_above_it(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(2), "ema": {"w": torch.zeros(2)}})
    assert agree(tmp_path).notes == ("m.bin: 1 entry that is no tensor is left out: ema",)
    assert list(agree(tmp_path, "ema").tensors) == ["w"]


@pytest.mark.parametrize(
    ("names", "bare"),
    [
        (["module.a.w", "module.b.w"], ["a.w", "b.w"]),
        (["_orig_mod.a.w", "_orig_mod.b.w"], ["a.w", "b.w"]),
        (["module._orig_mod.a.w"], ["a.w"]),
        (["_orig_mod.module.a.w"], ["a.w"]),
        (["a._orig_mod.w", "b._fsdp_wrapped_module._checkpoint_wrapped_module.w"], ["a.w", "b.w"]),
        (["module.w", "head.w"], ["module.w", "head.w"]),
        (["my_orig_mod.w"], ["my_orig_mod.w"]),
    ],
)
def test_marks_of_wrappers_are_taken_off(names: list[str], bare: list[str], tmp_path: Path) -> None:
    save(tmp_path, {name: torch.ones(1) for name in names})
    assert list(header(tmp_path).tensors) == list(dict(places(str(tmp_path / FILE), ""))) == bare


def test_names_that_only_wrappers_tell_apart(tmp_path: Path) -> None:
    save(tmp_path, {"a.w": torch.ones(1), "a._orig_mod.w": torch.ones(1)})
    assert refusal(tmp_path) == [
        (f"{FILE} has names that differ only by what wrappers of modules add: a.w", "save the state dict of the bare model")
    ]


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        ("torch.ones(2)", "holds one tensor, not tensors by name"),
        ("[torch.ones(2)]", "holds no dict, not tensors by name"),
        ("{}", "holds no tensors by name"),
        ("{'a': 1, 'b': {'c': 2}}", "holds no tensors by name"),
        ("{1: torch.ones(2)}", "holds no tensors by name"),
    ],
)
def test_no_tensors_by_name(value: str, fact: str, tmp_path: Path) -> None:
    save(tmp_path, eval(value, {"torch": torch}))
    assert refusal(tmp_path) == [(f"{FILE} {fact}", "save a dict: torch.save(model.state_dict(), PATH)")]


# What is refused, by torch itself


VIEWS = {
    "transposed": ("torch.rand(3, 4).T", "[4, 3] with strides [1, 4]"),
    "columns": ("torch.rand(3, 4)[:, :2]", "[3, 2] with strides [4, 1]"),
    "steps": ("torch.rand(8)[::2]", "[4] with strides [2]"),
    "expanded": ("torch.rand(3, 1).expand(3, 5)", "[3, 5] with strides [1, 0]"),
    "channels last": ("torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)", "[2, 3, 4, 5] with strides [60, 1, 15, 3]"),
}


@pytest.mark.parametrize("case", VIEWS)
def test_views_that_are_no_range(case: str, tmp_path: Path) -> None:
    code, said = VIEWS[case]
    save(tmp_path, {"w": eval(code, {"torch": torch}), "good": torch.ones(2)})
    assert refusal(tmp_path) == [(f"{FILE}: tensor w is a view of shape {said}, not a contiguous range", PLAIN)]
    with pytest.raises(InputError, match="w is not stored row after row"):
        dict(places(str(tmp_path / FILE), ""))


def test_what_the_remedy_for_views_makes_is_read(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.rand(3, 4).T})
    state = torch.load(tmp_path / FILE, weights_only=True)
    save(tmp_path, {name: tensor.contiguous() for name, tensor in state.items()})
    agree(tmp_path)


KINDS = {
    "sparse": (
        "torch.eye(3).to_sparse()",
        "torch._utils._rebuild_sparse_tensor",
        "sparse tensors are not read; save plain tensors: "
        "torch.save({name: tensor.to_dense() for name, tensor in state_dict.items()}, PATH)",
    ),
    "quantised": (
        "torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8)",
        "torch._utils._rebuild_qtensor",
        "quantised tensors are not read; save plain tensors: "
        "torch.save({name: tensor.dequantize() for name, tensor in state_dict.items()}, PATH)",
    ),
    "a subclass": (
        "torch.ones(2).as_subclass(Sub)",
        "torch._tensor._rebuild_from_type_v2",
        "subclasses of tensors are not read; save plain tensors: "
        "torch.save({name: tensor.as_subclass(torch.Tensor) for name, tensor in state_dict.items()}, PATH)",
    ),
    "meta": (
        "torch.ones(2, device='meta')",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "tensors on the meta device have no data; save the model after its weights are loaded",
    ),
    "numpy": ("__import__('numpy').float64(3)", "numpy._core.multiarray.scalar", ""),
    "a namespace": ("__import__('argparse').Namespace(a=1)", "argparse.Namespace", ""),
    "a module": ("torch.nn.Linear(1, 1)", "torch.nn.modules.linear.Linear", ""),
}
TRUST = "if you trust its author, load it with PyTorch and save the state dict alone, as plain tensors: torch.save(state_dict, PATH)"


class Sub(torch.Tensor):
    """A subclass that keeps its kind when it is saved."""


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("case", KINDS)
def test_kinds_of_values_that_are_not_read_are_named(case: str, tmp_path: Path) -> None:
    code, name, remedy = KINDS[case]
    save(tmp_path, {"w": eval(code, {"torch": torch, "Sub": Sub}), "good": torch.ones(2)})
    assert refusal(tmp_path) == [
        (f"{FILE}: its pickle asks for {name}, which is not among what a state dict needs; nothing of it was run", remedy or TRUST)
    ]
    with pytest.raises(InputError, match=r"it asks for |it has the instruction "):
        dict(places(str(tmp_path / FILE), ""))


def test_dtypes_and_flags_that_are_not_read(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(2, dtype=torch.complex128), "b": torch.ones(2, dtype=torch.complex64).conj(), "c": torch.ones(2)})
    assert refusal(tmp_path) == [
        (f"{FILE}: tensor a is of ComplexDoubleStorage, which is not read", "leave it out, or save it as another dtype"),
        (
            f"{FILE}: tensor b is stored with conj still to be applied",
            "save it anew as plain tensors: torch.save({name: tensor.resolve_conj().resolve_neg() ...}, PATH)",
        ),
    ]


def test_hundreds_of_equal_problems_are_summed_up(tmp_path: Path) -> None:
    save(tmp_path, {str(i): torch.rand(2, 3).T for i in range(100)})
    facts = [fact for fact, _ in refusal(tmp_path)]
    assert (len(facts), facts[8]) == (9, f"{FILE}: 92 more problems like these")


# Other files


def test_the_format_before_1_6(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert refusal(tmp_path) == [(f"{FILE} has the format of before PyTorch 1.6, which is not read", ANEW)]
    code = ANEW.partition("in Python: ")[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    agree(tmp_path)


def test_a_compressed_archive(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(archive(one(), method=8))
    assert refusal(tmp_path) == [(f"{FILE} is compressed, so no part of it can be read alone: x/data.pkl, x/data/0", ANEW)]


def test_a_big_endian_file(tmp_path: Path) -> None:
    write(tmp_path / FILE, one(), {"data/0": bytes(8), "byteorder": b"big"})
    assert refusal(tmp_path) == [
        (f"{FILE} has byte order 'big'; only little-endian files are read", ANEW.replace("anew,", "anew on a little-endian machine,"))
    ]


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_program(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 2)), tmp_path / FILE)
    remedy = f'save its state dict: torch.save(torch.jit.load("{FILE}").state_dict(), PATH)'
    assert refusal(tmp_path) == [(f"{FILE} is a TorchScript program, not a checkpoint", remedy)]


OTHERS = {
    "empty": (b"", "is empty", AGAIN),
    "a git lfs pointer": (b"version https://git-lfs.example/\n", "is a Git LFS pointer, not the weights", "fetch them: git lfs pull"),
    "a web page": (b"<!DOCTYPE html>", "is not a PyTorch file: it begins with b'<!DOCTYP'", AGAIN),
    "a bare pickle": (
        pickle.dumps({"a": 1}, 4),
        "is a bare pickle, not what torch.save writes",
        "save the state dict with torch.save(state_dict, PATH)",
    ),
    "another zip": (
        archive(b"", {}, top="x/y/"),
        "is a zip archive with 0 members <name>/data.pkl, where torch.save writes one",
        "give a file that torch.save wrote",
    ),
    "members outside": (
        archive(one(), top="x/").replace(b"x/data/0", b"y/data/0"),
        "has members outside x/: y/data/0",
        "no checkpoint has such members; do not trust this file",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_files(case: str, tmp_path: Path) -> None:
    content, fact, remedy = OTHERS[case]
    (tmp_path / FILE).write_bytes(content)
    assert refusal(tmp_path) == [(f"{FILE} {fact}", remedy)]


def test_a_tar_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / FILE, "w") as out:
        out.add(__file__, "storages")
    assert refusal(tmp_path) == [(f"{FILE} is a tar archive, as PyTorch 0.1 wrote, which is not read", ANEW)]


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    assert refusal(tmp_path) == [(f"{FILE} cannot be read: No such file or directory", AGAIN)]
    (tmp_path / FILE).mkdir()
    assert refusal(tmp_path) == [(f"{FILE} cannot be read: Is a directory", "check that it is a file that you may read")]


# Tensors that the pickle gets wrong

TENSORS = {
    "a storage that is not there": (one(key="7"), f"{FILE}: there is no storage '7' in it, and its pickle needs it"),
    "a storage outside of the archive": (one(key="../../w"), f"{FILE}: there is no storage '../../w' in it, and its pickle needs it"),
    "another length": (one(length=3), f"{FILE}: tensor w is in a storage of 12 bytes by the pickle, and storage 0 has 8"),
    "another dtype": (one(kind="torch.DoubleStorage"), f"{FILE}: tensor w is in a storage of 16 bytes by the pickle, and storage 0 has 8"),
    "beyond its storage": (one(shape=(3,)), f"{FILE}: tensor w reaches to byte 12 of a storage of 8"),
    "an offset beyond": (one(offset=1), f"{FILE}: tensor w reaches to byte 12 of a storage of 8"),
    "a huge stride": (one(shape=(2, 1), stride=(2**40, 1)), f"{FILE}: tensor w reaches to byte {4 * (2**40 + 1)} of a storage of 8"),
    "a shape that overflows": (
        one(shape=(2**40, 2**40), stride=(0, 0)),
        f"{FILE}: tensor w has shape [{2**40}, {2**40}], and F32 of this shape overflows 64 bits",
    ),
    "a shape that overflows beside a zero": (
        one(shape=(2**62, 0), stride=(0, 0)),
        f"{FILE}: tensor w has shape [{2**62}, 0], and F32 of this shape overflows 64 bits",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_the_pickle_gets_wrong(case: str, tmp_path: Path) -> None:
    data, fact = TENSORS[case]
    write(tmp_path / FILE, data)
    assert refusal(tmp_path) == [(fact, AGAIN)]


def test_an_empty_name(tmp_path: Path) -> None:
    save(tmp_path, {"": torch.ones(1), "a": torch.ones(1)})
    assert refusal(tmp_path) == [(f"{FILE}: a tensor's name is empty", "save the state dict under other names")]


def test_names_with_control_characters_and_without_end(tmp_path: Path) -> None:
    long = "n" * 10_000
    save(tmp_path, {"a\x1b[31m": torch.ones(1), "b\0": torch.ones(1), long: torch.ones(1)[:0].expand(2, 0), long + "2": torch.rand(2, 2).T})
    assert refusal(tmp_path) == [
        (f"{FILE}: a tensor's name is 'a\\x1b[31m'", "save the state dict under other names"),
        (f"{FILE}: a tensor's name is 'b\\x00'", "save the state dict under other names"),
        (f"{FILE}: tensor {'n' * 117}... is a view of shape [2, 2] with strides [1, 2], not a contiguous range", PLAIN),
    ]
    save(tmp_path, {"w": torch.ones(1), "x\n": 1, long: 2})
    assert agree(tmp_path).notes == (f"{FILE}: 2 entries that are no tensors are left out: 'x\\n', {'n' * 117}...",)


def test_a_missing_storage_is_said_once(tmp_path: Path) -> None:
    data = Raw().add(b"}(").text("a").tensor(key="7").text("b").tensor(key="7").add(b"u").end()
    write(tmp_path / FILE, data)
    assert len(refusal(tmp_path)) == 1


def test_a_damaged_pickle_is_found_by_its_checksum(tmp_path: Path) -> None:
    save(tmp_path, {"weight": torch.ones(2)})
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content.replace(b"weight", b"wEight", 1))
    assert refusal(tmp_path) == [(f"{FILE} is damaged: the checksum of m/data.pkl is not that of its bytes", AGAIN)]


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(2)})
    code = (
        "import sys, shardconv.formats.pytorch as p, shardconv.verify.torch_files as t\n"
        f"p.read_torch({str(tmp_path)!r}, {FILE!r}, ''), list(t.places({str(tmp_path / FILE)!r}, ''))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_digest_is_of_the_directory_and_the_pickle(tmp_path: Path) -> None:
    def digest(state: object) -> str:
        save(tmp_path, state)
        return header(tmp_path).file.header_digest

    first = digest({"a": torch.ones(2)})
    assert digest({"b": torch.ones(2)}) != first
    assert digest({"a": torch.zeros(2)}) != first  # the directory has the checksum of every storage
    assert digest({"a": torch.ones(2)}) == first


def test_rows_are_read_as_torch_has_them(tmp_path: Path) -> None:
    state = {"w": torch.rand(5, 3).to(torch.bfloat16), "s": torch.tensor(2.5)}
    save(tmp_path, state)
    tensors = Tensors(str(tmp_path), (FILE,))
    assert tensors.rows("w", 1, 4).tobytes() == raw_bytes(state["w"][1:4])
    assert tensors.rows("s", 0, 1).tolist() == 2.5
    tensors.close()
