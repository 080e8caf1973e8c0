"""A whole `shardconv run` on a cluster whose nodes are lost and added meanwhile; what it says, and that its tensors stay out of Ray."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conversions import Conversion, make_config, make_source, plan_finely, restored
from ray_nodes import STORE, nodes, processes
from slow_units import holding

from shardconv.config import RunOptions
from shardconv.conversion import run
from shardconv.planning import budgeted
from shardconv.run import Finished, driver

ray = pytest.importorskip("ray")
from shardconv.run import ray as executor  # noqa: E402

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run in one process makes of it."""
    root = tmp_path_factory.mktemp("undisturbed")
    run(make_config(root, source), RunOptions(restart=False, overwrite=False, verbosity=-1, json_logs=False))
    return restored(root / "out")


def command(root: Path, source: Path, *words: str, **environment: str) -> "subprocess.Popen[str]":
    """`shardconv run`, slowly, with events on stderr."""
    make_config(root, source, 'workers.executor="ray"')
    program = [sys.executable, str(HERE / "slow_command.py"), "run", str(root / "config.toml")]
    return subprocess.Popen(
        [*program, "--executor", "ray", "--set", "workers.count=0", "--json-logs", *words],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(HERE.parent), **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_until(true: Callable[[], bool], running: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()
        time.sleep(0.1)


def pids(group: "subprocess.Popen[bytes]") -> set[int]:
    return {process.pid for process in processes(group)}


def test_a_node_is_lost_and_another_added_and_the_checkpoint_is_the_same(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    with nodes() as cluster:
        cluster.start("--num-cpus=1")
        lost = cluster.start("--num-cpus=1")
        (tmp_path / "hold").touch()
        running = command(tmp_path, source, "--address", cluster.address)
        wait_until(lambda: bool(holding(tmp_path) & pids(lost)), running)
        lost_pids = pids(lost)
        cluster.kill(lost)
        added = cluster.start("--num-cpus=1")
        wait_until(lambda: bool(holding(tmp_path) & pids(added)), running)
        added_pids = pids(added)
        (tmp_path / "hold").unlink()
        out, said = running.communicate(timeout=120)
    assert running.returncode == 0, said
    events = [json.loads(line) for line in said.splitlines()]
    assert out == ""  # Ray tells at length of a node that it lost
    finished = {event["pid"] for event in events if event["event"] == "finished"}
    assert finished & lost_pids and finished & added_pids
    report = json.loads((tmp_path / "out.shardconv" / "report.json").read_text())
    assert report["check"]["equal"]
    assert 1 <= report["units"]["retried"] <= 2  # what ran on the lost node, and what was queued beside it
    assert restored(tmp_path / "out") == undisturbed


def test_tensors_stay_out_of_the_object_store(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "WORK", "slow_units:run")
    with nodes() as cluster:
        cluster.start("--num-cpus=1")
        cluster.start("--num-cpus=1")
        config = make_config(tmp_path, source, 'workers.executor="ray"', f'workers.address="{cluster.address}"', "workers.count=0")
        conversion = Conversion(tmp_path, config, plan_finely(config))
        with executor.connected(cluster.address, None, verbose=False):
            whole = free_store()
            assert whole == 2 * STORE
            seen: list[float] = []
            conversion.drive(lambda told: seen.append(free_store()) if isinstance(told, Finished) else None)
            assert len(seen) == len(conversion.plan.units) and set(seen) == {whole}
            kept = ray.put(bytes(1 << 20))
            deadline = time.monotonic() + 10
            while free_store() == whole:
                assert time.monotonic() < deadline, "the figure does not see objects, so it means nothing"
                time.sleep(0.1)
            del kept
    assert restored(tmp_path / "out") == undisturbed


def free_store() -> float:
    return float(ray.available_resources()["object_store_memory"])


def test_the_memory_budget_is_a_share_of_the_smallest_node(source: Path, tmp_path: Path) -> None:
    with nodes() as cluster:
        cluster.start("--num-cpus=2", f"--memory={6 << 30}")
        cluster.start("--num-cpus=2", f"--memory={2 << 30}")
        config = make_config(tmp_path, source, 'workers.executor="ray"', 'workers.memory_budget="auto"')
        with budgeted(config, cluster.address, verbose=False) as settled:
            assert settled.workers.memory_budget == 1 << 29
            assert ray.is_initialized()
        assert not ray.is_initialized()
