"""The commit: Orbax adopts what the workers wrote, adds its metadata, and renames the whole into place.

The one module that imports Orbax and jax, and the one that knows of anything in Orbax that is not plain public use: its
extension points for leaf types (`TypeHandler`) and temporary directories (`temporary_path_class`), which are exported
but may change; tested from 0.11.26 to 0.12.8.

Order of events: refuse a finished output; discard losing attempts; remove what an earlier, killed commit left; check
the chunk grid (Orbax would commit an empty directory); let Orbax merge the databases by reference and write
`_METADATA`, `_CHECKPOINT_METADATA`; sync all of it; rename. Data is neither moved nor copied. Until the rename there is
no checkpoint, after it nothing is left to do; so a commit that is killed at any moment is simply run again.

Every leaf is recorded as `np.ndarray`. That restores through every API, with and without a target; `jax.Array` without
a `_sharding` file does not, and that file would tie the checkpoint to device ids. Target PartitionSpecs belong into the
custom metadata.

Custom metadata (a JSON object) lies in the checkpoint twice, in its own directory and in the pytree's, so that plain
calls find it at either:

    ocp.PyTreeCheckpointer().metadata(final).item_metadata.custom_metadata      v0, always
    ocp.CheckpointManager(out).metadata(step).custom_metadata                   v0, with a step and an item
    ocp.experimental.v1.metadata(checkpoint).custom_metadata                    v1, always: OUT or OUT/<step>

`v1.load` takes the checkpoint's directory, `StandardCheckpointer` and `PyTreeCheckpointer` the pytree's (`final`).
Managers want a step and an item: v0's reads any, most simply "default", v1's "state"; MaxText wants "items".
"""

import json
import math
import os
import shutil
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from shardconv.errors import CheckError, Problem
from shardconv.sinks.chunk_writer import sweep
from shardconv.sinks.commit import CommitRequest, Committed
from shardconv.sinks.direct import sync_directory, sync_file
from shardconv.sinks.grid import check_grid
from shardconv.sinks.paths import checkpoint_path, refuse_finished, stage_path
from shardconv.sinks.spec import ATTEMPT_PREFIX, ArraySpec, StoreOptions


def commit(request: CommitRequest) -> Committed:
    """Turn the stage into a finished checkpoint.

    Raises ConfigError where the output is there already, CheckError where what was written is not the chunk grid.
    The winners' data has not been touched then.
    """
    refuse_finished(request.out, request.step)
    stage = stage_path(request.out, request.step, request.item)
    if not os.path.isdir(stage):
        fact = f"{stage} is not there"
        raise CheckError("the checkpoint is not complete", [Problem(fact, "run again with --restart")])
    discarded = sweep(stage, request.attempts)
    _clear(request)
    problems = check_grid(stage, request.arrays, request.attempts, request.options)
    if problems:
        raise CheckError("the checkpoint is not complete", problems)
    path = checkpoint_path(request.out, request.step)
    if os.path.isdir(path):
        os.rmdir(path)  # it is empty; Orbax wants to make it
    _save(request, path)
    for name in ("commit_success.txt", "_CHECKPOINT_METADATA"):  # written just before the rename
        if os.path.exists(f"{path}/{name}"):
            sync_file(f"{path}/{name}")
    sync_directory(path)
    sync_directory(os.path.dirname(path))
    return Committed(path, discarded, ocp.__version__)


def _save(request: CommitRequest, path: str) -> None:
    """Everything that Orbax does."""
    options = request.options
    registry = type_handlers.create_type_handler_registry((Staged, AlreadyWritten()))
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=options.ocdbt, use_zarr3=options.zarr == 3, type_handler_registry=registry
    )
    metadata = dict(request.custom_metadata)
    args = ocp.args.PyTreeSave(tree(request.arrays), custom_metadata=metadata)
    if request.item is None:
        with ocp.Checkpointer(handler, temporary_path_class=AdoptedStage) as checkpointer:
            checkpointer.save(path, args=args, custom_metadata=metadata)
        return
    in_place = ocp.CompositeOptions(temporary_path_class=AdoptedItem)
    composite = ocp.CompositeCheckpointHandler(composite_options=in_place, **{request.item: handler})
    with ocp.Checkpointer(composite, temporary_path_class=AdoptedStage) as checkpointer:
        checkpointer.save(path, args=ocp.args.Composite(**{request.item: args}), custom_metadata=metadata)


