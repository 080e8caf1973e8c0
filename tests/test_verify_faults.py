"""Faults that users suffer, each put into a real conversion: every one is caught, and its cause is named."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from written import CHOICES, change, checked, exchanged, make_model, plan_of, renamed, write

from shardconv.family import Family, Layout
from shardconv.verify.causes import PADDING

MAXTEXT = {"layout": "maxtext"}
LAYERS = "params.params.decoder.layers."
LLAMA, LLAMA31, QWEN2, MIXTRAL, GEMMA2 = "llama3_8b", "llama3_1_70b", "qwen2_5_7b", "mixtral_8x7b", "gemma2_27b"


@dataclass(frozen=True)
class Fault:
    """What is wrong: in a table, in what was written, or in how. `said` is the cause, word for word, and `leaf` the first that is named."""

    leaf: str
    said: str
    model: str = LLAMA
    choices: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)
    layout: Callable[[Layout], Layout] = lambda table: table
    family: Callable[[Family], Family] = lambda table: table
    edit: Callable[[np.ndarray], None] | None = None
    problems: int = 1


def raw(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def flip_a_bit(array: np.ndarray) -> None:
    raw(array).reshape(-1)[77] ^= 0x10


def zero_a_block(array: np.ndarray) -> None:
    array[1, 3:9, 2:7] = 0


def cut_off_rows(array: np.ndarray) -> None:
    array[-5:] = 0


def exchange_layers(array: np.ndarray) -> None:
    array[[1, 2]] = array[[2, 1]]


def shift_layers(array: np.ndarray) -> None:
    array[:-1] = array[1:].copy()


def double_an_expert(array: np.ndarray) -> None:
    array[:, 2] = array[:, 0]


def swap_bytes(array: np.ndarray) -> None:
    array[:] = array.byteswap()


def fill_padding(array: np.ndarray) -> None:
    array[-1, 3] = 1


def through_float8(array: np.ndarray) -> None:
    array[:] = array.astype(ml_dtypes.float8_e4m3fn)


def permute_heads(array: np.ndarray) -> None:
    array[:] = array[:, :, [0, 2, 1, 3, 4, 5]]


def double(array: np.ndarray) -> None:
    array *= 2


def move_rows(array: np.ndarray) -> None:
    array[:] = np.roll(array, -1, axis=0)


def untransposed(array: np.ndarray) -> None:
    for layer in array:
        layer[:] = layer.T.copy().reshape(layer.shape)


def rows(**dims: str) -> Callable[[Layout], Layout]:
    return lambda table: renamed(table, **{name.replace("__", "."): {"dims": value} for name, value in dims.items()})


def swap(a: str, b: str) -> Callable[[Layout], Layout]:
    return lambda table: exchanged(table, a, b)


def with_facts(**facts: float) -> Callable[[Family], Family]:
    return lambda family: replace(family, facts={**family.facts, **facts})


def with_param(name: str, **changes: object) -> Callable[[Family], Family]:
    def changed(family: Family) -> Family:
        params = tuple(replace(param, **changes) if param.name == name else param for param in family.params)  # type: ignore[arg-type]
        return replace(family, params=params)

    return changed


def tied_to_the_embedding(family: Family) -> Family:
    return replace(with_param("unembed", key="model.embed_tokens.weight")(family), ignore=(*family.ignore, "lm_head.weight"))


def without_biases(family: Family) -> Family:
    biases = [param for param in family.params if param.name.endswith("_bias")]
    ignored = tuple(param.key.replace("{layers}", "{}") for param in biases)
    return replace(family, params=tuple(p for p in family.params if p not in biases), ignore=family.ignore + ignored)


FAULTS = {
    # what was written
    "one flipped bit": Fault("layers.mlp.gate[0, 3, 17]", "one bit is flipped: bit 4 of 16", edit=flip_a_bit),
    "a zero block": Fault(
        "layers.mlp.gate[1, 3, 2]", "30 elements are zero: never written, or cut off in the source that was read", edit=zero_a_block
    ),
    "truncated rows": Fault(
        "embed[32, 0]", "120 elements are zero: never written, or cut off in the source that was read", edit=cut_off_rows
    ),
    "two layers exchanged": Fault(
        "layers.mlp.up[1, 0, 0]",
        "it is model.layers.2.mlp.up_proj.weight, of layer 2 and not 1: off by one, exchanged, or there twice",
        edit=exchange_layers,
    ),
    "layers off by one": Fault(
        "layers.attn.o[0, 0, 0, 0]",
        "it is model.layers.1.self_attn.o_proj.weight, of layer 1 and not 0: off by one, exchanged, or there twice",
        edit=shift_layers,
    ),
    "an expert twice": Fault(
        "layers.experts.up[0, 2, 0, 0]",
        "it is model.layers.0.block_sparse_moe.experts.0.w3.weight, of expert 0 and not 2: exchanged, or there twice",
        MIXTRAL,
        edit=double_an_expert,
    ),
    "bytes the wrong way round": Fault("final_norm[0]", "the bytes of each value are the wrong way round", edit=swap_bytes),
    "padding that is not zero": Fault("embed[39, 3]", PADDING, choices={"vocab_size": 40}, edit=fill_padding),
    "heads in another order": Fault("layers.attn.q[0, 0, 1, 0]", "axis 2 is in another order: 1 has what belongs to 2", edit=permute_heads),
    "rows moved by one": Fault("final_norm[0]", "axis 0 is moved by one: 0 has what belongs to 1", edit=move_rows),
    "copied, not transposed": Fault(
        "layers.mlp.gate[0, 0, 1]", "the tensor as it lies in the file: reshaped, and not transposed", edit=untransposed
    ),
    "rounded through another dtype": Fault("layers.mlp.gate[0, 0, 0]", "rounded through float8_e4m3fn", edit=through_float8),
    "everything doubled": Fault("layers.mlp.gate[0, 0, 0]", "every value is 2 times what it should be", edit=double),
    # tables
    "gate and up swapped": Fault(
        "layers.mlp.gate[0, 0, 0]",
        "it is model.layers.0.mlp.up_proj.weight: up_proj stands where gate_proj should",
        layout=swap("layers.mlp.gate", "layers.mlp.up"),
        problems=2,
    ),
    "gate and up of experts swapped": Fault(
        LAYERS + "MoeBlock_0.wi_0[0, 0, 0, 0]",
        "it is model.layers.0.block_sparse_moe.experts.0.w3.weight: w3 stands where w1 should",
        MIXTRAL,
        MAXTEXT,
        layout=swap("layers.experts.gate", "layers.experts.up"),
        problems=2,
    ),
    "key and value swapped": Fault(
        LAYERS + "self_attention.key.kernel[0, 0, 0, 0]",
        "it is model.layers.0.self_attn.v_proj.weight: v_proj stands where k_proj should",
        LLAMA31,
        {**MAXTEXT, "rope": "auto"},
        layout=swap("layers.attn.k", "layers.attn.v"),
        problems=2,
    ),
    "norms swapped": Fault(
        "layers.attn_norm[0, 0]",
        "it is model.layers.0.post_attention_layernorm.weight: post_attention_layernorm stands where input_layernorm should",
        layout=swap("layers.attn_norm", "layers.mlp_norm"),
        problems=2,
    ),
    "query and key in pairs for a reader of halves": Fault(
        "layers.attn.q[0, 0, 0, 1]", "RoPE order: axis 3 is in pairs, and should be in halves", written={"rope": "interleaved"}
    ),
    "query and key in halves for a reader of pairs": Fault(
        LAYERS + "self_attention.query.kernel[0, 0, 0, 1]",
        "RoPE order: axis 3 is in halves, and should be in pairs",
        LLAMA31,
        {**MAXTEXT, "rope": "auto"},
        written={"rope": "half"},
    ),
    "heads split the wrong way": Fault(
        LAYERS + "self_attention.query.kernel[0, 0, 0, 1]",
        "split the wrong way: as (h n) d, and should be as (n h) d",
        choices=MAXTEXT,
        family=with_param("layers.attn.q", dims="(head_dim heads) embed"),
    ),
    "a square matrix transposed": Fault(
        LAYERS + "mlp.wo.kernel[0, 0, 1]",
        "transposed: axes 0 and 2 are exchanged",
        choices=MAXTEXT,
        sizes={"intermediate_size": 24},
        layout=rows(layers__mlp__down="embed layers mlp"),
    ),
    "biases dropped": Fault("layers.attn.k_bias is not in the checkpoint", "the source has it, and it was not written", QWEN2,
                            family=without_biases, problems=3),
    "the output tied to the embedding": Fault(
        "unembed[0, 0]", "it is model.embed_tokens.weight: model.embed_tokens stands where lm_head should", family=tied_to_the_embedding
    ),
    "1 + w is w": Fault(
        "params.params.decoder.decoder_norm.scale[0]", "the summand 1 is missing", GEMMA2, MAXTEXT, family=with_facts(norm_shift=0.0)
    ),
    "1 + w is 2 + w": Fault(
        "params.params.decoder.decoder_norm.scale[0]", "the summand 1 is there twice", GEMMA2, MAXTEXT, family=with_facts(norm_shift=2.0)
    ),
    "w is 1 + w": Fault(
        LAYERS + "pre_self_attention_layer_norm.scale[0, 0]",
        "1 was added",
        choices=MAXTEXT,
        family=with_facts(one=1.0),
        layout=lambda table: renamed(table, **{"layers.attn_norm": {"shift": "one"}}),
    ),
    "the query scale is missing": Fault(
        LAYERS + "self_attention.query.kernel[0, 0, 0, 0]",
        "the factor 0.353553 is missing",
        choices=MAXTEXT,
        layout=lambda table: renamed(table, **{"layers.attn.q": {"scale": ""}}),
    ),
    "the query scale is there twice": Fault(
        LAYERS + "self_attention.query.kernel[0, 0, 0, 0]",
        "the factor 0.353553 is there twice",
        choices=MAXTEXT,
        family=with_facts(query_scale=1 / 8),
    ),
    "the query scale of another model": Fault(
        LAYERS + "self_attention_local.query.kernel[0, 0, 0, 0]",
        "every value is 2.12121 times what it should be",
        GEMMA2,
        MAXTEXT,
        family=with_facts(query_scale=8**-0.5),
        problems=2,
    ),
    "the embedding scale is missing": Fault(
        "params.params.token_embedder.embedding[0, 0]", "the factor 4.89898 is missing", GEMMA2, MAXTEXT, family=with_facts(embed_scale=1.0)
    ),
    "another dtype": Fault("embed is float8_e4m3fn, and should be bfloat16", "", written={"dtype": "float8_e4m3fn"}, problems=12),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_and_its_cause_is_named(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    make_model(tmp_path / "source", fault.model, **fault.sizes)
    choices = replace(CHOICES, **fault.choices)
    plan = plan_of(tmp_path / "source", replace(choices, **fault.written), layout=fault.layout, family=fault.family)
    folder = write(plan, tmp_path / "out")
    if fault.edit is not None:
        change(folder, fault.leaf.partition("[")[0], fault.edit)
    found = checked(plan, folder, choices).problems
    assert [problem.remedy for problem in found if problem.fact.startswith(fault.leaf)] == [fault.said]
    assert len(found) == fault.problems
    changed_later = ["its checksum says that it was changed after it was written" in problem.fact for problem in found]
    assert all(changed_later) if fault.edit else not any(changed_later)


def test_a_chunk_that_is_missing_is_no_zeros(tmp_path: Path) -> None:
    make_model(tmp_path / "source", LLAMA)
    plan = plan_of(tmp_path / "source", CHOICES)
    folder = write(plan, tmp_path / "out")
    change(folder, "layers.mlp.up", lambda array: array.fill(0))  # TensorStore does not store zeros
    (problem,) = checked(plan, folder, CHOICES).problems
    assert problem.fact.startswith("layers.mlp.up cannot be read back: NOT_FOUND: chunk {0, 0, 0} stored at ")
    assert problem.remedy == "the file is damaged or incomplete: convert again with --overwrite"
