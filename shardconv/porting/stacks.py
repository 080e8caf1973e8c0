"""Stacks: layers of a checkpoint that a model may keep in one array, for a scan over them.

`layer.0.fc` to `layer.11.fc`, of one class and of the same shapes, are also one layer, `layer.{layers}.fc`, whose arrays have a first axis
more. Whether the model has such an array is for the layer rules to find out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shardconv.porting.folding import Expression, names, renamed
from shardconv.porting.moves import Shapes
from shardconv.porting.rules import Layer

AXIS = "layers"


@dataclass(frozen=True)
class Stack:
    """Layers of one kind, in the order of their numbers, as one layer, in each of its views."""

    members: tuple[Layer, ...]
    views: tuple[Layer, ...]

    @property
    def shown(self) -> Layer:
        """The stack as a message has it."""
        return replace(self.members[0], name=f"{self.views[0].name}, of which there are {len(self.members)}")


def stacks(views: Mapping[str, Sequence[Layer]], tensors: Shapes) -> dict[str, Stack]:
    """The stacks that layers make up, by name: those whose numbers are 0, 1, 2, ... in one place of their names.

    >>> shapes = {"h.0.fc.weight": (4, 3), "h.1.fc.weight": (4, 3)}
    >>> list(stacks({f"h.{n}.fc": [Layer(f"h.{n}.fc", {"weight": f"h.{n}.fc.weight"})] for n in range(2)}, shapes))
    ['h.{layers}.fc']
    """
    grouped: dict[str, dict[int, str]] = {}
    for layer in views:
        for template, number in _templates(layer):
            grouped.setdefault(template, {})[number] = layer
    found = {}
    for template, numbered in grouped.items():
        members = [views[numbered[number]] for number in sorted(numbered)]
        looks = {_look(seen, tensors) for seen in members}
        start = template.index("{")
        inside = all(name.startswith(numbered[0][: start + 1]) for seen in members[:1] for name in _names(seen)) if 0 in numbered else False
        if len(members) > 1 and max(numbered) + 1 == len(members) and len(looks) == 1 and inside:
            stacked = tuple(_stacked(view, template, start) for view in members[0])
            found[template] = Stack(tuple(seen[0] for seen in members), stacked)
    return found


def _templates(layer: str) -> Iterator[tuple[str, int]]:
    """A layer's name with a hole for one of its numbers, and the number."""
    for part in re.finditer(r"(?<![0-9])[0-9]+(?![0-9])", layer):
        yield layer[: part.start()] + "{" + AXIS + "}" + layer[part.end() :], int(part[0])


def _names(seen: Sequence[Layer]) -> list[str]:
    return [name for view in seen for expression in view.tensors.values() for name in names(expression)]


def _look(seen: Sequence[Layer], tensors: Shapes) -> object:
    """What layers must have in common: their classes, and the names and shapes of their tensors."""
    inner = tuple((name, tuple(tensors[tensor] for tensor in names(expression))) for name, expression in seen[-1].tensors.items())
    return seen[0].kinds, inner


def _stacked(view: Layer, template: str, start: int) -> Layer:
    """A layer as all of its stack: with a hole in its tensors' names."""
    stop = start + len(re.match(r"[0-9]+", view.name[start:])[0])  # type: ignore[index]
    meanings: dict[str, Expression] = {
        name: name[:start] + "{" + AXIS + "}" + name[stop:] for expression in view.tensors.values() for name in names(expression)
    }
    return replace(view, name=template, tensors={inner: renamed(expression, meanings) for inner, expression in view.tensors.items()})
