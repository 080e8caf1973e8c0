"""Before the first byte: may this run write, may it go on from what an earlier one finished, and is there room.

`prepare` is called with the lock held. It refuses by raising, and nothing but the state directory has been touched then; otherwise the
ledger says what is being made, the stage exists, and what is left to do is known.

A checkpoint in the way is replaced only when asked for, and only if it is one: a directory of anything else is never removed.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Literal

import shardconv
from shardconv.budget import format_size
from shardconv.errors import ConfigError, Problem, RunError
from shardconv.ledger import Difference, Header, Ledger, SourceMark, differences, refusal
from shardconv.plan import Plan
from shardconv.run.gang import MeshRequest
from shardconv.run.job import Job, Place, load_job
from shardconv.sinks.chunk_writer import sweep
from shardconv.sinks.paths import STAGE_SUFFIX, checkpoint_path, create_stage
from shardconv.sinks.spec import StoreOptions, attempt_path

SPARE = 64 << 20  # bytes of room beyond the arrays: metadata of some hundred thousand chunks, and the ledger
MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")  # any of them makes a directory an Orbax checkpoint

Records = Mapping[int, Mapping[str, object]]


@dataclass(frozen=True)
class Request:
    """What the user asks for beside the plan.

    `settings` are the config's keys that decide bytes of the output; `provenance` goes into the checkpoint; `address` None is a Ray of our
    own, `count` 0 one worker per core; `budget` is bytes of buffers per worker. `mesh` is how a plan with windows comes onto its mesh.
    """

    output: str
    step: int | None
    item: str | None
    store: StoreOptions
    settings: Mapping[str, object]
    provenance: Mapping[str, object]
    executor: Literal["ray", "local"]
    address: str | None
    count: int
    budget: int
    restart: bool
    overwrite: bool
    verbose: bool
    mesh: MeshRequest


@dataclass(frozen=True)
class Prepared:
    """Where to write, what the ledger has already, and whether an earlier run was stopped after the commit."""

    place: Place
    records: Records
    committed: bool


def prepare(request: Request, plan: Plan, ledger: Ledger) -> Prepared:
    """Begin a conversion, or find where to go on.

    Raises ConfigError for a checkpoint or a stage in the way and for a state of another config, InputError for one of another source,
    RunError where there is no room.
    """
    if request.restart:
        _discard(request, ledger)
    present = header_of(request, plan)
    previous = ledger.header()
    if previous is not None:
        found, finished = differences(previous, present) or _misfit(previous, request, plan), ledger.finished()
        if found:
            raise refusal(request.output, found, len(finished))
        # The budget of the first run made the chunks, and makes them again next time.
        return _go_on(request, plan, ledger, finished, replace(present, budget=previous.budget))
    refuse_existing(request)
    place = Place(request.output, request.step, request.item, aside=is_occupied(checkpoint_path(request.output, request.step)))
    if os.path.lexists(place.committed + STAGE_SUFFIX):
        fact = f"{place.committed + STAGE_SUFFIX} exists, and nothing beside it says whose it is"
        raise ConfigError("the output is being written by something else", [Problem(fact, "--restart removes it and starts afresh")])
    _require_room(request, plan, {})
    ledger.discard()
    try:
        return _begin(request, plan, ledger, place, {}, present)
    except ConfigError:
        ledger.discard()  # nothing is begun where nothing can be written
        raise


def _misfit(previous: Header, request: Request, plan: Plan) -> tuple[Difference, ...]:
    """The memory budget, where the chunks that another one made do not fit it."""
    if plan.peak_bytes <= request.budget or previous.budget == request.budget:
        return ()
    before, now = (f'"{format_size(budget)}"' for budget in (previous.budget, request.budget))
    return (Difference("workers.memory_budget", before, now),)


def header_of(request: Request, plan: Plan) -> Header:
    """What is being made from what, for the ledger."""
    source = plan.source
    files = {name: SourceMark(file.size, file.mtime_ns, file.header_digest) for name, file in source.files.items()}
    return Header(shardconv.__version__, version("orbax-checkpoint"), plan.digest(), source.root, files, request.settings, request.budget)


def is_occupied(path: str) -> bool:
    """Whether something is at a path; an empty directory is nothing."""
    return os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path))


def refuse_existing(request: Request) -> None:
    """Raise ConfigError where the output is there and may not be replaced, or a file stands where a directory above it must be."""
    path = checkpoint_path(request.output, request.step)
    above = os.path.dirname(path)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise ConfigError("the output cannot be created", [Problem(f"{above} is not a directory", "choose another output.path")])
    if not is_occupied(path):
        return
    if not request.overwrite:
        remedy = "--overwrite replaces it when the new one is complete; or choose another output.path"
        raise ConfigError("the output exists", [Problem(f"{path} exists", remedy)])
    places = [path, *(entry.path for entry in os.scandir(path) if entry.is_dir())] if os.path.isdir(path) else []
    if not any(os.path.exists(os.path.join(place, mark)) for place in places for mark in MARKS):
        fact = f"{path} exists and is no Orbax checkpoint (it has none of {', '.join(MARKS)})"
        raise ConfigError("the output is not replaced", [Problem(fact, "choose another output.path, or remove it yourself")])


def _discard(request: Request, ledger: Ledger) -> None:
    for aside in (False, True):
        place = Place(request.output, request.step, request.item, aside)
        shutil.rmtree(place.committed + STAGE_SUFFIX, ignore_errors=True)
    _put_back(request, ledger)
    ledger.discard()


def _put_back(request: Request, ledger: Ledger) -> None:
    """A checkpoint that was being replaced when a run died, if the new one had not taken its place."""
    place = Place(request.output, request.step, request.item, aside=True)
    if os.path.lexists(replaced_path(ledger)) and not is_occupied(place.checkpoint):
        os.rename(replaced_path(ledger), place.checkpoint)


def replaced_path(ledger: Ledger) -> str:
    """Where the checkpoint that is replaced lies while the two change places."""
    return os.path.join(ledger.state, "replaced")


def _go_on(request: Request, plan: Plan, ledger: Ledger, records: Records, header: Header) -> Prepared:
    place = Place(request.output, request.step, request.item, load_job(ledger).place.aside)
    if len(records) == len(plan.units) and not os.path.exists(place.stage) and is_ours(place, plan):
        return Prepared(place, records, committed=True)
    if not place.aside:
        refuse_existing(request)
        if is_occupied(place.checkpoint):
            fact = f"{place.checkpoint} was not there when this conversion was begun"
            raise ConfigError("the output exists", [Problem(fact, "remove it, or use --restart --overwrite")])
    if request.store.ocdbt:
        lost = [u for u, record in records.items() if not os.path.exists(attempt_path(place.stage, str(record["attempt"])))]
    else:
        lost = [] if os.path.exists(place.stage) else list(records)
    for unit in lost:
        ledger.forget(unit)
    records = {unit: record for unit, record in records.items() if unit not in lost}
    if os.path.exists(place.stage):
        sweep(place.stage, [str(record["attempt"]) for record in records.values()])
    _require_room(request, plan, records)
    return _begin(request, plan, ledger, place, records, header)


def _begin(request: Request, plan: Plan, ledger: Ledger, place: Place, records: Records, header: Header) -> Prepared:
    job = Job(place, request.store, request.provenance)
    ledger.create()
    ledger.clear_workers()
    # Also when going on: the source may have moved.
    ledger.begin(header, job.to_data(), plan.to_json())
    create_stage(place.out, place.step, place.item)
    return Prepared(place, records, committed=False)


def _require_room(request: Request, plan: Plan, records: Records) -> None:
    missing = [unit for unit in plan.units if unit.number not in records]
    need = sum(unit.bytes_written for unit in missing) + SPARE
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(request.output))).free
    if need > free:
        fact = f"{request.output} needs {need / 1e9:.1f} GB for {len(missing)} units; {free / 1e9:.1f} GB are free"
        raise RunError("there is not enough room", [Problem(fact, "make room, or choose another output.path")])


def is_ours(place: Place, plan: Plan) -> bool:
    """Whether the checkpoint of this very plan is complete, aside or in its place."""
    for path in {place.committed, place.checkpoint}:
        try:
            with open(os.path.join(path, place.item or "", "_METADATA"), encoding="utf-8") as file:
                if json.load(file)["custom_metadata"]["shardconv"]["plan"] == plan.digest():
                    return True
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False
