import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import psutil
import pytest
from waiting import alive, stop_one_at_work, wait_for_workers

from shardconv.errors import InputError, RunError
from shardconv.ledger import Ledger
from shardconv.run import Event, Finished, Patience, Ready, Retried, Waiting, python_path
from shardconv.run.heartbeat import read_workers

ray = pytest.importorskip("ray")
from shardconv.run import ray as executor  # noqa: E402

PATIENT = Patience(name_after=60, give_up_after=600)


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    """One Ray for most tests: a start and a stop cost several seconds."""
    executor._start(2, verbose=False)
    yield
    ray.shutdown()


@pytest.fixture
def state(tmp_path: Path) -> str:
    ledger = Ledger(str(tmp_path / "out.shardconv"))
    ledger.create()
    return ledger.state


def start(
    state: str, work: str, *, units: int = 8, patience: Patience = PATIENT, address: str | None = None
) -> Generator[Event, None, None]:
    return executor.execute(
        state,
        range(units),
        work=f"standin_units:{work}",
        count=2,
        address=address,
        source=state,
        budget=0,
        patience=patience,
        name=lambda unit: f"unit {unit} (leaf, chunk {unit})",
        verbose=False,
    )


def finished(events: list[Event]) -> list[int]:
    return sorted(event.unit for event in events if isinstance(event, Finished))


def retried(events: list[Event]) -> Retried:
    (only,) = [event for event in events if isinstance(event, Retried)]
    return only


def test_every_unit_is_finished_exactly_once_and_recorded(started: None, state: str) -> None:
    events = list(start(state, "plain"))
    assert events[0] == Ready(2, "Ray on this machine")
    assert finished(events) == list(range(8))
    assert sorted(Ledger(state).finished()) == list(range(8))
    assert os.getpid() not in {event.pid for event in events if isinstance(event, Finished)}


def test_nothing_enters_the_object_store(started: None, state: str) -> None:
    whole = _free_store()
    for _ in start(state, "slow", units=60):  # 60 units of 0.1 s on two slots: Ray updates its figures every second
        assert _free_store() == whole
    kept = ray.put(bytes(2**20))
    deadline = time.monotonic() + 10
    while _free_store() == whole:
        assert time.monotonic() < deadline, "the figure does not see objects, so the test above means nothing"
        time.sleep(0.1)
    del kept


def _free_store() -> float:
    return float(ray.available_resources()["object_store_memory"])


def test_a_killed_worker_costs_its_own_unit_only(started: None, state: str) -> None:
    events = list(start(state, "third_dies_once"))
    assert finished(events) == list(range(8))
    assert (retried(events).unit, retried(events).failures) == (3, 1)
    assert retried(events).error.startswith("its worker (pid ")
    assert "died: " in retried(events).error


def test_an_error_that_passes_is_tried_again(started: None, state: str) -> None:
    events = list(start(state, "third_fails_once"))
    assert finished(events) == list(range(8))
    assert retried(events).error == "OSError: [Errno 5] Input/output error"


def test_a_unit_that_fails_three_times_is_named_with_its_last_error(started: None, state: str) -> None:
    with pytest.raises(RunError) as caught:
        list(start(state, "third_always_fails"))
    assert str(caught.value) == (
        "a unit failed 3 times (1 problem):\n"
        "  unit 3 (leaf, chunk 3)\n"
        "  last error: ValueError: a bug\n"
        "      run the same command again to go on from the finished units; -v shows every attempt"
    )


def test_a_report_for_the_user_is_not_tried_again(started: None, state: str) -> None:
    with pytest.raises(InputError) as caught:
        list(start(state, "third_is_truncated"))
    assert str(caught.value) == (
        "cannot read the source (1 problem):\n  a.safetensors is short by 8 bytes\n      download it again"
    )
    assert os.path.getsize(os.path.join(state, "tries-3")) == 1


def test_a_task_that_hangs_is_named_then_taken_away(started: None, state: str) -> None:
    events = list(start(state, "third_hangs_once", patience=Patience(name_after=0.8, give_up_after=4)))
    assert finished(events) == list(range(8))
    assert 3 in {event.unit for event in events if isinstance(event, Waiting)}
    assert retried(events).error.startswith("no sign of life for ")


def test_closing_stops_the_tasks(started: None, state: str) -> None:
    events = start(state, "only_the_first_ends", units=3)
    while not isinstance(next(events), Finished):
        pass
    busy = wait_for_workers(state, 2, seconds=60)
    events.close()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in busy) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in busy)


def test_signals_wait_until_ray_has_started() -> None:
    before, passed = signal.getsignal(signal.SIGTERM), []

    def start_interrupted() -> None:
        with executor._signals_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray puts a handler of its own
            passed.append(True)

    with pytest.raises(KeyboardInterrupt):
        start_interrupted()
    assert passed
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_client_address_is_refused(state: str) -> None:
    with pytest.raises(RunError) as caught:
        executor._join("ray://head:10001", verbose=False)
    assert str(caught.value) == (
        "cannot join the Ray cluster (1 problem):\n"
        "  ray://head:10001 is a Ray client address\n"
        "      run shardconv on a node of the cluster, with --address auto, or as a Ray job"
    )


def _run_driver(state: str, work: str) -> "subprocess.Popen[str]":
    program = (
        "from shardconv.run import Patience; from shardconv.run.ray import execute\n"
        f"for event in execute({state!r}, range(4), work='standin_units:{work}', count=2, address=None, source='/', budget=0,\n"
        "                     patience=Patience(60, 600), name=str, verbose=False):\n"
        "    print(type(event).__name__, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": python_path()}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_ray_started_on_the_spot_is_quiet_and_goes_away(state: str) -> None:
    driver = _run_driver(state, "plain")
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert out.split() == ["Ready"] + ["Finished"] * 4
    assert err == ""
    assert not any(alive(worker.pid) for worker in read_workers(Ledger(state).workers))


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_ray_of_our_own_that_dies_is_a_report(state: str, name: str) -> None:
    driver = _run_driver(state, "forever")
    wait_for_workers(state, 2, seconds=60)
    (server,) = [child for child in psutil.Process(driver.pid).children() if child.name() == name]
    server.kill()
    begun = time.monotonic()
    _, err = driver.communicate(timeout=120)
    assert time.monotonic() - begun < 40  # Ray would retry every unit in vain, or wait a minute and end the process
    assert f"Ray on this machine died (1 problem):\n  its process {name} (pid {server.pid}) is gone\n" in err


def test_a_ray_that_dies_as_it_starts_is_a_report(state: str) -> None:
    driver = _run_driver(state, "forever")
    deadline = time.monotonic() + 60
    while not (servers := [child for child in psutil.Process(driver.pid).children() if child.name() == "gcs_server"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    servers[0].kill()
    _, err = driver.communicate(timeout=120)
    assert "Ray cannot be started on this machine (1 problem):\n" in err
    assert "      run the same command again; finished units are kept; --executor local does the same without Ray\n" in err


def test_a_task_whose_process_is_stopped_is_given_to_another_and_the_process_ends(started: None, state: str) -> None:
    told = start(state, "slow", units=30, patience=Patience(name_after=1, give_up_after=4))
    events, stopped = stop_one_at_work(told, state)
    assert finished(events) == list(range(30))
    assert any(event.where == f"pid {stopped} on {socket.gethostname()}" for event in events if isinstance(event, Waiting))
    assert f"pid {stopped} on " in retried(events).error
    assert not alive(stopped)


def test_workers_die_with_a_killed_driver(state: str) -> None:
    driver = _run_driver(state, "forever")
    pids = wait_for_workers(state, 2, seconds=60)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)
