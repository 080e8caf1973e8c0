"""Modules and functions of PyTorch as pure functions of arrays.

    shardconv.torch_in_jax(module)(params, *inputs)      params: names as in module.named_parameters(), buffers too if you like
    t2j(function)(*arrays)      t2j(module)(*arrays, state_dict=params)      t2j(tensor)      j2t(array)

The module is called with arrays in place of its parameters and buffers, so every torch operation becomes a JAX operation: the result can
be jitted, differentiated and vmapped, on sharded arrays like on any others, and the module itself is neither read for weights nor changed.
A module that is made under `weightless()` holds no weights at all.

What the forward writes in place goes into copies: inputs and parameters stay as they are. What it writes into buffers, as batch norm does
in training, comes back with `return_state_dict=True`, and is dropped otherwise. `torch.no_grad` stops no gradient here; `detach` does.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from shardconv.errors import ConfigError, Problem
from shardconv.interop.arrays import array_of
from shardconv.interop.environment import constant, entered, require_torchax

SHOWN = 5  # names that an error lists


def torch_in_jax(module: Any) -> Callable[..., Any]:
    """A torch.nn.Module as a function `(params, *inputs, rng=None, return_state_dict=False, **options)` of jax.Arrays.

    `params` maps the names of `module.named_parameters()` to arrays of the same shapes, of any dtype and sharding. Of parameters that are
    tied, one name is enough, and the first counts. Buffers may be among them (a whole state_dict will do); those that are not keep the
    module's own values, and are constants of the trace. Results keep their structure, with mappings such as transformers' outputs as
    dicts. `rng`, a `jax.random.key`, is for modules that draw random numbers, as dropout does in training. With `return_state_dict` the
    result is a pair: what the module returns, and all of its state_dict as arrays, with what the call has written there.

    Raises ConfigError where torchax is missing; the function raises it where names or shapes do not fit the module, where random numbers
    are drawn without `rng`, or by a generator of torch's own, and where the module returns what is no array, such as a cache.

    >>> import shardconv, torch  # doctest: +SKIP
    >>> layer = torch.nn.Linear(3, 2)  # doctest: +SKIP
    >>> forward = jax.jit(shardconv.torch_in_jax(layer))  # doctest: +SKIP
    >>> forward({name: shardconv.t2j(weight) for name, weight in layer.named_parameters()}, jnp.ones((4, 3))).shape  # doctest: +SKIP
    (4, 2)
    """
    require_torchax()

    def function(params: Mapping[str, Any], *inputs: Any, rng: Any = None, return_state_dict: bool = False, **options: Any) -> Any:
        import torch

        state = _state(module, params)

        def call(*inputs: Any, **options: Any) -> Any:
            tensors = {name: _tensor(array) for name, array in state.items()}
            found = torch.func.functional_call(module, tensors, inputs, options)
            return (found, _by_every_name(module, tensors)) if return_state_dict else found

        return _called(call, inputs, options, rng)

    return function


def t2j(value: Any) -> Any:
    """A torch.Tensor as a jax.Array, a module or function of torch as a function of arrays.

    A module's function takes its parameters as the keyword `state_dict`; left out, they are the module's own, as constants. All other
    keywords are those of `torch_in_jax`; `rng` is a function's too.
    """
    require_torchax()
    import torch

    if isinstance(value, torch.Tensor):
        return array_of(value)
    if isinstance(value, torch.nn.Module):
        return _with_state_dict(value)
    if not callable(value):
        remedy = "for a dict of tensors: {name: t2j(tensor) for name, tensor in ...}"
        raise ConfigError("t2j takes a tensor, a module or a function", [Problem(f"this is a {type(value).__name__}", remedy)])

    def function(*inputs: Any, rng: Any = None, **options: Any) -> Any:
        return _called(value, inputs, options, rng)

    return function


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Modules that are made inside hold no weights: parameters are on torch's meta device, and buffers are real."""
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def without(_module: Any, _name: str, parameter: Any) -> Any:
        if parameter is None or parameter.device.type == "meta":
            return None
        return torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(without)
    try:
        yield
    finally:
        handle.remove()


