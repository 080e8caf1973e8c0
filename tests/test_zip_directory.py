"""Archives that are cut, damaged, ambiguous or lie: each is refused by name, and none is taken for another."""

import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch_zips import archive, one

from shardconv.errors import InputError
from shardconv.formats import zip_directory
from shardconv.formats.pytorch import read_torch
from shardconv.formats.zip_directory import read_directory

FILE = "m.bin"
AGAIN = "download this file again"
SOUND = archive(one(), {"data/0": bytes(8), "version": b"3"})
# Where things are in it: local headers (one at 0), members of the directory, its end record.
FIRST = SOUND.index(b"PK\3\4", 1)
THIRD = SOUND.index(b"PK\3\4", FIRST + 1)
DIRECTORY = SOUND.index(b"PK\1\2")
SECOND = SOUND.index(b"PK\1\2", DIRECTORY + 1)
END = SOUND.index(b"PK\5\6")
SIZE = END - DIRECTORY
TRUNCATED = "{0} is truncated: it begins as a zip archive, and no directory ends it at byte {1}"


def patched(at: int, form: str, *values: int | bytes) -> bytes:
    """The sound archive with some bytes replaced."""
    new = struct.pack("<" + form, *values)
    return SOUND[:at] + new + SOUND[at + len(new) :]


def refusal(path: Path, content: bytes) -> list[tuple[str, str]]:
    (path / FILE).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_torch(str(path), FILE, "")
    return [(problem.fact, problem.remedy) for problem in caught.value.problems]


