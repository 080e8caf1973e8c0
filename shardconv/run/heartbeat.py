"""Signs of life: each worker process writes one small file that says what it is doing and what it has used.

A worker beats when a unit begins, when it ends, and between at most every `EVERY` seconds as its bytes go by; nothing beats on its own,
so a file that stands still means a unit that stands still. Files are replaced atomically and never synced: they matter while the run
lives.

`Pulse` judges silence by the driver's clock alone: it remembers when a worker's file last changed. Clocks of hosts are never compared.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from shardconv.ledger import write_atomically
from shardconv.run import Patience, Waiting

EVERY = 0.5  # seconds: smooth for a person to watch, and 2 small writes a second do not load a shared disk
LOOK = 5.0  # seconds between two looks at all heartbeats by the driver: a thousand small reads on a large cluster


@dataclass(frozen=True)
class WorkerState:
    """What one worker process said last; `unit` is None between units, bytes are of the target, times in seconds."""

    host: str
    pid: int
    beat: int
    unit: int | None
    unit_bytes: int
    cpu_seconds: float
    rss: int
    peak_rss: int

    @property
    def name(self) -> str:
        """How a person names the process."""
        return f"pid {self.pid} on {self.host}"

    @property
    def is_this_process(self) -> bool:
        """Whether it is the process that asks: the driver, where one slot is all there is."""
        return (self.host, self.pid) == (socket.gethostname(), os.getpid())


def memory() -> tuple[int, int]:
    """Resident bytes of this process now, and at its peak.

    /proc's VmHWM belongs to the program that runs now; getrusage's ru_maxrss, used where there is no /proc, may carry a parent's peak.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file if line.startswith(("VmRSS", "VmHWM")))
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
    except FileNotFoundError:
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): macOS says bytes, others kibibytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return peak, peak


class Heartbeat:
    """A worker's side: `begin`, `tick` and `end` of each unit. Raises OSError where the directory cannot be written."""

    def __init__(self, directory: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._path = os.path.join(directory, f"{self._host}-{self._pid}.json")
        self._clock = clock
        self._unit: int | None = None
        self._bytes = 0
        self._beats = 0
        self._last = 0.0

    def begin(self, unit: int) -> None:
        """A unit begins."""
        self._unit, self._bytes = unit, 0
        self._write()

    def tick(self, nbytes: int) -> None:
        """`nbytes` more of the unit are done."""
        self._bytes += nbytes
        if self._clock() - self._last >= EVERY:
            self._write()

    def end(self) -> None:
        """The unit is done, or failed."""
        self._unit, self._bytes = None, 0
        self._write()

    def _write(self) -> None:
        self._last = self._clock()
        self._beats += 1
        rss, peak = memory()
        state = WorkerState(
            self._host, self._pid, self._beats, self._unit, self._bytes, time.process_time(), rss, peak
        )
        write_atomically(self._path, json.dumps(asdict(state)), durable=False)


def read_workers(directory: str) -> tuple[WorkerState, ...]:
    """What every worker said last, in the order of their names; a file that goes away meanwhile is left out, and so is the directory."""
    states = []
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:  # a run that ends tidies up while somebody looks
        return ()
    for name in names:
        if name.endswith(".json"):
            try:
                with open(os.path.join(directory, name), encoding="utf-8") as file:
                    states.append(WorkerState(**json.load(file)))
            except FileNotFoundError:
                continue
    return tuple(states)


COMPARED = "compared"  # beside the heartbeats: bytes that the check has compared, and those that it will


def tell_compared(directory: str, done: int, total: int) -> None:
    """Say how far the check is."""
    write_atomically(os.path.join(directory, COMPARED), json.dumps([done, total]), durable=False)


def read_compared(directory: str) -> tuple[int, int] | None:
    """How far the check is; None where there is none."""
    try:
        with open(os.path.join(directory, COMPARED), encoding="utf-8") as file:
            done, total = json.load(file)
    except FileNotFoundError:
        return None
    return done, total


def bury(directory: str, unit: int) -> WorkerState | None:
    """Take a unit from the worker that said it has it, because that worker is gone; returns what the worker said last."""
    owner = None
    for worker in read_workers(directory):
        if worker.unit == unit:
            owner = worker
            path = os.path.join(directory, f"{worker.host}-{worker.pid}.json")
            write_atomically(path, json.dumps(asdict(replace(worker, unit=None, unit_bytes=0, rss=0))), durable=False)
    return owner


class Pulse:
    """The driver's side: which units in flight have been silent for too long."""

    def __init__(self, directory: str, patience: Patience, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._patience = patience
        self._clock = clock
        self._begun = clock()
        self._looked = clock()
        self._seen: dict[str, tuple[int, float]] = {}
        self._named: dict[int, int] = {}

    def check(self, flying: Mapping[int, float]) -> tuple[tuple[Waiting, ...], tuple[Waiting, ...]]:
        """The units to name to the user, and those to take from their workers; looks at the files every few seconds only.

        `flying` maps a unit to the moment, by the same clock, at which it was handed out.
        """
        now = self._clock()
        if now - self._looked < min(LOOK, self._patience.name_after / 4):
            return (), ()
        self._looked = now
        silences = self._silences(flying, now)
        lost = tuple(s for s in silences if s.seconds >= self._patience.give_up_after)
        waiting = tuple(s for s in silences if s not in lost and self._is_news(s))
        return waiting, lost

    def _is_news(self, silence: Waiting) -> bool:
        times = int(silence.seconds / self._patience.name_after)
        news = times > self._named.get(silence.unit, 0)
        self._named[silence.unit] = times
        return news

    def _silences(self, flying: Mapping[int, float], now: float) -> list[Waiting]:
        owners: dict[int, tuple[float, WorkerState]] = {}
        for worker in read_workers(self._directory):
            beat, since = self._seen.get(worker.name, (-1, now))
            since = since if beat == worker.beat else now
            self._seen[worker.name] = (worker.beat, since)
            if worker.unit is not None and worker.unit in flying:
                owners[worker.unit] = max(owners.get(worker.unit, (since, worker)), (since, worker), key=lambda pair: pair[0])
        # A unit that nobody has begun waits for a free worker: that is silence only when all workers are silent.
        anyone = max((since for _, since in self._seen.values()), default=self._begun)
        return [_silence(unit, now - max(handed_out, owners[unit][0] if unit in owners else anyone), owners.get(unit))
                for unit, handed_out in flying.items()]  # fmt: skip


def _silence(unit: int, seconds: float, owner: tuple[float, WorkerState] | None) -> Waiting:
    return Waiting(unit, seconds, "no worker has begun it" if owner is None else owner[1].name)
