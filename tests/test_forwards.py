"""The comparison of logits by other forwards than the project's own: the PyTorch module traced, and JAX functions that users write.

The same real parts as in `test_logits`: a checkpoint written by transformers, converted, restored on eight devices, and judged by the
noise that the reference is measured to have.
"""

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from logit_cases import Case, Table, cases, exchanged, plan_of, slot, write
from test_floors import ROOT, loaded

from shardconv.errors import CheckError, ConfigError
from shardconv.verify.agreement import LogitReport
from shardconv.verify.forwards import forward_of, require_forward
from shardconv.verify.logit_request import Bounds, LogitRequest
from shardconv.verify.logits import by_logits, check
from shardconv.verify.restoring import Restored, restore
from shardconv.verify.roundings import roundings

traces = pytest.mark.skipif(importlib.util.find_spec("torchax") is None, reason="torchax is not installed")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cases(tmp_path_factory)


def converted(made: Case, root: Path, table: Table = lambda table: table, **options: Any) -> tuple[Restored, Any]:
    plan = plan_of(made.source, "flat", table, **options)
    return restore(write(plan, root), jax.devices()), made.reference(frozenset(roundings(plan).items()))


def judged_by(name: str, made: Case, restored: Restored, reference: Any) -> LogitReport:
    return by_logits(reference, forward_of(name, str(made.source), restored), made.sample, Bounds()).report


# The PyTorch module, traced


@traces
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"scan": True}),
        ("llama", {"scan": False, "rope": "interleaved", "vocab": 64}),
        ("qwen3", {"scan": True, "dtype": "bfloat16"}),
        ("qwen3", {"scan": False}),
        ("mixtral", {"scan": True}),
        ("mixtral", {"scan": False}),
        ("gemma2", {"scan": True}),
        ("gemma2", {"scan": False}),
        ("qwen3_moe", {"scan": True}),
        ("biased", {"scan": True, "rope": "interleaved"}),
    ],
)
def test_the_traced_module_thinks_as_the_source(case: Any, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    made = case(name)
    restored, reference = converted(made, tmp_path, **options)
    report = judged_by("torch", made, restored, reference)
    assert report.reasons == () and report.unjudged == 0
    assert report.bounds.max_abs is not None and report.judged.max_abs < report.bounds.max_abs / 2


@traces
def test_the_whole_check_by_the_traced_module(case: Any, tmp_path: Path) -> None:
    made = case("mixtral")
    plan = plan_of(made.source, "flat")
    path, source = write(plan, tmp_path), str(made.source)
    request = LogitRequest(path, source, "auto", roundings(plan), "torch", (64, 70), 5, None, Bounds(), trace=False, memory=1 << 30)
    found = check(request)
    assert found.report.reasons == () and found.forward == "torch" and found.devices == 8


@traces
@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("qwen3", exchanged("layers.mlp.gate", "layers.mlp.up")),
        ("mixtral", exchanged("layers.experts.gate", "layers.experts.up")),
        ("gemma2", slot("final_norm", shift="norm_shift")),
    ],
)
def test_a_fault_is_seen_by_the_traced_module(case: Any, tmp_path: Path, name: str, table: Table) -> None:
    made = case(name)
    restored, reference = converted(made, tmp_path, table)
    assert len(judged_by("torch", made, restored, reference).reasons) == 3


@traces
@pytest.mark.parametrize("scan", [True, False])
def test_torch_holds_no_weights_and_the_arrays_stay_where_they_are(case: Any, tmp_path: Path, scan: bool) -> None:
    from shardconv.verify import tracing

    made = case("mixtral")
    restored, _ = converted(made, tmp_path, scan=scan)
    module = tracing.weightless_module(str(made.source), tied=False)
    assert {weight.device.type for weight in module.parameters()} == {"meta"}
    assert sum(buffer.nbytes for buffer in module.buffers()) < 1000 and {buffer.device.type for buffer in module.buffers()} == {"cpu"}
    gate = restored.leaves["layers.experts.gate" if scan else "layers.2.experts.gate"]
    assert len({str(shard.index) for shard in gate.addressable_shards}) == 8
    parts = tracing.parts_of(module, restored)
    assert {name: len(found) for name, found in parts.items() if len(found) > 1} == {
        f"model.layers.{layer}.mlp.experts.gate_up_proj": 2 for layer in range(4)
    }
    back = jax.jit(lambda leaves: {name: tracing.joined(found, leaves) for name, found in parts.items()})
    compiled = back.lower(dict(restored.leaves)).compile()
    ((wanted,), _), given = compiled.input_shardings, restored.leaves
    assert [name for name, one in wanted.items() if not one.is_equivalent_to(given[name].sharding, given[name].ndim)] == []
    # Where the compiler is free to choose, what comes out is as spread as what went in: no device ever has a kernel whole.
    gathered = [name for name, sharding in compiled.output_shardings.items() if sharding.is_fully_replicated and "norm" not in name]
    assert gathered == []


