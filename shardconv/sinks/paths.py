"""Where a checkpoint lies, and where it is made.

    out, step, item        final                stage, where workers write               renamed, at the commit
    OUT                    OUT                  OUT.orbax-checkpoint-tmp                 OUT
    OUT, 0                 OUT/0                OUT/0.orbax-checkpoint-tmp               OUT/0
    OUT, 0, items          OUT/0/items          OUT/0.orbax-checkpoint-tmp/items         OUT/0
    OUT, -, items          OUT/items            OUT.orbax-checkpoint-tmp/items           OUT

`final` holds the pytree: what `PyTreeCheckpointer.restore` takes. The directory that is renamed is the checkpoint,
which readers see whole or not at all. The suffix is Orbax's own for unfinished checkpoints: its readers and managers
skip such directories.
"""

import os

from shardconv.errors import ConfigError, Problem
from shardconv.sinks.direct import sync_directory

STAGE_SUFFIX = ".orbax-checkpoint-tmp"
# Either file makes a directory a checkpoint to some reader.
_MARKS = ("_METADATA", "_CHECKPOINT_METADATA")


def checkpoint_path(out: str, step: int | None) -> str:
    """The directory that appears at the commit.

    >>> checkpoint_path("/data/llama", 0)
    '/data/llama/0'
    """
    return os.path.abspath(out) if step is None else f"{os.path.abspath(out)}/{step}"


def final_path(out: str, step: int | None, item: str | None) -> str:
    """The directory of the finished pytree.

    >>> final_path("/data/llama", 0, "items")
    '/data/llama/0/items'
    """
    return checkpoint_path(out, step) + (f"/{item}" if item else "")


def stage_path(out: str, step: int | None, item: str | None) -> str:
    """The directory in which workers write.

    >>> stage_path("/data/llama", 0, "items")
    '/data/llama/0.orbax-checkpoint-tmp/items'
    """
    return checkpoint_path(out, step) + STAGE_SUFFIX + (f"/{item}" if item else "")


def refuse_finished(out: str, step: int | None) -> None:
    """Raise ConfigError where the output is there already; an empty directory is not."""
    path = checkpoint_path(out, step)
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        remedy = "choose another output.path or output.step, or remove it"
        raise ConfigError("the output exists", [Problem(f"{path} exists", remedy)])
    if step is not None and any(os.path.exists(os.path.join(out, mark)) for mark in _MARKS):
        fact = f"{os.path.abspath(out)} is a checkpoint itself; step {step} cannot go into it"
        raise ConfigError("the output exists", [Problem(fact, "choose another output.path, or leave output.step out")])


def create_stage(out: str, step: int | None, item: str | None) -> str:
    """Create the stage, durably, if it is not there; its path. Raises ConfigError where that is not possible."""
    stage = stage_path(out, step, item)
    missing = []
    path = stage
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    try:
        for path in reversed(missing):
            os.makedirs(path, exist_ok=True)
            sync_directory(os.path.dirname(path))
    except OSError as error:
        fact = f"{path}: {error.strerror}"
        raise ConfigError("the output cannot be created", [Problem(fact, "choose an output.path that you may write to")]) from error
    return stage
