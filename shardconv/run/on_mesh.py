"""The mesh executor with its processes: children of this one, or actors of a Ray that is started here or joined."""

from collections.abc import Generator, Sequence

from shardconv.ledger import Ledger
from shardconv.run import Event, Patience
from shardconv.run.gang import MeshRequest, execute
from shardconv.run.local_group import LocalGroup, local_platform

OWN = 512 << 20  # bytes of a process before it has a buffer: 215 MB measured with JAX, 300 MB with programs that it has compiled


def on_children(
    state: str, units: Sequence[int], *, processes: int, request: MeshRequest, patience: Patience, verbose: bool
) -> Generator[Event, None, None]:
    """Do `units` by children; see `gang.execute`."""
    platform = local_platform() if request.platform == "auto" else request.platform
    return execute(
        state,
        units,
        start=lambda: LocalGroup(state, processes, verbose),
        request=request,
        platform=platform,
        patience=patience,
    )


def on_ray(
    state: str,
    units: Sequence[int],
    *,
    processes: int,
    address: str | None,
    source: str,
    budget: int,
    request: MeshRequest,
    patience: Patience,
    verbose: bool,
) -> Generator[Event, None, None]:
    """Do `units` by actors; `address` None starts Ray on this machine. See `gang.execute`; `nodes` says what a cluster must see."""
    from shardconv.run import ray
    from shardconv.run.nodes import nodes, probe
    from shardconv.run.ray_group import RayGroup, platform_of_cluster

    with ray.connected(address, processes, verbose):
        memory = 0
        if address is not None:
            probe(nodes(), Ledger(state), source, ray.CANNOT)
            memory = budget + OWN
        own = local_platform if address is None else platform_of_cluster
        platform = own() if request.platform == "auto" else request.platform
        where = "this machine" if address is None else address
        yield from execute(
            state,
            units,
            start=lambda: RayGroup(processes, platform, where, memory),
            request=request,
            platform=platform,
            patience=patience,
            )
