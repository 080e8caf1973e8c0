"""Conversions whose logits tests compare: tiny models of every family, written by transformers, converted, and the reference of each.

The reference of a model is walked through once, and says the same again to all tests that ask.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import written
from test_models import LLAMA, LLAMA3, YARN, torch_model

from shardconv.families import find
from shardconv.family import Layout, LayoutOptions, bind
from shardconv.layouts import LAYOUTS
from shardconv.plan import Plan, PlanOptions, make_plan
from shardconv.run.finish import custom_metadata
from shardconv.run.job import Job, Place
from shardconv.run.work import Workspace, array_spec, do_unit
from shardconv.sharding import MeshRules
from shardconv.sinks.commit import CommitRequest
from shardconv.sinks.paths import create_stage, final_path
from shardconv.sinks.spec import StoreOptions
from shardconv.source import open_source
from shardconv.verify import apart, logits
from shardconv.verify.logit_request import Bounds, Rounding
from shardconv.verify.logits import Found
from shardconv.verify.reference import Head, Reference, Step, load_reference
from shardconv.verify.restoring import describe
from shardconv.verify.roundings import roundings
from shardconv.verify.sample import random_sample
from shardconv.verify.walking import Side

Table = Callable[[Layout], Layout]
Array = np.ndarray[Any, Any]

# As many positions as the longest sequence that is asked by default has, and more: none is to be cut.
SIZES = {**LLAMA, "vocab_size": 62, "num_hidden_layers": 4, "max_position_embeddings": 256}
# One model for each family, each with what its published sizes have and tiny ones usually lack.
FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {**SIZES, "rope_scaling": LLAMA3, "rope_theta": 500.0, "tie_word_embeddings": True},
    "mistral": {**SIZES, "model_type": "mistral", "sliding_window": 17},
    "mixtral": {**SIZES, "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2": {**SIZES, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2, "head_dim": None},
    "qwen3": {**SIZES, "model_type": "qwen3", "rope_scaling": YARN},
    "qwen3_moe": {
        **SIZES,
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
    },
    "gemma2": {
        **SIZES,
        "model_type": "gemma2",
        "sliding_window": 17,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
BIASED = {**SIZES, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}
LENGTHS = (64, 80)
MESH = MeshRules(
    {"fsdp": 4, "tensor": 2}, {"embed": ("fsdp",), "heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",), "vocab": ("tensor",)}
)


class Recorded(Reference):
    """A reference that is walked through once, with one sample."""

    @cached_property
    def seen(self) -> list[Step]:
        return []

    @cached_property
    def last(self) -> Head:
        return super().head()

    def steps(self, sample: Sequence[Any], *, trace: bool = False) -> Iterator[Step]:
        if not self.seen:
            self.seen.extend(super().steps(sample, trace=True))
        return iter(self.seen if trace else [replace(step, parts=None) for step in self.seen])

    def head(self) -> Head:
        return self.last


@dataclass(frozen=True, eq=False)
class Case:
    """A source and its sample."""

    source: Path
    sample: tuple[Any, ...]

    @cache  # noqa: B019  a case lives as long as the tests
    def reference(self, rounded: frozenset[tuple[str, Rounding]] = frozenset()) -> Reference:
        """What the reference says, with these roundings."""
        plain = load_reference(str(self.source), dict(rounded))
        return Recorded(plain.architecture, plain.published, plain.roundings)


def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """The case of a model, made once."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")

    @cache
    def made(name: str, dtype: str = "float32") -> Case:
        config = BIASED if name == "biased" else FAMILIES[name]
        source = tmp_path_factory.mktemp(name)
        with apart.quiet():
            torch_model(config).to(getattr(torch, dtype)).save_pretrained(source, max_shard_size="100KB")
        return Case(source, random_sample(config["vocab_size"], seed=3, lengths=LENGTHS))

    return made


def plan_of(source: Path, layout: str, table: Table = lambda table: table, **options: Any) -> Plan:
    opened = open_source(source)
    config = opened.config or {}
    model = bind(find(config), config)
    chosen = LayoutOptions(options.get("scan", True), options.get("rope", "auto"), options.get("vocab", 0), "")
    wanted = PlanOptions(options.get("dtype", "source"), MESH, 8192, 64 << 20)
    return make_plan(opened, model, table(LAYOUTS[layout](model, chosen)), wanted)


def write(plan: Plan, root: Path) -> str:
    """Carries a plan out and commits it where its layout's loader looks; the path of the tree."""
    from shardconv.sinks.orbax_commit import commit

    step, item = (0, "items") if plan.layout == "maxtext" else (None, None)
    out, options = str(root / "out"), StoreOptions()
    stage = create_stage(out, step, item)
    done = [do_unit(plan, unit, stage, f"u{unit.number}", options, lambda _: None, Workspace()) for unit in plan.units]
    metadata = custom_metadata(plan, Job(Place(out, step, item, False), options, {}), [{"digests": one.digests} for one in done])
    attempts = tuple(one.attempt for one in done)
    commit(CommitRequest(out, step, item, tuple(array_spec(leaf) for leaf in plan.leaves), attempts, options, metadata))
    return final_path(out, step, item)


def side_of(made: Case, path: str, rope: str = "auto", *, layer_by_layer: bool = False) -> Side:
    """The checkpoint at a path as its layout's code reads it."""
    devices, config = jax.devices(), logits.hf_config(str(made.source))
    return logits.jax_side(describe(path, devices), config, rope, devices, layer_by_layer=layer_by_layer)


def judged(made: Case, side: Side, plan: Plan, bounds: Bounds | None = None, *, trace: bool = False) -> Found:
    """The comparison, with the reference rounded as the plan rounds."""
    known = made.reference(frozenset(roundings(plan).items()))
    return logits.side_by_side(known, side, made.sample, bounds or Bounds(), trace=trace)


# Tables with a fault


def slot(param: str, **changes: object) -> Table:
    """A layout's table with another entry for one parameter."""
    return lambda table: written.renamed(table, **{param: changes})


def exchanged(a: str, b: str) -> Table:
    return lambda table: written.exchanged(table, a, b)


def kinds_exchanged(table: Layout) -> Layout:
    return replace(table, axes={**table.axes, "kind": ("global", "local")})
