"""Mappings: which part of a model is which part of a checkpoint, as a user writes it.

    ignore = ["*.rope.inv_freq"]

    [mapping]
    "stem.conv" = "conv1"                                      # a layer: the layer rules say the rest
    "blocks.{layers}" = "layer.{layers}"                       # a module: what is in it has the same names on both sides
    "scanned" = "layer.{layers}"                               # modules stacked: what is in it has a first axis more
    "up" = "up: ConvTranspose2d, transpose_kernel=True"        # a layer whose class nobody else knows
    "head.kernel" = "fc.weight: o (c h w) -> (h w c) o; c=4, h=5"   # an array, by two addresses
    "cell.hi.bias" = "0"                                       # an array of one number

The left side is the model's. Of several right sides that fit, the longest counts, without its holes. A hole, `{layers}`, is any number, the
same on both sides. In Python a mapping is a dict of the same, or the path of such a TOML file, or its text.
"""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardconv.coverage import rule_of
from shardconv.errors import ConfigError, Problem
from shardconv.porting.moves import HOLE, Move, read_move
from shardconv.toml import read_toml, toml_value

HEAD = """\
# Which array of the model is made of which tensors of the checkpoint: `tensor: its dims -> the array's dims`.
# Left: an array of the model, or a module of it with a module of the checkpoint to the right, to which the layer rules apply.
# Give this file as `mapping`; change any line.
"""


@dataclass(frozen=True)
class Pair:
    """A module of the model and one of the checkpoint; `kind` and `form` are torch's class and the JAX layer's form, where said."""

    here: str
    there: str
    kind: str = ""
    form: str = ""

    @property
    def stack(self) -> str:
        """The axis along which the checkpoint's modules are stacked in the model's; empty where they are not.

        >>> Pair("scanned", "layer.{layers}").stack
        'layers'
        """
        return next((axis for axis in HOLE.findall(self.there) if axis not in HOLE.findall(self.here)), "")

    def match(self, layer: str) -> re.Match[str] | None:
        """The layer's name, if the pair speaks for it: its numbers, and as the last group what is inside the module."""
        texts = [re.escape(text) for text in HOLE.sub("\0", self.there).split("\0")]
        return re.fullmatch("([0-9]+)".join(texts) + (r"(|\..*)" if self.there else "(.*)"), layer, flags=re.DOTALL)

    def template(self, layer: str, name: str) -> str:
        """A tensor's name with a hole for the number of the module that is stacked.

        >>> Pair("scanned", "layer.{layers}").template("layer.3.fc", "layer.3.fc.weight")
        'layer.{layers}.fc.weight'
        """
        found = self.match(layer)
        place = HOLE.findall(self.there).index(self.stack) + 1
        return name if found is None else name[: found.start(place)] + "{" + self.stack + "}" + name[found.end(place) :]


@dataclass(frozen=True)
class Plan:
    """A mapping that has been read: arrays by moves, modules by pairs, and the patterns of tensors that nothing needs."""

    moves: tuple[Move, ...] = ()
    pairs: tuple[Pair, ...] = ()
    ignore: tuple[str, ...] = ()


def read_mapping(mapping: Any, arrays: Sequence[str]) -> Plan:
    """A mapping from a dict, a TOML file or its text; ConfigError with all that is wrong. `arrays` are the names of the model's."""
    ignore: Sequence[str] = ()
    if isinstance(mapping, str) and "\n" in mapping:
        ignore, mapping = _tables(_parsed(mapping), "the mapping")
    elif isinstance(mapping, str | os.PathLike):
        ignore, mapping = _tables(read_toml(str(mapping), "mapping"), str(mapping))
    if not isinstance(mapping, Mapping):
        remedy = "give a dict such as {\"fc\": \"head\"}, or the path of a TOML file"
        raise ConfigError("the mapping cannot be read", [Problem(f"this is a {type(mapping).__name__}", remedy)])
    moves, pairs, problems = [], [], []
    for here, value in mapping.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            try:
                if _is_array(here, arrays):
                    moves += [read_move(name, line) for name, line in _written_out(here, str(text), arrays)]
                elif isinstance(text, str):
                    pairs.append(_pair(here, text))
                else:
                    raise ValueError("the model has no such array; a module of the checkpoint is named by text")
            except ValueError as error:
                problems.append(Problem(f"{here} = {toml_value(text)}: {error}"))
    if problems:
        raise ConfigError("the mapping cannot be read", problems)
    return Plan(tuple(moves), tuple(pairs), tuple(ignore))


