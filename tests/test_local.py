import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from waiting import alive, stop_one_at_work, wait_for_workers

from shardconv.errors import InputError, RunError
from shardconv.ledger import Ledger
from shardconv.run import Event, Finished, Patience, Ready, Retried, Waiting, python_path
from shardconv.run.heartbeat import read_workers
from shardconv.run.local import execute

PATIENT = Patience(name_after=60, give_up_after=600)


@pytest.fixture
def state(tmp_path: Path) -> str:
    ledger = Ledger(str(tmp_path / "out.shardconv"))
    ledger.create()
    return ledger.state


def start(state: str, work: str, *, count: int = 2, units: int = 8, patience: Patience = PATIENT) -> Generator[Event, None, None]:
    work = f"standin_units:{work}"
    name = lambda unit: f"unit {unit} (leaf, chunk {unit})"  # noqa: E731
    return execute(state, range(units), work=work, count=count, patience=patience, name=name, verbose=False)


def finished(events: list[Event]) -> list[int]:
    return sorted(event.unit for event in events if isinstance(event, Finished))


@pytest.mark.parametrize("count", [1, 2])
def test_every_unit_is_finished_exactly_once_and_recorded(state: str, count: int) -> None:
    events = list(start(state, "plain", count=count))
    assert finished(events) == list(range(8))
    assert sorted(Ledger(state).finished()) == list(range(8))
    assert events[0] == Ready(count, "this process" if count == 1 else "2 processes")


def test_one_slot_is_this_process_and_several_are_others(state: str) -> None:
    assert {e.pid for e in start(state, "plain", count=1) if isinstance(e, Finished)} == {os.getpid()}
    pids = {e.pid for e in start(state, "slow", count=2) if isinstance(e, Finished)}
    assert len(pids) == 2 and os.getpid() not in pids


def test_no_more_processes_than_units(state: str) -> None:
    assert next(start(state, "plain", count=4, units=2)) == Ready(2, "2 processes")
    assert next(start(state, "plain", count=4, units=1)) == Ready(1, "1 process")


def test_a_killed_process_costs_its_own_unit_only(state: str) -> None:
    events = list(start(state, "third_dies_once"))
    assert finished(events) == list(range(8))
    (retried,) = [event for event in events if isinstance(event, Retried)]
    assert (retried.unit, retried.failures) == (3, 1)
    assert "was killed by SIGKILL (out of memory, perhaps)" in retried.error


def test_a_dead_worker_no_longer_claims_its_unit(state: str) -> None:
    list(start(state, "third_dies_once"))
    workers = read_workers(Ledger(state).workers)
    assert len(workers) == 3
    assert all(worker.unit is None for worker in workers)


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_that_passes_is_tried_again(state: str, count: int) -> None:
    events = list(start(state, "third_fails_once", count=count))
    assert finished(events) == list(range(8))
    (retried,) = [event for event in events if isinstance(event, Retried)]
    assert retried.error == "OSError: [Errno 5] Input/output error"
    assert "third_fails_once" in retried.trace


def test_a_report_that_may_pass_is_tried_again(state: str) -> None:
    events = list(start(state, "third_cannot_write_once", count=1))
    assert finished(events) == list(range(8))
    (retried,) = [event for event in events if isinstance(event, Retried)]
    assert retried.error.startswith("cannot write the checkpoint (1 problem):\n  a.bin: Input/output error")


def test_ctrl_c_reaches_the_driver_only(state: str) -> None:
    events = start(state, "slow")
    worker = next(event for event in events if isinstance(event, Finished)).pid
    assert os.getpgid(worker) != os.getpgid(0)
    events.close()


