"""MaxText's parameter tree, as `load_parameters_path` reads it (MaxText 0.2.5).

Scanned, the layers are stacked on axis 1 (`param_scan_axis`), also of one-dimensional leaves; unscanned, layer 3 is `layers_3`. Experts
are on axis 0. Where MaxText differs from a plain transpose:

query scale  Llama, Mistral, Mixtral and Gemma 2 have head_dim ** -0.5 folded into the query kernel (Gemma 2: query_pre_attn_scalar ** -0.5);
             Qwen applies it at run time.
RoPE order   with `rope_type: llama3.1` MaxText rotates neighbouring pairs, with `rope_type: default` the two halves of a head, as the
             checkpoint has them. Both have the same shapes, so the wrong one loads without an error: which one was written is in the notes
             and in the metadata. `auto` takes pairs where config.json has llama3 frequency scaling.
Gemma        norms are stored as 1 + w, the embedding times sqrt(embed), and a layer is a pair of a local and a global one.
vocabulary   rows are padded with zeros up to `target.vocab_size`, the `vocab_size` of the MaxText config.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from shardconv.axes import Axes
from shardconv.errors import InputError, Problem
from shardconv.family import Layout, LayoutOptions, Model, Slot
from shardconv.layouts.options import fitted

ROOT = "params.params."
LAYERS = ROOT + "decoder.layers."
ELSEWHERE = 'use target.layout = "flat"'

ENDS = (
    Slot("embed", ROOT + "token_embedder.embedding", "vocab embed", scale="embed_scale"),
    Slot("final_norm", ROOT + "decoder.decoder_norm.scale", "embed", shift="norm_shift"),
    Slot("unembed", ROOT + "decoder.logits_dense.kernel", "embed vocab"),
)
ATTENTION = (
    Slot("layers.attn_norm", LAYERS + "pre_self_attention_layer_norm.scale", "embed layers"),
    Slot("layers.attn.q", LAYERS + "self_attention.query.kernel", "embed layers heads head_dim"),
    Slot("layers.attn.k", LAYERS + "self_attention.key.kernel", "embed layers kv_heads head_dim"),
    Slot("layers.attn.v", LAYERS + "self_attention.value.kernel", "embed layers kv_heads head_dim"),
    Slot("layers.attn.o", LAYERS + "self_attention.out.kernel", "heads layers head_dim embed"),
    Slot("layers.attn.q_bias", LAYERS + "self_attention.query.bias", "heads layers head_dim"),
    Slot("layers.attn.k_bias", LAYERS + "self_attention.key.bias", "kv_heads layers head_dim"),
    Slot("layers.attn.v_bias", LAYERS + "self_attention.value.bias", "kv_heads layers head_dim"),
    Slot("layers.attn.q_norm", LAYERS + "self_attention.query_norm.scale", "head_dim layers"),
    Slot("layers.attn.k_norm", LAYERS + "self_attention.key_norm.scale", "head_dim layers"),
    Slot("layers.mlp_norm", LAYERS + "post_self_attention_layer_norm.scale", "embed layers"),
)
MLP = (
    Slot("layers.mlp.gate", LAYERS + "mlp.wi_0.kernel", "embed layers mlp"),
    Slot("layers.mlp.up", LAYERS + "mlp.wi_1.kernel", "embed layers mlp"),
    Slot("layers.mlp.down", LAYERS + "mlp.wo.kernel", "mlp layers embed"),
)


def _experts(block: str) -> tuple[Slot, ...]:
    return (
        Slot("layers.experts.router", LAYERS + block + ".gate.kernel", "embed layers experts"),
        Slot("layers.experts.gate", LAYERS + block + ".wi_0", "experts layers embed mlp"),
        Slot("layers.experts.up", LAYERS + block + ".wi_1", "experts layers embed mlp"),
        Slot("layers.experts.down", LAYERS + block + ".wo", "experts layers mlp embed"),
    )


def _of_kind(slots: tuple[Slot, ...], **names: str) -> tuple[Slot, ...]:
    """The slots with each name given one of its own for local and for global layers, stacked over pairs of layers."""
    moved = []
    for slot in slots:
        name = slot.name
        for old, new in names.items():
            name = name.replace(f".{old}.", f".{new}.")
        moved.append(replace(slot, name=name, dims=slot.dims.replace("layers", "blocks")))
    return tuple(moved)


GEMMA2 = (
    *_of_kind(ATTENTION[1:5], self_attention="self_attention_{kind}"),
    *_of_kind(MLP, mlp="mlp_{kind}"),
    Slot("layers.attn_norm", LAYERS + "pre_self_attention_norm_{kind}.scale", "embed blocks", shift="norm_shift"),
    Slot("layers.attn_post_norm", LAYERS + "post_self_attention_norm_{kind}.scale", "embed blocks", shift="norm_shift"),
    Slot("layers.mlp_norm", LAYERS + "pre_ffw_norm_{kind}.scale", "embed blocks", shift="norm_shift"),
    Slot("layers.mlp_post_norm", LAYERS + "post_ffw_norm_{kind}.scale", "embed blocks", shift="norm_shift"),
)

# MaxText has one decoder block per model family; each is a table of slots and says whether the query scale is folded in.
DECODERS: Mapping[str, tuple[tuple[Slot, ...], bool]] = {
    "llama": (ATTENTION + MLP, True),
    "mistral": (ATTENTION + MLP, True),
    "mixtral": (ATTENTION + _experts("MoeBlock_0"), True),
    "qwen2": (ATTENTION + MLP, False),
    "qwen3": (ATTENTION + MLP, False),
    "qwen3_moe": (ATTENTION + _experts("moe_block"), False),
    "gemma2": (GEMMA2, True),
}


def layout(model: Model, options: LayoutOptions) -> Layout:
    """MaxText's layout of a model; raises InputError where MaxText has no decoder block, or no place for a parameter."""
    name = model.family.name
    if name not in DECODERS:
        known = ", ".join(DECODERS)
        raise InputError(f"MaxText has no decoder block for {name} models", [Problem(f"it has: {known}", ELSEWHERE)])
    slots, folds_query = DECODERS[name]
    kept = [_query(slot, folds_query, options.query_dtype) for slot in (*ENDS, *slots) if slot.param in model.names]
    if homeless := sorted(model.names - {slot.param for slot in kept}):
        raise InputError("MaxText has no place for some parameters", [Problem(param, ELSEWHERE) for param in homeless])
    rope = _rope(model, options)
    table = Layout(
        "maxtext",
        tuple(kept if options.scan_layers else map(_unscanned, kept)),
        _pairs_of_layers(model) if slots is GEMMA2 else {},
        {"folded": _folded(kept, model)},
        tuple(_notes(model, options, rope, folds_query)),
        when_tied="load with logits_via_embedding = true in the MaxText config, as there is no logits_dense",
    )
    return fitted(table, model, options, rope)


