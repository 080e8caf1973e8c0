"""Units that do no conversion: what executors are tested with. A unit here leaves a file, fails, dies or hangs on purpose."""

import os
import signal
import socket
import time

from shardconv.errors import InputError, Problem, RunError
from shardconv.ledger import Ledger
from shardconv.run import Finished
from shardconv.run.heartbeat import Heartbeat, memory


def _begin(state: str, unit: int) -> Heartbeat:
    heartbeat = Heartbeat(Ledger(state).workers)
    heartbeat.begin(unit)
    return heartbeat


def _end(state: str, unit: int, heartbeat: Heartbeat) -> Finished:
    Ledger(state).record(unit, {"unit": unit, "pid": os.getpid(), "ended": time.time()})
    heartbeat.end()
    return Finished(unit, f"u{unit}x0", 10, 20, 1, 0.0, memory()[1], os.getpid(), socket.gethostname())


def _tries(state: str, unit: int) -> int:
    """How often the unit was begun, this time included."""
    path = os.path.join(state, f"tries-{unit}")
    with open(path, "a") as file:
        file.write(".")
    return os.path.getsize(path)


def plain(state: str, unit: int) -> Finished:
    return _end(state, unit, _begin(state, unit))


def slow(state: str, unit: int) -> Finished:
    """A tenth of a second."""
    heartbeat = _begin(state, unit)
    for _ in range(5):
        time.sleep(0.02)
        heartbeat.tick(4)
    return _end(state, unit, heartbeat)


def third_dies_once(state: str, unit: int) -> Finished:
    heartbeat = _begin(state, unit)
    if unit == 3 and _tries(state, unit) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return _end(state, unit, heartbeat)


def third_always_dies(state: str, unit: int) -> Finished:
    heartbeat = _begin(state, unit)
    if unit == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return _end(state, unit, heartbeat)


def third_fails_once(state: str, unit: int) -> Finished:
    if unit == 3 and _tries(state, unit) == 1:
        raise OSError(5, "Input/output error")
    return plain(state, unit)


def third_cannot_write_once(state: str, unit: int) -> Finished:
    if unit == 3 and _tries(state, unit) == 1:
        raise RunError("cannot write the checkpoint", [Problem("a.bin: Input/output error", "mend this")])
    return plain(state, unit)


def third_always_fails(state: str, unit: int) -> Finished:
    if unit == 3:
        _tries(state, unit)
        raise ValueError("a bug")
    return plain(state, unit)


def third_is_truncated(state: str, unit: int) -> Finished:
    if unit == 3:
        _tries(state, unit)
        raise InputError("cannot read the source", [Problem("a.safetensors is short by 8 bytes", "download it again")])
    return plain(state, unit)


def third_finds_disk_full(state: str, unit: int) -> Finished:
    if unit == 3:
        _tries(state, unit)
        raise ValueError("Error writing: No space left on device [tensorstore_spec='...']")
    return plain(state, unit)


def third_hangs_once(state: str, unit: int) -> Finished:
    heartbeat = _begin(state, unit)
    if unit == 3 and _tries(state, unit) == 1:
        time.sleep(600)
    return _end(state, unit, heartbeat)


def only_the_first_ends(state: str, unit: int) -> Finished:
    return plain(state, unit) if unit == 0 else forever(state, unit)


def forever(state: str, unit: int) -> Finished:
    heartbeat = _begin(state, unit)
    while True:
        time.sleep(0.05)
        heartbeat.tick(1)
