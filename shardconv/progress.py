"""Progress: what a person, or a log, sees while a conversion runs. Everything goes to stderr.

`watching` gives the view that fits: on a terminal a live one (bar, GB done, GB/s, time left, every worker's state and memory against the
budget); without one a line every 30 seconds; `--json-logs` writes one JSON object per event and per heartbeat; `-q` nothing, `-v` a line
per unit as well. A view is told what happens (`run.Told`), reads the workers' heartbeats by itself, and decides nothing.

`Tally` is the arithmetic, without clock or terminal. Rates are over the last half minute, so the time left follows a disk that slows down;
finished units of earlier runs count as done and not as speed.
"""

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shardconv.run import Began, Finished, Note, Ready, Restarted, Retried, Stage, Told, Waiting
from shardconv.run.heartbeat import WorkerState, read_compared, read_workers

EVERY = 30.0  # seconds between two lines in a log: a silence that a person, or a cluster's watchdog, does not take for a hang
WINDOW = 30.0  # seconds over which a rate is taken: some units of the slowest disks
LOOK = 1.0  # seconds between two looks at the heartbeats by the live view
ROWS = 8  # workers shown; the others are counted

STAGES = {
    "plan": "planning",
    "prepare": "looking at the output",
    "start": "starting workers",
    "units": "converting",
    "commit": "committing",
    "check": "comparing",
    "logits": "computing logits",
    "close": "tidying up",
}


