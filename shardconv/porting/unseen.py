"""Unseen arrays: what no comparison of outputs can show, found by measurement.

    call(model) --- once as it is, once with every number moved by a unit in the last place -----> noise
                --- one gradient of a random sum of all results ---------------------------------> what may be unseen
                --- all of that changed at once; halves of it, and halves of these, while it shows -> what is

An array that moves the results has to show that by itself, so trying them one by one would take as many calls as there are arrays. A
gradient asks all of them together, down to single rows, for a few times the cost of a call. It only proposes: numbers that it says are
without effect are then changed by half, as a real fault would, and stand only if the results stay within the noise. A `call` that JAX
cannot differentiate is called once for each array, and parts of arrays are not looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from shardconv.porting.trees import opened

# How many times the noise a result may move and count as unmoved, as in `agreement`.
FACTOR = 10.0
# What an element is changed by, relative to itself: less than by a wrong layer or transposition, and variances stay positive.
STEP = 0.5
# Calls for telling apart what is unseen and what a gradient took for it; what is left then is not called unseen.
CALLS = 200

Arrays = Mapping[str, jax.Array]
Index = tuple[int, ...]
Item = tuple[str, Index]
# Results for arrays by name and one of several inputs.
Call = Callable[[dict[str, Any], Any], Any]


def unseen(call: Callable[[Any], Any], model: Any) -> dict[str, tuple[Index, ...]]:
    """The arrays of a model on which what `call(model)` gives does not depend, by name, each with the indices of the parts that are unseen.

    `model` is what `convert_module` gives: a Linen, NNX or Equinox model, or any tree of arrays. `call` returns an array or a tree of
    them: better the features behind every layer than one number. The index `()` is the whole array; `(5,)` is `array[5]`, an expert or a
    row; `(3, 5)` is looked for from four dims on, where layers and experts are stacked. Random numbers must be the same at each call, and
    matrices be multiplied in float32: `jax.default_matmul_precision("highest")`. Floats narrower than float32 are given as float32.
    Raises ValueError where `call` gives no floats.

    >>> def call(model):
    ...     return model["x"] @ model["kernel"] + model["bias"][2]
    >>> unseen(call, {"x": jnp.array([1.0, 2.0, 0.0]), "kernel": jnp.ones((3, 4)), "bias": jnp.ones((5, 4)), "mask_token": jnp.zeros(3)})
    {'bias': ((0,), (1,), (3,), (4,)), 'kernel': ((2,),), 'mask_token': ((),)}
    """
    tree = opened(model)
    return insensitive(lambda arrays, _: call(tree.copied(arrays)), tree.values, [None])


def insensitive(
    call: Call, arrays: Mapping[str, Any], inputs: Sequence[Any], *, calls: int = CALLS, one_by_one: bool = True
) -> dict[str, tuple[Index, ...]]:
    """As `unseen`, for arrays by name and over several inputs: what moves the results for none of them.

    `calls`, for each input, are spent on telling apart what a gradient proposes. Without `one_by_one`, what JAX says of a `call` that it
    cannot differentiate is raised: a TypeError, ValueError or NotImplementedError.
    """
    given = {name: _wide(jnp.asarray(array)) for name, array in arrays.items()}
    sizes = _sizes(given)
    looks = [_Look.at(call, given, one, number) for number, one in enumerate(inputs)]
    try:
        items = _proposed(call, given, sizes, looks)
    except (TypeError, ValueError, NotImplementedError):
        if not one_by_one:
            raise
        wholes: list[Item] = [(name, ()) for name in given]
        found = [item for item in wholes if _unmoved(call, given, sizes, looks, [item])]
    else:
        found = _confirmed(lambda some: _unmoved(call, given, sizes, looks, some), items, calls)
    return {name: tuple(index for one, index in found if one == name) for name in given if any(one == name for one, _ in found)}


@dataclass(frozen=True)
class _Look:
    """One input: the results for the arrays as they are, and the noise of each."""

    given: Any
    results: tuple[npt.NDArray[Any], ...]
    noise: tuple[float, ...]

    @classmethod
    def at(cls, call: Call, arrays: Arrays, given: Any, number: int) -> "_Look":
        """Calls twice; ValueError where nothing comes of it that could move."""
        results = _floats(call(dict(arrays), given))
        if not results:
            raise ValueError("the call gives no floats that could be compared")
        nudged = _floats(call(jax.block_until_ready(_nudged(arrays, number)), given))
        noise = tuple(max(_gap(a, b), _rounding(a)) for a, b in zip(results, nudged, strict=True))
        return cls(given, results, noise)

    def moved(self, call: Call, arrays: Arrays) -> bool:
        """Whether the results for other arrays are others."""
        found = _floats(call(dict(arrays), self.given))
        return any(not _gap(a, b) <= FACTOR * noise for a, b, noise in zip(self.results, found, self.noise, strict=True))


def _proposed(call: Call, arrays: Arrays, sizes: Mapping[str, jax.Array], looks: Sequence[_Look]) -> list[Item]:
    """What a gradient takes for unseen: whole arrays, else slices along the first dim, else along the first two of four or more."""
    floats = {name: array for name, array in arrays.items() if _is_float(array)}
    rest = {name: array for name, array in arrays.items() if name not in floats}

    @jax.jit
    def effects(floats: Arrays, rest: Arrays, given: Any, weights: list[jax.Array]) -> dict[str, jax.Array]:
        def in_sum(some: Arrays) -> jax.Array:
            results = [leaf for leaf in jax.tree.leaves(call({**rest, **some}, given)) if _is_float(leaf)]
            return sum((jnp.vdot(weight, one.astype(weight.dtype)) for weight, one in zip(weights, results, strict=True)), jnp.zeros(()))

        return {name: _by_slice(slope, floats[name], sizes[name]) for name, slope in jax.grad(in_sum)(floats).items()}

    blind: dict[str, npt.NDArray[np.bool_]] = {}
    for number, look in enumerate(looks):
        bound = 2 * float(np.sqrt(sum(result.size for result in look.results)))  # what noise in every result comes to, and twice that
        random = np.random.default_rng(number)
        weights = [random.standard_normal(one.shape) / noise for one, noise in zip(look.results, look.noise, strict=True)]
        for name, effect in jax.block_until_ready(effects(floats, rest, look.given, [jnp.asarray(one) for one in weights])).items():
            low = ~(np.asarray(effect) > bound)  # where there is no number, the gradient says nothing
            blind[name] = blind[name] & low if name in blind else low
    return [*(item for name, low in blind.items() for item in _items(name, low)), *((name, ()) for name in rest)]


def _by_slice(slope: jax.Array, array: jax.Array, size: jax.Array) -> jax.Array:
    """How far a slice's change moves the random sum: per element of the first dim, of the first two where there are four or more."""
    apart = 0 if slope.ndim == 0 else 2 if slope.ndim >= 4 else 1
    return jnp.sqrt(jnp.sum(jnp.square(slope * _step(array, size)), axis=tuple(range(apart, slope.ndim))))


