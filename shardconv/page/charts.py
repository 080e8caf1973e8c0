"""The plots of a report, each from the data that report.json holds for it; None where there is nothing to draw.

A figure is a plot, what it shows in a sentence, and its numbers as a table that opens.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardconv.page.html import Markup, element, table
from shardconv.page.svg import (
    LETTER,
    WIDTH,
    Axis,
    Frame,
    Scale,
    curve,
    cut,
    decades,
    frame,
    line,
    picture,
    points,
    rectangle,
    thinned,
    ticks,
    words,
)
from shardconv.page.words import decimal, finite, power, seconds
from shardconv.progress import amount

Json = Mapping[str, Any]

HEIGHT = 250.0
ROW = 30.0  # of a bar with its label above it
PROCESSES = 12  # that a memory plot has a bar for; a cluster has more, and its heaviest matter
BASE = 100_000_000  # bytes that a worker's interpreter and libraries take beside its buffers, as the live view says it
DOTS = 4000  # of a scatter: more hide one another


def figure(name: str, title: str, said: str, height: float, parts: Sequence[Markup], numbers: Markup, key: Markup | str = "") -> Markup:
    """A plot with its caption, key and table."""
    shown = element("details", element("summary", "as a table"), numbers)
    caption = element("figcaption", element("h3", title), element("p", said))
    return element("figure", caption, key, picture(name, title, said, height, *parts), shown)


def key(*entries: tuple[str, str]) -> Markup:
    """What the marks of a plot mean: (class, words)."""
    return element("p", *(element("span", element("i", class_=kind), said) for kind, said in entries), class_="key")


# ------------------------------------------------------------------------------------------------------------------ bars


@dataclass(frozen=True)
class Bar:
    """A row: its label, its number in words, and where the bar begins and ends."""

    label: str
    value: str
    start: float
    end: float
    kind: str = "bar"


def bars(rows: Sequence[Bar], high: float) -> list[Markup]:
    """Bars on a scale from 0 to `high`, each under its label and number."""
    scale = Scale(0.0, high, 4.0, WIDTH - 4)
    parts = []
    for number, row in enumerate(rows):
        top, at = ROW * number, scale.at(row.start)
        label = cut(row.label, WIDTH - 16 - LETTER * len(row.value))
        parts += [words(label, 4, top + 12, "label"), words(row.value, WIDTH - 4, top + 12, "tick", "end")]
        parts += [line(4, top + 21, WIDTH - 4, top + 21, "grid"), rectangle(at, top + 16, scale.at(row.end) - at, 10, row.kind)]
    return parts


def stages_figure(stages: Mapping[str, object], meanings: Mapping[str, str]) -> Markup | None:
    """What took how long, one stage after another."""
    known = {name: length for name, length in ((name, finite(taken)) for name, taken in stages.items()) if length is not None}
    total = sum(known.values())
    if not known:
        return None
    rows, at = [], 0.0
    for name, length in known.items():
        label = f"{name} ({meanings[name]})" if name in meanings else name
        rows.append(Bar(label, seconds(length), at, at + length))
        at += length
    longest = max(known, key=lambda name: known[name])
    said = f"{seconds(total)} in all, the longest stage is {longest} with {seconds(known[longest])}."
    numbers = table(("stage", "seconds"), ((name, f"{length:.3f}") for name, length in known.items()))
    return figure("stages", "Stages", said, ROW * len(rows), bars(rows, total), numbers)


def memory_figure(processes: Sequence[Json], budget: float) -> Markup | None:
    """The peak of every process, against what a worker may take."""
    known = [(process, peak) for process in processes if (peak := finite(process.get("peak_rss_bytes")))]
    if not known:
        return None
    known.sort(key=lambda pair: -pair[1])
    shown = known[:PROCESSES]
    bound = budget + BASE if budget else 0.0
    high = 1.02 * max(bound, shown[0][1])
    rows = [Bar(_process(process), amount(peak), 0.0, peak, _within(process, peak, bound)) for process, peak in shown]
    parts, height = bars(rows, high), ROW * len(rows)
    workers = [peak for process, peak in known if process.get("role") == "worker"]
    said = f"The heaviest worker took {amount(max(workers))}" if workers else "No workers were needed"
    if bound:
        at = Scale(0.0, high, 4.0, WIDTH - 4).at(bound)
        parts += [line(at, top + 14, at, top + 28, "limit") for top in (ROW * number for number in range(len(rows)))]
        said += f"; buffers may take {amount(budget)}, the interpreter and its libraries some {amount(BASE)} more"
    if len(known) > len(shown):
        said += f". The {len(shown)} heaviest of {len(known)} processes are shown"
    numbers = table(
        ("process", "peak", "CPU"), ((_process(p), amount(peak), seconds(finite(p.get("cpu_seconds")) or 0.0)) for p, peak in known)
    )
    marks = key(("bar", "peak resident memory"), ("limit", f"{amount(bound)}: budget and interpreter")) if bound else ""
    return figure("memory", "Memory", f"{said}.", height, parts, numbers, marks)


def _process(process: Json) -> str:
    return f"{process.get('role', 'process')}, pid {process.get('pid', '?')} on {process.get('host', '?')}"


def _within(process: Json, peak: float, bound: float) -> str:
    """The budget is for workers; the driver, the commit and the check answer to none of it."""
    return "bar over" if process.get("role") == "worker" and 0 < bound < peak else "bar" if process.get("role") == "worker" else "bar other"


# ------------------------------------------------------------------------------------------------------------ throughput


def throughput_figure(found: Json) -> Markup | None:
    """Bytes per second while units were made."""
    width, made = finite(found.get("slice_seconds")), [finite(nbytes) or 0.0 for nbytes in found.get("bytes", ())]
    if not width or not made:
        return None
    rates = [nbytes / width for nbytes in made]
    total, highest = width * len(made), max(rates)
    mean = sum(made) / total
    divisor, unit = next(((size, name) for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if highest >= size), (1.0, "bytes"))
    times, long = (60.0, "minutes") if total > 300 else (1.0, "seconds")
    across = Axis(0.0, total / times, tuple((at, f"{at:g}") for at in ticks(0.0, total / times)), long)
    high = max(highest / divisor, 1e-9) * 1.05
    upright = Axis(0.0, high, tuple((at, f"{at:g}") for at in ticks(0.0, high)), f"{unit} per second")
    drawn = frame(across, upright, HEIGHT)
    corners = []
    for number, rate in enumerate(rates):
        level = drawn.y.at(rate / divisor)
        corners += [(drawn.x.at(number * width / times), level), (drawn.x.at((number + 1) * width / times), level)]
    floor = [(drawn.x.end, drawn.y.start), (drawn.x.start, drawn.y.start)]
    level = drawn.y.at(mean / divisor)
    parts = [drawn.markup, curve([*corners, *floor], "area"), curve(corners, "line")]
    parts.append(line(drawn.x.start, level, drawn.x.end, level, "bound"))
    said = f"{amount(sum(made))} in {seconds(total)}: {amount(mean)}/s on average, {amount(highest)}/s at best."
    rows = ((f"{seconds(number * width)} to {seconds((number + 1) * width)}", f"{amount(rate)}/s") for number, rate in enumerate(rates))
    marks = key(("line", "bytes of the target per second"), ("bound", f"average, {amount(mean)}/s"))
    return figure("throughput", "Throughput", said, HEIGHT, parts, table(("time", "made"), rows), marks)


# ---------------------------------------------------------------------------------------------------------------- logits


def blocks_figure(blocks: Sequence[Json], divergence: Json | None) -> Markup | None:
    """The largest difference of hidden states after every step, against the noise there, by powers of ten."""
    if not blocks:
        return None
    steps = [str(block.get("step", number)) for number, block in enumerate(blocks)]
    found, floor = ([finite(block.get(name)) for block in blocks] for name in ("max_abs", "floor"))
    positive = [number for number in (*found, *floor) if number]
    marks = decades(min(positive), max(positive)) if positive else (1.0,)
    marks = marks if len(marks) > 1 else (marks[0] / 10, marks[0], marks[0] * 10)
    upright = Axis(marks[0], marks[-1], tuple((mark, power(mark, 0)) for mark in thinned(marks)), "largest difference", log=True)
    drawn = frame(_axis_of(steps), upright, HEIGHT)
    # What is no number is as bad as can be, and is drawn at the top.
    places = [(drawn.x.at(float(number)), drawn.y.at(marks[-1] if value is None else value)) for number, value in enumerate(found)]
    noise = [(drawn.x.at(float(number)), drawn.y.at(value)) for number, value in enumerate(floor) if value is not None]
    parts = [drawn.markup, curve(noise, "second"), curve(places, "line"), points(places, "dots")]
    where = None if divergence is None else str(divergence.get("step"))
    if where in steps:
        parts.append(_mark(drawn, steps.index(where), where))
    said = f"{len(steps)} steps, from {steps[0]} to {steps[-1]}: the largest difference of hidden states after each, and the noise there."
    said += " Where there is none, it is drawn at the foot." if 0 in (*found, *floor) else ""
    rows = (
        (f"{number} {step}", *(decimal(block.get(name)) for name in ("max_abs", "floor", "scale")))
        for number, (step, block) in enumerate(zip(steps, blocks, strict=True))
    )
    numbers = table(("step", "difference", "noise floor", "largest value"), rows)
    entries = [("line", "checkpoint against source"), ("second", "noise floor")]
    return figure("blocks", "Difference by layer", said, HEIGHT, parts, numbers, key(*entries))


def _axis_of(steps: Sequence[str]) -> Axis:
    """Steps side by side, under the numbers that they have in their own names, or else their places."""
    named = [(at, match) for at, step in enumerate(steps) if (match := re.fullmatch(r"(\D*?) *(\d+)", step))]
    numbers = [(at, int(match[2])) for at, match in named] or [(at, at) for at in range(len(steps))]
    shown = set(ticks(0.0, float(max(number for _, number in numbers))))
    labels = tuple((float(at), str(number)) for at, number in numbers if number in shown)
    return Axis(-0.5, len(steps) - 0.5, labels, named[0][1][1] if named else "step")


def _mark(drawn: Frame, number: int, step: str) -> Markup:
    at = drawn.x.at(float(number))
    left = at > (drawn.x.start + drawn.x.end) / 2
    label = words(f"departs: {step}", at - 4 if left else at + 4, drawn.y.end + 10, "alarm", "end" if left else None)
    return Markup(line(at, drawn.y.end, at, drawn.y.start, "divergence") + label)


def scatter_figure(pairs: Sequence[Sequence[object]]) -> Markup | None:
    """Logits of the two sides against each other: on the diagonal where they are the same."""
    known = [(x, y) for x, y in ((finite(pair[0]), finite(pair[1])) for pair in pairs) if x is not None and y is not None]
    if not known:
        return None
    low, high = min(map(min, known)), max(map(max, known))
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    marks = tuple((at, f"{at:g}".replace("-", "−")) for at in ticks(low, high))
    drawn = frame(Axis(low, high, marks, "logit of the source"), Axis(low, high, marks, "logit of the checkpoint"), 340.0)
    some = known[:: -(-len(known) // DOTS)]
    parts = [drawn.markup, line(drawn.x.start, drawn.y.start, drawn.x.end, drawn.y.end, "diagonal")]
    parts.append(points(((drawn.x.at(x), drawn.y.at(y)) for x, y in some), "dots"))
    furthest = sorted(known, key=lambda pair: -abs(pair[0] - pair[1]))
    lost = len(pairs) - len(known)
    said = f"{len(known):,} logits of both sides; equal ones lie on the diagonal. They differ by {decimal(_apart(furthest[0]))} at most"
    said += f"; {lost:,} more are no numbers." if lost else "."
    rows = ((decimal(x), decimal(y), decimal(_apart((x, y)))) for x, y in furthest[:10])
    numbers = table(("source", "checkpoint", "difference"), rows)
    return figure("scatter", "Logits", said, 340.0, parts, numbers, key(("dot", "a logit"), ("diagonal", "equal")))


def _apart(pair: tuple[float, float]) -> float:
    return abs(pair[0] - pair[1])
