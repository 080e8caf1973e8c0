"""The mesh executor: a group of processes that share a mesh does the plan's windows, one after another, all of them together.

It yields the events of any executor. A *group* is processes that answer calls of `member.call`, started as children of this process
(`local_group`) or as Ray actors (`ray_group`); who they are is all the same here. They meet once (`meet`), and what they are is compared
with what the plan wants before anything is read.

When one of them dies, fails or falls silent, all are stopped, a new group is started, and it goes on from the units that are not in the
ledger, at most `max_restarts` times. Every wait has an end, and says who did not come.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from shardconv.errors import ConfigError, Problem, RunError
from shardconv.ledger import Ledger
from shardconv.plan import Plan
from shardconv.run import AGAIN, Event, Failed, Failures, Finished, Patience, Ready, Restarted
from shardconv.run.heartbeat import Pulse
from shardconv.run.job import load_plan
from shardconv.run.member import Hello, Joined

Platform = Literal["cpu", "gpu", "tpu"]

# What jax may call them.
PLATFORMS: Mapping[Platform, tuple[str, ...]] = {"cpu": ("cpu",), "gpu": ("gpu", "cuda", "rocm"), "tpu": ("tpu",)}

WAKE = 1.0  # seconds between two looks at the clock while all processes are busy
START = 120.0  # seconds for a process to say hello: Ray starts one in 2, a machine that has to fetch an image in 60
MEET = 120.0  # seconds for all to join: importing jax from a cold network disk takes 30, a TPU's start another 30
GRACE = 30.0  # seconds beyond that until the driver itself gives up: jax in the processes is a little late


class Lost(Exception):
    """A process of a group is gone; the message says how, `member` which."""

    def __init__(self, why: str, member: int | None = None) -> None:
        super().__init__(why)
        self.member = member


class Group(Protocol):
    """Some processes, numbered from 0, each of which answers one call at a time."""

    where: str

    def ask(self, member: int, function: str, *arguments: object) -> None:
        """Call one of `member`'s functions in a process."""

    def answers(self, timeout: float) -> list[tuple[int, object]]:
        """What has come, by process, after waiting for at most `timeout` seconds; raises Lost."""

    def stop(self) -> None:
        """End all of them now."""


@dataclass(frozen=True)
class MeshRequest:
    """How arrays come onto the mesh ("mesh", "mesh-host", "mesh-device"), on which devices, and how often to start again."""

    placement: str
    platform: Literal["auto"] | Platform
    max_restarts: int


def execute(
    state: str,
    units: Sequence[int],
    *,
    start: Callable[[], Group],
    request: MeshRequest,
    platform: Platform,
    patience: Patience,
) -> Generator[Event, None, None]:
    """Do `units` of the plan in `state`, by groups that `start` starts.

    Raises the report of a unit that has one, ConfigError for processes or devices that are not what the plan wants, and RunError where they
    do not come together or are lost too often; finished units stay finished.
    """
    return _Gang(state, units, start, request, platform, patience).run()


class _Gang:
    def __init__(
        self,
        state: str,
        units: Sequence[int],
        start: Callable[[], Group],
        request: MeshRequest,
        platform: Platform,
        patience: Patience,
    ) -> None:
        self._ledger, self._start, self._request, self._platform = Ledger(state), start, request, platform
        self._plan = load_plan(self._ledger)
        self._left = set(units)
        self._patience = patience
        self._restarts, self._told = 0, False

    def run(self) -> Generator[Event, None, None]:
        while True:
            try:
                yield from self._life()
                return
            except Lost as lost:
                yield from self._recorded()
                if self._left:
                    yield self._again(str(lost))

    def _life(self) -> Iterator[Event]:
        """Of one group."""
        group = self._start()
        try:
            order = meet(group, self._ledger.state, self._plan, self._platform)
            if not self._told:
                self._told = True
                yield Ready(len(order), group.where)
            for number, window in enumerate(self._plan.windows):
                pending = tuple(unit for _, unit in window.units if unit in self._left)
                if pending:
                    for member in order:
                        group.ask(member, "work", self._request.placement, number, pending)
                    yield from self._collect(group, pending)
        finally:
            group.stop()

    def _collect(self, group: Group, pending: Sequence[int]) -> Iterator[Event]:
        """What all of them have done of a window."""
        since, waiting = time.monotonic(), self._plan.processes
        pulse = Pulse(self._ledger.workers, self._patience)
        while waiting:
            for _, answer in group.answers(WAKE):
                waiting -= 1
                if isinstance(answer, Failed):
                    Failures(lambda _: "a process on the mesh").add(answer)  # raises what is no accident
                    raise Lost(answer.error)
                for done in cast(list[Finished], answer):
                    self._left.discard(done.unit)
                    yield done
            silent, lost = pulse.check({unit: since for unit in pending if unit in self._left})
            yield from silent
            for silence in lost:
                raise Lost(f"no sign of life for {silence.seconds:.0f} s ({silence.where})")

    def _recorded(self) -> Iterator[Finished]:
        """Units that were recorded by processes that did not live to say so."""
        for unit, record in self._ledger.finished().items():
            if unit in self._left:
                self._left.discard(unit)
                yield Finished(**{key: record[key] for key in Finished.__dataclass_fields__})  # type: ignore[arg-type]

    def _again(self, why: str) -> Restarted:
        self._restarts += 1
        if self._restarts > self._request.max_restarts:
            times = f"{self._restarts} times" if self._restarts > 1 else "once"
            problem = Problem(f"last: {why}", f"{AGAIN} to go on from the finished units; -v shows what the processes said")
            raise RunError(f"the processes on the mesh died {times}", [problem])
        return Restarted(self._restarts, self._request.max_restarts, why)


