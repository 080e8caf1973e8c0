"""The check on Ray's workers: the same verdict, from other processes; a worker that dies; one Ray for a whole run."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conversions import make_config, make_source
from written import CHOICES, change, checked, make_model, plan_of, write

from shardconv.checking import verify
from shardconv.config import RunOptions
from shardconv.conversion import run
from shardconv.errors import RunError
from shardconv.verify.pool import CANNOT, Workers, answer_of_task, at_work
from shardconv.verify.request import Request
from shardconv.verify.weights import check

ray = pytest.importorskip("ray")
from shardconv.run import ray as executor  # noqa: E402
from shardconv.run.nodes import nodes, require_seen  # noqa: E402


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    """One Ray for most tests: a start and a stop cost several seconds."""
    with executor.connected(None, 2, verbose=False):
        yield


@pytest.fixture
def workers(started: None) -> Iterator[Workers]:
    with at_work("ray", 0, None, 0, "", "") as workers:
        yield workers


def test_questions_are_answered_by_worker_processes(workers: Workers) -> None:
    assert (workers.executor, workers.count) == ("ray", 2)
    found = list(workers.answers("standin_questions:pid", [0.5] * 4))
    assert sorted(number for number, _ in found) == [0, 1, 2, 3]
    assert len({pid for _, pid in found}) == 2
    assert os.getpid() not in {pid for _, pid in found}
    assert workers.peak_rss > 10 << 20
    assert ray.is_initialized()  # it was there before, and stays


def test_a_worker_that_dies_is_an_error_that_says_what_to_do(workers: Workers) -> None:
    with pytest.raises(RunError) as caught:
        list(workers.answers("standin_questions:die", [0]))
    lines = str(caught.value).splitlines()
    assert lines[0] == "the check failed (1 problem):"
    assert lines[1].startswith("  its worker died: WorkerCrashedError: ")
    assert lines[-1] == "      `shardconv verify` checks again; --set workers.memory_budget=SIZE gives it less memory"
    with pytest.raises(RunError, match="its worker died"):
        answer_of_task("standin_questions:die", 0, None, 2)


def test_what_goes_wrong_in_a_task_comes_back(workers: Workers) -> None:
    with pytest.raises(RunError, match="TypeError"):
        list(workers.answers("math:sqrt", ["a word", "another"]))


def test_the_verdict_is_that_of_local_workers(started: None, tmp_path: Path) -> None:
    make_model(tmp_path / "source", "mixtral_8x7b")
    plan = plan_of(tmp_path / "source", CHOICES)
    folder = write(plan, tmp_path / "out")
    change(folder, "layers.experts.down", lambda array: array.__setitem__((2, 1), array[2, 0]))
    here, there = checked(plan, folder, CHOICES), check(Request(str(folder), plan, CHOICES, 2, 64 << 20, None, 0, executor="ray"))
    assert (here.executor, there.executor, there.workers) == ("local", "ray", 2)
    assert len(here.problems) == 1 and here.problems == there.problems
    assert (here.elements, here.checksums, here.leaves) == (there.elements, there.checksums, there.leaves)
    assert there.cpu_seconds > 0 and there.peak_rss > 50 << 20


def test_a_cluster_must_see_both_sides(started: None, tmp_path: Path) -> None:
    (tmp_path / "_METADATA").write_text("{}")
    there = str(tmp_path / "_METADATA")
    require_seen(nodes(), there, str(tmp_path), CANNOT)
    with pytest.raises(RunError, match=r"the cluster cannot do this check .*\n.* does not see the source /no/such/source"):
        require_seen(nodes(), there, "/no/such/source", CANNOT)


def test_a_run_has_one_ray_and_leaves_none(tmp_path: Path) -> None:
    ray.shutdown()
    config = make_config(tmp_path, make_source(tmp_path), 'workers.executor="ray"', "workers.count=2")
    before = _sessions()
    found = run(config, RunOptions(restart=False, overwrite=False, verbosity=-1, json_logs=False))
    assert len(_sessions() - before) == 1
    assert not ray.is_initialized()
    weights = found["check"]["weights"]  # type: ignore[index]
    assert (weights["equal"], weights["executor"], weights["workers"]) == (True, "ray", 2)
    assert weights["pid"] != os.getpid()
    again = verify(config)["weights"]
    assert (again["equal"], again["executor"], again["workers"], again["pid"]) == (True, "ray", 2, os.getpid())
    assert len(_sessions() - before) == 2
    assert not ray.is_initialized()


def _sessions() -> set[str]:
    """The Ray sessions that this process has started."""
    folder = Path(tempfile.gettempdir()) / "ray"
    return {path.name for path in folder.glob(f"session_*_{os.getpid()}")}
