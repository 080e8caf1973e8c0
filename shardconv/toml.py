"""TOML in and out: read a file, take `--set` overrides, write values back.

The standard library reads TOML and cannot write it; what a config needs of writing is eight value types, so it is here. Nothing in this
file knows which keys exist. A file that cannot be read or parsed is one ConfigError naming the file, the line and the column.
"""

import datetime
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from shardconv.errors import ConfigError, Problem

# Bytes of a config; those that are written have 5,000.
LIMIT = 10_000_000
# Files with nearly the name of one that is not there, which are looked at.
CLOSE = 10
KINDS = {str: "a string", bool: "a boolean", int: "an integer", float: "a float", list: "an array", dict: "a table"}


# What writes such a file.
WRITTEN_BY = {
    "config": "`shardconv init HF_DIR --layout LAYOUT` writes one",
    "mapping": "`shardconv init DIR --layout module:make_model` and shardconv.propose_mapping write one",
}


def read_toml(path: str, what: str = "config") -> dict[str, object]:
    """The tables of a TOML file, which is a `what`; raises ConfigError when there is no such file or it is not TOML."""
    try:
        with open(path, "rb") as file:
            raw = file.read(LIMIT + 1)
        if len(raw) > LIMIT:
            raise ConfigError(f"cannot read the {what}", [Problem(f"{path} has over {LIMIT} bytes", f"give a {what}")])
        text = raw.decode().replace("\r\n", "\n")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"cannot read the {what}", [Problem(f"{path}: no such file", _neighbour(path, what))]) from None
    except OSError as error:
        raise ConfigError(f"cannot read the {what}", [Problem(f"{path}: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        problem = Problem(f"{path}: byte {error.start} is not UTF-8", "save the file as UTF-8")
        raise ConfigError(f"cannot read the {what}", [problem]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"cannot read the {what}", [_syntax_problem(path, text, str(error))]) from None
    except RecursionError:
        raise ConfigError(f"cannot read the {what}", [Problem(f"{path} is nested too deep")]) from None
    except ValueError as error:  # of Python's own limits: the digits of an integer, a NUL in a path
        raise ConfigError(f"cannot read the {what}", [Problem(f"{path}: {error}")]) from None


def _neighbour(path: str, what: str) -> str:
    """The remedy for a file that is not there: a file of its kind beside it with nearly its name."""
    folder = Path(path).parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    close = get_close_matches(Path(path).name, names, n=CLOSE)
    if what == "mapping":
        close = [name for name in close if _is_mapping(folder / name)]
    return f"did you mean {folder / close[0]}?" if close else WRITTEN_BY[what]


def _is_mapping(path: Path) -> bool:
    """Whether a file has a table [mapping]: beside a mapping there are configs, most often with nearly its name."""
    try:
        return path.stat().st_size <= LIMIT and isinstance(tomllib.loads(path.read_text(encoding="utf-8")).get("mapping"), dict)
    except (OSError, ValueError, RecursionError):  # no text, or no TOML
        return False


def _syntax_problem(path: str, text: str, message: str) -> Problem:
    """What tomllib found wrong, with the line it found it in."""
    match = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", message, flags=re.DOTALL)
    if match is None:  # "at end of document"
        return Problem(f"{path}: {message}")
    line = text.splitlines()[int(match[2]) - 1] if int(match[2]) <= len(text.splitlines()) else ""
    return Problem(f"{path}: line {match[2]}, column {match[3]}: {match[1]}", f"the line is: {line.strip()}")


def override(data: dict[str, object], overrides: Sequence[str]) -> tuple[dict[tuple[str, ...], str], list[Problem]]:
    """Put `section.key=value` overrides into the data, in order; what each key was set by, and what is wrong with the others."""
    origins: dict[tuple[str, ...], str] = {}
    problems = []
    for text in overrides:
        try:
            keys, value = parse_override(text)
        except ValueError:
            problems.append(Problem(f"--set {text}: no key and value", "write --set section.key=value"))
            continue
        table: object = data
        for key in keys[:-1]:
            table = table.setdefault(key, {}) if isinstance(table, dict) else table
        if isinstance(table, dict):
            table[keys[-1]] = value
            origins.pop(keys, None)
            origins[keys] = f"--set {text}"
        else:
            problems.append(Problem(f"--set {text}: {'.'.join(keys[:-1])} is not a table", "write --set section.key=value"))
    return origins, problems


def parse_override(text: str) -> tuple[tuple[str, ...], object]:
    """The path and the value of `section.key=value`; what is not a TOML value is a string. Raises ValueError without an "=" or a key.

    >>> parse_override("mesh.axes.fsdp=8"), parse_override("source.path=/data/llama")
    ((('mesh', 'axes', 'fsdp'), 8), (('source', 'path'), '/data/llama'))
    """
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ValueError("section.key=value")
    return path, _value(value.strip())


def _value(text: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed.get("value")
    # More keys than one: the text was several lines, not a value. A date: no key takes one, and directories are often named by date.
    if len(parsed) != 1 or isinstance(value, datetime.date | datetime.time):
        return text
    return value


def kind(value: object) -> str:
    """A value's TOML type, with its article.

    >>> kind(3), kind("3")
    ('an integer', 'a string')
    """
    return KINDS.get(type(value), "a date or time")


def toml_value(value: object) -> str:
    """A value as TOML writes it on one line.

    >>> toml_value({"fsdp": 8, "rules": ["a", True]})
    '{ fsdp = 8, rules = ["a", true] }'
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but JSON leaves DEL as it is, which TOML forbids.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        inner = ", ".join(f"{toml_key(str(key))} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return str(value)


def toml_key(key: str) -> str:
    """A key as TOML writes it: bare where it may be, else quoted."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)