def test_the_sound_archive_is_read(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(SOUND)
    assert list(read_torch(str(tmp_path), FILE, "").tensors) == ["w"]


@pytest.mark.parametrize("length", [4, 30, FIRST, DIRECTORY - 1, DIRECTORY, SECOND, END - 1, END, END + 4, END + 21])
def test_truncated_in_every_part(length: int, tmp_path: Path) -> None:
    assert refusal(tmp_path, SOUND[:length]) == [(TRUNCATED.format(FILE, length), AGAIN)]


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    for length in range(len(SOUND)):
        assert len(refusal(tmp_path, SOUND[:length])) == 1


def damaged(fact: str) -> str:
    return f"{FILE} is damaged: {fact}"


NAME = DIRECTORY + 46
CASES: dict[str, tuple[bytes, str, str]] = {
    "bytes behind the end": (SOUND + b"x", TRUNCATED.format(FILE, len(SOUND) + 1), AGAIN),
    "bytes before the directory": (
        SOUND[:DIRECTORY] + b"junk" + SOUND[DIRECTORY:],
        damaged(f"its directory should be at bytes {DIRECTORY} to {END}, and its end record is at byte {END + 4}"),
        AGAIN,
    ),
    "a directory elsewhere": (
        patched(END + 16, "L", 0),
        damaged(f"its directory should be at bytes 0 to {END - DIRECTORY}, and its end record is at byte {END}"),
        AGAIN,
    ),
    "a huge directory": (
        patched(END + 12, "L", 2**32 - 1),
        damaged("its directory would have 4294967295 bytes, over 20000000"),
        AGAIN,
    ),
    "too many members": (patched(END + 8, "HH", 9, 9), damaged("its directory lists 3 members, and its end record says 9"), AGAIN),
    "several disks": (
        patched(END + 4, "H", 1),
        f"{FILE} is one part of an archive in several",
        "join the parts, or download it whole",
    ),
    "members on other disks": (
        patched(END + 8, "H", 2),
        f"{FILE} is one part of an archive in several",
        "join the parts, or download it whole",
    ),
    "a member on another disk": (patched(DIRECTORY + 34, "H", 3), damaged("x/data.pkl is on disk 3, and there is one"), AGAIN),
    "a version that is not there": (patched(DIRECTORY + 6, "H", 64), damaged("x/data.pkl needs version 6.4 of the format"), AGAIN),
    "data marked as a directory": (
        patched(SECOND + 38, "L", 0x10),
        damaged("x/data/0 is marked as a directory, and has 8 bytes"),
        AGAIN,
    ),
    "no member": (patched(DIRECTORY, "4s", b"PK\1\3"), damaged(f"its directory has no member at byte {DIRECTORY}"), AGAIN),
    "a long name": (
        patched(SECOND + 28, "H", 60_000),
        damaged(f"its directory ends inside a member, at byte {END}"),
        AGAIN,
    ),
    "encrypted": (patched(DIRECTORY + 8, "H", 1), f"{FILE}: x/data.pkl is encrypted", "decrypt the file first"),
    "encrypted by its local header alone": (
        patched(6, "H", 1),
        damaged("the directory and the local header at byte 0 disagree on x/data.pkl"),
        AGAIN,
    ),
    "two sizes": (patched(SECOND + 24, "L", 9), damaged("x/data/0 is not compressed, and has 9 bytes in 8"), AGAIN),
    "a size into the next member": (
        patched(SECOND + 20, "LL", 800, 800),
        damaged(f"x/data/0 ends at byte {FIRST + 838} or later, and what follows begins at byte {THIRD}"),
        AGAIN,
    ),
    "two members in one place": (
        patched(SECOND + 42, "L", 0),
        damaged(f"x/data.pkl ends at byte {40 + len(one())} or later, and what follows begins at byte 0"),
        AGAIN,
    ),
    "a name twice": (
        archive(one(), {"data/0": bytes(8), "data/1": bytes(8)}).replace(b"x/data/1", b"x/data/0"),
        damaged("it has x/data/0 twice"),
        AGAIN,
    ),
    "another local name": (
        patched(FIRST + 30, "8s", b"x/data/1"),
        damaged(f"the directory and the local header at byte {FIRST} disagree on x/data/0"),
        AGAIN,
    ),
    "a longer local name": (
        patched(FIRST + 26, "H", 9),
        damaged(f"the directory and the local header at byte {FIRST} disagree on x/data/0"),
        AGAIN,
    ),
    "another local size": (
        patched(FIRST + 22, "L", 9),
        damaged(f"the directory and the local header at byte {FIRST} disagree on x/data/0"),
        AGAIN,
    ),
    "another local method": (
        patched(FIRST + 8, "H", 8),
        damaged(f"the directory and the local header at byte {FIRST} disagree on x/data/0"),
        AGAIN,
    ),
    "no local header": (patched(FIRST, "4s", b"XXXX"), damaged(f"there is no local header of x/data/0 at byte {FIRST}"), AGAIN),
    "a local header that shifts the data": (
        patched(FIRST + 28, "H", 60_000),
        damaged(f"x/data/0 should be bytes {FIRST + 60_038} to {FIRST + 60_046}, and what follows begins at byte {THIRD}"),
        AGAIN,
    ),
    "64-bit sizes that are not there": (
        patched(SECOND + 20, "LL", 2**32 - 1, 2**32 - 1),
        damaged("x/data/0 has no 64-bit sizes in its directory, and needs them"),
        AGAIN,
    ),
    "a name that is not UTF-8": (patched(NAME, "s", b"\xff"), damaged("a member's name is not UTF-8 text: b'\\xff/data.pkl'"), AGAIN),
}
for bad in ("../data.pkl", "/x/data.pk", "x\\data.pkl", "C:data.pkl", "x/\0ata.pkl", "x/../a.pkl", "x/\x1bata.pkl"):
    CASES[f"the name {bad!r}"] = (
        patched(NAME, "10s", bad.encode()[:10]),
        f"{FILE} has a member {bad[:10]!r}, which is no plain relative path",
        "no checkpoint has such names; do not trust this file",
    )


@pytest.mark.parametrize("case", CASES)
def test_damage_is_told_by_name_and_place(case: str, tmp_path: Path) -> None:
    content, fact, remedy = CASES[case]
    assert refusal(tmp_path, content) == [(fact, remedy)]


def test_a_comment_behind_the_end_record_is_allowed(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(SOUND[: END + 20] + b"\5\0hello")
    assert list(read_torch(str(tmp_path), FILE, "").tensors) == ["w"]


def test_a_comment_that_is_an_end_record_itself_does_not_hide_the_directory(tmp_path: Path) -> None:
    fake = SOUND[END:]
    (tmp_path / FILE).write_bytes(SOUND[: END + 20] + struct.pack("<H", len(fake)) + fake)
    with pytest.raises(InputError) as caught:
        read_torch(str(tmp_path), FILE, "")
    assert caught.value.problems[0].fact.startswith(f"{FILE} is damaged: its directory should be at bytes")


# 64-bit archives, as torch.save writes them and as they can be wrong


def wide(change: Callable[[bytearray], None] = lambda _: None) -> bytes:
    """The sound archive with 64-bit end records before its own."""
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 30, 45, 0, 0, 3, 3, END - DIRECTORY, DIRECTORY)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, END, 1)
    made = bytearray(SOUND[:END] + record + locator + SOUND[END:])
    change(made)
    return bytes(made)


