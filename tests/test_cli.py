"""The command line: exit codes, what goes to which stream, and that a user's mistake never shows a traceback."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from shardconv import __version__
from shardconv.cli import app
from shardconv.doctor import OPTIONAL, REQUIRED, check_version, findings
from shardconv.door import REPORT, UNEXPECTED, Door, enter
from shardconv.errors import CheckError, ConfigError, ExitCode, InputError, Problem, RunError, ShardconvError
from shardconv.families import families

ROOT = Path(__file__).parent.parent
LEAST = '[source]\npath = "in"\n[target]\nlayout = "flat"\n[output]\npath = "out"\n'
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to be in, with a config and a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    Path("c.toml").write_text(LEAST)
    Path("tiny").mkdir()
    Path("tiny/config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def type_in(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.stdout, done.stderr


def program(*words: str) -> "subprocess.CompletedProcess[str]":
    """The same in a process of its own, as a user starts it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "shardconv", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_version() -> None:
    assert type_in("--version") == (0, f"shardconv {__version__}\n", "")
    assert program("--version").stdout == f"shardconv {__version__}\n"


def test_the_version_is_that_of_the_package() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_help_names_every_command_and_exit_code() -> None:
    code, out, _ = type_in("--help")
    assert code == 0
    for command in ("plan", "run", "inspect", "families", "layouts", "init", "synth", "doctor"):
        assert f" {command} " in out
    assert set(re.findall(r"(\d) [a-z]", out.partition("Exit codes:")[2].partition("Options")[0])) == {str(int(c)) for c in ExitCode}


def test_the_readme_names_commands_and_codes_that_there_are() -> None:
    readme = (ROOT / "README.md").read_text()
    (shell,) = re.findall(r"```sh\n(.*?)```", readme, flags=re.DOTALL)
    for command in re.findall(r"^shardconv (\w+)", shell, flags=re.MULTILINE):
        assert type_in(command, "--help")[0] == 0
    assert re.findall(r"^\| (\d) \|", readme, flags=re.MULTILINE) == sorted([str(int(code)) for code in ExitCode] + [str(UNEXPECTED)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan"], "Missing argument 'CONFIG'."),
        (["plan", "c.toml", "--jsn"], "No such option: --jsn"),
        (["pla", "c.toml"], "No such command 'pla'."),
        (["init", "tiny"], "Missing option '--layout'"),
        (["run", "c.toml", "--executor", "dask"], "'dask' is not one of 'ray', 'local'."),
    ],
)
def test_usage_errors_are_2(words: list[str], said: str) -> None:
    code, out, err = type_in(*words)
    assert (code, out) == (ExitCode.USAGE, "")
    assert said in " ".join(err.replace("│", " ").split())


def test_a_config_error_is_a_report_on_stderr() -> None:
    assert type_in("plan", "c.toml", "--set", "target.scan_layer=true") == (
        ExitCode.USAGE,
        "",
        "error: the config is not valid (1 problem):\n"
        '  --set target.scan_layer=true: [target] has no key "scan_layer"\n'
        '      did you mean "scan_layers"?\n',
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--check", "logits", "--sample", "9"], '--sample 9, and check.mode is "logits"\n      it is for the weights: add --check all'),
        (["--trace"], '--trace, and check.mode is "weights"\n      it is for the logits: add --check logits'),
    ],
)
@pytest.mark.parametrize("command", ["run", "verify"])
def test_a_flag_of_a_check_that_is_not_made_is_refused(here: Path, command: str, words: list[str], said: str) -> None:
    assert type_in("init", "tiny", "--layout", "flat", "--output", "x.toml")[0] == 0
    code, out, err = type_in(command, "x.toml", *words)
    assert (code, out, err) == (ExitCode.USAGE, "", f"error: a flag has nothing to do (1 problem):\n  {said}, or leave it out\n")


def test_with_json_logs_a_config_error_is_an_event_too() -> None:
    code, out, err = type_in("run", "c.toml", "--json-logs", "--set", "target.scan_layer=true")
    event, report = err.split("\n", 1)
    assert (code, out) == (ExitCode.USAGE, "")
    assert report.startswith("error: the config is not valid")
    told = json.loads(event)
    assert (told["event"], told["code"], f"error: {told['message']}\n") == ("error", 2, report)


def test_flags_of_run_are_overrides_and_come_last() -> None:
    words = ["run", "c.toml", "--set", "workers.memory_budget=1GiB", "--memory-budget", "lots", "--address", "", "--executor", "local"]
    assert type_in(*words) == (
        ExitCode.USAGE,
        "",
        "error: the config is not valid (2 problems):\n"
        '  --set workers.address="": [workers] address = "" (a string), expected an address such as "10.0.0.2:6379", or "local"\n'
        '  --set workers.memory_budget="lots": [workers] memory_budget = "lots" (a string), '
        'expected a size, such as "2GiB" or "500MB", or "auto"\n',
    )


