import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conversions import make_config, make_source

from shardconv.config import Config, RunOptions
from shardconv.conversion import run
from shardconv.errors import ConfigError, RunError
from shardconv.ledger import Ledger
from shardconv.planning import worker_budget
from shardconv.run import python_path
from shardconv.run.job import state_path


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
