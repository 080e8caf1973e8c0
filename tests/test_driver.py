import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conversions import Conversion, assert_complete, interrupt_after, interrupt_at, make_config, make_source, plan_finely

from shardconv.errors import CheckError, ConfigError, InputError, RunError
from shardconv.ledger import Ledger
from shardconv.lock import Lock
from shardconv.run import Began, Finished, Note, Patience, Ready, Retried, Stage, Told, python_path
from shardconv.run.driver import FINISH, change_places
from shardconv.run.job import Place

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("model"))


@pytest.fixture
def conversion(tmp_path: Path, source: Path) -> Conversion:
    config = make_config(tmp_path, source)
    return Conversion(tmp_path, config, plan_finely(config))


def test_a_plan_becomes_a_checkpoint_and_a_report(conversion: Conversion, source: Path) -> None:
    outcome = conversion.drive()
    assert_complete(conversion, source)
    assert json.loads(Path(conversion.ledger.report_path).read_text()) == {"units": len(conversion.plan.units)}
    assert sorted(conversion.finished()) == list(range(len(conversion.plan.units)))
    assert outcome.resumed == outcome.retried == 0
    assert [told.name for told in conversion.told if isinstance(told, Stage)] == ["prepare", "start", "units", "commit", "close"]
    assert set(outcome.stages) == {"prepare", "start", "units", "commit", "close"}
    assert outcome.sealed is not None and outcome.sealed.orbax


def test_the_commits_process_is_warm_before_the_last_unit(conversion: Conversion) -> None:
    def look(told: Told) -> None:
        if isinstance(told, Finished):
            assert Path(conversion.ledger.workers, "commit.log").exists()
            raise KeyboardInterrupt

    with pytest.raises(RunError, match="interrupted: 1 of"):
        conversion.drive(look)


def test_an_interrupted_run_says_so_and_the_next_goes_on(conversion: Conversion, source: Path) -> None:
    total = len(conversion.plan.units)
    with pytest.raises(RunError) as caught:
        conversion.drive(interrupt_after(3))
    assert caught.value.exit_code == 5
    assert str(caught.value) == f"interrupted: 3 of {total} units are finished; run the same command again to go on"
    assert not conversion.out.exists()
    before = conversion.ledger.finished()
    conversion.drive()
    began = next(told for told in conversion.told if isinstance(told, Began))
    assert began.resumed == set(before) and len(before) == 3
    assert len(conversion.finished()) == total - 3
    assert_complete(conversion, source)


def test_an_interrupt_before_the_first_unit_leaves_a_state_to_go_on_from(conversion: Conversion, source: Path) -> None:
    with pytest.raises(RunError, match="interrupted: 0 of"):
        conversion.drive(interrupt_at("start"))
    conversion.drive()
    assert_complete(conversion, source)


def test_a_changed_config_is_refused_with_what_changed(conversion: Conversion, tmp_path: Path, source: Path) -> None:
    conversion.stop_after(2)
    total = len(conversion.plan.units)
    conversion.config = make_config(tmp_path, source, "target.dtype=float32")
    conversion.plan = plan_finely(conversion.config)
    with pytest.raises(ConfigError) as caught:
        conversion.drive()
    assert str(caught.value) == (
        f"{conversion.out} was begun with another config, source or version (1 problem):\n"
        '  target.dtype was "source", is "float32"\n'
        "      go back to what it was, or use --restart to discard the 2 finished units"
    )
    assert len(conversion.ledger.finished()) == 2
    conversion.drive(restart=True)
    assert len(conversion.finished()) == total