@traces
def test_a_checkpoint_that_the_module_does_not_fit(case: Any, tmp_path: Path) -> None:
    made = case("qwen3")
    restored, _ = converted(made, tmp_path)
    leaves = dict(restored.leaves)
    leaves["layers.attn.sink"] = leaves.pop("layers.attn.k_norm")
    with pytest.raises(CheckError) as caught:
        forward_of("torch", str(made.source), Restored(leaves, restored.mesh, restored.metadata))
    assert str(caught.value) == (
        "the checkpoint does not fit transformers' module (2 problems):\n"
        "  the checkpoint has no layers.attn.k_norm\n"
        "  layers.attn.sink is in the checkpoint, and the module has no use for it"
    )
    unknown = {**restored.metadata, "shardconv": {**restored.metadata["shardconv"], "family": "mamba"}}
    with pytest.raises(ConfigError) as refused:
        forward_of("torch", str(made.source), Restored(restored.leaves, restored.mesh, unknown))
    assert str(refused.value) == (
        "check.forward cannot be used (1 problem):\n"
        "  nobody has stated twice where the flat layout has mamba\n"
        '      set check.forward = "package.module:function", or check.mode = "weights"'
    )


def test_tracing_says_nothing_of_maxtext() -> None:
    with pytest.raises(ConfigError) as caught:
        require_forward("torch", "maxtext")
    assert str(caught.value) == (
        "check.forward cannot be used (1 problem):\n"
        "  the PyTorch module, traced, says nothing about how maxtext code reads a checkpoint: its arrays would be put back first\n"
        '      set check.forward = "auto"'
    )


