"""Sources that are damaged or made to harm, as changes to a sound checkpoint of one file; each with what must be said of it."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stored import entry, raw_file
from torch_zips import Raw, archive, one

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
}
FILE, INDEX, CONFIG, TORCH = "model.safetensors", "model.safetensors.index.json", "config.json", "pytorch_model.bin"
PLANNED = ("plan", "run")
LISTED = ("inspect", "plan", "run")
DEEP = 100_000


@dataclass(frozen=True)
class Case:
    """`make` changes the checkpoint in a directory; `said` are the words that the message must have; `commands` those that refuse."""

    said: tuple[str, ...]
    make: Callable[[Path], None]
    commands: tuple[str, ...] = LISTED


def _bytes(name: str, data: bytes | Callable[[], bytes], *said: str, commands: tuple[str, ...] = LISTED) -> Case:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(data if isinstance(data, bytes) else data())

    return Case((name, *said), make, commands)


# safetensors


def _file(data: bytes | Callable[[], bytes], *said: str) -> Case:
    return _bytes(FILE, data, *said)


def _header(header: object, *said: str, data: bytes = b"") -> Case:
    return _file(raw_file(header, data), *said)


def _one(field: str, value: object, *said: str) -> Case:
    """A tensor `w` with one field of its own."""
    return _header({"w": entry("U8", [1], 0, 1) | {field: value}}, "tensor w", *said, data=bytes(1))


def _named(name: str, *said: str) -> Case:
    return _header({name: entry("U8", [1], 0, 1)}, *said, data=bytes(1))


def _cut(count: int) -> Case:
    def make(folder: Path) -> None:
        os.truncate(folder / FILE, count if count >= 0 else (folder / FILE).stat().st_size + count)

    return Case((FILE, "is truncated"), make)


SAFETENSORS: Mapping[str, Case] = {
    "a header of 2^60 bytes": _file(struct.pack("<Q", 2**60) + b"{}", f"its header would have {2**60} bytes"),
    "a header of 2^64 bytes": _file(b"\xff" * 8 + b"{}", f"its header would have {2**64 - 1} bytes"),
    "a header longer than the file": _file(struct.pack("<Q", 90_000_000) + b"{}", "is truncated"),
    "no bytes": _cut(0),
    "seven bytes": _cut(7),
    "half of its header": _cut(200),
    "all but a byte": _cut(-1),
    "a byte too many": _file(raw_file({}, b"x"), "is too long"),
    "an empty header": _header(b"", "is not JSON"),
    "a header of NULs": _header(bytes(64), "is not JSON"),
    "a list": _header([], "not an object"),
    "wrong UTF-8": _header(b'{"\xff\xfe": 1}', "is not UTF-8 text at byte 10"),
    "a byte order mark": _header(b"\xef\xbb\xbf{}", "is not JSON"),
    "two objects": _header(b"{}{}", "is not JSON"),
    "half a surrogate pair": _header(rb'{"__metadata__": {"a": "\ud800"}}', "surrogate"),
    "a tensor twice": _header(b'{"w": {}, "w": {}}', "has the key w twice"),
    "a field twice": _header(b'{"w": {"dtype": "U8", "dtype": "F32", "shape": [1], "data_offsets": [0,1]}}', "the key dtype twice"),
    "50,000 tensors twice": _file(lambda: raw_file(b"{" + b",".join(b'"w%d":1' % (i // 2) for i in range(100_000)) + b"}"), "twice"),
    "nested too deep": _header(b'{"w":' + b"[" * DEEP + b"]" * DEEP + b"}", "nested too deep"),
    "objects nested too deep": _header(b'{"w":' * DEEP + b"1" + b"}" * DEEP, "nested too deep"),
    "an integer of 5,000 digits": _header(b'{"w": ' + b"9" * 5000 + b"}", "is not JSON"),
    "an integer over 64 bits": _one("shape", [2**70], "overflows 64 bits"),
    "a product over 64 bits": _one("shape", [2**31] * 4, "overflows 64 bits"),
    "a product over 64 bits and a zero": _one("shape", [2**31] * 4 + [0], "overflows 64 bits"),
    "an offset of -0": _header(b'{"w": {"dtype": "U8", "shape": [1], "data_offsets": [-0,1]}}', "-0 is not a natural number"),
    "a NaN in a shape": _header(b'{"w": {"dtype": "U8", "shape": [NaN], "data_offsets": [0,1]}}', "NaN is not a JSON number"),
    "an infinite shape": _header(b'{"w": {"dtype": "U8", "shape": [1e999], "data_offsets": [0,1]}}', "tensor w", "shape"),
    "a fraction": _one("shape", [1.0], "shape [1.0]"),
    "a negative size": _one("shape", [-1], "shape [-1]"),
    "a size of true": _one("shape", [True], "shape [true]"),
    "a shape that is text": _one("shape", "1", 'shape "1"'),
    "a shape of a million dims": _one("shape", [1] * 1_000_000 + [-1], "shape [1, 1,"),
    "a shape of a million sizes": _one("shape", [2**60] * 1_000_000, "has 1000000 dims"),
    "a dtype that is a number": _one("dtype", 7, "dtype 7, which is unknown"),
    "a dtype of 10^6 letters": _one("dtype", "F" * 10**6, "which is unknown"),
    "a dtype nobody has": _one("dtype", "F31", 'dtype "F31"'),
    "negative offsets": _one("data_offsets", [-1, 0], "data_offsets [-1, 0]"),
    "offsets of 2^63": _one("data_offsets", [2**63, 2**63 + 1], "belong to no tensor"),
    "offsets back to front": _one("data_offsets", [1, 0], "end before they begin"),
    "one offset": _one("data_offsets", [0], "data_offsets [0]"),
    "three offsets": _one("data_offsets", [0, 1, 2], "data_offsets [0, 1, 2]"),
    "an entry that is null": _header({"w": None}, "tensor w is null"),
    "an empty entry": _header({"w": {}}, "tensor w has no dtype, no shape, no data_offsets"),
    "tensors that overlap": _header({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, "tensor b begins", data=bytes(3)),
    "tensors that share bytes": _header({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 0, 1)}, "share bytes", data=bytes(1)),
    "a hole": _header({"a": entry("U8", [1], 1, 2)}, "belong to no tensor", data=bytes(2)),
    "data of 2^60 bytes": _header({"a": entry("U8", [2**59], 0, 2**59)}, "is truncated"),
    "metadata that is a list": _header({"__metadata__": []}, "__metadata__ is []"),
    "metadata that is numbers": _header({"__metadata__": {"a": 1}}, "__metadata__ has 1 for a"),
    "a name of nothing": _named("", "a tensor's name is empty"),
    "a name that clears the screen": _named("\x1b[2Jw", r"'\x1b[2Jw'", "is not printable"),
    "a name with a NUL": _named("w\0w", r"'w\x00w'", "is not printable"),
    "a name of two lines": _named("w\nerror: w", r"'w\nerror: w'", "is not printable"),
    "a name written from right to left": _named("w\u202ew", r"'w\u202ew'", "is not printable"),
    "a pointer of Git LFS": _file(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "a page of HTML": _file(b"<!DOCTYPE html><html>", "is not a safetensors file"),
    "a zip": _file(archive(one()), "is not a safetensors file"),
}


def _replaced(name: str, make: Callable[[Path], None], *said: str) -> Case:
    """A file of the checkpoint that is something else."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return Case((name, *said), change)