def test_quiet_and_verbose_exclude_each_other() -> None:
    assert type_in("run", "c.toml", "-q", "-v") == (ExitCode.USAGE, "", "error: --quiet and --verbose exclude each other\n")


def test_a_source_that_is_not_there_is_3_and_no_traceback() -> None:
    code, out, err = type_in("plan", "c.toml")
    assert (code, out) == (ExitCode.INPUT, "")
    assert err.startswith("error: ")
    assert "in does not exist" in err
    assert "Traceback" not in err


def test_families() -> None:
    code, out, err = type_in("families")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["family", *families()]
    code, out, _ = type_in("families", "--json")
    assert code == 0
    assert {"name": "gemma2", "title": "Gemma 2", "architectures": ["Gemma2ForCausalLM"]} in json.loads(out)


def test_layouts() -> None:
    code, out, _ = type_in("layouts")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["layout", "flat", "maxtext", "module:make_model"]
    assert "MaxText's parameter tree" in out


def test_init_writes_a_config_named_after_the_model(here: Path) -> None:
    assert type_in("init", "tiny", "--layout", "flat") == (0, "wrote tiny.toml; next: shardconv plan tiny.toml\n", "")
    assert type_in("init", str(here / "tiny") + "/", "--layout", "flat")[::2] == (
        ExitCode.USAGE,
        "error: will not overwrite a config (1 problem):\n  tiny.toml exists\n      choose another --output, or add --force\n",
    )
    assert type_in("init", "tiny", "--layout", "flat", "--force")[0] == 0
    assert type_in("init", "tiny", "--layout", "maxtext", "--output", "x.toml")[1] == "wrote x.toml; next: shardconv plan x.toml\n"


def test_synth_wants_a_size() -> None:
    assert type_in("synth", "tiny", "out", "--shard-size", "5 gigs") == (
        ExitCode.USAGE,
        "",
        "error: cannot write the checkpoint (1 problem):\n"
        '  --shard-size "5 gigs"\n'
        '      expected a number and a unit: "512MiB", "2GiB", "500MB"\n',
    )


def test_doctor_finds_this_environment_well() -> None:
    code, out, err = type_in("doctor")
    assert (code, err) == (0, "")
    found = {line.split()[0] for line in out.splitlines()}
    assert found >= {"shardconv", "python", *REQUIRED, *OPTIONAL, "cores", "memory", "disk", "RAY_ADDRESS"}
    assert "when [workers] says auto" in out


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ("2.60", None),
        ("2.60.0rc1", None),
        ("10.0+cpu", None),
        ("2.9.9", Problem("ray is 2.9.9, older than 2.60", 'pip install "ray>=2.60"')),
        (None, Problem("ray is not installed", 'pip install "ray>=2.60"')),
    ],
)
def test_doctor_compares_versions_as_numbers(found: str | None, problem: Problem | None) -> None:
    assert check_version("ray", "2.60", found).problem == problem


def test_doctor_asks_for_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {f"{name}>={lowest}" for name, lowest in REQUIRED.items()} == set(project["dependencies"])
    assert all(any(line.startswith(name) for line in project["optional-dependencies"]["check"]) for name in OPTIONAL)


def test_doctor_names_the_disk_it_was_asked_about(here: Path) -> None:
    assert any(finding.name == f"disk at {here}" for finding in findings(str(here)))


# A whole conversion, by hand


def test_from_a_model_config_to_a_checkpoint(here: Path) -> None:
    code, out, _ = type_in("synth", "tiny/config.json", "made", "--shard-size", "2KiB")
    made = [file.stat().st_size for file in Path("made").glob("*.safetensors")]
    assert (code, out) == (0, f"wrote made: {sum(made) / 1000:.2f} kB in {len(made)} files\n")
    assert len(made) > 1
    assert type_in("init", "made", "--layout", "flat")[0] == 0

    code, out, err = type_in("plan", "made.toml", "--json", "--set", "target.dtype=float32")
    assert (code, err) == (0, "")
    planned = json.loads(out)
    assert planned["target_bytes"] == 2 * planned["source_bytes"]
    assert type_in("plan", "made.toml")[0] == 0

    assert type_in("verify", "made.toml") == (
        ExitCode.USAGE,
        "",
        f"error: there is nothing to verify (1 problem):\n  there is no checkpoint at {here}/converted/made\n"
        "      run `shardconv run CONFIG` first, or correct output.path, output.step and output.item\n",
    )
    code, out, err = type_in("run", "made.toml", "--executor", "local", "--memory-budget", "64MiB", "--set", "workers.count=1")
    assert code == 0, err
    assert Path("converted/made").is_dir()
    code, out, err = type_in("run", "made.toml", "--executor", "local")
    assert code == ExitCode.USAGE
    assert "converted/made" in err

    code, out, err = type_in("inspect", "converted/made", "--match", "*attn.q*", "--json")
    assert (code, err) == (0, "")
    assert type_in("inspect", "made")[0] == 0


