"""Whom a kill hits, and when: a running conversion seen from outside, by its processes and by what it says."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent
PATIENCE = 180.0  # seconds after which a conversion of seconds has hung
GONE = 15.0  # seconds after which whatever a killed driver has started must be gone
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray's; they look for their raylet now and then, and end when it is gone
COMMIT = "shardconv.run.finish:finish"


@dataclass
class Running:
    """One run of the command; `env` is added to the environment."""

    process: subprocess.Popen[bytes]
    log: Path
    begun: float

    @classmethod
    def start(cls, root: Path, name: str, arguments: tuple[str, ...], env: Mapping[str, str] | None = None) -> "Running":
        """Begin in the directory `root`; what it says goes to NAME.log there, which is outside of what is looked at."""
        log = root.parent / f"{root.name}.{name}.log"
        command = [sys.executable, str(HERE / "command.py"), "run", "config.toml", "--json-logs", *arguments]
        paths = os.pathsep.join([str(HERE / "hook"), str(HERE.parents[1])])
        environment = {**os.environ, "PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0", **(env or {})}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        return cls(process, log, time.monotonic())

    def tree(self) -> list[psutil.Process]:
        """The driver's descendants."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def wait(self) -> int:
        """Its exit code; raises TimeoutExpired when it has hung."""
        return self.process.wait(PATIENCE)

    def events(self) -> Iterator[Mapping[str, object]]:
        """What it has said so far."""
        for line in self.log.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                if isinstance(found := json.loads(line), dict):
                    yield found

    def count(self, event: str) -> int:
        """How many events of a kind it has told."""
        return sum(found.get("event") == event for found in self.events())

    def resumed(self) -> int:
        """The units that it found finished."""
        return next((int(str(found["resumed"])) for found in self.events() if found.get("event") == "began"), 0)


def _named(running: Running, wanted: Callable[[str], bool]) -> list[psutil.Process]:
    found = []
    for process in running.tree():
        with suppress(psutil.Error):
            if wanted(" ".join([process.name(), *process.cmdline()])):
                found.append(process)
    return found


def present(running: Running, victim: str) -> list[psutil.Process]:
    """The processes of which a kill takes one; a worker counts once it has been given work."""
    if victim in ("driver", "group", "everything"):
        return [psutil.Process(running.process.pid)] if running.process.poll() is None else []
    if victim in ("worker", "hang"):
        busy = _named(running, lambda words: "shardconv.run:attempt" in words or "ray::attempt" in words)
        return busy if running.count("finished") else []
    name = {"commit": COMMIT, "raylet": "raylet/raylet ", "gcs": "gcs_server/gcs_server"}[victim]
    return _named(running, lambda words: name in words)


def strike(running: Running, victim: str, target: psutil.Process) -> None:
    """Do it; SIGKILL, but SIGSTOP for one that is to hang."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        if victim == "group":
            os.killpg(running.process.pid, signal.SIGKILL)
        elif victim == "everything":
            for process in [*running.tree(), target]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        else:
            target.send_signal(signal.SIGSTOP if victim == "hang" else signal.SIGKILL)


def remaining(processes: list[psutil.Process]) -> list[str]:
    """Those that are still there some time after their driver was killed."""
    _, alive = psutil.wait_procs(processes, timeout=GONE)
    found = []
    for process in alive:
        with suppress(psutil.Error):
            gone = process.status() == psutil.STATUS_ZOMBIE  # where nobody collects orphans they stay as that
            if not gone and process.name() not in AGENTS:
                found.append(f"{process.name()} (pid {process.pid}) outlives its driver")
    return found
