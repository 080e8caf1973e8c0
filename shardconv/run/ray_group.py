"""A group of Ray actors, one per host or several on one, each with the devices of its share of the mesh.

On a cluster the actors are spread: one per node wherever there are as many nodes. On TPUs they are placed on the hosts of one slice, and a
process has all chips of its host. An actor is never restarted by Ray, since a process cannot join a group again (see `member`).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shardconv.errors import ConfigError, Problem, RunError
from shardconv.run import member as members
from shardconv.run.gang import Lost, Platform
from shardconv.run.nodes import first_line

PLACED = 120.0  # seconds for the resources of all actors to be there at once; an autoscaler that starts machines takes longer, and says so
# What `ray start` says of a TPU host.
TOPOLOGY, VERSION = "ray.io/tpu-topology", "ray.io/tpu-pod-type"
RESOURCE: Mapping[Platform, str] = {"cpu": "CPU", "gpu": "GPU", "tpu": "TPU"}


class Member:
    """The actor; see `shardconv.run.member`."""

    def call(self, function: str, *arguments: object) -> object:
        """One of the functions of `shardconv.run.member`."""
        if function == "hello":
            arguments = (ray.util.get_node_ip_address(),)
        return members.call(function, *arguments)


class RayGroup:
    """`count` actors of the connected Ray, each of which is promised `memory` bytes where that is a cluster's; see `gang.Group`."""

    def __init__(self, count: int, platform: Platform, where: str, memory: int = 0) -> None:
        self.where = f"{count} Ray actor{'' if count == 1 else 's'} on {where}"
        nodes = [node for node in ray.nodes() if node["Alive"]]
        share = bundle(count, platform, nodes) | ({"memory": float(memory)} if memory else {})
        self._slice, self._placement = _placed(count, share, nodes)
        actor: Any = ray.remote(max_restarts=0, max_task_retries=0)(Member)
        self._actors: list[Any] = [
            actor.options(
                num_cpus=share["CPU"],
                num_gpus=share.get("GPU", 0),
                memory=0 if self._slice else memory,  # Ray's bundles for a slice have none
                resources={"TPU": share["TPU"]} if "TPU" in share else {},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=place),
            ).remote()
            for place in range(count)
        ]
        self._asked: dict[ray.ObjectRef[Any], int] = {}

    def ask(self, member: int, function: str, *arguments: object) -> None:
        """See `gang.Group`."""
        self._asked[self._actors[member].call.remote(function, *arguments)] = member

    def answers(self, timeout: float) -> list[tuple[int, object]]:
        """See `gang.Group`."""
        done, _ = ray.wait(list(self._asked), num_returns=1, timeout=timeout)
        found = []
        for ref in done:
            member = self._asked.pop(ref)
            try:
                found.append((member, ray.get(ref)))
            except RayError as error:
                raise Lost(f"process {member} died: {first_line(error)}", member) from error
        return found

    def stop(self) -> None:
        """See `gang.Group`."""
        with suppress(RayError):  # Ray itself may be what died
            for actor in reversed(self._actors):
                ray.kill(actor, no_restart=True)
            if self._slice is not None:
                self._slice.shutdown()
            else:
                remove_placement_group(self._placement)


def platform_of_cluster() -> Platform:
    """The accelerators that the connected Ray has; "cpu" where it has none."""
    resources = ray.cluster_resources()
    return "tpu" if resources.get("TPU") else "gpu" if resources.get("GPU") else "cpu"


def bundle(count: int, platform: Platform, nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What one of `count` actors asks for: a CPU, and all accelerators of a node, or its share of them where there are fewer nodes.

    >>> bundle(2, "gpu", [{"Resources": {"CPU": 8.0, "GPU": 8.0}}])
    {'CPU': 1, 'GPU': 4.0}
    """
    if platform == "cpu":
        return {"CPU": 1}
    name = RESOURCE[platform]
    having = [node["Resources"][name] for node in nodes if node["Resources"].get(name)]
    if not having:
        raise RunError("the cluster has no such devices", [Problem(f"no node has {name}", 'set mesh.platform = "cpu"')])
    return {"CPU": 1, name: min(having) if count <= len(having) else sum(having) // count}


def _placed(count: int, share: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> tuple[Any, PlacementGroup]:
    """Room for all actors at once: the hosts of one TPU slice, with Ray's handle of it, or as many nodes as there are."""
    tpu = next((node["Labels"] for node in nodes if node["Labels"].get(TOPOLOGY)), None) if "TPU" in share else None
    if tpu is not None:
        from ray.util.tpu import SlicePlacementGroup

        version = tpu[VERSION].rpartition("-")[0]
        try:
            hosts = SlicePlacementGroup(topology=tpu[TOPOLOGY], accelerator_version=version, head_reservation_timeout_s=PLACED)
        except (RayError, RuntimeError, TimeoutError, ValueError) as error:
            fact = f"no slice of topology {tpu[TOPOLOGY]} ({tpu[VERSION]}) could be had: {first_line(error)}"
            raise RunError("the processes did not come together", [Problem(fact, "see `ray status` for who has it")]) from error
        if hosts.num_hosts != count:
            hosts.shutdown()
            fact = f"a slice of topology {tpu[TOPOLOGY]} ({tpu[VERSION]}) has {hosts.num_hosts} hosts, mesh.processes is {count}"
            raise ConfigError("the processes are not the hosts of a slice", [Problem(fact, f"set mesh.processes = {hosts.num_hosts}")])
        try:
            return hosts, _ready(cast(PlacementGroup, hosts.slice_placement_group), share, count)
        except RunError:
            hosts.shutdown()
            raise
    able = [node for node in nodes if all(node["Resources"].get(name, 0) >= amount for name, amount in share.items())]
    strategy = "STRICT_SPREAD" if count <= len(able) else "PACK"
    return None, _ready(placement_group([dict(share)] * count, strategy=strategy), share, count)


def _ready(group: PlacementGroup, share: Mapping[str, float], count: int) -> PlacementGroup:
    try:
        ray.get(group.ready(), timeout=PLACED)
    except GetTimeoutError:
        remove_placement_group(group)
        each = " and ".join(f"{amount:g} {name}" for name, amount in share.items())
        fact = f"{count} actors of {each} each have not found room for {PLACED:.0f} s"
        remedy = "`ray status` shows what the cluster has; set mesh.processes to what fits"
        raise RunError("the processes did not come together", [Problem(fact, remedy)]) from None
    return group