@pytest.mark.parametrize("words", [("plan", "made.toml"), ("plan", "made.toml", "--json"), ("inspect", "made"), ("families",)])
def test_a_reader_that_has_seen_enough_is_no_error(words: tuple[str, ...]) -> None:
    type_in("synth", "tiny", "made", "--sparse")
    type_in("init", "made", "--layout", "flat")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "shardconv", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("left", ["out.shardconv", "out.orbax-checkpoint-tmp", "out/0.orbax-checkpoint-tmp"])
def test_an_unfinished_conversion_is_no_checkpoint(here: Path, left: str) -> None:
    (here / left).mkdir(parents=True)
    assert type_in("inspect", "out") == (
        ExitCode.INPUT,
        "",
        f"error: there is no finished checkpoint (1 problem):\n  {here / left} is of a conversion that has not finished\n"
        "      `shardconv run` with the same config goes on with it\n",
    )


def test_a_stage_is_no_checkpoint_though_all_its_metadata_are_there(here: Path) -> None:
    stage = here / "out.orbax-checkpoint-tmp"
    stage.mkdir()
    (stage / "_METADATA").write_text('{"tree_metadata": {}}')  # the commit is killed before it renames
    code, out, err = type_in("inspect", str(stage))
    assert (code, out) == (ExitCode.INPUT, "")
    assert err.startswith(f"error: there is no finished checkpoint (1 problem):\n  {stage} is of a conversion that has not finished\n")


def test_a_directory_beside_weights_that_is_unfinished_does_not_hide_them(here: Path) -> None:
    type_in("synth", "tiny", "made")
    (here / "made/out.orbax-checkpoint-tmp").mkdir()
    assert type_in("inspect", "made")[0] == 0


# The door


def house(command: Callable[[], None]) -> typer.Typer:
    """A program with one command behind the door."""
    made = typer.Typer(cls=Door, pretty_exceptions_enable=False)
    made.callback()(lambda: None)
    made.command("go")(command)
    return made


@pytest.mark.parametrize(
    ("kind", "code"), [(ConfigError, 2), (InputError, 3), (CheckError, 4), (RunError, 5)]
)
def test_every_error_has_its_code(kind: type[ShardconvError], code: int) -> None:
    def go() -> None:
        raise kind("no [way]", [Problem("a [fact]", "a remedy")])

    done = CliRunner().invoke(house(go), ["go"])
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr == "error: no [way] (1 problem):\n  a [fact]\n      a remedy\n"


def test_ctrl_c_is_5() -> None:
    def go() -> None:
        raise KeyboardInterrupt

    done = CliRunner().invoke(house(go), ["go"])
    assert (done.exit_code, done.stdout, done.stderr) == (ExitCode.RESUMABLE, "", "interrupted\n")


def test_ctrl_c_that_an_import_made_an_error_of_is_5(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def go() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("an extension was not loaded") from error

    monkeypatch.setattr(sys, "argv", ["shardconv", "go"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer puts its own there
    with pytest.raises(SystemExit) as caught:
        enter(house(go))
    assert caught.value.code == ExitCode.RESUMABLE
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("module", ["typer", "pydantic"])
def test_ctrl_c_while_the_program_is_imported_is_5(module: str) -> None:
    """The signal comes when a module that the command line imports is looked for."""
    code = f"""
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
runpy.run_module("shardconv", run_name="__main__")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (ExitCode.RESUMABLE, "", "interrupted\n")


def test_a_mistake_of_ours_shows_its_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def go() -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(sys, "argv", ["shardconv", "go"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer puts its own there
    with pytest.raises(SystemExit) as caught:
        enter(house(go))
    err = capsys.readouterr().err
    assert caught.value.code == UNEXPECTED
    assert err.startswith("Traceback")
    assert err.endswith(f"ZeroDivisionError: ours\n\n{REPORT}\n")


def test_the_program_exits_with_the_code() -> None:
    done = program("plan", "nowhere.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: cannot read the config (1 problem):\n"
        "  nowhere.toml: no such file\n"
        "      `shardconv init HF_DIR --layout LAYOUT` writes one\n"
    )


def test_a_real_ctrl_c_is_5(here: Path) -> None:
    """The config is a pipe: once the program has opened it, it waits in the middle of a command for text that never comes."""
    os.mkfifo(here / "pipe.toml")
    command = [sys.executable, "-m", "shardconv", "plan", "pipe.toml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            writer = opened_by_a_reader(here / "pipe.toml", within=30)
            time.sleep(0.3)  # from opening to reading: a signal in between is seen only when the read ends
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
            os.close(writer)
        finally:
            process.kill()
    assert (process.returncode, err) == (ExitCode.RESUMABLE, "interrupted\n")


def opened_by_a_reader(pipe: Path, within: float) -> int:
    """A descriptor for writing to a pipe, as soon as somebody has it open for reading."""
    deadline = time.monotonic() + within
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
