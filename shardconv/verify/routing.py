"""Where a model with experts sent the tokens of a sample, and where that hung on noise. Scores are a router's, (..., experts)."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from shardconv.verify.noise import ORDERS, ROUNDED

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int32]

# A router is undecided below this many times the median noise of its scores: the largest of a million normal deviates is 7 times their
# median, both sides have noise, and some positions have more of it than others.
UNDECIDED = 30.0


def certain(scores: Mapping[str, Floats], chosen: int, inside: Flags) -> Flags:
    """Where the choice of `chosen` experts does not hang on noise, as `inside`, which says what is of a sequence and not padding."""
    if ROUNDED not in scores or chosen >= scores[ROUNDED].shape[-1]:
        return np.ones_like(inside)
    plain = scores[ROUNDED]
    ranked = np.sort(plain, axis=-1)[..., ::-1]
    noise = max(float(np.median(np.abs(scores[run] - plain)[inside])) for run in ORDERS)
    found: Flags = ranked[..., chosen - 1] - ranked[..., chosen] > UNDECIDED * noise
    return found


def routes(scores: Mapping[str, Floats], chosen: int) -> Flags | None:
    """Which experts each position goes to, (sequences, length, experts); None without a router."""
    if ROUNDED not in scores:
        return None
    best = np.argsort(scores[ROUNDED], axis=-1)[..., -chosen:]
    found = np.zeros(scores[ROUNDED].shape, bool)
    np.put_along_axis(found, best, True, axis=-1)
    return found


def first_use(routed: Flags) -> Counts:
    """The first position of each sequence that goes to each expert, (sequences, experts); its length where none does."""
    found: Counts = np.where(routed.any(axis=1), routed.argmax(axis=1), routed.shape[1]).astype(np.int32)
    return found


def unrouted(first: Counts, judged: Counts) -> tuple[int, ...]:
    """The experts to which none of the first `judged` positions of any sequence went: what the judged logits do not depend on."""
    return tuple(np.flatnonzero((first >= judged[:, None]).all(axis=0)).tolist())
