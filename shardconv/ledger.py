"""The ledger: what a conversion has finished, as plain files beside its output.

`OUT.shardconv/` holds `plan.json` (the plan, for the workers), `job.json` (what is being made from what; a state without it is none),
`done/<unit>.json` (one small file per unit, so no two processes ever write one file), `workers/` (heartbeats), `lock` (shardconv.lock), and
after success only `report.json`; whoever asked for the run may put a page beside it.

A record appears complete or not at all: it is written under another name, synced, and linked into place, and only after the unit's data are
durable. The first record of a unit wins; a second attempt (a worker that was believed dead) learns that it lost and drops its data.

A state is continued only when the header of the present run equals the recorded one in everything that may decide a byte of the output,
versions included: `differences` lists what changed, and the caller refuses. A source that moved is the same source; a file touched in
place is not.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import cast

from shardconv.errors import ConfigError, InputError, Problem

SCHEMA = 2  # 2: the version of Orbax
SHOWN = 12  # lines of a list of differences; the rest is counted


def write_atomically(path: str, text: str, *, durable: bool) -> None:
    """Write a file that readers see whole or not at all; `durable` also survives a power cut. Raises OSError."""
    draft = f"{path}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    _write_draft(draft, text, durable)
    os.replace(draft, path)
    if durable:
        _sync_directory(os.path.dirname(path))


def _write_draft(draft: str, text: str, durable: bool) -> None:
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        error.filename = draft  # which the system does not say of a write
        raise


def _sync_directory(path: str) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# ---------------------------------------------------------------------------------------------------------------- header


@dataclass(frozen=True)
class SourceMark:
    """What is remembered of one source file to see that it has not changed."""

    size: int
    mtime_ns: int
    header_digest: str


@dataclass(frozen=True)
class Header:
    """What is being made from what, and by which versions of shardconv and Orbax; `root` and `budget` (bytes per worker) decide no byte.

    `settings` are the config's keys that decide the output, dotted, as JSON values (`target.dtype` -> `bfloat16`).
    """

    version: str
    orbax: str
    digest: str
    root: str
    files: Mapping[str, SourceMark]
    settings: Mapping[str, object]
    budget: int


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was when the output was begun: of the source, or of what the user or shardconv makes of it."""

    what: str
    before: str
    now: str
    of_source: bool = False

    def __str__(self) -> str:
        return f"{self.what} was {self.before}, is {self.now}"


def differences(previous: Header, present: Header) -> tuple[Difference, ...]:
    """What changed between the run that began an output and this one; empty when it may be continued."""
    found = _settings_differences(previous.settings, present.settings)
    for name in sorted(previous.files.keys() | present.files.keys()):
        found += _file_differences(name, previous.files.get(name), present.files.get(name), previous.root == present.root)
    versions = (("shardconv", previous.version, present.version), ("orbax-checkpoint", previous.orbax, present.orbax))
    found += [Difference(what, before, now) for what, before, now in versions if before != now]
    if not found and previous.digest != present.digest:
        found.append(Difference("plan", previous.digest[:12], present.digest[:12]))
    return tuple(found)


def _settings_differences(previous: Mapping[str, object], present: Mapping[str, object]) -> list[Difference]:
    keys = sorted(previous.keys() | present.keys())
    pairs = [(key, json.dumps(previous.get(key)), json.dumps(present.get(key))) for key in keys]
    return [Difference(key, before, now) for key, before, now in pairs if before != now]


def _file_differences(name: str, old: SourceMark | None, new: SourceMark | None, in_place: bool) -> list[Difference]:
    what = f"source file {name}"
    if old is None or new is None:
        return [Difference(what, "absent" if old is None else "present", "absent" if new is None else "present", True)]
    if old.size != new.size:
        return [Difference(what, f"{old.size:,} bytes", f"{new.size:,} bytes", True)]
    if old.header_digest != new.header_digest:
        return [Difference(what, f"header {old.header_digest[:12]}", f"header {new.header_digest[:12]}", True)]
    # A copy elsewhere has times of its own; a file rewritten where it was may hold other weights behind an equal header.
    if in_place and old.mtime_ns != new.mtime_ns:
        return [Difference(what, f"modified {_moment(old.mtime_ns)}", f"modified {_moment(new.mtime_ns)}", True)]
    return []


