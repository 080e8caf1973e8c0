import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from shardconv.errors import RunError
from shardconv.lock import LIFETIME, Lock, Owner, this_process
from shardconv.run import python_path


def leave(state: Path, owner: Owner, age: float = 0.0) -> None:
    """A lock as its owner left it, last beaten `age` seconds ago."""
    path = state / "lock"
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - age, time.time() - age))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_is_held_and_given_back(tmp_path: Path) -> None:
    with Lock(str(tmp_path)) as lock:
        assert json.loads((tmp_path / "lock").read_text()) == asdict(lock.owner)
        assert lock.owner.pid == os.getpid()
        lock.check()
    assert os.listdir(tmp_path) == []


def test_a_second_run_is_refused_with_the_owner(tmp_path: Path) -> None:
    with Lock(str(tmp_path)) as held, pytest.raises(RunError) as caught:
        Lock(str(tmp_path)).__enter__()
    assert caught.value.exit_code == 5
    assert str(caught.value) == (
        "another run is writing to this output (1 problem):\n"
        f"  {tmp_path}/lock is held by pid {held.owner.pid} on {held.owner.host}, last heartbeat 0 s ago\n"
        "      wait for it or stop it; a lock without a heartbeat for 60 s is taken over"
    )


def test_a_refused_run_leaves_the_lock_alone(tmp_path: Path) -> None:
    with Lock(str(tmp_path)) as held:
        with pytest.raises(RunError), Lock(str(tmp_path)):
            pass
        held.check()
        assert os.listdir(tmp_path) == ["lock"]


def test_a_run_in_another_process_is_refused(tmp_path: Path) -> None:
    program = f"from shardconv.lock import Lock\nwith Lock({str(tmp_path)!r}): pass"
    environment = {**os.environ, "PYTHONPATH": python_path()}
    with Lock(str(tmp_path)):
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert f"is held by pid {os.getpid()} on " in done.stderr


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    leave(tmp_path, replace(this_process(), pid=dead_pid()))
    with Lock(str(tmp_path)) as lock:
        lock.check()
        assert lock.taken_from is not None
    assert os.listdir(tmp_path) == []


def test_a_pid_that_another_process_has_now_is_dead(tmp_path: Path) -> None:
    owner = this_process()
    assert owner.started > 0
    leave(tmp_path, replace(owner, started=owner.started - 1))
    with Lock(str(tmp_path)) as lock:
        lock.check()


def test_a_living_process_with_fresh_beats_is_not_robbed(tmp_path: Path) -> None:
    leave(tmp_path, this_process(), age=LIFETIME - 10)
    with pytest.raises(RunError, match="last heartbeat 50 s ago"):
        Lock(str(tmp_path)).__enter__()


@pytest.mark.parametrize(("age", "taken"), [(LIFETIME - 10, False), (LIFETIME + 10, True)])
def test_another_hosts_lock_is_judged_by_its_beats_alone(tmp_path: Path, age: float, taken: bool) -> None:
    leave(tmp_path, replace(this_process(), host="elsewhere", pid=dead_pid()), age)
    if taken:
        with Lock(str(tmp_path)) as lock:
            lock.check()
    else:
        with pytest.raises(RunError, match=r"is held by pid \d+ on elsewhere, last heartbeat 50 s ago"):
            Lock(str(tmp_path)).__enter__()


def test_a_lock_that_cannot_be_read_is_judged_by_its_age(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("")
    with pytest.raises(RunError, match="an unknown host"):
        Lock(str(tmp_path)).__enter__()
    os.utime(tmp_path / "lock", (0, 0))
    with Lock(str(tmp_path)) as lock:
        lock.check()


def test_of_many_runs_that_see_one_dead_owner_one_wins(tmp_path: Path) -> None:
    for _ in range(20):
        leave(tmp_path, replace(this_process(), pid=dead_pid()))
        locks = [Lock(str(tmp_path)) for _ in range(6)]
        won: list[Lock] = []
        barrier = threading.Barrier(len(locks))

        def enter(lock: Lock, won: list[Lock] = won, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with suppress(RunError):
                won.append(lock.__enter__())

        threads = [threading.Thread(target=enter, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].check()
        won[0].__exit__(None, None, None)
        assert os.listdir(tmp_path) == []


def test_an_owner_that_was_frozen_finds_out(tmp_path: Path) -> None:
    with Lock(str(tmp_path)) as frozen:
        os.utime(tmp_path / "lock", (0, 0))
        with Lock(str(tmp_path)) as other:
            with pytest.raises(RunError) as caught:
                frozen.check()
            assert str(caught.value) == (
                "another run has taken over this output (1 problem):\n"
                f"  {tmp_path}/lock was ours (pid {os.getpid()} on {frozen.owner.host})"
                f" and is now held by pid {other.owner.pid} on {other.owner.host}\n"
                "      let that run finish"
            )
            other.check()


def test_an_owner_that_was_robbed_leaves_the_others_lock(tmp_path: Path) -> None:
    with Lock(str(tmp_path)) as frozen:
        os.utime(tmp_path / "lock", (0, 0))
        other = Lock(str(tmp_path)).__enter__()
    other.check()
    other.__exit__(None, None, None)
    assert frozen.owner != other.owner
    assert os.listdir(tmp_path) == []


def test_drafts_of_processes_that_died_go_with_the_lock(tmp_path: Path) -> None:
    (tmp_path / "lock.0123456789abcdef.tmp").write_text("{")
    with Lock(str(tmp_path)):
        pass
    assert os.listdir(tmp_path) == []


def test_beats_keep_a_lock_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardconv.lock.BEAT", 0.05)
    with Lock(str(tmp_path)):
        os.utime(tmp_path / "lock", (0, 0))
        time.sleep(0.3)
        assert time.time() - os.stat(tmp_path / "lock").st_mtime < 10
