"""PyTorch files for tests, made without PyTorch: any pickle in an archive like those of torch.save, and state dicts pickled by hand."""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path


class Raw:
    """A pickle in the making: each method adds an instruction."""

    def __init__(self, protocol: int = 2) -> None:
        self.made = b"\x80" + bytes([protocol])

    def add(self, code: bytes) -> "Raw":
        self.made += code
        return self

    def text(self, value: str) -> "Raw":
        raw = value.encode()
        return self.add(b"X" + struct.pack("<I", len(raw)) + raw)

    def name(self, dotted: str) -> "Raw":
        module, _, name = dotted.rpartition(".")
        return self.add(f"c{module}\n{name}\n".encode())

    def number(self, value: int) -> "Raw":
        return self.add(pickle.dumps(value, 2)[2:-1])

    def storage(self, kind: str, key: str, length: int) -> "Raw":
        self.add(b"(").text("storage").name(kind).text(key).text("cpu").number(length)
        return self.add(b"tQ")

    def numbers(self, values: tuple[int, ...]) -> "Raw":
        self.add(b"(")
        for value in values:
            self.number(value)
        return self.add(b"t")

    def tensor(
        self, shape: tuple[int, ...] = (2,), stride: tuple[int, ...] = (1,), offset: int = 0, key: str = "0", length: int = 2,
        kind: str = "torch.FloatStorage",
    ) -> "Raw":  # fmt: skip
        self.name("torch._utils._rebuild_tensor_v2").add(b"(").storage(kind, key, length).number(offset)
        self.numbers(shape).numbers(stride)
        return self.add(b"\x89").name("collections.OrderedDict").add(b")RtR")

    def end(self) -> bytes:
        return self.made + b"."


def one(**tensor: object) -> bytes:
    """The pickle of a state dict with the tensor `w`."""
    return Raw().add(b"}(").text("w").tensor(**tensor).add(b"u").end()  # type: ignore[arg-type]


def archive(data: bytes, members: Mapping[str, bytes] | None = None, *, top: str = "x/", method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of a pickle and other members, by default the storage of `one`."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as out:
        for name, content in {"data.pkl": data, **({"data/0": bytes(8)} if members is None else members)}.items():
            out.writestr(zipfile.ZipInfo(top + name), content, method)
    return made.getvalue()


def write(path: Path, data: bytes, members: Mapping[str, bytes] | None = None) -> None:
    """An archive as a file."""
    path.write_bytes(archive(data, members))
