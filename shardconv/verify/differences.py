"""How far two sets of logits are from each other, per position and in sum. NumPy only; sums in float64.

A *gap* has one number per position, so that positions which cannot be judged can be left out later.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Gap:
    """Per position of a sequence: the largest and the mean absolute difference, the divergence KL(reference, found) in nats, the cosine,
    whether the likeliest token is the same, and which share of the five likeliest is."""

    worst: Vector
    mean: Vector
    kl: Vector
    cosine: Vector
    top1: Vector
    top5: Vector


@dataclass(frozen=True)
class Difference:
    """Gaps in sum: the largest of the largest, means of means and of shares, the least cosine."""

    positions: int
    max_abs: float
    mean_abs: float
    max_kl: float
    mean_kl: float
    cosine: float
    top1: float
    top5: float


def gap(found: Logits, reference: Logits) -> Gap:
    """The gap between two arrays of logits, (length, vocab) both.

    >>> float(gap(np.float32([[1, 2, 3]]), np.float32([[1, 2, 2.5]])).worst[0])
    0.5
    """
    a, b = found.astype(np.float64), reference.astype(np.float64)
    difference = np.abs(a - b)
    p, q = log_softmax(b), log_softmax(a)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return Gap(
        worst=difference.max(axis=-1),
        mean=difference.mean(axis=-1),
        kl=np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0),
        cosine=(a * b).sum(axis=-1) / np.where(norms == 0, 1.0, norms),
        top1=(a.argmax(axis=-1) == b.argmax(axis=-1)).astype(np.float64),
        top5=_shared(_best(a, 5), _best(b, 5)),
    )


def log_softmax(logits: Vector) -> Vector:
    """Log probabilities in nats."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: Vector = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def surprise(logits: Logits, tokens: Tokens) -> Vector:
    """Minus the log probability of each token after the first, (length - 1,); their mean is the log of the perplexity."""
    chances = log_softmax(logits[:-1].astype(np.float64))
    found: Vector = -np.take_along_axis(chances, tokens[1:, None], axis=-1)[:, 0]
    return found


def _best(logits: Vector, count: int) -> npt.NDArray[np.intp]:
    count = min(count, logits.shape[-1])
    return np.argpartition(logits, -count, axis=-1)[:, -count:]


def _shared(a: npt.NDArray[np.intp], b: npt.NDArray[np.intp]) -> Vector:
    found: Vector = (a[:, :, None] == b[:, None, :]).any(axis=-1).mean(axis=-1)
    return found


def join(gaps: Sequence[Gap]) -> Gap:
    """Gaps of several sequences as one."""
    return Gap(*(np.concatenate([getattr(part, entry.name) for part in gaps]) for entry in fields(Gap)))


def in_sum(gap: Gap, kept: npt.NDArray[np.bool_]) -> Difference:
    """The positions of a gap that are kept, in sum; there must be one."""
    parts = {entry.name: getattr(gap, entry.name)[kept] for entry in fields(Gap)}
    return Difference(
        positions=int(kept.sum()),
        max_abs=float(parts["worst"].max()),
        mean_abs=float(parts["mean"].mean()),
        max_kl=float(parts["kl"].max()),
        mean_kl=float(parts["kl"].mean()),
        cosine=float(parts["cosine"].min()),
        top1=float(parts["top1"].mean()),
        top5=float(parts["top5"].mean()),
    )
