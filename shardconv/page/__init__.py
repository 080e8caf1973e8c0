"""report.html: what report.json says, for people, as one page that needs nothing else: no script, no network.

`page` is a pure function from the content of report.json to text. Parts that a report does not have are left out, so reports of earlier
versions and verdicts without a run have a page as well.

    html       elements, and what keeps text from becoming markup
    words      numbers as they are said
    svg        scales, axes and marks
    charts     the plots
    verdicts   what the check found, and what it looked at of the weights
    logits     what the comparison of logits found
    style      the style sheet
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from shardconv.errors import ConfigError, Problem
from shardconv.ledger import write_atomically
from shardconv.page.charts import memory_figure, stages_figure, throughput_figure
from shardconv.page.html import Markup, element, facts, gallery, join, notes
from shardconv.page.logits import logits_section
from shardconv.page.style import STYLE
from shardconv.page.verdicts import banner, parts_of, problems_of, weights_section
from shardconv.page.words import count, seconds
from shardconv.progress import STAGES, amount

Json = Mapping[str, Any]

PAGE = "report.html"


def page(report: Json) -> str:
    """The content of report.json, or as much of it as there is, as an HTML page.

    >>> "Not checked" in page({"checkpoint": "/data/out", "check": None})
    True
    """
    check = report.get("check")
    weights, logits = parts_of(check)
    body = [_header(report), banner(check), problems_of(check)]
    if figures := list(_figures(report)):
        body.append(element("div", facts(figures), notes(report.get("notes") or ()), class_="card"))
    body += [_plots(report), weights_section(weights), logits_section(logits, weights), _footer(report)]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"shardconv: {_last(report.get('checkpoint'))}"),
        element("style", Markup(STYLE)),
    )
    return "<!DOCTYPE html>\n" + element("html", head, element("body", *body), lang="en") + "\n"


def write_page(report: Json, path: str) -> None:
    """Write the page of a report; raises ConfigError where it cannot be written."""
    try:
        write_atomically(path, page(report), durable=False)
    except OSError as error:
        raise ConfigError("cannot write the page", [Problem(f"{path}: {error.strerror}")]) from error


def _last(path: object) -> str:
    """What a person calls a path: its last part, or the model's name where it lies in Hugging Face's cache."""
    if isinstance(path, str) and (cached := re.search(r"models--([^/]+)/snapshots/[^/]+/*$", path)):
        return cached[1].replace("--", "/")
    return os.path.basename(os.path.normpath(path)) if isinstance(path, str) and path else "conversion"


def _header(report: Json) -> Markup:
    source, checkpoint = report.get("source"), report.get("checkpoint")
    title = f"{_last(source)} → {_last(checkpoint)}" if source else _last(checkpoint)
    paths = [element("div", path) for path in (source, checkpoint) if path]
    return element("header", element("h1", title), element("div", *paths, class_="paths"))


def _figures(report: Json) -> Iterator[tuple[str, str]]:
    """The figures of a run; a verdict alone has none."""
    if "target_bytes" in report:
        made = [_kind(report.get("family"), report.get("source_bytes")), _kind(report.get("layout"), report["target_bytes"])]
        yield "converted", " into ".join(said for said in made if said)
    if "bytes_read" in report:
        requests = f" in {count(report['requests'], 'request')}" if "requests" in report else ""
        yield "read", f"{amount(report['bytes_read'])}{requests}{_times(report.get('read_amplification'), 'what is used')}"
    if "bytes_written" in report:
        yield "written", f"{amount(report['bytes_written'])}{_times(report.get('write_amplification'), 'the target')}"
    if "wall_seconds" in report:
        cpu = f", {seconds(report['cpu_seconds'])} of CPU in all processes" if "cpu_seconds" in report else ""
        yield "time", f"{seconds(report['wall_seconds'])}{cpu}"
    if report.get("peak_rss_bytes"):
        budget = f"; buffers may take {amount(report['memory_budget_bytes'])}" if "memory_budget_bytes" in report else ""
        yield "memory", f"heaviest worker {amount(report['peak_rss_bytes'])}{budget}"
    if "executor" in report:
        where = f"{report['executor']}, {report['workers']} at a time" if report.get("workers") else "none were needed"
        yield "workers", where
    if isinstance(units := report.get("units"), Mapping):
        yield "units", _units(units)
    if isinstance(versions := report.get("versions"), Mapping):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _kind(name: object, nbytes: object) -> str:
    return ", ".join([*([str(name)] if name else []), *([amount(nbytes)] if isinstance(nbytes, int | float) else [])])


def _times(ratio: object, what: str) -> str:
    return f", {ratio:.2f} x {what}" if isinstance(ratio, int | float) else ""


def _units(units: Json) -> str:
    resumed, retried = units.get("resumed", 0), units.get("retried", 0)
    said = f"{units.get('total', 0):,}"
    said += f", of which {resumed:,} were finished by earlier runs" if resumed else ""
    return said + (f"; {count(retried, 'attempt')} failed and {'was' if retried == 1 else 'were'} made again" if retried else "")


def _plots(report: Json) -> Markup:
    plots = [
        stages_figure(report.get("stages") or {}, STAGES),
        memory_figure(report.get("processes") or (), report.get("memory_budget_bytes") or 0),
        throughput_figure(report.get("throughput") or {}),
    ]
    drawn = gallery(plots)
    return join([element("h2", "The run"), drawn]) if drawn else Markup()


def _footer(report: Json) -> Markup:
    version = (report.get("versions") or {}).get("shardconv", "")
    return element("footer", f"shardconv {version}".strip(), ". The same as data: report.json." if "stages" in report else "")
