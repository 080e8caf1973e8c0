"""A tiny conversion for tests: a model of a megabyte, its config, and its plan cut into a unit per chunk."""

import json
from dataclasses import replace
from pathlib import Path

from shardconv.config import Config, load_config
from shardconv.plan import Plan, Span, Unit
from shardconv.planning import plan_from_config
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
