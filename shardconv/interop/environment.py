"""torchax, kept to itself: loaded at the first use, with what its import changes put back, and what it lacks added.

Its import sets an option of JAX's clients, a telemetry variable and torch's attention fast path; all three are put back. It also names
torch's private backend "jax", which cannot be undone. Nothing is enabled globally: an environment of our own is entered for each call.

A call runs under JAX's ordinary promotion of dtypes and ranks, since lowerings are written for it, whatever the caller has set. torch's
64-bit integers and floats become 32-bit ones where JAX has no x64 mode, without a warning for each.
"""

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import Any

from shardconv.errors import ConfigError, Problem
from shardconv.interop.arrays import array_of

REMEDY = 'pip install "shardconv[torch-in-jax]"'
CLIENT_OPTIONS = "jax_pjrt_client_create_options"
TELEMETRY = "ENABLE_RUNTIME_UPTIME_TELEMETRY"


def require_torchax() -> None:
    """Raises ConfigError where torch or torchax is not installed; loads neither."""
    absent = [name for name in ("torch", "torchax") if importlib.util.find_spec(name) is None]
    if absent:
        said = f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
        raise ConfigError("running PyTorch in JAX needs torchax", [Problem(said, REMEDY)])


@functools.cache
def environment() -> Any:
    """The environment in which torch operations on wrapped arrays run as JAX operations."""
    require_torchax()
    import jax

    with _import_undone():
        import torchax
    import torch
    from torchax.tensor import Environment, Tensor, View

    from shardconv.interop import statistics, views
    from shardconv.interop.experts import grouped_product

    class Tracing(Environment):
        def t2j_iso(self, values: Any) -> Any:
            """Plain tensors that a function closes over, or a module keeps outside of its state, are constants of the trace."""

            def wrapped(tensor: Any) -> Any:
                return tensor if isinstance(tensor, (Tensor, View)) else Tensor(constant(tensor), self)

            return super().t2j_iso(torch.utils._pytree.tree_map_only(torch.Tensor, wrapped, values))

        def dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
            """Runs one operation; views of wrapped tensors stay views, and random numbers are JAX's on every device."""
            if func in (torch.rand, torch.randn, torch.randint):
                return self._handle_tensor_constructor(func, args, {**(kwargs or {}), "device": "jax"})
            if views.is_view(func) and args and isinstance(args[0], Tensor | View):
                tensor, rest, options = args[0], args[1:], kwargs or {}

                def run(array: Any, place: int | None) -> Any:
                    found = super(Tracing, self).dispatch(func, types, (Tensor(array, self), *rest), options)
                    return (found if place is None else found[place]).jax()

                found = views.shared(func, tensor, rest, options, run, self)
                if found is not None:
                    return found
            return super().dispatch(func, types, args, kwargs)

    made = Tracing()
    def grouped(*args: Any, **options: Any) -> Any:
        return made.j2t_iso(grouped_product(*made.t2j_iso(args), **made.t2j_iso(options)))

    def normed(*args: Any) -> Any:
        return statistics.batch_norm(made, *args)

    made.override_op_definition(torch.ops.aten._grouped_mm, grouped)
    made.override_op_definition(torch.ops.aten.native_batch_norm, normed, is_view_op=True)
    made.override_op_definition(torch.Tensor.__getitem__, lambda tensor, index: views.item(tensor, index, made), is_view_op=True)
    made.override_op_definition(torch.Tensor.contiguous, lambda tensor, **_: views.contiguous(tensor, made), is_view_op=True)
    made.override_op_definition(torch.ops.aten.copy_, lambda target, source, *_: views.copied(target, source, made), is_view_op=True)
    made.override_op_definition(torch.ops.aten.detach, lambda tensor: made.j2t_iso(jax.lax.stop_gradient(tensor.jax())))
    assert torchax.default_env() is not made
    return made


def constant(tensor: Any) -> Any:
    """A tensor's values as an array; raises ConfigError where it has none, being on torch's meta device."""
    if tensor.device.type == "meta":
        fact = f"one of shape {tuple(tensor.shape)} is on the meta device, and no array was given for it"
        remedy = "give it among the parameters, or register it as a buffer with values"
        raise ConfigError("a tensor of the module has no values", [Problem(fact, remedy)])
    return array_of(tensor)


@contextlib.contextmanager
def entered() -> Iterator[Any]:
    """The environment, entered for one call."""
    import jax
    import torch

    found = environment()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it takes kernels that have no lowering
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Explicitly requested dtype", UserWarning)
            with _methods_of_torch(), found:
                yield found
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _methods_of_torch() -> Iterator[None]:
    """Without the methods that torchax's tensors have of their own, which forget views, and one of which changes what it is called on."""
    from torchax.tensor import Tensor

    own = {name: vars(Tensor)[name] for name in ("flatten", "detach", "type_as") if name in vars(Tensor)}
    for name in own:
        delattr(Tensor, name)
    try:
        yield
    finally:
        for name, method in own.items():
            setattr(Tensor, name, method)


@contextlib.contextmanager
def _import_undone() -> Iterator[None]:
    import jax
    import torch

    options, telemetry, fast = getattr(jax.config, CLIENT_OPTIONS), os.environ.get(TELEMETRY), torch.backends.mha.get_fastpath_enabled()
    try:
        yield
    finally:
        jax.config.update(CLIENT_OPTIONS, options)
        torch.backends.mha.set_fastpath_enabled(fast)
        if telemetry is None:
            os.environ.pop(TELEMETRY, None)
