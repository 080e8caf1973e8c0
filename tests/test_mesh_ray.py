"""A mesh that is shared by Ray actors: the same checkpoint, a lost actor, and nothing in the object store."""

import os
import signal
from pathlib import Path

import pytest
from conversions import Conversion, make_config, make_source, restored
from test_mesh_run import RULES, TWO, WINDOWS, conversion_of
from waiting import alive

from shardconv.planning import plan_from_config
from shardconv.run import Finished, Ready, Restarted, Told
from shardconv.run.heartbeat import read_workers
from shardconv.run.ray_group import bundle

ray = pytest.importorskip("ray")


def test_actors_share_the_mesh_and_a_lost_one_costs_one_start(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    (tmp_path / "streamed").mkdir()
    streamed = conversion_of(tmp_path / "streamed", source)
    streamed.drive()
    config = make_config(tmp_path, source, *TWO, *WINDOWS, 'workers.executor="ray"')
    conversion = Conversion(tmp_path, config, plan_from_config(config))
    pids: set[int] = set()
    free: list[float] = []

    def kill_one(told: Told) -> None:
        pids.update(worker.pid for worker in read_workers(conversion.ledger.workers))
        if isinstance(told, Finished):
            free.append(ray.available_resources()["object_store_memory"] / ray.cluster_resources()["object_store_memory"])
        if isinstance(told, Finished) and len(free) == 1:
            os.kill(told.pid, signal.SIGKILL)

    conversion.drive(kill_one)
    assert next(told.where for told in conversion.told if isinstance(told, Ready)) == "2 Ray actors on this machine"
    (retried,) = (told for told in conversion.told if isinstance(told, Restarted))
    assert retried.error.startswith("process ")
    assert restored(conversion.out) == restored(streamed.out)
    assert set(free) == {1.0}
    assert len(pids) >= 3
    assert not any(alive(pid) for pid in pids)
    assert not ray.is_initialized()


@pytest.mark.parametrize(("processes", "placement"), [(1, "mesh-host"), (4, "mesh-device")])
def test_one_actor_or_four_write_what_a_conversion_that_streams_writes(tmp_path: Path, processes: int, placement: str) -> None:
    source = make_source(tmp_path)
    (tmp_path / "streamed").mkdir()
    streamed = conversion_of(tmp_path / "streamed", source)
    streamed.drive()
    eight = ("mesh.axes.data=2", "mesh.axes.fsdp=2", "mesh.axes.tensor=2", *RULES, f"mesh.processes={processes}")
    conversion = conversion_of(tmp_path, source, *eight, f'mesh.placement="{placement}"', 'workers.executor="ray"')
    outcome = conversion.drive()
    assert outcome.where == f"{processes} Ray actor{'s' if processes > 1 else ''} on this machine"
    assert restored(conversion.out) == restored(streamed.out)


@pytest.mark.parametrize(
    ("count", "platform", "nodes", "asked"),
    [
        (4, "cpu", [{"CPU": 8}], {"CPU": 1}),
        (2, "gpu", [{"CPU": 8, "GPU": 8}], {"CPU": 1, "GPU": 4}),
        (2, "gpu", [{"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 8}, {"CPU": 8}], {"CPU": 1, "GPU": 8}),
        (2, "tpu", [{"CPU": 8, "TPU": 4}, {"CPU": 8, "TPU": 4}], {"CPU": 1, "TPU": 4}),
    ],
)
def test_what_an_actor_asks_for(count: int, platform: str, nodes: list[dict[str, float]], asked: dict[str, float]) -> None:
    assert bundle(count, platform, [{"Resources": node} for node in nodes]) == asked
