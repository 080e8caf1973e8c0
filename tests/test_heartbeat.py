import json
import os
from pathlib import Path

import numpy as np
import pytest

from shardconv.run import Patience, Waiting
from shardconv.run.heartbeat import EVERY, LOOK, Heartbeat, Pulse, bury, memory, read_workers


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def heartbeat(tmp_path: Path, clock: Clock) -> Heartbeat:
    return Heartbeat(str(tmp_path), clock)


def pulse(tmp_path: Path, clock: Clock) -> Pulse:
    return Pulse(str(tmp_path), Patience(name_after=60, give_up_after=600), clock)


def test_a_worker_says_who_it_is_and_what_it_does(tmp_path: Path, heartbeat: Heartbeat, clock: Clock) -> None:
    heartbeat.begin(5)
    clock.now += EVERY
    heartbeat.tick(100)
    (worker,) = read_workers(str(tmp_path))
    assert (worker.pid, worker.unit, worker.unit_bytes) == (os.getpid(), 5, 100)
    assert worker.name == f"pid {os.getpid()} on {worker.host}"
    assert os.listdir(tmp_path) == [f"{worker.host}-{os.getpid()}.json"]
    heartbeat.end()
    assert read_workers(str(tmp_path))[0].unit is None


def test_beats_are_rare(tmp_path: Path, heartbeat: Heartbeat, clock: Clock) -> None:
    heartbeat.begin(0)
    for _ in range(100):
        clock.now += EVERY / 10
        heartbeat.tick(1)
    (worker,) = read_workers(str(tmp_path))
    assert 9 <= worker.beat <= 11
    assert worker.unit_bytes >= 90


def test_memory_is_the_kernels_count() -> None:
    before, _ = memory()
    block = np.ones(64 * 2**20, np.uint8)
    held, peak = memory()
    assert 60 * 2**20 < held - before < 70 * 2**20
    del block
    # The kernel counts per processor and adds up now and then.
    assert peak > held - 2**20
    assert memory()[0] < held - 60 * 2**20
    assert memory()[1] > held - 2**20


def test_silence_is_named_once_a_minute_and_given_up_in_the_end(tmp_path: Path, heartbeat: Heartbeat, clock: Clock) -> None:
    watch = pulse(tmp_path, clock)
    heartbeat.begin(5)
    flying = {5: clock.now}
    said, lost_at = [], None
    start = clock.now
    while lost_at is None:
        clock.now += LOOK
        waiting, lost = watch.check(flying)
        said += [(round(clock.now - start), w.where) for w in waiting]
        lost_at = clock.now - start if lost else None
    where = f"pid {os.getpid()} on {read_workers(str(tmp_path))[0].host}"
    # The first look sees the worker for the first time, so the silence counts from there.
    assert said == [(LOOK + 60 * n, where) for n in range(1, 10)]
    assert lost_at == LOOK + 600


def test_a_worker_that_beats_is_not_silent(tmp_path: Path, heartbeat: Heartbeat, clock: Clock) -> None:
    watch = pulse(tmp_path, clock)
    heartbeat.begin(5)
    begun = clock.now
    for _ in range(1000):
        clock.now += LOOK
        heartbeat.tick(1)
        assert watch.check({5: begun}) == ((), ())


def test_a_unit_that_waits_for_a_busy_worker_is_not_silent(tmp_path: Path, heartbeat: Heartbeat, clock: Clock) -> None:
    watch = pulse(tmp_path, clock)
    heartbeat.begin(5)
    begun = clock.now
    for _ in range(1000):
        clock.now += LOOK
        heartbeat.tick(1)
        assert watch.check({5: begun, 6: begun}) == ((), ())


def test_a_unit_that_no_worker_ever_begins_is_silent(tmp_path: Path, clock: Clock) -> None:
    watch = pulse(tmp_path, clock)
    begun = clock.now
    clock.now += 61
    waiting, _ = watch.check({5: begun})
    assert waiting == (Waiting(5, 61, "no worker has begun it"),)


def test_clocks_of_other_hosts_do_not_matter(tmp_path: Path, heartbeat: Heartbeat, clock: Clock) -> None:
    heartbeat.begin(5)
    (path,) = tmp_path.iterdir()
    os.utime(path, (0, 0))
    watch = pulse(tmp_path, clock)
    clock.now += LOOK
    assert watch.check({5: clock.now}) == ((), ())


def test_a_dead_worker_loses_its_unit_and_keeps_its_figures(tmp_path: Path, heartbeat: Heartbeat) -> None:
    heartbeat.begin(5)
    before = read_workers(str(tmp_path))[0]
    assert bury(str(tmp_path), 6) is None
    assert bury(str(tmp_path), 5) == before
    after = read_workers(str(tmp_path))[0]
    assert (after.unit, after.rss) == (None, 0)
    assert (after.peak_rss, after.cpu_seconds) == (before.peak_rss, before.cpu_seconds)


def test_what_is_not_a_heartbeat_is_left_out(tmp_path: Path, heartbeat: Heartbeat) -> None:
    heartbeat.begin(5)
    (tmp_path / "12-1.log").write_text("a worker's words")
    (tmp_path / "host-1.json.99.tmp").write_text(json.dumps({}))
    assert len(read_workers(str(tmp_path))) == 1


def test_who_looks_while_a_run_tidies_up_sees_nobody(tmp_path: Path) -> None:
    assert read_workers(str(tmp_path / "gone")) == ()
