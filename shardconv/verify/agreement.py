"""The verdict about logits, from the noise that the reference itself has.

Where the plan rounds values, the reference's weights are rounded alike first: what is left must be noise, however coarse the dtype. Then
the reference also runs with its sums in another order; what it differs by from itself is the *floor*. The two sides are called the same
where, over all judged positions,

    largest difference <= FACTOR x floor        mean difference <= FACTOR x floor        largest KL <= FACTOR squared x floor

since KL grows with the square of a difference. Bounds can be set outright instead. What rounding changes, and bfloat16 compute would, is
reported beside it.

Experts make logits jump: where a router scores two experts alike, noise decides. From the first such position of a sequence on its
positions are not judged. If that leaves less than JUDGED of all, all are, by means alone, since the floor jumps as often.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardconv.errors import CheckError, ConfigError, Problem
from shardconv.verify.differences import Difference, Gap, Logits, Tokens, gap, in_sum, join, surprise
from shardconv.verify.logit_request import Bounds
from shardconv.verify.noise import HALF, ORDERS, PLAIN, ROUNDED
from shardconv.verify.reference import Spoken

# The share of positions that must be left to judge them by their largest difference.
JUDGED = 0.25

# Pairs of logits that are kept to be drawn.
POINTS = 2000


@dataclass(frozen=True)
class Measured:
    """A sequence's logits by the reference, and by the reference rounded as the plan rounds, which are the same if it does not.

    `reordered` are gaps to the latter, `bfloat16` is one to the former; `decided` is per position.
    """

    tokens: Tokens
    logits: Logits
    rounded: Logits
    reordered: tuple[Gap, ...]
    bfloat16: Gap
    decided: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Worst:
    """Where the sides differ most: which sequence, position and token id, and both logits."""

    sequence: int
    position: int
    token: int
    found: float
    reference: float


@dataclass(frozen=True)
class LogitReport:
    """The comparison. `jax` is the checkpoint's difference to the reference, `judged` that to the reference rounded as the plan rounds.

    `rounded` is what rounding changes, `reordered` the noise, `bfloat16` what compute in bfloat16 would change. `worst` is of `judged`,
    `scatter` some pairs of it, the reference's first, `largest` the largest logit of the reference. `reasons` says in words why the sides
    are not the same; nothing if they are.
    """

    lengths: tuple[int, ...]
    jax: Difference
    judged: Difference
    reordered: Difference
    rounded: Difference
    bfloat16: Difference
    bounds: Bounds
    perplexity: float
    reference_perplexity: float
    worst: Worst
    unjudged: int
    largest: float
    scatter: tuple[tuple[float, float], ...]
    reasons: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether both sides think the same."""
        return not self.reasons


def measure(spoken: Spoken, decided: npt.NDArray[np.bool_]) -> Measured:
    """All that the reference says about one sequence."""
    logits = spoken.logits
    return Measured(
        tokens=spoken.tokens,
        logits=logits[PLAIN],
        rounded=logits[ROUNDED],
        reordered=tuple(gap(logits[run], logits[ROUNDED]) for run in ORDERS),
        bfloat16=gap(logits[HALF], logits[PLAIN]),
        decided=decided[: len(spoken.tokens)],
    )


@dataclass(frozen=True)
class _Seen:
    """What is kept of a sequence: numbers per position."""

    jax: Gap
    judged: Gap
    reordered: tuple[Gap, ...]
    rounded: Gap
    bfloat16: Gap
    decided: npt.NDArray[np.bool_]
    surprise: npt.NDArray[np.float64]
    reference_surprise: npt.NDArray[np.float64]
    largest: float
    worst: Worst
    points: npt.NDArray[np.float32]


def _seen(sequence: int, found: Logits, measured: Measured, seed: int) -> _Seen:
    judged = gap(found, measured.rounded)
    difference = np.nan_to_num(np.abs(found - measured.rounded), nan=np.inf)
    position, token = (int(place) for place in np.unravel_index(difference.argmax(), difference.shape))
    return _Seen(
        jax=gap(found, measured.logits),
        judged=judged,
        reordered=measured.reordered,
        rounded=gap(measured.rounded, measured.logits),
        bfloat16=measured.bfloat16,
        decided=measured.decided,
        surprise=surprise(found, measured.tokens),
        reference_surprise=surprise(measured.logits, measured.tokens),
        largest=float(np.abs(measured.logits).max()),
        worst=Worst(sequence, position, token, float(found[position, token]), float(measured.rounded[position, token])),
        points=_points(found, measured.rounded, seed + sequence),
    )


