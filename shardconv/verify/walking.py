"""Both sides walked through step by step, the reference's states and the checkpoint's, so that the first step that departs is known.

One block of each side is in memory at a time. The trace of a step's parts is made while the reference's block is at hand.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from shardconv.models.decoder import Weights, block_arrays, block_parts, head_arrays, head_parts, hidden
from shardconv.models.description import Decoder
from shardconv.verify.agreement import JUDGED
from shardconv.verify.differences import Tokens
from shardconv.verify.divergence import Divergence, StepGap, as_published, first_part, of_part, step_gap, whole
from shardconv.verify.noise import ORDERS, ROUNDED
from shardconv.verify.reference import Head, Looker, Reference, Step, batch
from shardconv.verify.routing import Counts, certain, first_use, routes, unrouted

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Side:
    """The checkpoint's side: its weights as its layout's code reads them, and the decoder of the published model."""

    weights: Weights
    published: Decoder


@dataclass(frozen=True)
class Walked:
    """What is known before the logits: states behind the last block, by run and of the checkpoint, if it was walked through too.

    `decided` is where no router's choice hung on noise, (sequences, length), `judged` how many positions of each sequence are judged.
    `experts` is how many each block has that has any, `unrouted` are those to which no judged position went, both by block; counted in the
    checkpoint's own forward, or in the reference where that is not walked through.
    """

    states: Mapping[str, Floats]
    state: Floats | None
    decided: Flags
    judged: Counts
    gaps: tuple[StepGap, ...]
    divergence: Divergence | None
    experts: Mapping[int, int]
    unrouted: Mapping[int, tuple[int, ...]]


def walk(reference: Reference, sample: Sequence[Tokens], side: Side | None, *, factor: float, trace: bool) -> Walked:
    """Walks through all blocks of the reference, and of the checkpoint's side if there is one; with `trace`, parts are looked at."""
    tokens = batch(sample)
    inside = np.arange(tokens.shape[1]) < np.array([len(one) for one in sample])[:, None]
    chosen = reference.architecture.chosen
    ours = _ours(side, tokens)
    decided, before = inside, np.zeros(0, np.float32)
    gaps: list[StepGap] = []
    divergence: Divergence | None = None
    used: dict[int, Counts] = {}
    for number, step in enumerate(reference.steps(sample, trace=trace), -1):
        decided = inside & np.logical_and.accumulate(decided & certain(step.scores, chosen, inside), axis=1)
        found, routed = next(ours)
        routed = routes(step.scores, chosen) if side is None else routed
        if routed is not None:
            used[number] = first_use(routed)
        if found is not None:
            by_means = bool(decided.sum() < JUDGED * inside.sum())
            kept = inside if by_means else decided
            orders = [step.states[run] for run in ORDERS]
            gaps.append(step_gap(step.name, found, step.states[ROUNDED], orders, kept, factor, by_means=by_means))
            if gaps[-1].departs and divergence is None and side is not None:
                divergence = whole(gaps[-1])
                if trace and number < 0:
                    divergence = of_part(gaps[-1], step.name)  # the embedding is its own and only part
                elif step.parts is not None:
                    divergence = _parted(step, step.parts, side, number, before, kept, factor) or divergence
        before, states = step.states[ROUNDED], step.states
        del step  # and with it the reference's block
    judged = (decided if decided.sum() >= JUDGED * inside.sum() else inside).sum(axis=1, dtype=np.int32)
    experts = {number: first.shape[1] for number, first in used.items()}
    alone = {number: left for number, first in used.items() if (left := unrouted(first, judged))}
    return Walked(states, found, decided, judged, tuple(gaps), divergence, experts, alone)


def _ours(side: Side | None, tokens: Tokens) -> Iterator[tuple[Floats | None, Flags | None]]:
    """The checkpoint's states, each with where its tokens were routed, or nothing for ever."""
    if side is None:
        while True:
            yield None, None
    for _, state, routed in hidden(side.weights, jnp.asarray(tokens, jnp.int32)):
        yield np.asarray(state), None if routed is None else np.asarray(routed)


def _parted(step: Step, parts: Looker, side: Side, number: int, before: Floats, kept: Flags, factor: float) -> Divergence | None:
    """The first part of a block that departs, both sides starting from the state `before` it."""
    decoder = side.weights.reading.decoder
    arrays = block_arrays(side.weights, number)
    found = {role: np.asarray(part) for role, part in block_parts(decoder, decoder.windows[number], arrays, jnp.asarray(before)).items()}
    expected, *orders = (parts(before, run) for run in (ROUNDED, *ORDERS))
    gap = first_part(as_published(found, decoder, side.published), expected, orders, kept, factor)
    return None if gap is None else of_part(gap, step.name)


def end_gap(last: StepGap, head: Head, side: Side, walked: Walked, factor: float, *, trace: bool) -> Divergence | None:
    """The divergence of the last step, if that is the first that departs; with `trace`, whether the norm or the projection is at fault."""
    if not last.departs:
        return None
    if not trace:
        return whole(last)
    state, kept = walked.states[ROUNDED], walked.decided
    decoder = side.weights.reading.decoder
    arrays = head_arrays(side.weights)
    for number, row in enumerate(kept):  # logits of one sequence at a time
        one = state[number : number + 1, : int(row.sum())]
        if one.size:
            found = {role: np.asarray(part) for role, part in head_parts(decoder, arrays, jnp.asarray(one)).items()}
            expected, *orders = (head.parts(one, run) for run in (ROUNDED, *ORDERS))
            found["unembed"] = found["unembed"][..., : expected["unembed"].shape[-1]]
            if gap := first_part(found, expected, orders, np.ones(one.shape[:2], bool), factor):
                return of_part(gap, last.step)
    return whole(last)
