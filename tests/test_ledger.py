import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from shardconv.errors import InputError
from shardconv.ledger import Header, Ledger, SourceMark, differences, refusal, write_atomically

MARK = SourceMark(size=1000, mtime_ns=1_700_000_000_000_000_000, header_digest="ab" * 16)
HEADER = Header(
    version="1.0",
    orbax="0.11.40",
    digest="d1" * 16,
    root="/data/llama",
    files={"a.safetensors": MARK, "b.safetensors": MARK},
    settings={"target.dtype": "bfloat16", "target.scan_layers": True},
    budget=2**30,
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(str(tmp_path / "out.shardconv"))
    ledger.create()
    return ledger


def said(previous: Header, present: Header) -> list[str]:
    return [str(difference) for difference in differences(previous, present)]


def test_a_record_is_read_back(ledger: Ledger) -> None:
    assert ledger.finished() == {}
    assert ledger.record(7, {"attempt": "u7xab", "bytes": 5}) == {"attempt": "u7xab", "bytes": 5}
    assert ledger.finished() == {7: {"attempt": "u7xab", "bytes": 5}}


def test_the_first_record_of_a_unit_wins_and_the_second_learns_it(ledger: Ledger) -> None:
    ledger.record(7, {"attempt": "first"})
    assert ledger.record(7, {"attempt": "second"}) == {"attempt": "first"}
    assert ledger.finished() == {7: {"attempt": "first"}}
    assert os.listdir(os.path.join(ledger.state, "done")) == ["7.json"]


def test_of_many_attempts_at_once_all_agree_on_one_winner(ledger: Ledger) -> None:
    winners = []
    threads = [threading.Thread(target=lambda n=n: winners.append(ledger.record(3, {"attempt": n})["attempt"])) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(winners)) == 1
    assert ledger.finished()[3]["attempt"] == winners[0]


def test_a_damaged_record_counts_as_not_finished_and_goes(ledger: Ledger) -> None:
    ledger.record(1, {"attempt": "u1xab"})
    for unit, text in ((2, ""), (3, '{"attempt": "u3'), (4, "[]")):
        Path(ledger.state, "done", f"{unit}.json").write_text(text)
    assert set(ledger.finished()) == {1}
    assert os.listdir(os.path.join(ledger.state, "done")) == ["1.json"]


def test_files_of_a_write_that_was_cut_short_are_no_records(ledger: Ledger) -> None:
    Path(ledger.state, "done", "5.json.1234.tmp").write_text('{"attempt": "u5"}')
    assert ledger.finished() == {}


def test_a_forgotten_unit_is_not_finished(ledger: Ledger) -> None:
    ledger.record(1, {})
    ledger.forget(1)
    assert ledger.finished() == {}


def test_the_header_and_the_job_are_read_back(ledger: Ledger) -> None:
    assert ledger.header() is None
    ledger.begin(HEADER, {"stage": "/out/stage"}, b'{"units": []}')
    assert ledger.header() == HEADER
    assert ledger.job() == {"stage": "/out/stage"}
    assert Path(ledger.plan_path).read_bytes() == b'{"units": []}'


def test_a_state_that_cannot_be_read_is_a_report(ledger: Ledger) -> None:
    Path(ledger.job_path).write_text('{"schema": 99}')
    with pytest.raises(InputError) as caught:
        ledger.header()
    assert str(caught.value) == (
        "the state of an earlier run cannot be read (1 problem):\n"
        f"  {ledger.job_path}: its schema is 99, this shardconv's is 2\n"
        "      use --restart to discard what was begun"
    )
    Path(ledger.job_path).write_text("{")
    with pytest.raises(InputError, match="the state of an earlier run cannot be read"):
        ledger.header()


def test_after_success_only_the_report_and_the_owners_lock_are_left(ledger: Ledger) -> None:
    ledger.begin(HEADER, {}, b"{}")
    ledger.record(0, {})
    for path in (ledger.workers + "/host-1.json", ledger.state + "/lock", ledger.state + "/stray"):
        Path(path).write_text("{}")
    ledger.close('{"wall_seconds": 1}')
    assert sorted(os.listdir(ledger.state)) == ["lock", "report.json"]
    assert json.loads(Path(ledger.report_path).read_text()) == {"wall_seconds": 1}


def test_discarding_leaves_the_lock_and_a_ledger_that_can_begin(ledger: Ledger) -> None:
    ledger.begin(HEADER, {}, b"{}")
    ledger.record(0, {})
    Path(ledger.state, "lock").write_text("{}")
    ledger.discard()
    assert ledger.header() is None and ledger.finished() == {}
    assert sorted(os.listdir(ledger.state)) == ["done", "lock", "workers"]


def test_atomic_writing_replaces_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("one", "two"):
        write_atomically(str(path), text, durable=True)
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["file"]


def test_the_same_run_differs_in_nothing(ledger: Ledger) -> None:
    assert said(HEADER, HEADER) == []
    assert said(HEADER, replace(HEADER, budget=5)) == []


def test_changed_settings_are_named_with_both_values() -> None:
    now = replace(HEADER, settings={"target.dtype": "float32", "output.zarr": 2}, digest="d2" * 16)
    assert said(HEADER, now) == [
        "output.zarr was null, is 2",
        'target.dtype was "bfloat16", is "float32"',
        "target.scan_layers was true, is null",
    ]


def test_changed_source_files_are_named_with_what_changed() -> None:
    files = {"a.safetensors": replace(MARK, size=1200), "c.safetensors": MARK}
    assert said(HEADER, replace(HEADER, files=files, digest="d2" * 16)) == [
        "source file a.safetensors was 1,000 bytes, is 1,200 bytes",
        "source file b.safetensors was present, is absent",
        "source file c.safetensors was absent, is present",
    ]
    files = {**HEADER.files, "b.safetensors": replace(MARK, header_digest="cd" * 16)}
    assert said(HEADER, replace(HEADER, files=files)) == [
        "source file b.safetensors was header abababababab, is header cdcdcdcdcdcd"
    ]


def test_a_file_written_again_in_place_is_another_source_a_copy_elsewhere_is_not() -> None:
    files = {**HEADER.files, "a.safetensors": replace(MARK, mtime_ns=MARK.mtime_ns + 1)}
    assert said(HEADER, replace(HEADER, files=files)) == [
        "source file a.safetensors was modified 2023-11-14 22:13:20.000000000 UTC, is modified 2023-11-14 22:13:20.000000001 UTC"
    ]
    assert said(HEADER, replace(HEADER, files=files, root="/mnt/copy")) == []


def test_another_version_is_a_difference_also_where_the_plan_is_the_same() -> None:
    assert said(HEADER, replace(HEADER, version="1.1", orbax="0.12.0")) == [
        "shardconv was 1.0, is 1.1",
        "orbax-checkpoint was 0.11.40, is 0.12.0",
    ]


def test_another_plan_is_named_where_nothing_else_tells_it() -> None:
    now = replace(HEADER, digest="d2" * 16)
    assert said(HEADER, now) == ["plan was d1d1d1d1d1d1, is d2d2d2d2d2d2"]
    assert said(HEADER, replace(now, version="1.1")) == ["shardconv was 1.0, is 1.1"]


def test_the_refusal_says_what_changed_and_what_is_at_stake() -> None:
    now = replace(HEADER, settings={**HEADER.settings, "target.dtype": "float32"})
    report = refusal("/out", differences(HEADER, now), finished=37)
    assert report.exit_code == 2
    assert str(report) == (
        "/out was begun with another config, source or version (1 problem):\n"
        '  target.dtype was "bfloat16", is "float32"\n'
        "      go back to what it was, or use --restart to discard the 37 finished units"
    )
    assert report.problems[0].remedy.replace("37 finished units", "1 finished unit") == (
        refusal("/out", differences(HEADER, now), finished=1).problems[0].remedy
    )


def test_another_source_is_the_inputs_fault_and_another_config_the_configs() -> None:
    files = replace(HEADER, files={"a.safetensors": MARK})
    both = replace(files, settings={**HEADER.settings, "target.dtype": "float32"})
    codes = [refusal("/out", differences(HEADER, now), finished=0).exit_code for now in (files, both, replace(HEADER, digest="d2"))]
    assert codes == [3, 2, 2]


def test_a_long_list_of_differences_is_cut() -> None:
    files = {f"{n:02}.safetensors": MARK for n in range(40)}
    report = refusal("/out", differences(replace(HEADER, files={}), replace(HEADER, files=files)), finished=1)
    assert len(report.problems) == 13
    assert str(report).splitlines()[-2] == "  and 28 more"
