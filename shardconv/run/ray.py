"""The Ray executor: the same units as stateless tasks, on a Ray started on the spot or on a cluster.

Ray carries control only. A task is given three short strings and returns a few hundred bytes, so Ray's object store stays empty and is kept
at its minimum. Twice as many tasks as slots are in flight: a worker that is done finds its next unit queued beside it.

Retries are ours, not Ray's (`max_retries=0`): both executors then count, report and give up alike, and Ray's own habit of retrying a task
without end when its node runs out of memory cannot turn into a silent hang.

On this machine `address="local"` keeps `ray.init` from joining whatever cluster it finds. The environment of the workers is set on ours
while Ray starts: a runtime environment would cost 0.6 s more, since Ray's first workers start without it. Ray's processes die with the
*thread* that started them, so the caller's own thread must start them.

On a cluster a task asks for memory as well as for a CPU, and every node is looked at first (`nodes`). Nodes may come and go meanwhile: how
many tasks are in flight follows what is there, and the units of a node that is lost are done by others.
"""

import logging
import os
import pickle
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from types import FrameType
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shardconv.errors import Problem, RunError
from shardconv.ledger import Ledger
from shardconv.run import AGAIN, Event, Failed, Failures, Finished, Note, Patience, Ready, Retried, Waiting, attempt, python_path
from shardconv.run.heartbeat import Pulse, bury, read_workers
from shardconv.run.nodes import OWN, Node, first_line, nodes, probe, require_room

OBJECT_STORE = 80 * 2**20  # bytes: Ray refuses less than 75 MiB; its default, 30% of the memory, would be taken from the workers
TASK_BYTES = 16 * 2**10  # a task's arguments are two paths and names; anything larger means that data went astray
WAKE = 1.0  # seconds between two looks at the clock while all workers are busy
# Of these Ray has one each on the machine that started it. Without the first no unit gets a worker and each fails in turn; without the
# second Ray waits a minute and ends our process.
SERVERS = ("raylet", "gcs_server")
CANNOT = "the cluster cannot do this conversion"
KNOCK = 10.0  # seconds for a host to accept a connection
# Nothing goes to Ray's makers; no warning about a change to come in how Ray hides accelerators. Workers never import jax, and a library
# that does must not take the accelerators.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "JAX_PLATFORMS": "cpu"}


def execute(
    state: str,
    units: Sequence[int],
    *,
    work: str,
    count: int | None,
    address: str | None,
    source: str,
    budget: int,
    patience: Patience,
    name: Callable[[int], str],
    verbose: bool,
) -> Generator[Event, None, None]:
    """Do `units` of the plan in `state` as Ray tasks; `address` None starts Ray on this machine with `count` slots.

    On a cluster `count` limits the tasks at a time (None: as many as the nodes have CPUs, and memory for workers of `budget` bytes of
    buffers). Raises what `local.execute` raises, and RunError for a cluster that cannot be joined or whose nodes cannot do the work.
    """
    started, room = not ray.is_initialized(), 0
    with connected(address, count, verbose):
        if address is not None:
            room, members = budget + OWN, nodes()
            yield from map(Note, require_room(members, room, CANNOT))
            probe(members, Ledger(state), source, CANNOT)
        tasks = _Tasks(state, units, work, _Slots(count, room), patience, Failures(name), _servers() if address is None else {})
        try:
            yield from tasks.run("this machine" if address is None else address)
        finally:
            if not started:  # our own Ray, or our own job on a cluster, ends with all its tasks
                tasks.cancel()


@contextmanager
def connected(address: str | None, count: int | None, verbose: bool) -> Iterator[None]:
    """Ray for a while: the one that this process has, or one that is started, or joined, here and left at the end."""
    if ray.is_initialized():
        yield
        return
    # Of a cluster's node that it lost, Ray tells at length on stdout. On this machine nothing is lost, and stdout is the caller's.
    with nullcontext() if verbose or address is None else redirect_stdout(StringIO()):
        try:
            with _signals_deferred():
                _start(count or 1, verbose) if address is None else _join(address, verbose)
            yield
        finally:
            ray.shutdown()


def _servers() -> dict[str, psutil.Process]:
    """The processes, by name, that a Ray started here cannot do without; none where we joined one."""
    return {name: process for process in psutil.Process().children() if (name := process.name()) in SERVERS}


