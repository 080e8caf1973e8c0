"""What tests of executors wait for: workers that have begun, and processes that are gone."""

import time

from shardconv.ledger import Ledger
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


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
