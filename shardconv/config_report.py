"""A config's problems, in words: what pydantic found wrong becomes facts and remedies.

pydantic knows where a value does not fit and why in its own terms; a user wants to read which section and key, what was given, what fits
there and what was probably meant. What fits is written beside each key's type as an `Expected`; what was given is looked up in the data.
One key gives one problem, however many ways of a union it missed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from pydantic import BaseModel, ValidationError

from shardconv.errors import Problem
from shardconv.toml import kind, toml_value

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Expected:
    """What fits a key: in words, or one of some choices."""

    words: str
    choices: tuple[object, ...] = ()


class Misfit(ValueError):
    """Values that fit their keys and not each other; each problem comes with the keys under the section that it is about."""

    def __init__(self, problems: Sequence[tuple[Keys, Problem]]) -> None:
        super().__init__("; ".join(problem.fact for _, problem in problems))
        self.problems = tuple(problems)


def problems_of(
    error: ValidationError, data: Mapping[str, object], config: type[BaseModel], origin: Callable[[Keys], str]
) -> tuple[Problem, ...]:
    """The problems of a config; `origin` says where a key was written, such as the file's name."""
    found = (Problem(f"{origin(keys)}: {one.fact}", one.remedy) for keys, one in _problems(error, data, config))
    return tuple(dict.fromkeys(found))


def _problems(
    error: ValidationError, data: Mapping[str, object], config: type[BaseModel]
) -> Iterator[tuple[Keys, Problem]]:
    for one in error.errors(include_url=False):
        place = tuple(str(part) for part in one["loc"])
        reason = one.get("ctx", {}).get("error")
        if isinstance(reason, Misfit):
            yield from (((*place, *keys), problem) for keys, problem in reason.problems)
        elif one["type"] == "extra_forbidden":
            yield place, _unknown(place, data, config)
        elif one["type"] == "missing":
            yield place, _missing(place, config)
        else:
            keys = _within(data, place)
            yield keys, _unfit(keys, data, config)


def _within(data: Mapping[str, object], place: Keys) -> Keys:
    """The part of pydantic's place that is in the data: pydantic adds names of union branches and item numbers."""
    keys: list[str] = []
    value: object = data
    for part in place:
        if not isinstance(value, Mapping) or part not in value:
            break
        keys.append(part)
        value = value[part]
    return tuple(keys)


def _sections(config: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The sections of a config by name."""
    found = {name: field.annotation for name, field in config.model_fields.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _unknown(place: Keys, data: Mapping[str, object], config: type[BaseModel]) -> Problem:
    """A section or key that no config has."""
    sections = _sections(config)
    if len(place) == 1:
        return _unknown_section(place[0], data, sections)
    section, key = place[0], place[-1]
    keys = sections[section].model_fields
    elsewhere = [f"[{name}]" for name, other in sections.items() if key in other.model_fields]
    if close := get_close_matches(key, keys, n=1):
        remedy = f'did you mean "{close[0]}"?'
    elif elsewhere:
        remedy = f"it belongs under {' or '.join(elsewhere)}"
    else:
        remedy = f"its keys are {', '.join(keys)}"
    return Problem(f'[{section}] has no key "{key}"', remedy)


def _unknown_section(name: str, data: Mapping[str, object], sections: Mapping[str, type[BaseModel]]) -> Problem:
    homes = [f"[{section}]" for section, known in sections.items() if name in known.model_fields]
    if not isinstance(data[name], Mapping):
        return Problem(
            f'"{name}" is in no section',
            f"put it under {' or '.join(homes)}" if homes else f"the sections are {_listed(sections)}",
        )
    close = get_close_matches(name, sections, n=1)
    return Problem(f"no section is called [{name}]", f"did you mean [{close[0]}]?" if close else f"they are {_listed(sections)}")


def _listed(sections: Mapping[str, object]) -> str:
    return ", ".join(f"[{name}]" for name in sections)


def _missing(place: Keys, config: type[BaseModel]) -> Problem:
    """A key without a default that is not there."""
    section, key = place
    field = _sections(config)[section].model_fields[key]
    return Problem(f"[{section}] {key} is missing", f"{key}: {field.description}")


def _unfit(keys: Keys, data: Mapping[str, object], config: type[BaseModel]) -> Problem:
    """A value that does not fit its key."""
    value: object = data
    for key in keys:
        value = value[key] if isinstance(value, Mapping) else value
    if len(keys) == 1:
        return Problem(f"{keys[0]} = {toml_value(value)} ({kind(value)}), expected the section [{keys[0]}]")
    field = _sections(config)[keys[0]].model_fields[keys[1]]
    expected = next(mark for mark in field.metadata if isinstance(mark, Expected))
    said = f"[{keys[0]}] {'.'.join(keys[1:])} = {toml_value(value)}"
    if not expected.choices:
        return Problem(f"{said} ({kind(value)}), expected {expected.words}")
    choices = ", ".join(toml_value(choice) for choice in expected.choices)
    close = get_close_matches(str(value), [str(choice) for choice in expected.choices], n=1)
    remedy = f'did you mean "{close[0]}"? ' if close else ""
    return Problem(f"{said} is not {expected.words}", f"{remedy}the choices are {choices}")


def unknown_layout(where: str, said: str, names: Sequence[str]) -> Problem:
    """The problem of a layout that is none of `names`, and no function of the user's.

    >>> unknown_layout("--layout", "clip.make_model", ["flat"]).remedy
    'did you mean "clip:make_model"? there are flat; a model of your own is "module:function"'
    """
    known = unknown_name(where, said, names)
    module, _, function = said.rpartition(".")
    dotted = module and function.isidentifier() and all(part.isidentifier() for part in module.split("."))
    hint = f"did you mean {toml_value(f'{module}:{function}')}? " if dotted else ""
    return Problem(known.fact, f'{hint}{known.remedy}; a model of your own is "module:function"')


def unknown_name(where: str, said: str, names: Sequence[str]) -> Problem:
    """The problem of a name that is none of `names`."""
    close = get_close_matches(said, names, n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return Problem(f"{where} = {toml_value(said)} is not known", f"{hint}there are {', '.join(names)}")
