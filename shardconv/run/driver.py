"""The driver: takes a plan to a finished checkpoint, and every way it can stop to a state that can be continued.

    prepare        what stands in the way is refused before the first byte (`preflight`)
    units          those that the ledger does not have, on any executor
    commit         in a child process, which alone loads jax; it is started shortly before the last units are done
    check          by whoever is asked (`check`): what is written is compared with its source
    change places  with a checkpoint that is replaced, which stays until the new one is complete
    close          only the report is left

Whatever goes wrong after the first byte leaves the ledger as it is, and the same command goes on from there; after Ctrl-C and SIGTERM too.
A run that died between the commit and the end finds its checkpoint complete and only tidies up.

The driver imports neither jax nor TensorStore, and Ray only when Ray is asked for.
"""

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import FrameType
from typing import cast

from shardconv.budget import this_machine
from shardconv.errors import ConfigError, Problem, RunError
from shardconv.json_text import json_text
from shardconv.ledger import Ledger
from shardconv.lock import Lock
from shardconv.plan import Plan
from shardconv.run import AGAIN, Began, Event, Failed, Finished, Note, Patience, Ready, Restarted, Retried, Sealed, Stage, Told, disk_report
from shardconv.run.child import Child, ChildDied
from shardconv.run.heartbeat import WorkerState, memory, read_workers
from shardconv.run.job import Place, state_path
from shardconv.run.preflight import Prepared, Records, Request, prepare, refuse_existing, replaced_path
from shardconv.sinks.direct import sync_directory

# A minute of silence is worth a line. Ten mean that it will not pass: the largest chunk is seconds of work for a disk that works at all.
PATIENCE = Patience(name_after=60.0, give_up_after=600.0)
WORK = "shardconv.run.unit:run_unit"
FINISH = "shardconv.run.finish:finish"
# Importing jax and Orbax takes a second of CPU. Workers wait for disks now and then, so a process of the lowest priority has done it in
# several times that without being felt: 8.3 s became 5.6 s for 2.5 GB on two busy cores. Then it holds 0.2 GB, so not from the beginning.
AHEAD = 20.0  # seconds before the end, as far as it can be foreseen
FULL = (errno.ENOSPC, errno.EDQUOT)
SPEED = 500e6  # bytes per second, until there is a measured one
KEPT = f"{AGAIN}; finished units are kept"


# Compares what is written in a place, not yet where it replaces anything, with its source; the verdict goes into the outcome.
Check = Callable[[Place], Mapping[str, object]]


@dataclass(frozen=True)
class Outcome:
    """A finished conversion: what was done and what it took; seconds are wall time by stage, memory in bytes.

    `records` are all units' (`run.work.Done`), those of earlier runs included; `workers` and `sealed` are of this run alone. `check` is the
    verdict on what was written, None where nobody asked. `finished` are this run's units, each with the seconds since units began, by the
    driver's clock.
    """

    plan: Plan
    checkpoint: str
    records: Records
    resumed: int
    retried: int
    workers: tuple[WorkerState, ...]
    sealed: Sealed | None
    check: Mapping[str, object] | None
    where: str
    slots: int
    budget: int
    stages: Mapping[str, float]
    driver_pid: int
    driver_cpu_seconds: float
    driver_peak_rss: int
    finished: Sequence[tuple[float, Finished]] = ()