def _with_state_dict(module: Any) -> Callable[..., Any]:
    traced = torch_in_jax(module)

    def function(*inputs: Any, state_dict: Mapping[str, Any] | None = None, **options: Any) -> Any:
        params = {name: constant(weight) for name, weight in module.named_parameters()} if state_dict is None else state_dict
        return traced(params, *inputs, **options)

    return function


def _state(module: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter and buffer of the module by one name, with its array."""
    weights, known = dict(module.named_parameters(remove_duplicate=False)), dict(module.named_buffers(remove_duplicate=False))
    known = weights | known
    names: dict[int, str] = {}
    for name in [name for name in known if name in params] + [name for name in known if name not in weights]:
        names.setdefault(id(known[name]), name)
    problems = [_listed("the module has no {}", [name for name in params if name not in known])]
    problems.append(_listed("there is no array for {}", [name for name, weight in weights.items() if id(weight) not in names]))
    odd = [name for name in params if name in known and tuple(params[name].shape) != tuple(known[name].shape)]
    problems += [f"{name} is {tuple(params[name].shape)}, and the module's {tuple(known[name].shape)}" for name in odd[:SHOWN]]
    if any(problems):
        raise ConfigError("the parameters do not fit the module", [Problem(fact) for fact in problems if fact])
    return {name: params[name] if name in params else constant(known[name]) for name in names.values()}


def _by_every_name(module: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The module's state_dict, of tensors that are known by one name each."""
    known = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    found = {id(known[name]): tensor for name, tensor in tensors.items()}
    return {name: found[id(known[name])] for name in module.state_dict() if name in known}


def _listed(text: str, names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return text.format(", ".join(names[:SHOWN]) + rest) if names else ""


def _called(function: Callable[..., Any], inputs: Any, options: Any, rng: Any) -> Any:
    """Calls a torch function with arrays as tensors, and gives its tensors as arrays."""
    import jax
    import torch

    key = jax.random.key(0) if rng is None else rng
    with entered() as environment, environment.override_property(prng=key), torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        found = function(*_tensors(inputs), **_tensors(options))
        if rng is None and environment.prng_key is not key:
            remedy = "call eval() on it first, or give rng=jax.random.key(...)"
            raise ConfigError("the module draws random numbers", [Problem("a pure function has none of its own", remedy)])
        if not torch.equal(torch.get_rng_state(), before):
            remedy = "draw them with torch.rand, randn or randint, or like one of the inputs: torch.rand_like(x)"
            raise ConfigError("the module draws random numbers", [Problem("some come from a generator of torch's own", remedy)])
        return _arrays(found)


def _tensor(array: Any) -> Any:
    from torchax.tensor import Tensor

    from shardconv.interop.environment import environment

    return Tensor(array, environment())


def _tensors(value: Any) -> Any:
    """A structure of arguments with arrays as wrapped tensors; anything else is passed on as it is."""
    import jax

    if isinstance(value, jax.Array):
        return _tensor(value)
    if isinstance(value, np.ndarray):
        return _tensor(jax.numpy.asarray(value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_tensors, value))
    if isinstance(value, list | tuple):
        return type(value)(map(_tensors, value))
    if type(value) is dict:
        return {key: _tensors(entry) for key, entry in value.items()}
    return value


def _arrays(value: Any) -> Any:
    """A structure of results with tensors as arrays, and every mapping as a dict."""
    import torch
    from torchax.tensor import Tensor, View

    if isinstance(value, Tensor | View):
        return value.jax()
    if isinstance(value, torch.Tensor):
        return constant(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_arrays, value))
    if isinstance(value, list | tuple):
        return type(value)(map(_arrays, value))
    if isinstance(value, Mapping):
        return {key: _arrays(entry) for key, entry in value.items()}
    if value is None or isinstance(value, bool | int | float | complex):
        return value
    fact = f"there is a {type(value).__name__} in the result"
    raise ConfigError("the module returns what is no array", [Problem(fact, "for a cache of transformers: pass use_cache=False")])
