"""What tests of executors wait for: workers that have begun, and processes that are gone."""

import os
import signal
import time
from collections.abc import Iterable

from shardconv.ledger import Ledger
from shardconv.run import Event, Finished
from shardconv.run.heartbeat import read_workers


def wait_for_workers(state: str, count: int, *, seconds: float) -> list[int]:
    """The process ids of `count` workers that have a unit; AssertionError if they have not within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pids = [worker.pid for worker in read_workers(Ledger(state).workers) if worker.unit is not None]
        if len(pids) == count:
            return pids
        time.sleep(0.05)
    raise AssertionError(f"{count} workers never began")


def stop_one_at_work(told: Iterable[Event], state: str) -> tuple[list[Event], int]:
    """All events that are told, and the process id of a worker that was stopped (SIGSTOP) with a unit, once another unit was finished."""
    events, stopped = [], 0
    for event in told:
        events.append(event)
        busy = [worker.pid for worker in read_workers(Ledger(state).workers) if worker.unit is not None]
        if not stopped and busy and isinstance(event, Finished):
            stopped = busy[0]
            os.kill(stopped, signal.SIGSTOP)
    return events, stopped


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
