"""Checkpoints of PyTorch files: which files of a directory are taken, and that they become what safetensors of the same weights become."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conversions import Conversion, interrupt_after, make_config, make_source, plan_finely, restored
from stored import save as save_safetensors
from stored import save_index

from shardconv.config import RunOptions
from shardconv.conversion import run
from shardconv.errors import InputError, RunError
from shardconv.inspecting import inspect
from shardconv.run import Began
from shardconv.source import Source, check_unchanged, open_source
from shardconv.verify.tensors import Tensors

torch = pytest.importorskip("torch")

BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
REVISION = "download the index and its files again, all from one revision"


def ones(*names: str) -> dict[str, Any]:
    return {name: torch.ones(2) for name in names}


def problems(path: Path, prefix: str = "") -> list[tuple[str, str]]:
    with pytest.raises(InputError) as caught:
        open_source(path, prefix)
    assert caught.value.title == f"{path} cannot be read as a checkpoint"
    return [(problem.fact, problem.remedy) for problem in caught.value.problems]


# Which files


def test_a_directory_with_one_file_and_a_config(tmp_path: Path) -> None:
    torch.save(ones("a", "b") | {"epoch": 1}, tmp_path / BIN)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    source = open_source(tmp_path)
    assert (source.root, source.format, source.config, source.prefix) == (str(tmp_path), "pytorch", {"model_type": "llama"}, "")
    found = {name: (t.file, t.dtype, t.shape, t.nbytes) for name, t in source.tensors.items()}
    assert found == dict.fromkeys("ab", (BIN, "F32", (2,), 8))
    assert source.notes == (f"{BIN}: 1 entry that is no tensor is left out: epoch",)
    assert open_source(tmp_path / BIN) == source


@pytest.mark.parametrize("name", ["model.pt", "llama.pth", "last.ckpt", "weights.bin"])
def test_a_single_file_of_another_name(name: str, tmp_path: Path) -> None:
    torch.save(ones("a"), tmp_path / name)
    for other in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt"):
        (tmp_path / other).write_bytes(b"something else")
    assert list(open_source(tmp_path).files) == [name]


def test_several_files_with_an_index(tmp_path: Path) -> None:
    torch.save(ones("a", "stale"), tmp_path / FIRST)
    torch.save({"b": torch.ones(2), "a": torch.zeros(3)}, tmp_path / SECOND)
    save_index(tmp_path / INDEX, {"a": FIRST, "b": SECOND}, {"total_size": 16})
    (tmp_path / BIN).write_bytes(b"never opened")
    source = open_source(tmp_path)
    assert {name: tensor.file for name, tensor in source.tensors.items()} == {"a": FIRST, "b": SECOND}
    assert source.notes == (
        f"{INDEX} maps 1 tensor to {FIRST}, so what has the same name in {SECOND} is left unused: a",
        f"{INDEX} does not name 1 tensor of {FIRST}, left unused: stale",
        f"{BIN} is left unread, since {INDEX} does not name it",
    )
    assert open_source(tmp_path / INDEX) == source
    tensors = Tensors(str(tmp_path), (FIRST, SECOND))
    assert {name: os.path.basename(tensors.entries[name].file) for name in "ab"} == {"a": FIRST, "b": SECOND}


def test_files_that_disagree_with_their_index(tmp_path: Path) -> None:
    torch.save(ones("b"), tmp_path / FIRST)
    save_index(tmp_path / INDEX, {"a": FIRST, "b": FIRST, "c": SECOND})
    assert problems(tmp_path) == [
        (f"1 of the 2 files that {INDEX} names are missing: {SECOND}", "download them; a file may still be on its way"),
        (f"{INDEX} maps 1 tensor to {FIRST}, but no file has it: a", REVISION),
    ]
    save_index(tmp_path / INDEX, {"a": "model.safetensors"})
    assert problems(tmp_path) == [
        (f"{INDEX} maps tensors to model.safetensors, which is not a .bin file", "give the index of the .bin files")
    ]


@pytest.mark.parametrize(("counted", "noted"), [(16, False), (8, False), (12, True)])
def test_a_total_size_may_count_shared_tensors_once_or_twice(counted: int, noted: bool, tmp_path: Path) -> None:
    shared = torch.ones(2)
    torch.save({"a": shared, "b": shared}, tmp_path / FIRST)
    save_index(tmp_path / INDEX, {"a": FIRST, "b": FIRST}, {"total_size": counted})
    assert bool(open_source(tmp_path).notes) == noted
    assert open_source(tmp_path).total_bytes == 8


@pytest.mark.parametrize("beside", [BIN, INDEX])
def test_safetensors_are_taken_where_there_are_both(beside: str, tmp_path: Path) -> None:
    import numpy as np

    save_safetensors(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
    (tmp_path / beside).write_bytes(b"never opened")
    source = open_source(tmp_path)
    assert (source.format, source.notes) == ("safetensors", (f"{beside} is left unread, since there are .safetensors files",))
    assert open_source(tmp_path / "model.safetensors").notes == ()


def test_several_files_without_an_index(tmp_path: Path) -> None:
    for i in range(2):
        torch.save(ones("a"), tmp_path / f"consolidated.0{i}.pth")
    assert problems(tmp_path) == [
        (
            f"{tmp_path} has 2 PyTorch files and no index: consolidated.00.pth, consolidated.01.pth",
            f"download {INDEX} too, or give the path of one file",
        )
    ]


def test_problems_of_all_files_come_together(tmp_path: Path) -> None:
    torch.save(ones("a"), tmp_path / FIRST)
    os.truncate(tmp_path / FIRST, 200)
    (tmp_path / SECOND).write_bytes(b"<html>")
    save_index(tmp_path / INDEX, {"a": FIRST, "b": SECOND})
    assert [fact for fact, _ in problems(tmp_path)] == [
        f"{FIRST} is truncated: it begins as a zip archive, and no directory ends it at byte 200",
        f"{SECOND} is not a PyTorch file: it begins with b'<html>'",
    ]


def test_a_prefix_of_safetensors_is_refused(tmp_path: Path) -> None:
    import numpy as np

    save_safetensors(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
    assert problems(tmp_path, "model") == [
        ("source.prefix is 'model', and model.safetensors is safetensors, which keeps no tensors under a key", 'set source.prefix = "auto"')
    ]


def test_inspect_lists_one_of_several_state_dicts(tmp_path: Path) -> None:
    torch.save({"model": ones("a"), "ema": ones("b")}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="has tensors under model, ema"):
        inspect(str(tmp_path / "x.pt"), None)
    listing = inspect(str(tmp_path / "x.pt"), None, "ema")
    assert (listing.format, [entry.name for entry in listing.entries]) == ("pytorch", ["b"])


def test_what_changed_between_planning_and_running(tmp_path: Path) -> None:
    def change(name: str) -> list[tuple[str, str]]:
        path = tmp_path / name
        torch.save({"model": ones("a"), "ema": ones("b")}, path)
        source: Source = open_source(path, "model")
        assert check_unchanged(source) == []
        size = path.stat().st_size
        if name == "short.pt":
            os.truncate(path, size - 1)
        elif name == "gone.pt":
            path.unlink()
        elif name == "other.pt":
            torch.save({"model": ones("a"), "ema": {"b": torch.zeros(2)}}, path)
        if path.exists():
            os.utime(path, (1, 1))
        return [(problem.fact.replace(str(size), "SIZE"), problem.remedy) for problem in check_unchanged(source)]

    since = "changed since it was planned:"
    assert change("touched.pt") == [(f"touched.pt {since} it was written to; its size and header are the same", "plan again")]
    assert change("other.pt") == [(f"other.pt {since} its header is another one", "plan again")]
    ((fact, _),) = change("short.pt")
    assert fact.startswith(f"short.pt {since} it had SIZE bytes and has ")
    assert change("gone.pt") == [("gone.pt cannot be read any more: No such file or directory", "put it back, or plan again")]


# Whole conversions


def as_torch(source: Path) -> dict[str, Any]:
    """The tensors of a safetensors source as PyTorch has them, in natural order."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(source.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def training(tensors: dict[str, Any]) -> dict[str, Any]:
    """What a trainer under DDP and torch.compile leaves."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    state = {f"module._orig_mod.{name}": torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    return {"epoch": 3, "model": state, "optimizer": optimizer, "args": {"lr": 1e-4}, "ema": {"w": torch.zeros(1)}}


FORMS = ("single", "sharded", "training")


def make_form(form: str, root: Path, source: Path) -> tuple[Path, tuple[str, ...]]:
    """The source in PyTorch files below `root`, and what the config must say beside its path."""
    folder = root / form
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = as_torch(source)
    if form == "single":
        torch.save(tensors, folder / BIN)
    elif form == "sharded":
        homes = {name: (FIRST, SECOND)[i % 2] for i, name in enumerate(tensors)}
        for file in (FIRST, SECOND):
            torch.save({name: tensor for name, tensor in tensors.items() if homes[name] == file}, folder / file)
        save_index(folder / INDEX, homes)
    else:
        torch.save(training(tensors), folder / "checkpoint.pt")
    return folder, ("source.prefix=model",) if form == "training" else ()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("model"))


OPTIONS = RunOptions(restart=False, overwrite=False, verbosity=-1, json_logs=False)


@pytest.mark.parametrize("form", FORMS)
def test_pytorch_files_become_what_safetensors_become(form: str, tmp_path: Path, source: Path) -> None:
    folder, overrides = make_form(form, tmp_path, source)
    found = run(make_config(tmp_path, folder, "target.layout=maxtext", "target.scan_layers=true", *overrides), OPTIONS)
    (tmp_path / "twin").mkdir()
    twin = run(make_config(tmp_path / "twin", source, "target.layout=maxtext", "target.scan_layers=true"), OPTIONS)
    assert restored(Path(str(found["checkpoint"])) / "items") == restored(Path(str(twin["checkpoint"])) / "items")
    assert found["read_amplification"] == 1.0
    same = ("bytes_read", "bytes_written", "requests", "used_bytes", "target_bytes", "memory_budget_bytes")
    assert {key: found[key] for key in same} == {key: twin[key] for key in same}
    check = found["check"]
    assert isinstance(check, dict)
    weights = check["weights"]
    assert (weights["equal"], weights["whole"], weights["independent"]) == (True, True, True)


@pytest.mark.parametrize("form", FORMS)
def test_both_sides_think_the_same(form: str, tmp_path: Path, source: Path) -> None:
    pytest.importorskip("transformers")
    folder, overrides = make_form(form, tmp_path, source)
    found = run(make_config(tmp_path, folder, "check.mode=all", "check.lengths=[64]", *overrides), OPTIONS)
    check = found["check"]
    assert isinstance(check, dict)
    assert (check["equal"], check["weights"]["equal"], check["logits"]["equal"]) == (True, True, True)


def test_rays_workers_read_pytorch_files(tmp_path: Path, source: Path) -> None:
    pytest.importorskip("ray")
    folder, _ = make_form("sharded", tmp_path, source)
    found = run(make_config(tmp_path, folder, "workers.executor=ray", "workers.count=2"), OPTIONS)
    check = found["check"]
    assert isinstance(check, dict) and check["equal"]
    (tmp_path / "twin").mkdir()
    twin = run(make_config(tmp_path / "twin", source), OPTIONS)
    assert restored(Path(str(found["checkpoint"]))) == restored(Path(str(twin["checkpoint"])))


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_run_goes_on(form: str, tmp_path: Path, source: Path) -> None:
    folder, overrides = make_form(form, tmp_path, source)
    config = make_config(tmp_path, folder, *overrides)
    conversion = Conversion(tmp_path, config, plan_finely(config))
    with pytest.raises(RunError, match="interrupted: 3 of"):
        conversion.drive(interrupt_after(3))
    conversion.drive()
    began = next(told for told in conversion.told if isinstance(told, Began))
    assert len(began.resumed) == 3
    (tmp_path / "twin").mkdir()
    config = make_config(tmp_path / "twin", source)
    twin = Conversion(tmp_path / "twin", config, plan_finely(config))
    twin.drive()
    assert restored(conversion.out) == restored(twin.out)


def test_a_file_that_was_written_anew_is_refused_when_a_run_goes_on(tmp_path: Path, source: Path) -> None:
    folder, _ = make_form("single", tmp_path, source)
    config = make_config(tmp_path, folder)
    conversion = Conversion(tmp_path, config, plan_finely(config))
    conversion.stop_after(2)
    torch.save({name: tensor * 2 for name, tensor in as_torch(source).items()}, folder / BIN)
    conversion.plan = plan_finely(config)
    with pytest.raises(InputError) as caught:
        conversion.drive()
    assert f"source file {BIN} was " in str(caught.value)


def test_the_check_sees_one_wrong_bit(tmp_path: Path, source: Path) -> None:
    from shardconv.checking import verify

    folder, overrides = make_form("training", tmp_path, source)
    config = make_config(tmp_path, folder, *overrides)
    run(config, OPTIONS)
    assert verify(config)["equal"] is True
    tensor = open_source(folder, "model").tensors["model.layers.2.mlp.up_proj.weight"]
    path = folder / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[tensor.offset + 5] ^= 1
    path.write_bytes(content)
    found = verify(config)
    assert found["equal"] is False
    assert "layers.2.mlp.up[2, 0] is " in json.dumps(found["problems"])


def test_tied_weights_are_ties(tmp_path: Path, source: Path) -> None:
    tied = tmp_path / "tied"
    tied.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(config))
    tensors = as_torch(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, tied / BIN)
    found = run(make_config(tmp_path, tied), OPTIONS)
    assert found["read_amplification"] == 1.0
    assert "unembed" not in restored(Path(str(found["checkpoint"])))
    assert found["used_bytes"] == sum(t.numel() * t.element_size() for name, t in tensors.items() if name != "lm_head.weight")
