"""A conversion goes on only as what it was begun as, and from the source that was planned."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conversions import Conversion, make_config, make_source, plan_finely

from shardconv.boxes import chunk_box
from shardconv.errors import ConfigError, InputError, ShardconvError
from shardconv.leaf import leaf_pieces
from shardconv.run import Finished, Ready, Retried, Told

pytestmark = pytest.mark.filterwarnings("error")

LATER = 2_000_000_000  # a moment after every file that a test makes


@pytest.fixture
def conversion(tmp_path: Path) -> Conversion:
    config = make_config(tmp_path, make_source(tmp_path))
    return Conversion(tmp_path, config, plan_finely(config))


def first_file(conversion: Conversion) -> Path:
    """The file that the first unit reads."""
    plan, leaf = conversion.plan, conversion.plan.leaves[0]
    _, piece = next(iter(leaf_pieces(leaf, chunk_box(leaf.shape, leaf.chunk, 0))))
    return Path(plan.source.root, plan.source.tensors[piece.key].file)


def plan_and_drive(conversion: Conversion) -> None:
    """What the same command does."""
    conversion.plan = plan_finely(conversion.config)
    conversion.drive()


def refusal_of(conversion: Conversion, *overrides: str) -> ShardconvError:
    """How a run is refused that goes on with another config."""
    conversion.config = make_config(conversion.root, Path(conversion.config.source.path), *overrides)
    with pytest.raises(ShardconvError) as caught:
        plan_and_drive(conversion)
    assert conversion.finished() == []
    assert not conversion.out.exists()
    return caught.value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("target.dtype=float16", 'target.dtype was "source", is "float16"'),
        ("target.layout=maxtext", 'target.layout was "flat", is "maxtext"'),
        ("target.scan_layers=true", "target.scan_layers was false, is true"),
        ("mesh.axes={fsdp=2}", 'mesh.axes was [], is [["fsdp", 2]]'),
        ("output.zarr=2", "output.zarr was 3, is 2"),
        ("output.ocdbt=false", "output.ocdbt was true, is false"),
        ('output.compression="zstd"', 'output.compression was "none", is "zstd"'),
    ],
)
def test_another_config_is_refused_with_what_differs(conversion: Conversion, override: str, said: str) -> None:
    conversion.stop_after(2)
    refused = refusal_of(conversion, override)
    assert isinstance(refused, ConfigError)
    assert refused.title == f"{conversion.out} was begun with another config, source or version"
    assert said in [problem.fact for problem in refused.problems]
    assert len(conversion.ledger.finished()) == 2


def test_several_differences_are_one_table(conversion: Conversion) -> None:
    conversion.stop_after(2)
    assert str(refusal_of(conversion, "target.dtype=float16", "output.zarr=2")) == (
        f"{conversion.out} was begun with another config, source or version (2 problems):\n"
        "  output.zarr was 3, is 2\n"
        '  target.dtype was "source", is "float16"\n'
        "      go back to what it was, or use --restart to discard the 2 finished units"
    )


@pytest.mark.parametrize(
    ("place", "name"), [("shardconv.__version__", "shardconv"), ("shardconv.run.preflight.version", "orbax-checkpoint")]
)
def test_another_version_is_refused(conversion: Conversion, monkeypatch: pytest.MonkeyPatch, place: str, name: str) -> None:
    conversion.stop_after(2)
    monkeypatch.setattr(place, "99.0" if name == "shardconv" else lambda _: "99.0")
    (problem,) = refusal_of(conversion).problems
    assert problem.fact.startswith(f"{name} was ") and problem.fact.endswith(", is 99.0")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 2)


def lengthen(file: Path) -> None:
    with file.open("ab") as grown:
        grown.write(bytes(2))


def write_other_bytes(file: Path) -> None:
    with file.open("r+b") as open_file:
        open_file.seek(-2, os.SEEK_END)
        open_file.write(b"\xff\xff")
    os.utime(file, (LATER, LATER))  # a clock may tick only 250 times a second, and this test is faster


def replace_file(file: Path) -> None:
    copy = file.with_suffix(".new")
    shutil.copy(file, copy)
    write_other_bytes(copy)
    copy.rename(file)


CHANGES = [truncate, lengthen, write_other_bytes, replace_file]


@pytest.mark.parametrize("change", [*CHANGES, os.unlink])
def test_a_source_that_changed_between_runs_is_refused_by_name(conversion: Conversion, change: Callable[[Path], None]) -> None:
    conversion.stop_after(2)
    file = first_file(conversion)
    change(file)
    with pytest.raises(InputError, match=file.name):
        plan_and_drive(conversion)
    assert len(conversion.ledger.finished()) == 2


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_while_it_is_converted_is_refused_by_name(conversion: Conversion, change: Callable[[Path], None]) -> None:
    file = first_file(conversion)

    def change_it(told: Told) -> None:
        if isinstance(told, Ready):
            change(file)

    with pytest.raises(InputError, match=f"{file.name} (changed since it was planned: it|was cut short)") as caught:
        conversion.drive(change_it)
    assert caught.value.exit_code == 3
    assert not any(isinstance(told, Finished | Retried) for told in conversion.told)
    assert conversion.ledger.finished() == {}
    assert not conversion.out.exists()


def test_a_file_that_goes_while_it_is_converted_is_refused_by_name(conversion: Conversion) -> None:
    file = first_file(conversion)
    with pytest.raises(InputError, match=rf"{file.name} holds tensor \S+ and cannot be opened any more: No such file or directory"):
        conversion.drive(lambda told: file.unlink() if isinstance(told, Ready) else None)
    assert conversion.ledger.finished() == {}
