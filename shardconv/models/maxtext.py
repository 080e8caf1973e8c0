"""How MaxText 0.2.5 reads its parameter tree, from its own layers.

scan         `nn.scan` with `param_scan_axis: 1`: layer i is index i on axis 1 of every leaf under `decoder/layers`; unscanned, layer i
             is `decoder/layers_{i}`.
Gemma 2      one decoder layer is two: a local one (with the window), then a global one.
query        Llama's, Mistral's and Gemma 2's attention does not scale the query at run time (the initialiser's scale is in the kernel);
             Qwen's has `query_pre_attn_scalar = head_dim ** -0.5`.
RoPE         `rope_type: llama3.1` rotates neighbouring pairs; `default` and `yarn` of these models the halves of a head.
norms        multiply by `scale`, with no offset, Gemma's too.
embedding    taken as it is, without Gemma's scale. `logits_via_embedding` uses the same table, and for Gemma, whose table carries
             sqrt(embed), divides the logits by it (`normalize_embedding_logits`).
"""

from collections.abc import Collection
from dataclasses import replace

from shardconv.models.description import Decoder, Place, Reading

ENDS = {
    "embed": "params.params.token_embedder.embedding",
    "final_norm": "params.params.decoder.decoder_norm.scale",
    "unembed": "params.params.decoder.logits_dense.kernel",
}
ATTENTION = {
    "q": "query.kernel",
    "k": "key.kernel",
    "v": "value.kernel",
    "o": "out.kernel",
    "q_bias": "query.bias",
    "k_bias": "key.bias",
    "v_bias": "value.bias",
    "q_norm": "query_norm.scale",
    "k_norm": "key_norm.scale",
}
MLP = {"gate": "wi_0.kernel", "up": "wi_1.kernel", "down": "wo.kernel"}
EXPERTS = {"router": "gate.kernel", "experts_gate": "wi_0", "experts_up": "wi_1", "experts_down": "wo"}
EXPERT_BLOCKS = {"mixtral": "MoeBlock_0", "qwen3_moe": "moe_block"}
UNSCALED = frozenset({"llama", "mistral", "mixtral", "gemma2"})


def read(decoder: Decoder, names: Collection[str], scanned: bool, rope: str) -> Reading:
    """Where MaxText has each role; roles that have no leaf are left out."""
    ends = {role: Place(leaf) for role, leaf in ENDS.items() if leaf in names}
    blocks = tuple(_block(decoder, names, layer, scanned) for layer in range(decoder.layers))
    return Reading(_as_run(decoder, rope, via_embedding="unembed" not in ends), ends, blocks)


def _block(decoder: Decoder, names: Collection[str], layer: int, scanned: bool) -> dict[str, Place]:
    step, leaves = (layer // 2, _gemma2("global" if layer % 2 else "local")) if decoder.name == "gemma2" else (layer, _common(decoder))
    root = "params.params.decoder.layers." if scanned else f"params.params.decoder.layers_{step}."
    places = {role: Place(root + leaf, step if scanned else None, axis=1) for role, leaf in leaves.items()}
    return {role: place for role, place in places.items() if place.leaf in names}


def _common(decoder: Decoder) -> dict[str, str]:
    inner, leaves = (EXPERT_BLOCKS[decoder.name], EXPERTS) if decoder.name in EXPERT_BLOCKS else ("mlp", MLP)
    return {
        "attn_norm": "pre_self_attention_layer_norm.scale",
        "mlp_norm": "post_self_attention_layer_norm.scale",
        **{role: f"self_attention.{leaf}" for role, leaf in ATTENTION.items()},
        **{role: f"{inner}.{leaf}" for role, leaf in leaves.items()},
    }


def _gemma2(kind: str) -> dict[str, str]:
    return {
        "attn_norm": f"pre_self_attention_norm_{kind}.scale",
        "attn_post_norm": f"post_self_attention_norm_{kind}.scale",
        "mlp_norm": f"pre_ffw_norm_{kind}.scale",
        "mlp_post_norm": f"post_ffw_norm_{kind}.scale",
        **{role: f"self_attention_{kind}.{leaf}" for role, leaf in ATTENTION.items()},
        **{role: f"mlp_{kind}.{leaf}" for role, leaf in MLP.items()},
    }


def _as_run(decoder: Decoder, rope: str, *, via_embedding: bool) -> Decoder:
    """The decoder without what the stored values carry."""
    if decoder.rope is not None:
        pairs = rope == "interleaved" or (rope == "auto" and decoder.rope.scaling == "llama3" and decoder.name == "llama")
        decoder = replace(decoder, rope=replace(decoder.rope, pairs=pairs))
    if decoder.name in UNSCALED:
        decoder = replace(decoder, query_scale=1.0)
    if decoder.name == "gemma2":
        logit_scale = decoder.embed**-0.5 if via_embedding else 1.0
        decoder = replace(decoder, norm=replace(decoder.norm, shift=0.0), embed_scale=1.0, logit_scale=logit_scale)
    return decoder