def test_a_changed_source_is_refused_and_a_moved_one_is_not(tmp_path: Path, source: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    config = make_config(tmp_path, copy)
    conversion = Conversion(tmp_path, config, plan_finely(config))
    conversion.stop_after(2)
    file = sorted(copy.glob("*.safetensors"))[0]
    os.utime(file)
    conversion.plan = plan_finely(config)
    with pytest.raises(InputError, match=rf"source file {file.name} was modified .*, is modified "):
        conversion.drive()
    shutil.rmtree(copy)
    conversion.config = make_config(tmp_path, source)
    conversion.plan = plan_finely(conversion.config)
    conversion.drive()
    assert_complete(conversion, source)


def test_units_whose_data_are_gone_are_done_again(conversion: Conversion, source: Path) -> None:
    conversion.stop_after(4)
    records = conversion.ledger.finished()
    place = Place(str(conversion.out), None, None, aside=False)
    shutil.rmtree(f"{place.stage}/ocdbt.process_{records[1]['attempt']}")
    conversion.drive()
    assert 1 in conversion.finished() and 0 not in conversion.finished()
    assert_complete(conversion, source)


def test_attempts_that_lost_are_swept_away(conversion: Conversion, source: Path) -> None:
    conversion.stop_after(2)
    place = Place(str(conversion.out), None, None, aside=False)
    winner = conversion.ledger.finished()[0]["attempt"]
    shutil.copytree(f"{place.stage}/ocdbt.process_{winner}", f"{place.stage}/ocdbt.process_u0xffffff")
    conversion.drive()
    assert not list(conversion.out.glob("*xffffff"))
    assert_complete(conversion, source)


def put_checkpoint(conversion: Conversion) -> None:
    conversion.out.mkdir()
    (conversion.out / "_METADATA").write_text("an earlier checkpoint")


def test_an_output_in_the_way_is_refused(conversion: Conversion) -> None:
    put_checkpoint(conversion)
    with pytest.raises(ConfigError) as caught:
        conversion.drive()
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "the output exists (1 problem):\n"
        f"  {conversion.out} exists\n"
        "      --overwrite replaces it when the new one is complete; or choose another output.path"
    )
    assert sorted(os.listdir(conversion.root)) == ["config.toml", "out"]


def test_a_directory_that_is_no_checkpoint_is_never_replaced(conversion: Conversion) -> None:
    conversion.out.mkdir()
    (conversion.out / "thesis.tex").write_text("three years")
    with pytest.raises(ConfigError) as caught:
        conversion.drive(overwrite=True)
    assert str(caught.value) == (
        "the output is not replaced (1 problem):\n"
        f"  {conversion.out} exists and is no Orbax checkpoint (it has none of _METADATA, _CHECKPOINT_METADATA, manifest.ocdbt)\n"
        "      choose another output.path, or remove it yourself"
    )
    assert (conversion.out / "thesis.tex").exists()


def test_an_empty_directory_is_not_in_the_way(conversion: Conversion, source: Path) -> None:
    conversion.out.mkdir()
    conversion.drive()
    assert_complete(conversion, source)


def test_a_replaced_checkpoint_stays_until_the_new_one_is_complete(conversion: Conversion, source: Path) -> None:
    put_checkpoint(conversion)

    def old_is_there(told: Told) -> None:
        if told != Stage("close"):
            assert (conversion.out / "_METADATA").read_text() == "an earlier checkpoint"

    with pytest.raises(RunError, match="interrupted"):
        conversion.drive(interrupt_after(2), overwrite=True)
    old_is_there(Note(""))
    conversion.drive(old_is_there, overwrite=True)
    assert_complete(conversion, source)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_died_after_the_commit_only_tidies_up(conversion: Conversion, source: Path, overwrite: bool) -> None:
    if overwrite:
        put_checkpoint(conversion)
    with pytest.raises(RunError, match="interrupted"):
        conversion.drive(interrupt_at("close"), overwrite=overwrite)
    outcome = conversion.drive(overwrite=overwrite)
    assert conversion.finished() == [] and outcome.sealed is None
    assert_complete(conversion, source)


def test_changing_places_goes_on_wherever_it_was_stopped(tmp_path: Path) -> None:
    """All prefixes of its steps: what a crash can leave."""
    for stopped in range(4):
        root = tmp_path / str(stopped)
        place, ledger = Place(str(root / "out"), None, None, aside=True), Ledger(str(root / "out.shardconv"))
        ledger.create()
        for path, text in ((place.checkpoint, "old"), (place.committed, "new")):
            os.makedirs(path)
            Path(path, "_METADATA").write_text(text)
        if stopped >= 1:
            os.rename(place.checkpoint, f"{ledger.state}/replaced")
        if stopped >= 2:
            os.rename(place.committed, place.checkpoint)
        if stopped >= 3:
            shutil.rmtree(f"{ledger.state}/replaced")
        change_places(place, ledger)
        assert Path(place.checkpoint, "_METADATA").read_text() == "new"
        assert sorted(os.listdir(ledger.state)) == ["done", "workers"]


def test_restarting_gives_a_half_replaced_checkpoint_back(conversion: Conversion) -> None:
    put_checkpoint(conversion)
    with pytest.raises(RunError, match="interrupted"):
        conversion.drive(interrupt_after(1), overwrite=True)
    os.rename(conversion.out, f"{conversion.ledger.state}/replaced")
    with pytest.raises(ConfigError, match="the output exists"):
        conversion.drive(restart=True)
    assert (conversion.out / "_METADATA").read_text() == "an earlier checkpoint"


