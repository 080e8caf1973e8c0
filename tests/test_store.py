"""The sink's writing half. The oracle is TensorStore: it writes the same arrays by itself, and reads what we have
written.
"""

import ctypes
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from stored_dtypes import DTYPES

from shardconv.boxes import box_shape, chunk_box, slices
from shardconv.errors import Problem, RunError
from shardconv.sinks import ocdbt
from shardconv.sinks.chunk_writer import UnitWriter, discard, sweep
from shardconv.sinks.counts import WriteCounts
from shardconv.sinks.direct import BUFFER_BYTES, PAGE, LogFile, aligned_empty
from shardconv.sinks.grid import check_grid
from shardconv.sinks.spec import ArraySpec, StoreOptions, array_spec, metadata_key, stored_keys, zarr_metadata

PLAIN = StoreOptions()
EVERY_STORE = [StoreOptions(z, o, c) for z, o, c in itertools.product((3, 2), (True, False), ("none", "zstd"))]
# shape, chunk, inner chunk: a scalar; a clipped vector; clipped on both dims, inner chunks too; a scanned leaf, one
# layer at a time, split along leading dims alone; the same, split along the last dim.
GRIDS = [
    ((), (), ()),
    ((7,), (4,), (2,)),
    ((10, 6), (4, 6), (2, 3)),
    ((9, 5, 4), (4, 2, 4), (2, 1, 4)),
    ((8, 3, 6), (8, 1, 6), (4, 1, 6)),
    ((8, 3, 6), (8, 1, 6), (4, 1, 2)),
]


def boxes(spec: ArraySpec) -> list[Any]:
    return [chunk_box(spec.shape, spec.chunk, n) for n in range(math.prod(spec.grid))]


def some_array(spec: ArraySpec, seed: int = 0) -> Any:
    """Random bits, so NaN payloads and signs of zero too; valid ones for bool and float4."""
    itemsize = spec.numpy.itemsize
    bits = np.random.default_rng(seed).integers(0, 256, (math.prod(spec.shape), itemsize), dtype=np.uint8)
    if spec.dtype in ("bool", "float4_e2m1fn"):
        bits %= 2 if spec.dtype == "bool" else 16
    return bits.reshape(-1).view(spec.numpy).reshape(spec.shape)


