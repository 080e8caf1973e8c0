"""The sink's other half: the commit, what plain Orbax makes of it, and what a kill leaves.

Checkpoints are written and committed here, and read by `read_checkpoints.py`, a process of its own that does not import
shardconv.
"""

import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from stored_dtypes import DTYPES

from shardconv.boxes import box_shape, chunk_box, slices
from shardconv.errors import CheckError, ConfigError
from shardconv.sinks.chunk_writer import UnitWriter
from shardconv.sinks.commit import CommitRequest
from shardconv.sinks.orbax_commit import commit
from shardconv.sinks.paths import create_stage, final_path, stage_path
from shardconv.sinks.spec import ArraySpec, StoreOptions

ORBAX = tuple(map(int, ocp.__version__.split(".")[:3]))
V1_READS_V0 = ORBAX >= (0, 11, 36)  # before, it knows no checkpoints but its own
V1_TRAINING_READS_STATE = ORBAX >= (0, 12)  # before, it looks for "pytree"
# Older Orbax leaves its event loops open, which is told when they are collected.
OPEN_LOOPS = "error" if ORBAX >= (0, 11, 36) else "ignore"
pytestmark = pytest.mark.filterwarnings(f"{OPEN_LOOPS}::pytest.PytestUnraisableExceptionWarning")
COMPLETE = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # the latter since Orbax 0.12.3

READER = Path(__file__).with_name("read_checkpoints.py")
METADATA = {
    "scan_layers": True,
    "shardconv": {"partition_specs": {"params.w": ["fsdp", None]}, "checksums": {"params.w": "0f"}},
}
PLAIN = StoreOptions()
STORES = {
    "zarr3 zstd": StoreOptions(compression="zstd"),
    "zarr2": StoreOptions(zarr=2),
    "zarr2 zstd": StoreOptions(zarr=2, compression="zstd"),
    "zarr3 files": StoreOptions(ocdbt=False),
    "zarr2 files zstd": StoreOptions(zarr=2, ocdbt=False, compression="zstd"),
}
PLACES = {
    "bare": (None, None),
    "step": (3, None),
    "maxtext": (0, "items"),
    "default": (0, "default"),
    "state": (0, "state"),
    "item": (None, "items"),
}

# A scanned leaf, one layer a chunk, inner chunks a quarter; a leaf whose last chunks are clipped; a scalar; a vector;
# zeros.
SPECS = {
    "params.layers.w": (
        ArraySpec(("params", "layers", "w"), (16, 3, 8), "bfloat16", (16, 1, 8), (4, 1, 8)),
        ["y", None, "x"],
    ),
    "params.clipped": (ArraySpec(("params", "clipped"), (10, 6), "float32", (4, 4), (2, 2)), ["x", None]),
    "params.scalar": (ArraySpec(("params", "scalar"), (), "float32", (), ()), []),
    "params.norm": (ArraySpec(("params", "norm"), (24,), "float32", (8,), (4,)), ["y"]),
    "params.padding": (ArraySpec(("params", "padding"), (8, 4), "bfloat16", (4, 4), (2, 4)), [None, "y"]),
}


def values(spec: ArraySpec) -> Any:
    """Small numbers, all of which every dtype but the smallest holds; zeros in what is called padding."""
    high = {"bool": 2, "float4_e2m1fn": 3, "float8_e8m0fnu": 2}.get(spec.dtype, 8)
    numbers = np.random.default_rng(len(spec.name)).integers(0, 1 if "padding" in spec.name else high, spec.shape)
    return (numbers + (spec.dtype == "float8_e8m0fnu")).astype(spec.numpy)


def write(
    out: str, step: int | None, item: str | None, specs: list[ArraySpec], options: StoreOptions = PLAIN
) -> CommitRequest:
    """One unit per chunk."""
    stage = create_stage(out, step, item)
    attempts = []
    for spec in specs:
        array = values(spec)
        for number in range(math.prod(spec.grid)):
            attempts.append(f"u{len(attempts)}x0")
            box = chunk_box(spec.shape, spec.chunk, number)
            with UnitWriter(stage, attempts[-1], options) as writer:
                writer.write(spec, box, np.ascontiguousarray(array[slices(box)]).reshape(box_shape(box)))
                writer.finish()
    return CommitRequest(out, step, item, tuple(specs), tuple(attempts), options, METADATA)


def few() -> list[ArraySpec]:
    return [spec for spec, _ in SPECS.values()]