PLACES: Mapping[str, Case] = {
    "a directory for a file": _replaced(FILE, Path.mkdir, "Is a directory"),
    "a pipe for a file": _replaced(FILE, os.mkfifo, "is a pipe, a socket or a device"),
    "a device for a file": _replaced(FILE, lambda path: path.symlink_to("/dev/zero"), "is a pipe, a socket or a device"),
    "a link to nowhere": _replaced(FILE, lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    "a link to itself": _replaced(FILE, lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "a link to another kind of file": _replaced(FILE, lambda path: path.symlink_to("/etc/passwd"), "is not a safetensors file"),
    "a pipe for config.json": _replaced(CONFIG, os.mkfifo, "is a pipe, a socket or a device"),
    "a directory for config.json": _replaced(CONFIG, Path.mkdir, "cannot be read"),
    "a device for config.json": _replaced(CONFIG, lambda path: path.symlink_to("/dev/zero"), "is a pipe, a socket or a device"),
    "a config.json of 100 GB": _replaced(CONFIG, lambda path: _sparse(path, 10**11), "has 100000000000 bytes, over"),
}


def _sparse(path: Path, size: int) -> None:
    path.write_bytes(b"{")
    os.truncate(path, size)


# the index


def _index(value: object, *said: str) -> Case:
    return _bytes(INDEX, value if isinstance(value, bytes) else json.dumps(value).encode(), *said)


def _mapped(file: str, *said: str) -> Case:
    return _index({"weight_map": {"w": file}}, *said)


def _many() -> bytes:
    return b'{"weight_map":{' + b",".join(b'"w%d":"m%d.safetensors"' % (i, i) for i in range(100_000)) + b"}}"


INDEXES: Mapping[str, Case] = {
    "no bytes in the index": _index(b"", "is not JSON"),
    "an index that is a list": _index([], "not an object"),
    "an index of wrong UTF-8": _index(b'{"\xff": 1}', "is not UTF-8 text at byte 2"),
    "an index with a byte order mark": _index(b"\xef\xbb\xbf{}", "is not JSON"),
    "an index nested too deep": _index(b'{"weight_map":' + b"[" * DEEP + b"]" * DEEP + b"}", "nested too deep"),
    "an index of NaN": _index(b'{"weight_map": {"w": NaN}}', "NaN"),
    "an index cut in half": _index(b'{"weight_map": {"w": "mod', "is not JSON"),
    "a name twice in the index": _index(b'{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "the key w twice"),
    "150,000 names twice": _bytes(
        INDEX, lambda: b'{"weight_map":{' + b",".join(b'"w%d":"m"' % (i // 2) for i in range(300_000)) + b"}}", "has the key w0 twice"
    ),
    "no weight_map": _index({"metadata": {}}, "has no weight_map"),
    "an empty weight_map": _index({"weight_map": {}}, "has no weight_map"),
    "a weight_map that is a list": _index({"weight_map": ["w"]}, "has no weight_map"),
    "a weight_map to numbers": _index({"weight_map": {"w": 1}}, "has no weight_map"),
    "a weight_map to lists": _index({"weight_map": {"w": [FILE]}}, "has no weight_map"),
    "the index maps to the index": _mapped(INDEX, "which is not a .safetensors file"),
    "a file above": _mapped("../model.safetensors", "'../model.safetensors'", "not the name of a file in the same directory"),
    "a file above above": _mapped("../" * 20 + "etc/passwd", "not the name of a file in the same directory"),
    "a file by its absolute path": _mapped("/etc/passwd.safetensors", "'/etc/passwd.safetensors'", "do not trust this one"),
    "a file in a directory": _mapped("x/y.safetensors", "'x/y.safetensors'", "do not trust this one"),
    "a file by a path of Windows": _mapped("..\\m.safetensors", "do not trust this one"),
    "a file named ..": _mapped("..", "'..'", "do not trust this one"),
    "a file without a name": _mapped("", "''", "do not trust this one"),
    "a file with a NUL in its name": _mapped("m\0.safetensors", r"'m\x00.safetensors'", "do not trust this one"),
    "a file that clears the screen": _mapped("\x1b[2J.safetensors", r"'\x1b[2J.safetensors'", "do not trust this one"),
    "a file named by a device": _mapped("/dev/zero", "do not trust this one"),
    "a file of another kind": _mapped("pytorch_model.bin", "which is not a .safetensors file"),
    "a file with a name of 10^6 letters": _mapped("m" * 10**6 + ".safetensors", "names are missing: mmm"),
    "a tensor without a name": _index({"weight_map": {"": FILE}}, "a tensor's name is empty"),
    "a tensor that clears the screen": _index({"weight_map": {"\x1b[2J": FILE}}, r"'\x1b[2J'", "is not printable"),
    "a file that is not there": _mapped("model-00001-of-00002.safetensors", "missing: model-00001-of-00002.safetensors"),
    "a tensor that no file has": _mapped(FILE, "no file has it: w"),
    "an infinite total": _index({"metadata": {"total_size": 1e999}, "weight_map": {"w": FILE}}, "Infinity is not a JSON number"),
    "a total of 1e999": _index(b'{"metadata": {"total_size": 1e999}, "weight_map": {"w": "%s"}}' % FILE.encode(), "no file has it: w"),
    "100,000 files": _bytes(INDEX, _many, "100000 of the 100000 files", "and 99995 more"),
    "an index of 100 GB": Case((INDEX, "has 100000000000 bytes, over"), lambda folder: _sparse(folder / INDEX, 10**11)),
}


# config.json


def _config(value: object, *said: str) -> Case:
    return _bytes(CONFIG, value if isinstance(value, bytes) else json.dumps(value).encode(), *said, commands=PLANNED)


def _but(*said: str, **entries: object) -> Case:
    return _config(MODEL | entries, *said)


def _without(entry_: str) -> Case:
    return _config({key: value for key, value in MODEL.items() if key != entry_}, f'there is no "{entry_}"')


def _huge_layer(folder: Path) -> None:
    (folder / FILE).write_bytes(raw_file({f"model.layers.{'9' * 5000}.w": entry("U8", [0], 0, 0)}))


CONFIGS: Mapping[str, Case] = {
    "no bytes in config.json": _config(b"", "is not JSON"),
    "config.json is a list": _config([], "not an object"),
    "config.json is a number": _config(b"7", "not an object"),
    "config.json of wrong UTF-8": _config(b"\xff", "is not UTF-8"),
    "config.json with NaN": _config(b'{"hidden_size": NaN}', "NaN is not a JSON number"),
    "config.json nested too deep": _config(b'{"a":' * DEEP + b"1" + b"}" * DEEP, "nested too deep"),
    "config.json says a thing twice": _config(b'{"hidden_size": 4, "hidden_size": 8}', "hidden_size twice"),
    "an empty object": _config({}, "says no architecture"),
    "no layers": _without("num_hidden_layers"),
    "no width": _without("hidden_size"),
    "no vocabulary": _without("vocab_size"),
    "no heads": _but('"num_attention_heads" is 0', num_attention_heads=0),
    "negative layers": _but('"num_hidden_layers" is -1', num_hidden_layers=-1),
    "10^12 layers": _but("config.json gives layers = 1000000000000", num_hidden_layers=10**12),
    "10^30 layers": _but("num_hidden_layers", num_hidden_layers=10**30),
    "10^7 layers": _but("config.json gives layers = 10000000", num_hidden_layers=10**7),
    "10^18 words": _but("model.embed_tokens.weight", vocab_size=10**18),
    "10^40 wide": _but("hidden_size", hidden_size=10**40),
    "a number as text": _but('"hidden_size" is "4"', hidden_size="4"),
    "a number with a fraction": _but('"hidden_size" is 4.0', hidden_size=4.0),
    "a number of 1e999": _config(json.dumps(MODEL).replace('"hidden_size": 4', '"hidden_size": 1e999').encode(), "hidden_size"),
    "a number that is true": _but('"vocab_size" is true', vocab_size=True),
    "a number that is a list": _but('"vocab_size" is [16]', vocab_size=[16]),
    "a number that is text of 10^6 letters": _but('"vocab_size" is "xxx', vocab_size="x" * 10**6),
    "a number that clears the screen": _but('"vocab_size" is', vocab_size="\x1b[2J"),
    "heads that do not divide the width": _but("is no multiple", num_attention_heads=3),
    "more key heads than heads": _but("kv_heads", num_key_value_heads=16),
    "a layer of 5,000 digits": Case(("model.layers.{layers}.w (1 tensor)",), _huge_layer, PLANNED),
    "an architecture nobody knows": _but("says Unheard", architectures=["Unheard"]),
    "an architecture that is a number": _but("says 7", architectures=[7]),
    "architectures that are text": _but("says no architecture", architectures="LlamaForCausalLM"),
    "an architecture that clears the screen": _but("no family describes", architectures=["\x1b[2J"]),
    "an architecture of 10^6 letters": _but("no family describes", architectures=["x" * 10**6]),
    "10^5 architectures": _but("no family describes", architectures=["x"] * 10**5),
}


# PyTorch files


def _torch(data: bytes | Callable[[], bytes], *said: str) -> Case:
    def make(folder: Path) -> None:
        (folder / FILE).unlink()
        (folder / TORCH).write_bytes(data if isinstance(data, bytes) else data())

    return Case((TORCH, *said), make)


class Calls:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch canary",)


def _bomb() -> bytes:
    return archive(bytes(50_000_000), {"data/0": bytes(8)}, method=zipfile.ZIP_DEFLATED)


PICKLES: Mapping[str, Case] = {
    "a pickle that calls": _torch(archive(pickle.dumps(Calls(), 2)), "its pickle asks for posix.system", "nothing of it was run"),
    "a pickle that evaluates": _torch(archive(Raw().name("builtins.eval").end()), "its pickle asks for builtins.eval"),
    "a pickle that clears the screen": _torch(archive(Raw().add(b"c\x1b[2J\nx\n").end()), r"'\x1b[2J.x'"),
    "10^7 instructions": _torch(lambda: archive(b"\x80\2" + b"N0" * 5_000_000 + b"}."), "its pickle"),
    "a zip bomb": _torch(_bomb, "is compressed"),
    "a bare pickle": _torch(pickle.dumps({}, 2), "is a bare pickle"),
    "a format of 2019": _torch(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "before PyTorch 1.6"),
    "no bytes in a PyTorch file": _torch(b"", "is empty"),
    "half a zip": _torch(archive(one())[:-30], "is truncated"),
    "a zip of nothing": _torch(archive(b"", top="x/y/"), "with 0 members"),
    "a member above": _torch(archive(one(), {"../../etc/passwd": b"x", "data/0": bytes(8)}), "do not trust this file"),
    "a tensor beyond its storage": _torch(archive(one(shape=(2**40,))), "of a storage of 8"),
    "a tensor of 2^100 elements": _torch(archive(one(shape=(2**50, 2**50), stride=(0, 0))), "overflows 64 bits"),
    "a tensor turned around": _torch(archive(one(shape=(1, 2), stride=(1, 3))), "tensor w"),
    "a storage that is not there": _torch(archive(one(), {}), "there is no storage '0' in it"),
    "text of 4 GiB": _torch(archive(Raw().add(b"X\xff\xff\xff\xff").end()), "its pickle cannot be used"),
}

SOURCES: Mapping[str, Case] = {**SAFETENSORS, **PLACES, **INDEXES, **CONFIGS, **PICKLES}
