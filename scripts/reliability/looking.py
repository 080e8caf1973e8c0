"""What a conversion has left at some moment, as others would take it: Orbax, MaxText's place, `shardconv inspect`.

`Checkpoint` is what a finished one holds, to compare with: every array's bytes by plain Orbax, and its metadata but for what may differ
from run to run: the moments at which it was made (`VOLATILE`), and the path where Orbax says in words that it committed. Data files have
random names, so their names and bytes are not compared.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from shardconv.errors import ShardconvError
from shardconv.inspecting import inspect

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of every manager that only reads

VOLATILE = {"init_timestamp_nsecs", "commit_timestamp_nsecs", "made"}
STAGE = ".orbax-checkpoint-tmp"
DATA = ("d", "manifest.ocdbt")  # of the database; attempts' own databases are recognised by their prefix


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: (dtype, shape, SHA-256 of the bytes) of each array, and the metadata of each file that has some."""

    arrays: Mapping[str, tuple[str, tuple[int, ...], str]]
    metadata: Mapping[str, Any]

    def differences(self, other: "Checkpoint") -> list[str]:
        """Names of arrays and of files of metadata that are not equal."""
        names = sorted(self.arrays.keys() ^ other.arrays.keys())
        names += [name for name in self.arrays if name in other.arrays and self.arrays[name] != other.arrays[name]]
        files = self.metadata.keys() | other.metadata.keys()
        return names + sorted(file for file in files if self.metadata.get(file) != other.metadata.get(file))


@dataclass(frozen=True)
class Case:
    """A conversion's directory: `out` is the output, below it the checkpoint's directory and the pytree's."""

    root: Path
    step: str = ""
    item: str = ""

    @property
    def checkpoint(self) -> Path:
        """The directory that appears at the commit."""
        return self.root / "out" / self.step

    @property
    def state(self) -> Path:
        """Where unfinished work is kept."""
        return self.root / "out.shardconv"

    @property
    def aside(self) -> Path:
        """Where the directory appears that will replace an earlier one."""
        return self.state / "complete" / self.step

    @property
    def replaced(self) -> Path:
        """Where the earlier one lies while the two change places."""
        return self.state / "replaced"

    def stages(self) -> Iterator[Path]:
        """Where workers may be writing."""
        for place in (self.checkpoint, self.aside):
            yield Path(f"{place}{STAGE}", self.item)

    def load(self, checkpoint: Path) -> Checkpoint:
        """What the checkpoint at a directory holds; raises whatever Orbax raises."""
        return Checkpoint(_arrays(checkpoint / self.item), dict(_metadata(checkpoint)))


def _arrays(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    def flat(tree: Any, name: str = "") -> Iterator[tuple[str, tuple[str, tuple[int, ...], str]]]:
        if isinstance(tree, dict):
            for key in tree:
                yield from flat(tree[key], f"{name}.{key}")
        else:
            array = np.asarray(tree)
            yield name[1:], (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest())

    return dict(flat(ocp.PyTreeCheckpointer().restore(str(folder))))


def _metadata(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part in DATA or part.startswith("ocdbt.process_") for part in parts):
            # commit_success.txt says in words where Orbax committed.
            yield "/".join(parts), "there" if path.suffix == ".txt" else _stable(json.loads(path.read_text()))


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(inner) for key, inner in value.items() if key not in VOLATILE}
    return [_stable(inner) for inner in value] if isinstance(value, list) else value


def digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of all files in a directory; of nothing, where it is not there."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            whole.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return whole.hexdigest()


def believed(case: Case) -> Iterator[tuple[Path, str]]:
    """Every directory that someone takes for a complete checkpoint, and who."""
    known = {case.root / "out", case.state, *case.stages(), case.checkpoint, case.aside}
    for folder in sorted(known | {path.parent for path in case.root.rglob("_METADATA")}):
        try:
            ocp.PyTreeCheckpointer().restore(str(folder))
        except Exception:  # noqa: BLE001  whatever it says, it does not take it
            continue
        yield folder, "Orbax"
    for place in (case.root / "out", case.state, case.state / "complete"):
        if place.is_dir():
            options = ocp.CheckpointManagerOptions(create=False, read_only=True)
            with ocp.CheckpointManager(str(place), options=options) as manager:
                for step in manager.all_steps():
                    yield place / str(step), "a manager of checkpoints, as MaxText has one"
    for place in (case.root / "out", case.checkpoint, *case.stages(), *(Path(f"{p}{STAGE}") for p in (case.checkpoint, case.aside))):
        try:
            inspect(str(place), None)
        except ShardconvError:
            continue
        yield place, "shardconv inspect"


@dataclass
class Judge:
    """Says what is wrong with what a kill left; `new` is the undisturbed result, `earlier` that of the checkpoint to be replaced."""

    new: Checkpoint
    earlier: Checkpoint | None = None

    def wrongs(self, case: Case) -> list[str]:
        """Everything that is wrong, in words; empty when nothing is."""
        return [*self._half_checkpoints(case), *self._lost_earlier(case)]

    def _half_checkpoints(self, case: Case) -> Iterator[str]:
        for folder, who in believed(case):
            places = {case.checkpoint: (self.new, self.earlier), case.aside: (self.new,), case.replaced: (self.earlier,)}
            here = [place for place in places if folder in (place, place / case.item) or (case.step and folder == place.parent)]
            if folder in case.stages() and self._is_whole(folder):
                continue  # all of it is there, below a name that says that it is not for use yet
            if not any(old and not self._differ(case, place, old) for place in here for old in places[place]):
                yield f"{os.path.relpath(folder, case.root)} is taken for complete by {who}"

    def _is_whole(self, folder: Path) -> bool:
        try:
            return _arrays(folder) == self.new.arrays
        except Exception:  # noqa: BLE001  as below
            return False

    def _lost_earlier(self, case: Case) -> Iterator[str]:
        if self.earlier is not None:
            kept = any(not self._differ(case, place, self.earlier) for place in (case.checkpoint, case.replaced))
            if not kept and self._differ(case, case.checkpoint, self.new):
                yield "the earlier checkpoint is gone, and the new one is not in its place"

    def _differ(self, case: Case, place: Path, checkpoint: Checkpoint) -> bool:
        try:
            return bool(case.load(place).differences(checkpoint))
        except Exception:  # noqa: BLE001  what cannot be restored is not it
            return True


def lost_units(case: Case) -> int:
    """Attempts at units that were begun and are not recorded: work that is done again."""
    records = [json.loads(path.read_text()) for path in (case.state / "done").glob("*.json")] if (case.state / "done").is_dir() else []
    winners = {record["attempt"] for record in records}
    begun = {path.name.removeprefix("ocdbt.process_") for stage in case.stages() for path in stage.glob("ocdbt.process_*")}
    return len(begun - winners)