@pytest.mark.parametrize("count", [1, 2])
def test_a_unit_that_fails_three_times_is_named_with_its_last_error(state: str, count: int) -> None:
    with pytest.raises(RunError) as caught:
        list(start(state, "third_always_fails", count=count))
    assert str(caught.value) == (
        "a unit failed 3 times (1 problem):\n"
        "  unit 3 (leaf, chunk 3)\n"
        "  last error: ValueError: a bug\n"
        "      run the same command again to go on from the finished units; -v shows every attempt"
    )
    assert os.path.getsize(os.path.join(state, "tries-3")) == 3


def test_a_unit_that_kills_three_processes_is_named(state: str) -> None:
    with pytest.raises(RunError, match=r"a unit failed 3 times(.|\n)*unit 3 \(leaf, chunk 3\)(.|\n)*killed by SIGKILL"):
        list(start(state, "third_always_dies"))


@pytest.mark.parametrize("count", [1, 2])
def test_a_report_for_the_user_is_not_tried_again(state: str, count: int) -> None:
    with pytest.raises(InputError) as caught:
        list(start(state, "third_is_truncated", count=count))
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "cannot read the source (1 problem):\n  a.safetensors is short by 8 bytes\n      download it again"
    )
    assert os.path.getsize(os.path.join(state, "tries-3")) == 1


def test_a_full_disk_is_not_tried_again(state: str) -> None:
    with pytest.raises(RunError) as caught:
        list(start(state, "third_finds_disk_full", count=1))
    assert str(caught.value) == (
        "cannot write the output (1 problem):\n"
        "  unit 3 (leaf, chunk 3): No space left on device\n"
        "      make room, then run the same command again"
    )
    assert os.path.getsize(os.path.join(state, "tries-3")) == 1


def test_a_process_that_hangs_is_named_then_replaced(state: str) -> None:
    events = list(start(state, "third_hangs_once", patience=Patience(name_after=0.5, give_up_after=1.5)))
    assert finished(events) == list(range(8))
    waiting = [event for event in events if isinstance(event, Waiting)]
    assert waiting and {event.unit for event in waiting} == {3}
    assert all(event.where.startswith("pid ") for event in waiting)
    (retried,) = [event for event in events if isinstance(event, Retried)]
    assert retried.error.startswith("no sign of life for ")


def test_a_process_that_is_stopped_is_named_and_its_unit_given_to_another(state: str) -> None:
    told = start(state, "slow", units=30, patience=Patience(name_after=1, give_up_after=4))
    events, stopped = stop_one_at_work(told, state)
    assert finished(events) == list(range(30))
    (retried,) = [event for event in events if isinstance(event, Retried)]
    assert retried.error.endswith(f" s (pid {stopped} on {socket.gethostname()})")
    named = {(event.unit, event.where) for event in events if isinstance(event, Waiting)}
    assert (retried.unit, f"pid {stopped} on {socket.gethostname()}") in named
    by = {event.unit: event.pid for event in events if isinstance(event, Finished)}
    assert not alive(stopped)
    assert by[retried.unit] in {pid for unit, pid in by.items() if unit != retried.unit} - {stopped}  # one that was there, and warm


def test_a_child_that_cannot_start_says_why(state: str) -> None:
    with pytest.raises(RunError, match="No module named 'no_such_module'"):
        list(execute(state, range(4), work="no_such_module:work", count=2, patience=PATIENT, name=str, verbose=False))


def test_closing_stops_the_workers(state: str) -> None:
    events = start(state, "slow", units=100)
    while len(pids := [worker.pid for worker in read_workers(Ledger(state).workers)]) < 2:
        next(events)
    events.close()
    assert not any(alive(pid) for pid in pids)
    assert len(Ledger(state).finished()) < 100


def test_workers_die_with_a_killed_driver(state: str) -> None:
    program = (
        "from shardconv.run import Patience; from shardconv.run.local import execute\n"
        f"list(execute({state!r}, range(4), work='standin_units:forever', count=2, patience=Patience(60, 600), name=str, verbose=False))"
    )
    driver = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": python_path()})
    pids = wait_for_workers(state, 2, seconds=20)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
