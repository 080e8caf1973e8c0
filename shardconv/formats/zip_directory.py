"""The directory of a zip archive whose members lie in it as they are: names, and where each member's bytes are.

A zip ends with a record that says where its central directory is, and that lists every member with its size and the place of its local
header; the member's bytes follow the local header. Both headers are somebody else's words, so nothing is taken that they do not agree on,
and nothing that a reader of another make could understand in another way: a directory that is not all between the members and the end
record, a name that stands twice, members that overlap, sizes beyond the file. Compressed members are listed and never expanded, so a small
file cannot become a large one.

The standard library's `zipfile` would do, but takes a directory of any size into memory, lets names stand twice, and does not say where a
member's bytes begin.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import NoReturn

from shardconv.errors import InputError, Problem
from shardconv.formats.strict_json import AGAIN

# Bytes of a directory: some 250k members, where a checkpoint has one for each tensor. They take some ten times that in memory.
DIRECTORY_LIMIT = 20_000_000
_COMMENT = 65_535  # the longest comment behind the end record, which is found from behind
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the 64-bit field"
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_IS_DIRECTORY = 0x10  # of MS-DOS attributes
_VERSION = 63  # the latest there is, as 10 times 6.3
_ZIP64 = 1  # the extra field with 64-bit sizes


@dataclass(frozen=True, slots=True)
class Member:
    """One member: `header` is where its local header begins; sizes are in bytes, `packed` as they lie in the file."""

    name: str
    method: int
    crc: int
    packed: int
    nbytes: int
    header: int

    @property
    def stored(self) -> bool:
        """Whether its bytes lie in the file as they are."""
        return self.method == 0


@dataclass(frozen=True, slots=True)
class Directory:
    """All members by name, where each must have ended, and the bytes that say so."""

    members: Mapping[str, Member]
    limits: Mapping[str, int]
    raw: bytes


def read_directory(name: str, descriptor: int, size: int) -> Directory:
    """The directory of the archive `name`, open and `size` bytes long; InputError where it is damaged or not to be trusted."""
    tail = os.pread(descriptor, min(size, _COMMENT + _END.size), max(0, size - _COMMENT - _END.size))
    at = size - len(tail) + _end_record(name, tail, size)
    _, disk, first_disk, here, count, length, start, _ = _END.unpack_from(tail, at - size + len(tail))
    locator = os.pread(descriptor, _LOCATOR64.size, at - _LOCATOR64.size) if at >= _LOCATOR64.size else b""
    if locator.startswith(b"PK\6\7"):
        _, end_disk, end64, disks = _LOCATOR64.unpack(locator)
        record = os.pread(descriptor, _END64.size, end64) if end64 + _END64.size + _LOCATOR64.size == at else b""
        if len(record) < _END64.size or not record.startswith(b"PK\6\6") or end_disk or disks > 1:
            _refuse(name, f"its 64-bit end record is not at byte {end64}, where its locator says")
        _, _, _, _, disk, first_disk, here, count, length, start = _END64.unpack(record)
        at = end64
    if disk or first_disk or here != count:
        raise InputError(
            f"{name} cannot be read", [Problem(f"{name} is one part of an archive in several", "join the parts, or download it whole")]
        )
    if length > DIRECTORY_LIMIT:
        _refuse(name, f"its directory would have {length} bytes, over {DIRECTORY_LIMIT}")
    if start + length != at:
        _refuse(name, f"its directory should be at bytes {start} to {start + length}, and its end record is at byte {at}")
    raw = os.pread(descriptor, length, start)
    return _placed(name, _members(name, raw, count, start), start, raw)


def data_offset(name: str, descriptor: int, directory: Directory, member: Member) -> int:
    """Where the bytes of a stored member begin, by its local header; InputError where that disagrees with the directory."""
    wanted = member.name.encode()
    raw = os.pread(descriptor, _LOCAL.size + len(wanted), member.header)
    if len(raw) < _LOCAL.size + len(wanted) or not raw.startswith(b"PK\3\4"):
        _refuse(name, f"there is no local header of {member.name} at byte {member.header}")
    _, _, flags, method, _, _, _, packed, unpacked, name_length, extra_length = _LOCAL.unpack_from(raw)
    begin: int = member.header + _LOCAL.size + name_length + extra_length
    # a writer that streams leaves zeros here, and the sizes behind the data
    sizes = [size for size in (packed, unpacked) if size not in (0, _FULL32, member.nbytes)]
    if name_length != len(wanted) or raw[_LOCAL.size :] != wanted or method != member.method or flags & _ENCRYPTED or sizes:
        _refuse(name, f"the directory and the local header at byte {member.header} disagree on {member.name}")
    end, limit = begin + member.nbytes, directory.limits[member.name]
    if end > limit:
        _refuse(name, f"{member.name} should be bytes {begin} to {end}, and what follows begins at byte {limit}")
    return begin


def _refuse(name: str, fact: str) -> NoReturn:
    raise InputError(f"{name} cannot be read", [Problem(f"{name} is damaged: {fact}", AGAIN)])


def _end_record(name: str, tail: bytes, size: int) -> int:
    """Where in the last bytes of the file its end record is, with nothing but its own comment behind it."""
    at = len(tail)
    while (at := tail.rfind(b"PK\5\6", 0, at)) >= 0:
        if at + _END.size <= len(tail) and at + _END.size + int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail):
            return at
    fact = f"{name} is truncated: it begins as a zip archive, and no directory ends it at byte {size}"
    raise InputError(f"{name} cannot be read", [Problem(fact, AGAIN)])


def _members(name: str, raw: bytes, count: int, start: int) -> list[Member]:
    """All members that a directory of `count` at byte `start` lists."""
    found: list[Member] = []
    at = 0
    while at < len(raw):
        if len(raw) - at < _CENTRAL.size or not raw.startswith(b"PK\1\2", at):
            _refuse(name, f"its directory has no member at byte {start + at}")
        fields = _CENTRAL.unpack_from(raw, at)
        version, flags, method, crc, packed, unpacked = fields[2] & 0xFF, *fields[3:5], *fields[7:10]
        name_length, extra_length, comment_length, disk, attributes, header = *fields[10:14], *fields[15:17]
        begin = at + _CENTRAL.size
        at = begin + name_length + extra_length + comment_length
        if at > len(raw):
            _refuse(name, f"its directory ends inside a member, at byte {start + len(raw)}")
        said = _name(name, raw[begin : begin + name_length])
        extra = raw[begin + name_length : begin + name_length + extra_length]
        unpacked, packed, header = _wide(name, said, extra, unpacked, packed, header)
        if version > _VERSION:
            _refuse(name, f"{said} needs version {version / 10} of the format")
        if flags & _ENCRYPTED:
            raise InputError(f"{name} cannot be read", [Problem(f"{name}: {said} is encrypted", "decrypt the file first")])
        if disk not in (0, _FULL16):
            _refuse(name, f"{said} is on disk {disk}, and there is one")
        if attributes & _IS_DIRECTORY and unpacked:  # some readers then take nothing for its bytes
            _refuse(name, f"{said} is marked as a directory, and has {unpacked} bytes")
        if method == 0 and packed != unpacked:
            _refuse(name, f"{said} is not compressed, and has {unpacked} bytes in {packed}")
        found.append(Member(said, method, crc, packed, unpacked, header))
    if len(found) != count:
        _refuse(name, f"its directory lists {len(found)} members, and its end record says {count}")
    return found


def _placed(name: str, members: list[Member], end: int, raw: bytes) -> Directory:
    """The members, which must not overlap; `end` is where the last must have ended."""
    ordered = sorted(members, key=lambda member: member.header)
    limits: dict[str, int] = {}
    for member, following in zip_longest(ordered, ordered[1:]):
        limit = end if following is None else following.header
        least = member.header + _LOCAL.size + len(member.name.encode()) + member.packed
        if least > limit:
            _refuse(name, f"{member.name} ends at byte {least} or later, and what follows begins at byte {limit}")
        if member.name in limits:
            _refuse(name, f"it has {member.name} twice")
        limits[member.name] = limit
    return Directory({member.name: member for member in ordered}, limits, raw)


def _name(file: str, raw: bytes) -> str:
    """A member's name; one that could leave the directory that it would be unpacked to is refused."""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        _refuse(file, f"a member's name is not UTF-8 text: {raw[:60]!r}")
    parts = name.split("/")
    if not name or not name.isprintable() or "\\" in name or ":" in name or ".." in parts or not parts[0]:
        fact = f"{file} has a member {name[:60]!r}, which is no plain relative path"
        raise InputError(f"{file} cannot be read", [Problem(fact, "no checkpoint has such names; do not trust this file")])
    return name


def _wide(file: str, name: str, extra: bytes, *fields: int) -> tuple[int, ...]:
    """Sizes and places, with those that are full replaced by the 64-bit ones that the extra field has for them, in order."""
    if _FULL32 not in fields:
        return fields
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == _ZIP64:
            wide = [int.from_bytes(extra[i : i + 8], "little") for i in range(at, min(at + length, len(extra)) - 7, 8)]
            if len(wide) >= fields.count(_FULL32):
                return tuple(wide.pop(0) if field == _FULL32 else field for field in fields)
        at += length
    _refuse(file, f"{name} has no 64-bit sizes in its directory, and needs them")
