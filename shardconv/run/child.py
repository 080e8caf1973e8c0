"""A child process that serves one function: the driver's hands on one machine.

`Child("package.module:function")` starts a fresh interpreter that imports the function's module and answers calls in order over a socket.
A fresh interpreter (not a fork) holds none of the driver's memory, threads or locks, and unlike multiprocessing's spawn it does not import
the driver's main module again, which is the command line with its tables and colours.

The child lives in a process group of its own, so Ctrl-C reaches the driver only, which decides. It holds the reading end of a pipe whose
other end is the driver's: when the driver dies, however suddenly, the pipe closes and the child exits at once. What it prints goes to a
log file, whose end is quoted when the child dies.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection

import psutil

from shardconv.run import named, python_path

# Seconds for a killed process to be gone. One that waits in the kernel for a dead disk does not go, and is left: it can complete nothing,
# since its attempt's directory is renamed when it is discarded.
GONE = 10.0
QUOTED = 600  # characters of a dead child's log in an error: the last line of a C++ abort or of a Python traceback


class ChildDied(Exception):
    """The process is gone; the message says how."""


class Child:
    """One process that calls `function` ("module:name").

    `log` receives what it prints, None leaves it on our own stderr; `nice` is added to its niceness.
    """

    def __init__(self, function: str, log: str | None, env: Mapping[str, str], nice: int) -> None:
        ours, theirs = socket.socketpair()
        self._log = log
        command = [sys.executable, "-m", "shardconv.run.child", str(theirs.fileno()), str(nice), function]
        with theirs, open(log or os.devnull, "ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=sys.stderr if log is None else output,
                stderr=None if log is None else output,
                pass_fds=[theirs.fileno()],
                process_group=0,
                env={**os.environ, **env, "PYTHONPATH": python_path()},
            )
        self.connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def send(self, *arguments: object) -> None:
        """Ask for a call; the answer comes by `receive`. A child that is already dead is noticed there."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(arguments)

    def receive(self) -> object:
        """The answer to the oldest call; raises ChildDied."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise ChildDied(self._obituary()) from error

    def cpu_seconds(self) -> float:
        """CPU time the process has used so far: while it grows the process lives; 0 where it is gone."""
        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def stop(self) -> None:
        """End the process now, whatever it is doing, and wait for it."""
        self.connection.close()
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GONE)
        if self.process.stdin is not None:
            self.process.stdin.close()

    def _obituary(self) -> str:
        try:
            code = self.process.wait(GONE)
        except subprocess.TimeoutExpired:
            return f"its process (pid {self.pid}) closed its connection and does not end"
        if code < 0:
            name = signal.Signals(-code).name
            how = f"was killed by {name}" + (" (out of memory, perhaps)" if name == "SIGKILL" else "")
        else:
            how = f"exited with code {code}"
        tail = ""
        if self._log is not None:
            with open(self._log, encoding="utf-8", errors="replace") as file:
                tail = file.read()[-QUOTED:].strip()
        return f"its process (pid {self.pid}) {how}" + (f"; it said: {tail}" if tail else "")


def _exit_with_driver() -> None:
    sys.stdin.buffer.read()
    os._exit(1)  # the driver is gone: nobody waits for the unit, and its attempt is swept away by the next run


def serve(descriptor: int, nice: int, function: str) -> None:
    """The child's life: import, then answer calls until the driver closes the socket."""
    os.nice(nice)
    threading.Thread(target=_exit_with_driver, daemon=True).start()
    connection = Connection(descriptor)
    call = named(function)
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        connection.send(call(*arguments))


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
