"""What the checks found, for people: a line about the weights, and a line and a table about the logits."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from shardconv.verify.verdict import summary

Json = Mapping[str, Any]

# The comparisons of a verdict on logits: what is judged, what it is judged by, and what is told besides.
ROWS: Mapping[str, str] = {
    "judged": "JAX",
    "reordered": "noise: sums in another order",
    "rounded": "rounding that the config asks for",
    "bfloat16": "compute in bfloat16",
}


def print_check(found: Json, console: Console) -> None:
    """The verdict of `checking.verify` in a few lines."""
    for label, text in check_lines(found):
        console.print(f"{label:<12}{text}")
    logits = found["logits"]
    if logits is not None and "differences" in logits:
        console.print()
        console.print(logit_table(logits))
        console.print(perplexities(logits))


def check_lines(found: Json) -> Iterator[tuple[str, str]]:
    """Labels and texts: a line for each check, and the notes of each."""
    for name, words in (("weights", summary), ("logits", logit_summary)):
        part = found[name]
        if part is not None:
            yield "check" if name == "weights" else "", words(part)
            yield from (("note", note) for note in part["notes"])


def logit_summary(found: Json) -> str:
    """A line about the logits.

    >>> logit_summary({"equal": False, "problems": [1]})
    'logits not compared: the checkpoint cannot be read as its layout is'
    """
    if "differences" not in found:
        return "logits not compared: the checkpoint cannot be read as its layout is"
    judged, bounds = found["differences"]["judged"], found["bounds"]
    sequences = len(found["sequences"])
    where = f"{judged['positions']} positions of {sequences} sequence{'' if sequences == 1 else 's'}"
    result = "equal" if found["equal"] else "DIFFER"
    size = f"largest difference {number(judged['max_abs'])}, {number(bounds['max_abs'])} is allowed"
    how = ", layer by layer" if found["layer_by_layer"] else ""
    return f"logits {result}: {size}, over {where} (seed {found['seed']}), {found['seconds']:.1f} s{how}"


def logit_table(found: Json) -> Table:
    """What differs from the PyTorch model in float32, and by how much."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("logits of the PyTorch model and", no_wrap=True)
    for heading in ("largest", "mean", "largest KL", "least cosine", "top 1", "top 5"):
        table.add_column(heading, no_wrap=True, justify="right")
    for key, words in ROWS.items():
        one = found["differences"][key]
        cosine = "nan" if not isinstance(one["cosine"], float) else f"{one['cosine']:.7f}"
        sizes = [number(one[name]) for name in ("max_abs", "mean_abs", "max_kl")]
        table.add_row(words, *sizes, cosine, *(f"{one[name]:.1%}" if isinstance(one[name], float) else "nan" for name in ("top1", "top5")))
    allowed = found["bounds"]
    table.add_row("allowed", *(number(allowed[name]) for name in ("max_abs", "mean_abs", "max_kl")))
    return table


def perplexities(found: Json) -> str:
    """The perplexities of both sides, and where the likeliest first difference is, if any."""
    text = f"perplexity {number(found['perplexity'], 7)} in JAX, {number(found['reference_perplexity'], 7)} in PyTorch"
    if found["unjudged"]:
        text += f"; {found['unjudged']} positions not judged, where a router's choice hangs on noise"
    return text


def number(value: object, digits: int = 3) -> str:
    """A number to some digits; what is none, such as a NaN, as it is.

    >>> number(0.00012345), number(None), number("nan")
    ('0.000123', 'nan', 'nan')
    """
    return f"{value:.{digits}g}" if isinstance(value, int | float) else "nan" if value is None else str(value)
