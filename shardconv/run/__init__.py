"""Running a plan: what an executor is, and what it tells.

An executor is a generator. It is given the state directory, the numbers of the units to do and the name of the function that does one;
it yields `Ready` once, then `Finished`, `Retried`, `Waiting` and `Note` as they happen, and closing it stops its workers. `local.execute`
is the specification; `ray.execute` does the same on a cluster. Nothing but the state directory's path and a unit's number goes to a worker,
and nothing but a `Finished` of a few hundred bytes comes back: tensors go from the source to the store inside one process.

A unit is a pure function of the plan that may be tried again: on a worker that died, on a disk that hiccuped, at most `ATTEMPTS` times.
A report for the user about the source (a file that is short, say) is never tried again: it would say the same.
"""

import importlib
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from shardconv.errors import Problem, RunError, ShardconvError

ATTEMPTS = 3  # per unit: one accident and one coincidence; a third failure is the unit's own fault

AGAIN = "run the same command again"
# What the system says of an output that takes nothing more, however often a unit is tried, and what to do about it. TensorStore says it
# inside a ValueError, so the text counts.
DISK = {
    "No space left on device": f"make room, then {AGAIN}",
    "Disk quota exceeded": f"remove something of yours or have the quota raised, then {AGAIN}",
    "Read-only file system": f"mount it for writing, then {AGAIN}",
    "File too large": f"raise the limit on the size of files (`ulimit -f` shows it), then {AGAIN}",
    "Permission denied": f"see that you may write there, then {AGAIN}",
    "Operation not permitted": f"see that you may write there (`lsattr` shows what is locked), then {AGAIN}",
}


@dataclass(frozen=True)
class Ready:
    """Workers may be given units: how many at a time, and where ("2 processes", "Ray on this machine")."""

    slots: int
    where: str


@dataclass(frozen=True)
class Finished:
    """A unit is durable and in the ledger: bytes, seconds, and the process that did it (bytes of RSS at its peak so far)."""

    unit: int
    attempt: str
    bytes_read: int
    bytes_written: int
    requests: int
    seconds: float
    peak_rss: int
    pid: int
    host: str


@dataclass(frozen=True)
class Failed:
    """A unit raised: `report` is what the user must read, None for an error that may pass; `error` says it shortly, `trace` in full."""

    unit: int
    error: str
    trace: str
    report: ShardconvError | None = None


@dataclass(frozen=True)
class Retried:
    """A unit failed for the `failures`-th time and will be tried again."""

    unit: int
    failures: int
    error: str
    trace: str = ""


@dataclass(frozen=True)
class Restarted:
    """All processes on a mesh are started again, for the `times`-th time of `most`: one of them is gone, or failed."""

    times: int
    most: int
    error: str


@dataclass(frozen=True)
class Waiting:
    """Nothing has been heard of a unit for `seconds`; `where` names the process that has it, or says that none has."""

    unit: int
    seconds: float
    where: str


@dataclass(frozen=True)
class Note:
    """Something the user should know."""

    text: str


Event = Ready | Finished | Retried | Restarted | Waiting | Note


@dataclass(frozen=True)
class Began:
    """The units of a run are known: bytes of the target per unit, which are finished already, and where heartbeats are.

    `budget` is the bytes each worker may hold.
    """

    sizes: tuple[int, ...]
    resumed: frozenset[int]
    workers: str
    budget: int


@dataclass(frozen=True)
class Stage:
    """The run goes on to something else; `name` is a key of the report's `stages`."""

    name: str


@dataclass(frozen=True)
class Sealed:
    """The checkpoint is complete: by which Orbax, how many losing attempts were discarded, and what the commit's process took."""

    orbax: str
    discarded: int
    pid: int
    seconds: float
    cpu_seconds: float
    peak_rss: int


# What a run tells whoever watches it.
Told = Event | Began | Stage


@dataclass(frozen=True)
class Patience:
    """Seconds without a sign of life after which a unit is named, and after which it is taken from its worker."""

    name_after: float
    give_up_after: float


def attempt(work: str, state: str, unit: int) -> Finished | Failed:
    """Do one unit in this process; `work` names the function ("module:name"), and whatever goes wrong comes back as a value."""
    return cast(Finished | Failed, answer(unit, work, state, unit))


def answer(unit: int, function: str, *arguments: object) -> object:
    """What the function called "module:name" makes of its arguments; what goes wrong comes back as `Failed`, of `unit`."""
    try:
        return named(function)(*arguments)
    except RunError as error:  # resumable by its class
        return Failed(unit, str(error), traceback.format_exc())
    except ShardconvError as report:
        return Failed(unit, str(report), traceback.format_exc(), report)
    except Exception as error:  # noqa: BLE001  the border of the process: the driver decides what is tried again
        return Failed(unit, f"{type(error).__name__}: {error}", traceback.format_exc())


def named(function: str) -> Callable[..., object]:
    """The function called "module:name"; names travel between processes where functions would need pickling."""
    module, _, name = function.partition(":")
    found: Callable[..., object] = getattr(importlib.import_module(module), name)
    return found


def python_path() -> str:
    """PYTHONPATH for a worker, so that an uninstalled checkout works: where we find modules, less what the interpreter brings."""
    own = {os.path.realpath(path) for path in sysconfig.get_paths().values()}
    entries = [os.path.abspath(entry) for entry in sys.path]
    return os.pathsep.join(e for e in entries if os.path.isdir(e) and os.path.realpath(e) not in own)


def disk_report(error: OSError, directory: str) -> RunError:
    """An error of the disk under the output as the user reads it; `directory` stands for a file that the error does not name."""
    said = error.strerror or str(error)
    problem = Problem(f"{error.filename or directory}: {said}", DISK.get(said, f"mend this, then {AGAIN}"))
    return RunError("cannot write the output", [problem])


def _at(error: str, said: str) -> str:
    """The file that an error names, as "PATH: "; "" where it names none."""
    found = re.search(rf"{said}: '(?P<path>[^']+)'", error) or re.search(rf"(?P<path>/[^\n]*): {said}", error)
    return f"{found['path']}: " if found else ""


@dataclass
class Failures:
    """Counts the failures of each unit, and says when it is enough; `name` describes a unit to the user."""

    name: Callable[[int], str]
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, failed: Failed) -> Retried:
        """Count a failure; raises the unit's own report, or RunError when it will not pass or came `ATTEMPTS` times."""
        if failed.report is not None:
            raise failed.report
        for said, remedy in DISK.items():
            if said in failed.error:
                raise RunError("cannot write the output", [Problem(f"{self.name(failed.unit)}: {_at(failed.error, said)}{said}", remedy)])
        count = self.counts[failed.unit] = self.counts.get(failed.unit, 0) + 1
        if count >= ATTEMPTS:
            fact = f"{self.name(failed.unit)}\nlast error: {failed.error}"
            remedy = f"{AGAIN} to go on from the finished units; -v shows every attempt"
            raise RunError(f"a unit failed {count} times", [Problem(fact, remedy)])
        return Retried(failed.unit, count, failed.error, failed.trace)
