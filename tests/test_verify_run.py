"""The check where users meet it: the command, and the last stage of a run."""

import json
import os
import pty
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conversions import make_config, make_source
from typer.testing import CliRunner
from written import change

from shardconv.cli import app
from shardconv.config import Config, RunOptions
from shardconv.conversion import request_of, run
from shardconv.errors import CheckError, ExitCode, RunError
from shardconv.planning import plan_from_config
from shardconv.run import Stage, Told, unit
from shardconv.run.driver import Stages, drive
from shardconv.run.job import state_path
from shardconv.verify.pool import answer
from shardconv.verify.verdict import LOGITS_TITLE, TITLE


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tmp_path: Path, source: Path) -> Config:
    return make_config(tmp_path, source)


def options(*, overwrite: bool = False) -> RunOptions:
    return RunOptions(restart=False, overwrite=overwrite, verbosity=-1, json_logs=False)


def type_in(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.stdout, done.stderr


def file_of(config: Config) -> str:
    return str(Path(config.output.path).parent / "config.toml")


def wrong_norm(array: np.ndarray) -> None:
    array[3] = 77


def convert_until_the_check(config: Config, *, overwrite: bool = False) -> None:
    """A run that is broken off when everything is written and committed."""

    def break_off(told: Told) -> None:
        if told == Stage("check"):
            raise KeyboardInterrupt

    stages = Stages(break_off)
    with pytest.raises(RunError, match="interrupted"):
        drive(request_of(config, options(overwrite=overwrite)), plan_from_config(config), stages, break_off, lambda _: {}, lambda _: {})


def test_a_run_checks_what_it_wrote(config: Config) -> None:
    found = run(config, options())
    check = found["check"]
    assert isinstance(check, dict)
    assert (check["mode"], check["equal"], check["problems"], check["logits"]) == ("weights", True, [], None)
    weights = check["weights"]
    assert (weights["equal"], weights["problems"], weights["whole"], weights["independent"]) == (True, [], True, True)
    assert weights["elements"] * 2 == weights["bytes"] == found["target_bytes"]
    assert weights["checksums"] == weights["leaves"] == 39
    (process,) = [p for p in found["processes"] if p["role"] == "weights"]  # type: ignore[attr-defined]
    assert process["pid"] == weights["pid"] and process["cpu_seconds"] > 0
    assert json.loads(Path(state_path(config.output.path), "report.json").read_text())["check"] == check


def test_a_worker_that_did_units_gives_their_buffers_back_for_the_check(config: Config) -> None:
    run(config, options())  # one local worker: the units are done in this process
    assert unit._worker.cache_info().currsize == 1
    answer("math:sqrt", 0, 4.0)
    assert unit._worker.cache_info().currsize == 0


def test_the_command_shows_on_a_terminal_how_far_it_is(config: Config) -> None:
    run(config, options())
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "shardconv", "verify", file_of(config)]
    subprocess.run(command, stderr=theirs, stdout=subprocess.DEVNULL, check=True, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"})
    os.close(theirs)
    text = os.read(ours, 1 << 20).decode()
    os.close(ours)
    assert "comparing" in text and "\x1b[" in text


def test_a_run_need_not_check(config: Config) -> None:
    code, out, err = type_in("run", file_of(config), "--check", "none")
    assert (code, "check  " in out, "check " in out) == (0, False, False), err
    found = json.loads(Path(state_path(config.output.path), "report.json").read_text())
    assert found["check"] is None
    assert "check" not in found["stages"]


def test_the_summary_has_a_line_for_the_check(config: Config) -> None:
    code, out, err = type_in("run", file_of(config))
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("check  ")]
    assert line.startswith("check       weights equal: all ") and " elements of 39 leaves, " in line


def test_the_command(config: Config) -> None:
    run(config, options())
    path = file_of(config)
    code, out, err = type_in("verify", path)
    assert (code, err) == (0, "")
    assert out.startswith("check       weights equal: all ")
    code, out, _ = type_in("verify", path, "--sample", "3", "--set", "check.seed=5", "--json")
    found = json.loads(out)
    assert (code, found["weights"]["whole"], found["weights"]["seed"], found["equal"]) == (0, False, 5, True)
    assert " boxes (seed 0), " in type_in("verify", path, "--sample", "3")[1]
    page = Path(path).with_name("page.html")
    assert type_in("verify", path, "--html", str(page))[0] == 0
    assert "Weights equal" in page.read_text()
    change(Path(config.output.path), "final_norm", wrong_norm)
    code, out, err = type_in("verify", path)
    assert code == ExitCode.CHECK
    assert out.startswith("check       weights differ in 1 place: ")
    assert err.startswith(f"error: {TITLE} (1 problem):\n  final_norm[3] is 77 (0x429a), and should be ")
    code, out, _ = type_in("verify", path, "--json")
    assert (code, json.loads(out)["equal"]) == (ExitCode.CHECK, False)


def test_a_checkpoint_that_is_not_there(config: Config) -> None:
    code, out, err = type_in("verify", file_of(config))
    assert (code, out) == (ExitCode.USAGE, "")
    assert err.startswith(f"error: there is nothing to verify (1 problem):\n  there is no checkpoint at {config.output.path}\n      run ")


def test_a_run_whose_check_fails_says_so_and_leaves_a_report(config: Config) -> None:
    convert_until_the_check(config)
    change(Path(config.output.path), "final_norm", wrong_norm)
    with pytest.raises(CheckError) as caught:
        run(config, options())
    assert str(caught.value).startswith(f"{TITLE} (1 problem):\n  final_norm[3] is 77 (0x429a), and should be ")
    report = json.loads(Path(state_path(config.output.path), "report.json").read_text())
    assert report["check"]["equal"] is False
    assert report["check"]["problems"][0]["fact"].startswith("final_norm[3] is 77")


