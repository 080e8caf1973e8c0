"""Orbax checkpoints that are damaged or made to harm, as changes to sound ones; each with what must be said of it.

The sound one has an array `a`, as files ("files") or in a database ("ocdbt").
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

METADATA, MANIFEST, ZARR = "_METADATA", "manifest.ocdbt", "a/zarr.json"
DEEP = 100_000


@dataclass(frozen=True)
class Damage:
    """`make` changes the checkpoint in a directory that is stored as `store`."""

    said: tuple[str, ...]
    make: Callable[[Path], None]
    store: str = "files"


def _bytes(name: str, data: bytes, *said: str, store: str = "files") -> Damage:
    return Damage((name, *said), lambda folder: (folder / name).write_bytes(data) and None, store)


def _metadata(change: Callable[[dict], object], *said: str) -> Damage:  # type: ignore[type-arg]
    def make(folder: Path) -> None:
        found = json.loads((folder / METADATA).read_text())
        (folder / METADATA).write_text(json.dumps(change(found)))

    return Damage((METADATA, *said), make)


def _zarr(*said: str, **entries: object) -> Damage:
    def make(folder: Path) -> None:
        found = json.loads((folder / ZARR).read_text())
        (folder / ZARR).write_text(json.dumps(found | entries))

    return Damage((ZARR, *said), make)


def _keyed(key: object, *said: str) -> Damage:
    """A leaf under another key."""
    return _metadata(lambda found: found | {"tree_metadata": {"x": {"key_metadata": [{"key": key, "key_type": 2}]}}}, *said)


def _cut(name: str, share: float, *said: str, store: str = "files") -> Damage:
    return Damage((METADATA, *said), lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share)), store)


def _gone(name: str, *said: str, store: str = "files") -> Damage:
    def make(folder: Path) -> None:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return Damage(said, make, store)


def _linked(name: str, to: str, *said: str, store: str = "files") -> Damage:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return Damage(said, make, store)


def _huge(name: str) -> Damage:
    return Damage((name, "it has over 100000000 bytes"), lambda folder: os.truncate(folder / name, 10**11))


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _staged(folder: Path) -> None:
    """As it is before the commit."""
    shutil.move(folder, f"{folder}.orbax-checkpoint-tmp")


def _grid(shape: object) -> dict[str, object]:
    return {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}}}


ORBAX: Mapping[str, Damage] = {
    "nothing at all": Damage(("is empty",), _emptied),
    "no metadata": _gone(METADATA, "neither .safetensors nor PyTorch files"),
    "no bytes of metadata": _bytes(METADATA, b"", "JSONDecodeError"),
    "half the metadata": _cut(METADATA, 0.5, "JSONDecodeError"),
    "metadata of wrong UTF-8": _bytes(METADATA, b'{"\xff": 1}', "UnicodeDecodeError"),
    "metadata nested too deep": _bytes(METADATA, b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}", "RecursionError"),
    "metadata of 100 GB": _huge(METADATA),
    "metadata that is a list": _metadata(lambda found: [], "TypeError"),
    "metadata that is a number": _bytes(METADATA, b"9" * 5000, "ValueError"),
    "a tree that is a list": _metadata(lambda found: found | {"tree_metadata": []}, "AttributeError"),
    "no tree": _metadata(lambda found: {}, "KeyError"),
    "a tree of numbers": _metadata(lambda found: found | {"tree_metadata": {"a": 1}}, "TypeError"),
    "a key that is no key": _metadata(lambda found: found | {"tree_metadata": {"a": {"key_metadata": [1]}}}, "TypeError"),
    "a leaf above": _keyed("../../src", "the key '../../src' is no plain name"),
    "a leaf by an absolute path": _keyed("/etc", "the key '/etc' is no plain name"),
    "a leaf with a NUL": _keyed("a\0", r"the key 'a\x00' is no plain name"),
    "a leaf that clears the screen": _keyed("\x1b[2J", r"the key '\x1b[2J' is no plain name"),
    "a leaf without a name": _keyed("", "the key '' is no plain name"),
    "a leaf that is not there": _keyed("b", "b/zarr.json"),
    "a leaf of 10^6 letters": _keyed("b" * 10**6, "is no plain name"),
    "no metadata of an array": _gone("a", METADATA, ZARR),
    "an array's metadata cut in half": _cut(ZARR, 0.5, ZARR, "JSONDecodeError"),
    "an array's metadata nested too deep": _bytes(ZARR, b"[" * DEEP + b"]" * DEEP, "RecursionError"),
    "an array's metadata of 100 GB": _huge(ZARR),
    "an array's metadata is a link to itself": _linked(ZARR, "zarr.json", METADATA, ZARR),
    "a shape of 2^64": _zarr("overflows 64 bits", shape=[2**64, 4], **_grid([4, 4])),
    "a shape of 2^60 times 2^60": _zarr("overflows 64 bits", shape=[2**60, 2**60], **_grid([4, 4])),
    "a shape of more dims than its chunks": _zarr("an array of [1152921504606846976]", shape=[2**60]),
    "a negative shape": _zarr("a shape or chunk of [-1, 4]", shape=[-1, 4]),
    "a shape of text": _zarr('a shape or chunk of "4"', shape="4"),
    "a shape of true": _zarr("a shape or chunk of [true, 4]", shape=[True, 4]),
    "a shape of 10^6 dims": _zarr("a shape or chunk of [1, 1", shape=[1] * 10**6),
    "a chunk of nothing": _zarr("in chunks of [0, 4]", **_grid([0, 4])),
    "no chunks": _zarr("KeyError: 'configuration'", chunk_grid={}),
    "codecs that are a number": _zarr("TypeError", codecs=7),
    "a dtype nobody has": _zarr("dtype 'float33', which is unknown", data_type="float33"),
    "a dtype that is a function": _zarr("dtype 'open', which is unknown", data_type="open"),
    "a dtype that is a number": _zarr("dtype '7', which is unknown", data_type=7),
    "a dtype that clears the screen": _zarr(r"dtype '\x1b[2J'", data_type="\x1b[2J"),
    "no manifest": _gone(MANIFEST, METADATA, "manifest.ocdbt is missing", store="ocdbt"),
    "no bytes in the manifest": _cut(MANIFEST, 0, "manifest", store="ocdbt"),
    "half the manifest": _cut(MANIFEST, 0.5, "manifest", store="ocdbt"),
    "a manifest of something else": _bytes(MANIFEST, b"x" * 500, METADATA, store="ocdbt"),
    "a manifest that is a link to itself": _linked(MANIFEST, MANIFEST, METADATA, "manifest.ocdbt is missing", store="ocdbt"),
    "a database without its data": _gone("d", METADATA, store="ocdbt"),
    "not committed": Damage(("is of a conversion that has not finished",), _staged),
}
