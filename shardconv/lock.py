"""One run per output: a lock file that survives network disks, dead owners and skewed clocks.

The file holds the owner's host, pid, the moment its process started and a token that no other lock ever has; the owner touches it every
`BEAT` seconds. A lock is stale when its owner's process is gone (same host) or its last beat is older than `LIFETIME`. Ages are measured
with the file system's own clock: a probe file is written beside the lock and the two times are compared.

A stale lock is taken over under a second file that is named after the stale token, so of two runs that see the same dead owner one wins,
and the loser, having read the token again, sees the winner. An owner that was only frozen finds another's token at its next beat, and
`check` stops it before it commits.
"""

import json
import os
import secrets
import socket
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from shardconv.errors import Problem, RunError

BEAT = 5.0  # seconds between two beats
LIFETIME = 60.0  # seconds: twelve missed beats; a file server's hiccup passes, a crashed host blocks a new run for a minute only


_left: set[str] = set()  # tokens of locks that this process let go of: one that could not be removed is nobody's, though we live


@dataclass(frozen=True)
class Owner:
    """Who holds a lock; `started` tells two processes apart that had the same pid (clock ticks since boot, 0 where unknown)."""

    host: str
    pid: int
    started: int
    token: str


def this_process() -> Owner:
    """The present process as an owner, with a fresh token."""
    return Owner(socket.gethostname(), os.getpid(), _started(os.getpid()) or 0, secrets.token_hex(8))


def _started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; 0 where the system does not say, None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            # The second field is the command in brackets and may hold anything; the start is the 22nd (proc(5)).
            return int(file.read().rpartition(")")[2].split()[19])
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


class Lock:
    """Exclusive ownership of a state directory, as a context manager.

    Raises RunError naming the owner when another run holds the lock, OSError when the directory cannot be written.
    """

    def __init__(self, state: str) -> None:
        self.path = os.path.join(state, "lock")
        self.owner = this_process()
        self.taken_from: Owner | None = None
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> Self:
        if not self._create(self.path):
            self._take_over()
        self._beats.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._beats.join()
        _left.add(self.owner.token)
        with suppress(OSError):  # a disk that takes nothing more; a lock that was left is taken over
            held = self._read()
            if held is not None and held.token == self.owner.token:
                self._sweep()
                os.unlink(self.path)

    def check(self) -> None:
        """Raise RunError when the lock is no longer ours: this process was silent for longer than `LIFETIME` and another run went on."""
        held = self._read()
        if held is None or held.token != self.owner.token:
            now = "nobody" if held is None else f"pid {held.pid} on {held.host}"
            fact = f"{self.path} was ours (pid {self.owner.pid} on {self.owner.host}) and is now held by {now}"
            raise RunError("another run has taken over this output", [Problem(fact, "let that run finish")])

    def _sweep(self) -> None:
        """Remove drafts of processes that died while they wrote them; one that is being written is not missed, see `_create`."""
        directory, name = os.path.split(self.path)
        for other in os.listdir(directory):
            if other.startswith(f"{name}.") and other.endswith(".tmp"):
                _remove(os.path.join(directory, other))

    def _create(self, path: str) -> bool:
        draft = f"{path}.{self.owner.token}.tmp"
        try:
            with open(draft, "w", encoding="utf-8") as file:
                json.dump(asdict(self.owner), file)
            try:
                os.link(draft, path)  # appears with its content, or not at all
            except FileExistsError:
                return False
            except OSError:  # file systems without hard links: a reader may see an empty lock for a moment
                return self._create_plainly(path)
        finally:
            _remove(draft)
        return True

    def _create_plainly(self, path: str) -> bool:
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump(asdict(self.owner), file)
        except FileExistsError:
            return False
        return True

    def _take_over(self) -> None:
        held = self._read()
        if held is not None and not self._stale(held):
            self._refuse(held)
        claim = f"{self.path}.{held.token if held else 'gone'}.claim"
        if (self._age(claim) or 0.0) > LIFETIME:  # whoever claimed it died within these few lines
            _remove(claim)
        if not self._create(claim):
            self._refuse(held)
        try:
            now = self._read()
            if now is not None and (held is None or now.token != held.token):
                self._refuse(now)
            _remove(self.path)
            if not self._create(self.path):
                self._refuse(self._read())
            self.taken_from = now
        finally:
            _remove(claim)

    def _stale(self, held: Owner) -> bool:
        age = self._age(self.path)
        if age is None or age > LIFETIME or held.token in _left:
            return True
        if held.host != self.owner.host:
            return False
        started = _started(held.pid)
        return started is None or (held.started != 0 and started != held.started)

    def _refuse(self, held: Owner | None) -> None:
        who = "another run" if held is None else f"pid {held.pid} on {held.host}"
        age = self._age(self.path)
        beat = "" if age is None else f", last heartbeat {age:.0f} s ago"
        remedy = f"wait for it or stop it; a lock without a heartbeat for {LIFETIME:.0f} s is taken over"
        raise RunError("another run is writing to this output", [Problem(f"{self.path} is held by {who}{beat}", remedy)])

    def _age(self, path: str) -> float | None:
        """Seconds since a file was written or touched; None when it is gone."""
        probe = f"{self.path}.{self.owner.token}.probe"
        with open(probe, "w", encoding="utf-8"):
            pass
        try:
            return max(0.0, os.stat(probe).st_mtime - os.stat(path).st_mtime)
        except FileNotFoundError:
            return None
        finally:
            os.unlink(probe)

    def _read(self) -> Owner | None:
        """The owner; None when there is no lock; a lock that cannot be read belongs to an unknown owner that only age makes stale."""
        try:
            with open(self.path, encoding="utf-8") as file:
                return Owner(**json.load(file))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return Owner("an unknown host", 0, 0, "unreadable")

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with suppress(OSError):  # a beat that a disk refuses is missed, and the next may get through; the run itself hears of its disk
                held = self._read()
                if held is not None and held.token == self.owner.token:
                    os.utime(self.path)
