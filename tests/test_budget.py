"""Memory and cores from the kernel's files, written here as kernels and containers write them; sizes there and back."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardconv.budget import GIB, MIB, MOST, Machine, default_budget, format_size, parse_size, this_machine

MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n"


def kernel(root: Path, cgroup: str, files: dict[str, str]) -> Machine:
    """The machine that a kernel with these files describes: 16 GiB, 8 GiB of them free."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(MEMINFO)
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    (root / "groups").mkdir()
    for name, text in files.items():
        path = root / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return this_machine(proc=root / "proc", groups=root / "groups")


def test_without_groups_the_machine_is_what_meminfo_says(tmp_path: Path) -> None:
    machine = kernel(tmp_path, "", {})
    assert (machine.memory, machine.available, machine.limit) == (16 * GIB, 8 * GIB, None)
    assert machine.cores == len(os.sched_getaffinity(0))


def test_a_version_2_group_limits_memory_and_its_droppable_cache_is_free(tmp_path: Path) -> None:
    files = {
        "pod/memory.max": str(4 * GIB),
        "pod/memory.current": str(3 * GIB),
        "pod/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\n",
    }
    machine = kernel(tmp_path, "0::/pod\n", files)
    assert (machine.limit, machine.available) == (4 * GIB, 3 * GIB)


def test_the_tightest_group_above_wins(tmp_path: Path) -> None:
    files = {
        "slice/memory.max": str(2 * GIB),
        "slice/memory.current": str(GIB),
        "slice/pod/memory.max": str(4 * GIB),
        "slice/pod/memory.current": "0",
    }
    machine = kernel(tmp_path, "0::/slice/pod\n", files)
    assert (machine.limit, machine.available) == (2 * GIB, GIB)


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    machine = kernel(tmp_path, "0::/\n", {"memory.max": str(GIB), "memory.current": str(2 * GIB)})
    assert machine.available == 0
    assert default_budget(machine, 1) == MIB


def test_a_version_1_group_in_a_container_whose_path_is_the_hosts(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": str(3 * GIB),
        "memory/memory.usage_in_bytes": str(2 * GIB),
        "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
    }
    machine = kernel(tmp_path, "4:memory:/docker/0123abcd\n3:cpu,cpuacct:/docker/0123abcd\n", files)
    assert (machine.limit, machine.available) == (3 * GIB, 2 * GIB)


@pytest.mark.parametrize("unlimited", [{"memory.max": "max"}, {"memory/memory.limit_in_bytes": "9223372036854771712"}])
def test_no_limit_is_no_limit(tmp_path: Path, unlimited: dict[str, str]) -> None:
    used = {"memory.current": "5", "memory/memory.usage_in_bytes": "5"}
    machine = kernel(tmp_path, "0::/\n4:memory:/\n", unlimited | used)
    assert (machine.limit, machine.available) == (None, 8 * GIB)


@pytest.mark.parametrize(
    "files",
    [
        {"cpu.max": "50000 100000"},
        {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"},
    ],
)
def test_a_cpu_quota_of_one_core_or_less_is_one_core(tmp_path: Path, files: dict[str, str]) -> None:
    assert kernel(tmp_path, "0::/\n3:cpu:/\n", files).cores == 1


@pytest.mark.parametrize("files", [{"cpu.max": "max 100000"}, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}])
def test_no_cpu_quota_is_all_cores(tmp_path: Path, files: dict[str, str]) -> None:
    assert kernel(tmp_path, "0::/\n3:cpu:/\n", files).cores == len(os.sched_getaffinity(0))


def test_this_machine_has_memory_and_cores() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert 0 < machine.available <= machine.memory


@pytest.mark.parametrize(
    ("available", "workers", "budget"),
    [(16 * GIB, 1, 4 * GIB), (16 * GIB, 2, 4 * GIB), (16 * GIB, 8, GIB), (1000 * GIB, 1, MOST), (10 * MIB, 100, MIB)],
)
def test_the_default_budget(available: int, workers: int, budget: int) -> None:
    assert default_budget(Machine(cores=8, memory=available, available=available, limit=None), workers) == budget


@given(st.integers(min_value=8 * MIB, max_value=2**50), st.integers(min_value=1, max_value=1024))
def test_all_budgets_together_leave_half_of_the_free_memory(available: int, workers: int) -> None:
    budget = default_budget(Machine(cores=1, memory=available, available=available, limit=None), workers)
    assert budget == MIB or budget * workers <= available // 2


@given(st.integers(min_value=0, max_value=2**60))
def test_a_size_is_read_back_as_it_was_written(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(("text", "size"), [("64MiB", 2**26), ("64 mib", 2**26), ("500MB", 5 * 10**8), ("1.5GB", 1_500_000_000), ("7", 7)])
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 gigs", "2G", "1e9", "1,5GB", "2GiB/s"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match=r'^a number and a unit: "512MiB", "2GiB", "500MB"$'):
        parse_size(text)
