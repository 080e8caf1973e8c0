"""A process of the group that shares a mesh, from its own side: say where it is, join the others, do windows.

    hello        who and where this process is; no jax yet
    coordinator  of the first process: an address at which the others will find it
    join         jax.distributed, all of them at once, and the mesh over all their devices
    work         one window after another (`window.do_window`)

A group cannot lose one of its processes and go on: jax.distributed has no way to put another in its place, and the others end within
seconds. So a process joins once in its life, and whatever goes wrong afterwards ends all of them; the next group goes on from the ledger.
What comes back from every call is a value, `Failed` where something went wrong.
"""

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardconv.ledger import Ledger
from shardconv.run import Finished, answer
from shardconv.run.heartbeat import Heartbeat
from shardconv.run.job import load_job, load_plan
from shardconv.run.work import Workspace

if TYPE_CHECKING:
    from shardconv.run.window import Member

# Seconds without a word from a process of the group after which jax takes it for dead and ends the others. Ray and the children's pipes say
# so in a fraction of one; this is for a host that has gone off the network.
HEARTBEAT = 30
# Without these, JAX asks whatever cluster it thinks it is on for what it was told already.
ALONE = "deactivate"


@dataclass(frozen=True)
class Hello:
    """Who a process is; `rank` is its place in a TPU slice, `loopback` whether its own host name leads back to itself."""

    host: str
    address: str
    pid: int
    rank: int | None
    loopback: bool

    @property
    def name(self) -> str:
        """How a person names it."""
        return f"pid {self.pid} on {self.host}"


@dataclass(frozen=True)
class Joined:
    """What a process has brought: its own devices, those of all, and of which kind they are."""

    own: int
    all: int
    platform: str


def call(function: str, *arguments: object) -> object:
    """One of the functions below by name; an exception comes back as `Failed`, of no unit."""
    return answer(-1, f"{__name__}:{function}", *arguments)


def hello(address: str = "127.0.0.1") -> Hello:
    """Who this process is; `address` is its host's, as others reach it."""
    rank = os.environ.get("TPU_WORKER_ID")
    try:
        loopback = socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        loopback = True
    return Hello(socket.gethostname(), address, os.getpid(), int(rank) if rank and rank.isdecimal() else None, loopback)


def coordinator(address: str) -> str:
    """An address with a port that is free now, for the others to meet this process at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{address}:{probe.getsockname()[1]}"


def join(state: str, meeting: str, count: int, rank: int, environment: Mapping[str, str], patience: int) -> Joined:
    """Meet the others, and make the mesh; returns when all have come, raises after `patience` seconds without one of them."""
    assert "jax" not in sys.modules, "jax was imported before its devices were chosen"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ.update(environment)
    if "XLA_FLAGS" in environment:  # the last of two counts holds
        os.environ["XLA_FLAGS"] = f"{flags} {environment['XLA_FLAGS']}".strip()
    import jax

    jax.distributed.initialize(
        meeting,
        count,
        rank,
        cluster_detection_method=ALONE,
        initialization_timeout=patience,
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    found = Joined(jax.local_device_count(), jax.device_count(), jax.default_backend())
    ledger = Ledger(state)
    plan = load_plan(ledger)
    if found.own * count != plan.mesh.devices or found.all != plan.mesh.devices:
        return found  # the driver says what is wrong
    from jax.experimental import mesh_utils, multihost_utils
    from jax.sharding import Mesh

    devices = mesh_utils.create_device_mesh(tuple(plan.mesh.axes.values()))
    mesh = Mesh(devices, tuple(plan.mesh.axes))
    # The first collective of a CPU's clique has to be entered by all within 30 s; later ones wait for as long as it takes.
    multihost_utils.sync_global_devices("shardconv")
    from shardconv.run.window import Member

    _JOINED.append(Member(ledger, load_job(ledger), plan, mesh, Heartbeat(ledger.workers), Workspace()))
    return found


def work(placement: str, window: int, pending: Sequence[int]) -> list[Finished]:
    """Do this process's part of a window; see `window.do_window`."""
    from shardconv.run.window import do_window

    (member,) = _JOINED
    return do_window(member, placement, window, pending)


_JOINED: list["Member"] = []  # what this process has joined, once in its life
