"""Functions of the user's own, which a config names as "package.module:function".

They are looked for in the working directory and among the installed packages. What can be known without running the user's code is asked by
`require_function`: that the module is there, and that its file binds the name. `imported` imports it. Everything that is wrong is a
ConfigError about the key of the config that names the function.
"""

import ast
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from shardconv.errors import ConfigError, Problem

OURS = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of the config that names a function: the title of what is wrong with it, what may be said there, and what is to be named."""

    key: str
    title: str
    choices: str
    wanted: str


def require_function(name: str, setting: Setting) -> None:
    """Raises ConfigError where the module is not there, or its file does not bind the function; runs nothing but the packages around it."""
    module, function = _parts(name, setting)
    see_working_directory()
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # noqa: BLE001  the packages around it are the user's code
        raise ConfigError(setting.title, [Problem(f"importing what {module!r} is in raised {said(error)}")]) from None
    if spec is None:
        where = f"there is no module {module!r} in {os.getcwd()}, nor among the installed packages"
        raise ConfigError(setting.title, [Problem(where, "run from the directory that it is in, or install its package")])
    if spec.origin is None or not spec.origin.endswith(".py"):
        return
    names = _names_in(spec.origin, setting)
    if function not in names and "*" not in names:
        raise ConfigError(setting.title, [Problem(f"{spec.origin} has no {function!r}", _offered(names))])


def imported(name: str, setting: Setting) -> Callable[..., Any]:
    """The function; raises ConfigError where there is none, or importing its module raises."""
    see_working_directory()
    module, function = _parts(name, setting)
    try:
        found: Any = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # noqa: BLE001  it is the user's code
        raise ConfigError(setting.title, [Problem(f"importing {module!r} raised {said(error)}{place(error)}")]) from None
    if not callable(found):
        fact = f"there is no {function!r} in {module!r}" if found is None else f"{name} is a {type(found).__name__}, not a function"
        raise ConfigError(setting.title, [Problem(fact, setting.wanted)])
    called: Callable[..., Any] = found
    return called


def _parts(name: str, setting: Setting) -> tuple[str, str]:
    module, colon, function = name.partition(":")
    if module.endswith(".py"):
        dotted = module.removesuffix(".py").removeprefix("./").replace("/", ".")
        raise ConfigError(setting.title, [Problem(f"{setting.key} is {name!r}", f"write {dotted}:{function}, without .py")])
    if not colon or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(setting.title, [Problem(f"{setting.key} is {name!r}", setting.choices)])
    return module, function


def see_working_directory() -> None:
    """Make it the first place to import from: Python's own scripts see their directory, not the one that they are run in."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()


def _names_in(path: str, setting: Setting) -> list[str]:
    """What a file binds at its top, also under `if` and `try`; "*" where it imports everything from elsewhere."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read(), path)
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(setting.title, [Problem(f"{path} cannot be read: {said(error)}")]) from None
    return list(dict.fromkeys(_bound(tree)))


def _bound(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in child.names)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif not isinstance(child, ast.Lambda | ast.comprehension):
            yield from _bound(child)


def _offered(names: list[str]) -> str:
    public = [name for name in names if not name.startswith("_")]
    return f"it has: {', '.join(public)}" if public else ""


def said(error: BaseException) -> str:
    """An error in one line: its class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def place(error: BaseException) -> str:
    """Where in the user's code an error came from: the deepest frame that is in no installed package."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _foreign(frame.filename)]
    return f", at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _foreign(path: str) -> bool:
    return path.startswith(("<", sys.base_prefix, OURS)) or "site-packages" in path
