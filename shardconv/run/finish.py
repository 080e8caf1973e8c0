"""The end of a run, in a process of its own: say what is in the checkpoint, check it, commit it.

The driver never loads jax, and Orbax does; so a child is started some time before the last units are done, which hides the imports (a
second of CPU), and is told to commit when they are. It reads the ledger itself: the winning attempt of every unit, and the digests of
their chunks. A commit that is killed at any moment is simply run again.
"""

import os
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, cast

import xxhash

from shardconv.errors import ShardconvError
from shardconv.ledger import Ledger
from shardconv.plan import Plan
from shardconv.run import Failed, Sealed
from shardconv.run.heartbeat import memory
from shardconv.run.job import Job, load_job, load_plan
from shardconv.run.work import array_spec
from shardconv.sinks.commit import CommitRequest
from shardconv.sinks.orbax_commit import commit

CHECKSUM = "xxh3_64 over the 8-byte big-endian xxh3_64 digests of its chunks, C order, chunks in row-major order of the grid"


def finish(state: str) -> Sealed | Failed:
    """Commit what the ledger in `state` says is finished; what goes wrong comes back as a value."""
    started = time.perf_counter()
    with suppress(OSError):  # it was started in the background of the units; now the driver waits for it, and has its own niceness to give
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, os.getppid()))
    try:
        ledger = Ledger(state)
        job, plan, records = load_job(ledger), load_plan(ledger), ledger.finished()
        done = commit(
            CommitRequest(
                out=job.place.out,
                step=job.place.step,
                item=job.place.item,
                arrays=tuple(array_spec(leaf) for leaf in plan.leaves),
                attempts=tuple(str(record["attempt"]) for record in records.values()),
                options=job.store,
                custom_metadata=custom_metadata(plan, job, records.values()),
            )
        )
    except ShardconvError as report:
        return Failed(-1, str(report), traceback.format_exc(), report)
    except Exception as error:  # noqa: BLE001  the border of the process: the driver reports it
        return Failed(-1, f"{type(error).__name__}: {error}", traceback.format_exc())
    return Sealed(done.orbax, len(done.discarded), os.getpid(), time.perf_counter() - started, time.process_time(), memory()[1])


def custom_metadata(plan: Plan, job: Job, records: Iterable[Mapping[str, object]]) -> dict[str, Any]:
    """What the checkpoint says about itself: what its loader asks for, and under "shardconv" where it comes from."""
    specs = {leaf.name: [list(axes) if isinstance(axes, tuple) else axes for axes in leaf.spec] for leaf in plan.leaves}
    ours = {
        **job.provenance,
        "family": plan.family,
        "layout": plan.layout,
        "tied": plan.tied,
        "source": {"path": plan.source.root, "format": plan.source.format, "fingerprint": plan.source.fingerprint()},
        "plan": plan.digest(),
        "mesh": dict(plan.mesh.axes),
        "partition_specs": specs,
        "named_axes": {leaf.name: [[digit.axis for digit in dim] for dim in leaf.parts[0].target.dims] for leaf in plan.leaves},
        "checksums": checksums(plan, records),
        "checksum": CHECKSUM,
    }
    if job.store.zarr == 2:  # which stores smaller chunks than those that the checksums are of
        ours["chunks"] = {leaf.name: list(leaf.chunk) for leaf in plan.leaves}
    return {**plan.metadata, "shardconv": ours}


def checksums(plan: Plan, records: Iterable[Mapping[str, object]]) -> dict[str, str]:
    """The checksum of every leaf, by name; see `CHECKSUM`."""
    chunks: dict[int, dict[int, str]] = {}
    for record in records:
        for number, chunk, digest in cast(list[tuple[int, int, str]], record["digests"]):
            chunks.setdefault(number, {})[chunk] = digest
    found = {}
    for number, leaf in enumerate(plan.leaves):
        whole = xxhash.xxh3_64()
        for _, digest in sorted(chunks.get(number, {}).items()):
            whole.update(bytes.fromhex(digest))
        found[leaf.name] = whole.hexdigest()
    return found
