"""The nodes of a Ray cluster: what each of them can hold, and whether it can do the work at all.

A node has CPUs and memory, as it told Ray when it joined. A task asks Ray for a CPU and for the memory of a worker, so Ray gives no node
more tasks at a time than it holds, however small it is beside the others; one that cannot hold a single task is named and gets none. Where
the config leaves a worker's memory open, the node with the least memory per CPU decides.

Before any work every node reads a word from the state directory, looks at the source, and says which shardconv it has. A node that joins
later is taken at its word: it gets units like any other.
"""

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import shardconv
from shardconv.budget import MIB, Machine, default_budget
from shardconv.errors import Problem, RunError
from shardconv.ledger import Ledger, write_atomically

PROBE = 60.0  # seconds for a node to answer a probe: a worker's start takes 2, a cold network disk 20
# What a worker is beside its buffers: the interpreter, Ray, NumPy, TensorStore, the plan; measured 110 MiB, in the check 132.
OWN = 192 * MIB
# With less than three copies of a chunk of 64 MiB and the rows that it is made of, chunks would be smaller than readers want them, and stay
# so. A node that has less than this per CPU does fewer tasks at a time than it has CPUs.
LEAST = 256 * MIB


@dataclass(frozen=True)
class Node:
    """A node that is alive and has CPUs: its address, its host's name, and bytes of memory for tasks."""

    id: str
    name: str
    host: str
    cpus: int
    memory: int

    def tasks(self, memory: int) -> int:
        """How many tasks of one CPU and so many bytes it does at a time."""
        return min(self.cpus, self.memory // memory) if memory else self.cpus


def nodes() -> tuple[Node, ...]:
    """The nodes of the connected Ray that can be given tasks."""
    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    return tuple(
        Node(
            node["NodeID"],
            node["NodeName"],
            node["NodeManagerHostname"],
            int(node["Resources"]["CPU"]),
            int(node["Resources"].get("memory", 0)),
        )
        for node in alive
    )


def shared_budget(members: Sequence[Node], processes: int | None = None) -> int:
    """Bytes of buffers for each worker of a cluster, where nobody chose: half of the memory of the node that has least per worker.

    Workers are one per CPU; or `processes`, spread over the nodes.

    >>> shared_budget([Node("a", "10.0.0.1", "one", 8, 64 * 2**30), Node("b", "10.0.0.2", "two", 8, 16 * 2**30)]) // MIB
    1024
    """
    each = None if processes is None else -(-processes // max(len(members), 1))
    shares = [default_budget(Machine(node.cpus, node.memory, node.memory, None), each or node.cpus) for node in members]
    return max(min(shares, default=LEAST), LEAST)


def require_room(members: Sequence[Node], memory: int, title: str) -> tuple[str, ...]:
    """What to tell of nodes that cannot hold a task of so many bytes; raises RunError where none can."""
    facts = [
        f"node {node.name} has {node.memory // MIB:,} MiB of memory for tasks, and a worker takes {memory // MIB:,} MiB"
        for node in members
        if not node.tasks(memory)
    ]
    if facts and len(facts) == len(members):
        remedy = "set workers.memory_budget to less, or give the node more (`ray start --memory=BYTES`)"
        raise RunError(title, [Problem(fact, remedy) for fact in facts])
    return tuple(f"{fact}: it gets none" for fact in facts)


def probe(members: Sequence[Node], ledger: Ledger, source: str, title: str) -> None:
    """Every node reads a word from the state directory and looks at the source; raises RunError naming those that cannot."""
    path = os.path.join(ledger.state, "probe")
    write_atomically(path, secrets.token_hex(8), durable=True)
    try:
        require_seen(members, path, source, title)
    finally:
        os.unlink(path)


def require_seen(members: Sequence[Node], path: str, source: str, title: str) -> None:
    """Every node reads the same file and looks at the source; raises RunError naming those that cannot."""
    with open(path, encoding="utf-8") as file:
        word = file.read()
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked: list[tuple[Node, Any]] = [
        (node, task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(path, source))
        for node in members
    ]
    deadline = time.monotonic() + PROBE
    found = {node: _judge(node.name, ref, deadline, path, word, source) for node, ref in asked}
    alive = nodes() if any(found.values()) else ()
    problems = [problem for node, some in found.items() if node in alive for problem in some]  # one that was just lost is no problem
    if problems:
        raise RunError(title, problems)


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
        return [Problem(f"node {node}: {first_line(error)}", "install the same shardconv on every node")]
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


def first_line(error: Exception) -> str:
    """An error of Ray's, which may go on for pages, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
