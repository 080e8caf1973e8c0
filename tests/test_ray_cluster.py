"""The Ray executor on a cluster that it joins: two nodes on this machine."""

import os
import re
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from waiting import wait_for_workers

from shardconv.budget import MIB, MOST
from shardconv.errors import RunError
from shardconv.ledger import Ledger
from shardconv.run import Finished, Note, Patience, Ready, Retried
from shardconv.verify.pool import at_work

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from shardconv.run import ray as executor  # noqa: E402
from shardconv.run.nodes import LEAST, OWN, Node, shared_budget  # noqa: E402

STORE = 80 * 2**20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    cluster.add_node(num_cpus=1, object_store_memory=STORE)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def state(tmp_path: Path) -> str:
    ledger = Ledger(str(tmp_path / "out.shardconv"))
    ledger.create()
    return ledger.state


def start(cluster: Cluster, state: str, work: str, *, count: int | None = None, source: str = "/", budget: int = 0):  # type: ignore[no-untyped-def]
    return executor.execute(
        state,
        range(12),
        work=f"standin_units:{work}",
        count=count,
        address=cluster.address,
        source=source,
        budget=budget,
        patience=Patience(60, 600),
        name=lambda unit: f"unit {unit}",
        verbose=False,
    )


def test_units_are_done_by_the_nodes_of_a_cluster_that_is_left_running(cluster: Cluster, state: str) -> None:
    events = list(start(cluster, state, "slow"))
    assert events[0] == Ready(2, f"Ray on {cluster.address}")
    finished = [event for event in events if isinstance(event, Finished)]
    assert sorted(event.unit for event in finished) == list(range(12))
    assert len({event.pid for event in finished}) == 2
    assert not ray.is_initialized()
    assert not os.path.exists(os.path.join(state, "probe"))
    ray.init(address=cluster.address, logging_level="ERROR")
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    ray.shutdown()


def test_a_count_under_the_clusters_limits_the_tasks_at_a_time(cluster: Cluster, state: str) -> None:
    assert next(iter(list(start(cluster, state, "slow", count=1)))) == Ready(1, f"Ray on {cluster.address}")
    ended = sorted(float(str(record["ended"])) for record in Ledger(state).finished().values())
    assert len(ended) == 12
    assert min(after - before for before, after in pairwise(ended)) >= 0.1  # what one such unit takes


def test_the_check_goes_to_all_nodes_of_a_cluster_that_is_left_running(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "_METADATA").write_text("{}")
    with at_work("ray", 0, cluster.address, 0, str(tmp_path / "_METADATA"), str(tmp_path)) as workers:
        assert (workers.executor, workers.count) == ("ray", 2)
        assert len({pid for _, pid in workers.answers("standin_questions:pid", [0.5] * 4)} - {os.getpid()}) == 2
    assert not ray.is_initialized()
    with pytest.raises(RunError, match="the cluster cannot do this check"):
        at_work("ray", 0, cluster.address, 0, str(tmp_path / "_METADATA"), "/no/such/source").__enter__()
    assert not ray.is_initialized()


def test_a_node_that_cannot_see_the_source_is_named_before_any_work(cluster: Cluster, state: str) -> None:
    with pytest.raises(RunError) as caught:
        list(start(cluster, state, "plain", source="/no/such/source"))
    node = ray._private.services.get_node_ip_address()
    line = f"  node {node} does not see the source /no/such/source\n      mount it on all nodes under the same path"
    assert str(caught.value) == f"the cluster cannot do this conversion (2 problems):\n{line}\n{line}"
    assert Ledger(state).finished() == {}
    assert not ray.is_initialized()


def test_a_lost_node_costs_its_own_units_only(cluster: Cluster, state: str) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    cluster.wait_for_nodes()
    events = []
    for event in start(cluster, state, "slow"):
        events.append(event)
        if isinstance(event, Ready):
            assert event.slots == 3
        if len(events) == 4:
            raylet = node.all_processes["raylet"][0].process.pid
            os.kill(raylet, signal.SIGKILL)
    finished = sorted(event.unit for event in events if isinstance(event, Finished))
    assert finished == list(range(12))
    assert all("died: " in event.error for event in events if isinstance(event, Retried))


def test_an_address_where_nobody_answers_is_a_report() -> None:
    begun = time.monotonic()
    with pytest.raises(RunError) as caught:
        executor._join("127.0.0.1:9", verbose=False)
    assert str(caught.value) == (
        "cannot join the Ray cluster (1 problem):\n"
        "  127.0.0.1:9: [Errno 111] Connection refused\n"
        "      `ray status` on this host tells whether the cluster answers; RAY_AUTH_MODE must be the same on all nodes and here"
    )
    assert time.monotonic() - begun < 10


def test_a_node_is_given_as_many_tasks_as_it_has_memory_for_and_one_that_is_too_small_none(cluster: Cluster, state: str) -> None:
    wide = cluster.add_node(num_cpus=4, memory=1000 * MIB, object_store_memory=STORE)
    small = cluster.add_node(num_cpus=4, memory=100 * MIB, object_store_memory=STORE)
    cluster.wait_for_nodes()
    address = ray._private.services.get_node_ip_address()
    text = f"node {address} has 100 MiB of memory for tasks, and a worker takes 400 MiB: it gets none"
    events = start(cluster, state, "only_the_first_ends", budget=400 * MIB - OWN)
    try:
        assert next(events) == Note(text)
        assert next(events) == Ready(4, f"Ray on {cluster.address}")  # one each on the two nodes that were there, two on the wide one
        assert isinstance(next(events), Finished)
        wait_for_workers(state, 4, seconds=60)
        time.sleep(2)  # for a fifth
        raylets = [parent(pid) for pid in wait_for_workers(state, 4, seconds=1)]
        assert [raylets.count(node.all_processes["raylet"][0].process.pid) for node in (wide, small)] == [2, 0]
    finally:
        events.close()
        cluster.remove_node(wide)
        cluster.remove_node(small)


def parent(pid: int) -> int:
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return 0


def test_a_cluster_that_can_hold_no_task_is_told_before_any_work(cluster: Cluster, state: str) -> None:
    with pytest.raises(RunError) as caught:
        list(start(cluster, state, "plain", budget=1 << 50))
    lines = str(caught.value).splitlines()
    assert re.fullmatch(r"the cluster cannot do this conversion \([0-9] problems\):", lines[0])
    assert re.fullmatch(r"  node [0-9.]+ has [0-9,]+ MiB of memory for tasks, and a worker takes 1,073,742,016 MiB", lines[1])
    assert lines[2] == "      set workers.memory_budget to less, or give the node more (`ray start --memory=BYTES`)"
    assert Ledger(state).finished() == {}
    assert not ray.is_initialized()


def test_with_least_memory_per_cpu_a_node_decides_the_budget_but_not_below_a_chunks_worth() -> None:
    def node(cpus: int, memory: int) -> Node:
        return Node("id", "10.0.0.1", "one", cpus, memory)

    assert shared_budget([node(8, 64 * 1024 * MIB), node(8, 16 * 1024 * MIB)]) == 1024 * MIB
    assert shared_budget([node(2, 1024 * 1024 * MIB)]) == MOST
    assert shared_budget([node(8, 64 * 1024 * MIB), node(64, 1024 * MIB)]) == LEAST
    assert shared_budget([]) == LEAST
