"""Units whose attempts come to ends that were laid down beforehand, in `fates.json`: for the scheduler's property test."""

import json
import os
import secrets
import signal
import socket
import time
from pathlib import Path

from shardconv.ledger import Ledger
from shardconv.run import Finished
from shardconv.run.heartbeat import Heartbeat, memory

ACCIDENTS = ("dies before the record", "dies after the record", "fails", "hangs")


def run(state: str, unit: int) -> Finished:
    """The n-th attempt at a unit comes to the n-th of its fates, and does well when they are used up."""
    ledger, tries = Ledger(state), Path(state, f"tries-{unit}")
    name = f"u{unit}x{secrets.token_hex(3)}"
    before = len(tries.read_text().split()) if tries.exists() else 0
    with tries.open("a") as file:
        file.write(f"{name} ")
    fates = json.loads(Path(state, "fates.json").read_text()).get(str(unit), [])
    fate = fates[before] if before < len(fates) else "does well"
    heartbeat = Heartbeat(ledger.workers)
    heartbeat.begin(unit)
    if fate == "dies before the record":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "fails":
        raise OSError(5, "Input/output error")
    if fate == "hangs":
        time.sleep(600)
    winner = str(ledger.record(unit, {"attempt": name})["attempt"])
    if fate == "dies after the record":
        os.kill(os.getpid(), signal.SIGKILL)
    heartbeat.end()
    return Finished(unit, winner, 0, 0, 0, 0.0, memory()[1], os.getpid(), socket.gethostname())
