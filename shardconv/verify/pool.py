"""Workers of the check: whoever answers its questions, on the executor that the config chose.

    local    child processes, one question after another; with one worker there is none, and we answer ourselves
    ray      tasks of the Ray that this process is connected to, or that is started for the while

A question is a function's name and its argument, both picklable; an answer is a value or an error of ours, with what it took. The answers
come in any order. A worker that dies ends the check, which writes nothing and can be done again.
"""

import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, cast

from shardconv.errors import Problem, RunError, ShardconvError
from shardconv.run import named
from shardconv.run.child import Child, ChildDied
from shardconv.run.heartbeat import memory

ANSWER = "shardconv.verify.pool:answer"
# No library of a worker may take the accelerators, or more than its own core; and glibc shall not keep a heap for every thread of
# TensorStore, each as large as its largest read.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
CANNOT = "the cluster cannot do this check"
AGAIN = "`shardconv verify` checks again; --set workers.memory_budget=SIZE gives it less memory"


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to question `number`: a value or an error, whose (host, pid), its CPU seconds, and that process's peak memory in bytes."""

    number: int
    value: object
    process: tuple[str, int]
    cpu_seconds: float
    peak_rss: int


def answer(function: str, number: int, argument: object) -> Answer:
    """What a function ("module:name") makes of its argument; what goes wrong comes back as a value."""
    _give_back_buffers()
    cpu, value = time.process_time(), _value(function, argument)
    return Answer(number, value, (socket.gethostname(), os.getpid()), time.process_time() - cpu, memory()[1])


def _value(function: str, argument: object) -> object:
    try:
        return named(function)(argument)
    except ShardconvError as error:
        return error
    except Exception as error:  # noqa: BLE001  the border of the process: the one who asked reports it
        fact = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        return RunError("the check failed", [Problem(fact, AGAIN)])


def _give_back_buffers() -> None:
    """A Ray worker that has done units still has their buffers, and the budget is for one kind of work at a time."""
    if unit := sys.modules.get("shardconv.run.unit"):
        unit.forget()


Asked = Callable[[str, Sequence[object]], Iterator[Answer]]


@dataclass
class Workers:
    """Those of one check: how many, on which executor, and what their answers took."""

    executor: str
    count: int
    ask: Asked
    cpu_seconds: float = 0.0
    peak_rss: int = 0

    def answers(self, function: str, arguments: Sequence[object]) -> Iterator[tuple[int, Any]]:
        """Each argument's number and what the function makes of it, as they come; raises the first error, RunError for a dead worker."""
        for one in self.ask(function, arguments):
            if isinstance(one.value, ShardconvError):
                raise one.value
            if one.process != (socket.gethostname(), os.getpid()):
                self.cpu_seconds += one.cpu_seconds
                self.peak_rss = max(self.peak_rss, one.peak_rss)
            yield one.number, one.value


@contextmanager
def at_work(executor: str, count: int, address: str | None, budget: int, path: str, source: str) -> Iterator[Workers]:
    """Workers until the end of the block: `count` of them, 0 for all that a cluster at `address` has.

    On a cluster every node must see the file `path` and the source, and is given as many workers of `budget` bytes of buffers as it holds.
    Raises RunError for a cluster that cannot be joined, or cannot do it.
    """
    if executor == "local":
        with _Children(count) as children:
            yield Workers(executor, count, children.ask)
        return
    from shardconv.run import nodes, ray

    room = 0
    with ray.connected(address, count or None, verbose=False):
        if address is not None:
            room, members = budget + nodes.OWN, nodes.nodes()
            nodes.require_room(members, room, CANNOT)
            nodes.require_seen(members, path, source, CANNOT)
        many = ray.slots(count or None, room)
        yield Workers(executor, many, lambda function, arguments: _from_tasks(function, arguments, many, room))


def answers(function: str, arguments: Sequence[object], workers: int) -> Iterator[tuple[int, Any]]:
    """What `Workers.answers` gives, of as many processes on this machine."""
    with _Children(workers) as children:
        yield from Workers("local", workers, children.ask).answers(function, arguments)


def answer_of_child(function: str, argument: object, environment: Mapping[str, str]) -> Any:
    """What a function makes of its argument in a process of its own, which ends with it; `environment` is added to ours."""
    with _Children(2, environment) as children:
        ((_, value),) = Workers("local", 1, children.from_children).answers(function, [argument])
    return value


def answer_of_task(function: str, argument: object, address: str | None, count: int) -> Any:
    """What a function makes of its argument in a Ray task, whose own questions go to the same Ray; for who must not load what it loads."""
    from shardconv.run import ray

    with ray.connected(address, count or None, verbose=False):
        try:
            value = ray.result_beside(answer, function, 0, argument).value
        except ray.TaskDied as death:
            raise _failed(f"its worker died: {death}") from None
    if isinstance(value, ShardconvError):
        raise value
    return value


def _failed(fact: str) -> RunError:
    return RunError("the check failed", [Problem(fact, AGAIN)])


def _from_tasks(function: str, arguments: Sequence[object], count: int, memory: int) -> Iterator[Answer]:
    from shardconv.run import ray

    questions = [(function, number, argument) for number, argument in enumerate(arguments)]
    try:
        yield from ray.results(answer, questions, count, memory)
    except ray.TaskDied as death:
        raise _failed(f"its worker died: {death}") from None


class _Children:
    """Child processes, begun with the first questions and kept for the next."""

    def __init__(self, count: int, environment: Mapping[str, str] = ENVIRONMENT) -> None:
        self._count, self._environment = count, environment
        self._idle: list[Child] = []
        self._all: list[Child] = []
        self._ends = ExitStack()

    def __enter__(self) -> "_Children":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._all:
            child.stop()
        self._ends.close()

    def ask(self, function: str, arguments: Sequence[object]) -> Iterator[Answer]:
        """The answers of children, or our own where there is but one worker or question."""
        if self._count == 1 or len(arguments) < 2:
            return (answer(function, number, argument) for number, argument in enumerate(arguments))
        return self.from_children(function, arguments)

    def from_children(self, function: str, arguments: Sequence[object]) -> Iterator[Answer]:
        """The answers of children."""
        queue = list(reversed(list(enumerate(arguments))))
        self._begin(min(self._count, len(queue)))
        busy: dict[object, Child] = {}
        while queue or busy:
            while queue and self._idle:
                child = self._idle.pop()
                child.send(function, *queue.pop())
                busy[child.connection] = child
            for ready in wait([child.connection for child in busy.values()]):
                child = busy.pop(ready)
                try:
                    found = cast(Answer, child.receive())
                except ChildDied as death:
                    raise _failed(str(death)) from None
                self._idle.append(child)
                yield found

    def _begin(self, count: int) -> None:
        if len(self._all) >= count:
            return
        logs = tempfile.mkdtemp()  # what a child says before it dies is quoted
        self._ends.callback(shutil.rmtree, logs, ignore_errors=True)
        more = [Child(ANSWER, f"{logs}/{number}", self._environment, nice=0) for number in range(len(self._all), count)]
        self._all += more
        self._idle += more
