"""A mesh over the hosts of a TPU slice, as far as Ray knows: actors on its hosts, in their order; the devices are CPUs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conversions import Conversion, make_source, restored
from ray_nodes import Nodes, nodes
from test_mesh_run import TWO, conversion_of
from test_tpu_slice import SLICE

from shardconv.errors import ConfigError
from shardconv.run import Finished, gang
from shardconv.run.member import Hello

ray = pytest.importorskip("ray")

REQUEST = gang.MeshRequest("mesh-device", "tpu", 0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes() as cluster:
        cluster.start("--num-cpus=1")
        for host in (1, 0):
            cluster.start("--num-cpus=2", '--resources={"TPU": 4}', TPU_WORKER_ID=str(host), **SLICE)
        ray.init(address=cluster.address, logging_level="ERROR")
        yield cluster
        ray.shutdown()


@pytest.fixture
def conversion(tmp_path: Path) -> Conversion:
    return conversion_of(tmp_path, make_source(tmp_path), *TWO)


def test_processes_are_the_hosts_of_the_slice_in_their_order(
    cluster: Nodes, conversion: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardconv.run.ray_group import RayGroup

    groups: list[RayGroup] = []
    hellos: dict[int, Hello] = {}

    class Watched(RayGroup):
        def answers(self, timeout: float) -> list[tuple[int, object]]:
            found = super().answers(timeout)
            hellos.update({member: answer for member, answer in found if isinstance(answer, Hello)})
            return found

    def start() -> RayGroup:
        groups.append(Watched(2, "tpu", "a slice"))
        assert ray.available_resources().get("TPU", 0) == 0  # all chips of both hosts
        return groups[0]

    def on_the_slice(self: object, pending: list[int]) -> Iterator[object]:
        return gang.execute(
            conversion.ledger.state, pending, start=start, request=REQUEST, platform="cpu", patience=gang.Patience(60, 600)
        )

    monkeypatch.setattr("shardconv.run.driver._Run._on_mesh", on_the_slice)
    outcome = conversion.drive()
    assert sorted(hello.rank for hello in hellos.values() if hello.rank is not None) == [0, 1]
    positions = {unit: position for window in conversion.plan.windows for position, unit in window.units}
    first = {told.pid for told in conversion.told if isinstance(told, Finished) and positions[told.unit] < 2}
    assert first == {next(hello.pid for hello in hellos.values() if hello.rank == 0)}
    monkeypatch.undo()
    streamed = conversion_of(conversion.root / "source", conversion.root / "source")
    streamed.drive()
    assert restored(Path(outcome.checkpoint)) == restored(streamed.out)
    assert ray.available_resources().get("TPU", 0) == 8


def test_another_number_of_processes_is_refused(cluster: Nodes) -> None:
    from shardconv.run.ray_group import RayGroup

    with pytest.raises(ConfigError) as caught:
        RayGroup(4, "tpu", "a slice")
    assert str(caught.value) == (
        "the processes are not the hosts of a slice (1 problem):\n"
        "  a slice of topology 2x2x2 (v5p-16) has 2 hosts, mesh.processes is 4\n"
        "      set mesh.processes = 2"
    )
