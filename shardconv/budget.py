"""How much memory a worker may take, and what the machine has.

A machine is four numbers: cores, memory, memory that is free to use now, and the tightest limit above this process. Linux says them in
/proc and in the control groups, version 1 or 2; a group's limit holds for everything below it, so the walk goes from our group up to the
root and the tightest one wins. Page cache that the kernel can drop at once (`inactive_file`) counts as free, because our own reads put it
there. Without /proc (macOS) physical memory is all we know.

The default budget of a worker is a quarter of the free memory, half of it in all when there are several workers, and never more than
`MOST`: the memory a conversion needs does not grow with the model, so more buys nothing. Sizes are written as people write them: "2GiB".
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MIB = 2**20
GIB = 2**30

# One layer of the widest published dense model (Llama-3.1-405B, 16384 x 53248 in bfloat16) is 1.6 GiB: read buffer, write buffer and one
# write in flight fit. Twice as much makes units larger, so an interrupted run repeats more, and no faster.
MOST = 8 * GIB

# Cgroup v1 says "no limit" with the largest page-aligned int64; any number beyond this is more memory than a machine has.
NO_LIMIT = 2**60

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Bytes in a size such as "2GiB", "500MB" or "1.5 TiB"; raises ValueError with what is expected.

    >>> parse_size("2GiB"), parse_size("500MB"), parse_size("1.5 KiB")
    (2147483648, 500000000, 1536)
    """
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].upper() or "B") if match else None
    if match is None or unit is None:
        raise ValueError('a number and a unit: "512MiB", "2GiB", "500MB"')
    return round(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def format_size(size: int) -> str:
    """A size in the largest unit that keeps it exact, so that `parse_size` gives the same number back.

    >>> format_size(2**31), format_size(500_000_000), format_size(1000)
    ('2GiB', '500MB', '1000B')
    """
    for unit in ("TiB", "TB", "GiB", "GB", "MiB", "MB", "KiB"):
        if size and size % UNITS[unit.upper()] == 0:
            return f"{size // UNITS[unit.upper()]}{unit}"
    return f"{size}B"


@dataclass(frozen=True)
class Machine:
    """What this process may use: cores, and bytes of memory in all, free now, and allowed by the tightest group (None: no limit)."""

    cores: int
    memory: int
    available: int
    limit: int | None


def default_budget(machine: Machine, workers: int) -> int:
    """Bytes of memory for each of `workers` workers on one machine, in whole MiB.

    >>> default_budget(Machine(cores=4, memory=16 * GIB, available=12 * GIB, limit=None), workers=4) // MIB
    1536
    """
    share = min(machine.available // 4, machine.available // (2 * workers), MOST)
    return max(share // MIB, 1) * MIB


def this_machine(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Machine:
    """The machine as this process sees it; `proc` and `groups` are where the kernel says so."""
    memory, available = _memory(proc)
    limits = list(_limits(proc, groups))
    return Machine(
        cores=_cores(proc, groups),
        memory=memory,
        available=max(0, min([available, *(limit - used for limit, used in limits)])),
        limit=min((limit for limit, _ in limits), default=None),
    )


def _memory(proc: Path) -> tuple[int, int]:
    """Bytes of memory, and of memory free to use, on the whole machine."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total // 2  # nothing here says what is free; half leaves room for the rest of the machine
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
    total = fields["MemTotal"]
    return total, fields.get("MemAvailable", total // 2)


def _cores(proc: Path, groups: Path) -> int:
    """Cores this process may run on: the affinity mask, cut by the tightest CPU quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _folders(proc, groups, "cpu"):
        quota, period = _quota(folder)
        if quota > 0 and period > 0:
            cores = min(cores, -(-quota // period))
    return max(cores, 1)


def _quota(folder: Path) -> tuple[int, int]:
    """CPU microseconds allowed in each period of microseconds; (0, 0) where nothing is said."""
    words = (_read(folder / "cpu.max") or "").split()
    if len(words) == 2 and words[0] != "max":
        return int(words[0]), int(words[1])
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return (int(quota), int(period)) if quota and period else (0, 0)


def _limits(proc: Path, groups: Path) -> Iterator[tuple[int, int]]:
    """Bytes allowed and bytes in use that cannot be dropped, for each memory group above this process that has a limit."""
    for folder in _folders(proc, groups, "memory"):
        for limit_file, used_file, stat_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _read(folder / limit_file), _read(folder / used_file)
            if limit and limit != "max" and used and int(limit) < NO_LIMIT:
                stat = dict(line.split()[:2] for line in (_read(folder / "memory.stat") or "").splitlines())
                yield int(limit), max(0, int(used) - int(stat.get(stat_key, 0)))


def _folders(proc: Path, groups: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's groups for one controller, from its own up to the root of the mount.

    A line of /proc/self/cgroup is "0::/path" (version 2) or "4:cpu,cpuacct:/path" (version 1). In a container the path may name a folder
    of the host that is not mounted here; its parents are tried in turn, down to the mount itself.
    """
    for line in (_read(proc / "self" / "cgroup") or "").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        mount = groups / controller if names else groups
        for part in (PurePosixPath(path), *PurePosixPath(path).parents):
            folder = mount / str(part).lstrip("/")
            if folder.is_dir():
                yield folder


def _read(path: Path) -> str | None:
    """The text of a small kernel file, or None where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