class Stages:
    """Wall seconds by stage, told as they begin; `clock` 0 is when the first began."""

    def __init__(self, tell: Callable[[Told], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._tell = tell
        self._name = ""
        self._since = time.perf_counter()

    def enter(self, name: str) -> None:
        """The next stage begins."""
        self.leave()
        self._name = name
        self._tell(Stage(name))

    def leave(self) -> None:
        """The last stage ends."""
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._since
        self._since = now


def drive(
    request: Request,
    plan: Plan,
    stages: Stages,
    tell: Callable[[Told], None],
    figures: Callable[[Outcome], Mapping[str, object]],
    check: Check | None,
) -> Outcome:
    """Convert; `tell` hears what happens, `check` gives its verdict, and what `figures` makes of the outcome becomes report.json.

    Raises ShardconvError of any kind; RunError, or any error after the first unit, leaves a state that the same request goes on from.
    """
    stages.enter("prepare")
    ledger = Ledger(state_path(request.output))
    if request.restart or ledger.header() is None:
        refuse_existing(request)  # before anything is created; `prepare` asks again with the lock held
    with _created(ledger), _interrupted_by_sigterm(), _disk_reports(ledger), Lock(ledger.state) as lock:
        if lock.taken_from is not None:
            tell(Note(f"took over from pid {lock.taken_from.pid} on {lock.taken_from.host}, which is gone"))
        try:
            outcome = _Run(request, plan, ledger, lock, stages, tell, check).go()
        except (KeyboardInterrupt, SystemExit):  # SystemExit: Ray puts its own SIGTERM handler in place of ours
            finished = len(ledger.finished())
            title = f"interrupted: {finished} of {len(plan.units)} units are finished; run the same command again to go on"
            raise RunError(title) from None
        ledger.close(json_text(figures(outcome)) + "\n")
    return outcome


@contextmanager
def _created(ledger: Ledger) -> Iterator[None]:
    """The state directory, which goes again if nothing is begun in it."""
    try:
        ledger.create()
    except OSError as error:
        fact = f"{error.filename}: {error.strerror}"
        if error.errno in FULL or not ledger.header_is_absent():  # a disk that was there before, or will do when there is room
            raise disk_report(error, ledger.state) from error
        raise ConfigError("cannot write beside the output", [Problem(fact, "choose an output.path that you may write to")]) from error
    try:
        yield
    finally:
        if ledger.header_is_absent():
            for path in (f"{ledger.state}/done", ledger.workers, ledger.state):
                with suppress(OSError):
                    os.rmdir(path)


@contextmanager
def _disk_reports(ledger: Ledger) -> Iterator[None]:
    """An error of the disk, at whichever of the driver's own writes it comes up, is a report; a pipe that closed is none of the disk's."""
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        raise disk_report(error, ledger.state) from error


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM, which is how schedulers say that time is up, ends a run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Run:
    def __init__(
        self,
        request: Request,
        plan: Plan,
        ledger: Ledger,
        lock: Lock,
        stages: Stages,
        tell: Callable[[Told], None],
        check: Check | None,
    ) -> None:
        self._request, self._plan, self._ledger, self._lock = request, plan, ledger, lock
        self._stages, self._tell, self._check = stages, tell, check
        self._verdict: Mapping[str, object] | None = None
        self._kept = ExitStack()
        self._finisher: Child | None = None
        self._sealed: Sealed | None = None
        self._ready = Ready(0, "nobody")
        self._begun = time.perf_counter()
        self._retried = 0
        self._finished: list[tuple[float, Finished]] = []

    def go(self) -> Outcome:
        with self._kept:
            return self._go()

    def _go(self) -> Outcome:
        prepared = prepare(self._request, self._plan, self._ledger)
        sizes = tuple(unit.bytes_written for unit in self._plan.units)
        self._tell(Began(sizes, frozenset(prepared.records), self._ledger.workers, self._request.budget))
        if not prepared.committed:
            try:
                self._make(prepared)
            finally:
                if self._finisher is not None:
                    self._finisher.stop()
        if self._check is not None:
            self._stages.enter("check")
            self._verdict = self._check(prepared.place)
        self._stages.enter("close")
        change_places(prepared.place, self._ledger)
        self._stages.leave()
        return self._outcome(prepared)

    def _make(self, prepared: Prepared) -> None:
        pending = {unit.number: unit.bytes_written for unit in self._plan.units if unit.number not in prepared.records}
        total = left = sum(pending.values())
        self._stages.enter("start")
        self._start_finisher_in_time(0, left)
        with closing(self._events(tuple(pending))) as events:
            for event in events if pending else ():
                self._hear(event)
                if isinstance(event, Finished):
                    left -= pending.pop(event.unit)
                self._start_finisher_in_time(total - left, left)
                if not pending:
                    break
            self._stages.enter("commit")
            self._start_finisher()
            self._lock.check()
            cast(Child, self._finisher).send(self._ledger.state)
            # Leaving here stops the executor, which takes Ray a second if no check needs it; the commit goes on meanwhile.
        self._sealed = self._await_seal()

    def _events(self, pending: Sequence[int]) -> Generator[Event, None, None]:
        if self._plan.windows:
            return self._on_mesh(pending)
        request, machine = self._request, this_machine()
        count = request.count or machine.cores
        if request.executor == "local":
            from shardconv.run import local

            return local.execute(
                self._ledger.state, pending, work=WORK, count=count, patience=PATIENCE, name=self._name, verbose=request.verbose
            )
        from shardconv.run import ray

        slots = count if request.address is None else request.count or None
        self._keep_ray(slots)
        return ray.execute(
            self._ledger.state,
            pending,
            work=WORK,
            count=slots,
            address=request.address,
            source=self._plan.source.root,
            budget=request.budget,
            patience=PATIENCE,
            name=self._name,
            verbose=request.verbose,
        )

    def _on_mesh(self, pending: Sequence[int]) -> Generator[Event, None, None]:
        from shardconv.run.on_mesh import on_children, on_ray

        request, processes, state = self._request, self._plan.processes, self._ledger.state
        if request.executor == "local":
            return on_children(
                state, pending, processes=processes, request=request.mesh, patience=PATIENCE, verbose=request.verbose
            )
        self._keep_ray(processes)
        return on_ray(
            state,
            pending,
            processes=processes,
            address=request.address,
            source=self._plan.source.root,
            budget=request.budget,
            request=request.mesh,
            patience=PATIENCE,
            verbose=request.verbose,
        )

    def _keep_ray(self, slots: int | None) -> None:
        """The check is done by the same workers."""
        if self._check is not None:
            from shardconv.run import ray

            self._kept.enter_context(ray.connected(self._request.address, slots, self._request.verbose))

    def _hear(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._ready = event
            self._begun = time.perf_counter()
            self._stages.enter("units")
        elif isinstance(event, Retried | Restarted):
            self._retried += 1
        elif isinstance(event, Finished):
            self._finished.append((time.perf_counter() - self._begun, event))
        self._tell(event)

    def _name(self, unit: int) -> str:
        """Unit 12 (decoder.layers.mlp.wi_0 chunks 3 to 4, and 2 more leaves)."""
        spans = self._plan.units[unit].spans
        first = spans[0]
        chunks = f"chunk {first.start}" if first.stop - first.start == 1 else f"chunks {first.start} to {first.stop - 1}"
        more = f", and {len(spans) - 1} more leaves" if len(spans) > 1 else ""
        return f"unit {unit} ({self._plan.leaves[first.leaf].name} {chunks}{more})"

    def _start_finisher_in_time(self, done: int, left: int) -> None:
        speed = done / (time.perf_counter() - self._begun) if done else SPEED
        if left <= AHEAD * speed:
            self._start_finisher()

    def _start_finisher(self) -> None:
        if self._finisher is None:
            log = None if self._request.verbose else os.path.join(self._ledger.workers, "commit.log")
            self._finisher = Child(FINISH, log, {"JAX_PLATFORMS": "cpu"}, nice=19)

    def _await_seal(self) -> Sealed:
        child, begun = cast(Child, self._finisher), time.monotonic()
        alive, used = begun, child.cpu_seconds()
        while not wait([child.connection], timeout=PATIENCE.name_after):
            now = time.monotonic()
            if (cpu := child.cpu_seconds()) != used:
                alive, used = now, cpu
            if now - alive >= PATIENCE.give_up_after:
                fact = f"its process (pid {child.pid}) has done nothing for {now - alive:.0f} s"
                raise RunError("the commit failed", [Problem(fact, KEPT)])
            self._tell(Note(f"the commit has taken {now - begun:.0f} s so far (pid {child.pid})"))
        try:
            answer = cast(Sealed | Failed, child.receive())
        except ChildDied as death:
            raise RunError("the commit failed", [Problem(str(death), KEPT)]) from None
        if isinstance(answer, Failed):
            raise answer.report or RunError("the commit failed", [Problem(f"{answer.error}\n{answer.trace}", KEPT)])
        return answer

    def _outcome(self, prepared: Prepared) -> Outcome:
        return Outcome(
            plan=self._plan,
            checkpoint=prepared.place.checkpoint,
            records=self._ledger.finished(),
            resumed=len(prepared.records),
            retried=self._retried,
            workers=read_workers(self._ledger.workers),
            sealed=self._sealed,
            check=self._verdict,
            where=self._ready.where,
            slots=self._ready.slots,
            budget=self._request.budget,
            stages=dict(self._stages.seconds),
            driver_pid=os.getpid(),
            driver_cpu_seconds=time.process_time(),
            driver_peak_rss=memory()[1],
            finished=tuple(self._finished),
        )


def change_places(place: Place, ledger: Ledger) -> None:
    """Put a checkpoint that was made aside where it belongs, and remove the one it replaces; goes on where it was stopped."""
    if not place.aside:
        return
    replaced = replaced_path(ledger)
    if os.path.lexists(place.committed):
        if os.path.lexists(place.checkpoint):
            shutil.rmtree(replaced, ignore_errors=True)  # of a still earlier run
            os.rename(place.checkpoint, replaced)
        os.rename(place.committed, place.checkpoint)
        sync_directory(os.path.dirname(place.checkpoint))
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(place.out, ignore_errors=True)
