"""What `shardconv doctor` looks at: versions, cores, memory, disk. It imports no package to ask its version and writes nothing."""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from shardconv import __version__
from shardconv.budget import GIB, MIB, default_budget, this_machine
from shardconv.errors import Problem

# What converting needs, with the oldest release that will do; a test compares it with pyproject.toml.
REQUIRED = {
    "einops": "0.8",
    "jax": "0.6.2",
    "ml_dtypes": "0.5",
    "numpy": "2.1",
    "orbax-checkpoint": "0.11.26",
    "psutil": "5.9",
    "pydantic": "2.7",
    "ray": "2.60",
    "rich": "13.8",
    "tensorstore": "0.1.85",
    "typer": "0.19",
    "xxhash": "3.0",
}
# What only the comparison with PyTorch needs.
OPTIONAL = ("torch", "transformers")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report, and what is wrong with it, if anything."""

    name: str
    value: str
    problem: Problem | None = None


def findings(folder: str) -> tuple[Finding, ...]:
    """All findings about this Python, this machine and the disk that `folder` is on."""
    return (*_versions(), *_machine(), *_disk(folder))


def _versions() -> Iterator[Finding]:
    yield Finding("shardconv", __version__)
    yield Finding("python", f"{platform.python_version()}, {sys.executable}")
    for name, lowest in REQUIRED.items():
        yield check_version(name, lowest, _version(name))
    for name in OPTIONAL:
        yield Finding(name, _version(name) or "not there; only the check stage needs it")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_version(name: str, lowest: str, found: str | None) -> Finding:
    """The finding about one package.

    >>> check_version("ray", "2.60", "2.9.1").problem
    Problem(fact='ray is 2.9.1, older than 2.60', remedy='pip install "ray>=2.60"')
    """
    remedy = f'pip install "{name}>={lowest}"'
    if found is None:
        return Finding(name, "not there", Problem(f"{name} is not installed", remedy))
    if _numbers(found) < _numbers(lowest):
        return Finding(name, found, Problem(f"{name} is {found}, older than {lowest}", remedy))
    return Finding(name, found)


def _numbers(text: str) -> tuple[int, ...]:
    """The release numbers of a version; what follows them (rc1, +cpu) does not matter here."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _machine() -> Iterator[Finding]:
    machine = this_machine()
    limit = "no limit" if machine.limit is None else f"limit {machine.limit / GIB:.1f} GiB"
    budget = default_budget(machine, machine.cores)
    yield Finding("cores", str(machine.cores))
    yield Finding("memory", f"{machine.memory / GIB:.1f} GiB, {machine.available / GIB:.1f} GiB free, {limit}")
    yield Finding("memory budget", f"{budget // MIB} MiB for each of {machine.cores} workers, when [workers] says auto")


def _disk(folder: str) -> Iterator[Finding]:
    for path in (folder, "/dev/shm"):
        if os.path.isdir(path):
            usage = shutil.disk_usage(path)
            yield Finding(f"disk at {path}", f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} GiB")
    yield Finding("RAY_ADDRESS", os.environ.get("RAY_ADDRESS", "not set: Ray is started here, unless the config names a cluster"))
