"""What the comparison of logits comes to, in values that go into a report, and in words."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shardconv.errors import Problem
from shardconv.verify.agreement import LogitReport
from shardconv.verify.divergence import Divergence, StepGap
from shardconv.verify.unseen import Unseen

DIFFERENCES = ("jax", "judged", "reordered", "rounded", "bfloat16")
# What to look at where a part of a block departs.
HINTS: Mapping[str, str] = {
    "embed": "the embedding's rows and its scale",
    "q": "the order of heads and of rotary dims (target.rope), and the query scale",
    "k": "the order of heads and of rotary dims (target.rope)",
    "q_norm": "the norm's scale, its order of rotary dims, and the query scale",
    "k_norm": "the norm's scale and its order of rotary dims",
    "heads": "rotary base and scaling, windows and caps in config.json, and which query heads share a key head",
    "experts": "the order of experts, and gate and up of each",
    "inner": "whether gate and up are each other's, and the activation",
    "unembed": "the output projection, or the embedding where that is tied",
}


@dataclass(frozen=True)
class LogitVerdict:
    """The verdict and all that it rests on. `blocks` and `divergence` are of a forward whose states are known, the package's own.

    `cut` says of sequences that were cut what does not show, and is "" where none was.

    `unrouted` are the experts, by block, to which no judged position went, `unseen` all that no judged logit depends on, None where that
    was not looked for: `unsought` says why. `mesh` is what the checkpoint was restored onto; memory and seconds are of this process.
    """

    report: LogitReport
    forward: str
    seed: int
    prompts: str | None
    cut: str
    blocks: tuple[StepGap, ...]
    divergence: Divergence | None
    traced: bool
    unrouted: Mapping[int, tuple[int, ...]]
    unseen: tuple[Unseen, ...] | None
    unsought: str
    platform: str
    devices: int
    mesh: Mapping[str, int]
    layer_by_layer: bool
    pid: int
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Why the sides are not the same, and what to do next; nothing if they are."""
        if self.report.same:
            return ()
        worst = self.report.worst
        where = f"the worst is logit {worst.token} at position {worst.position} of sequence {worst.sequence}"
        lines = [*self.report.reasons, f"{where}: {worst.found:.6g}, and should be {worst.reference:.6g}", *self._departure()]
        return (Problem("\n".join(lines), self._remedy()),)

    def _departure(self) -> Iterator[str]:
        found = self.divergence
        if found is not None:
            what = f"{found.part} of {found.step}" if found.part and found.part != found.step else found.step
            noise = f"sums in another order make {found.floor:.3g} there"
            yield f"{what} is the first to depart, by {found.max_abs:.3g}; {noise}"
        elif self.blocks:
            yield "no block departs by itself"

    def _remedy(self) -> str:
        if not self.blocks:
            return "look at the forward, or compare the weights alone with --check weights"
        if not self.traced:
            return "run shardconv verify with --trace to see which part of the block departs first"
        part = self.divergence.part if self.divergence else None
        hint = f": {HINTS[part]}" if part is not None and part in HINTS else ""
        return f"look at {part or 'it'} in the layout's table and in config.json{hint}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of the comparison besides, in words."""
        found = [self.cut] if self.cut else []
        if self.report.unjudged:
            total = sum(self.report.lengths)
            found.append(f"{self.report.unjudged:,} of {total:,} positions are not judged: before them a router's choice hung on noise")
        if self.unsought:
            found.append(f"what the logits do not show was not looked for: {self.unsought}")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """The verdict as JSON values; what is no finite number is null."""
        report = self.report
        found = {
            "equal": report.same,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": list(self.notes),
            "forward": self.forward,
            "sequences": list(report.lengths),
            "seed": self.seed,
            "prompts": self.prompts,
            "differences": {name: asdict(getattr(report, name)) for name in DIFFERENCES},
            "bounds": asdict(report.bounds),
            "perplexity": report.perplexity,
            "reference_perplexity": report.reference_perplexity,
            "worst": asdict(report.worst),
            "unjudged": report.unjudged,
            "blocks": [{"step": one.step, "max_abs": one.max_abs, "floor": one.floor, "scale": one.scale} for one in self.blocks],
            "divergence": None if self.divergence is None else asdict(self.divergence),
            "scatter": [list(pair) for pair in report.scatter],
            "unrouted": [{"block": block, "experts": list(experts)} for block, experts in self.unrouted.items()],
            "unseen": None if self.unseen is None else [asdict(one) for one in self.unseen],
            "platform": self.platform,
            "devices": self.devices,
            "mesh": dict(self.mesh),
            "layer_by_layer": self.layer_by_layer,
            "pid": self.pid,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }
        safe: dict[str, Any] = _finite(found)
        return safe


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
