"""Units of a real conversion that take a while more, and the later ones as long as a file is there: nodes can come and go meanwhile."""

import time
from pathlib import Path

from shardconv.ledger import Ledger
from shardconv.run import Finished
from shardconv.run.heartbeat import Heartbeat, read_workers
from shardconv.run.unit import run_unit

SECONDS = 0.3
HELD = 10  # units from this number on wait while `hold` is beside the state directory


def run(state: str, unit: int) -> Finished:
    """What `run_unit` does, later."""
    heartbeat, hold = Heartbeat(Ledger(state).workers), Path(state).parent / "hold"
    heartbeat.begin(unit)
    while unit >= HELD and hold.exists():
        time.sleep(0.05)
        heartbeat.tick(0)
    time.sleep(SECONDS)
    return run_unit(state, unit)


def holding(root: Path) -> set[int]:
    """The processes that have a unit of the conversion to `root/out` that waits."""
    workers = read_workers(str(root / "out.shardconv" / "workers"))
    return {worker.pid for worker in workers if worker.unit is not None and worker.unit >= HELD}