def test_what_is_wrong_takes_no_checkpoints_place(config: Config) -> None:
    run(config, options())
    folder = Path(config.output.path)
    before = (folder / "manifest.ocdbt").read_bytes()
    convert_until_the_check(config, overwrite=True)
    made = Path(state_path(config.output.path), "complete")
    change(made, "final_norm", wrong_norm)
    for _ in range(2):  # it stays so
        with pytest.raises(CheckError) as caught:
            run(config, options(overwrite=True))
        assert str(caught.value).endswith(
            f"\n  {folder} is left as it was; what was written is in {made}\n      --restart --overwrite converts again"
        )
        assert (folder / "manifest.ocdbt").read_bytes() == before
    run(config, RunOptions(restart=True, overwrite=True, verbosity=-1, json_logs=False))
    assert not made.exists()


def test_a_check_that_is_broken_off_is_done_by_the_next_run(config: Config) -> None:
    convert_until_the_check(config)
    found = run(config, options())
    assert found["units"] == {"total": 1, "resumed": 1, "retried": 0}
    assert found["check"]["equal"] is True  # type: ignore[index]


def test_logits_of_both_models(config: Config) -> None:
    for library in ("torch", "transformers"):
        pytest.importorskip(library)
    code, out, err = type_in("run", file_of(config), "--check", "all")
    assert code == 0, err
    report = json.loads(Path(state_path(config.output.path), "report.json").read_text())
    check, logits = report["check"], report["check"]["logits"]
    assert (check["mode"], check["equal"], check["weights"]["equal"], logits["equal"]) == ("all", True, True, True)
    assert (logits["sequences"], logits["platform"], logits["layer_by_layer"]) == ([64, 96, 160], "cpu", False)
    assert [block["step"] for block in logits["blocks"]] == ["embed", *(f"block {n}" for n in range(4)), "logits"]
    assert report["stages"]["logits"] > 0
    (process,) = [one for one in report["processes"] if one["role"] == "logits"]
    assert process["pid"] == logits["pid"] and process["peak_rss_bytes"] > 100e6
    lines = out.splitlines()
    assert sum(line.startswith("check  ") for line in lines) == 1 and "            logits equal: largest difference " in out
    (heading,) = [line for line in lines if line.startswith("PyTorch in float32 against")]
    assert heading.split()[4:] == ["largest", "mean", "largest", "KL", "least", "cosine", "top", "1", "top", "5"]
    assert [line.split("  ")[0] for line in lines[lines.index(heading) + 1 :]][:4] == [
        "JAX",
        "noise (sums in other orders)",
        "compute in bfloat16",
        "allowed",
    ]
    assert "Logits equal" in Path(state_path(config.output.path), "report.html").read_text()

    change(Path(config.output.path), "final_norm", wrong_norm)
    code, out, err = type_in("verify", file_of(config), "--check", "logits", "--trace", "--set", "check.memory=100KB")
    assert code == ExitCode.CHECK
    assert out.startswith("check       logits DIFFER: largest difference ") and out.splitlines()[0].endswith(" s, layer by layer")
    assert err.startswith(f"error: {LOGITS_TITLE} (")
    assert "final_norm" in err

    for data in Path(config.output.path).rglob("d/*"):
        os.truncate(data, 0)
    code, out, err = type_in("verify", file_of(config), "--check", "logits")
    assert (code, out) == (ExitCode.CHECK, "check       logits not compared: the checkpoint cannot be read back\n")
    assert err.startswith("error: the checkpoint cannot be read back (1 problem):\n") and err.endswith(": convert again with --overwrite\n")


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is here")
def test_logits_need_torch(config: Config) -> None:
    code, _, err = type_in("run", file_of(config), "--check", "logits")
    assert (code, Path(config.output.path).exists()) == (ExitCode.USAGE, False)
    assert err == (
        "error: the logits cannot be compared (1 problem):\n"
        "  torch and transformers are not installed\n"
        '      pip install "shardconv[check]", or set check.mode = "weights"\n'
    )


def test_verifying_nothing_is_refused(config: Config) -> None:
    code, out, err = type_in("verify", file_of(config), "--check", "none")
    assert (code, out) == (ExitCode.USAGE, "")
    assert err == (
        'error: there is nothing to verify (1 problem):\n  --check none\n      leave it out, or say "weights", "logits" or "all"\n'
    )


def test_what_the_logits_lack_is_said_at_once(config: Config, tmp_path: Path) -> None:
    for library in ("torch", "transformers"):
        pytest.importorskip(library)
    path = tmp_path / "prompts.txt"
    faults = ["--set", f'check.prompts="{path}"', "--set", 'check.forward="nowhere:f"']
    code, _, err = type_in("run", file_of(config), "--check", "all", *faults)
    assert (code, Path(config.output.path).exists()) == (ExitCode.USAGE, False)
    assert err.startswith("error: the logits cannot be compared (3 problems):\n")
    assert f"  check.prompts: {path} is not a file\n      give a text file with a prompt in each line\n" in err
    path.write_bytes(b"\xff\n")
    assert "prompts.txt is no text in UTF-8\n" in type_in("run", file_of(config), "--check", "all", *faults)[2]
    path.write_text("\n \n")
    assert "prompts.txt has no lines\n" in type_in("run", file_of(config), "--check", "all", *faults)[2]
    assert f"  check.prompts: {config.source.path} has no tokenizer\n      put the tokenizer's files beside the weights, or " in err
