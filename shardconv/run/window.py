"""One window of arrays on the mesh, in one process: place them, write what this process's devices are to write, let them go.

Every process of the group does the same window at the same time, since the device layout is a collective program. Only then is each on its
own: a unit is what one device writes, from its own memory, chunk by chunk, through the writer and into the ledger that all executors use.
An array is placed when any of its units is not recorded yet, so a window that was interrupted costs its reading again and little else.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from shardconv.boxes import Box, slices
from shardconv.copying import copy
from shardconv.dtypes import raw_view
from shardconv.formats import Tensor
from shardconv.formats.reading import ReadCounts, Reader
from shardconv.ledger import Ledger
from shardconv.mesh.choosing import Way, can_exchange, choose
from shardconv.placement import device_boxes
from shardconv.plan import READ_GAP, Leaf, Plan, Unit
from shardconv.run import Finished
from shardconv.run.heartbeat import Heartbeat
from shardconv.run.job import Job
from shardconv.run.unit import recorded
from shardconv.run.work import Array, Workspace, require_unchanged, write_unit

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

Shard = tuple[Box, Array]


@dataclass(frozen=True)
class Member:
    """What a process keeps from window to window."""

    ledger: Ledger
    job: Job
    plan: Plan
    mesh: "Mesh"
    heartbeat: Heartbeat
    workspace: Workspace
    owed: list[ReadCounts] = field(default_factory=list)  # what was read for windows of which nothing was to be written here


class _Beating(Reader):
    """A reader that is a sign of life."""

    def __init__(self, root: str, heartbeat: Heartbeat) -> None:
        super().__init__(root, coalesce_gap=READ_GAP)
        self._heartbeat = heartbeat

    def read(self, tensor: Tensor, box: Box, out: Array) -> None:
        super().read(tensor, box, out)
        self._heartbeat.tick(0)


def do_window(member: Member, placement: str, number: int, pending: Sequence[int]) -> list[Finished]:
    """Place window `number`, and do those `pending` units of it that are this process's; durable and recorded on return.

    `placement` is "mesh", "mesh-host" or "mesh-device". Raises InputError where the source is not what was planned, RunError where a
    disk fails.
    """
    import jax

    window, plan = member.plan.windows[number], member.plan
    devices = member.mesh.devices.flat
    own = [
        (devices[position], unit)
        for position, unit in window.units
        if unit in pending and devices[position].process_index == jax.process_index()
    ]
    if own:
        member.heartbeat.begin(own[0][1])
    try:
        arrays, counts = _placed(member, placement, {span.leaf for unit in pending for span in plan.units[unit].spans})
        member.owed.append(counts)
        done: list[Finished] = []
        for device, unit in own:
            member.heartbeat.begin(unit)
            done.append(_write(member, plan.units[unit], arrays, device, _all(member.owed)))
            member.owed.clear()
        return done
    finally:
        member.heartbeat.end()


def _all(counts: Sequence[ReadCounts]) -> ReadCounts:
    """The sum; what is not written here for now goes into the record of the next unit that is."""
    return ReadCounts(
        sum(one.requests for one in counts), sum(one.bytes_read for one in counts), sum(one.bytes_needed for one in counts)
    )


def _placed(member: Member, placement: str, leaves: set[int]) -> tuple[Mapping[int, "jax.Array"], ReadCounts]:
    """The leaves on the mesh, and what was read of the source."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from shardconv.mesh import device, host

    plan, arrays = member.plan, {}
    tile = max(plan.leaves[number].chunk_bytes for number in leaves)
    with _Beating(plan.source.root, member.heartbeat) as reader:
        for number in sorted(leaves):
            leaf = plan.leaves[number]
            place = device.place if _way(member, placement, leaf) == "device" else host.place
            sharding = NamedSharding(member.mesh, PartitionSpec(*leaf.spec))
            arrays[number] = jax.block_until_ready(place(leaf, sharding, plan.tensors, reader, member.workspace, tile))
        require_unchanged(plan.source, reader.touched)
        return arrays, reader.counts


def _way(member: Member, placement: str, leaf: Leaf) -> Way:
    """How a leaf comes onto the mesh; all processes come to the same."""
    if placement == "mesh-host" or not can_exchange(leaf):
        return "host"
    if placement == "mesh-device":
        return "device"
    boxes: dict[int, list[Box]] = {}
    for device, box in zip(member.mesh.devices.flat, device_boxes(leaf.shape, leaf.spec, member.plan.mesh), strict=True):
        boxes.setdefault(device.process_index, []).append(box)
    return choose(leaf, tuple(boxes.values()), member.plan.tensors)


def _shard(array: "jax.Array", device: Any) -> Shard:
    """The box of an array that a device of this process has, and its elements."""
    from shardconv.mesh.host import index_box

    shard = next(shard for shard in array.addressable_shards if shard.device == device)
    return index_box(shard.index, array.shape), np.asarray(shard.data)


def _write(member: Member, unit: Unit, arrays: Mapping[int, "jax.Array"], device: Any, read: ReadCounts) -> Finished:
    plan, job = member.plan, member.job
    shards = {span.leaf: _shard(arrays[span.leaf], device) for span in unit.spans}

    def fill(number: int, box: Box, out: Array) -> None:
        corner, data = shards[number]
        within = tuple((a - start, b - start) for (a, b), (start, _) in zip(box, corner, strict=True))
        copy(raw_view(out), raw_view(data)[slices(within)])

    attempt, tick = f"u{unit.number}x{secrets.token_hex(3)}", member.heartbeat.tick
    done = write_unit(plan, unit, job.place.stage, attempt, job.store, tick, member.workspace, fill, lambda: read)
    return recorded(member.ledger, job, done)
