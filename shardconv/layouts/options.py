"""What the user's options change in the slots of any layout: the order of rotary dims, and rows that pad the vocabulary.

RoPE rotates dims of a head in pairs. Published checkpoints pair dim j with dim j + head_dim / 2 ("half"); some JAX code pairs neighbours
("interleaved"). Going from one to the other is an index move, `(half pair)` to `(pair half)`, of everything that is rotated or multiplied
with it dim by dim: query and key, their biases, and the weights of norms per head, not of values or outputs.
"""

from dataclasses import replace

from shardconv.errors import InputError, Problem
from shardconv.family import Layout, LayoutOptions, Model, Slot

ROTATED = frozenset(f"layers.attn.{name}" for name in ("q", "k", "q_bias", "k_bias", "q_norm", "k_norm"))


def fitted(layout: Layout, model: Model, options: LayoutOptions, rope: str) -> Layout:
    """The layout with slots, axes and metadata as the options want them; `rope` is "half" or "interleaved".

    Raises InputError where that cannot be: fewer rows than the vocabulary has, or an odd head_dim.
    """
    slots, axes = layout.slots, {**layout.axes}
    metadata = {"scan_layers": options.scan_layers, "rope": rope, "vocab_rows": model.axes.get("vocab"), **layout.metadata}
    if options.vocab_size:
        slots = tuple(replace(slot, dims=slot.dims.replace("vocab", "(vocab | vocab_pad)")) for slot in slots)
        axes["vocab_pad"] = options.padding(model)
    if rope == "interleaved":
        slots = tuple(in_pairs(slot) for slot in slots)
        axes |= {"head_dim": "half pair", "half": 2, "pair": pairs(model)}
    return replace(layout, slots=slots, axes=axes, metadata=metadata)


def in_pairs(slot: Slot) -> Slot:
    """The slot with rotary dims that belong together side by side.

    >>> in_pairs(Slot("layers.attn.q", "q", "embed heads head_dim")).dims
    'embed heads (pair half)'
    """
    return replace(slot, dims=slot.dims.replace("head_dim", "(pair half)")) if slot.param in ROTATED else slot


def pairs(model: Model) -> int:
    """The number of pairs that RoPE rotates in a head; raises InputError where head_dim is odd."""
    size = model.axes["head_dim"]
    if size % 2:
        raise InputError("the rotary dims do not come in pairs", [Problem(f"head_dim is {size}", 'set target.rope = "half"')])
    return size // 2
