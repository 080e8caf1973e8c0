"""The faults: what users of converters suffer, each seeded where it happens.

    table     the layout's or the family's table says something else
    reader    other bytes are read than the plan asks for
    writer    other bytes are written than were made, or made otherwise
    data      the checkpoint changes after it was written
    loader    the code that loads it runs another model than the one that was published
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from logit_cases import kinds_exchanged, slot
from pipeline import Array, Conversion, Fault, replaced
from test_verify_faults import (
    cut_off_rows,
    double_an_expert,
    exchange_layers,
    fill_padding,
    flip_a_bit,
    permute_heads,
    rows,
    shift_layers,
    swap,
    swap_bytes,
    through_float8,
    tied_to_the_embedding,
    with_facts,
    with_param,
    without_biases,
    zero_a_block,
)

from shardconv.formats.reading import Reader
from shardconv.models.description import Decoder, Rope
from shardconv.run import work
from shardconv.sinks.chunk_writer import UnitWriter
from shardconv.source import Source
from shardconv.verify import logits

MAXTEXT = "maxtext"


def pointed(key: str, other: str) -> Callable[[Source], Source]:
    """A source that gives one tensor's bytes for another's."""

    def change(source: Source) -> Source:
        wrong = replace(source.tensors[other], name=key)
        return replace(source, tensors={**source.tensors, key: wrong})

    return change


def shifted(key: str, nbytes: int) -> Callable[[Source], Source]:
    """A source that takes one tensor's bytes from a little further on or back in its file."""

    def change(source: Source) -> Source:
        tensor = source.tensors[key]
        return replace(source, tensors={**source.tensors, key: replace(tensor, offset=tensor.offset + nbytes)})

    return change


def reading(spoil: Callable[[Any, Array], None]) -> Callable[[], Any]:
    """While units are carried out, `spoil` changes what was read of a tensor."""

    def other(read: Callable[..., None]) -> Callable[..., None]:
        def spoilt(self: Reader, tensor: Any, box: Any, out: Array) -> None:
            read(self, tensor, box, out)
            spoil(tensor, out)

        return spoilt

    return lambda: replaced(Reader, "read", other)


def zero_last_row(tensor: Any, out: Array) -> None:
    if "lm_head" in tensor.name:
        out[-1:] = 0


def old_buffer() -> Any:
    """Every fifth chunk is written from the buffer of the one before: a buffer that was reused too early."""
    kept: dict[tuple[int, ...], Array] = {}
    count = iter(range(10**9))

    def other(write: Callable[..., None]) -> Callable[..., None]:
        def stale(self: UnitWriter, spec: Any, box: Any, array: Array) -> None:
            before = kept.get(array.shape)
            kept[array.shape] = array.copy()
            write(self, spec, box, before.copy() if before is not None and next(count) % 5 == 4 else array)

        return stale

    return replaced(UnitWriter, "write", other)


def casting(cast: Callable[[Array, Array], None]) -> Callable[[], Any]:
    """While units are carried out, values are cast otherwise."""
    return lambda: replaced(work, "convert", lambda _: lambda block, _, out: cast(block, out))


def truncate(block: Array, out: Array) -> None:
    """float32 to bfloat16 by cutting bits off, not by rounding."""
    out[...] = (block.view(np.uint32) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16).reshape(out.shape)


def twice_rounded(block: Array, out: Array) -> None:
    """float32 to bfloat16 through float16, which rounds twice and overflows."""
    with np.errstate(over="ignore"):
        out[...] = block.astype(np.float16).astype(out.dtype).reshape(out.shape)


def running(change: Callable[[Decoder], Decoder]) -> Callable[[], Any]:
    """While the checkpoint is run, its code believes in another model."""
    return lambda: replaced(logits, "decoder_of", lambda decoder_of: lambda config: change(decoder_of(config)))


def with_rope(**changes: Any) -> Callable[[Decoder], Decoder]:
    """A model with other rotary embeddings."""

    def change(decoder: Decoder) -> Decoder:
        rope = decoder.rope
        assert isinstance(rope, Rope)
        return replace(decoder, rope=replace(rope, **changes))

    return change


def double(array: Array) -> None:
    array *= 2


def nan(array: Array) -> None:
    array[7] = np.nan


def zero(array: Array) -> None:
    array[...] = np.float32(1e-30)  # TensorStore does not store zeros


def nudge(array: Array) -> None:
    array[...] = array * np.float32(1.0001)


BF16 = Conversion(stored="bfloat16")
CAST = Conversion("qwen3", dtype="bfloat16")
MOE = Conversion("mixtral")
GEMMA = Conversion("gemma2", MAXTEXT)
UNTIED = {"tie_word_embeddings": False}

