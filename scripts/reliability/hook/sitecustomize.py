"""Python imports this by its name when it starts, wherever it finds it on the path: the hand that kills a process at a named step.

`SHARDCONV_STEP` is a JSON list of ROLE, NUMBER, PLACE and LOG. In the process of that role (`driver` or `commit`) everything that is about
to change a name or a file below PLACE is a step. Each is written to LOG; before step NUMBER the process gets SIGKILL; -1 only lists them.
"""

import json
import os
import signal
import sys

# What the interpreter tells of files (the table of audit events in its documentation); an `open` counts where it writes.
CHANGES = {"os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR
# Words of a process's command line by which it is known.
ROLES = {"commit": "shardconv.run.finish:finish", "driver": "reliability/command.py"}


def install(role: str, number: int, place: str, log: str) -> None:
    """Watch this process, if it has the role."""
    words = " ".join(sys.orig_argv)
    if ROLES[role] not in words:
        return
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        writes = event == "open" and len(arguments) == 3 and isinstance(arguments[2], int) and arguments[2] & WRITING
        if not (writes or event in CHANGES) or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if not isinstance(path, str) or not path.startswith(place + os.sep):
            return
        # This very line must not be a step, and must be there after a SIGKILL.
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, f"{seen} {event.removeprefix('os.')} {os.path.relpath(path, place)}\n".encode())
        os.close(file)
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.addaudithook(hook)


if "SHARDCONV_STEP" in os.environ:
    install(*json.loads(os.environ["SHARDCONV_STEP"]))
