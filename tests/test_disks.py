"""Disks that fail under a conversion, for real: small mounts, flags and limits of the kernel's, and a library that fails single calls.

Each time: a report with what to do, exit code 5, nothing published, and the same command goes on when the cause is gone. Quotas are not
tried (a file system with quotas wants tools that few machines have); their answer differs from a full disk's in its words alone.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conversions import Conversion, assert_complete, make_config, make_source, plan_finely

from shardconv.errors import ExitCode, RunError
from shardconv.run import Finished, Ready, Retried, Stage, Told, python_path

pytestmark = pytest.mark.filterwarnings("error")

# A disk's answer, and the remedy for it.
FULL = ("No space left on device", "make room, then run the same command again")
READ_ONLY = ("Read-only file system", "mount it for writing, then run the same command again")
LOCKED = ("Operation not permitted", "see that you may write there (`lsattr` shows what is locked), then run the same command again")
DENIED = ("Permission denied", "see that you may write there, then run the same command again")


def command(*words: str) -> bool:
    """Run a program; whether it could be run and did well."""
    try:
        return subprocess.run(words, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    """A small disk in memory at a directory."""
    place.mkdir(exist_ok=True)
    if not command("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)):
        pytest.skip("nothing can be mounted here")
    try:
        yield place
    finally:
        command("umount", "--lazy", str(place))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("model"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that a conversion of a megabyte fits on, with the room that is asked for beforehand."""
    with mounted(tmp_path / "disk", "size=80m") as place:
        yield place


def on(root: Path, source: Path, *overrides: str) -> Conversion:
    """A conversion on a disk; verbose, so that no log of a process is open on it."""
    config = make_config(root, source, *overrides)
    return Conversion(root, config, plan_finely(config), verbosity=1)


def after(units: int, do: Callable[[], object]) -> Callable[[Told], None]:
    """Do something once, when so many units are finished."""
    seen: list[Told] = []

    def tell(told: Told) -> None:
        if isinstance(told, Finished):
            seen.append(told)
            if len(seen) == units:
                do()

    return tell


def at(stage: str, do: Callable[[], object]) -> Callable[[Told], None]:
    """Do something when a stage begins."""

    def tell(told: Told) -> None:
        if told == Stage(stage):
            do()

    return tell


def stopped(conversion: Conversion, on: Callable[[Told], None], answer: tuple[str, str]) -> str:
    """The fact by which a run was stopped; its remedy and its code are right, no unit was tried twice, and nothing is published."""
    with pytest.raises(RunError) as caught:
        conversion.drive(on)
    (problem,) = caught.value.problems
    assert caught.value.exit_code == ExitCode.RESUMABLE
    assert (problem.fact[-len(answer[0]) :], problem.remedy) == answer
    assert not any(isinstance(told, Retried) for told in conversion.told)
    assert not conversion.out.exists()
    return f"{caught.value.title}: {problem.fact}"


def goes_on(conversion: Conversion, source: Path, units: int) -> None:
    """The same command finishes, and does no unit again that was finished: so many were."""
    conversion.drive()
    assert len(conversion.finished()) == len(conversion.plan.units) - units
    assert_complete(conversion, source)


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(1 << 20)):
            pass
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_a_disk_that_fills_up(disk: Path, source: Path) -> None:
    conversion = on(disk, source)
    said = stopped(conversion, after(3, lambda: fill(disk)), FULL)
    assert said.startswith("cannot write the output: unit 3 (") and f": {disk}/out.shardconv/" in said
    (disk / "filler").unlink()
    goes_on(conversion, source, 3)


def test_a_disk_that_is_full_from_the_start_is_no_mistake_of_the_config(disk: Path, source: Path) -> None:
    conversion = on(disk, source)
    fill(disk)
    with pytest.raises(RunError) as caught:
        conversion.drive()
    assert caught.value.exit_code == ExitCode.RESUMABLE
    (disk / "filler").unlink()
    goes_on(conversion, source, 0)


def test_a_disk_that_fills_up_before_the_commit(disk: Path, source: Path) -> None:
    conversion = on(disk, source)
    with pytest.raises(RunError) as caught:
        conversion.drive(at("commit", lambda: fill(disk)))
    assert caught.value.exit_code == ExitCode.RESUMABLE and FULL[0] in str(caught.value)
    assert not conversion.out.exists()
    (disk / "filler").unlink()
    goes_on(conversion, source, len(conversion.plan.units))


