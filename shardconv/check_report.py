"""What the checks found, for people: a line about the weights, and a line and a table about the logits."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from shardconv.verify.unseen import told
from shardconv.verify.verdict import summary

Json = Mapping[str, Any]

# The comparisons of a verdict on logits; what is judged, and what rounding changes, only where the config asks for rounding.
ROWS: Mapping[str, str] = {
    "jax": "JAX",
    "judged": "JAX, if it is rounded alike",
    "reordered": "noise (sums in other orders)",
    "rounded": "rounding by the config",
    "bfloat16": "compute in bfloat16",
}

WIDTHS = (10, 10, 12, 14, 8, 8)


def print_check(found: Json, console: Console) -> None:
    """The verdict of `checking.verify` in a few lines."""
    for label, text in check_lines(found):
        console.print(f"{label:<12}{text}", soft_wrap=True)
    logits = found["logits"]
    if logits is not None and "differences" in logits:
        console.print(f"\n{logit_table(logits)}\n{perplexities(logits)}", soft_wrap=True)


def check_lines(found: Json) -> Iterator[tuple[str, str]]:
    """Labels and texts: a line for each check, and the notes of each; then what the logits do not show."""
    label = "check"
    for name, words in (("weights", summary), ("logits", logit_summary)):
        part = found[name]
        if part is not None:
            yield label, words(part)
            yield from (("note", note) for note in part["notes"])
            label = ""
    if found["logits"] is not None:
        yield from (("unseen", line) for line in told(found["logits"], found["weights"]))


def logit_summary(found: Json) -> str:
    """A line about the logits.

    >>> logit_summary({"equal": False, "problems": [1], "title": "the checkpoint cannot be read back"})
    'logits not compared: the checkpoint cannot be read back'
    """
    if "differences" not in found:
        return f"logits not compared: {found['title']}"
    judged, bounds = found["differences"]["judged"], found["bounds"]
    sequences = len(found["sequences"])
    where = f"{judged['positions']} positions of {sequences} sequence{'' if sequences == 1 else 's'}"
    result = "equal" if found["equal"] else "DIFFER"
    size = f"largest difference {number(judged['max_abs'])}, {number(bounds['max_abs'])} is allowed"
    how = ", layer by layer" if found["layer_by_layer"] else ""
    return f"logits {result}: {size}, over {where} (seed {found['seed']}), {found['seconds']:.1f} s{how}"


def logit_table(found: Json) -> str:
    """What differs from the PyTorch model in float32, and by how much; 96 columns, however narrow the terminal."""
    rounds = found["differences"]["rounded"]["max_abs"] != 0
    rows: list[tuple[str, ...]] = [("PyTorch in float32 against", "largest", "mean", "largest KL", "least cosine", "top 1", "top 5")]
    for key, words in ROWS.items():
        if key in ("judged", "rounded") and not rounds:
            continue
        one = found["differences"][key]
        sizes = (number(one[name]) for name in ("max_abs", "mean_abs", "max_kl"))
        shares = ("nan" if one[name] is None else f"{one[name]:.1%}" for name in ("top1", "top5"))
        rows.append((words, *sizes, number(one["cosine"], 9), *shares))
    allowed = found["bounds"]
    rows.append(("allowed", *(number(allowed[name]) for name in ("max_abs", "mean_abs", "max_kl")), "", "", ""))
    lines = (f"{name:<30}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)) for name, *cells in rows)
    return "\n".join(line.rstrip() for line in lines)


def perplexities(found: Json) -> str:
    """The perplexities of both sides."""
    return f"perplexity {number(found['perplexity'], 7)} in JAX, {number(found['reference_perplexity'], 7)} in PyTorch"


def number(value: object, digits: int = 3) -> str:
    """A number to some digits; what is none, such as a NaN, as it is.

    >>> number(0.00012345), number(None), number("nan")
    ('0.000123', 'nan', 'nan')
    """
    return f"{value:.{digits}g}" if isinstance(value, int | float) else "nan" if value is None else str(value)
