"""What the comparison of logits found, as a part of a page: a table of differences, facts, the difference by layer and the logits."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardconv.page.charts import blocks_figure, scatter_figure
from shardconv.page.html import Markup, element, facts, gallery, join, notes, section, table
from shardconv.page.words import UNKNOWN, decimal, finite, percent, seconds
from shardconv.verify.unseen import told

Json = Mapping[str, Any]

# The comparisons that a verdict holds, in the order of the table: what is judged and what it is judged by, then the rest.
COMPARISONS = (
    ("judged", "checkpoint"),
    ("reordered", "noise floor"),
    ("rounded", "rounding"),
    ("bfloat16", "bfloat16"),
    ("jax", "unrounded"),
)
EXPLAINED = (
    "checkpoint: its logits in JAX, against those of the PyTorch model in float32 with its weights rounded as the conversion rounds them",
    "allowed: what the noise floor makes allowable, or what the config sets",
    "noise floor: that PyTorch model against itself with its sums in another order",
    "rounding: that PyTorch model against the one whose weights are not rounded",
    "bfloat16: the PyTorch model that computes in bfloat16 against the one that does in float32",
    "unrounded: the checkpoint against the PyTorch model whose weights are not rounded",
    "KL divergences are in nats; the cosine is the least of all positions",
)
# Arrays that are named of each kind that the logits do not show; report.json has them all.
NAMED = 6
MEASURES = (
    ("max_abs", "largest difference"),
    ("mean_abs", "mean difference"),
    ("max_kl", "largest KL"),
    ("mean_kl", "mean KL"),
    ("cosine", "cosine"),
    ("top1", "same likeliest token"),
    ("top5", "same five likeliest"),
)


def logits_section(found: Json | None, weights: Json | None = None) -> Markup:
    """The table and the facts in a frame, then the plots; nothing where logits were not compared.

    `weights` is the verdict on the weights beside it, which speaks for what the logits do not show.
    """
    if found is None:
        return Markup()
    body = section(
        "Logits",
        *_differences(found.get("differences") or {}, found.get("bounds") or {}),
        facts(_facts(found)),
        notes([*(found.get("notes") or ()), *told(found, weights, NAMED)]),
        _unrouted(found.get("unrouted") or ()),
    )
    blocks, scatter = found.get("blocks") or (), found.get("scatter") or ()
    return join([body, gallery([blocks_figure(blocks, found.get("divergence")), scatter_figure(scatter)])])


def _differences(differences: Json, bounds: Json) -> list[Markup]:
    exact = (differences.get("rounded") or {}).get("max_abs") == 0  # then what rounding changes is nothing, and needs no columns
    names = [(name, heading) for name, heading in COMPARISONS if not (exact and name in ("rounded", "jax"))]
    shown = [(differences[name], heading) for name, heading in names if isinstance(differences.get(name), Mapping)]
    if not shown:
        return []
    first, *others = shown
    rows = []
    for key, said in MEASURES:
        allowed = decimal(bounds[key]) if bounds.get(key) is not None else ""
        rows.append([said, _measure(key, first[0].get(key)), allowed, *(_measure(key, one.get(key)) for one, _ in others)])
    explained = [line for line in EXPLAINED if not (exact and line.startswith(("rounding", "unrounded")))]
    head = ["", first[1], "allowed", *(heading for _, heading in others)]
    return [table(head, rows), element("details", element("summary", "what the columns are"), notes(explained))]


def _measure(key: str, value: object) -> str:
    number = finite(value)
    if number is None:
        return decimal(value)
    return percent(number) if key in ("top1", "top5") else f"{number:.7f}" if key == "cosine" else decimal(number)


def _facts(found: Json) -> Iterator[tuple[str, str]]:
    if "perplexity" in found:
        yield "perplexity", f"{decimal(found['perplexity'], 7)}, of the source {decimal(found.get('reference_perplexity'), 7)}"
    if lengths := found.get("sequences"):
        how = f"random tokens (seed {found.get('seed', UNKNOWN)})" + (f", and {found['prompts']}" if found.get("prompts") else "")
        yield "sequences", f"{len(lengths)} of {', '.join(map(str, lengths))} tokens: {how}"
    if worst := found.get("worst"):
        where = f"sequence {worst.get('sequence')}, position {worst.get('position')}, token {worst.get('token')}"
        yield "furthest apart", f"{decimal(worst.get('found'), 6)}, of the source {decimal(worst.get('reference'), 6)}: {where}"
    if divergence := found.get("divergence"):
        sizes = f"{decimal(divergence.get('max_abs'))}, and the noise there is {decimal(divergence.get('floor'))}"
        step, part = divergence.get("step"), divergence.get("part")
        yield "first departs", f"{step if part in (None, step) else f'{part} of {step}'}: by {sizes}"
    if "platform" in found:
        by = ", layer by layer" if found.get("layer_by_layer") else ""
        yield "computed on", f"{found.get('devices', UNKNOWN)} x {found['platform']}{_mesh(found.get('mesh'))}{by}"
    if "forward" in found:
        yield "forward", str(found["forward"])
    if "seconds" in found:
        yield "time", f"{seconds(found['seconds'])}, {seconds(found.get('cpu_seconds', 0.0))} of CPU"


def _mesh(mesh: object) -> str:
    if not isinstance(mesh, Mapping) or not mesh:
        return ""
    return f", mesh {', '.join(f'{axis} {size}' for axis, size in mesh.items())}"


def _unrouted(blocks: Sequence[Json]) -> Markup:
    """The experts of which the logits say nothing; above, the first of them only are named."""
    rows = ((str(block.get("block")), ", ".join(map(str, block.get("experts") or ()))) for block in blocks)
    whole = table(("block", "experts"), rows, numbers=False)
    return element("details", element("summary", "experts that no token of the sample went to"), whole) if blocks else Markup()