def written(moves: Sequence[Move], remarks: Mapping[str, Sequence[str]], ignore: Sequence[str]) -> str:
    """A mapping as a TOML file; `remarks` are lines of comment for the arrays that have no move."""
    by_target: dict[str, list[str]] = {}
    for move in moves:
        by_target.setdefault(move.target, []).append(str(move))
    lines = [HEAD, f"ignore = {toml_value(list(ignore))}", "", "[mapping]"]
    lines += [f"{toml_value(name)} = {toml_value(texts[0] if len(texts) == 1 else texts)}" for name, texts in by_target.items()]
    for said in remarks.values():
        lines += ["", *(f"# {line}" for line in said)]
    return "\n".join(lines) + "\n"


def place_of(pairs: Sequence[Pair], layer: str) -> tuple[Pair, str] | None:
    """The pair that speaks for a layer of the checkpoint, and where the layer is in the model; None where no pair does.

    >>> place_of([Pair("blocks.{n}", "layer.{n}")], "layer.3.fc")[1]
    'blocks.3.fc'
    """
    best: tuple[int, Pair, str] | None = None
    for pair in pairs:
        found = pair.match(layer)
        length = len(HOLE.sub("", pair.there))
        if found is None or (best is not None and length <= best[0]):
            continue
        here, rest = pair.here, found[found.re.groups].removeprefix(".")
        for axis, number in zip(HOLE.findall(pair.there), found.groups(), strict=False):
            here = here.replace("{" + axis + "}", number)
        best = (length, pair, ".".join(part for part in (here, rest) if part))
    return None if best is None else (best[1], best[2])


def matched(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name is one of the patterns, in which `*` is any text and `{}` any number."""
    return bool(rule_of(name, patterns))


def _parsed(text: str) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("the mapping cannot be read", [Problem(f"it is no TOML: {error}")]) from None


def _tables(data: Mapping[str, object], path: str) -> tuple[Sequence[str], object]:
    """The patterns of what is ignored, and the mapping itself."""
    problems = [Problem(f"{path}: there is no {key}", "it has `ignore` and [mapping]") for key in data if key not in ("ignore", "mapping")]
    ignore = data.get("ignore", [])
    if not isinstance(ignore, list) or not all(isinstance(item, str) for item in ignore):
        problems.append(Problem(f"{path}: ignore is {toml_value(ignore)}", 'write patterns of names: ignore = ["*.inv_freq"]'))
    if problems or not isinstance(ignore, list):
        raise ConfigError("the mapping cannot be read", problems)
    return ignore, data.get("mapping", {})


def _is_array(here: str, arrays: Sequence[str]) -> bool:
    return here in arrays or (bool(HOLE.search(here)) and any(_fits(here, name) is not None for name in arrays))


def _written_out(here: str, text: str, arrays: Sequence[str]) -> list[tuple[str, str]]:
    """A line for arrays with a hole in the name, once per array; a hole that stands on the right alone stays, for stacked layers."""
    found = []
    for name in arrays if HOLE.search(here) else [here]:
        numbers = _fits(here, name)
        if numbers is not None:
            line = text
            for axis, number in numbers.items():
                line = line.replace("{" + axis + "}", number)
            found.append((name, line))
    return found


def _fits(template: str, name: str) -> dict[str, str] | None:
    """The numbers that a name has in the holes of a template."""
    texts = [re.escape(text) for text in HOLE.sub("\0", template).split("\0")]
    found = re.fullmatch("([0-9]+)".join(texts), name)
    if found is None:
        return None
    numbers: dict[str, str] = {}
    for axis, number in zip(HOLE.findall(template), found.groups(), strict=True):
        if numbers.setdefault(axis, number) != number:
            return None
    return numbers


def _pair(here: str, text: str) -> Pair:
    there, colon, kind = text.partition(":")
    name, _, form = kind.partition(",")
    if "->" in text or (colon and not name.strip().isidentifier()):
        raise ValueError("the model has no such array; for a module, write the checkpoint's module")
    return Pair(here, there.strip(), name.strip(), form.strip())