def _moment(mtime_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(mtime_ns // 10**9)) + f".{mtime_ns % 10**9:09d} UTC"


def refusal(output: str, found: Sequence[Difference], finished: int) -> ConfigError | InputError:
    """The report that refuses to continue an output begun with another config, or InputError where only the source is another."""
    problems = [Problem(str(difference)) for difference in found[:SHOWN]]
    if len(found) > SHOWN:
        problems.append(Problem(f"and {len(found) - SHOWN} more"))
    last = problems.pop()
    units = f"{finished} finished unit{'' if finished == 1 else 's'}"
    remedy = f"go back to what it was, or use --restart to discard the {units}"
    kind = InputError if all(difference.of_source for difference in found) else ConfigError
    return kind(f"{output} was begun with another config, source or version", [*problems, Problem(last.fact, remedy)])


# ---------------------------------------------------------------------------------------------------------------- ledger


@dataclass(frozen=True)
class Ledger:
    """The state directory of one output; every method is a few file operations and keeps nothing in memory."""

    state: str

    @property
    def plan_path(self) -> str:
        """The plan, as workers read it."""
        return os.path.join(self.state, "plan.json")

    @property
    def job_path(self) -> str:
        """The header, and whatever else the job consists of."""
        return os.path.join(self.state, "job.json")

    @property
    def workers(self) -> str:
        """The directory of heartbeats."""
        return os.path.join(self.state, "workers")

    @property
    def report_path(self) -> str:
        """What remains after success."""
        return os.path.join(self.state, "report.json")

    def create(self) -> None:
        """Make the directories. Raises OSError."""
        for name in ("done", "workers"):
            os.makedirs(os.path.join(self.state, name), exist_ok=True)

    def begin(self, header: Header, job: Mapping[str, object], plan: bytes) -> None:
        """Record what is being made; `job` is JSON data for the workers, beside the plan. Raises OSError."""
        write_atomically(self.plan_path, plan.decode(), durable=True)
        text = json.dumps({"schema": SCHEMA, "header": asdict(header), "job": dict(job)}, indent=1)
        write_atomically(self.job_path, text, durable=True)

    def header(self) -> Header | None:
        """What a previous run was making, or None where nothing was begun; raises InputError on a state that cannot be read."""
        try:
            with open(self.job_path, encoding="utf-8") as file:
                data = json.load(file)
            if data["schema"] != SCHEMA:
                raise ValueError(f"its schema is {data['schema']}, this shardconv's is {SCHEMA}")
            fields = data["header"]
            files = {name: SourceMark(**mark) for name, mark in fields.pop("files").items()}
            return Header(files=files, **fields)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            problem = Problem(f"{self.job_path}: {error}", "use --restart to discard what was begun")
            raise InputError("the state of an earlier run cannot be read", [problem]) from error

    def header_is_absent(self) -> bool:
        """Whether nothing was begun, or all of it closed."""
        return not os.path.exists(self.job_path)

    def job(self) -> Mapping[str, object]:
        """The job given to `begin`."""
        with open(self.job_path, encoding="utf-8") as file:
            return cast(Mapping[str, object], json.load(file)["job"])

    def record(self, unit: int, data: Mapping[str, object]) -> Mapping[str, object]:
        """Record that a unit is durable, and return the winner's record: `data`, or that of an attempt that came first."""
        path = self._done_path(unit)
        draft = f"{path}.{secrets.token_hex(4)}.tmp"
        _write_draft(draft, json.dumps(data), durable=True)
        try:
            os.link(draft, path)  # unlike a rename it never replaces an earlier record
            os.unlink(draft)
        except FileExistsError:
            os.unlink(draft)
        except OSError:  # file systems without hard links
            os.replace(draft, path)
        _sync_directory(os.path.dirname(path))
        return self._read(path) or data

    def finished(self) -> dict[int, Mapping[str, object]]:
        """The records of all finished units; a damaged one counts as not finished and is removed."""
        directory = os.path.join(self.state, "done")
        records = {}
        for name in os.listdir(directory) if os.path.isdir(directory) else ():
            stem, suffix = os.path.splitext(name)
            if suffix != ".json" or not stem.isdecimal():
                continue
            record = self._read(os.path.join(directory, name))
            if record is None:
                self.forget(int(stem))
            else:
                records[int(stem)] = record
        return records

    def forget(self, unit: int) -> None:
        """Remove a unit's record, so that the unit is done again."""
        os.unlink(self._done_path(unit))

    def clear_workers(self) -> None:
        """Remove the heartbeats and logs of earlier runs."""
        shutil.rmtree(self.workers, ignore_errors=True)
        os.makedirs(self.workers, exist_ok=True)

    def discard(self) -> None:
        """Remove what was begun; the lock stays with its owner."""
        if os.path.exists(self.job_path):
            os.unlink(self.job_path)
        self._clear(keep="")
        self.create()

    def close(self, report: str) -> None:
        """Leave only the report: it is durable before the first record goes."""
        write_atomically(self.report_path, report, durable=True)
        os.unlink(self.job_path)  # first: from here on there is no state to continue, whatever is left of it
        self._clear(keep="report.json")

    def _clear(self, keep: str) -> None:
        for name in os.listdir(self.state):
            path = os.path.join(self.state, name)
            if name != keep and not name.startswith("lock"):  # ours, and what another run leaves for a moment to find us here
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)

    def _done_path(self, unit: int) -> str:
        return os.path.join(self.state, "done", f"{unit}.json")

    def _read(self, path: str) -> Mapping[str, object] | None:
        with open(path, encoding="utf-8") as file:
            try:
                record = json.load(file)
            except ValueError:
                return None
        return cast(Mapping[str, object], record) if isinstance(record, dict) else None
