"""Listing any checkpoint, a source or an Orbax one, from headers and metadata alone."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from shardconv.source import open_source


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


def inspect(path: str, match: str | None) -> Listing:
    """Lists the checkpoint at `path`, restricted to names that match a glob; raises InputError where there is none."""
    from shardconv.sinks.listing import pytrees  # tensorstore is not needed to list a source

    folders = pytrees(path)
    if folders:
        return Listing(path, "orbax", tuple(e for folder in folders for e in _stored(path, folder) if _wanted(e, match)))
    source = open_source(path)
    found = (Entry(t.name, t.shape, t.dtype, t.nbytes, t.file) for t in source.tensors.values())
    return Listing(path, source.format, tuple(entry for entry in found if _wanted(entry, match)), source.notes)


def _stored(root: str, folder: str) -> Iterator[Entry]:
    from shardconv.sinks.listing import arrays

    where = os.path.relpath(folder, root)
    for array in arrays(folder):
        yield Entry(".".join(array.path), array.shape, array.dtype, array.nbytes, where, array.chunk)


def _wanted(entry: Entry, match: str | None) -> bool:
    return match is None or fnmatchcase(entry.name, match)
