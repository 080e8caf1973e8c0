"""Forwards that the user names: a JAX function of their own, or the PyTorch module itself, traced.

    check.forward = "mymodel:forward"      called as forward(params, tokens), from the working directory or an installed package
    check.forward = "torch"                transformers' module runs in JAX on the checkpoint's arrays; see `tracing`

What can be known before a conversion starts is asked by `require_forward`, which imports neither JAX nor the user's module.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from shardconv.errors import CheckError, ConfigError, Problem, ShardconvError
from shardconv.interop import require_torchax
from shardconv.user_code import Setting, imported, place, require_function, said

if TYPE_CHECKING:
    from shardconv.verify.restoring import Restored

TITLE = "check.forward cannot be used"
FORWARD = Setting("check.forward", TITLE, 'say "auto", "torch", or "package.module:function"', "name a function of (params, tokens)")
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
    require_function(name, FORWARD)


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
    return _calling(name, imported(name, FORWARD), nested(restored.leaves))


def users_forward(name: str) -> Callable[[Mapping[str, Any], Any], Any]:
    """The user's function of leaves by dotted name, and int32 token ids (batch, length); raises ConfigError where it cannot be had."""
    import jax

    function = imported(name, FORWARD)

    def forward(leaves: Mapping[str, Any], tokens: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(nested(leaves), tokens)

    return forward


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
            raise CheckError("the forward failed", [Problem(f"{name} raised {said(error)}{place(error)}", remedy)]) from None
        if not _are_logits(found, tuple(tokens.shape)):
            returned = f"{found.dtype} {tuple(found.shape)}" if hasattr(found, "dtype") else f"a {type(found).__name__}"
            remedy = f"return logits (batch, length, rows), here ({tokens.shape[0]}, {tokens.shape[1]}, rows)"
            raise CheckError("the forward returns no logits", [Problem(f"{name} returned {returned}", remedy)])
        return found

    return forward


def _are_logits(found: Any, shape: tuple[int, ...]) -> bool:
    import jax.numpy as jnp

    if not hasattr(found, "dtype") or len(found.shape) != 3 or tuple(found.shape[:2]) != shape:
        return False
    return bool(jnp.issubdtype(found.dtype, jnp.floating))