def arrays(specs: list[ArraySpec], partitions: dict[str, list[str | None]]) -> dict[str, Any]:
    return {s.name: [s.shape, s.dtype, values(s).tobytes().hex(), partitions.get(s.name, [None, "y"])] for s in specs}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What Orbax reads of checkpoints in all places, of all stores, of all dtypes."""
    root = tmp_path_factory.mktemp("checkpoints")
    dtypes = [ArraySpec(("params", dtype), (6, 8), dtype, (4, 8), (2, 4)) for dtype in DTYPES]
    jobs = [(name, *place, few(), PLAIN) for name, place in PLACES.items()]
    jobs += [(name, None, None, few(), options) for name, options in STORES.items()]
    jobs += [("dtypes", None, None, dtypes, PLAIN), ("dtypes zarr2", None, None, dtypes, STORES["zarr2"])]
    expected = []
    for name, step, item, specs, options in jobs:
        out = f"{root}/{name}"
        assert commit(write(out, step, item, specs, options)).path == (out if step is None else f"{out}/{step}")
        partitions = {n: partition for n, (_, partition) in SPECS.items()}
        expected.append({"name": name, "step": step, "item": item, "arrays": arrays(specs, partitions)})
    (root / "expected.json").write_text(json.dumps(expected))
    # Without this, jax makes 32 bits of 64 when it puts an array on a device.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_ENABLE_X64": "1"}
    command = [sys.executable, str(READER), str(root)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


PLAIN_CALLS = {
    "v0 PyTree, no target": "equal, numpy",
    "v0 PyTree, numpy": "equal, numpy",
    "v0 PyTree, 8 devices": "equal, 8 devices",
    "v0 Standard, no target": "equal, numpy",
    "v0 Standard, numpy": "equal, numpy",
    "v0 Standard, 1 device": "equal, 1 devices",
    "v0 Standard, 8 devices": "equal, 8 devices",
    "v1 load, no target": "equal, numpy",
    "v1 load, numpy": "equal, numpy",
    "v1 load, 1 device": "equal, 1 devices",
    "v1 load, 8 devices": "equal, 8 devices",
}
MANAGERS = {
    "step": [],
    "default": ["v0 Manager, no target", "v0 Manager, item, 8 devices"],
    "maxtext": ["v0 Manager, item, no target", "v0 Manager, item, 8 devices"],
    "state": [
        "v0 Manager, item, no target",
        "v0 Manager, item, 8 devices",
        "v1 training, no target",
        "v1 training, 8 devices",
    ],
}


@pytest.mark.parametrize("name", [*PLACES, *STORES, "dtypes", "dtypes zarr2"])
def test_both_generations_of_orbax_restore_it_bit_for_bit(report: Any, name: str) -> None:
    found = report[name]["calls"]
    plain = {call: verdict for call, verdict in PLAIN_CALLS.items() if V1_READS_V0 or not call.startswith("v1")}
    assert {call: found[call] for call in plain} == plain
    managers = {call for call, verdict in found.items() if call not in PLAIN_CALLS and verdict.startswith("equal")}
    readers = MANAGERS.get(name, [])
    assert managers == {call for call in readers if V1_TRAINING_READS_STATE or not call.startswith("v1")}


@pytest.mark.parametrize("name", [*PLACES, *STORES])
def test_custom_metadata_is_found_by_plain_calls(report: Any, name: str) -> None:
    found = dict(report[name]["metadata"])
    if name == "step":  # the manager wants an item
        found.pop("v0 Manager")
    if not V1_READS_V0:
        found.pop("v1")
    assert found == dict.fromkeys(found, METADATA)
    assert "v0 PyTree" in found


def test_the_step_is_as_maxtext_reads_it(tmp_path: Path) -> None:
    request = write(f"{tmp_path}/out", 0, "items", few())
    commit(request)
    assert final_path(f"{tmp_path}/out", 0, "items") == f"{tmp_path}/out/0/items"
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert os.listdir(tmp_path / "out") == ["0"]
    document = json.loads((tmp_path / "out/0/_CHECKPOINT_METADATA").read_text())
    times = [document.pop(f"{when}_timestamp_nsecs") for when in ("init", "commit")]
    assert times == sorted(times)
    (handler,) = document["item_handlers"].values()
    assert handler.endswith(".PyTreeCheckpointHandler")
    assert document == {"item_handlers": {"items": handler}, "custom_metadata": METADATA}
    names = {name for name in os.listdir(tmp_path / "out/0/items") if not name.startswith("ocdbt.process_")}
    assert names == {"_METADATA", "manifest.ocdbt", "d"}


def test_what_is_written_cannot_be_read_before_the_commit(tmp_path: Path) -> None:
    from orbax.checkpoint.experimental import v1

    load = getattr(v1, "load", None) or v1.load_pytree  # its name before Orbax 0.12
    out = f"{tmp_path}/out"
    for step, item in [(None, None), (0, "items")]:
        write(out, step, item, few())
        stage = stage_path(out, step, item)
        assert not os.path.exists(final_path(out, step, item))
        with pytest.raises((ValueError, FileNotFoundError)):
            ocp.PyTreeCheckpointer().restore(stage)
        with pytest.raises((ValueError, FileNotFoundError)):
            load(stage)
    assert ocp.CheckpointManager(out).all_steps() == []


def test_a_finished_output_is_refused(tmp_path: Path) -> None:
    out = f"{tmp_path}/out"
    request = write(out, None, None, few()[-1:])
    os.makedirs(out)  # an empty directory is nothing finished
    commit(request)
    again = write(out, None, None, few()[-1:])
    with pytest.raises(ConfigError) as refused:
        commit(again)
    assert str(refused.value) == (
        f"the output exists (1 problem):\n  {out} exists\n      choose another output.path or output.step, or remove it"
    )
    with pytest.raises(ConfigError) as refused:
        commit(write(out, 1, "items", few()[-1:]))
    assert str(refused.value) == (
        "the output exists (1 problem):\n"
        f"  {out} is a checkpoint itself; step 1 cannot go into it\n"
        "      choose another output.path, or leave output.step out"
    )


def test_an_incomplete_output_is_refused_and_kept(tmp_path: Path) -> None:
    out = f"{tmp_path}/out"
    request = write(out, None, None, few())
    before = sorted(os.listdir(stage_path(out, None, None)))
    with pytest.raises(CheckError) as refused:
        commit(replace(request, arrays=(*request.arrays, replace(few()[0], path=("more",)))))
    assert str(refused.value) == (
        "the checkpoint is not complete (1 problem):\n"
        "  more: 4 of 4 keys are missing, such as more/zarr.json, more/c/0/0/0, more/c/0/1/0, ...\n"
        "      run again with --restart: what is written does not belong to this plan"
    )
    assert not os.path.exists(out)
    assert sorted(os.listdir(stage_path(out, None, None))) == before
    with pytest.raises(CheckError, match=r"other.orbax-checkpoint-tmp is not there"):
        commit(replace(request, out=f"{tmp_path}/other"))
    assert commit(request).path == out


def test_losers_do_not_get_into_the_checkpoint(tmp_path: Path) -> None:
    out, (spec,) = f"{tmp_path}/out", few()[-1:]
    request = write(out, None, None, [spec])
    with UnitWriter(stage_path(out, None, None), "u0x1", PLAIN) as writer:
        box = chunk_box(spec.shape, spec.chunk, 0)
        writer.write(spec, box, np.ones(box_shape(box), spec.numpy))
        writer.finish()
    assert commit(request).discarded == ("u0x1",)
    assert not [name for name in os.listdir(out) if "u0x1" in name]


@pytest.mark.parametrize("options", [PLAIN, StoreOptions(ocdbt=False)], ids=str)
def test_what_a_killed_commit_left_is_not_in_the_checkpoint(tmp_path: Path, options: StoreOptions) -> None:
    out, (spec,) = f"{tmp_path}/out", few()[-1:]
    request = write(out, 0, "items", [spec], options)
    stage = Path(stage_path(out, 0, "items"))
    data = set(os.listdir(stage))
    for folder in (stage, stage.parent):
        (folder / "d").mkdir()
        for name in ("_METADATA", "manifest.ocdbt", "_sharding", "d/0"):
            (folder / name).write_text("left")
    commit(request)
    assert {"_CHECKPOINT_METADATA", "items"} <= set(os.listdir(f"{out}/0")) <= {*COMPLETE, "items"}
    assert set(os.listdir(f"{out}/0/items")) - data <= {"_METADATA", "manifest.ocdbt", "d"}
    assert not any(path.read_bytes() == b"left" for path in Path(out).rglob("*") if path.is_file())


KILL_AT_EVERY_WRITE = """
import os, pickle, signal, sys
from pathlib import Path
from shardconv.sinks.orbax_commit import commit
from shardconv.sinks.paths import checkpoint_path
request = pickle.loads(Path(sys.argv[1]).read_bytes())
done = checkpoint_path(request.out, request.step)
place = os.path.dirname(request.out)
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}
seen = 0

