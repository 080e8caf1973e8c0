"""Elements of a page as text: what is markup says so by its type, and everything else is escaped.

Pages are well-formed XML too, so that a parser can prove that nothing from outside, such as a path, has become markup.
"""

import re
from collections.abc import Iterable
from html import escape

# What XML cannot hold: control characters, which paths may have, and the surrogates that stand for bytes that are no UTF-8.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """An element; children that are no `Markup` are escaped, numbers are rounded to hundredths, and what is None is left out.

    A trailing underscore and the underscores within are those of Python: `class_` is `class`, `stroke_width` is `stroke-width`.

    >>> element("td", "a < b", class_="number", title='"<"')
    '<td class="number" title="&quot;&lt;&quot;">a &lt; b</td>'
    """
    said = "".join(f' {_name(key)}="{_value(value)}"' for key, value in attributes.items() if value is not None)
    return Markup(f"<{name}{said}>{join(children)}</{name}>" if children or name not in VOID else f"<{name}{said}/>")


# Written without a closing tag: the void elements used here, and those of SVG that hold nothing.
VOID = frozenset({"meta", "br", "rect", "line", "path", "circle"})


def join(children: Iterable[str]) -> Markup:
    """Markup and escaped text, one after another."""
    return Markup("".join(child if isinstance(child, Markup) else text(child) for child in children))


def text(plain: str) -> Markup:
    """Text as markup, with a mark in place of each character that a page cannot show.

    >>> text("<script>\\x00")
    '&lt;script&gt;\ufffd'
    """
    return Markup(escape(UNPRINTABLE.sub("\ufffd", plain)))


def _name(key: str) -> str:
    return key if key in {"viewBox"} else key.rstrip("_").replace("_", "-")


def _value(value: str | float) -> str:
    return text(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def facts(rows: Iterable[tuple[str, str]]) -> Markup:
    """Names and what is said of each, as a table."""
    lines = (element("tr", element("th", name, scope="row"), element("td", said)) for name, said in rows)
    return element("table", element("tbody", *lines), class_="facts")


def notes(said: Iterable[object]) -> Markup:
    """Sentences as a list; nothing for none."""
    items = [element("li", str(note)) for note in said]
    return element("ul", *items) if items else Markup()


def section(title: str, *content: Markup) -> Markup:
    """A part of the page under its title, in a frame; a list of figures is none of it and follows after."""
    return join([element("h2", title), element("div", *content, class_="card")])


def gallery(figures: Iterable[Markup | None]) -> Markup:
    """Figures side by side, as far as there are any."""
    drawn = [drawing for drawing in figures if drawing is not None]
    return element("div", *drawn, class_="plots") if drawn else Markup()


def table(head: Iterable[str], rows: Iterable[Iterable[str]], numbers: bool = True) -> Markup:
    """A table whose rows begin with their heading; the other columns are numbers, or text."""
    kind = "number" if numbers else None
    first, *others = head
    heading = element("tr", element("th", first, scope="col"), *(element("th", cell, scope="col", class_=kind) for cell in others))
    lines = []
    for name, *cells in rows:
        lines.append(element("tr", element("th", name, scope="row"), *(element("td", cell, class_=kind) for cell in cells)))
    return element("div", element("table", element("thead", heading), element("tbody", *lines)), class_="wide", tabindex="0")
