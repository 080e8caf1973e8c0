"""Where two sides part ways: the states after each step, and the parts of the first step that departs.

A step's *floor* is what the reference differs by from itself there, with its sums in another order. A step departs where the two sides
differ by more than a factor times the floor. Within a step both sides start from the reference's own state before it, so that the first
part that departs is at fault itself. Queries and keys are compared in the reference's order of rotary dims and at its scale, which a layout
may have changed on purpose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardconv.models.description import Decoder

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

# The parts of a step in the order in which they are computed.
PARTS = (
    "attn_norm", "q", "k", "v", "q_norm", "k_norm", "heads", "o", "attn_post_norm", "mlp_norm", "router", "experts", "gate", "up", "inner",
    "down", "mlp_post_norm", "out", "final_norm", "unembed",
)  # fmt: skip

# Norms, rotations and residuals have no sums to reorder, and yet are computed in several ways: each rounds a few times.
ROUNDINGS = 4.0


@dataclass(frozen=True)
class StepGap:
    """The largest difference at a step, or of a part of it, its floor, and the largest value there; `departs` says what to make of it."""

    step: str
    max_abs: float
    floor: float
    scale: float
    departs: bool


@dataclass(frozen=True)
class Divergence:
    """The first step that departs, and the first part in it, None where it was not looked for or no part departs by itself."""

    step: str
    part: str | None
    max_abs: float
    floor: float


def step_gap(
    step: str, found: Floats, expected: Floats, orders: Sequence[Floats], kept: Flags, factor: float, *, by_means: bool = False
) -> StepGap:
    """The gap between arrays (sequences, length, ...), where `kept`; `by_means` judges means, where some positions jump."""
    if found.shape != expected.shape:
        return StepGap(step, float("inf"), 0.0, float(np.abs(expected).max()), departs=True)
    difference = np.abs(found - expected)[kept]
    floors = [np.abs(other - expected)[kept] for other in orders]
    scale = float(np.abs(expected[kept]).max(initial=0.0))
    rounding = ROUNDINGS * scale * float(np.finfo(np.float32).eps)
    floor = max(float(one.max(initial=0.0)) for one in floors)
    if by_means:
        departs = not difference.mean() <= factor * max(*(float(one.mean()) for one in floors), rounding)
    else:
        departs = not float(difference.max(initial=0.0)) <= max(factor * floor, rounding)
    return StepGap(step, float(difference.max(initial=0.0)), floor, scale, departs)


def first_part(
    found: Mapping[str, Floats], expected: Mapping[str, Floats], orders: Sequence[Mapping[str, Floats]], kept: Flags, factor: float
) -> StepGap | None:
    """The first part that departs, of those that both sides have."""
    for part in PARTS:
        if part in found and part in expected:
            shape = found[part].shape
            theirs = [side[part].reshape(shape) if side[part].size == found[part].size else side[part] for side in (expected, *orders)]
            gap = step_gap(part, found[part], theirs[0], theirs[1:], kept, factor)
            if gap.departs:
                return gap
    return None


def as_published(parts: Mapping[str, Floats], run: Decoder, published: Decoder) -> dict[str, Floats]:
    """A block's parts, of a decoder as a layout runs it, as the published one would have them."""
    fair = dict(parts)
    if run.rope is not None and published.rope is not None and run.rope.pairs != published.rope.pairs:
        order = rotary_order(run.rope.dims, run.head_dim, pairs=published.rope.pairs)
        fair.update({role: fair[role][..., order] for role in ("q", "k", "q_norm", "k_norm") if role in fair})
    scaled = "q_norm" if "q_norm" in fair else "q"
    if scaled in fair and run.query_scale != published.query_scale:
        fair[scaled] = fair[scaled] * np.float32(run.query_scale / published.query_scale)
    return fair


def rotary_order(dims: int, head_dim: int, *, pairs: bool) -> npt.NDArray[np.intp]:
    """Which dim of a head in the other order each dim is: of one in halves for `pairs`, else of one in pairs.

    >>> rotary_order(4, 6, pairs=True).tolist(), rotary_order(4, 6, pairs=False).tolist()
    ([0, 2, 1, 3, 4, 5], [0, 2, 1, 3, 4, 5])
    >>> rotary_order(6, 6, pairs=True).tolist(), rotary_order(6, 6, pairs=False).tolist()
    ([0, 3, 1, 4, 2, 5], [0, 2, 4, 1, 3, 5])
    """
    turned = np.arange(dims).reshape((2, -1) if pairs else (-1, 2)).T.ravel()
    return np.concatenate((turned, np.arange(dims, head_dim)))


def of_part(gap: StepGap, step: str) -> Divergence:
    """A part's gap as the divergence of a step."""
    return Divergence(step, gap.step, gap.max_abs, gap.floor)


def whole(gap: StepGap) -> Divergence:
    """A step's gap as the divergence, when nothing is known of its parts."""
    return Divergence(gap.step, None, gap.max_abs, gap.floor)


