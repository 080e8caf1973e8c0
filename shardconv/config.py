"""The config: one TOML file, read, checked and complete.

A config is one TOML file plus `--set section.key=value` overrides. It is checked once, here, and every problem is collected into one
ConfigError that names the file (or the override), the section, the key, what was given and what fits. Relative paths are relative to the
directory the program is started in, not to the config file.

What may be said is written once, in `config_sections`: `shardconv init` puts its sentences into the configs it writes. `digest` covers what
changes the bytes of the checkpoint, so a run may be resumed with other workers or from a moved source, and not with another dtype or mesh.
"""

import hashlib
import json
import os.path
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from shardconv.budget import format_size
from shardconv.config_report import Keys, Misfit, problems_of, unknown_layout, unknown_name
from shardconv.config_sections import (
    Absent,
    CheckSection,
    MeshSection,
    ModelSection,
    OutputSection,
    Section,
    SourceSection,
    TargetSection,
    WorkersSection,
    rule_words,
)
from shardconv.errors import ConfigError, Problem
from shardconv.families import families
from shardconv.layouts import LAYOUTS
from shardconv.toml import override, read_toml, toml_key, toml_value

# Where a layout's own loader looks for the tree, as (step, item): MaxText opens <path>/0/items. A layout that is not here has no loader
# with habits, and the tree lies at the output path itself.
PLACES: Mapping[str, tuple[int, str]] = {"maxtext": (0, "items")}


class Config(Section):
    """A whole config; `load_config` makes one from a file, with readable errors."""

    source: SourceSection
    model: ModelSection = Field(default_factory=ModelSection)
    target: TargetSection
    mesh: MeshSection = Field(default_factory=MeshSection)
    output: OutputSection
    workers: WorkersSection = Field(default_factory=WorkersSection)
    check: CheckSection = Field(default_factory=CheckSection)

    @model_validator(mode="after")
    def _source_is_safe(self) -> Self:
        source, output = os.path.realpath(self.source.path), os.path.realpath(self.output.path)
        if os.path.commonpath([source, output]) == output:
            fact = f'[output] path = {toml_value(self.output.path)} holds the source, {toml_value(self.source.path)}'
            raise Misfit([(("output", "path"), Problem(fact, "choose a directory that does not"))])
        return self

    def facts(self) -> dict[str, object]:
        """What the checkpoint's bytes depend on, by dotted key, as JSON values.

        Left out: the source's path (its fingerprint speaks for it), the output's path, the workers and the check.
        """
        chosen = self.model_dump(mode="json", include={"source", "model", "target", "mesh", "output"})
        del chosen["source"]["path"], chosen["output"]["path"]
        # Which way arrays come onto the mesh changes no byte; whether they do, and how many share it, says how they are cut.
        del chosen["mesh"]["platform"]
        chosen["mesh"] |= {"placement": "mesh"} if self.mesh.places else {"processes": 1}
        chosen["mesh"]["axes"] = [list(pair) for pair in chosen["mesh"]["axes"].items()]  # the order of mesh axes counts
        return {f"{section}.{key}": value for section, keys in chosen.items() for key, value in keys.items()}

    def digest(self) -> str:
        """Hex SHA-256 of `facts`."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()

    def to_toml(self) -> str:
        """The whole config as TOML, every key written; `load_config` reads the same config back."""
        return "\n".join(section_toml(name, getattr(self, name), comments=False) for name in Config.model_fields)


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about one run, and no config file should."""

    restart: bool
    overwrite: bool
    verbosity: int  # -1 quiet, 0, 1 verbose
    json_logs: bool


def section_toml(name: str, section: Section, comments: bool) -> str:
    """One section as TOML, each key after its sentence if `comments`."""
    lines = [f"[{name}]"]
    for key, field in type(section).model_fields.items():
        value = _words(getattr(section, key), key, field)
        if comments:
            lines.append(f"# {field.description}")
        if key == "rules" and isinstance(value, dict) and value:  # the last key of its section, so a table of its own may follow
            lines += [f"[{name}.{key}]", *(f"{toml_key(axis)} = {toml_value(rule)}" for axis, rule in value.items())]
        else:
            lines.append(f"{key} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def _words(value: object, key: str, field: FieldInfo) -> object:
    """A value as a config file has it."""
    if value is None:
        return next(mark.word for mark in field.metadata if isinstance(mark, Absent))
    if key in ("chunk_bytes", "memory_budget", "memory") and isinstance(value, int):
        return format_size(value)
    if isinstance(value, Mapping):
        return {axis: rule_words(rule) if key == "rules" else rule for axis, rule in value.items()}
    return value


def changes(before: Mapping[str, object], after: Mapping[str, object]) -> tuple[str, ...]:
    """What differs between the `facts` of two configs, in words.

    >>> changes({"target.dtype": "float32"}, {"target.dtype": "bfloat16"})
    ('target.dtype was "float32", is "bfloat16"',)
    """
    return tuple(
        f"{key} was {json.dumps(before.get(key))}, is {json.dumps(after.get(key))}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    )


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """The config in a TOML file, with `section.key=value` overrides put over it in order; raises ConfigError with all problems."""
    data = read_toml(path)
    origins, problems = override(data, overrides)

    def origin(keys: Keys) -> str:
        said = [text for key, text in origins.items() if key == keys[: len(key)] or keys == key[: len(keys)]]
        return said[-1] if said else path

    return config_of(data, origin, problems)


def config_of(data: dict[str, object], origin: Callable[[Keys], str], found: Sequence[Problem] = ()) -> Config:
    """The config in tables of keys, which are completed; raises ConfigError with all problems, those that were `found` before first.

    `origin` says where a key was written, such as the name of a file.
    """
    problems = list(found)
    _complete(data)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += problems_of(error, data, Config, origin)
    problems += [Problem(f"{origin(keys)}: {one.fact}", one.remedy) for keys, one in _unknown_names(data)]
    if problems:
        raise ConfigError("the config is not valid", problems)
    return config


def _unknown_names(data: Mapping[str, object]) -> Iterator[tuple[Keys, Problem]]:
    """The names of a layout or a family that there is not."""
    known = {("target", "layout"): tuple(LAYOUTS), ("model", "family"): ("auto", *families())}
    for (section, key), names in known.items():
        table = data.get(section)
        said = table.get(key) if isinstance(table, Mapping) else None
        if isinstance(said, str) and said and said not in names and not (key == "layout" and ":" in said):
            unknown = unknown_layout if key == "layout" else unknown_name
            yield (section, key), unknown(f"[{section}] {key}", said, names)


def _complete(data: dict[str, object]) -> None:
    """Fill in what pydantic cannot: sections with required keys (so that the keys are missed, not the section), and the layout's place."""
    for name, field in Config.model_fields.items():
        if field.is_required():
            data.setdefault(name, {})
    target, output = data["target"], data["output"]
    layout = target.get("layout") if isinstance(target, dict) else None
    if isinstance(output, dict) and isinstance(layout, str) and layout in PLACES:
        step, item = PLACES[layout]
        output.setdefault("step", step)
        output.setdefault("item", item)
