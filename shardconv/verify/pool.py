"""Workers of the check: child processes that answer one question after another; with one worker there is none, and we answer ourselves.

A question is a function's name and its argument, both picklable; an answer is a value or an error of ours. The answers come in any order.
"""

import shutil
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any, cast

from shardconv.errors import Problem, RunError, ShardconvError
from shardconv.run import named
from shardconv.run.child import Child, ChildDied

ANSWER = "shardconv.verify.pool:answer"
# No library of a worker may take the accelerators, or more than its own core; and glibc shall not keep a heap for every thread of
# TensorStore, each as large as its largest read.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
AGAIN = "`shardconv verify` checks again; --set workers.memory_budget=SIZE gives it less memory"


def answer(function: str, number: int, argument: object) -> tuple[int, object]:
    """What a function ("module:name") makes of its argument; what goes wrong comes back as a value."""
    try:
        return number, named(function)(argument)
    except ShardconvError as error:
        return number, error
    except Exception as error:  # noqa: BLE001  the border of the process: the one who asked reports it
        fact = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        return number, RunError("the check failed", [Problem(fact, AGAIN)])


def answers(function: str, arguments: Sequence[object], workers: int) -> Iterator[tuple[int, Any]]:
    """Each argument's number and what the function makes of it, as they come; raises the first error, RunError for a dead worker."""
    if workers == 1 or len(arguments) < 2:
        found: Iterator[tuple[int, object]] = (answer(function, number, argument) for number, argument in enumerate(arguments))
    else:
        found = _from_children(function, arguments, min(workers, len(arguments)), ENVIRONMENT)
    for number, value in found:
        if isinstance(value, ShardconvError):
            raise value
        yield number, value


def answer_of_child(function: str, argument: object, environment: Mapping[str, str]) -> Any:
    """What a function makes of its argument in a process of its own, which ends with it; `environment` is added to ours."""
    ((_, value),) = _from_children(function, [argument], 1, environment)
    if isinstance(value, ShardconvError):
        raise value
    return value


def _from_children(
    function: str, arguments: Sequence[object], workers: int, environment: Mapping[str, str]
) -> Iterator[tuple[int, object]]:
    logs = tempfile.mkdtemp()  # what a child says before it dies is quoted
    children = [Child(ANSWER, f"{logs}/{number}", environment, nice=0) for number in range(workers)]
    try:
        queue = list(reversed(list(enumerate(arguments))))
        busy = {}
        for child in children:
            child.send(function, *queue.pop())
            busy[child.connection] = child
        while busy:
            for ready in wait(list(busy)):
                child = busy.pop(ready)  # type: ignore[call-overload]
                try:
                    yield cast(tuple[int, object], child.receive())
                except ChildDied as death:
                    raise RunError("the check failed", [Problem(str(death), AGAIN)]) from None
                if queue:
                    child.send(function, *queue.pop())
                    busy[child.connection] = child
    finally:
        for child in children:
            child.stop()
        shutil.rmtree(logs, ignore_errors=True)