def test_another_programs_stage_is_not_touched(conversion: Conversion) -> None:
    stage = conversion.root / "out.orbax-checkpoint-tmp"
    stage.mkdir()
    with pytest.raises(ConfigError) as caught:
        conversion.drive()
    assert str(caught.value) == (
        "the output is being written by something else (1 problem):\n"
        f"  {stage} exists, and nothing beside it says whose it is\n"
        "      --restart removes it and starts afresh"
    )
    assert sorted(os.listdir(conversion.root)) == ["config.toml", "out.orbax-checkpoint-tmp"]


def test_a_second_run_is_refused_while_the_first_lives(conversion: Conversion, source: Path) -> None:
    second = Conversion(conversion.root, conversion.config, conversion.plan)

    def run_another(told: Told) -> None:
        if isinstance(told, Ready):
            with pytest.raises(RunError, match=rf"is held by pid {os.getpid()} on "):
                second.drive()

    conversion.drive(run_another)
    assert_complete(conversion, source)


def test_a_lost_lock_stops_a_run_before_the_commit(conversion: Conversion) -> None:
    lock = Path(conversion.ledger.state, "lock")

    def steal(told: Told) -> None:
        if told == Stage("commit"):
            lock.unlink()
            Lock(conversion.ledger.state)._create(str(lock))

    with pytest.raises(RunError, match="another run has taken over this output"):
        conversion.drive(steal)
    assert not conversion.out.exists()


def test_too_little_room_is_refused_before_the_first_byte(conversion: Conversion) -> None:
    conversion.plan = replace(conversion.plan, units=tuple(replace(unit, bytes_written=10**17) for unit in conversion.plan.units[:2]))
    with pytest.raises(RunError) as caught:
        conversion.drive()
    assert str(caught.value).startswith(f"there is not enough room (1 problem):\n  {conversion.out} needs 200000000.1 GB for 2 units; ")
    assert os.listdir(conversion.root) == ["config.toml"]


