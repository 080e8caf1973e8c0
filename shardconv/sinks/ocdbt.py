"""An OCDBT database of one commit, encoded by hand: a leaf node and a manifest, as bytes. Pure.

TensorStore's OCDBT driver holds every value in memory, copies it, and writes it through the page cache; that is most of
what writing a checkpoint costs. The format itself only asks that a leaf node names a file, an offset and a length, and
its documentation says that such "specially-constructed" databases may refer to data written by other means. So the
writer puts the values into a data file as it likes, and this module encodes the two small things around them:

- the *leaf node*, at the end of the same data file: every key, sorted, with a short value inline or a reference to a
  long one;
- the *manifest*, the file that makes the database exist: its configuration and one version, whose root is the leaf
  node.

Both are stored uncompressed, as each says of itself, with their CRC-32C. Whoever reads, copies or merges them is
TensorStore.

Format (version 0 of manifest and node): https://google.github.io/tensorstore/kvstore/ocdbt, "Storage format".
"""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardconv.sinks.shard import crc32c
from shardconv.sinks.spec import MAX_INLINE_BYTES, MAX_NODE_BYTES

_MANIFEST_MAGIC = 0x0CDB3A2A
_NODE_MAGIC = 0x0CDB20DE
_ARITY_LOG2 = 4  # TensorStore's default; it orders versions, and there is one


@dataclass(frozen=True)
class Stored:
    """Where a value lies in the data file, in bytes."""

    offset: int
    length: int


def varint(number: int) -> bytes:
    """A number in base 128, low digits first, the top bit set on all but the last.

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def leaf_node(data_file: str, values: Mapping[str, bytes | Stored]) -> bytes:
    """The root and only node of the tree; `data_file` is relative to the database.

    Raises ValueError where the node outgrows the database's limit of 100 MB.
    """
    entries = sorted((key.encode(), value) for key, value in values.items())
    keys = [key for key, _ in entries]
    shared = [0, *(_common(a, b) for a, b in itertools.pairwise(keys))]
    stored = [value for _, value in entries if isinstance(value, Stored)]
    body = b"".join((
        b"\0",  # height: a leaf
        _data_files(data_file),
        varint(len(entries)),
        _varints(shared[1:]),
        _varints(len(key) - n for key, n in zip(keys, shared, strict=True)),
        b"".join(key[n:] for key, n in zip(keys, shared, strict=True)),
        _varints(v.length if isinstance(v, Stored) else len(v) for _, v in entries),
        _varints(isinstance(v, Stored) for _, v in entries),
        _varints(0 for _ in stored),  # which data file: the one there is
        _varints(v.offset for v in stored),
        b"".join(v for _, v in entries if not isinstance(v, Stored)),
    ))  # fmt: skip
    if len(body) > MAX_NODE_BYTES:
        raise ValueError(
            f"{len(entries)} keys make a node of {len(body)} bytes, over {MAX_NODE_BYTES}; write smaller units"
        )
    return _sealed(_NODE_MAGIC, body)


def manifest(data_file: str, root: Stored, values: Mapping[str, bytes | Stored], commit_time_ns: int) -> bytes:
    """The manifest of a database with one version, whose root node is `root`."""
    body = b"".join((
        os.urandom(16),  # the database's identifier
        varint(0),  # kind: one manifest file
        varint(MAX_INLINE_BYTES),
        varint(MAX_NODE_BYTES),
        bytes([_ARITY_LOG2]),
        varint(1) + (0).to_bytes(4, "little"),  # nodes added later are to be compressed: zstd, level 0, the default
        _data_files(data_file),
        varint(1),  # versions here
        varint(1),  # its generation
        b"\0",  # its root's height
        varint(0),  # its root's data file
        _varints((root.offset, root.length, len(values), root.length)),
        varint(sum(value.length for value in values.values() if isinstance(value, Stored))),
        commit_time_ns.to_bytes(8, "little"),
        varint(0),  # version nodes: none
    ))  # fmt: skip
    return _sealed(_MANIFEST_MAGIC, body)


def _sealed(magic: int, body: bytes) -> bytes:
    """Header (magic, length of everything, version 0, not compressed), body, checksum."""
    length = 4 + 8 + 2 + len(body) + 4
    data = magic.to_bytes(4, "big") + length.to_bytes(8, "little") + b"\0\0" + body
    return data + crc32c(data).to_bytes(4, "little")


def _data_files(path: str) -> bytes:
    """A table of one data file, no part of whose path is passed on to child nodes."""
    return varint(1) + varint(len(path.encode())) + varint(0) + path.encode()


def _varints(numbers: Iterable[int]) -> bytes:
    return b"".join(map(varint, numbers))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
