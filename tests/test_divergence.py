"""A seeded fault is found in the block and the part that has it, and clean conversions have none to find."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from logit_cases import FAMILIES, Array, Table, cases, exchanged, judged, plan_of, side_of, slot, write

from shardconv.models import decoder as model
from shardconv.models.decoder import weights_of
from shardconv.models.description import Decoder
from shardconv.verify.divergence import PARTS, StepGap, first_part, step_gap
from shardconv.verify.restoring import restore
from shardconv.verify.walking import Side

MAXTEXT = "params.params.decoder.layers."


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cases(tmp_path_factory)


def with_leaf(path: str, side: Side, leaf: str, edit: Callable[[Array], Array]) -> Side:
    """The side of a checkpoint, one leaf of which is another."""
    leaves = dict(restore(path, jax.devices()).leaves)
    leaves[leaf] = jax.device_put(edit(np.array(leaves[leaf])), leaves[leaf].sharding)
    return Side(weights_of(side.weights.reading, leaves), side.published)


def layer(number: int, edit: Callable[[Array], Array], axis: int = 0) -> Callable[[Array], Array]:
    """An edit of one layer of a leaf that stacks them."""

    def of_layer(array: Array) -> Array:
        moved = np.moveaxis(array, axis, 0)
        moved[number] = edit(moved[number].copy())
        return array

    return of_layer


# Faults in one layer of an array: the model, the layout, the leaf, the edit, and the step and the part that have it.
IN_A_LAYER: Mapping[str, tuple[str, str, str, Callable[[Array], Array], str, str]] = {
    "heads of the query exchanged": ("llama", "flat", "layers.attn.q", layer(2, lambda q: q[:, ::-1]), "block 2", "q"),
    "query in another rotary order": ("llama", "maxtext", MAXTEXT + "self_attention.query.kernel",
        layer(1, lambda q: q.reshape(*q.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(q.shape), axis=1), "block 1", "q"),
    "key's bias dropped": ("qwen2", "flat", "layers.attn.k_bias", layer(3, np.zeros_like), "block 3", "k"),
    "one part in ten thousand": ("mistral", "flat", "layers.attn.v", layer(1, lambda v: v * np.float32(1.0001)), "block 1", "v"),
    "another norm of the key": ("qwen3", "maxtext", MAXTEXT + "self_attention.key_norm.scale", layer(2, np.flip, axis=1),
        "block 2", "k_norm"),
    "heads of the output exchanged": ("gemma2", "flat", "layers.attn.o", layer(2, lambda o: o[::-1]), "block 2", "o"),
    "norm of the block before": ("llama", "flat", "layers.attn_norm", lambda norm: np.roll(norm, 1, axis=0), "block 0", "attn_norm"),
    "norm of the last block": ("gemma2", "flat", "layers.mlp_post_norm", layer(3, np.flip), "block 3", "mlp_post_norm"),
    "a norm with one value off": ("qwen3", "flat", "layers.mlp_norm", layer(1, lambda norm: norm * (1 + 0.01 * (np.arange(48) == 5))),
        "block 1", "mlp_norm"),
    "an expert twice": ("qwen3_moe", "maxtext", MAXTEXT + "moe_block.wo", layer(2, lambda wo: wo[[0, 0, 2, 3, 4, 5]].copy(), axis=1),
        "block 2", "experts"),
    "experts in another order": ("mixtral", "flat", "layers.experts.gate", layer(1, lambda gate: gate[::-1]), "block 1", "experts"),
    "router of another layer": ("mixtral", "flat", "layers.experts.router", layer(1, np.flip), "block 1", "router"),
    "down turned over": ("mistral", "maxtext", MAXTEXT + "mlp.wo.kernel", layer(3, np.flip, axis=1), "block 3", "down"),
    "not a number": ("llama", "flat", "layers.mlp.up", layer(2, lambda up: np.where(np.arange(40) == 7, np.nan, up)), "block 2", "up"),
    "rows of the embedding off by one": ("mistral", "flat", "embed", lambda embed: np.roll(embed, 1, axis=0), "embed", "embed"),
    "final norm": ("mistral", "flat", "final_norm", lambda norm: norm * np.float32(1.01), "logits", "final_norm"),
    "output projection": ("mistral", "maxtext", "params.params.decoder.logits_dense.kernel", lambda out: np.roll(out, 1, axis=1),
        "logits", "unembed"),
}  # fmt: skip


@pytest.mark.parametrize("fault", IN_A_LAYER)
def test_a_fault_in_a_layer_is_found_there(case: Any, tmp_path: Path, fault: str) -> None:
    name, layout, leaf, edit, step, part = IN_A_LAYER[fault]
    made = case(name)
    plan = plan_of(made.source, layout)
    path = write(plan, tmp_path)
    side = with_leaf(path, side_of(made, path), leaf, edit)
    found = judged(made, side, plan, trace=True)
    assert found.divergence is not None and (found.divergence.step, found.divergence.part) == (step, part)
    assert not found.divergence.max_abs <= 4 * found.divergence.floor
    untraced = judged(made, side, plan)
    assert untraced.divergence is not None and (untraced.divergence.step, untraced.divergence.part) == (step, None)


# Faults in a layout's table are in every layer: the first is found.
IN_A_TABLE: Mapping[str, tuple[str, str, Table, str]] = {
    "gate and up swapped": ("llama", "flat", exchanged("layers.mlp.gate", "layers.mlp.up"), "gate"),
    "k and v swapped": ("llama", "maxtext", exchanged("layers.attn.k", "layers.attn.v"), "k"),
    "query scale missing": ("mistral", "maxtext", slot("layers.attn.q", scale=""), "q"),
    "norms of query and key swapped": ("qwen3", "maxtext", exchanged("layers.attn.q_norm", "layers.attn.k_norm"), "q_norm"),
    "norm's 1 missing": ("gemma2", "maxtext", slot("layers.mlp_norm", shift=""), "mlp_norm"),
}


@pytest.mark.parametrize("fault", IN_A_TABLE)
def test_a_fault_in_a_table_is_found_in_the_first_block(case: Any, tmp_path: Path, fault: str) -> None:
    name, layout, table, part = IN_A_TABLE[fault]
    made = case(name)
    plan = plan_of(made.source, layout, table)
    found = judged(made, side_of(made, write(plan, tmp_path)), plan, trace=True).divergence
    assert found is not None and (found.step, found.part) == ("block 0", part)


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (lambda run: replace(run, rope=replace(run.rope, base=run.rope.base * 1.5)), "heads"),
        (lambda run: replace(run, rope=replace(run.rope, factor=run.rope.factor * 2)), "heads"),
        (lambda run: replace(run, rope=replace(run.rope, pairs=not run.rope.pairs)), "q"),
        (lambda run: replace(run, norm=replace(run.norm, eps=1e-2)), "attn_norm"),
        (lambda run: replace(run, activation="gelu"), "inner"),
        (lambda run: replace(run, windows=(3,) * run.layers), "heads"),
    ],
)
def test_a_fault_in_what_the_model_computes_is_found(case: Any, tmp_path: Path, fault: Callable[[Decoder], Decoder], part: str) -> None:
    made = case("llama")
    plan = plan_of(made.source, "maxtext")
    side = side_of(made, write(plan, tmp_path))
    reading = replace(side.weights.reading, decoder=fault(side.weights.reading.decoder))
    found = judged(made, Side(replace(side.weights, reading=reading), side.published), plan, trace=True).divergence
    assert found is not None and (found.step, found.part) == ("block 0", part)


@pytest.mark.parametrize(("layout", "options"), [("flat", {"rope": "interleaved"}), ("maxtext", {"dtype": "bfloat16"})])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_step_and_no_part_of_a_clean_conversion_departs(
    case: Any, tmp_path: Path, name: str, layout: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = case(name)
    plan = plan_of(made.source, layout, **options)
    side = side_of(made, write(plan, tmp_path), options.get("rope", "auto"))
    found = judged(made, side, plan, trace=True)
    assert found.divergence is None and not any(gap.departs for gap in found.gaps)
    # As if a block had departed, so that its parts are looked at.
    seen: list[str] = []

    def each(found: Mapping[str, Array], *rest: Any) -> None:
        assert (gap := first_part(found, *rest)) is None, gap
        seen.extend(found)

    def block_1(step: str, *given: Any, **named: Any) -> StepGap:
        return replace(step_gap(step, *given, **named), departs=step == "block 1")

    monkeypatch.setattr("shardconv.verify.walking.first_part", each)
    monkeypatch.setattr("shardconv.verify.walking.step_gap", block_1)
    judged(made, side, plan, trace=True)
    assert {"q", "heads", "out"} <= set(seen) <= set(PARTS)


def test_parts_of_a_block_cost_nothing_where_nobody_listens(case: Any, tmp_path: Path) -> None:
    made = case("llama")
    side = side_of(made, write(plan_of(made.source, "flat"), tmp_path))
    decoder, arrays = side.published, model.block_arrays(side.weights, 0)
    x = np.ones((1, 5, decoder.embed), np.float32)
    plain = jax.make_jaxpr(model.block, static_argnums=(0, 1))(decoder, None, arrays, x)
    assert len(plain.out_avals) == 1
    parts = model.block_parts(decoder, None, arrays, x)
    assert {"attn_norm", "q", "k", "v", "heads", "o", "mlp_norm", "gate", "up", "inner", "down", "out"} == parts.keys()
    np.testing.assert_allclose(parts["out"], model.block(decoder, None, arrays, x)[0], atol=1e-5)
