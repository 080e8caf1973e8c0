"""The Ray executor: the same units as stateless tasks, on a Ray started on the spot or on a cluster. The only module that imports ray.

Ray carries control only. A task is given three short strings and returns a few hundred bytes, so Ray's object store stays empty and is kept
at its minimum. Twice as many tasks as slots are in flight: a worker that is done finds its next unit queued beside it.

Retries are ours, not Ray's (`max_retries=0`): both executors then count, report and give up alike, and Ray's own habit of retrying a task
without end when its node runs out of memory cannot turn into a silent hang.

On this machine `address="local"` keeps `ray.init` from joining whatever cluster it finds. The environment of the workers is set on ours
while Ray starts: a runtime environment would cost 0.6 s more, since Ray's first workers start without it. Ray's processes die with the
*thread* that started them, so the caller's own thread must start them. On a cluster every node first proves that it sees the state
directory and the source, and runs the same shardconv.
"""

import logging
import os
import pickle
import secrets
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import shardconv
from shardconv.errors import Problem, RunError
from shardconv.ledger import Ledger, write_atomically
from shardconv.run import AGAIN, Event, Failed, Failures, Finished, Patience, Ready, Retried, Waiting, attempt, python_path
from shardconv.run.heartbeat import Pulse, bury

OBJECT_STORE = 80 * 2**20  # bytes: Ray refuses less than 75 MiB; its default, 30% of the memory, would be taken from the workers
TASK_BYTES = 16 * 2**10  # a task's arguments are two paths and names; anything larger means that data went astray
WAKE = 1.0  # seconds between two looks at the clock while all workers are busy
# Of these Ray has one each on the machine that started it. Without the first no unit gets a worker and each fails in turn; without the
# second Ray waits a minute and ends our process.
SERVERS = ("raylet", "gcs_server")
KNOCK = 10.0  # seconds for a host to accept a connection
PROBE = 60.0  # seconds for a node to answer a probe: a worker's start takes 2, a cold network disk 20
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
    patience: Patience,
    name: Callable[[int], str],
    verbose: bool,
) -> Generator[Event, None, None]:
    """Do `units` of the plan in `state` as Ray tasks; `address` None starts Ray on this machine with `count` slots.

    On a cluster `count` limits the tasks at a time (None: all CPUs). Raises what `local.execute` raises, and RunError for a cluster that
    cannot be joined or whose nodes cannot do the work.
    """
    started = not ray.is_initialized()
    with connected(address, count, verbose):
        if address is not None:
            _probe(Ledger(state), source)
        tasks = _Tasks(state, units, work, count, patience, Failures(name), _servers() if address is None else {})
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
        ray.init(
            address="local",
            num_cpus=count,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE,
            log_to_driver=verbose,
            logging_level=logging.WARNING if verbose else logging.ERROR,
        )


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


def slots(count: int | None) -> int:
    """How many tasks of one CPU the connected Ray does at a time, if `count` allows as many."""
    cpus = int(ray.cluster_resources().get("CPU", 0))
    return max(1, cpus if count is None else min(cpus, count))


def results(function: Callable[..., Any], arguments: Sequence[tuple[object, ...]], count: int | None) -> Iterator[Any]:
    """What a function of a module makes of each tuple of arguments, as tasks of the connected Ray and as they come; raises TaskDied."""
    yield from _results(ray.remote(num_cpus=1, max_retries=0)(function), arguments, _window(count))


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
                    raise TaskDied(_first_line(error)) from error
                yield found
    finally:
        for ref in flying:
            ray.cancel(ref, force=True)


def _window(count: int | None) -> int:
    """How many tasks are in flight at a time."""
    # Ray itself keeps more than `slots` from running at a time, unless the user asks for fewer than the cluster has.
    many = slots(count)
    return 2 * many if many >= int(ray.cluster_resources().get("CPU", 0)) else many


class _Tasks:
    def __init__(
        self,
        state: str,
        units: Sequence[int],
        work: str,
        count: int | None,
        patience: Patience,
        failures: Failures,
        servers: Mapping[str, psutil.Process],
    ) -> None:
        self._state, self._work, self._count, self._servers = state, work, count, servers
        self._workers = Ledger(state).workers
        self._queue = deque(units)
        self._failures = failures
        self._pulse = Pulse(self._workers, patience)
        self._flying: dict[ray.ObjectRef[Finished | Failed], tuple[int, float]] = {}
        self._task = ray.remote(num_cpus=1, max_retries=0)(attempt)
        self._window = _window(count)

    def run(self, where: str) -> Iterator[Event]:
        yield Ready(min(slots(self._count), len(self._queue)), f"Ray on {where}")
        while self._queue or self._flying:
            self._require_servers()
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

    def _hand_out(self) -> None:
        if not self._servers:  # a cluster grows and shrinks; to ask a Ray of our own again would block where its server has just died
            self._window = _window(self._count)
        while self._queue and len(self._flying) < self._window:
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
            outcome = Failed(unit, f"{who} died: {_first_line(error)}", str(error))
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


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ----------------------------------------------------------------------------------------------------------------- probe


def _probe(ledger: Ledger, source: str) -> None:
    """Every node of a cluster reads a word from the state directory and looks at the source; raises RunError naming those that cannot."""
    word = secrets.token_hex(8)
    path = os.path.join(ledger.state, "probe")
    write_atomically(path, word, durable=True)
    try:
        problems = _ask_nodes(path, word, source)
    finally:
        os.unlink(path)
    if problems:
        raise RunError("the cluster cannot do this conversion", problems)


def require_seen(path: str, source: str) -> None:
    """Every node of a cluster reads the same file and looks at the source; raises RunError naming those that cannot."""
    with open(path, encoding="utf-8") as file:
        problems = _ask_nodes(path, file.read(), source)
    if problems:
        raise RunError("the cluster cannot do this check", problems)


def _ask_nodes(path: str, word: str, source: str) -> list[Problem]:
    nodes = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path, source) for node in nodes
    }
    deadline = time.monotonic() + PROBE
    return [p for node, ref in asked.items() for p in _judge(nodes[node], ref, deadline, path, word, source)]


def look(path: str, source: str) -> tuple[str, bool, str]:
    """On a node: the word in the file at `path` ("" when there is none), whether the source is there, and our version."""
    word = ""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            word = file.read()
    return word, os.path.exists(source), shardconv.__version__


def _judge(node: str, ref: "ray.ObjectRef[tuple[str, bool, str]]", deadline: float, path: str, word: str, source: str) -> list[Problem]:
    try:
        seen, there, version = ray.get(ref, timeout=max(1.0, deadline - time.monotonic()))
    except GetTimeoutError:
        return [Problem(f"node {node} did not answer within {PROBE:.0f} s", "`ray status` shows the nodes; stop the one that hangs")]
    except RayError as error:
        return [Problem(f"node {node}: {_first_line(error)}", "install the same shardconv on every node")]
    problems = []
    if seen != word:
        fact = f"node {node} does not see {os.path.dirname(path)}"
        problems.append(Problem(fact, "put the output on a file system that all nodes share, under the same path"))
    if not there:
        problems.append(Problem(f"node {node} does not see the source {source}", "mount it on all nodes under the same path"))
    if version != shardconv.__version__:
        fact = f"node {node} has shardconv {version}, this host has {shardconv.__version__}"
        problems.append(Problem(fact, "install the same version everywhere"))
    return problems
