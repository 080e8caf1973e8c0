"""The local executor: the specification of what an executor does, and the one without Ray.

One slot: a loop in this process. Several: as many child processes, each given one unit at a time, the next when it answers. A child that
dies (killed, out of memory, a crash in a library) costs its own unit only, which goes to the end of the queue; a new child takes its place.
A child that shows no sign of life is killed and treated as dead. `Failures` decides when a unit has failed too often.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import wait
from typing import cast

from shardconv.ledger import Ledger
from shardconv.run import Event, Failed, Failures, Finished, Patience, Ready, Retried, attempt
from shardconv.run.child import Child, ChildDied
from shardconv.run.heartbeat import Pulse, bury

WAKE = 1.0  # seconds between two looks at the clock while all workers are busy
# The workers never import jax; a library that does must not take the accelerators. One thread per slot is what "one slot" means to BLAS.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}


def execute(
    state: str, units: Sequence[int], *, work: str, count: int, patience: Patience, name: Callable[[int], str], verbose: bool
) -> Generator[Event, None, None]:
    """Do `units` of the plan in `state` on `count` slots of this machine; `work` is "module:name", `name` describes a unit.

    Raises the report of a unit that has one, and RunError for a unit that failed `ATTEMPTS` times; finished units stay finished.
    """
    if count == 1:
        yield from _here(state, units, work, Failures(name))
    else:
        yield from _Pool(state, units, work, min(count, len(units)), patience, Failures(name), verbose).run()


def _here(state: str, units: Sequence[int], work: str, failures: Failures) -> Iterator[Event]:
    yield Ready(1, "this process")
    for unit in units:
        while isinstance(outcome := attempt(work, state, unit), Failed):
            yield failures.add(outcome)
        yield outcome


class _Pool:
    def __init__(
        self, state: str, units: Sequence[int], work: str, count: int, patience: Patience, failures: Failures, verbose: bool
    ) -> None:
        self._state, self._work, self._count, self._verbose = state, work, count, verbose
        self._workers = Ledger(state).workers
        self._queue = deque(units)
        self._failures = failures
        self._pulse = Pulse(self._workers, patience)
        self._idle: deque[Child] = deque()
        self._busy: dict[Child, tuple[int, float]] = {}
        self._born = 0

    def run(self) -> Iterator[Event]:
        try:
            self._idle.extend(self._child() for _ in range(self._count))
            yield Ready(self._count, f"{self._count} process{'' if self._count == 1 else 'es'}")
            while self._queue or self._busy:
                self._hand_out()
                yield from self._collect()
                yield from self._look_for_the_silent()
        finally:
            for child in [*self._idle, *self._busy]:
                child.stop()

    def _child(self) -> Child:
        self._born += 1
        log = None if self._verbose else os.path.join(self._workers, f"{os.getpid()}-{self._born}.log")
        return Child("shardconv.run:attempt", log, ENVIRONMENT, nice=0)

    def _hand_out(self) -> None:
        while self._queue and self._idle:
            child, unit = self._idle.popleft(), self._queue.popleft()  # who waits longest is warm; one just started may be slow to come
            self._busy[child] = (unit, time.monotonic())
            child.send(self._work, self._state, unit)

    def _collect(self) -> Iterator[Event]:
        ready = set(wait([child.connection for child in self._busy], timeout=WAKE))
        for child in [child for child in self._busy if child.connection in ready]:
            try:
                outcome = cast(Finished | Failed, child.receive())
            except ChildDied as death:
                yield self._replace(child, f"{death}")
                continue
            del self._busy[child]
            self._idle.append(child)
            if isinstance(outcome, Failed):
                yield self._fail(outcome)
            else:
                yield outcome

    def _look_for_the_silent(self) -> Iterator[Event]:
        waiting, lost = self._pulse.check(dict(self._busy.values()))
        yield from waiting
        for silence in lost:
            child = next(child for child, (unit, _) in self._busy.items() if unit == silence.unit)
            yield self._replace(child, f"no sign of life for {silence.seconds:.0f} s ({silence.where})")

    def _replace(self, child: Child, why: str) -> Retried:
        unit, _ = self._busy.pop(child)
        child.stop()
        bury(self._workers, unit)
        event = self._fail(Failed(unit, why, ""))
        self._idle.append(self._child())
        return event

    def _fail(self, failed: Failed) -> Retried:
        event = self._failures.add(failed)
        self._queue.append(failed.unit)
        return event
