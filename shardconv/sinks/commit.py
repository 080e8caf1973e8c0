"""The commit, asked for from a process that must not load jax: a request as JSON, and a process of its own that carries
it out.

`orbax_commit` imports Orbax and with it jax, which would take hold of the accelerators that the workers need. So the
driver writes the request to a file, starts `python -m shardconv.sinks.orbax_commit REQUEST.json` on the CPU backend,
and waits. The process leaves its answer beside the request: what it did, or the error, which is raised here as if it
had happened here. Killed at any moment, it can be run again.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardconv import errors
from shardconv.errors import Problem, RunError, ShardconvError
from shardconv.sinks.spec import ArraySpec, StoreOptions

_AGAIN = "run the same command again; what is written is kept"
_LAST_LINES = 5


@dataclass(frozen=True)
class CommitRequest:
    """What to commit: the place, every array, the winning attempt of every unit, how arrays are stored, and metadata
    (JSON) to keep with it.

    `attempts` does not matter without OCDBT.
    """

    out: str
    step: int | None
    item: str | None
    arrays: tuple[ArraySpec, ...]
    attempts: tuple[str, ...]
    options: StoreOptions
    custom_metadata: Mapping[str, Any]

    def to_json(self) -> str:
        """The request as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "CommitRequest":
        """The request that `to_json` wrote."""
        document = json.loads(text)
        arrays = tuple(_array(array) for array in document["arrays"])
        options = StoreOptions(**document["options"])
        return cls(**document | {"arrays": arrays, "attempts": tuple(document["attempts"]), "options": options})


@dataclass(frozen=True)
class Committed:
    """What a commit did: the checkpoint's path, the attempts discarded as losers, and the version of Orbax."""

    path: str
    discarded: tuple[str, ...]
    orbax: str


def run_commit(request: CommitRequest, state: str) -> Committed:
    """Commit in a process of its own; `state` is an existing directory for the request and the answer, which are
    removed afterwards.

    Raises what the commit raised: CheckError where the chunk grid is not whole, ConfigError where the output exists;
    RunError where the process died.
    """
    ask, answer = Path(state, "commit.json"), Path(state, "commit.answer.json")
    answer.unlink(missing_ok=True)
    ask.write_text(request.to_json())
    command = [sys.executable, "-m", "shardconv.sinks.orbax_commit", str(ask)]
    # This very package, wherever it was imported from.
    package = str(Path(errors.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    process = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if not answer.exists():
        lines = process.stderr.strip().splitlines()[-_LAST_LINES:]
        fact = f"{' '.join(command)} ended with code {process.returncode}" + "".join(f"\n{line}" for line in lines)
        raise RunError("the commit failed", [Problem(fact, _AGAIN)])
    document = json.loads(answer.read_text())
    ask.unlink()
    answer.unlink()
    if "error" in document:
        raise _raised(document)
    return Committed(document["path"], tuple(document["discarded"]), document["orbax"])


def error_document(error: ShardconvError) -> dict[str, Any]:
    """An error as JSON."""
    problems = [asdict(problem) for problem in error.problems]
    return {"error": type(error).__name__, "title": error.title, "problems": problems}


def _raised(document: Mapping[str, Any]) -> ShardconvError:
    kind: type[ShardconvError] = getattr(errors, document["error"])
    return kind(document["title"], [Problem(**problem) for problem in document["problems"]])


def _array(document: Mapping[str, Any]) -> ArraySpec:
    sizes = {name: tuple(document[name]) for name in ("path", "shape", "chunk", "inner")}
    return ArraySpec(dtype=document["dtype"], **sizes)