def test_64_bit_end_records(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(wide())
    assert list(read_torch(str(tmp_path), FILE, "").tensors) == ["w"]


@pytest.mark.parametrize(
    ("at", "form", "value", "fact"),
    [
        (56 + 8, "Q", 2**63, f"its 64-bit end record is not at byte {2**63}, where its locator says"),
        (56 + 8, "Q", END - 1, f"its 64-bit end record is not at byte {END - 1}, where its locator says"),
        (56 + 4, "L", 1, f"its 64-bit end record is not at byte {END}, where its locator says"),
        (56 + 16, "L", 2, f"its 64-bit end record is not at byte {END}, where its locator says"),
        (0, "4s", b"XXXX", f"its 64-bit end record is not at byte {END}, where its locator says"),
        (40, "Q", 2**62, f"its directory would have {2**62} bytes, over 20000000"),
        (48, "Q", 2**62, f"its directory should be at bytes {2**62} to {2**62 + SIZE}, and its end record is at byte {END}"),
        (48, "Q", 2**64 - 1, f"its directory should be at bytes {2**64 - 1} to {2**64 - 1 + SIZE}, and its end record is at byte {END}"),
    ],
)
def test_64_bit_end_records_that_lie(at: int, form: str, value: int | bytes, fact: str, tmp_path: Path) -> None:
    content = wide(lambda made: struct.pack_into("<" + form, made, END + at, value))
    assert refusal(tmp_path, content) == [(damaged(fact), AGAIN)]


def test_a_member_beyond_4_gib_is_found_by_its_64_bit_fields(tmp_path: Path) -> None:
    """A sparse file, as torch.save would have written it: a storage of 5 GiB before a small one."""
    size = 5 << 30
    name, small = b"x/data/0", b"x/data/1"
    with open(tmp_path / FILE, "wb") as file:
        file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 0, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), 20) + name)
        file.write(struct.pack("<2H2Q", 1, 16, size, size))
        at = file.seek(size, os.SEEK_CUR)
        file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 0, 0, 0, 0, 0, 0, 3, 3, len(small), 0) + small + b"abc")
        begin = file.tell()
        fields = struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), 20, 0, 0, 0, 0, 0)
        file.write(fields + name + struct.pack("<2H2Q", 1, 16, size, size))
        fields = struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, 3, 3, len(small), 12, 0, 0, 0, 0, 2**32 - 1)
        file.write(fields + small + struct.pack("<2HQ", 1, 8, at))
        end = file.tell()
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, 2, 2, end - begin, begin))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0))
    descriptor = os.open(tmp_path / FILE, os.O_RDONLY)
    try:
        directory = read_directory(FILE, descriptor, os.fstat(descriptor).st_size)
        assert {member.name: member.nbytes for member in directory.members.values()} == {"x/data/0": size, "x/data/1": 3}
        begin = zip_directory.data_offset(FILE, descriptor, directory, directory.members["x/data/1"])
        assert os.pread(descriptor, 3, begin) == b"abc"
    finally:
        os.close(descriptor)


LIMITED = """
import resource
from shardconv.errors import InputError
from shardconv.formats.pytorch import read_torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_torch(".", "m.bin", "")
except InputError as error:
    print(error.problems[0].fact)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_a_directory_of_as_many_members_as_it_may_have(tmp_path: Path) -> None:
    """The members are in a hole of the file: 20 MB on the disk, no data, and not an end to the memory."""
    count, step = 370_000, 40
    with open(tmp_path / FILE, "wb") as file:
        file.write(b"PK\3\4")
        begin = file.seek(count * step)
        for i in range(count):
            file.write(struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, i * step) + b"x/%06x" % i)
        end = file.tell()
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, count, count, end - begin, begin))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0))
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)
    fact, mebibytes = done.stdout.splitlines()
    assert fact == f"{FILE} is a zip archive with 0 members <name>/data.pkl, where torch.save writes one"
    assert int(mebibytes) < 512


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_ends_in_a_refusal_or_leaves_the_tensor_as_it_was(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    (tmp_path / FILE).write_bytes(SOUND)
    wanted = read_torch(str(tmp_path), FILE, "").tensors["w"]
    for _ in range(400):
        content = bytearray(wide() if rng.random() < 0.5 else SOUND)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        (tmp_path / FILE).write_bytes(content)
        try:
            found = read_torch(str(tmp_path), FILE, "").tensors
        except InputError:
            continue
        assert found == {"w": wanted}
