"""One unit in a worker process: load the plan once, beat while it runs, and enter it in the ledger when it is durable.

This is all that executors know of the work; what a unit *is* lives in `work.do_unit`. A worker keeps the plan that it loaded last, since
every unit of a run has the same, and with it its buffers.
"""

import os
import secrets
from dataclasses import asdict, dataclass, field
from functools import lru_cache

from shardconv.ledger import Ledger
from shardconv.plan import Plan
from shardconv.run import Finished
from shardconv.run.heartbeat import Heartbeat, memory
from shardconv.run.job import Job, load_job, load_plan
from shardconv.run.work import Done, Workspace, do_unit
from shardconv.sinks.chunk_writer import discard


@dataclass(frozen=True)
class _Worker:
    ledger: Ledger
    job: Job
    plan: Plan
    heartbeat: Heartbeat
    workspace: Workspace = field(default_factory=Workspace)


@lru_cache(maxsize=1)
def _worker(state: str, _begun: tuple[int, int]) -> _Worker:
    ledger = Ledger(state)
    return _Worker(ledger, load_job(ledger), load_plan(ledger), Heartbeat(ledger.workers))


def forget() -> None:
    """Give back what this process keeps from unit to unit: the plan, and the buffers."""
    _worker.cache_clear()


def run_unit(state: str, unit: int) -> Finished:
    """Do one unit of the plan in `state`, under an attempt's name that nobody has used, and record it; durable on return.

    Raises InputError for a source that is not what the plan says, RunError for a disk that fails.
    """
    stat = os.stat(Ledger(state).job_path)
    worker = _worker(state, (stat.st_mtime_ns, stat.st_ino))  # a restart in the same place is another job
    job, attempt = worker.job, f"u{unit}x{secrets.token_hex(3)}"
    worker.heartbeat.begin(unit)
    try:
        done = do_unit(
            worker.plan, worker.plan.units[unit], job.place.stage, attempt, job.store, worker.heartbeat.tick, worker.workspace
        )
        return recorded(worker.ledger, job, done)
    finally:
        worker.heartbeat.end()


def recorded(ledger: Ledger, job: Job, done: Done) -> Finished:
    """Enter a durable unit in the ledger; where another attempt at it came first, that one counts and this one is thrown away."""
    winner = str(ledger.record(done.unit, asdict(done))["attempt"])
    if winner != done.attempt and job.store.ocdbt:
        discard(job.place.stage, done.attempt)
    return Finished(
        done.unit, winner, done.bytes_read, done.bytes_written, done.requests, done.seconds, memory()[1], done.pid, done.host
    )