def _items(name: str, low: npt.NDArray[np.bool_]) -> list[Item]:
    if low.all():
        return [(name, ())]
    whole: npt.NDArray[np.bool_] = low if low.ndim == 1 else np.asarray(low.all(axis=1))
    found: list[Item] = [(name, (int(first),)) for first in np.flatnonzero(whole)]
    if low.ndim == 2:
        found += [(name, (int(first), int(second))) for first, second in np.argwhere(low & ~whole[:, None])]
    return sorted(found)


def _confirmed(unmoved: Callable[[list[Item]], bool], items: list[Item], calls: int) -> list[Item]:
    """The items that do not show when they are changed, all together first, then by halves."""
    found: list[Item] = []
    waiting = [items] if items else []
    for _ in range(calls):
        if not waiting:
            break
        some = waiting.pop()
        if unmoved(some):
            found += some
        elif len(some) > 1:
            waiting += [some[len(some) // 2 :], some[: len(some) // 2]]
    return found


def _unmoved(call: Call, arrays: Arrays, sizes: Mapping[str, jax.Array], looks: Sequence[_Look], items: list[Item]) -> bool:
    """Whether changing all of these moves the results for no input."""
    changed = dict(arrays)
    for name in dict.fromkeys(name for name, _ in items):
        indices = [index for one, index in items if one == name]
        changed[name] = jax.block_until_ready(_changed(arrays[name], _mask(arrays[name].shape, indices), sizes[name]))
    return not any(look.moved(call, changed) for look in looks)


def _mask(shape: Sequence[int], indices: Sequence[Index]) -> npt.NDArray[np.bool_]:
    depth = max(map(len, indices))
    mask = np.zeros(tuple(shape[:depth]), bool)
    for index in indices:
        mask[(*index,)] = True
    return mask.reshape((*mask.shape, *[1] * (len(shape) - depth)))


@jax.jit
def _changed(array: jax.Array, mask: jax.Array, size: jax.Array) -> jax.Array:
    """An array that is another one where the mask says so: off by half, or by one where it holds whole numbers."""
    if array.dtype == bool:
        return array ^ mask
    if not _is_float(array):
        return array + mask.astype(array.dtype)
    return array + jnp.where(mask, _step(array, size), 0) * _signs(array, 0)


@jax.jit
def _nudged(arrays: Arrays, number: int) -> dict[str, jax.Array]:
    """Every element moved by a unit in the last place or two, up or down."""

    def nudged(array: jax.Array) -> jax.Array:
        return array * (1 + _signs(array, number) * jnp.finfo(array.dtype).eps) if _is_float(array) else array

    return {name: nudged(array) for name, array in arrays.items()}


def _step(array: jax.Array, size: jax.Array) -> jax.Array:
    """What each element is changed by; zeros by as much as what is as large as the array."""
    return jnp.where(array == 0, size.astype(array.dtype), jnp.abs(array)) * STEP


def _signs(array: jax.Array, number: int | jax.Array) -> jax.Array:
    """Signs by hashing places: jax.random's own bits take XLA seconds to compile for every shape."""
    bits = jnp.arange(array.size, dtype=jnp.uint32) + jnp.uint32(number) * jnp.uint32(0x9E3779B9)
    for factor in (0x7FEB352D, 0x846CA68B):
        bits = (bits ^ (bits >> 16)) * jnp.uint32(factor)
    found: jax.Array = (1 - 2 * (bits >> 31).astype(array.dtype)).reshape(array.shape)
    return found


def _sizes(arrays: Arrays) -> dict[str, jax.Array]:
    """How large the elements of each array are; of one that is zeros, as those of a typical one."""
    squares = jax.block_until_ready(_squares({name: array for name, array in arrays.items() if _is_float(array) and array.size}))
    found = {name: float(square) ** 0.5 for name, square in squares.items()}
    typical = float(np.median([size for size in found.values() if size > 0] or [1.0]))
    return {name: jnp.asarray(found.get(name) or typical) for name in arrays}


@jax.jit
def _squares(arrays: Arrays) -> dict[str, jax.Array]:
    return {name: jnp.mean(jnp.square(array)) for name, array in arrays.items()}


def _wide(array: jax.Array) -> Any:
    return array.astype(jnp.float32) if _is_float(array) and array.dtype.itemsize < 4 else array


def _is_float(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _rounding(result: npt.NDArray[Any]) -> float:
    """Half a place of the largest number: noise is no less, even where a few numbers happen to agree."""
    largest = float(np.abs(result).max(initial=0.0, where=np.isfinite(result)))
    return max(largest * float(jnp.finfo(result.dtype).eps) / 2, float(np.finfo(np.float32).tiny))


def _floats(results: Any) -> tuple[npt.NDArray[Any], ...]:
    return tuple(np.asarray(leaf) for leaf in jax.tree.leaves(results) if _is_float(np.asarray(leaf)))


def _gap(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """The largest difference; of what is not finite on both sides alike, none."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(b.astype(np.float64) - a.astype(np.float64))
    alike = (a == b) | (np.isnan(a) & np.isnan(b))
    return float(np.nan_to_num(np.where(alike, 0.0, difference), nan=np.inf).max(initial=0.0))