def _points(found: Logits, reference: Logits, seed: int) -> npt.NDArray[np.float32]:
    """Some pairs of logits, (pairs, 2), the reference's first."""
    chosen = np.random.default_rng(seed).choice(found.size, min(POINTS, found.size), replace=False)
    pairs: npt.NDArray[np.float32] = np.stack((reference.ravel()[chosen], found.ravel()[chosen]), axis=-1)
    return pairs


def compare(pairs: Iterable[tuple[Measured, Logits]], bounds: Bounds, seed: int = 0) -> LogitReport:
    """The report about each sequence's logits (length, columns), which may be more than the vocabulary: rows that pad it."""
    seen = []
    for number, (sequence, found) in enumerate(pairs):
        columns = sequence.logits.shape[-1]
        if found.shape[-1] < columns:
            fact = f"{found.shape[-1]} logits a token, and the PyTorch model has {columns}"
            raise CheckError("the checkpoint has too small a vocabulary", [Problem(fact)])
        with np.errstate(invalid="ignore", over="ignore"):  # a faulty checkpoint gives NaN and infinities, which are judged as such
            seen.append(_seen(number, found[:, :columns], sequence, seed))
    if not seen:
        raise ConfigError("comparing logits needs sequences", [Problem("there are none")])
    return _report(seen, bounds)


def _report(seen: Sequence[_Seen], bounds: Bounds) -> LogitReport:
    decided = np.concatenate([one.decided for one in seen])
    by_means = bool(decided.mean() < JUDGED)
    kept = np.ones_like(decided) if by_means else decided
    orders = [in_sum(join([one.reordered[order] for one in seen]), kept) for order in range(len(seen[0].reordered))]
    judged = in_sum(join([one.judged for one in seen]), kept)
    allowed = _allowed(orders, bounds, max(one.largest for one in seen))
    return LogitReport(
        lengths=tuple(len(one.decided) for one in seen),
        jax=in_sum(join([one.jax for one in seen]), kept),
        judged=judged,
        reordered=max(orders, key=lambda difference: difference.max_abs),
        rounded=in_sum(join([one.rounded for one in seen]), kept),
        bfloat16=in_sum(join([one.bfloat16 for one in seen]), kept),
        bounds=allowed,
        perplexity=float(np.exp(np.concatenate([one.surprise for one in seen]).mean())),
        reference_perplexity=float(np.exp(np.concatenate([one.reference_surprise for one in seen]).mean())),
        worst=max((one.worst for one in seen), key=lambda worst: np.nan_to_num(abs(worst.found - worst.reference), nan=np.inf)),
        unjudged=int((~kept).sum()),
        largest=max(one.largest for one in seen),
        scatter=_some([one.points for one in seen]),
        reasons=tuple(_reasons(judged, allowed, by_means=by_means)),
    )


def _some(points: Sequence[npt.NDArray[np.float32]]) -> tuple[tuple[float, float], ...]:
    """Points of all sequences, as many of each; those of a sequence are in random order."""
    each = max(1, POINTS // len(points))
    return tuple((float(reference), float(found)) for part in points for reference, found in part[:each])[:POINTS]


def _allowed(floor: Sequence[Difference], bounds: Bounds, largest: float) -> Bounds:
    """The bounds with what the floor allows filled in; no floor is less than one rounding of the largest logit."""
    rounding = largest * float(np.finfo(np.float32).eps)
    max_abs = max(rounding, *(difference.max_abs for difference in floor))
    mean_abs = max(rounding, *(difference.mean_abs for difference in floor))
    max_kl = max(rounding**2, *(difference.max_kl for difference in floor))
    return Bounds(
        bounds.factor * max_abs if bounds.max_abs is None else bounds.max_abs,
        bounds.factor * mean_abs if bounds.mean_abs is None else bounds.mean_abs,
        bounds.factor**2 * max_kl if bounds.max_kl is None else bounds.max_kl,
        bounds.factor,
    )


def _reasons(found: Difference, allowed: Bounds, *, by_means: bool) -> Iterator[str]:
    checks = [("mean difference", found.mean_abs, allowed.mean_abs)]
    if not by_means:
        checks += [("largest difference", found.max_abs, allowed.max_abs), ("largest KL", found.max_kl, allowed.max_kl)]
    for name, value, bound in checks:
        if bound is not None and not value <= bound:  # nan is no number that is small enough
            yield f"the {name} is {value:.3g}, and {bound:.3g} is allowed"
