"""What the commit is asked for, and what it did: plain values, so that whoever asks need not load Orbax and jax (`orbax_commit`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardconv.sinks.spec import ArraySpec, StoreOptions


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


@dataclass(frozen=True)
class Committed:
    """What a commit did: the checkpoint's path, the attempts discarded as losers, and the version of Orbax."""

    path: str
    discarded: tuple[str, ...]
    orbax: str
