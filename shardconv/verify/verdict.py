"""What the check found: a verdict that programs and people can read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardconv.errors import CheckError, Problem

TITLE = "the checkpoint is not what its source says"
LOGITS_TITLE = "the checkpoint does not compute what its source computes"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a check of the weights.

    `leaves` of them were compared, `elements` elements in `nbytes` bytes; `rounded` leaves hold rounded values. `whole` says that every
    element was looked at, else `boxes` were, chosen by `seed`. `independent` says that the reference is a second statement and not the
    plan's own addresses. `checksums` is how many leaves' checksums were made again. `nan` and `inf` count values of the checkpoint.
    `workers` of the `executor` looked at it; `cpu_seconds` are theirs as well, `peak_rss` is of the heaviest process.
    """

    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    independent: bool
    leaves: int
    rounded: int
    elements: int
    nbytes: int
    whole: bool
    boxes: int
    seed: int
    checksums: int
    nan: int
    inf: int
    executor: str
    workers: int
    pid: int
    seconds: float
    cpu_seconds: float
    peak_rss: int

    def to_json(self) -> dict[str, Any]:
        """The verdict as data, for report.json."""
        return {
            "mode": "weights",
            "equal": not self.problems,
            "problems": [{"fact": problem.fact, "remedy": problem.remedy} for problem in self.problems],
            "notes": list(self.notes),
            "independent": self.independent,
            "leaves": self.leaves,
            "leaves_rounded": self.rounded,
            "elements": self.elements,
            "bytes": self.nbytes,
            "whole": self.whole,
            "boxes": self.boxes,
            "seed": self.seed,
            "checksums": self.checksums,
            "nan": self.nan,
            "inf": self.inf,
            "executor": self.executor,
            "workers": self.workers,
            "pid": self.pid,
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "peak_rss_bytes": self.peak_rss,
        }


def summary(found: Mapping[str, Any]) -> str:
    """One line for people, of a verdict as data."""
    if found["whole"]:
        seen = f"all {found['elements']:,} elements of {found['leaves']} leaves"
    else:
        seen = f"{found['elements']:,} elements of {found['leaves']} leaves in {found['boxes']:,} boxes (seed {found['seed']})"
    rounds = f", {found['leaves_rounded']} of them rounded once" if found["leaves_rounded"] else ""
    places = len(found["problems"])
    result = f"weights differ in {places} place{'s' if places > 1 else ''}" if places else "weights equal"
    base = "" if found["independent"] else "; NOT by an independent statement of this model"
    return f"{result}: {seen}{rounds}, {found['seconds']:.1f} s{base}"


def raise_if_unequal(found: Mapping[str, Any]) -> None:
    """Raise CheckError with the problems of a verdict as data, of the weights or of both, if it has any."""
    if found["problems"]:
        weights, logits = found["weights"], found["logits"]
        title = TITLE if weights is not None and weights["problems"] else logits.get("title", LOGITS_TITLE)
        raise CheckError(title, [Problem(problem["fact"], problem["remedy"]) for problem in found["problems"]])