def test_a_disk_that_fills_up_before_the_report_is_written(disk: Path, source: Path) -> None:
    conversion = on(disk, source)
    with pytest.raises(RunError) as caught:
        conversion.drive(at("close", lambda: fill(disk)))
    (problem,) = caught.value.problems
    assert problem.fact.startswith(f"{conversion.ledger.state}/report.json") or problem.fact.startswith(conversion.ledger.state)
    assert (problem.fact[-len(FULL[0]) :], problem.remedy) == FULL
    (disk / "filler").unlink()
    goes_on(conversion, source, len(conversion.plan.units))


def test_a_ledger_that_takes_no_more_files(tmp_path: Path, source: Path) -> None:
    conversion = on(tmp_path, source)
    with mounted(Path(conversion.ledger.state), "nr_inodes=16") as state:
        said = stopped(conversion, lambda told: None, FULL)
        assert f"{state}/" in said
        finished = len(conversion.ledger.finished())
        assert 0 < finished < 16
        assert command("mount", "-o", "remount,nr_inodes=1000", str(state))
        conversion.drive()
        assert len(conversion.finished()) == len(conversion.plan.units) - finished
        assert os.listdir(state) == ["report.json"]


@pytest.mark.parametrize("after_units", [0, 3])
def test_a_disk_that_becomes_read_only(disk: Path, source: Path, after_units: int) -> None:
    conversion = on(disk, source)

    def remount(how: str) -> None:
        assert command("mount", "-o", f"remount,{how}", str(disk))

    when = after(after_units, lambda: remount("ro")) if after_units else lambda told: remount("ro") if isinstance(told, Ready) else None
    stopped(conversion, when, READ_ONLY)
    remount("rw")
    goes_on(conversion, source, after_units)


def take_permission(path: str) -> tuple[str, str]:
    """Nothing can be created below a directory any more; the system's answer to who tries."""
    if os.geteuid() != 0:
        os.chmod(path, 0o555)
        return DENIED
    if not command("chattr", "+i", path):  # modes do not bind root
        pytest.skip("this file system has no flags")
    return LOCKED


def give_permission(path: str) -> None:
    """And again."""
    if os.geteuid() != 0:
        os.chmod(path, 0o755)
    else:
        command("chattr", "-i", path)


@pytest.mark.parametrize("where", ["stage", "done", "state"])
def test_permission_that_is_lost_midway(tmp_path: Path, source: Path, where: str) -> None:
    conversion = on(tmp_path, source)
    state = conversion.ledger.state
    path = {"stage": f"{conversion.out}.orbax-checkpoint-tmp", "done": f"{state}/done", "state": state}[where]
    os.mkdir(state)
    answer = take_permission(state)
    give_permission(state)
    try:
        if where == "state":  # which the driver needs at the end only, for its report
            with pytest.raises(RunError) as caught:
                conversion.drive(at("close", lambda: take_permission(path)))
            assert (caught.value.problems[0].fact[-len(answer[0]) :], caught.value.problems[0].remedy) == answer
        else:
            assert f"{path}/" in stopped(conversion, after(3, lambda: take_permission(path)), answer)
    finally:
        give_permission(path)
    conversion.drive()
    assert len(conversion.finished()) == (0 if where == "state" else len(conversion.plan.units) - 3)
    assert_complete(conversion, source)


PROGRAM = """
import resource
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
if {limit} >= 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from test_disks import on
from shardconv.errors import ShardconvError
try:
    on(Path({root!r}), Path({source!r})).drive()
except ShardconvError as error:
    print(error)
    sys.exit(int(error.exit_code))
"""


def run_program(root: Path, source: Path, limit: int = -1, **env: str) -> "subprocess.CompletedProcess[str]":
    """The same conversion in a process of its own, under a limit on the size of files (-1: none)."""
    program = PROGRAM.format(tests=str(Path(__file__).parent), root=str(root), source=str(source), limit=limit)
    environment = {**os.environ, "PYTHONPATH": python_path(), **env}
    return subprocess.run([sys.executable, "-c", program], check=False, text=True, capture_output=True, env=environment)


