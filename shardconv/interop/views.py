"""Views that write through: what PyTorch writes in place into a part of a tensor, or a transposed one, is seen in the whole.

torchax tracks slices alone, and forgets what is written through any other view, without a word. Here every view, as torch's own schemas
tell them, is kept as the tensor that it is of and the operation that makes it; it is computed from that tensor when read, and what is
written into it is put back into that tensor's places.

Whether an operation shares memory or copies depends on strides (`reshape`), which arrays do not have. So each view has a *shadow*: a tensor
on torch's meta device, without data, that went through the same operations.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils import _mode_utils as modes
from torchax.tensor import Tensor, View
from torchax.view import ViewInfo, ViewInfoType

Run = Callable[[Any], Any]  # of an array


class Replay(ViewInfo):
    """A view as the operation that makes it of an array."""

    def __init__(self, run: Run) -> None:
        super().__init__(ViewInfoType.INVALID)
        self.run = run

    def transform_tensor(self, array: Any) -> Any:
        """The view's values."""
        return self.run(array)

    def update_tensor(self, values: Any, array: Any) -> Any:
        """The array with the view's places overwritten."""
        values = jnp.broadcast_to(values, jax.eval_shape(self.run, array).shape).astype(array.dtype)
        with jax.ensure_compile_time_eval():
            places = np.asarray(self.run(jnp.arange(array.size, dtype=jnp.int32).reshape(array.shape))).ravel()
        if np.array_equal(places, np.arange(array.size)):
            return values.reshape(array.shape)
        return array.ravel().at[places].set(values.ravel()).reshape(array.shape)

    def calculate_output_shape(self, array: Any) -> list[int]:
        """The view's shape."""
        return list(jax.eval_shape(self.run, array).shape)


class Shared(View):
    """A view of a tensor, or of another view, with its shadow."""

    def __new__(cls, parent: Any, run: Run, environment: Any, _shadow: Any) -> Any:
        return View.__new__(cls, parent, Replay(run), environment)

    def __init__(self, parent: Any, run: Run, environment: Any, shadow: Any) -> None:
        super().__init__(parent, Replay(run), environment)
        self.shadow = shadow

    def __setitem__(self, index: Any, value: Any) -> None:
        index, value = self._env.t2j_iso((index, value))
        array = self.jax()
        self.update(array.at[index].set(value.astype(array.dtype) if isinstance(value, jax.Array) else value))


def is_view(operation: Any) -> bool:
    """Whether an operation's result shares the memory of its first argument, by its schema."""
    if not isinstance(operation, torch._ops.OpOverload):
        return False
    infos = [result.alias_info for result in operation._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def shared(operation: Any, tensor: Any, rest: Any, options: Any, run: Callable[[Any, int | None], Any], environment: Any) -> Any | None:
    """The views that an operation makes of a tensor, None where torch would copy. `run` gives the array of one of its results."""
    shadow = shadow_of(tensor)
    try:
        with modes.no_dispatch(), torch._C.DisableTorchFunction():
            shadows = operation(shadow, *rest, **options)
    except RuntimeError:  # strides that no view has: the operation is a part of `reshape`, which copies then
        return None
    memory = shadow.untyped_storage()._cdata
    if any(one.untyped_storage()._cdata != memory for one in _leaves(shadows)):
        return None
    if isinstance(shadows, torch.Tensor):
        return tensor if shadows is shadow else Shared(tensor, lambda array: run(array, None), environment, shadows)
    return type(shadows)(Shared(tensor, _nth(run, place), environment, one) for place, one in enumerate(shadows))


def item(tensor: Any, index: Any, environment: Any) -> Any:
    """`tensor[index]`: a view where the index has no arrays, as in torch."""
    if any(isinstance(one, torch.Tensor | list | jax.Array) for one in (index if isinstance(index, tuple) else (index,))):
        place = environment.t2j_iso(tuple(index) if isinstance(index, tuple) else index)
        return Tensor(tensor.jax()[jnp.asarray(place) if isinstance(place, list) else place], environment)
    with modes.no_dispatch(), torch._C.DisableTorchFunction():
        shadow = shadow_of(tensor)[index]
    return Shared(tensor, lambda array: array[index], environment, shadow)


def contiguous(tensor: Any, environment: Any) -> Any:
    """A tensor itself, or a copy where torch makes one."""
    return tensor if shadow_of(tensor).is_contiguous() else Tensor(tensor.jax(), environment)


def copied(target: Any, source: Any, environment: Any) -> Any:
    """`target.copy_(source)`, broadcast and cast.

    torchax's attention fills a mask in place with what is larger than the mask, and means the larger one.
    """
    array, wanted = environment.t2j_iso(source).astype(target.jax().dtype), target.jax().shape
    larger = jnp.broadcast_shapes(array.shape, wanted) != wanted
    if isinstance(target, View):
        target.update(array)
    else:
        target._elem = array if larger else jnp.broadcast_to(array, wanted)
    return target


def shadow_of(tensor: Any) -> Any:
    """A tensor without data and with the strides that torch's would have."""
    if isinstance(tensor, Shared):
        return tensor.shadow
    shape = tuple(tensor.jax().shape)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    with modes.no_dispatch(), torch._C.DisableTorchFunction():
        return torch.empty_strided(shape, strides, dtype=tensor.dtype, device="meta")


def _nth(run: Callable[[Any, int | None], Any], place: int) -> Run:
    return lambda array: run(array, place)


def _leaves(found: Any) -> Iterator[Any]:
    if isinstance(found, torch.Tensor):
        yield found
    else:
        yield from found
