"""Ray nodes of processes of their own, as `ray start` makes them: each can be given an environment, and killed with all that it has.

`ray stop` would end every Ray of this machine, so it is never called: a node is a process and its children.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

STORE = 80 << 20
# A lost node is noticed after 3 seconds, and not after 15.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def free_port() -> int:
    """A port that nobody listens on, beyond those of Ray's workers."""
    while True:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = int(found.getsockname()[1])
        if port > 20000:
            return port


def processes(group: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """All processes of a node."""
    first = psutil.Process(group.pid)
    return [first, *first.children(recursive=True)]


@dataclass
class Nodes:
    """A head and what joins it; `environment` is what all have beside ours."""

    environment: Mapping[str, str]
    folder: str
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    groups: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def start(
        self, *options: str, host: str = "127.0.0.1", prefix: Sequence[str] = (), cwd: str | None = None, **environment: str
    ) -> "subprocess.Popen[bytes]":
        """`ray start` with options: the head first, then others; it comes back when the node has said that it runs.

        `prefix` goes before the command: in a network namespace, where the node is `host`.
        """
        role = [f"--address={self.address}"] if self.groups else ["--head", f"--port={self.port}", f"--temp-dir={self.folder}"]
        command = [
            *prefix, sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--block", f"--node-ip-address={host}",
            f"--object-store-memory={STORE}", "--disable-usage-stats", *options,
        ]  # fmt: skip
        log = Path(self.folder) / f"node{len(self.groups)}.log"
        with log.open("wb") as out:
            group = subprocess.Popen(
                command, cwd=cwd, env={**os.environ, **self.environment, **environment}, stdout=out, stderr=out, start_new_session=True
            )
        self.groups.append(group)
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert group.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        return group

    def kill(self, group: "subprocess.Popen[bytes]") -> None:
        """What a power cut does to a node: all its processes are gone at once."""
        for process in processes(group):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        group.wait()

    def close(self) -> None:
        for group in reversed(self.groups):
            if group.poll() is None:
                self.kill(group)


@contextmanager
def nodes(host: str = "127.0.0.1", **environment: str) -> Iterator[Nodes]:
    """No node yet, and none left afterwards; the head will be `host`."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # its sockets' paths may have 100 letters
        found = Nodes({"RAY_AUTH_MODE": "disabled", **QUICK, **environment}, folder, host)
        try:
            yield found
        finally:
            found.close()
