"""The verdict about logits, from the noise that the reference itself has.

The reference also runs with its sums in another order and, where the plan rounds values, with its weights rounded alike; what it differs
by from itself is the *floor*. The two sides are called the same where, over all judged positions,

    largest difference <= FACTOR x floor        mean difference <= FACTOR x floor        largest KL <= FACTOR squared x floor

since KL grows with the square of a difference. Bounds can be set outright instead. bfloat16 compute is measured too, for comparison.

Experts make logits jump: where a router scores two experts alike, noise decides. From the first such position of a sequence on its
positions are not judged. If that leaves less than JUDGED of all, all are, by means alone, since the floor jumps as often.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shardconv.errors import CheckError, ConfigError, Problem
from shardconv.verify.differences import Difference, Gap, Logits, Tokens, gap, in_sum, join, surprise
from shardconv.verify.reference import Reference, Rounding, Run

# JAX against torch came to 0.3 to 1.1 times the floor over 24 models; of 24 faults in tables and arrays, the mildest that swaps, shifts or
# leaves something out came to a hundred thousand times the floor, and one projection off by a part in ten thousand to forty times.
FACTOR = 4.0

# Another order of sums is tried this often, and the largest difference counts: it is one draw of a random number.
ORDERS = 2

# A router is undecided below this many times the median noise of its scores: the largest of a million normal deviates is 7 times their
# median, both sides have noise, and some positions have more of it than others.
UNDECIDED = 30.0

# The share of positions that must be left to judge them by their largest difference.
JUDGED = 0.25

@dataclass(frozen=True)
class Bounds:
    """What the differences may be; None is what the floor allows."""

    max_abs: float | None = None
    mean_abs: float | None = None
    max_kl: float | None = None
    factor: float = FACTOR


@dataclass(frozen=True)
class Measured:
    """A sequence's reference logits, and the gaps to them of the reference's other runs. `decided` is per position."""

    tokens: Tokens
    logits: Logits
    reordered: tuple[Gap, ...]
    bfloat16: Gap
    rounded: Gap | None
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
    """The comparison. `jax` is the checkpoint's difference to the reference; the others are the reference's to itself.

    `reasons` says in words why the sides are not the same; nothing if they are.
    """

    lengths: tuple[int, ...]
    jax: Difference
    reordered: Difference
    bfloat16: Difference
    rounded: Difference | None
    bounds: Bounds
    perplexity: float
    reference_perplexity: float
    worst: Worst
    unjudged: int
    reasons: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether both sides think the same."""
        return not self.reasons


def measure(reference: Reference, tokens: Tokens, roundings: Mapping[str, Rounding]) -> Measured:
    """All that the reference says about one sequence, with `roundings` of tensors that the plan rounds."""
    plain = reference.run(tokens)
    orders = [reference.reordered(tokens, seed) for seed in range(ORDERS)]
    rounded = [reference.rounded(tokens, roundings)] if roundings else []
    return Measured(
        tokens=tokens,
        logits=plain.logits,
        reordered=tuple(gap(other.logits, plain.logits) for other in orders),
        bfloat16=gap(reference.in_bfloat16(tokens).logits, plain.logits),
        rounded=gap(rounded[0].logits, plain.logits) if rounded else None,
        decided=_decided(plain, [*orders, *rounded], reference.chosen),
    )


def _decided(plain: Run, others: Sequence[Run], chosen: int) -> npt.NDArray[np.bool_]:
    """The positions up to the first at which a router's choice hangs on noise."""
    decided = np.ones(len(plain.logits), bool)
    if plain.routers is None or chosen >= plain.routers.shape[-1]:
        return decided
    ranked = np.sort(plain.routers, axis=-1)[..., ::-1]
    margins = ranked[..., chosen - 1] - ranked[..., chosen]
    moved = [np.median(np.abs(run.routers - plain.routers), axis=(1, 2)) for run in others if run.routers is not None]
    certain = (margins > UNDECIDED * np.max(moved, axis=0)[:, None]).all(axis=0)
    return np.logical_and.accumulate(certain)


@dataclass
class _Tally:
    """What has been seen of the sequences so far."""

    jax: list[Gap] = field(default_factory=list)
    surprises: list[npt.NDArray[np.float64]] = field(default_factory=list)
    reference_surprises: list[npt.NDArray[np.float64]] = field(default_factory=list)
    largest: float = 0.0
    worst: Worst | None = None

    def add(self, sequence: int, found: Logits, measured: Measured) -> None:
        """Counts a sequence in."""
        self.jax.append(gap(found, measured.logits))
        self.surprises.append(surprise(found, measured.tokens))
        self.reference_surprises.append(surprise(measured.logits, measured.tokens))
        self.largest = max(self.largest, float(np.abs(measured.logits).max()))
        difference = np.nan_to_num(np.abs(found - measured.logits), nan=np.inf)
        position, token = (int(place) for place in np.unravel_index(difference.argmax(), difference.shape))
        here = Worst(sequence, position, token, float(found[position, token]), float(measured.logits[position, token]))
        if self.worst is None or not abs(here.found - here.reference) <= abs(self.worst.found - self.worst.reference):
            self.worst = here


def compare(measured: Iterable[Measured], forward: Callable[[Tokens], Logits], bounds: Bounds) -> LogitReport:
    """The report about a forward, whose logits may have more columns than the vocabulary: rows that pad it."""
    tally, kept = _Tally(), []
    for number, sequence in enumerate(measured):
        found = forward(sequence.tokens)
        if found.shape[-1] < sequence.logits.shape[-1]:
            fact = f"{found.shape[-1]} logits a token, and the PyTorch model has {sequence.logits.shape[-1]}"
            raise CheckError("the checkpoint has too small a vocabulary", [Problem(fact)])
        tally.add(number, found[:, : sequence.logits.shape[-1]], sequence)
        kept.append(_without_logits(sequence))
    if tally.worst is None:
        raise ConfigError("comparing logits needs sequences", [Problem("there are none")])
    return _report(tally, kept, bounds)


def _without_logits(measured: Measured) -> Measured:
    return Measured(measured.tokens, measured.logits[:0], measured.reordered, measured.bfloat16, measured.rounded, measured.decided)


def _report(tally: _Tally, kept: Sequence[Measured], bounds: Bounds) -> LogitReport:
    assert tally.worst is not None
    decided = np.concatenate([measured.decided for measured in kept])
    by_means = decided.mean() < JUDGED
    judged = np.ones_like(decided) if by_means else decided
    rounded = [measured.rounded for measured in kept if measured.rounded is not None]
    orders = [in_sum(join([measured.reordered[order] for measured in kept]), judged) for order in range(ORDERS)]
    reordered = max(orders, key=lambda difference: difference.max_abs)
    ours = in_sum(join(tally.jax), judged)
    rounds = in_sum(join(rounded), judged) if rounded else None
    allowed = _allowed([*orders, *([rounds] if rounds else [])], bounds, tally.largest)
    return LogitReport(
        lengths=tuple(len(measured.tokens) for measured in kept),
        jax=ours,
        reordered=reordered,
        bfloat16=in_sum(join([measured.bfloat16 for measured in kept]), judged),
        rounded=rounds,
        bounds=allowed,
        perplexity=float(np.exp(np.concatenate(tally.surprises).mean())),
        reference_perplexity=float(np.exp(np.concatenate(tally.reference_surprises).mean())),
        worst=tally.worst,
        unjudged=int((~judged).sum()),
        reasons=tuple(_reasons(ours, allowed, by_means=bool(by_means))),
    )


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
