"""JSON objects out of files that somebody else wrote, with errors that say where.

Python's parser takes more than the formats allow: it lets a key stand twice and keeps the last, reads NaN, and accepts
halves of surrogate pairs, which cannot be written out again. A checkpoint in which a name stands twice is damaged, and
guessing which one is meant is how wrong weights happen, so all of these are errors here. Positions are in bytes of the
file.
"""

import json
from collections import Counter
from typing import Any, NoReturn

from shardconv.errors import InputError, Problem

AGAIN = "download this file again"
# The first few tell it.
PROBLEMS_SHOWN = 8


def read_object(raw: bytes, *, what: str, at: int, natural: bool = False) -> dict[str, Any]:
    """The JSON object in `raw`, which stands at byte `at` of a file; `what` opens each message.

    Raises InputError when it is not UTF-8, not JSON, not an object, or has a key twice; and for -0, which other readers refuse and Python
    takes for 0, where its integers are `natural` numbers.

    >>> read_object(b' {"a": 1}', what="config.json", at=0)
    {'a': 1}
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        _reject(what, f"is not UTF-8 text at byte {at + error.start}")
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=_no_constant, parse_int=_natural if natural else int)
    except json.JSONDecodeError as error:
        _reject(what, f"is not JSON: {error.msg} at byte {at + len(text[: error.pos].encode())}")
    except RecursionError:
        _reject(what, "is not JSON: it is nested too deep")
    except ValueError as error:
        _reject(what, f"is not JSON: {error}")
    if twice:
        raise InputError(f"{what} cannot be used", few(what, [Problem(f"{what} has the key {key} twice", AGAIN) for key in twice]))
    if not isinstance(value, dict):
        _reject(what, "is JSON, but not an object")
    if "\\u" in text and not _encodes(value):
        _reject(what, "has half of a surrogate pair in a string")
    return value


def unprintable(name: str) -> str:
    """What is wrong with a name that is empty, or would be written to a terminal and could clear it or pass for another.

    >>> unprintable("w" + chr(27) + "[2J")
    "the name 'w\\\\x1b[2J' is not printable text"
    """
    if not name:
        return "a tensor's name is empty"
    short = name if len(name) <= 120 else name[:117] + "..."
    return f"the name {short!a} is not printable text"


def few(file: str, problems: list[Problem]) -> list[Problem]:
    """The first few of a file's problems, and how many more there are: a damaged file breaks hundreds of tensors in the same way."""
    more = len(problems) - PROBLEMS_SHOWN
    return problems if more <= 0 else [*problems[:PROBLEMS_SHOWN], Problem(f"{file}: {more} more problems like these")]


def _reject(what: str, fact: str) -> NoReturn:
    raise InputError(f"{what} cannot be used", [Problem(f"{what} {fact}", AGAIN)])


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _natural(word: str) -> int:
    if word == "-0":
        raise ValueError("-0 is not a natural number")
    return int(word)


def _encodes(value: object) -> bool:
    """Whether every string in a parsed value can be written out as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
