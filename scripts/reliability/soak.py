"""A hundred conversions in a row in one process: what does not return to where it was is a leak.

    python scripts/reliability/soak.py WORK [--local 90] [--ray 10]

Conversions of a small model, by `conversion.run`, every third one checked, on both executors, in one process and in two. After each, once
what it started has had its moment to go: resident memory, open files, threads, child processes, Ray's processes anywhere, files in the
directory of temporary files (but for Ray's own directory there, whose sessions Ray keeps), and what lies beside the outputs. The first
conversions warm caches and modules up; from then on counts must be equal, and memory must not grow by more than `GROWTH` over all. Starting
and ending Ray leaves a socket each time and a thread now and then, whoever does it: so Ray is started as often with nothing of ours in it,
and what that leaves is spared. A line per ten conversions; exit code 1 on a leak. Set TMPDIR to a directory that nobody else uses.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import psutil
from kills import MODEL

from shardconv import units
from shardconv.config import RunOptions, load_config
from shardconv.conversion import run
from shardconv.run.ray import connected, results
from shardconv.synth import synthesise

GROWTH = 8 << 20  # bytes: what an allocator may hold on to, and less than a tenth of a MiB for each conversion
WARM = 5  # conversions on each executor before the first measurement
SETTLE = 10.0  # seconds for processes that were told to end
MARK = "SHARDCONV_SOAK"  # in the environment of everything that is started here
OPTIONS = RunOptions(restart=False, overwrite=False, verbosity=-1, json_logs=False)


@dataclass(frozen=True)
class Held:
    """What this process holds, and what lies about; memory in bytes."""

    rss: int
    files: int
    threads: int
    children: int
    ray: int
    temporary: int
    beside: int

    def counts(self) -> tuple[int, ...]:
        """All but the memory."""
        return astuple(self)[1:]


def held(work: Path) -> Held:
    """Now, or when processes that are ending have ended."""
    gc.collect()
    me, deadline = psutil.Process(), time.monotonic() + SETTLE
    while (me.children(recursive=True) or _ray_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    temporary = sum(1 for path in Path(tempfile.gettempdir()).iterdir() if path.name != "ray" and path != work)
    beside = sum(1 for _ in (work / "outputs").rglob("*"))
    children = len(me.children(recursive=True))
    return Held(me.memory_info().rss, me.num_fds(), me.num_threads(), children, _ray_processes(), temporary, beside)


def _ray_processes() -> int:
    """Those that were started under this program, whoever their parents are by now."""
    found = 0
    for process in psutil.process_iter(["name", "status"]):
        name = process.info["name"] or ""
        if (name.startswith("ray::") or name in ("raylet", "gcs_server")) and process.info["status"] != psutil.STATUS_ZOMBIE:
            with contextlib.suppress(psutil.Error):
                found += process.environ().get(MARK) == str(os.getpid())
    return found


def convert(work: Path, number: int, executor: str) -> None:
    """One conversion, whose output is removed again, so that what it leaves elsewhere shows."""
    out = work / "outputs" / f"{number}"
    check = "none" if number % 3 else "weights"
    keys = {"output.path": out, "workers.executor": executor, "check.mode": check}
    overrides = [f'{key}="{value}"' for key, value in keys.items()]
    config = load_config(str(work / "config.toml"), [*overrides, f"workers.count={1 + number % 2}"])
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        run(config, OPTIONS)
    left = sorted(path.name for path in out.parent.iterdir())
    if left != [out.name, f"{out.name}.shardconv"]:
        raise SystemExit(f"left beside the output: {left}")
    shutil.rmtree(out)
    shutil.rmtree(f"{out}.shardconv")


def task(number: int) -> int:
    """What Ray is started for where nothing is converted."""
    return number


def ray_alone(work: Path, count: int) -> Held:
    """What so many starts and ends of Ray, with one task each and nothing of ours, leave in this process beyond the first few."""
    for number in range(WARM + count):
        if number in (0, WARM):
            first = held(work)
        with connected(None, 1, verbose=False):
            list(results(task, [(number,)], 1, 0))
    last = held(work)
    print(f"Ray alone, {count} starts: from {_list(first)} to {_list(last)}", flush=True)
    return Held(*(after - before for before, after in zip(astuple(first), astuple(last), strict=True)))


def soak(work: Path, executor: str, count: int, spared: Held) -> list[str]:
    """Convert so often after the warming up; what has leaked beyond what is `spared`, in words."""
    for number in range(WARM):
        convert(work, number, executor)
    first = last = held(work)
    _say(executor, 0, first)
    wrongs = []
    for number in range(1, count + 1):
        convert(work, number, executor)
        if number % 10 == 0 or number == count:
            last = held(work)
            _say(executor, number, last)
            wrongs += _grown(f"{executor}, after {number} conversions", first, last, spared)
    if last.rss - first.rss > GROWTH:
        wrongs.append(f"{executor}: memory grew by {(last.rss - first.rss) / 2**20:.1f} MiB over {count} conversions")
    return wrongs


def _grown(when: str, first: Held, last: Held, spared: Held) -> list[str]:
    names = [field.name for field in fields(Held)][1:]
    rows = zip(names, first.counts(), last.counts(), spared.counts(), strict=True)
    return [f"{when}: {name} was {before}, is {now}" for name, before, now, least in rows if now > before + least + bool(least)]


def _say(executor: str, number: int, now: Held) -> None:
    print(f"{executor} {number:3d}: {now.rss / 2**20:.1f} MiB, " + _list(now), flush=True)


def _list(now: Held) -> str:
    names = [field.name for field in fields(Held)][1:]
    return ", ".join(f"{count} {name}" for name, count in zip(names, now.counts(), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--local", type=int, default=90)
    parser.add_argument("--ray", type=int, default=10)
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    (work / "outputs").mkdir(parents=True)
    (work / "model.json").write_text(json.dumps(MODEL))
    synthesise(str(work / "model.json"), str(work / "source"), sparse=False, seed=1, dtype="bfloat16", shard_bytes=1_000_000)
    (work / "config.toml").write_text(
        f'[source]\npath = "{work}/source"\n[target]\nlayout = "flat"\n[output]\npath = "{work}/out"\n[workers]\nmemory_budget = "64MiB"\n'
    )
    units.UNIT_LEAST = 1 << 18
    os.environ[MARK] = str(os.getpid())
    wrongs = []
    for executor, count in (("local", options.local), ("ray", options.ray)):
        if count:
            spared = ray_alone(work, count) if executor == "ray" else Held(*[0] * len(fields(Held)))
            wrongs += soak(work, executor, count, spared)
    for wrong in wrongs:
        print(f"LEAK {wrong}")
    shutil.rmtree(work)
    return int(bool(wrongs))


if __name__ == "__main__":
    sys.exit(main())
