"""What a plan will take on many hosts, worked out from the plan alone: bytes by host, how even they are, and the time at given bandwidths.

A run that streams deals its units to whoever is free (`dealt`): of a host's `slots` workers each reads a unit and writes it, at its share
of the host's bandwidth. A run on a mesh goes by windows (`placed`): in each, every process reads what its devices are made of, then writes
what they have to write, and the next window begins when the slowest is done. Neither counts what a start takes, nor computing, which goes
on beside today's disks and networks: a core turns 2 to 4 GB/s.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from shardconv.mesh.choosing import choose, host_bytes, source_bytes
from shardconv.placement import device_boxes
from shardconv.plan import Plan


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second that one host reads from the source and writes to the output."""

    read: float
    written: float


@dataclass(frozen=True)
class Projection:
    """Bytes read and written by each host, and the seconds until the last is done."""

    read: tuple[int, ...]
    written: tuple[int, ...]
    seconds: float

    @property
    def balance(self) -> float:
        """The bytes, read and written, of the host with the most, over their mean; 1 is even."""
        moved = [read + written for read, written in zip(self.read, self.written, strict=True)]
        return max(moved) * len(moved) / sum(moved)


def dealt(plan: Plan, hosts: int, slots: int, bandwidths: Bandwidths) -> Projection:
    """A run that streams, on hosts with `slots` workers each."""
    read, written = [0] * hosts, [0] * hosts
    free = [(0.0, worker % hosts) for worker in range(hosts * slots)]
    seconds = 0.0
    for unit in plan.units:
        at, host = heapq.heappop(free)
        done = at + slots * (unit.bytes_read / bandwidths.read + unit.bytes_written / bandwidths.written)
        read[host] += unit.bytes_read
        written[host] += unit.bytes_written
        seconds = max(seconds, done)
        heapq.heappush(free, (done, host))
    return Projection(tuple(read), tuple(written), seconds)


def placed(plan: Plan, bandwidths: Bandwidths) -> Projection:
    """A run on the plan's mesh, whose positions are shared by the plan's processes in order, one process per host."""
    hosts, each = plan.processes, plan.mesh.devices // plan.processes
    read, written, seconds = [0] * hosts, [0] * hosts, 0.0
    known: dict[object, Sequence[int]] = {}
    for window in plan.windows:
        reads, writes = [0] * hosts, [0] * hosts
        for leaf in plan.leaves[window.start : window.stop]:
            like = (leaf.template, leaf.shape, leaf.spec)
            if like not in known:
                positions = device_boxes(leaf.shape, leaf.spec, plan.mesh)
                boxes = [positions[host * each : (host + 1) * each] for host in range(hosts)]
                exchanged = choose(leaf, boxes, plan.tensors) == "device"
                known[like] = [source_bytes(leaf) // hosts] * hosts if exchanged else host_bytes(leaf, boxes, plan.tensors)
            reads = [a + b for a, b in zip(reads, known[like], strict=True)]
        for position, unit in window.units:
            writes[position // each] += plan.units[unit].bytes_written
        seconds += max(r / bandwidths.read + w / bandwidths.written for r, w in zip(reads, writes, strict=True))
        read = [a + b for a, b in zip(read, reads, strict=True)]
        written = [a + b for a, b in zip(written, writes, strict=True)]
    return Projection(tuple(read), tuple(written), seconds)
