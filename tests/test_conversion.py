import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conversions import make_config, make_source

from shardconv.config import Config, RunOptions
from shardconv.conversion import request_of, run
from shardconv.errors import ConfigError, RunError
from shardconv.ledger import Ledger
from shardconv.planning import plan_from_config, worker_budget
from shardconv.run import python_path
from shardconv.run.job import state_path
from shardconv.run.preflight import prepare


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tmp_path: Path, source: Path) -> Config:
    return make_config(tmp_path, source)


def options(verbosity: int = 0, json_logs: bool = False) -> RunOptions:
    return RunOptions(restart=False, overwrite=False, verbosity=verbosity, json_logs=json_logs)


def test_a_run_shows_a_summary_and_leaves_the_report(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(config, options())
    said = capsys.readouterr()
    assert said.out.splitlines()[0].startswith(f"checkpoint  {config.output.path}, ")
    assert said.err == "workers: this process, 1 at a time\n"
    assert json.loads(Path(state_path(config.output.path), "report.json").read_text()) == found
    assert (found["read_amplification"], found["bytes_read"]) == (1.0, found["source_bytes"])
    assert 1.0 <= float(str(found["write_amplification"])) < 1.05  # a megabyte's metadata still shows
    assert set(found["stages"]) == {"plan", "prepare", "start", "units", "commit", "check", "close"}  # type: ignore[call-overload]


def test_quiet_is_quiet(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run(config, options(verbosity=-1))
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_json_logs_end_with_the_report(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(config, options(json_logs=True))
    said = capsys.readouterr()
    assert said.out == ""
    events = [json.loads(text) for text in said.err.splitlines()]
    assert [e["name"] for e in events if e["event"] == "stage"] == ["plan", "prepare", "start", "units", "commit", "check", "close"]
    last = events[-1]
    assert last.pop("event") == "report" and last.pop("time")
    assert last == found


def test_a_resumed_run_keeps_the_budget_that_the_first_one_chose(tmp_path: Path, source: Path) -> None:
    config = make_config(tmp_path, source, "workers.memory_budget=auto")
    (tmp_path / "out.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(ConfigError):
        run(config, options())
    (tmp_path / "out.orbax-checkpoint-tmp").rmdir()
    first = worker_budget(config)
    job = begin(config)
    data = json.loads(job.read_text())
    assert abs(data["header"]["budget"] - first) < first / 2
    data["header"]["budget"] = 10_000_000  # as if another machine had begun it
    job.write_text(json.dumps(data))
    assert run(config, options())["memory_budget_bytes"] == 10_000_000


def test_a_run_with_more_memory_goes_on_with_the_chunks_of_less(tmp_path: Path, source: Path) -> None:
    less = make_config(tmp_path, source, "workers.memory_budget=300KiB")
    begin(less)
    more = make_config(tmp_path, source, "workers.memory_budget=64MiB")
    assert plan_from_config(more).digest() != (digest := plan_from_config(less).digest())
    assert run(more, options())["memory_budget_bytes"] == 64 << 20
    metadata = json.loads((tmp_path / "out" / "_METADATA").read_text())
    assert metadata["custom_metadata"]["shardconv"]["plan"] == digest


def test_a_run_with_less_memory_goes_on_where_the_chunks_fit_it(tmp_path: Path, source: Path) -> None:
    job = begin(make_config(tmp_path, source))
    with pytest.raises(ConfigError) as caught:
        run(make_config(tmp_path, source, "workers.memory_budget=300KiB"), options())
    assert str(caught.value) == (
        f"{tmp_path}/out was begun with another config, source or version (1 problem):\n"
        '  workers.memory_budget was "64MiB", is "300KiB"\n'
        "      go back to what it was, or use --restart to discard the 0 finished units"
    )
    less = make_config(tmp_path, source, "workers.memory_budget=500KiB")  # exactly what the largest chunk takes
    prepare(request_of(less, options()), plan_from_config(make_config(tmp_path, source)), Ledger(state_path(less.output.path)))
    assert json.loads(job.read_text())["header"]["budget"] == 64 << 20  # so that the next run makes the same chunks
    assert run(less, options())["memory_budget_bytes"] == 500 << 10


def test_an_error_is_an_event_too(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError) as caught:
        run(make_config(tmp_path, source), options(json_logs=True))
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (last["event"], last["code"], last["message"]) == ("error", 2, str(caught.value))


def begin(config: Config) -> Path:
    """Begin the conversion and break it off before the first unit; the path of its job."""
    program = f"""
import sys
from shardconv.config import Config, RunOptions
from shardconv.conversion import request_of
from shardconv.ledger import Ledger
from shardconv.planning import plan_from_config
from shardconv.run.job import state_path
from shardconv.run.preflight import prepare
config = Config.model_validate_json({config.model_dump_json()!r})
ledger = Ledger(state_path(config.output.path))
ledger.create()
prepare(request_of(config, RunOptions(False, False, 0, False)), plan_from_config(config), ledger)
"""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    return Path(Ledger(state_path(config.output.path)).job_path)


def test_a_failed_run_raises_its_report(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(state_path(config.output.path))
    ledger.create()
    from shardconv.lock import Lock

    with Lock(ledger.state), pytest.raises(RunError, match="another run is writing to this output"):
        run(config, options())
    assert capsys.readouterr().out == ""
