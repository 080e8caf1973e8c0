"""A group of children of this process, for a mesh of this machine's own devices without Ray."""

import glob
import os
from multiprocessing.connection import wait

from shardconv.ledger import Ledger
from shardconv.run.child import Child, ChildDied
from shardconv.run.gang import Lost, Platform

# The kernel's names for accelerators.
DEVICES: dict[Platform, tuple[str, ...]] = {"tpu": ("/dev/accel*", "/dev/vfio/[0-9]*"), "gpu": ("/dev/nvidia[0-9]*", "/dev/kfd")}


class LocalGroup:
    """`count` children; see `gang.Group`."""

    def __init__(self, state: str, count: int, verbose: bool) -> None:
        self.where = f"{count} process{'' if count == 1 else 'es'} of this machine"
        self._children: list[Child] = []
        workers = Ledger(state).workers
        for member in range(count):
            log = None if verbose else os.path.join(workers, f"{os.getpid()}-member{member}.log")
            self._children.append(Child("shardconv.run.member:call", log, {}, nice=0))
        self._asked: set[int] = set()

    def ask(self, member: int, function: str, *arguments: object) -> None:
        """See `gang.Group`."""
        self._asked.add(member)
        self._children[member].send(function, *arguments)

    def answers(self, timeout: float) -> list[tuple[int, object]]:
        """See `gang.Group`; a child that died without being asked is not noticed."""
        connections = {self._children[member].connection: member for member in self._asked}
        ready = sorted(connections[connection] for connection in wait(list(connections), timeout=timeout))  # type: ignore[index]
        if not ready:
            return []
        member = ready[0]  # one at a time, so that an answer is not lost with another's death
        self._asked.discard(member)
        try:
            return [(member, self._children[member].receive())]
        except ChildDied as death:
            raise Lost(f"process {member} died: {death}", member) from death

    def stop(self) -> None:
        """See `gang.Group`; the first goes last, since the others end noisily when it is gone."""
        for child in reversed(self._children):
            child.process.kill()
        for child in self._children:
            child.stop()


def local_platform() -> Platform:
    """The kind of accelerator that this machine has; "cpu" where it has none."""
    for platform, patterns in DEVICES.items():
        if any(glob.glob(pattern) for pattern in patterns):
            return platform
    return "cpu"
