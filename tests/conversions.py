"""A tiny conversion for tests: a model of a megabyte, its config, its plan cut into a unit per chunk, and what comes of driving it."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from shardconv.config import Config, RunOptions, load_config
from shardconv.conversion import request_of
from shardconv.errors import RunError
from shardconv.ledger import Ledger
from shardconv.plan import Plan, Span, Unit
from shardconv.planning import plan_from_config
from shardconv.run import Finished, Stage, Told
from shardconv.run.driver import Outcome, Stages, drive
from shardconv.run.job import state_path
from shardconv.synth import synthesise

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def make_source(root: Path) -> Path:
    """Random weights in several files; returns their directory."""
    (root / "model.json").write_text(json.dumps(MODEL))
    synthesise(str(root / "model.json"), str(root / "source"), sparse=False, seed=1, dtype="bfloat16", shard_bytes=200_000)
    return root / "source"


def make_config(root: Path, source: Path, *overrides: str) -> Config:
    """A config that writes flat arrays, one per layer, to `root/out`, in this process."""
    path = root / "config.toml"
    path.write_text(
        f'[source]\npath = "{source}"\n[target]\nlayout = "flat"\nscan_layers = false\n[output]\npath = "{root}/out"\n'
        '[workers]\nexecutor = "local"\ncount = 1\nmemory_budget = "64MiB"\n'
    )
    return load_config(str(path), overrides)


def plan_finely(config: Config) -> Plan:
    """The config's plan with a unit per chunk; a real plan of a megabyte is one unit."""
    plan = plan_from_config(config)
    chunks = [(number, chunk) for number, leaf in enumerate(plan.leaves) for chunk in range(leaf.chunks)]
    units = tuple(Unit(n, (Span(leaf, chunk, chunk + 1),), 0, plan.leaves[leaf].nbytes, 0) for n, (leaf, chunk) in enumerate(chunks))
    return replace(plan, units=units)


@dataclass
class Conversion:
    """A conversion that can be driven again and again; `told` is what the last drive told."""

    root: Path
    config: Config
    plan: Plan
    verbosity: int = 0
    told: list[Told] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def ledger(self) -> Ledger:
        return Ledger(state_path(str(self.out)))

    def drive(self, on: Callable[[Told], None] = lambda told: None, *, restart: bool = False, overwrite: bool = False) -> Outcome:
        """`on` is called with whatever is told, and may interrupt by raising."""
        self.told = []

        def tell(told: Told) -> None:
            self.told.append(told)
            on(told)

        options = RunOptions(restart=restart, overwrite=overwrite, verbosity=self.verbosity, json_logs=False)
        return drive(request_of(self.config, options), self.plan, Stages(tell), tell, lambda outcome: {"units": len(outcome.records)}, None)

    def stop_after(self, units: int) -> None:
        """Drive until some units are finished, then interrupt."""
        with pytest.raises(RunError, match="interrupted"):
            self.drive(interrupt_after(units))

    def finished(self) -> list[int]:
        return [told.unit for told in self.told if isinstance(told, Finished)]


def interrupt_after(units: int) -> Callable[[Told], None]:
    seen = []

    def on(told: Told) -> None:
        if isinstance(told, Finished):
            seen.append(told.unit)
        if len(seen) == units:
            raise KeyboardInterrupt

    return on


def interrupt_at(stage: str) -> Callable[[Told], None]:
    def on(told: Told) -> None:
        if told == Stage(stage):
            raise KeyboardInterrupt

    return on


def restored(path: Path) -> dict[str, bytes]:
    """The leaves of a checkpoint by plain Orbax, as bytes."""
    import orbax.checkpoint as ocp

    def flat(tree: Any, name: str = "") -> dict[str, bytes]:
        if not isinstance(tree, dict):
            return {name[1:]: np.asarray(tree).tobytes()}
        return {key: leaf for step in tree for key, leaf in flat(tree[step], f"{name}.{step}").items()}

    return flat(ocp.PyTreeCheckpointer().restore(str(path)))


def stored(source: Path) -> dict[str, bytes]:
    """The source's tensors by the safetensors library."""
    found: dict[str, bytes] = {}
    for path in source.glob("*.safetensors"):
        found |= {name: bytes(tensor["data"]) for name, tensor in safetensors.deserialize(path.read_bytes())}  # type: ignore[no-untyped-call]
    return found


def assert_complete(conversion: Conversion, source: Path) -> None:
    """The checkpoint holds the source's bytes; only the report is left beside it."""
    assert os.listdir(conversion.ledger.state) == ["report.json"]
    assert sorted(os.listdir(conversion.root)) == ["config.toml", "out", "out.shardconv"]
    leaves = restored(conversion.out)
    tensors = stored(source)
    assert leaves["embed"] == tensors["model.embed_tokens.weight"]
    assert leaves["layers.3.mlp_norm"] == tensors["model.layers.3.post_attention_layernorm.weight"]
    assert sorted(map(len, leaves.values())) == sorted(map(len, tensors.values()))