def amount(nbytes: float) -> str:
    """Bytes as people write them, in powers of ten.

    >>> amount(1_180_000_000), amount(999), amount(64 << 20)
    ('1.18 GB', '999 B', '67.1 MB')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            digits = 2 if nbytes < 10 * size else 1
            return f"{nbytes / size:.{digits}f} {unit}"
    return f"{nbytes:.0f} B"


def span(seconds: float) -> str:
    """A time as people say it.

    >>> span(3.2), span(106), span(7500)
    ('3 s', '1 min 46 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@dataclass(frozen=True)
class Progress:
    """How far a run is: bytes of the target, bytes per second (0: not known yet), seconds left (None: not known yet)."""

    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    seconds_left: float | None
    units_done: int
    units: int


class Tally:
    """What has been told so far, as numbers."""

    def __init__(self) -> None:
        self.stage = ""
        self.ready = Ready(0, "")
        self.began = Began((), frozenset(), "", 0)
        self._done: set[int] = set()
        self._samples: deque[tuple[float, int]] = deque()

    def hear(self, told: Told) -> None:
        """Take in one event."""
        if isinstance(told, Stage):
            self.stage = told.name
            self._samples.clear()  # a rate is of one kind of work
        elif isinstance(told, Ready):
            self.ready = told
        elif isinstance(told, Began):
            self.began = told
            self._done = set(told.resumed)
        elif isinstance(told, Finished):
            self._done.add(told.unit)

    def progress(self, now: float, workers: Sequence[WorkerState]) -> Progress:
        """How far the run is at the moment `now` (seconds of any clock); called again and again, it knows the rate."""
        sizes = self.began.sizes
        flying = {w.unit: w.unit_bytes for w in workers if w.unit is not None and w.unit not in self._done and w.unit < len(sizes)}
        done = sum(sizes[unit] for unit in self._done) + sum(min(b, sizes[unit]) for unit, b in flying.items())
        return self._at(now, done, sum(sizes), len(self._done), len(sizes))

    def comparing(self, now: float, done: int, total: int) -> Progress:
        """How far the check is at the moment `now`."""
        return self._at(now, done, total, 0, 0)

    def _at(self, now: float, done: int, total: int, units_done: int, units: int) -> Progress:
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW:
            self._samples.popleft()
        then, before = self._samples[0]
        rate = max(0.0, (done - before) / (now - then)) if now > then else 0.0
        return Progress(done, total, rate, (total - done) / rate if rate else None, units_done, units)


def line(tally: Tally, progress: Progress, workers: Sequence[WorkerState]) -> str:
    """A heartbeat as one line of a log."""
    share = 100 * progress.done_bytes // progress.total_bytes if progress.total_bytes else 0
    parts = [f"{STAGES.get(tally.stage, tally.stage)}: {amount(progress.done_bytes)} of {amount(progress.total_bytes)} ({share}%)"]
    if progress.units:
        parts.append(f"{progress.units_done} of {progress.units} units")
    if progress.bytes_per_second:
        parts.append(f"{amount(progress.bytes_per_second)}/s")
    if progress.seconds_left:
        parts.append(f"{span(progress.seconds_left)} left")
    if workers:
        heaviest = max(worker.peak_rss for worker in workers)
        busy = sum(worker.unit is not None for worker in workers)
        budget = amount(tally.began.budget)
        parts.append(f"{busy} of {len(workers)} workers busy, the heaviest {amount(heaviest)} (buffers may take {budget})")
    return ", ".join(parts)


def message(told: Told, verbose: bool) -> str | None:
    """What is worth a line of its own, or None."""
    if isinstance(told, Began) and told.resumed:
        return f"going on: {len(told.resumed)} of {len(told.sizes)} units are finished already"
    if isinstance(told, Ready):
        return f"workers: {told.where}, {told.slots} at a time"
    if isinstance(told, Retried):
        text = f"unit {told.unit} failed ({told.error}); it is tried again ({told.failures + 1} of 3)"
        return f"{text}\n{told.trace}".rstrip() if verbose else text
    if isinstance(told, Restarted):
        return f"all processes are started again ({told.times} of {told.most}): {told.error}"
    if isinstance(told, Waiting):
        return f"nothing heard of unit {told.unit} for {told.seconds:.0f} s ({told.where})"
    if isinstance(told, Note):
        return told.text
    if isinstance(told, Finished) and verbose:
        rate = amount(told.bytes_written / told.seconds) if told.seconds else "?"
        return f"unit {told.unit}: {amount(told.bytes_written)} in {told.seconds:.2f} s ({rate}/s), pid {told.pid} on {told.host}"
    return None


class View(Protocol):
    """What a run tells to: any of the views below."""

    def hear(self, told: Told) -> None: ...


class Silent:
    """`-q`."""

    def hear(self, told: Told) -> None:
        """Nothing is shown."""


class _Watching:
    """A tally that events and a clock reach from two threads."""

    def __init__(self, console: Console, verbose: bool) -> None:
        self.console = console
        self.verbose = verbose
        self.tally = Tally()
        self.lock = threading.Lock()

    def look(self) -> tuple[Progress, tuple[WorkerState, ...]]:
        with self.lock:
            folder = self.tally.began.workers
            if self.tally.stage == "check" and folder and (compared := read_compared(folder)):
                return self.tally.comparing(time.monotonic(), *compared), ()
            workers = read_workers(folder) if folder else ()
            return self.tally.progress(time.monotonic(), workers), workers


class Lines(_Watching):
    """A log: what is worth saying when it happens, and a heartbeat line every half minute (`beat`)."""

    def hear(self, told: Told) -> None:
        """Say it, if it is worth a line."""
        with self.lock:
            self.tally.hear(told)
        text = message(told, self.verbose)
        if text is not None:
            self.console.print(text)

    def beat(self) -> None:
        """The heartbeat line; between two it takes a look, so that the rate is of this half minute."""
        progress, workers = self.look()
        self.console.print(line(self.tally, progress, workers))


class JsonLines(_Watching):
    """A log for programs: one JSON object per line, with `time` (Unix seconds) and `event`."""

    def hear(self, told: Told) -> None:
        """Write the event with its fields; `began` says how much there is instead of the size of every unit."""
        with self.lock:
            self.tally.hear(told)
        if isinstance(told, Began):
            total, resumed = sum(told.sizes), len(told.resumed)
            self.write("began", {"units": len(told.sizes), "bytes": total, "resumed": resumed, "budget": told.budget})
        else:
            self.write(type(told).__name__.lower(), asdict(told))

    def beat(self) -> None:
        """A `progress` object, with what every worker said last."""
        progress, workers = self.look()
        self.write("progress", {"stage": self.tally.stage, **asdict(progress), "workers": [asdict(worker) for worker in workers]})

    def write(self, event: str, fields: dict[str, object]) -> None:
        """One object."""
        self.console.file.write(json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n")
        self.console.file.flush()


class Screen(_Watching):
    """The live view of a terminal."""

    def __init__(self, console: Console, verbose: bool) -> None:
        super().__init__(console, verbose)
        self._looked = 0.0
        self._seen: tuple[Progress, tuple[WorkerState, ...]] = (Progress(0, 0, 0.0, None, 0, 0), ())

    def hear(self, told: Told) -> None:
        """Lines appear above the live part."""
        with self.lock:
            self.tally.hear(told)
        if isinstance(told, Stage):
            self._looked = 0.0  # a stage is never shown with the numbers of the one before it
        text = message(told, self.verbose)
        if text is not None and not isinstance(told, Ready):
            self.console.print(text)

    def render(self) -> RenderableType:
        """The live part as it is now."""
        if time.monotonic() - self._looked >= LOOK:
            self._looked, self._seen = time.monotonic(), self.look()
        return screen(self.tally, *self._seen)


def screen(tally: Tally, progress: Progress, workers: Sequence[WorkerState]) -> RenderableType:
    """The live part: a bar with numbers, and a table of the workers."""
    top = Table.grid(padding=(0, 2))
    if tally.stage == "logits":
        return Text("computing logits in JAX and in PyTorch", style="bold")
    moving = tally.stage == "units" or (tally.stage == "check" and progress.bytes_per_second > 0)
    left = f"{span(progress.seconds_left)} left" if progress.seconds_left and moving else ""
    top.add_row(
        Text(STAGES.get(tally.stage, tally.stage), style="bold"),
        ProgressBar(total=max(progress.total_bytes, 1), completed=progress.done_bytes, width=20),
        f"{amount(progress.done_bytes)} of {amount(progress.total_bytes)}",
        f"{amount(progress.bytes_per_second)}/s" if moving else "",
        left,
        f"{progress.units_done} of {progress.units} units" if progress.units else "",
    )
    if tally.stage != "units" or not workers:
        return top
    return Group(top, _workers_table(tally, workers))


def _workers_table(tally: Tally, workers: Sequence[WorkerState]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for heading in ("worker", "unit", "done", "memory", f"peak, of {amount(tally.began.budget)} + 0.1 GB"):
        table.add_column(heading, justify="left" if heading == "worker" else "right")
    alive = sorted((w for w in workers if w.rss), key=lambda w: -w.peak_rss)
    for worker in alive[:ROWS]:
        sizes = tally.began.sizes
        share = f"{100 * worker.unit_bytes // max(sizes[worker.unit], 1)}%" if worker.unit is not None and worker.unit < len(sizes) else ""
        unit = "idle" if worker.unit is None else str(worker.unit)
        table.add_row(worker.name, unit, share, amount(worker.rss), amount(worker.peak_rss))
    if len(alive) > ROWS:
        table.add_row(f"and {len(alive) - ROWS} more", "", "", "", "")
    return table


@contextmanager
def watching(*, quiet: bool, verbose: bool, json_logs: bool) -> Iterator[View]:
    """The view for this process's stderr."""
    console = Console(file=sys.stderr, markup=False, highlight=False, soft_wrap=True)
    if quiet:
        yield Silent()
    elif json_logs:
        log = JsonLines(console, verbose)
        with _beating(log.beat, EVERY):
            yield log
    elif console.is_terminal:
        view = Screen(console, verbose)
        with Live(console=console, get_renderable=view.render, refresh_per_second=4, transient=True):
            yield view
    else:
        lines = Lines(console, verbose)
        with _beating(lines.beat, EVERY):
            yield lines


@contextmanager
def _beating(beat: Callable[[], None], every: float) -> Iterator[None]:
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(every):
            beat()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
