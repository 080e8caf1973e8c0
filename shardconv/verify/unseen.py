"""What a comparison of logits says nothing of: arrays, and parts of arrays, on which no judged logit depends.

Being unseen is no fault, and no doubt about the verdict: these arrays could hold anything and the logits would be the same, so only the
check of the weights speaks for them. What they are follows from how the checkpoint is read and from what the sample did in it:

    experts       to which no judged position went, as the forward counted them while it ran
    rows          of the embedding whose token is at no judged position, unless the embedding is the output projection too
    positions     of a learned table, behind the longest sequence
    padding       rows that the target has beyond the source's vocabulary: no token, and no logit that is compared
    key biases    in dims that are not rotated: they add the same to all scores of a query, which softmax takes away again

Of a forward of the user's own nothing of this is known; `insensitive` measures there.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardconv.models.description import Place, Reading
from shardconv.verify.differences import Tokens

Shape = tuple[int, ...]
Index = tuple[int, ...]
# Indices of an array that are listed one by one.
LISTED = 16
EXPERTS = ("experts_gate", "experts_up", "experts_down")


@dataclass(frozen=True)
class Unseen:
    """Arrays that no judged logit depends on: `what` they are, in which `count` of `total` are, and `why` that is so.

    `arrays` are names of the checkpoint, each with the part of it as NumPy would index it; braces hold alternatives, and `*` is any layer.
    """

    what: str
    arrays: tuple[str, ...]
    why: str
    count: int
    total: int


def unseen_of(
    reading: Reading,
    shapes: Mapping[str, Shape],
    judged: Sequence[Tokens],
    experts: Mapping[int, int],
    unrouted: Mapping[int, tuple[int, ...]],
) -> tuple[Unseen, ...]:
    """What the logits at some positions do not show of a checkpoint with leaves of these `shapes`; the tokens up to these are `judged`.

    `experts` is how many each block has, and `unrouted` which of them no such token went to.
    """
    vocab = reading.decoder.vocab
    return (
        *_experts(reading, experts, unrouted),
        *_rows(reading, shapes, vocab, judged),
        *_padding(reading, shapes, vocab),
        *_key_biases(reading),
    )


def _experts(reading: Reading, experts: Mapping[int, int], unrouted: Mapping[int, tuple[int, ...]]) -> Iterator[Unseen]:
    if not unrouted:
        return
    arrays = []
    for block, alone in unrouted.items():
        places = [reading.blocks[block][role] for role in EXPERTS]
        arrays.append(_alternatives([place.leaf for place in places]) + _expert_index(places[0], alone))
    count, total = sum(map(len, unrouted.values())), sum(experts.values())
    yield Unseen("experts", tuple(arrays), "no judged token went to them", count, total)


def _expert_index(place: Place, experts: tuple[int, ...]) -> str:
    some = str(experts[0]) if len(experts) == 1 else str(list(experts))
    if place.index is None:
        return f"[{some}]"
    return f"[{place.index}, {some}]" if place.axis == 0 else f"[{some}, {place.index}]"


def _rows(reading: Reading, shapes: Mapping[str, Shape], vocab: int, judged: Sequence[Tokens]) -> Iterator[Unseen]:
    ends = reading.ends
    if "unembed" in ends:
        unused = np.setdiff1d(np.arange(vocab), np.concatenate(judged)).tolist()
        if unused:
            leaf = ends["embed"].leaf
            why = "their tokens are at no judged position; of the output projection every row is seen, as it gives a logit"
            yield Unseen("rows of the embedding", (part(leaf, [(row,) for row in unused], (vocab,)),), why, len(unused), vocab)
    if "positions" in ends:
        leaf, longest = ends["positions"].leaf, max(map(len, judged), default=0)
        if longest < (total := shapes[leaf][0]):
            why = "no judged position is so far back"
            yield Unseen("rows of the positions", (f"{leaf}[{longest}:]",), why, total - longest, total)


def _padding(reading: Reading, shapes: Mapping[str, Shape], vocab: int) -> Iterator[Unseen]:
    ends, arrays = reading.ends, []
    if (rows := shapes[ends["embed"].leaf][0]) > vocab:
        arrays.append(f"{ends['embed'].leaf}[{vocab}:]")
    if "unembed" in ends and (columns := shapes[ends["unembed"].leaf][1]) > vocab:
        arrays.append(f"{ends['unembed'].leaf}[:, {vocab}:]")
        rows = max(rows, columns)
    if arrays:
        why = "the source has no such tokens, so PyTorch has no logits to compare"
        yield Unseen("rows that pad the vocabulary", tuple(arrays), why, rows - vocab, rows)


def _key_biases(reading: Reading) -> Iterator[Unseen]:
    decoder = reading.decoder
    places = [block["k_bias"] for block in reading.blocks if "k_bias" in block and "k_norm" not in block]
    rotated = 0 if decoder.rope is None else decoder.rope.dims
    if not places or rotated >= decoder.head_dim or decoder.attention_cap is not None:
        return
    part = f"[..., {rotated}:]" if rotated else ""
    why = "no rotary embedding turns them, and softmax takes away what is added to all scores alike"
    arrays = tuple(name + part for name in _any_layer(place.leaf for place in places))
    yield Unseen("dims of the key's bias", arrays, why, decoder.head_dim - rotated, decoder.head_dim)


def part(name: str, indices: Sequence[Index], shape: Sequence[int]) -> str:
    """Parts of an array as NumPy indexes it, or how many they are.

    >>> part("gate", [(1,), (2,)], (4, 3)), part("gate", [(2, 5), (2, 7), (3, 1)], (4, 8, 3, 3))
    ('gate[[1, 2]]', 'gate[2, [5, 7]], gate[3, 1]')
    >>> part("embed", [(row,) for row in range(20)], (62, 3))
    'embed[20 of 62]'
    """
    if len(indices) > LISTED:
        depth = max(map(len, indices))
        count = sum(math.prod(shape[len(index) : depth]) for index in indices)
        return f"{name}[{count:,} of {math.prod(shape[:depth]):,}]"
    groups: dict[Index, list[int]] = {}
    for index in indices:
        groups.setdefault(index[:-1], []).append(index[-1])
    said = [", ".join([*map(str, first), str(last[0]) if len(last) == 1 else str(last)]) for first, last in groups.items()]
    return ", ".join(f"{name}[{one}]" for one in said)


def _alternatives(names: Sequence[str]) -> str:
    """Names that have all but their last part in common, as one.

    >>> _alternatives(["layers.experts.gate", "layers.experts.up"])
    'layers.experts.{gate,up}'
    """
    root, _, _ = names[0].rpartition(".")
    return f"{root}.{{{','.join(name.rpartition('.')[2] for name in names)}}}"


def _any_layer(names: Iterable[str]) -> tuple[str, ...]:
    """Names without the numbers of layers, each once.

    >>> _any_layer(["layers.0.attn.k_bias", "layers.1.attn.k_bias"]), _any_layer(["layers_0.key.bias"])
    (('layers.*.attn.k_bias',), ('layers_*.key.bias',))
    """
    return tuple(dict.fromkeys(re.sub(r"(?<![^._])\d+(?=\.)", "*", name) for name in names))


def told(found: Mapping[str, Any], weights: Mapping[str, Any] | None, most: int = 3) -> Iterator[str]:
    """What a verdict on logits, as data, says to be unseen, a line each with `most` arrays by name, and who speaks for these.

    `weights` is the verdict on the weights beside it, as data, None where they were not compared.
    """
    entries = found.get("unseen") or ()
    for one in entries:
        arrays = one.get("arrays") or ()
        names = ", ".join(arrays[:most]) + (f" and {len(arrays) - most} more" if len(arrays) > most else "")
        yield f"{one.get('count', 0):,} of {one.get('total', 0):,} {one.get('what', 'parts')} ({names}): {one.get('why', '')}"
    if entries:
        yield covered(weights)


def covered(weights: Mapping[str, Any] | None) -> str:
    """Who speaks for what the logits do not show; `weights` as `told` takes it."""
    if weights is None:
        return "of these the logits say nothing: --check all compares them too, bit by bit"
    if weights.get("problems"):
        return "of these the logits say nothing: see what the check of the weights found"
    if not weights.get("whole", True):
        return 'of these the logits say nothing, and the check of the weights looked at a sample: check.sample = "all" compares every bit'
    return "of these the logits say nothing: the check of the weights has compared them, bit by bit"