def test_a_limit_on_the_size_of_files(tmp_path: Path, source: Path) -> None:
    plan = on(tmp_path, source).plan
    done = run_program(tmp_path, source, limit=len(plan.to_json()) + 2000)
    assert done.returncode == ExitCode.RESUMABLE, done.stderr
    assert "File too large" in done.stdout
    assert "raise the limit on the size of files (`ulimit -f` shows it), then run the same command again" in done.stdout
    conversion = on(tmp_path, source)
    conversion.drive()
    assert_complete(conversion, source)


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* FAULT is a file with "CALL PATH BEGIN END": that call on a file whose path has PATH in it, at an offset in between, fails with EIO. */
static int fails(const char *call, int fd, off_t at) {
    char want[16], path[512], link[64], real[512];
    long begin, end;
    FILE *fault = fopen(getenv("FAULT"), "r");
    if (!fault) return 0;
    int n = fscanf(fault, "%15s %511s %ld %ld", want, path, &begin, &end);
    fclose(fault);
    if (n != 4 || strcmp(want, call)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, real, sizeof real - 1);
    if (length < 0) return 0;
    real[length] = 0;
    return strstr(real, path) && at >= begin && at < end;
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
ssize_t preadv(int fd, const struct iovec *v, int n, off_t at) {
    if (fails("read", fd, at)) { errno = EIO; return -1; }
    return REAL(preadv)(fd, v, n, at);
}
ssize_t preadv64(int fd, const struct iovec *v, int n, off_t at) {
    if (fails("read", fd, at)) { errno = EIO; return -1; }
    return REAL(preadv64)(fd, v, n, at);
}
ssize_t preadv2(int fd, const struct iovec *v, int n, off_t at, int flags) {
    if (fails("read", fd, at)) { errno = EIO; return -1; }
    return REAL(preadv2)(fd, v, n, at, flags);
}
ssize_t preadv64v2(int fd, const struct iovec *v, int n, off_t at, int flags) {
    if (fails("read", fd, at)) { errno = EIO; return -1; }
    return REAL(preadv64v2)(fd, v, n, at, flags);
}
ssize_t pwrite(int fd, const void *b, size_t n, off_t at) {
    if (fails("write", fd, at)) { errno = EIO; return -1; }
    return REAL(pwrite)(fd, b, n, at);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off_t at) {
    if (fails("write", fd, at)) { errno = EIO; return -1; }
    return REAL(pwrite64)(fd, b, n, at);
}
int fsync(int fd) {
    if (fails("sync", fd, 0)) { errno = EIO; return -1; }
    return REAL(fsync)(fd);
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    if not command("cc", "-shared", "-fPIC", "-o", f"{folder}/shim.so", f"{folder}/shim.c", "-ldl"):
        pytest.skip("there is no C compiler")
    return f"{folder}/shim.so"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("read", "failed: Input/output error"),
        ("write", "Input/output error"),
        ("sync", "Input/output error"),
    ],
)
def test_a_block_that_cannot_be_read_or_written(tmp_path: Path, source: Path, shim: str, call: str, said: str) -> None:
    conversion = on(tmp_path, source)
    tensor = conversion.plan.source.tensors["model.layers.2.mlp.up_proj.weight"]
    fault = tmp_path / "fault"
    fault.write_text(
        f"read {tensor.file} {tensor.offset} {tensor.offset + 4096}" if call == "read" else f"{call} ocdbt.process_u20x 0 4096"
    )
    done = run_program(tmp_path, source, LD_PRELOAD=shim, FAULT=str(fault))
    assert done.returncode == ExitCode.RESUMABLE, done.stderr
    assert done.stdout.startswith("a unit failed 3 times (1 problem):\n  unit ")
    assert said in done.stdout
    assert "run the same command again to go on from the finished units" in done.stdout
    assert ("layers.2.mlp.up_proj" in done.stdout and tensor.file in done.stdout) if call == "read" else "unit 20 " in done.stdout
    assert not conversion.out.exists()
    finished = len(conversion.ledger.finished())
    assert 0 < finished < len(conversion.plan.units)
    fault.unlink()
    goes_on(conversion, source, finished)


def test_the_fault_is_real(tmp_path: Path, shim: str) -> None:
    (tmp_path / "file").write_bytes(bytes(8192))
    (tmp_path / "fault").write_text(f"read {tmp_path}/file 4096 8192")
    program = (
        "import os, sys\nfd = os.open(sys.argv[1], os.O_RDONLY)\nassert os.preadv(fd, [bytearray(9)], 0) == 9\n"
        "os.preadv(fd, [bytearray(9)], 4096)"
    )
    env = {**os.environ, "LD_PRELOAD": shim, "FAULT": str(tmp_path / "fault")}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "file")], check=False, capture_output=True, text=True, env=env)
    assert "OSError: [Errno 5] Input/output error" in done.stderr
