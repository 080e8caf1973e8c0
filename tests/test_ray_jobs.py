"""`ray job submit`: from a clean directory to a cluster with a dashboard and a token; stopped, and gone on with under another id."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from conversions import make_config, make_source, restored, stored
from ray_nodes import free_port, nodes
from slow_units import HELD, holding

pytest.importorskip("ray")
pytest.importorskip("aiohttp_cors", reason='the dashboard needs "ray[default]"')

HERE = Path(__file__).parent
TOKEN = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address; the cluster's node was started in a directory called `started_here`."""
    port = free_port()
    here = tmp_path_factory.mktemp("started_here")
    with nodes(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, PYTHONPATH=f"{HERE}:{HERE.parent}") as cluster:
        cluster.start("--num-cpus=2", "--include-dashboard=true", f"--dashboard-port={port}", cwd=str(here))
        yield f"http://127.0.0.1:{port}"


def ray_job(*words: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "job", *words],
        cwd=cwd,
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def submit(
    dashboard: str, name: str, cwd: Path, *words: str, wait: bool = True, variables: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """A job whose entrypoint is `shardconv run config.toml`, with slow units, from a directory with nothing in it but the config."""
    options = ["submit", "--address", dashboard, "--submission-id", name, "--working-dir", "."]
    if variables:
        options += ["--runtime-env-json", json.dumps({"env_vars": variables})]
    entrypoint = [sys.executable, str(HERE / "slow_command.py"), "run", "config.toml", *words]
    return ray_job(*options, *(() if wait else ("--no-wait",)), "--", *entrypoint, cwd=cwd)


@pytest.fixture
def clean(source: Path, tmp_path: Path) -> Path:
    """A directory with a config of absolute paths in it, and nothing else."""
    (tmp_path / "clean").mkdir()
    make_config(tmp_path, source)
    (tmp_path / "config.toml").rename(tmp_path / "clean" / "config.toml")
    return tmp_path / "clean"


RAY = ("--executor", "ray", "--set", "workers.count=0")


def test_a_job_from_a_clean_directory_is_stopped_and_another_goes_on(dashboard: str, source: Path, clean: Path) -> None:
    hold = clean.parent / "hold"
    hold.touch()
    assert submit(dashboard, "first", clean, *RAY, wait=False).returncode == 0
    deadline = time.monotonic() + 60
    while not holding(clean.parent):
        assert time.monotonic() < deadline, ray_job("logs", "--address", dashboard, "first", cwd=clean).stdout
        time.sleep(0.1)
    assert ray_job("stop", "--address", dashboard, "first", cwd=clean).returncode == 0
    hold.unlink()
    said = ray_job("logs", "--address", dashboard, "first", cwd=clean).stdout
    assert "interrupted: " in said and "run the same command again to go on" in said

    again = submit(dashboard, "first", clean, *RAY)
    assert again.returncode == 1 and "already exists" in again.stdout + again.stderr
    second = submit(dashboard, "second", clean, *RAY)
    assert second.returncode == 0, second.stdout
    report = json.loads((clean.parent / "out.shardconv" / "report.json").read_text())
    assert report["units"]["resumed"] >= HELD and report["check"]["equal"]
    assert report["executor"].startswith("Ray on ")
    assert sorted(map(len, restored(clean.parent / "out").values())) == sorted(map(len, stored(source).values()))
    assert os.listdir(clean) == ["config.toml"]


def test_what_a_job_fails_with_is_in_its_log_alone(dashboard: str, clean: Path) -> None:
    failed = submit(dashboard, "failed", clean, "--set", "source.path=nowhere")
    assert failed.returncode == 1  # whatever the code of shardconv was
    assert "exit code 3" in failed.stdout and "nowhere" in failed.stdout
    status = ray_job("status", "--address", dashboard, "failed", cwd=clean)
    assert status.returncode == 0  # of a job that failed
    assert "Job 'failed' failed" in status.stdout


def test_variables_of_a_job_are_its_own_but_for_those_of_shardconv(dashboard: str, clean: Path) -> None:
    done = submit(dashboard, "variables", clean, *RAY, variables={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout
    refused = submit(dashboard, "conflict", clean, *RAY, "--restart", "--overwrite", variables={"JAX_PLATFORMS": "tpu"})
    assert refused.returncode == 1
    assert "cannot join the Ray cluster (1 problem)" in refused.stdout and "Failed to merge the Job's runtime env" in refused.stdout


def test_without_a_working_directory_a_job_runs_where_the_head_was_started(dashboard: str, tmp_path: Path) -> None:
    done = ray_job("submit", "--address", dashboard, "--", "pwd", cwd=tmp_path)
    assert re.search(r"/started_here\d+\n", done.stdout)


def test_without_the_token_nobody_submits(dashboard: str, tmp_path: Path) -> None:
    refused = ray_job("submit", "--address", dashboard, "--", "true", cwd=tmp_path, RAY_AUTH_TOKEN="another" * 8)
    assert refused.returncode == 1
    assert "401" in refused.stdout + refused.stderr or "token" in refused.stdout + refused.stderr
