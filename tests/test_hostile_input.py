"""Damaged and hostile input through the real commands: one refusal that names the file, soon, and nothing left behind."""

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from hostile_orbax import ORBAX
from hostile_sources import CONFIG, MODEL, SOURCES
from typer.testing import CliRunner

from shardconv.cli import app
from shardconv.errors import ExitCode
from shardconv.synth import synthesise

ROOT = Path(__file__).parent.parent
TOML = '[source]\npath = "src"\n[target]\nlayout = "flat"\n[output]\npath = "out"\n[workers]\nexecutor = "local"\n'
SECONDS = 10  # of a processor; the slowest, 100,000 files in an index, takes one
MESSAGE = 20_000  # characters


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to be in, with a config and a sound checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "c.toml").write_text(TOML)
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    synthesise("model.json", "src", sparse=False, seed=0, dtype="bfloat16", shard_bytes=10**9)
    (tmp_path / "model.json").unlink()
    (tmp_path / "src" / CONFIG).write_text(json.dumps(MODEL))
    return tmp_path


def tree(root: Path) -> dict[str, int]:
    """Everything below, with its size; links are not followed."""
    return {str(path.relative_to(root)): path.lstat().st_size for path in root.rglob("*")}


def words(command: str) -> list[str]:
    return ["inspect", "src"] if command == "inspect" else [command, "c.toml"]