def bits(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def write(stage: Path, attempt: str, spec: ArraySpec, array: Any, options: StoreOptions = PLAIN) -> WriteCounts:
    with UnitWriter(str(stage), attempt, options) as writer:
        for box in boxes(spec):
            writer.write(spec, box, np.ascontiguousarray(array[slices(box)]).reshape(box_shape(box)))
        return writer.finish()


def plain_read(stage: Path, attempt: str, name: str, options: StoreOptions = PLAIN) -> Any:
    """Read by TensorStore from nothing but the path."""
    files = f"file://{stage}/"
    kvstore = (
        {"driver": "ocdbt", "base": f"{files}ocdbt.process_{attempt}/", "path": f"{name}/"}
        if options.ocdbt
        else f"{files}{name}/"
    )
    return ts.open({"driver": "zarr3" if options.zarr == 3 else "zarr", "kvstore": kvstore}, open=True).result()


@pytest.mark.parametrize("options", EVERY_STORE, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_store_holds_every_grid_bit_for_bit(tmp_path: Path, options: StoreOptions, grid: Any) -> None:
    spec = ArraySpec(("layers", "w"), *grid[:1], "bfloat16", *grid[1:])
    array = some_array(spec)
    counts = write(tmp_path, "u0", spec, array, options)
    stored = plain_read(tmp_path, "u0", "layers.w", options)
    assert stored.dtype.name == "bfloat16"
    assert stored.shape == spec.shape
    assert bits(stored.read().result()) == bits(array)
    assert sorted(key.decode() for key in stored.kvstore.list().result()) == sorted(
        k.removeprefix("layers.w/") for k in stored_keys(spec, options)
    )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert counts == WriteCounts(math.prod(spec.grid), sum(path.stat().st_size for path in files), len(files))
    assert check_grid(str(tmp_path), [spec], ["u0"], options) == []


@pytest.mark.parametrize("options", [PLAIN, StoreOptions(compression="zstd"), StoreOptions(zarr=2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_held_bit_for_bit(tmp_path: Path, dtype: str, options: StoreOptions) -> None:
    spec = ArraySpec(("w",), (6, 4), dtype, (4, 4), (2, 2))
    array = some_array(spec)
    write(tmp_path, "u0", spec, array, options)
    stored = plain_read(tmp_path, "u0", "w", options)
    assert stored.dtype.name == dtype
    assert bits(stored.read().result()) == bits(array)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_shard_has_the_bytes_that_tensorstore_writes(tmp_path: Path, grid: Any) -> None:
    spec = ArraySpec(("w",), *grid[:1], "float32", *grid[1:])
    array = some_array(spec)
    write(tmp_path, "ours", spec, array)
    theirs = ts.open(array_spec(f"{tmp_path}/theirs", "u", spec, StoreOptions(ocdbt=False)), create=True).result()
    theirs.write(array).result()
    ours = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/ocdbt.process_ours/"}).result()
    for key in stored_keys(spec, PLAIN):
        if not key.endswith("zarr.json"):
            assert ours.read(key).result().value == Path(tmp_path, "theirs", key).read_bytes(), key


def test_the_metadata_is_what_tensorstore_writes(tmp_path: Path) -> None:
    for n, (dtype, options) in enumerate(itertools.product(DTYPES, EVERY_STORE)):
        if not options.ocdbt:
            spec = ArraySpec(("w",), (6, 4), dtype, (4, 4), (2, 4))
            ts.open(array_spec(f"{tmp_path}/{n}", "u", spec, options), create=True).result()
            theirs = json.loads(Path(tmp_path, str(n), metadata_key(spec, options)).read_text())
            assert zarr_metadata(spec, options) == theirs, (dtype, options)


def test_short_values_lie_in_the_tree(tmp_path: Path) -> None:
    """One read of a node finds the metadata of all arrays in it."""
    spec = ArraySpec(("w",), (2, 512), "int8", (1, 512), (1, 512))
    write(tmp_path, "u0", spec, some_array(spec))
    large = ArraySpec(("v",), (1024,), "int8", (1024,), (1024,))
    write(tmp_path, "u1", large, some_array(large))
    kinds = {}
    for attempt in ("u0", "u1"):
        files = ts.KvStore.open(f"file://{tmp_path}/ocdbt.process_{attempt}/").result()
        root = ts.ocdbt.dump(files).result()["versions"][0]["root"]["location"]
        kinds |= {
            e["key"]: "inline" if "inline_value" in e else "file"
            for e in ts.ocdbt.dump(files, root).result()["entries"]
        }
    assert kinds == {
        b"w/c/0/0": "inline",
        b"w/c/1/0": "inline",
        b"w/zarr.json": "inline",
        b"v/c/0": "file",
        b"v/zarr.json": "inline",
    }


def test_chunks_large_enough_for_direct_writes_aligned_and_not(tmp_path: Path) -> None:
    """9 MiB go to the device in one call, but for a tail that is no whole page, where the memory is on a page."""
    shape = (3, 9 * 2**18 + 5)
    straight = ArraySpec(("a",), shape, "float32", (1, shape[1]), (1, shape[1]))
    gathered = ArraySpec(("b",), (3, 9 * 2**18), "float32", (3, 9 * 2**18), (1, 9 * 2**17))
    first, second = some_array(straight), some_array(gathered, 1)
    with UnitWriter(str(tmp_path), "u0", PLAIN) as writer:
        for n, box in enumerate(boxes(straight)):
            memory = aligned_empty((1, shape[1]), "float32") if n % 2 == 0 else np.empty((1, shape[1]), np.float32)
            memory[...] = first[n]
            writer.write(straight, box, memory)
        writer.write(gathered, boxes(gathered)[0], second)
        writer.finish()
    assert bits(plain_read(tmp_path, "u0", "a").read().result()) == bits(first)
    assert bits(plain_read(tmp_path, "u0", "b").read().result()) == bits(second)


def test_the_caller_may_reuse_memory_after_the_next_write(tmp_path: Path) -> None:
    spec = ArraySpec(("w",), (20, 2**16), "uint8", (1, 2**16), (1, 2**16))
    turns = itertools.cycle([aligned_empty((1, 2**16), "uint8") for _ in range(2)])
    with UnitWriter(str(tmp_path), "u0", PLAIN) as writer:
        for n, box in enumerate(boxes(spec)):
            memory = next(turns)
            memory.fill(n)
            writer.write(spec, box, memory)
        writer.finish()
    assert np.array_equal(plain_read(tmp_path, "u0", "w").read().result()[:, 0], np.arange(20))


def test_a_database_of_many_keys_and_far_offsets(tmp_path: Path) -> None:
    """A sparse data file of 5 GB: offsets and lengths of every width, keys that share prefixes, empty and inline
    values.
    """
    (tmp_path / "d").mkdir()
    data = tmp_path / "d" / "data"
    values: dict[str, bytes | ocdbt.Stored] = {
        f"layers.{n}.w/c/{n % 7}/0": str(n).encode() * (n % 3) for n in range(700)
    }
    places = [(0, 1), (127, 128), (16384, 300), (2**31, 5000), (5 * 10**9, 40000)]
    with open(data, "wb") as file:
        for n, (offset, length) in enumerate(places):
            values[f"far.{n}"] = ocdbt.Stored(offset, length)
            file.seek(offset)
            file.write(bytes([n + 1]) * length)
        root = ocdbt.Stored(file.tell(), len(node := ocdbt.leaf_node("d/data", values)))
        file.write(node)
    (tmp_path / "manifest.ocdbt").write_bytes(ocdbt.manifest("d/data", root, values, 1))
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/"}).result()
    assert [key.decode() for key in store.list().result()] == sorted(values)
    for n, (_, length) in enumerate(places):
        assert store.read(f"far.{n}").result().value == bytes([n + 1]) * length
    for key, value in values.items():
        if isinstance(value, bytes):
            assert store.read(key).result().value == value
    dump = ts.ocdbt.dump(ts.KvStore.open(f"file://{tmp_path}/").result()).result()
    (version,) = dump["versions"]
    statistics = version["root"]["statistics"]
    assert statistics == {
        "num_keys": 705,
        "num_tree_bytes": root.length,
        "num_indirect_value_bytes": sum(n for _, n in places),
    }
    store.write("added", b"later").result()  # a database like any other
    assert store.read("added").result().value == b"later"


@pytest.mark.parametrize("direct", [True, False])
def test_a_log_file_holds_what_was_appended(tmp_path: Path, direct: bool) -> None:
    random = np.random.default_rng(0)
    file = LogFile(str(tmp_path / "log"), direct)
    began_direct = file.direct
    assert began_direct <= direct
    expected = bytearray()
    for size in (3, PAGE, BUFFER_BYTES + 7, 0, 1, BUFFER_BYTES - 11, 2 * BUFFER_BYTES, 5000):
        for aligned in (True, False):
            data = aligned_empty((size + 1,), np.uint8)[: size + 1] if aligned else np.empty(size + 1, np.uint8)
            data = data[0 if aligned else 1 :][:size]
            data[...] = random.integers(0, 256, size, dtype=np.uint8)
            if aligned and size % 2:
                file.align()
                expected += bytes(-len(expected) % PAGE)
            assert file.append(data) == len(expected)
            expected += data.tobytes()
    file.close()
    assert file.direct == began_direct  # nothing was asked of the device that it refuses
    assert file.size == len(expected)
    assert (tmp_path / "log").read_bytes() == expected


def test_a_file_system_that_refuses_direct_writes_gets_buffered_ones(tmp_path: Path) -> None:
    """What this file system refuses, a write that is no whole page, stands for one that refuses all."""
    file = LogFile(str(tmp_path / "log"))
    if not file.direct:
        pytest.skip("no direct I/O here")
    file._write(np.arange(100, dtype=np.uint8))
    assert not file.direct
    assert file.append(np.arange(200, dtype=np.uint8)) == 100
    file.close()
    assert (tmp_path / "log").read_bytes() == bytes([*range(100), *range(200)])


MEMORY = """
import re, sys
import numpy as np
from shardconv.sinks.chunk_writer import UnitWriter
from shardconv.sinks.direct import aligned_empty
from shardconv.sinks.spec import ArraySpec, StoreOptions
stage, inner = sys.argv[1], tuple(map(int, sys.argv[2:]))
spec = ArraySpec(("w",), (12, 8192, 2048), "uint16", (1, 8192, 2048), inner)
memory = [aligned_empty((1, 8192, 2048), "uint16") for _ in range(2)]
for array in memory:
    array.fill(7)
def peak():  # not ru_maxrss, which a process inherits
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before = peak()
with UnitWriter(stage, "u0", StoreOptions()) as writer:
    for n in range(12):
        writer.write(spec, ((n, n + 1), (0, 8192), (0, 2048)), memory[n % 2])
    writer.finish()
assert not {"tensorstore", "jax", "orbax"} & set(sys.modules)
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="tells peak memory on Linux")
@pytest.mark.parametrize(("inner", "copies"), [((1, 1024, 2048), 0), ((1, 8192, 512), 1)])
def test_memory_is_none_or_one_chunk_beyond_the_callers(tmp_path: Path, inner: tuple[int, ...], copies: int) -> None:
    """384 MB in 32 MiB chunks; numbers are MiB. TensorStore is not even loaded."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path), *map(str, inner)]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 32 * copies - 1 <= grown <= 32 * copies + 6


KILLED = """
import os, signal, sys
import numpy as np
from shardconv.sinks.chunk_writer import UnitWriter
from shardconv.sinks.spec import ArraySpec, StoreOptions
stage, zarr, ocdbt = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
spec = ArraySpec(("w",), (4, 4096), "int32", (1, 4096), (1, 4096))
writer = UnitWriter(stage, "killed", StoreOptions(zarr, ocdbt))
for n in range(3):
    writer.write(spec, ((n, n + 1), (0, 4096)), np.full((1, 4096), 9, np.int32))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("options", [PLAIN, StoreOptions(zarr=2), StoreOptions(ocdbt=False)], ids=str)
def test_a_killed_attempt_leaves_nothing_that_counts(tmp_path: Path, options: StoreOptions) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(options.zarr), str(options.ocdbt)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    spec = ArraySpec(("w",), (4, 4096), "int32", (1, 4096), (1, 4096))
    array = np.arange(4 * 4096, dtype=np.int32).reshape(4, 4096)
    write(tmp_path, "second", spec, array, options)
    assert sweep(str(tmp_path), ["second"]) == (("killed",) if options.ocdbt else ())
    assert check_grid(str(tmp_path), [spec], ["second"], options) == []
    assert bits(plain_read(tmp_path, "second", "w", options).read().result()) == bits(array)
    assert os.listdir(tmp_path) == (["ocdbt.process_second"] if options.ocdbt else ["w"])


def test_without_ocdbt_attempts_may_overlap(tmp_path: Path) -> None:
    options = StoreOptions(ocdbt=False)
    spec = ArraySpec(("w",), (64, 64), "float32", (4, 64), (4, 64))
    array = some_array(spec)
    threads = [threading.Thread(target=write, args=(tmp_path, f"u{n}", spec, array, options)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (tmp_path / "w" / "c" / "0" / "0.__lock").touch()  # what a killed writer leaves
    assert sweep(str(tmp_path), []) == ()
    assert not list(tmp_path.rglob("*.__lock"))
    assert check_grid(str(tmp_path), [spec], [], options) == []
    assert bits(plain_read(tmp_path, "", "w", options).read().result()) == bits(array)


def test_a_discarded_attempt_cannot_finish(tmp_path: Path) -> None:
    spec = ArraySpec(("w",), (2, 4), "int8", (1, 4), (1, 4))
    array = np.zeros((1, 4), np.int8)
    with UnitWriter(str(tmp_path), "slow", PLAIN) as writer:
        writer.write(spec, ((0, 1), (0, 4)), array)
        writer.write(spec, ((1, 2), (0, 4)), array)  # returns when the first is written
        discard(str(tmp_path), "slow")
        with pytest.raises(RunError, match="cannot write the checkpoint"):
            writer.finish()
    assert os.listdir(tmp_path) == []
    discard(str(tmp_path), "slow")  # again, and nothing happens


def test_sweep_finishes_a_discard_that_was_killed(tmp_path: Path) -> None:
    write(tmp_path, "winner", ArraySpec(("w",), (4,), "int8", (4,), (4,)), np.zeros(4, np.int8))
    (tmp_path / "discarded.loser" / "d").mkdir(parents=True)
    assert sweep(str(tmp_path), ["winner"]) == ()
    assert os.listdir(tmp_path) == ["ocdbt.process_winner"]


FULL = """
import resource, sys
import numpy as np
from shardconv.errors import RunError
from shardconv.sinks.chunk_writer import UnitWriter
from shardconv.sinks.spec import ArraySpec, StoreOptions
stage, zarr = sys.argv[1], int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
spec = ArraySpec(("w",), (4, 2**20), "int32", (1, 2**20), (1, 2**20))
try:
    with UnitWriter(stage, "u0", StoreOptions(zarr)) as writer:
        for n in range(4):
            writer.write(spec, ((n, n + 1), (0, 2**20)), np.zeros((1, 2**20), np.int32))
        writer.finish()
except RunError as error:
    print(error)
"""


def test_a_full_disk_is_a_report(tmp_path: Path) -> None:
    """Files may have 1 MiB here; the kernel's answer is that of a quota."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), "3"], check=True, capture_output=True, text=True)
    assert done.stdout == (
        "cannot write the checkpoint (1 problem):\n"
        f"  {tmp_path}: File too large\n"
        "      mend this and run the same command again; finished units are kept\n"
    )
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), "2"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("cannot write w (1 problem):\n")
    assert "File too large" in done.stdout


def test_what_a_caller_can_do_wrong(tmp_path: Path) -> None:
    spec = ArraySpec(("w",), (6, 4), "float32", (4, 4), (2, 4))
    with pytest.raises(ValueError, match=r"an attempt's name must be letters and digits: 'u_1'"):
        UnitWriter(str(tmp_path), "u_1", PLAIN)
    for options in (PLAIN, StoreOptions(zarr=2)):
        with UnitWriter(str(tmp_path), f"u{options.zarr}", options) as writer:
            with pytest.raises(
                ValueError, match=r"w: \(\(0, 2\), \(0, 4\)\) is not one whole chunk of \(6, 4\) in chunks of \(4, 4\)"
            ):
                writer.write(spec, ((0, 2), (0, 4)), np.zeros((2, 4), np.float32))
            with pytest.raises(
                ValueError, match=r"expected C-contiguous float32 of shape \(4, 4\), got float64 of shape \(4, 4\)"
            ):
                writer.write(spec, ((0, 4), (0, 4)), np.zeros((4, 4)))
            with pytest.raises(ValueError, match="C-contiguous"):
                writer.write(spec, ((0, 4), (0, 4)), np.zeros((4, 4), np.float32).T)
            writer.write(spec, ((0, 4), (0, 4)), np.zeros((4, 4), np.float32))
            writer.write(spec, ((0, 4), (0, 4)), np.zeros((4, 4), np.float32))
            with pytest.raises(ValueError, match="is written twice by one attempt"):
                writer.finish()
    with pytest.raises(ValueError, match=r"w: inner chunk \(3, 4\) does not divide chunk \(4, 4\)"):
        ArraySpec(("w",), (6, 4), "float32", (4, 4), (3, 4))
    with pytest.raises(ValueError, match="not of one rank"):
        ArraySpec(("w",), (6, 4), "float32", (4,), (4,))
    with pytest.raises(ValueError, match="no such store"):
        StoreOptions(compression="lz4")  # type: ignore[arg-type]


def test_a_box_behind_the_last_chunk_is_no_chunk() -> None:
    spec = ArraySpec(("w",), (6, 4), "float32", (4, 4), (2, 4))
    assert spec.index(((4, 6), (0, 4))) == (1, 0)
    with pytest.raises(ValueError, match="is not one whole chunk"):
        spec.index(((8, 6), (0, 4)))


def layers(count: int) -> list[ArraySpec]:
    return [ArraySpec(("layers", str(n), "w"), (4, 4), "int8", (2, 4), (2, 4)) for n in range(count)]


def write_chunk(stage: Path, attempt: str, spec: ArraySpec, *numbers: int, options: StoreOptions = PLAIN) -> None:
    with UnitWriter(str(stage), attempt, options) as writer:
        for number in numbers:
            box = boxes(spec)[number]
            writer.write(spec, box, np.zeros(box_shape(box), spec.numpy))
        writer.finish()


def test_missing_chunks_are_summed_up_by_template(tmp_path: Path) -> None:
    specs = layers(5)
    write_chunk(tmp_path, "u0", specs[0], 0, 1)
    write_chunk(tmp_path, "u1", specs[1], 1)
    assert check_grid(str(tmp_path), specs, ["u0", "u1"], PLAIN) == [
        Problem(
            "layers.{}.w: 10 of 15 keys are missing, "
            "such as layers.1.w/c/0/0, layers.2.w/zarr.json, layers.2.w/c/0/0, ...",
            "run again with --restart: what is written does not belong to this plan",
        )
    ]


def test_a_chunk_that_two_attempts_hold_is_named_with_both(tmp_path: Path) -> None:
    (spec,) = layers(1)
    write_chunk(tmp_path, "a", spec, 0, 1)
    write_chunk(tmp_path, "b", spec, 1)
    assert check_grid(str(tmp_path), [spec], ["a", "b"], PLAIN) == [
        Problem(
            "layers.{}.w: 1 chunks are written more than once, such as layers.0.w/c/1/0 (by a, b)",
            "keep one attempt of each unit",
        )
    ]


@pytest.mark.parametrize("options", [PLAIN, StoreOptions(zarr=2), StoreOptions(ocdbt=False)], ids=str)
def test_strangers_are_told(tmp_path: Path, options: StoreOptions) -> None:
    specs = layers(2)
    for n, spec in enumerate(specs):
        write_chunk(tmp_path, f"u{n}", spec, 0, 1, options=options)
    keys = ", ".join(sorted(stored_keys(specs[1], options)))
    assert check_grid(str(tmp_path), specs[:1], ["u0", "u1"], options) == [
        Problem(
            f"layers.{{}}.w: 3 keys belong to no array of the plan, such as {keys}",
            "run again with --restart: what is written does not belong to this plan",
        )
    ]


def test_another_shape_or_dtype_under_the_same_name_is_told(tmp_path: Path) -> None:
    (spec,) = layers(1)
    write_chunk(tmp_path, "u0", spec, 0, 1)
    for other in (
        ArraySpec(spec.path, (4, 4), "uint8", (2, 4), (2, 4)),
        ArraySpec(spec.path, (3, 4), "int8", (2, 4), (2, 4)),
        ArraySpec(spec.path, (4, 4), "int8", (2, 4), (1, 4)),
    ):
        assert check_grid(str(tmp_path), [other], ["u0"], PLAIN) == [
            Problem(
                "layers.{}.w: the metadata of 1 arrays is not the planned one, such as layers.0.w/zarr.json",
                "run again with --restart: what is written does not belong to this plan",
            )
        ]


def test_a_lost_database_is_told(tmp_path: Path) -> None:
    (spec,) = layers(1)
    write_chunk(tmp_path, "u0", spec, 0, 1)
    assert check_grid(str(tmp_path), [spec], ["u0", "u1"], PLAIN) == [
        Problem(
            f"1 of 2 unit databases are not there, such as {tmp_path}/ocdbt.process_u1",
            "run again with --restart: they were removed after they had been written",
        )
    ]


@pytest.mark.parametrize("file", ["manifest.ocdbt", "d/*"])
def test_a_damaged_database_is_told(tmp_path: Path, file: str) -> None:
    """Every byte of a manifest or a tree node is under a checksum; chunks are not, the check of what is restored is for
    them.
    """
    (spec,) = layers(1)
    write_chunk(tmp_path, "u0", spec, 0, 1)
    (path,) = tmp_path.glob(f"ocdbt.process_u0/{file}")
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    first, _ = check_grid(str(tmp_path), [spec], ["u0"], PLAIN)
    assert first.fact.startswith(f"1 unit databases cannot be read, such as {tmp_path}/ocdbt.process_u0\n")
    assert "CRC-32C checksum verification failed" in first.fact
    assert first.remedy == "run again with --restart, on a disk that keeps what it is given"


def test_two_arrays_of_one_name_are_told(tmp_path: Path) -> None:
    specs = [ArraySpec(path, (4,), "int8", (4,), (4,)) for path in (("a.b", "c"), ("a", "b.c"))]
    write_chunk(tmp_path, "u0", specs[0], 0)
    assert check_grid(str(tmp_path), specs, ["u0"], PLAIN) == [
        Problem(
            "a.b.c: 2 arrays have this name", "rename one in the layout; Orbax joins the keys of a pytree with dots"
        )
    ]


class Pages(ctypes.Structure):
    """What cachestat(2) says of a file: pages in the cache, those not written yet, those being written, and two counts more."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "in_writing", "evicted", "recently")]


def is_written_out(path: Path) -> bool:
    """Whether the kernel has none of the file's pages still to write; OSError where it does not tell, as before Linux 6.5."""
    pages, whole = Pages(), (ctypes.c_uint64 * 2)(0, 0)
    with open(path, "rb") as file:
        if ctypes.CDLL(None, use_errno=True).syscall(451, file.fileno(), whole, ctypes.byref(pages), 0):
            raise OSError(ctypes.get_errno(), "cachestat")
    return pages.dirty == pages.in_writing == 0


@pytest.fixture
def telling(tmp_path: Path) -> Path:
    """A directory on a file system that tells what it has written out."""
    (tmp_path / "control").write_bytes(bytes(5000))
    try:
        tells = not is_written_out(tmp_path / "control")
    except OSError:
        tells = False
    if not tells:
        pytest.skip("this file system does not tell what it has written")
    return tmp_path


@pytest.mark.parametrize("options", EVERY_STORE, ids=str)
def test_what_is_finished_is_on_the_disk(telling: Path, options: StoreOptions) -> None:
    spec = ArraySpec(("w",), (3, 5000), "float32", (1, 5000), (1, 2500))
    write(telling / "stage", "u0", spec, some_array(spec), options)
    files = [path for path in (telling / "stage").rglob("*") if path.is_file()]
    assert [path for path in files if not is_written_out(path)] == []


def test_a_buffered_log_file_is_on_the_disk_when_closed(telling: Path) -> None:
    file = LogFile(str(telling / "log"), direct=False)
    file.append(np.ones(5000, np.uint8))
    file.close()
    assert is_written_out(telling / "log")


def test_the_level_of_compression_is_passed_on(tmp_path: Path) -> None:
    for options in (StoreOptions(compression="zstd", level=7), StoreOptions(2, True, "zstd", 7)):
        spec = ArraySpec(("w",), (4,), "int8", (4,), (4,))
        write(tmp_path, f"u{options.zarr}", spec, np.zeros(4, np.int8), options)
        stored = plain_read(tmp_path, f"u{options.zarr}", "w", options).spec().to_json()["metadata"]
        assert '"level": 7' in json.dumps(stored)


def test_zeros_are_stored(tmp_path: Path) -> None:
    """A missing chunk must never look like zeros, so zeros are not left out."""
    for n, options in enumerate(EVERY_STORE):
        spec = ArraySpec(("w",), (4, 4), "float32", (2, 4), (2, 4))
        stage = tmp_path / str(n)
        write(stage, "u0", spec, np.zeros((4, 4), np.float32), options)
        assert check_grid(str(stage), [spec], ["u0"], options) == []


def test_an_empty_unit_writes_nothing(tmp_path: Path) -> None:
    with UnitWriter(str(tmp_path), "u0", PLAIN) as writer:
        assert writer.finish() == WriteCounts(0, 0, 0)
    assert os.listdir(tmp_path) == []


def test_a_bfloat16_is_not_copied_as_floats(tmp_path: Path) -> None:
    """A signalling NaN stays one through a gather."""
    spec = ArraySpec(("w",), (2, 4), "bfloat16", (2, 4), (2, 2))
    array = np.full((2, 4), 0x7F81, np.uint16).view(ml_dtypes.bfloat16)
    write(tmp_path, "u0", spec, array)
    assert bits(plain_read(tmp_path, "u0", "w").read().result()) == bits(array)