# Forwards of the user's own


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Restored, Any]:
    """A Llama with nothing special, converted."""
    from logit_cases import LENGTHS, SIZES
    from test_models import torch_model

    from shardconv.verify.sample import random_sample

    pytest.importorskip("torch")
    source = tmp_path_factory.mktemp("plain")
    torch_model(SIZES).save_pretrained(source)
    made = Case(source, random_sample(SIZES["vocab_size"], seed=3, lengths=LENGTHS))
    return made, *converted(made, tmp_path_factory.mktemp("converted"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of the user's, whose modules are forgotten after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mine", "mymodel")]:
        del sys.modules[name]


@pytest.mark.parametrize(("place", "model"), [(0, "LinenLlama"), (1, "NnxLlama"), (2, "EqxLlama")])
def test_a_users_own_model_thinks_as_the_source(plain: Any, here: Path, place: int, model: str) -> None:
    pytest.importorskip("flax")
    pytest.importorskip("equinox")
    block = (ROOT / "docs" / "logits.md").read_text().split("```python\n")[1:][place].partition("```")[0]
    (here / "mymodel.py").write_text(f"from user_models import {model} as Llama\n")
    (here / "mine.py").write_text(block)
    made, restored, reference = plain
    report = judged_by("mine:forward", made, restored, reference)
    assert report.reasons == ()
    leaves = {**restored.leaves, "layers.mlp.gate": restored.leaves["layers.mlp.up"], "layers.mlp.up": restored.leaves["layers.mlp.gate"]}
    swapped = Restored(leaves, restored.mesh, restored.metadata)
    assert len(judged_by("mine:forward", made, swapped, reference).reasons) == 3


def test_a_module_of_the_working_directory_gets_sharded_arrays_by_name(plain: Any, here: Path) -> None:
    made, restored, _ = plain
    (here / "mine").mkdir()
    (here / "mine" / "forwards.py").write_text(
        "import jax.numpy as jnp\n\nseen = []\n\n"
        "def forward(params, tokens):\n    seen.append((params, tokens))\n    return jnp.zeros((*tokens.shape, 62))\n"
    )
    require_forward("mine.forwards:forward")
    tokens = np.arange(10)[None]
    assert forward_of("mine.forwards:forward", str(made.source), restored)(tokens).shape == (1, 10, 62)
    ((params, given),) = sys.modules["mine.forwards"].seen
    assert given.dtype == jnp.int32 and given.tolist() == tokens.tolist()
    assert set(params) == {"embed", "final_norm", "unembed", "layers"} and set(params["layers"]["mlp"]) == {"gate", "up", "down"}
    gate = params["layers"]["mlp"]["gate"]
    assert gate is restored.leaves["layers.mlp.gate"] and isinstance(gate.sharding, NamedSharding) and not gate.is_fully_replicated


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("forward", "", "  check.forward is 'forward'\n      say \"auto\", \"torch\", or \"package.module:function\""),
        ("mine:a b", "", "  check.forward is 'mine:a b'\n      say \"auto\", \"torch\", or \"package.module:function\""),
        (
            "yours:forward",
            "",
            "  there is no module 'yours' in {here}, nor among the installed packages\n"
            "      run from the directory that it is in, or install its package",
        ),
        (
            "mine.inner:forward",
            "import nothing_like_this",
            "  importing what 'mine.inner' is in raised ModuleNotFoundError: No module named 'nothing_like_this'",
        ),
        (
            "mine:forward",
            "import os\n_a = 1\ndef other(): pass\nif _a:\n    def third(): pass",
            "  {here}/mine.py has no 'forward'\n      it has: os, other, third",
        ),
        ("mine:forward", "def forward(:", "  {here}/mine.py cannot be read: SyntaxError: invalid syntax (mine.py, line 1)"),
    ],
)
def test_what_is_told_before_a_byte_is_written(here: Path, name: str, text: str, said: str) -> None:
    (here / "mine.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        require_forward(name)
    assert str(caught.value) == "check.forward cannot be used (1 problem):\n" + said.format(here=here)


@pytest.mark.parametrize(
    "text",
    [
        "def forward(p, t): ...",
        "forward = lambda p, t: 0",
        "try:\n    from math import sin as forward\nexcept ImportError: pass",
        "from math import *",
    ],
)
def test_a_function_may_come_to_its_name_in_any_way(here: Path, text: str) -> None:
    (here / "mine.py").write_text(text)
    require_forward("mine:forward")
    assert "mine" not in sys.modules


def test_asking_loads_nothing_heavy_and_not_the_users_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import jax\ndef forward(params, tokens): ...\n")
    code = "from shardconv.verify.forwards import require_forward; require_forward('mine:forward'); require_forward('auto')"
    assert loaded(code, tmp_path) == []


BROKEN: Mapping[str, tuple[str, type[Exception], str]] = {
    "import": (
        "import jax\nraise RuntimeError('no licence')\ndef forward(p, t): ...",
        ConfigError,
        "check.forward cannot be used (1 problem):\n  importing 'mine' raised RuntimeError: no licence, at {here}/mine.py:2",
    ),
    "no function": (
        "forward = {}",
        ConfigError,
        "check.forward cannot be used (1 problem):\n"
        "  mine:forward is a dict, not a function\n"
        "      name a function of (params, tokens)",
    ),
    "raises": (
        "def inner(params):\n    return params['model']\ndef forward(params, tokens):\n    return inner(params)",
        CheckError,
        "the forward failed (1 problem):\n"
        "  mine:forward raised KeyError: 'model', at {here}/mine.py:2\n"
        "      it is called as function(params, tokens): the checkpoint as nested dicts of arrays, and int32 (batch, length)",
    ),
    "arguments": (
        "def forward(tokens): ...",
        CheckError,
        "the forward failed (1 problem):\n"
        "  mine:forward raised TypeError: forward() takes 1 positional argument but 2 were given\n"
        "      it is called as function(params, tokens): the checkpoint as nested dicts of arrays, and int32 (batch, length)",
    ),
    "hidden states, last position": (
        "import jax.numpy as jnp\ndef forward(params, tokens): return jnp.zeros((1, 62))",
        CheckError,
        "the forward returns no logits (1 problem):\n"
        "  mine:forward returned float32 (1, 62)\n"
        "      return logits (batch, length, rows), here (1, 10, rows)",
    ),
    "a tuple": (
        "def forward(params, tokens): return (tokens, None)",
        CheckError,
        "the forward returns no logits (1 problem):\n"
        "  mine:forward returned a tuple\n"
        "      return logits (batch, length, rows), here (1, 10, rows)",
    ),
    "token ids": (
        "def forward(params, tokens): return tokens[..., None]",
        CheckError,
        "the forward returns no logits (1 problem):\n"
        "  mine:forward returned int32 (1, 10, 1)\n"
        "      return logits (batch, length, rows), here (1, 10, rows)",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_forward_is_the_users_to_mend(plain: Any, here: Path, kind: str) -> None:
    made, restored, _ = plain
    text, error, said = BROKEN[kind]
    (here / "mine.py").write_text(text)
    with pytest.raises(error) as caught:
        forward_of("mine:forward", str(made.source), restored)(np.arange(10)[None])
    assert str(caught.value) == said.format(here=here)


@traces
def test_torch_is_wanted_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "torchax") else found(name))
    with pytest.raises(ConfigError, match="torch and torchax are not installed"):
        require_forward("torch")