def refusal(*arguments: str) -> tuple[int, str]:
    """Exit code and message of a command that must refuse: nothing on stdout, no traceback, nothing that moves the cursor, soon."""
    begun = time.process_time()
    done = CliRunner().invoke(app, arguments)
    seconds = time.process_time() - begun
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        traceback.print_exception(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert done.exit_code
    assert done.stdout == "" or (arguments[0] == "verify" and done.exit_code == ExitCode.CHECK)  # a verdict is an answer
    assert "Traceback" not in done.stderr
    assert all(line.isprintable() for line in done.stderr.split("\n"))
    assert len(done.stderr) < MESSAGE
    assert seconds < SECONDS
    return done.exit_code, done.stderr


def test_the_checkpoint_is_sound_before_it_is_changed(here: Path) -> None:
    for command in ("inspect", "plan"):
        assert CliRunner().invoke(app, words(command)).exit_code == 0


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_is_refused(name: str, here: Path) -> None:
    case = SOURCES[name]
    case.make(here / "src")
    before = tree(here)
    for command in case.commands:
        code, message = refusal(*words(command))
        assert (code, message[:7]) == (ExitCode.INPUT, "error: ")
        assert [word for word in case.said if word not in message] == [], message
        assert tree(here) == before


# Orbax checkpoints


def orbax(folder: Path, store: str) -> None:
    """A sound checkpoint of one array, as Orbax keeps it."""
    files = {"driver": "file", "path": f"{folder}/"}
    base = {"driver": "ocdbt", "base": files, "config": {"max_inline_value_bytes": 0}} if store == "ocdbt" else files
    kvstore = {**base, "path": "a/"} if store == "ocdbt" else {"driver": "file", "path": f"{folder}/a/"}
    layout = ts.ChunkLayout(chunk_shape=[4, 4])
    array = ts.open({"driver": "zarr3", "kvstore": kvstore}, create=True, dtype=ts.float32, shape=[4, 4], chunk_layout=layout).result()
    array.write(np.ones((4, 4), np.float32)).result()
    tree = {"('a',)": {"key_metadata": [{"key": "a", "key_type": 2}], "value_metadata": {"value_type": "jax.Array"}}}
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": tree, "use_zarr3": True, "use_ocdbt": store == "ocdbt"}))


@pytest.mark.parametrize("store", ["files", "ocdbt"])
def test_the_orbax_checkpoint_is_sound_before_it_is_changed(store: str, here: Path) -> None:
    orbax(here / "ckpt", store)
    done = CliRunner().invoke(app, ["inspect", "ckpt"])
    assert (done.exit_code, "float32" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("name", ORBAX)
def test_an_orbax_checkpoint_is_refused(name: str, here: Path) -> None:
    damage = ORBAX[name]
    orbax(here / "ckpt", damage.store)
    damage.make(here / "ckpt")
    before = tree(here)
    code, message = refusal("inspect", "ckpt")
    assert (code, message[:7]) == (ExitCode.INPUT, "error: ")
    assert [word for word in damage.said if word not in message] == [], message
    assert tree(here) == before


@pytest.mark.parametrize("name", [name for name, damage in ORBAX.items() if damage.store == "files" and name != "not committed"])
def test_a_damaged_checkpoint_fails_its_check(name: str, here: Path) -> None:
    orbax(here / "out", "files")
    ORBAX[name].make(here / "out")
    before = tree(here)
    code, message = refusal("verify", "c.toml")
    assert (code, message[:7]) == (ExitCode.CHECK, "error: ")
    assert tree(here) == before


@pytest.mark.parametrize("custom", [["x"], "x", 7, {"shardconv": [1]}])
def test_metadata_of_another_kind_is_no_checkpoint(custom: object, here: Path) -> None:
    orbax(here / "out", "files")
    found = json.loads((here / "out/_METADATA").read_text())
    (here / "out/_METADATA").write_text(json.dumps(found | {"custom_metadata": custom}))
    code, message = refusal("verify", "c.toml")
    assert (code, "_METADATA: TypeError: its custom_metadata is no object" in message) == (ExitCode.CHECK, True), message


# configs


LEAST = {"source": 'path = "src"', "target": 'layout = "flat"', "output": 'path = "out"', "workers": 'executor = "local"'}


def toml(section: str = "", line: str = "", **lines: str) -> bytes:
    """The config with a line more in a section, or with other lines for sections."""
    said = LEAST | lines
    return "".join(f"[{name}]\n{text}\n{line if name == section else ''}\n" for name, text in said.items()).encode()


CONFIGS = {
    "no bytes": (b"", "[source] path is missing"),
    "wrong UTF-8": (b"a = '\xff'", "byte 5 is not UTF-8"),
    "a NUL": (b"a = \0", "line 1, column 5"),
    "a control character": (b'[source]\npath = "\x1b[2J"', "line 2, column 9"),
    "a key twice": (toml("source", 'path = "x"'), "line 3", "overwrite"),
    "a section twice": (toml() + b"[source]\n", "declare"),
    "no closing quote": (b'[source]\npath = "src\n', "line 2"),
    "JSON": (b'{"source": {"path": "src"}}', "line 1"),
    "nested too deep": (b"a = " + b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
    "an integer of 5,000 digits": (b"a = " + b"9" * 5000, "Exceeds the limit"),
    "over 10 MB": (b"#" * 10_000_001, "over 10000000 bytes"),
    "a section that is a number": (b"source = 7\n", "source = 7 (an integer)"),
    "a section that is a list": (toml() + b"[[check]]\n", "check = [{}] (an array)"),
    "a section nobody has": (toml() + b"[chek]\n", "did you mean [check]?"),
    "a path that is a number": (toml(source="path = 7"), "[source] path = 7"),
    "a path with a NUL": (toml(source='path = "a\\u0000"'), "[source] path"),
    "an output with a NUL": (toml(output='path = "a\\u0000"'), "[output] path"),
    "a path of nothing": (toml(source='path = ""'), "[source] path"),
    "a path that clears the screen": (toml(source='path = ["\\u001b[2J"]'), r"\u001b[2J"),
    "an output over the source": (toml(output='path = "src"'), "holds the source"),
    "an output above the source": (toml(output='path = "src/../."'), "holds the source"),
    "a layout nobody has": (toml(target='layout = "flatt"'), 'did you mean "flat"?'),
    "a layout of 10^6 letters": (toml(target=f'layout = "{"x" * 10**6}"'), "[target] layout"),
    "a dtype nobody has": (toml("target", 'dtype = "float33"'), "[target] dtype"),
    "a date for a dtype": (toml("target", "dtype = 2020-01-01"), "[target] dtype"),
    "an infinite number": (toml("target", "vocab_size = inf"), "[target] vocab_size"),
    "a negative vocabulary": (toml("target", "vocab_size = -1"), "[target] vocab_size"),
    "an item above": (toml("output", 'item = "../x"'), "[output] item"),
    "a step of text": (toml("output", 'step = "../0"'), "[output] step"),
    "chunks of nothing": (toml("output", 'chunk_bytes = "0B"'), "[output] chunk_bytes"),
    "chunks of 10^400 bytes": (toml("output", f'chunk_bytes = "1{"0" * 400}.0MB"'), "[output] chunk_bytes"),
    "chunks of 5,000 digits": (toml("output", f'chunk_bytes = "{"9" * 5000}"'), "[output] chunk_bytes"),
    "a mesh axis of nobody": (toml() + b'[mesh]\nrules = { embed = "fsdp" }\n', '"fsdp" is not a mesh axis'),
    "a mesh of no devices": (toml() + b"[mesh]\naxes = { fsdp = 0 }\n", "[mesh] axes.fsdp = 0"),
    "fewer workers than none": (toml("workers", "count = -1"), "[workers] count = -1"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_refused(name: str, here: Path) -> None:
    text, *said = CONFIGS[name]
    (here / "c.toml").write_bytes(text)
    before = tree(here)
    for command in ("plan", "run", "verify"):
        code, message = refusal(command, "c.toml")
        assert (code, message[:7]) == (ExitCode.USAGE, "error: ")
        assert [word for word in ("c.toml", *said) if word not in message] == [], message
        assert tree(here) == before


# what a command takes of a machine


HUNGRY = ["a header longer than the file", "150,000 names twice", "100,000 files", "a zip bomb", "10^12 layers", "an index of 100 GB"]
BYTES = 600 << 20  # of memory, of which 150 MiB are Python and its libraries
# The peak is the process's own word: what the kernel tells its parent counts the parent's memory too, of which it is a fork.
PLANNING = """
import atexit, runpy, sys

def tell():
    with open("/proc/self/status") as status, open("peak", "w") as peak:
        peak.write(next(line.split()[1] for line in status if line.startswith("VmHWM")))

atexit.register(tell)
sys.argv = ["shardconv", "plan", "c.toml"]
runpy.run_module("shardconv", run_name="__main__")
"""


@pytest.mark.parametrize("name", HUNGRY)
def test_a_refusal_takes_little_memory(name: str, here: Path) -> None:
    SOURCES[name].make(here / "src")
    command, environment = [sys.executable, "-c", PLANNING], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == ExitCode.INPUT, done.stderr
    assert "Traceback" not in done.stderr
    assert int(Path("peak").read_text()) * 1024 < BYTES