def test_a_place_that_cannot_be_written_is_refused(conversion: Conversion, tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("")
    conversion.config = make_config(tmp_path, source, f'output.path="{tmp_path}/file/out"')
    with pytest.raises(ConfigError) as caught:
        conversion.drive()
    assert str(caught.value) == (
        f"the output cannot be created (1 problem):\n  {tmp_path}/file is not a directory\n      choose another output.path"
    )


def test_a_step_of_a_file_is_refused_and_nothing_is_left(conversion: Conversion, tmp_path: Path, source: Path) -> None:
    conversion.out.write_text("a file")
    conversion.config = make_config(tmp_path, source, "output.step=3")
    with pytest.raises(ConfigError, match=rf"{conversion.out} is not a directory"):
        conversion.drive()
    assert sorted(os.listdir(tmp_path)) == ["config.toml", "out"]


def test_a_place_where_nothing_can_be_created_is_the_configs_fault(conversion: Conversion, tmp_path: Path, source: Path) -> None:
    conversion.config = make_config(tmp_path, source, 'output.path="/proc/nowhere"')
    with pytest.raises(ConfigError) as caught:
        conversion.drive()
    assert str(caught.value) == (
        "cannot write beside the output (1 problem):\n"
        "  /proc/nowhere.shardconv: No such file or directory\n"
        "      choose an output.path that you may write to"
    )


def test_a_stage_that_cannot_be_created_leaves_nothing_begun(conversion: Conversion, tmp_path: Path, source: Path) -> None:
    conversion.out.symlink_to("/proc")
    conversion.config = make_config(tmp_path, source, "output.step=999999999")
    with pytest.raises(ConfigError) as caught:
        conversion.drive()
    assert caught.value.title == "the output cannot be created"
    assert caught.value.problems[0].fact == f"{conversion.out}/999999999.orbax-checkpoint-tmp: No such file or directory"
    assert not os.path.exists(conversion.ledger.state)


def test_what_is_lost_before_the_commit_is_found_and_nothing_is_published(conversion: Conversion) -> None:
    place = Place(str(conversion.out), None, None, aside=False)

    def lose(told: Told) -> None:
        if told == Stage("commit"):
            shutil.rmtree(f"{place.stage}/ocdbt.process_{conversion.ledger.finished()[0]['attempt']}")

    with pytest.raises(CheckError, match="the checkpoint is not complete") as caught:
        conversion.drive(lose)
    assert caught.value.exit_code == 4
    assert not conversion.out.exists()


def finisher() -> psutil.Process:
    """The process that commits."""
    (found,) = [child for child in psutil.Process().children() if FINISH in " ".join(child.cmdline())]
    return found


def test_a_commit_that_dies_is_a_report_and_is_run_again(conversion: Conversion, source: Path) -> None:
    with pytest.raises(RunError) as caught:
        conversion.drive(lambda told: finisher().kill() if told == Stage("commit") else None)
    (problem,) = caught.value.problems
    assert caught.value.title == "the commit failed"
    assert re.match(r"its process \(pid \d+\) was killed by SIGKILL \(out of memory, perhaps\)", problem.fact)
    assert problem.remedy == "run the same command again; finished units are kept"
    conversion.drive()
    assert conversion.finished() == []
    assert_complete(conversion, source)


def test_a_commit_that_stands_still_is_named_and_given_up(
    conversion: Conversion, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardconv.run.driver.PATIENCE", Patience(name_after=0.5, give_up_after=2.0))
    with pytest.raises(RunError, match=r"its process \(pid \d+\) has done nothing for 2 s"):
        conversion.drive(lambda told: finisher().suspend() if told == Stage("commit") else None)
    assert any(isinstance(told, Note) and told.text.startswith("the commit has taken ") for told in conversion.told)
    monkeypatch.undo()
    conversion.drive()
    assert_complete(conversion, source)


def test_a_source_that_shrinks_meanwhile_is_a_report_about_the_source(tmp_path: Path, source: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    config = make_config(tmp_path, copy)
    conversion = Conversion(tmp_path, config, plan_finely(config))

    def shrink(told: Told) -> None:
        if isinstance(told, Ready):
            for file in copy.glob("*.safetensors"):
                os.truncate(file, 5000)

    with pytest.raises(InputError) as caught:
        conversion.drive(shrink)
    assert caught.value.exit_code == 3
    assert not any(isinstance(told, Retried) for told in conversion.told)


def run_program(conversion: Conversion, *, executor: str, count: int) -> "subprocess.Popen[str]":
    """The same conversion as a program that prints what it is told, and what ended it."""
    program = f"""
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conversions import make_config, plan_finely
from shardconv.config import RunOptions
from shardconv.conversion import request_of
from shardconv.errors import ShardconvError
from shardconv.run.driver import Stages, drive
config = make_config(Path({str(conversion.root)!r}), Path({conversion.config.source.path!r}))
plan = plan_finely(config)
request = replace(request_of(config, RunOptions(False, False, 0, False)), executor={executor!r}, count={count})
tell = lambda told: print(type(told).__name__, getattr(told, "unit", ""), getattr(told, "pid", ""), flush=True)
try:
    drive(request, plan, Stages(tell), tell, lambda outcome: {{}}, None)
except ShardconvError as error:
    print(error)
    sys.exit(int(error.exit_code))
finally:
    print("loaded", [name for name in ("jax", "tensorstore", "torch", "ray") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_state_that_the_next_run_goes_on_from(conversion: Conversion, source: Path, number: signal.Signals) -> None:
    driver = run_program(conversion, executor="local", count=2)
    assert driver.stdout is not None
    pids = set()
    for text in driver.stdout:
        if text.startswith("Finished"):
            pids.add(int(text.split()[2]))
            driver.send_signal(number)
            break
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 5, err
    assert "units are finished; run the same command again to go on" in out
    assert err == ""
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    finished = len(conversion.ledger.finished())
    assert 1 <= finished < len(conversion.plan.units)
    conversion.drive()
    assert len(conversion.finished()) == len(conversion.plan.units) - finished
    assert_complete(conversion, source)


def test_after_kill_9_the_next_run_takes_the_lock_over_and_goes_on(conversion: Conversion, source: Path) -> None:
    driver = run_program(conversion, executor="local", count=2)
    assert driver.stdout is not None
    next(text for text in driver.stdout if text.startswith("Finished"))
    driver.kill()
    driver.communicate()
    assert Path(conversion.ledger.state, "lock").exists()
    finished = len(conversion.ledger.finished())
    conversion.drive()
    assert any(isinstance(told, Note) and f"took over from pid {driver.pid} on " in told.text for told in conversion.told)
    assert len(conversion.finished()) <= len(conversion.plan.units) - finished
    assert_complete(conversion, source)


def test_the_driver_loads_neither_jax_nor_tensorstore(conversion: Conversion, source: Path) -> None:
    driver = run_program(conversion, executor="local", count=2)
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 0, err
    assert out.splitlines()[-1] == "loaded []"
    assert_complete(conversion, source)


def test_ray_does_the_same_and_survives_a_killed_worker(conversion: Conversion, source: Path) -> None:
    pytest.importorskip("ray")
    driver = run_program(conversion, executor="ray", count=2)
    assert driver.stdout is not None
    said = []
    for text in driver.stdout:
        said.append(text)
        if text.startswith("Finished"):
            os.kill(int(text.split()[2]), signal.SIGKILL)
            break
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert out.splitlines()[-1] == "loaded ['ray']"
    assert_complete(conversion, source)
