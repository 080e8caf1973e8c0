import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from shardconv.progress import STAGES, JsonLines, Lines, Screen, Tally, amount, line, message, screen, span
from shardconv.run import Began, Finished, Note, Ready, Retried, Stage, Waiting, python_path
from shardconv.run.heartbeat import Heartbeat, WorkerState, tell_compared

GB = 10**9


def worker(unit: int | None = None, done: int = 0, rss: int = 200_000_000, pid: int = 7) -> WorkerState:
    return WorkerState("host", pid, 1, unit, done, 1.5, rss, 300_000_000)


def finished(unit: int) -> Finished:
    return Finished(unit, f"u{unit}x1", 10, GB, 3, 0.5, 300_000_000, 7, "host")


def began(resumed: frozenset[int] = frozenset(), workers: str = "") -> Began:
    return Began((GB, GB, GB, GB), resumed, workers, budget=500_000_000)


@pytest.fixture
def tally() -> Tally:
    tally = Tally()
    for told in (began(), Ready(2, "2 processes"), Stage("units")):
        tally.hear(told)
    return tally


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1000, "1.00 kB"), (99_949, "99.9 kB"), (10**10, "10.0 GB"), (2.5e12, "2.50 TB")]
)
def test_amounts(nbytes: float, text: str) -> None:
    assert amount(nbytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min")])
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_units_and_what_is_on_its_way_count_as_done(tally: Tally) -> None:
    tally.hear(finished(0))
    progress = tally.progress(0.0, [worker(1, GB // 2), worker(2, 5 * GB), worker(0, GB), worker(None)])
    assert progress.done_bytes == GB + GB // 2 + GB  # a worker cannot be further than its unit is large; unit 0 counts once
    assert (progress.units_done, progress.units, progress.total_bytes) == (1, 4, 4 * GB)


def test_the_rate_is_of_the_last_half_minute(tally: Tally) -> None:
    assert tally.progress(0.0, []).seconds_left is None
    tally.hear(finished(0))
    progress = tally.progress(10.0, [])
    assert (progress.bytes_per_second, progress.seconds_left) == (GB / 10, 30.0)
    for second in range(11, 200):
        progress = tally.progress(float(second), [])
    assert progress.bytes_per_second == 0.0
    tally.hear(finished(1))
    assert tally.progress(200.0, []).bytes_per_second == pytest.approx(GB / 30, rel=0.05)


def test_what_earlier_runs_did_is_done_but_no_speed() -> None:
    tally = Tally()
    tally.hear(began(resumed=frozenset({0, 1, 2})))
    assert tally.progress(0.0, []).done_bytes == 3 * GB
    tally.hear(finished(3))
    assert tally.progress(10.0, []).bytes_per_second == GB / 10


def test_the_line_of_a_log(tally: Tally) -> None:
    tally.progress(0.0, [])
    tally.hear(finished(0))
    workers = [worker(1, GB // 2), worker(None, pid=8)]
    assert line(tally, tally.progress(10.0, workers), workers) == (
        "converting: 1.50 GB of 4.00 GB (37%), 1 of 4 units, 150.0 MB/s, 17 s left, "
        "1 of 2 workers busy, the heaviest 300.0 MB (buffers may take 500.0 MB)"
    )


def test_what_is_worth_saying() -> None:
    assert message(began(), verbose=False) is None
    assert message(began(frozenset({1, 2})), verbose=False) == "going on: 2 of 4 units are finished already"
    assert message(finished(1), verbose=False) is None
    assert message(finished(1), verbose=True) == "unit 1: 1.00 GB in 0.50 s (2.00 GB/s), pid 7 on host"
    assert message(Retried(3, 1, "OSError: x", "Traceback"), verbose=False) == "unit 3 failed (OSError: x); it is tried again (2 of 3)"
    assert message(Retried(3, 1, "OSError: x", "Traceback"), verbose=True) == (
        "unit 3 failed (OSError: x); it is tried again (2 of 3)\nTraceback"
    )
    assert message(Waiting(12, 61.0, "pid 7 on host-3"), verbose=False) == "nothing heard of unit 12 for 61 s (pid 7 on host-3)"
    assert message(Note("a note"), verbose=False) == "a note"
    assert message(Stage("units"), verbose=True) is None


def test_a_log_has_messages_and_heartbeats(tmp_path: Path) -> None:
    out = io.StringIO()
    view = Lines(Console(file=out, width=200), verbose=False)
    Heartbeat(str(tmp_path)).begin(1)
    for told in (began(frozenset({0}), str(tmp_path)), Stage("units"), Ready(2, "2 processes")):
        view.hear(told)
    view.beat()
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["going on: 1 of 4 units are finished already", "workers: 2 processes, 2 at a time"]
    assert lines[2].startswith("converting: 1.00 GB of 4.00 GB (25%), 1 of 4 units, 1 of 1 workers busy, the heaviest ")


def test_json_logs_are_one_object_per_line(tmp_path: Path) -> None:
    out = io.StringIO()
    view = JsonLines(Console(file=out), verbose=False)
    Heartbeat(str(tmp_path)).begin(1)
    for told in (began(workers=str(tmp_path)), Stage("units"), finished(0), Retried(3, 1, "a\nb")):
        view.hear(told)
    view.beat()
    records = [json.loads(text) for text in out.getvalue().splitlines()]
    assert [record["event"] for record in records] == ["began", "stage", "finished", "retried", "progress"]
    assert all(record["time"] > 1.7e9 for record in records)
    assert (records[0]["units"], records[0]["bytes"]) == (4, 4 * GB)
    assert (records[4]["stage"], records[4]["done_bytes"], records[4]["workers"][0]["pid"]) == ("units", GB, os.getpid())


def test_the_check_has_bytes_and_a_rate_of_its_own(tmp_path: Path) -> None:
    out = io.StringIO()
    lines, records = Lines(Console(file=out, width=200), verbose=False), JsonLines(Console(file=out), verbose=False)
    for view in (lines, records):
        for told in (began(workers=str(tmp_path)), Stage("units"), *map(finished, range(4)), Stage("check")):
            view.hear(told)
    out.truncate(0)
    tell_compared(str(tmp_path), 0, 4 * GB)
    lines.beat()
    records.beat()
    tell_compared(str(tmp_path), GB, 4 * GB)
    lines.beat()
    records.beat()
    first, zero, second, one = out.getvalue().lstrip("\0").splitlines()
    assert first == "comparing: 0 B of 4.00 GB (0%)"
    assert re.fullmatch(r"comparing: 1\.00 GB of 4\.00 GB \(25%\), [0-9.]+ [GT]B/s, 0 s left", second)
    assert [json.loads(text)["done_bytes"] for text in (zero, one)] == [0, GB]
    found = json.loads(one)
    assert (found["event"], found["stage"], found["total_bytes"], found["workers"]) == ("progress", "check", 4 * GB, [])
    assert found["bytes_per_second"] > GB


def test_the_rate_of_the_check_is_not_that_of_the_units(tally: Tally) -> None:
    tally.progress(0.0, [])
    for unit in range(4):
        tally.hear(finished(unit))
    tally.progress(10.0, [])
    tally.hear(Stage("check"))
    assert tally.comparing(11.0, 0, 4 * GB).bytes_per_second == 0.0
    progress = tally.comparing(13.0, GB, 4 * GB)
    assert (progress.bytes_per_second, progress.seconds_left) == (GB / 2, 6.0)
    out = io.StringIO()
    Console(file=out, width=120).print(screen(tally, progress, []))
    assert re.search(r"comparing +\S+ +1\.00 GB of 4\.00 GB +500\.0 MB/s +6 s left", out.getvalue())


def test_the_screen_shows_bar_rate_and_workers(tally: Tally) -> None:
    tally.progress(0.0, [])
    tally.hear(finished(0))
    workers = [worker(1, GB // 2), *(worker(None, pid=pid) for pid in range(10, 20)), worker(2, rss=0, pid=99)]
    out = io.StringIO()
    Console(file=out, width=160).print(screen(tally, tally.progress(10.0, workers), workers))
    text = out.getvalue()
    assert re.search(r"converting +\S+ +1\.50 GB of 4\.00 GB +150\.0 MB/s +17 s left +1 of 4 units", text)
    assert "peak, of 500.0 MB + 0.1 GB" in text
    assert re.search(r"pid 7 on host +1 +50% +200\.0 MB +300\.0 MB", text)
    assert re.search(r"pid 10 on host +idle +200\.0 MB", text)
    assert "and 3 more" in text  # eleven live workers, eight rows
    assert "pid 99" not in text  # a dead one has no memory


def test_before_the_units_the_screen_says_what_it_waits_for() -> None:
    view = Screen(Console(file=io.StringIO()), verbose=False)
    view.hear(Stage("start"))
    out = io.StringIO()
    Console(file=out, width=160).print(view.render())
    assert "starting workers" in out.getvalue()


WATCHED = """
import sys, time
from shardconv.progress import watching
from shardconv.run import Note, Stage
with watching(quiet={quiet}, verbose=False, json_logs={json_logs}) as view:
    view.hear(Stage("start")); view.hear(Note("hello")); time.sleep(0.6)
"""


def watched(quiet: bool, json_logs: bool, terminal: bool) -> str:
    """What a program that watches writes to stderr, as a terminal or as a pipe."""
    program = WATCHED.format(quiet=quiet, json_logs=json_logs)
    environment = {**os.environ, "PYTHONPATH": python_path(), "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-W", "error", "-c", program]
    if not terminal:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    ours, theirs = pty.openpty()
    subprocess.run(command, env=environment, stderr=theirs, check=True)
    os.close(theirs)
    text = os.read(ours, 1 << 20).decode()
    os.close(ours)
    return text


def test_the_view_fits_where_it_goes() -> None:
    assert watched(quiet=True, json_logs=False, terminal=False) == ""
    assert watched(quiet=False, json_logs=False, terminal=False) == "hello\n"
    assert [json.loads(text)["event"] for text in watched(False, True, False).splitlines()] == ["stage", "note"]
    live = watched(quiet=False, json_logs=False, terminal=True)
    assert "hello" in live and "starting workers" in live and "\x1b[" in live


@pytest.mark.parametrize("stage", ["prepare", "start", "commit", "check", "close"])
def test_the_bar_of_a_stage_without_a_rate_fits_80_columns(tally: Tally, stage: str) -> None:
    tally.hear(Stage(stage))
    out = io.StringIO()
    Console(file=out, width=80).print(screen(tally, tally.progress(0.0, []), []))
    assert len(out.getvalue().splitlines()) == 1
    assert STAGES[stage] in out.getvalue()


def test_a_stage_is_shown_with_its_own_numbers() -> None:
    out = io.StringIO()
    console = Console(file=out, width=160)
    view = Screen(console, verbose=False)
    view.hear(began())
    view.hear(Stage("units"))
    console.print(view.render())
    for unit in range(4):
        view.hear(finished(unit))
    view.hear(Stage("commit"))
    console.print(view.render())
    assert re.search(r"committing .* 4\.00 GB of 4\.00 GB .* 4 of 4 units", out.getvalue())
