"""What a check found, as parts of a page: the verdict first, then what differs, then what was looked at of the weights."""

from collections.abc import Iterator, Mapping
from typing import Any

from shardconv.page.html import Markup, element, facts, notes, section
from shardconv.page.words import UNKNOWN, count, decimal, seconds
from shardconv.progress import amount

Json = Mapping[str, Any]


def parts_of(check: Json | None) -> tuple[Json | None, Json | None]:
    """The verdicts on the weights and on the logits; reports of the first version hold that on the weights alone."""
    if check is None:
        return None, None
    if "weights" in check or "logits" in check:
        return check.get("weights"), check.get("logits")
    return check, None


def banner(check: Json | None) -> Markup:
    """The verdict first: equal, differs or not checked, and what was looked at."""
    weights, logits = parts_of(check)
    if check is None or (weights is None and logits is None):
        said = "Nobody compared what was written with its source: `shardconv verify` does."
        return element("div", element("p", element("strong", "Not checked")), element("p", said), class_="verdict unchecked")
    problems = check.get("problems") or ()
    equal = bool(check.get("equal", not problems))
    head = element("p", element("strong", "Equal" if equal else f"Differs: {count(len(problems), 'problem')}"))
    lines = [element("p", said) for said in (_weights_said(weights), _logits_said(logits)) if said]
    return element("div", head, *lines, class_=f"verdict {'equal' if equal else 'differs'}")


def _weights_said(found: Json | None) -> str:
    if found is None:
        return "The weights were not compared."
    problems = found.get("problems") or ()
    result = f"Weights differ in {count(len(problems), 'place')}" if problems else "Weights equal"
    if "elements" not in found:
        return f"{result}."
    seen = f"{found['elements']:,} elements of {count(found.get('leaves', 0), 'leaf', 'leaves')}"
    if found.get("whole", True):
        seen = f"all {seen}"
    else:
        seen += f", in {count(found.get('boxes', 0), 'box', 'boxes')} of a sample (seed {found.get('seed', UNKNOWN)})"
    base = "" if found.get("independent", True) else "; not by an independent statement of this model"
    return f"{result}: {seen}{base}."


def _logits_said(found: Json | None) -> str:
    if found is None:
        return "The logits were not compared."
    judged, bounds = (found.get("differences") or {}).get("judged"), found.get("bounds") or {}
    if judged is None:
        return "Logits not compared: the checkpoint could not be computed with."
    result = "Logits equal" if found.get("equal") else "Logits differ"
    sizes = f"they differ by {decimal(judged.get('max_abs'))} at most, and {decimal(bounds.get('max_abs'))} is allowed"
    return f"{result}: {sizes}, over {count(judged.get('positions', 0), 'position')}."


def problems_of(check: Json | None) -> Markup:
    """What differs, with the likely causes."""
    problems = (check or {}).get("problems") or ()
    if not problems:
        return Markup()
    return section("What differs", element("ul", *map(_problem, problems), class_="problems"))


def _problem(problem: Json) -> Markup:
    remedy = str(problem.get("remedy") or "")
    return element("li", str(problem.get("fact", "")), *([element("span", remedy)] if remedy else []))


def weights_section(found: Json | None) -> Markup:
    """What the check of the weights looked at, as a table."""
    if found is None:
        return Markup()
    return section("Weights", facts(_weights_facts(found)), notes(found.get("notes") or ()))


def _weights_facts(found: Json) -> Iterator[tuple[str, str]]:
    whole, boxes = found.get("whole", True), found.get("boxes", UNKNOWN)
    yield "compared", "every element" if whole else f"{boxes} boxes, chosen by seed {found.get('seed', UNKNOWN)}"
    if "leaves" in found:
        rounded = found.get("leaves_rounded", 0)
        yield "leaves", f"{found['leaves']:,}, " + (f"of which {rounded:,} hold values rounded once" if rounded else "all exact")
    if "elements" in found:
        yield "elements", f"{found['elements']:,}" + (f", {amount(found['bytes'])}" if "bytes" in found else "")
    if "checksums" in found:
        yield "checksums", f"{found['checksums']:,} made again" if found["checksums"] else "none made again: that takes every element"
    if "independent" in found:
        stated, own = "a second statement of this model and layout", "the plan's own addresses, which finds no wrong table"
        yield "compared with", stated if found["independent"] else own
    if "nan" in found:
        yield "NaN, infinite", f"{found['nan']:,} and {found.get('inf', 0):,} values"
    if "seconds" in found:
        yield "time", f"{seconds(found['seconds'])}, {seconds(found.get('cpu_seconds', 0.0))} of CPU"
