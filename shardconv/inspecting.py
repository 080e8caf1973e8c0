"""Listing any checkpoint, a source or an Orbax one, from headers and metadata alone."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from shardconv.errors import InputError, Problem
from shardconv.run.job import state_path
from shardconv.sinks.paths import STAGE_SUFFIX
from shardconv.source import Source, open_source


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: `where` is its file in a source, its item directory in an Orbax checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    where: str
    chunk: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The entries of a checkpoint that match, and what is odd about it."""

    path: str
    format: str
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self.entries)


def inspect(path: str, match: str | None, prefix: str = "") -> Listing:
    """Lists the checkpoint at `path`, restricted to names that match a glob; raises InputError where there is none.

    `prefix` is the key of a PyTorch file's state dict, where it has several.
    """
    from shardconv.sinks.listing import pytrees  # tensorstore is not needed to list a source

    unfinished = _unfinished(path)
    folders = [folder for folder in pytrees(path) if STAGE_SUFFIX not in os.path.abspath(folder)]
    if folders:
        found, form, notes = [entry for folder in folders for entry in _stored(path, folder)], "orbax", unfinished
    else:
        source = _source(path, prefix, unfinished)
        found = [Entry(t.name, t.shape, t.dtype, t.nbytes, t.file) for t in source.tensors.values()]
        form, notes = source.format, source.notes
    entries = tuple(sorted((entry for entry in found if _wanted(entry, match)), key=_natural))
    hint = (_no_match(match),) if match is not None and not entries else ()
    return Listing(path, form, entries, (*notes, *hint))


def _source(path: str, prefix: str, unfinished: Sequence[str]) -> Source:
    """A checkpoint to convert; where there is none, what is there instead is a conversion that has not ended."""
    try:
        return open_source(path, prefix)
    except InputError:
        if not unfinished:
            raise
    remedy = "`shardconv run` with the same config goes on with it"
    raise InputError("there is no finished checkpoint", [Problem(fact, remedy) for fact in unfinished])


def _unfinished(path: str) -> tuple[str, ...]:
    """What is left of a conversion into `path`, or into a step of it, that has not ended."""
    whole = os.path.abspath(path)
    inside = [os.path.join(whole, name) for name in _names(whole) if name.endswith(STAGE_SUFFIX)]
    left = [*inside, whole + STAGE_SUFFIX, *([whole] if whole.endswith(STAGE_SUFFIX) else [])]
    found = [stage for stage in left if os.path.isdir(stage)]
    if not found and not os.path.exists(whole) and os.path.isdir(state_path(whole)):
        found = [state_path(whole)]
    return tuple(f"{stage} is of a conversion that has not finished" for stage in found)


def _names(path: str) -> list[str]:
    """What is in a directory; nothing where it cannot be listed, which who opens it says."""
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _no_match(match: str) -> str:
    stars = "" if set("*?[") & set(match) else f'; a glob needs stars: "*{match}*"'
    return f'no name matches "{match}"{stars}'


def _natural(entry: Entry) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", entry.name)]


def _stored(root: str, folder: str) -> Iterator[Entry]:
    from shardconv.sinks.listing import arrays

    where = os.path.relpath(folder, root)
    for array in arrays(folder):
        yield Entry(".".join(array.path), array.shape, array.dtype, array.nbytes, where, array.chunk)


def _wanted(entry: Entry, match: str | None) -> bool:
    return match is None or fnmatchcase(entry.name, match)
