"""A conversion whose runs are killed one after the other, each in another way: the harness of scripts/reliability, in small.

And that the harness sees what it is there to see: half a checkpoint, one that is not equal, an earlier one that is gone.
"""

import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts/reliability"))
from kills import MODEL, Known, Way, make_case, run_case, run_step, steps_of, undisturbed
from looking import Case

from shardconv.synth import synthesise

WAY = Way("local", "maxtext", overwrite=True, check="none")
Setup = tuple[Path, Known]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    import json

    work = tmp_path_factory.mktemp("kills")
    (work / "model.json").write_text(json.dumps(MODEL))
    synthesise(str(work / "model.json"), str(work / "source"), sparse=False, seed=1, dtype="bfloat16", shard_bytes=1_000_000)
    return work, undisturbed(work, WAY)


def test_runs_that_are_killed_each_in_another_way_end_in_the_same_checkpoint(setup: Setup) -> None:
    work, known = setup
    results = run_case(work, 1, WAY, known, ("everything", "commit", "group", "driver", "worker"), random.Random(1))
    assert [result.wrongs for result in results] == [[]] * len(results)
    assert sum(result.killed for result in results) >= 3
    assert not (work / "case1").exists()


def test_a_driver_that_is_killed_while_checkpoints_change_places(setup: Setup) -> None:
    work, known = setup
    places = ("rename out/0", "rename out.shardconv/complete/0")
    renames = [(number, step) for number, step in steps_of(work, WAY, known, "driver") if step in places]
    assert len(renames) == 2
    for number, step in renames:
        (result,) = run_step(work, WAY, known, "driver", number, step)
        assert result.killed and result.wrongs == []


def copy_of(work: Path, known: Known, name: str) -> Case:
    """A finished conversion's directory, to be damaged."""
    shutil.rmtree(work / name, ignore_errors=True)
    case = make_case(work, name, WAY, known.earlier)
    shutil.rmtree(case.root / "out")
    shutil.copytree(work / f"{WAY.name}-undisturbed" / "out", case.root / "out")
    return case


def test_the_harness_sees_half_a_checkpoint_and_one_that_is_gone(setup: Setup) -> None:
    work, known = setup
    case = copy_of(work, known, "damaged")
    assert known.judge.wrongs(case) == []
    shutil.copytree(case.checkpoint, case.root / "out" / "1")
    assert any("out/1" in wrong for wrong in known.judge.wrongs(case))
    shutil.rmtree(case.root / "out")
    assert known.judge.wrongs(case) == ["the earlier checkpoint is gone, and the new one is not in its place"]


def test_the_harness_sees_another_checkpoint(setup: Setup) -> None:
    work, known = setup
    assert known.earlier is not None
    earlier = copy_of(work, known, "other").load(known.earlier / "0")
    assert len(earlier.differences(known.new)) > 50
    case = copy_of(work, known, "other")
    metadata = case.checkpoint / "items" / "_METADATA"
    metadata.write_text(metadata.read_text().replace('"layout": "maxtext"', '"layout": "maxtexT"'))
    assert case.load(case.checkpoint).differences(known.new) == ["items/_METADATA"]