def meet(group: Group, state: str, plan: Plan, platform: Platform) -> Sequence[int]:
    """Bring a group together on the plan's mesh; its members in the order of their ranks.

    Raises RunError naming who did not come, ConfigError where the devices are not those of the mesh, Lost where one dies on the way.
    """
    count = plan.processes
    for member in range(count):
        group.ask(member, "hello")
    found = cast(Mapping[int, Hello], _all(group, count, START, lambda member: f"process {member} of {count} has not started"))
    order = sorted(range(count), key=lambda member: (found[member].rank is None, found[member].rank, member))
    _require_names(found, platform)
    group.ask(order[0], "coordinator", found[order[0]].address)
    meeting = _all(group, 1, START, lambda _: f"{found[order[0]].name} gives no address")[order[0]]
    environment = environment_of(platform, plan.mesh.devices // count)
    for rank, member in enumerate(order):
        group.ask(member, "join", state, meeting, count, rank, environment, int(MEET))
    missing = f"has not joined the others at {meeting}"
    joined = _all(group, count, MEET + GRACE, lambda member: f"process {member} of {count} ({found[member].name}) {missing}", jax=MEET)
    _require_devices(cast(Mapping[int, Joined], joined), found, plan, platform)
    return order


def _all(
    group: Group, count: int, timeout: float, missing: Callable[[int], str], jax: float = math.inf
) -> Mapping[int, object]:
    """The answers of `count` processes, by process; raises RunError with those that are missing at the end of the time.

    Processes that wait for another in vain for `jax` seconds say so, or are ended by jax. What is missing is the one that does neither.
    """
    begun, found = time.monotonic(), dict[int, object]()
    while len(found) < count and (waited := time.monotonic() - begun) < timeout:
        try:
            found.update(group.answers(min(WAKE, timeout)))
        except Lost as lost:
            if waited < jax or lost.member is None:
                raise
            found[lost.member] = Failed(-1, str(lost), "")
    absent = [member for member in range(count) if member not in found] if count > 1 or not found else []
    if absent:
        remedy = "`ray status` shows what the cluster has; the log of a process is beside the output, in workers/, or in Ray's"
        problems = [Problem(f"{missing(member)} for {timeout:.0f} s") for member in absent]
        raise RunError("the processes did not come together", [*problems[:-1], Problem(problems[-1].fact, remedy)])
    for failed in (answer for answer in found.values() if isinstance(answer, Failed)):
        if failed.report is not None:
            raise failed.report
        problem = Problem(failed.error, "-v shows what the processes said")
        raise RunError("the processes cannot work together", [problem])
    return found


def _require_names(found: Mapping[int, Hello], platform: Platform) -> None:
    """On several hosts a CPU's collectives find each other by host name, and one that means 127.0.0.1, or nothing, leads nowhere."""
    astray = sorted({hello.host for hello in found.values() if hello.loopback})
    if platform == "cpu" and len({hello.address for hello in found.values()}) > 1 and astray:
        fact = f"the name of {', '.join(astray)} does not lead to the host's own address there"
        raise RunError("the hosts cannot meet", [Problem(fact, "give it that address in /etc/hosts, in place of 127.0.0.1 or 127.0.1.1")])


def _require_devices(joined: Mapping[int, Joined], found: Mapping[int, Hello], plan: Plan, platform: Platform) -> None:
    count, devices = plan.processes, plan.mesh.devices
    kinds = PLATFORMS[platform]
    wrong = [member for member, one in sorted(joined.items()) if one.own * count != devices or one.platform not in kinds]
    if not wrong:
        return
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.axes.items())
    facts = [f"{found[member].name} has {joined[member].own} ({joined[member].platform})" for member in wrong]
    remedy = f"set mesh.axes to what there is, mesh.processes so that each has {devices} / processes devices, or mesh.platform"
    wanted = f"the mesh has {devices} {platform} devices ({axes}), {devices // count} for each of {count} processes"
    raise ConfigError("the devices are not those of the mesh", [Problem(wanted), *map(Problem, facts[:-1]), Problem(facts[-1], remedy)])


def environment_of(platform: Platform, devices: int) -> Mapping[str, str]:
    """What a process sets before it imports jax, to have `devices` devices of this kind.

    >>> environment_of("cpu", 4)["XLA_FLAGS"]
    '--xla_force_host_platform_device_count=4'
    """
    if platform == "cpu":
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return {"JAX_PLATFORMS": {"gpu": "", "tpu": "tpu,cpu"}[platform]}  # "" leaves it to jax whether a GPU is CUDA's or ROCm's