def _query(slot: Slot, folds: bool, dtype: str) -> Slot:
    """The slot with the query scale and the dtype that was asked for it, if it is the query's."""
    return replace(slot, scale="query_scale", dtype=dtype) if folds and slot.param in ("layers.attn.q", "layers.attn.q_bias") else slot


def _unscanned(slot: Slot) -> Slot:
    """The slot with its layers in the name instead of on axis 1."""
    for axis in ("layers", "blocks"):
        if f" {axis}" in slot.dims:
            name = slot.name.replace("decoder.layers.", f"decoder.layers_{{{axis}}}.")
            return replace(slot, name=name, dims=slot.dims.replace(f" {axis}", "", 1))
    return slot


def _pairs_of_layers(model: Model) -> Axes:
    layers = model.axes["layers"]
    if layers % 2:
        raise InputError("MaxText stacks pairs of a local and a global layer", [Problem(f"num_hidden_layers is {layers}, an odd number", ELSEWHERE)])
    return {"layers": "blocks kind", "blocks": layers // 2, "kind": ("local", "global")}


def _folded(slots: Iterable[Slot], model: Model) -> dict[str, float]:
    """The facts that stored values carry, where they change a value."""
    used = {fact for slot in slots for fact in (slot.scale, slot.shift) if fact}
    return {fact: model.facts[fact] for fact in sorted(used) if model.facts[fact] != (0 if fact == "norm_shift" else 1)}


def _rope(model: Model, options: LayoutOptions) -> str:
    if options.rope != "auto":
        return options.rope
    scaling = model.config.get("rope_scaling") or model.config.get("rope_parameters")
    kind = (scaling.get("rope_type") or scaling.get("type")) if isinstance(scaling, Mapping) else None
    return "interleaved" if model.family.name == "llama" and kind == "llama3" else "half"


def _notes(model: Model, options: LayoutOptions, rope: str, folds_query: bool) -> Iterator[str]:
    if rope == "interleaved":
        yield 'query and key are in RoPE pairs: load with a MaxText config that has rope_type llama3.1 (target.rope = "half" for others)'
    elif model.family.name == "llama":
        yield 'query and key are in RoPE halves: load with a MaxText config that has rope_type default (target.rope = "interleaved" for llama3.1)'
    if options.query_dtype and not folds_query:
        yield f"target.query_dtype changes nothing: MaxText scales the query of {model.family.name} models at run time"
