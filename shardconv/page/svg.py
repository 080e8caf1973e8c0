"""Plots as SVG text: scales, ticks, a frame with axes, and marks in it. Pure functions; colours are the style sheet's, by class.

All plots are `WIDTH` units wide and are shown at about that many pixels, one beside another where there is room, so that their text has
the size of the page's on a phone too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardconv.page.html import Markup, element

WIDTH = 400.0
LETTER = 6.2  # width of a digit or a small letter in units, at the style's font size of 11
TICKS = 5


@dataclass(frozen=True)
class Scale:
    """Numbers from `low` to `high`, drawn from `start` to `end`; by their logarithm if `log`, and then `low` is positive."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a number is drawn; what lies beyond the scale, at its end."""
        low, high, value = (math.log10(max(number, self.low)) if self.log else number for number in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.0
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def ticks(low: float, high: float, most: int = TICKS) -> tuple[float, ...]:
    """Round numbers from `low` to `high`, at most `most` of them.

    >>> ticks(0, 7.3)
    (0.0, 2.0, 4.0, 6.0)
    """
    if not high > low:
        return (low,)
    rough = (high - low) / (most - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    steps = (unit * factor for factor in (1, 2, 2.5, 5, 10, 20))
    for step in steps:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return tuple(number * step for number in range(first, last + 1))


def decades(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten that enclose two positive numbers."""
    return tuple(10.0**exponent for exponent in range(math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9) + 1))


def thinned(values: Sequence[float], most: int = TICKS + 2) -> tuple[float, ...]:
    """Every second, third, ... of some values, so that at most `most` are left."""
    return tuple(values[:: math.ceil(len(values) / most)])


@dataclass(frozen=True)
class Axis:
    """What one side of a frame says: which numbers, their labels, and a title of what and in which unit."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    title: str
    log: bool = False


@dataclass(frozen=True)
class Frame:
    """A place to draw in, and its axes as markup."""

    x: Scale
    y: Scale
    markup: Markup


def frame(x: Axis, y: Axis, height: float) -> Frame:
    """Axes with a grid; the title of the upright one stands above it, level, where it can be read."""
    left = 14 + LETTER * max((len(label) for _, label in y.ticks), default=1)
    across, up = Scale(x.low, x.high, left, WIDTH - 14, x.log), Scale(y.low, y.high, height - 38, 26, y.log)
    parts = [words(y.title, 4, 12, "axis")]
    for value, label in y.ticks:
        at = up.at(value)
        parts += [line(across.start, at, across.end, at, "grid"), words(label, left - 6, at + 4, "tick", "end")]
    for value, label in x.ticks:
        at = across.at(value)
        middle = min(at, WIDTH - LETTER * len(label) / 2)
        parts += [line(at, up.start, at, up.start + 4, "rule"), words(label, middle, up.start + 16, "tick", "middle")]
    parts += [line(across.start, up.start, across.end, up.start, "rule"), words(x.title, across.end, height - 5, "axis", "end")]
    return Frame(across, up, Markup("".join(parts)))


def words(said: str, x: float, y: float, kind: str, anchor: str | None = None) -> Markup:
    """Text whose base line begins, has its middle or ends at a point."""
    return element("text", said, x=x, y=y, class_=kind, text_anchor=anchor)


def cut(said: str, width: float) -> str:
    """Text that is not wider than `width`, as far as that can be told without the font; the table beside the plot has it whole.

    >>> cut("worker, pid 1234 on node-0001", 100)
    'worker, pid 123…'
    """
    most = int(width / LETTER)
    return said if len(said) <= most else f"{said[: max(most - 1, 0)]}…"


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    """A bar; one of no width is a hair that can be seen."""
    return element("rect", x=x, y=y, width=max(width, 1.0), height=height, class_=kind)


def curve(points: Iterable[tuple[float, float]], kind: str) -> Markup:
    """Straight lines from point to point."""
    path = "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    return element("path", d=f"M{path}", class_=kind) if path else Markup()


def points(places: Iterable[tuple[float, float]], kind: str) -> Markup:
    """Dots, as one path of lines without length whose round ends show."""
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
    return element("path", d=path, class_=kind) if path else Markup()


def picture(name: str, title: str, description: str, height: float, *parts: Markup) -> Markup:
    """A whole plot; `name` is its own on the page, title and description are for those who cannot see it."""
    said = (element("title", title, id=f"{name}-title"), element("desc", description, id=f"{name}-desc"))
    labels = f"{name}-title {name}-desc"
    return element("svg", *said, *parts, viewBox=f"0 0 {WIDTH:.0f} {height:.0f}", role="img", aria_labelledby=labels)