FAULTS: Mapping[str, Fault] = {
    # tables
    "gate and up swapped": Fault("table", table=swap("layers.mlp.gate", "layers.mlp.up")),
    "gate and up of experts swapped": Fault("table", Conversion("mixtral", MAXTEXT), swap("layers.experts.gate", "layers.experts.up")),
    "k and v swapped": Fault("table", Conversion(layout=MAXTEXT), swap("layers.attn.k", "layers.attn.v")),
    "norms before attention and MLP swapped": Fault("table", Conversion("qwen2"), swap("layers.attn_norm", "layers.mlp_norm")),
    "norms of query and key swapped": Fault("table", Conversion("qwen3", MAXTEXT), swap("layers.attn.q_norm", "layers.attn.k_norm")),
    "q and k in pairs for a reader of halves": Fault("table", Conversion(rope="half"), written={"rope": "interleaved"}),
    "q and k in halves for a reader of pairs": Fault("table", Conversion(layout=MAXTEXT), written={"rope": "half"}),
    "heads split the wrong way": Fault("table", tables_of_family=with_param("layers.attn.q", dims="(head_dim heads) embed")),
    "a square matrix transposed": Fault(
        "table",
        Conversion(settings={"intermediate_size": 48}),
        rows(layers__mlp__down="layers embed mlp"),
    ),
    "norm's 1 missing": Fault("table", GEMMA, slot("layers.attn_norm", shift="")),
    "norm's 1 doubled": Fault("table", Conversion("gemma2"), slot("final_norm", shift="norm_shift")),
    "query scale missing": Fault("table", Conversion("mistral", MAXTEXT), slot("layers.attn.q", scale="")),
    "query scale doubled": Fault("table", Conversion("mistral"), slot("layers.attn.q", scale="query_scale")),
    "query scale of another model": Fault("table", GEMMA, tables_of_family=with_facts(query_scale=16**-0.5)),
    "embedding scale missing": Fault("table", GEMMA, slot("embed", scale="")),
    "local and global layers exchanged": Fault("table", GEMMA, kinds_exchanged),
    "biases dropped": Fault("table", Conversion("qwen2"), tables_of_family=without_biases),
    "output tied to the embedding": Fault("table", Conversion(settings=UNTIED), tables_of_family=tied_to_the_embedding),
    # readers
    "another layer's tensor is read": Fault(
        "reader", source=pointed("model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight")
    ),
    "layers off by one": Fault("reader", edit=("layers.attn.o", shift_layers)),
    "a stale shard's copy of a tensor": Fault(
        "reader", source=pointed("model.layers.0.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight")
    ),
    "one expert read twice": Fault(
        "reader",
        MOE,
        source=pointed(
            "model.layers.0.block_sparse_moe.experts.1.w1.weight", "model.layers.0.block_sparse_moe.experts.0.w1.weight"
        ),
    ),
    "read from an element further on": Fault("reader", source=shifted("model.layers.1.mlp.down_proj.weight", 4)),
    "read from a byte further on": Fault("reader", BF16, source=shifted("model.layers.1.mlp.down_proj.weight", 1)),
    "last rows not read": Fault("reader", Conversion(settings=UNTIED), broken=reading(zero_last_row)),
    "bytes the wrong way round": Fault("reader", edit=("final_norm", swap_bytes)),
    # writers
    "a buffer reused too early": Fault("writer", broken=old_buffer),
    "cast by cutting bits off": Fault("writer", CAST, broken=casting(truncate)),
    "cast twice": Fault("writer", CAST, broken=casting(twice_rounded)),
    "another dtype": Fault("writer", BF16, written={"dtype": "float8_e4m3fn"}),
    "an expert stored twice": Fault("writer", MOE, edit=("layers.experts.up", double_an_expert)),
    "two layers exchanged": Fault("writer", edit=("layers.mlp.up", exchange_layers)),
    "heads in another order": Fault("writer", edit=("layers.attn.q", permute_heads)),
    "truncated rows": Fault("writer", edit=("embed", cut_off_rows)),
    "a zero block": Fault("writer", edit=("layers.mlp.gate", zero_a_block)),
    "padding that is not zero": Fault("writer", Conversion(vocab=64), edit=("embed", fill_padding)),
    "rounded through float8": Fault("writer", edit=("layers.mlp.gate", through_float8)),
    # data
    "one flipped bit": Fault("data", BF16, edit=("layers.mlp.gate", flip_a_bit)),
    "one NaN": Fault("data", edit=("final_norm", nan)),
    "a projection doubled": Fault("data", edit=("layers.mlp.down", double)),
    "a bias gone": Fault("data", Conversion("qwen2"), edit=("layers.attn.k_bias", zero)),
    "one part in ten thousand": Fault("data", edit=("layers.attn.v", nudge)),
    # loaders
    "wrong RoPE scaling": Fault("loader", reader=running(with_rope(scaling="default"))),
    "wrong RoPE factor": Fault("loader", Conversion("qwen3"), reader=running(with_rope(factor=8.0))),
    "wrong RoPE base": Fault("loader", Conversion("mistral"), reader=running(with_rope(base=20_000.0))),
    "wrong RoPE order": Fault("loader", reader=running(with_rope(pairs=True))),
    "wrong epsilon": Fault("loader", reader=running(lambda decoder: replace(decoder, norm=replace(decoder.norm, eps=1e-3)))),
    "wrong sliding window": Fault("loader", Conversion("mistral"), reader=running(lambda decoder: replace(decoder, windows=(16,) * 4))),
    "soft cap missing": Fault("loader", Conversion("gemma2"), reader=running(lambda decoder: replace(decoder, attention_cap=None))),
    "GELU of the other kind": Fault("loader", Conversion("gemma2"), reader=running(lambda decoder: replace(decoder, activation="gelu"))),
    "weights of experts not normalised": Fault(
        "loader", MOE, reader=running(lambda d: replace(d, routing=replace(d.routing, normalised=False) if d.routing else None))
    ),
    "query scale of another head": Fault("loader", reader=running(lambda decoder: replace(decoder, query_scale=1 / 8))),
}