def hook(event, args):
    global seen
    changes = event in CHANGES or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    if changes and isinstance(args[0], (str, os.PathLike)) and os.fspath(args[0]).startswith(place):
        if seen == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

for limit in range(100):  # the n-th run is killed before its n-th change, and starts from what the run before has left
    child = os.fork()
    if not child:
        sys.addaudithook(hook)
        commit(request)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    print(limit, os.path.exists(done), flush=True)
    if os.path.exists(done):
        break
"""


@pytest.mark.parametrize(
    ("place", "options"),
    [((None, None), PLAIN), ((0, "items"), PLAIN), ((None, None), StoreOptions(ocdbt=False))],
    ids=["bare", "items", "files"],
)
def test_a_commit_killed_before_any_of_its_writes_is_run_again(
    tmp_path: Path, place: Any, options: StoreOptions
) -> None:
    out = f"{tmp_path}/out"
    request = write(out, *place, few(), options)
    (tmp_path / "request").write_bytes(pickle.dumps(request))
    command = [sys.executable, "-c", KILL_AT_EVERY_WRITE, str(tmp_path / "request")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *killed, last = done.stdout.split("\n")[:-1]
    assert len(killed) >= 5
    assert all(line.endswith("False") for line in killed)
    assert last == f"{len(killed)} True"
    restored = ocp.PyTreeCheckpointer().restore(final_path(out, *place))["params"]
    for spec in few():
        leaf = restored
        for key in spec.path[1:]:
            leaf = leaf[key]
        assert np.asarray(leaf).tobytes() == values(spec).tobytes()