class Staged:
    """A leaf whose data is on the disk already."""

    def __init__(self, spec: ArraySpec) -> None:
        self.shape, self.dtype = spec.shape, spec.numpy

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the array."""
        return self.size * self.dtype.itemsize


class _Done(ocp.Future):  # type: ignore[misc]
    def result(self, timeout: float | None = None) -> None:  # noqa: ARG002
        return None


class AlreadyWritten(type_handlers.TypeHandler):  # type: ignore[misc]
    """Orbax's handler of `Staged` leaves: nothing to write, and never asked to read."""

    def typestr(self) -> str:
        """What `_METADATA` says the leaf is."""
        return "np.ndarray"

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:  # noqa: ARG002
        """Nothing to do."""
        return [_Done()]

    async def metadata(self, infos: Any) -> Any:
        """Not asked for."""
        raise NotImplementedError

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        """Not asked for."""
        raise NotImplementedError


class AdoptedStage(ocp.path.atomicity.AtomicRenameTemporaryPath):  # type: ignore[misc]
    """A temporary directory that exists: the stage. Orbax would remove it, and the data with it."""

    async def create(self) -> Any:
        """Leave everything where it is, and note the time, as Orbax does."""
        begun = {"init_timestamp_nsecs": time.time_ns()}
        Path(self.get(), "_CHECKPOINT_METADATA").write_text(json.dumps(begun))
        return self.get()

    async def finalize(self) -> None:
        """Make everything durable, and rename."""
        _sync_tree(str(self.get()))
        await super().finalize()


class AdoptedItem(ocp.path.atomicity.AtomicRenameTemporaryPath):  # type: ignore[misc]
    """The directory of an item in an adopted stage: final where it is, since the stage is renamed around it."""

    @classmethod
    def from_final(
        cls,
        final_path: Any,
        *,
        checkpoint_metadata_store: Any = None,  # noqa: ARG003  an item has no such file
        file_options: Any = None,
    ) -> Any:
        """The item's directory, as its own temporary one."""
        return cls(final_path, final_path, file_options=file_options)

    async def create(self) -> Any:
        """Nothing to do."""
        return self.get()

    async def finalize(self) -> None:
        """Nothing to do."""


def _clear(request: CommitRequest) -> None:
    """Remove what an earlier, killed commit left in the stage: everything but data."""
    stage = stage_path(request.out, request.step, request.item)
    if request.item is not None:
        _remove(entry for entry in os.scandir(os.path.dirname(stage)) if entry.path != stage)
    _remove(entry for entry in os.scandir(stage) if not _is_data(entry, request.options))


def _is_data(entry: os.DirEntry[str], options: StoreOptions) -> bool:
    if options.ocdbt:
        return entry.name.startswith(ATTEMPT_PREFIX)
    return os.path.exists(f"{entry.path}/{'zarr.json' if options.zarr == 3 else '.zarray'}")


def _remove(entries: Iterable[os.DirEntry[str]]) -> None:
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _sync_tree(directory: str) -> None:
    """Make durable what the commit has written; the workers' files are already."""
    for path, names, files in os.walk(directory):
        names[:] = [name for name in names if not name.startswith(ATTEMPT_PREFIX)]
        for file in files:
            sync_file(f"{path}/{file}")
        sync_directory(path)


def tree(arrays: Collection[ArraySpec]) -> dict[str, Any]:
    """The pytree of nested dicts that the arrays' paths spell."""
    root: dict[str, Any] = {}
    for spec in arrays:
        node = root
        for key in spec.path[:-1]:
            node = node.setdefault(key, {})
        node[spec.path[-1]] = Staged(spec)
    return root