def _start(count: int, verbose: bool) -> None:
    with _environment({**QUIET, "PYTHONPATH": python_path()}):
        try:
            ray.init(
                address="local",
                num_cpus=count,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                log_to_driver=verbose,
                logging_level=logging.WARNING if verbose else logging.ERROR,
            )
        except Exception as error:  # what Ray raises where one of its servers dies as it starts has no class of its own
            remedy = f"{AGAIN}; finished units are kept; --executor local does the same without Ray"
            raise RunError("Ray cannot be started on this machine", [Problem(first_line(error), remedy)]) from error


def _join(address: str, verbose: bool) -> None:
    if address.startswith("ray://"):
        remedy = "run shardconv on a node of the cluster, with --address auto, or as a Ray job"
        raise RunError("cannot join the Ray cluster", [Problem(f"{address} is a Ray client address", remedy)])
    variables = {**QUIET, "PYTHONPATH": python_path()}
    try:
        _knock(address)
        ray.init(
            address=address,
            runtime_env={"env_vars": variables},
            log_to_driver=verbose,
            logging_level=logging.WARNING if verbose else logging.ERROR,
        )
    except (OSError, RayError, RuntimeError, ValueError) as error:
        remedy = "`ray status` on this host tells whether the cluster answers; RAY_AUTH_MODE must be the same on all nodes and here"
        raise RunError("cannot join the Ray cluster", [Problem(f"{address}: {error}", remedy)]) from error


def _knock(address: str) -> None:
    """Raise OSError where nobody listens: Ray would try for minutes, deaf to Ctrl-C."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=KNOCK).close()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Ray's daemons inherit our environment as it is while they start."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """SIGINT and SIGTERM wait: an exception inside `ray.init` leaves threads that crash the process at its end. Ray's own handler goes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    before = {number: signal.signal(number, lambda n, frame: caught.append((n, frame))) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late, frame in caught:
        if callable(handler := before[signal.Signals(late)]):
            handler(late, frame)


class TaskDied(Exception):
    """The process of a task is gone; the message says how."""


@dataclass(frozen=True)
class _Slots:
    """Tasks at a time: `count` at most, if it is a number; each is promised `memory` bytes, 0 on a Ray of our own."""

    count: int | None
    memory: int

    def of(self, members: Sequence[Node]) -> int:
        """How many tasks these nodes do at a time."""
        held = sum(node.tasks(self.memory) for node in members)
        return max(1, held if self.count is None else min(held, self.count))

    def window(self, members: Sequence[Node]) -> int:
        """How many tasks are in flight at a time."""
        # Ray itself keeps more than it has room for from running at a time, unless the user asks for fewer.
        many = self.of(members)
        return 2 * many if many >= sum(node.tasks(self.memory) for node in members) else many

    def task(self, function: Callable[..., Any]) -> Any:
        """A function of a module as a task. Retries are ours."""
        return ray.remote(num_cpus=1, memory=self.memory, max_retries=0)(function)


def slots(count: int | None, memory: int) -> int:
    """How many tasks of one CPU and so much memory the connected Ray does at a time, if `count` allows as many."""
    return _Slots(count, memory).of(nodes())


def results(function: Callable[..., Any], arguments: Sequence[tuple[object, ...]], count: int | None, memory: int) -> Iterator[Any]:
    """What a function of a module makes of each tuple of arguments, as tasks of the connected Ray and as they come; raises TaskDied."""
    room = _Slots(count, memory)
    yield from _results(room.task(function), arguments, room.window(nodes()))


