"""Forwards that the user names: a JAX function of their own, or the PyTorch module itself, traced.

    check.forward = "mymodel:forward"      called as forward(params, tokens), from the working directory or an installed package
    check.forward = "torch"                transformers' module runs in JAX on the checkpoint's arrays; see `tracing`

What can be known before a conversion starts is asked by `require_forward`, which imports neither JAX nor the user's module.
"""

import ast
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from shardconv.errors import CheckError, ConfigError, Problem, ShardconvError
from shardconv.interop import require_torchax

if TYPE_CHECKING:
    from shardconv.verify.restoring import Restored

TITLE = "check.forward cannot be used"
TRACED = "torch"
ELSEWHERE = 'set check.forward = "auto"'

# Logits (batch, length, rows) of token ids (batch, length), int32.
Forward = Callable[[Any], Any]


def require_forward(name: str, layout: str = "flat") -> None:
    """Raises ConfigError where the forward `name` cannot be had for a target's layout; "auto" always can, as far as this knows."""
    if name == "auto":
        return
    if name == TRACED:
        _require_known(layout)
        require_torchax()
        return
    module, function = _parts(name)
    _see_working_directory()
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # noqa: BLE001  the packages around it are the user's code
        raise ConfigError(TITLE, [Problem(f"importing what {module!r} is in raised {_said(error)}")]) from None
    if spec is None:
        where = f"there is no module {module!r} in {os.getcwd()}, nor among the installed packages"
        raise ConfigError(TITLE, [Problem(where, "run from the directory that it is in, or install its package")])
    if spec.origin is None or not spec.origin.endswith(".py"):
        return
    names = _names_in(spec.origin)
    if function not in names and "*" not in names:
        raise ConfigError(TITLE, [Problem(f"{spec.origin} has no {function!r}", _offered(names))])


def forward_of(name: str, source: str, restored: "Restored") -> Forward:
    """The forward `name` of a restored checkpoint; `source` is the directory of the PyTorch model.

    Raises ConfigError where it cannot be had, CheckError where the checkpoint does not fit it; the forward raises CheckError where the
    user's function raises, or returns no logits.
    """
    layout = str(restored.metadata["shardconv"]["layout"])
    require_forward(name, layout)
    if name == TRACED:
        from shardconv.verify.tracing import traced_forward

        return traced_forward(source, restored)
    return _calling(name, _imported(name), nested(restored.leaves))


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by dotted name as nested dicts.

    >>> nested({"layers.attn.q": 1, "layers.attn.k": 2, "embed": 3})
    {'layers': {'attn': {'q': 1, 'k': 2}}, 'embed': 3}
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _require_known(layout: str) -> None:
    """The traced module must be fed by what is known of a layout otherwise than by the way it was written."""
    if layout != "flat":
        fact = f"the PyTorch module, traced, says nothing about how {layout} code reads a checkpoint: its arrays would be put back first"
        raise ConfigError(TITLE, [Problem(fact, ELSEWHERE)])


def _parts(name: str) -> tuple[str, str]:
    module, colon, function = name.partition(":")
    if not colon or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(TITLE, [Problem(f"check.forward is {name!r}", 'say "auto", "torch", or "package.module:function"')])
    return module, function


def _see_working_directory() -> None:
    """Python's own scripts see their directory, not the one that they are run in."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()


def _names_in(path: str) -> list[str]:
    """What a file binds at its top, also under `if` and `try`; "*" where it imports everything from elsewhere."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read(), path)
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(TITLE, [Problem(f"{path} cannot be read: {_said(error)}")]) from None
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


def _imported(name: str) -> Callable[..., Any]:
    module, function = _parts(name)
    try:
        found: Any = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # noqa: BLE001  it is the user's code
        raise ConfigError(TITLE, [Problem(f"importing {module!r} raised {_said(error)}{_place(error)}")]) from None
    if not callable(found):
        said = f"there is no {function!r} in {module!r}" if found is None else f"{name} is a {type(found).__name__}, not a function"
        raise ConfigError(TITLE, [Problem(said, "name a function of (params, tokens)")])
    called: Callable[..., Any] = found
    return called


def _calling(name: str, function: Callable[..., Any], params: Mapping[str, Any]) -> Forward:
    import jax
    import jax.numpy as jnp

    def forward(tokens: Any) -> Any:
        try:
            with jax.default_matmul_precision("highest"):
                found = function(params, jnp.asarray(tokens, jnp.int32))
        except ShardconvError:
            raise
        except Exception as error:  # noqa: BLE001  it is the user's code
            remedy = "it is called as function(params, tokens): the checkpoint as nested dicts of arrays, and int32 (batch, length)"
            raise CheckError("the forward failed", [Problem(f"{name} raised {_said(error)}{_place(error)}", remedy)]) from None
        if not _are_logits(found, tuple(tokens.shape)):
            said = f"{found.dtype} {tuple(found.shape)}" if hasattr(found, "dtype") else f"a {type(found).__name__}"
            remedy = f"return logits (batch, length, rows), here ({tokens.shape[0]}, {tokens.shape[1]}, rows)"
            raise CheckError("the forward returns no logits", [Problem(f"{name} returned {said}", remedy)])
        return found

    return forward


def _are_logits(found: Any, shape: tuple[int, ...]) -> bool:
    import jax.numpy as jnp

    if not hasattr(found, "dtype") or len(found.shape) != 3 or tuple(found.shape[:2]) != shape:
        return False
    return bool(jnp.issubdtype(found.dtype, jnp.floating))


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _place(error: BaseException) -> str:
    """Where in the user's code an error came from: the deepest frame that is in no installed package."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _foreign(frame.filename)]
    return f", at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _foreign(path: str) -> bool:
    return path.startswith(("<", sys.base_prefix)) or "site-packages" in path or os.path.abspath(path) == os.path.abspath(__file__)
