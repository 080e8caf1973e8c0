"""What the fuzzer starts from: valid inputs of every kind, and words that mean something."""

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from stored import entry, raw_file
from torch_zips import Raw, archive, one


def _safetensors() -> list[bytes]:
    a, b = entry("F32", [2, 2], 0, 16), entry("BF16", [3], 16, 22)
    whole = [
        raw_file({"a": a}, bytes(16)),
        raw_file({"__metadata__": {"c": "a", "format": "pt"}, "a": a, "b": b}, bytes(22)),
        raw_file({"e": entry("I64", [0, 5], 0, 0), "s": entry("U8", [], 0, 1)}, bytes(1)),
        raw_file({"h": entry("F4", [4], 0, 2), "f": entry("F8_E4M3", [1, 1, 2], 2, 4)}, bytes(4)),
        raw_file(b'{"\\u00e9\\ud83d\\ude00":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1],"x":null}}    ', bytes(1)),
        raw_file({}),
    ]
    parts = [(file[8 : 8 + file[0]], len(file) - 8 - file[0]) for file in whole]
    return [b"\0" + file for file in whole] + [bytes([1 + size]) + header for header, size in parts]


def _index() -> list[bytes]:
    whole = {f"l.{i}.w": f"m-{i % 2 + 1:05}-of-00002.safetensors" for i in range(4)}
    full = {"metadata": {"total_size": 32, "x": "l.0.w"}, "weight_map": whole}
    made = [{"weight_map": whole}, full, {"metadata": None, "weight_map": {}}]
    return [json.dumps(value).encode() for value in made] + [json.dumps(full, indent=2).encode()]


def _pickle() -> list[bytes]:
    """The first byte chooses: 0, a whole file; 1, a pickle that is put into an archive with storages of 8 and 16 bytes."""
    two = Raw().add(b"}(").text("a").tensor().text("b").tensor(shape=(2, 2), stride=(2, 1), key="1", length=4).add(b"u").end()
    nested = Raw().add(b"}(").text("model").add(b"}").text("w").tensor().add(b"s").text("step").add(b"K\x07u").end()
    other = Raw(4).add(b"}\x94\x8c\1w\x94").tensor(kind="torch.BFloat16Storage", length=4, shape=(4,)).add(b"\x94s").end()
    plain = [pickle.dumps({"a": [1, 2.5, None, True, "x" * 300, (1,), {"b": b"x"}]}, protocol) for protocol in (2, 3, 4, 5)]
    return [b"\1" + made for made in (one(), two, nested, other, *plain)] + [b"\0" + archive(made) for made in (one(), nested)] + _saved()


def _saved() -> list[bytes]:
    """What torch.save itself writes."""
    import torch

    made = []
    tensor = torch.arange(4, dtype=torch.bfloat16)
    for value in {"w": tensor, "t": tensor}, {"p": torch.nn.Parameter(torch.ones(2))}, {"u": torch.ones(2).to(torch.uint16)}:
        file = io.BytesIO()
        torch.save(value, file)
        made.append(b"\0" + file.getvalue())
        with zipfile.ZipFile(file) as found:
            (name,) = (name for name in found.namelist() if name.endswith("data.pkl"))
            made.append(b"\1" + found.read(name))
    return made


def _address() -> list[bytes]:
    """Name, dims, part, and the key that is matched, a line each."""
    said = [
        ("layers.{layers}.w", "(heads head_dim) embed", 0, "layers.1.w"),
        ("h.{layers+3}.w", "embed", 0, "h.4.w"),
        ("l.{layers}.qkv", "((heads | kv | kv) head_dim) embed", 1, "l.0.qkv"),
        ("l.{layers kind}.{proj}", "(1 | embed) 1 mlp", 1, "l.3.w10"),
        ("{kind}", "(half | half pair | 3)", 1, "local"),
        ("a", "", 0, "a"),
    ]
    return ["\n".join(map(str, line)).encode() for line in said]


SEEDS: dict[str, Callable[[], list[bytes]]] = {"safetensors": _safetensors, "index": _index, "pickle": _pickle, "address": _address}

_WORDS = {
    "safetensors": '__metadata__ "dtype": "shape": "data_offsets": F32 BF16 F4 BOOL [0,0] -1 1e999 9223372036854775808 null true {} NaN '
    "\\ud800",
    "index": '"weight_map": "metadata": "total_size": ../ /etc .safetensors 1e999 -1 null true {} [] NaN \\ud800 \\u0000',
    "pickle": "torch\nFloatStorage\n torch._utils\n_rebuild_tensor_v2\n torch._utils\n_rebuild_tensor_v3\n collections\nOrderedDict\n "
    "torch._utils\n_rebuild_parameter\n torch\nSize\n torch\nfloat32\n torch\nbfloat16\n storage cpu data.pkl byteorder conj module. "
    "PK\x03\x04 PK\x01\x02 PK\x05\x06 PK\x06\x06",
    "address": "{layers} {kind} {proj} layers kind heads kv head_dim half pair embed mlp none loop ( ) | + 1 0 { } {}",
}


def dictionary(target: str) -> str:
    """libFuzzer's dictionary: a quoted word a line."""
    words = _WORDS[target].split(" ")
    return "".join('"' + "".join(f"\\x{byte:02x}" for byte in word.encode("latin-1")) + '"\n' for word in words)
