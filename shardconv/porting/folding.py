"""Folding: the few things that happen to numbers between a PyTorch checkpoint and a JAX model, which no address can say.

What fills an array is a stored tensor, or an *expression* of some, written as a call:

    sum(lstm.bias_ih_l0, lstm.bias_hh_l0)       one bias where torch keeps two
    flip(up.weight)                             a kernel's space the other way round: torch's transposed convolutions
    weight_norm(fc.weight_g, fc.weight_v)       the weight of a weight-normalised layer: g v / |v|
    spectral_norm(weight_orig, u, v)            the weight of a spectrally normalised layer: w / (u w v)
    masked(qkv.bias, qkv.bias_mask)             zeros where the mask is zero, the same bits where it is one
    block_diagonal(up.weight)                   a grouped kernel as one without groups
    0                                           a number, everywhere

`flip` and `masked` keep every bit. The others compute in float64 and round once, into the tensor's dtype, or float32 if that is narrower.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A function of expressions."""

    function: str
    arguments: tuple["Expression", ...]

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(str, self.arguments))})"


Expression = str | float | Call


@lru_cache(maxsize=1 << 16)
def parsed(text: str) -> Expression:
    """Reads an expression; ValueError that says what is wrong.

    >>> parsed("flip(up.weight)")
    Call(function='flip', arguments=('up.weight',))
    """
    text = text.strip()
    if re.fullmatch(r"-?[0-9]+(\.[0-9]*)?(e-?[0-9]+)?", text):
        return float(text)
    found = re.fullmatch(r"([a-z_]+)\((.*)\)", text, flags=re.DOTALL)
    if found is None:
        if not text or any(character in "(), " for character in text):
            raise ValueError(f"{text!r} is neither a tensor's name nor a call such as sum(a, b)")
        return text
    name, inner = found.groups()
    if name not in FOLDS:
        raise ValueError(f"there is no {name}(); there are {', '.join(sorted(FOLDS))}")
    arguments = tuple(parsed(part) for part in _arguments(inner))
    if len(arguments) != FOLDS[name].arity:
        raise ValueError(f"{name} takes {FOLDS[name].arity} tensors, not {len(arguments)}")
    return Call(name, arguments)


def names(expression: Expression) -> tuple[str, ...]:
    """The tensors of an expression.

    >>> names(parsed("sum(a, flip(b))"))
    ('a', 'b')
    """
    if isinstance(expression, Call):
        return tuple(name for argument in expression.arguments for name in names(argument))
    return (expression,) if isinstance(expression, str) else ()


def renamed(expression: Expression, meanings: Mapping[str, Expression]) -> Expression:
    """The expression with other expressions in the place of its names."""
    if isinstance(expression, Call):
        return Call(expression.function, tuple(renamed(argument, meanings) for argument in expression.arguments))
    return meanings[expression] if isinstance(expression, str) else expression


def shape_of(expression: Expression, shapes: Mapping[str, Sequence[int]]) -> Shape:
    """The shape of what an expression gives; None for a length that the model has to say."""
    if isinstance(expression, Call):
        first = shape_of(expression.arguments[FOLDS[expression.function].like], shapes)
        return (first[0], None, *first[2:]) if expression.function == "block_diagonal" else first
    return tuple(shapes[expression]) if isinstance(expression, str) else ()


def computed(expression: Expression, tensors: Mapping[str, Array], shape: Sequence[int]) -> Array:
    """What an expression gives, in the shape that dims have said; ValueError where its tensors do not fit together."""
    if isinstance(expression, float):
        return np.full(tuple(shape), expression)
    if isinstance(expression, str):
        return tensors[expression]
    arguments = [computed(argument, tensors, ()) for argument in expression.arguments]
    return FOLDS[expression.function].compute(arguments, tuple(shape))


def _sum(arguments: list[Array], _shape: tuple[int, ...]) -> Array:
    one, other = arguments
    if one.shape != other.shape:
        raise ValueError(f"sum of {one.shape} and {other.shape}")
    return _rounded(one.astype(np.float64) + other.astype(np.float64), one)


def _flip(arguments: list[Array], _shape: tuple[int, ...]) -> Array:
    (kernel,) = arguments
    return kernel[(slice(None), slice(None), *(slice(None, None, -1) for _ in kernel.shape[2:]))]


def _weight_norm(arguments: list[Array], _shape: tuple[int, ...]) -> Array:
    length, direction = (argument.astype(np.float64) for argument in arguments)
    axes = tuple(axis for axis in range(direction.ndim) if length.ndim == 0 or length.shape[axis] == 1)
    return _rounded(length * direction / np.sqrt((direction**2).sum(axes, keepdims=True)), arguments[1])


def _spectral_norm(arguments: list[Array], _shape: tuple[int, ...]) -> Array:
    weight, left, right = (argument.astype(np.float64) for argument in arguments)
    axis = 0 if weight.shape[0] == left.size and weight[0].size == right.size else 1  # 1: of a transposed convolution
    matrix = np.moveaxis(weight, axis, 0).reshape(left.size, right.size)
    return _rounded(weight / (left @ matrix @ right), arguments[0])


def _masked(arguments: list[Array], _shape: tuple[int, ...]) -> Array:
    values, mask = arguments
    if not np.isin(mask.astype(np.float32), (0.0, 1.0)).all():
        raise ValueError("the mask has other numbers than 0 and 1: it has not been loaded from the checkpoint")
    return np.where(mask.astype(np.float32) == 0.0, np.zeros((), values.dtype), values)


def _block_diagonal(arguments: list[Array], shape: tuple[int, ...]) -> Array:
    (kernel,) = arguments
    inputs, width = kernel.shape[:2]
    count = shape[1] // width
    if shape[1] % width or not count or inputs % count:
        raise ValueError(f"{inputs} inputs and {shape[1]} outputs are no groups of {width} outputs")
    full = np.zeros((inputs, shape[1], *kernel.shape[2:]), kernel.dtype)
    for group in range(count):
        rows = slice(group * inputs // count, (group + 1) * inputs // count)
        full[rows, group * width : (group + 1) * width] = kernel[rows]
    return full


def _rounded(values: Array, like: Array) -> Array:
    return values.astype(like.dtype if like.dtype.itemsize >= 4 else np.float32)


def _arguments(text: str) -> list[str]:
    """Splits arguments at the commas that are in no inner call."""
    found, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return found


@dataclass(frozen=True)
class Fold:
    """A function, how many tensors it takes, and the one whose shape the result has."""

    compute: Callable[[list[Array], tuple[int, ...]], Array]
    arity: int
    like: int = 0


FOLDS: Mapping[str, Fold] = {
    "sum": Fold(_sum, 2),
    "flip": Fold(_flip, 1),
    "weight_norm": Fold(_weight_norm, 2, like=1),
    "spectral_norm": Fold(_spectral_norm, 3),
    "masked": Fold(_masked, 2),
    "block_diagonal": Fold(_block_diagonal, 1),
}

# Functions of which an element of the result is made of the elements in the same place.
ELEMENTWISE = ("masked", "sum")
