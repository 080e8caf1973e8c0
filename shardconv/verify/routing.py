"""Where a model with experts sent the tokens of a sample, and where that hung on noise. Scores are a router's, (..., experts)."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from shardconv.verify.noise import ORDERS, ROUNDED

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

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


def unrouted(scores: Mapping[str, Floats], chosen: int, inside: Flags) -> tuple[int, ...]:
    """The experts that no position chose."""
    if ROUNDED not in scores:
        return ()
    best = np.argsort(scores[ROUNDED][inside], axis=-1)[:, -chosen:]
    return tuple(sorted(set(range(scores[ROUNDED].shape[-1])) - set(best.ravel().tolist())))