def result_beside(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function of a module makes of its arguments in a task on this host that takes no CPU from others, since it waits for them."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    task = ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=here)
    (found,) = _results(task, [arguments], 1)
    return found


def _results(task: Any, arguments: Sequence[tuple[object, ...]], window: int) -> Iterator[Any]:
    queue = deque(arguments)
    flying: set[ray.ObjectRef[Any]] = set()
    try:
        while queue or flying:
            while queue and len(flying) < window:
                flying.add(task.remote(*queue.popleft()))
            done, _ = ray.wait(list(flying), num_returns=1, timeout=WAKE)
            for ref in done:
                flying.remove(ref)
                try:
                    found = ray.get(ref)
                except RayError as error:
                    raise TaskDied(first_line(error)) from error
                yield found
    finally:
        for ref in flying:
            ray.cancel(ref, force=True)


class _Tasks:
    def __init__(
        self,
        state: str,
        units: Sequence[int],
        work: str,
        room: _Slots,
        patience: Patience,
        failures: Failures,
        servers: Mapping[str, psutil.Process],
    ) -> None:
        self._state, self._work, self._room, self._servers = state, work, room, servers
        self._workers = Ledger(state).workers
        self._queue = deque(units)
        self._failures = failures
        self._pulse = Pulse(self._workers, patience)
        self._flying: dict[ray.ObjectRef[Finished | Failed], tuple[int, float]] = {}
        self._task = room.task(attempt)
        self._members, self._looked = nodes(), time.monotonic()

    def run(self, where: str) -> Iterator[Event]:
        yield Ready(min(self._room.of(self._members), len(self._queue)), f"Ray on {where}")
        while self._queue or self._flying:
            self._require_servers()
            yield from self._look_at_nodes()
            self._hand_out()
            done, _ = ray.wait(list(self._flying), num_returns=1, timeout=WAKE)
            self._require_servers()
            for ref in done:
                yield self._collect(ref)
            yield from self._look_for_the_silent()

    def cancel(self) -> None:
        """Take back what is in flight."""
        for ref in self._flying:
            ray.cancel(ref, force=True)

    def _require_servers(self) -> None:
        for name, server in self._servers.items():
            if not server.is_running() or server.status() == psutil.STATUS_ZOMBIE:
                fact = f"its process {name} (pid {server.pid}) is gone"
                raise RunError("Ray on this machine died", [Problem(fact, f"{AGAIN}; finished units are kept")])

    def _look_at_nodes(self) -> Iterator[Retried]:
        """A cluster grows and shrinks. To ask a Ray of our own again would block where its server has just died."""
        if self._servers or time.monotonic() - self._looked < WAKE:
            return
        before, self._members, self._looked = self._members, nodes(), time.monotonic()
        if not set(before) <= set(self._members):
            yield from self._take_from_the_lost()

    def _take_from_the_lost(self) -> Iterator[Retried]:
        """What nodes that are gone were doing, and all that nobody has begun, is handed out again.

        A host that vanishes without a word, because its power or its link is cut, leaves Ray waiting for three minutes: for the tasks that
        ran there, and for all that it had queued there. Ray asks for workers per function, so another one does not wait with them.
        """
        self._task = self._room.task(attempt)
        hosts = {node.host for node in self._members}
        owners = {worker.unit: worker for worker in read_workers(self._workers)}
        for ref, (unit, _) in list(self._flying.items()):
            owner = owners.get(unit)
            if owner is not None and owner.host in hosts:
                continue
            del self._flying[ref]
            ray.cancel(ref, force=True)
            if owner is None:
                self._queue.appendleft(unit)
            else:
                bury(self._workers, unit)
                yield self._fail(Failed(unit, f"its node is lost ({owner.name})", ""))

    def _hand_out(self) -> None:
        window = self._room.window(self._members)
        while self._queue and len(self._flying) < window:
            unit = self._queue.popleft()
            arguments = (self._work, self._state, unit)
            assert len(pickle.dumps(arguments)) < TASK_BYTES, "tensors never enter Ray"
            self._flying[self._task.remote(*arguments)] = (unit, time.monotonic())

    def _collect(self, ref: "ray.ObjectRef[Finished | Failed]") -> Event:
        unit, _ = self._flying.pop(ref)
        try:
            outcome: Finished | Failed = ray.get(ref)
        except RayError as error:
            owner = bury(self._workers, unit)
            who = "its worker" if owner is None else f"its worker ({owner.name})"
            outcome = Failed(unit, f"{who} died: {first_line(error)}", str(error))
        return self._fail(outcome) if isinstance(outcome, Failed) else outcome

    def _look_for_the_silent(self) -> Iterator[Event]:
        waiting, lost = self._pulse.check(dict(self._flying.values()))
        yield from waiting
        for silence in lost:
            yield self._give_up(silence)

    def _give_up(self, silence: Waiting) -> Retried:
        ref = next(ref for ref, (unit, _) in self._flying.items() if unit == silence.unit)
        del self._flying[ref]
        ray.cancel(ref, force=True)
        owner = bury(self._workers, silence.unit)
        if owner is not None and owner.host == socket.gethostname():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(owner.pid, signal.SIGKILL)  # one that is stopped does not hear that its task is cancelled, and keeps its slot
        return self._fail(Failed(silence.unit, f"no sign of life for {silence.seconds:.0f} s ({silence.where})", ""))

    def _fail(self, failed: Failed) -> Retried:
        event = self._failures.add(failed)
        self._queue.append(failed.unit)
        return event
