"""Landing: the arrays of a model, made of stored tensors by moves that are bound to both.

What is only moved keeps all its bits, NaN payloads included. Where the model's dtype is another one, a value is rounded once
(`shardconv.values`). Every element of every array must be filled by exactly one move; `gaps` says where it is not.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.boxes import slices, whole
from shardconv.dtypes import raw_view
from shardconv.porting.folding import computed, parsed
from shardconv.porting.moves import Bound
from shardconv.route import pieces
from shardconv.values import ValueRule, convert

Array = npt.NDArray[Any]


def landed(
    moves: Iterable[Bound], tensors: Mapping[str, Array], dtypes: Mapping[str, np.dtype[Any]], too_large: dict[str, int] | None = None
) -> dict[str, Array]:
    """The arrays that the moves fill, by name, each in its dtype.

    `too_large` is told of each array how many of its numbers are finite where they are stored, and are not in its dtype. ValueError where
    an expression's tensors do not fit together, or whole numbers an array.
    """
    arrays: dict[str, Array] = {}
    made: dict[tuple[str, np.dtype[Any]], tuple[Array, Array | None]] = {}
    for move in moves:
        shape = move.target.shape
        for name, index in move.target.keys():
            dtype = dtypes[name]
            out = arrays.setdefault(name, np.zeros(shape, dtype))
            for piece in pieces(move.target, move.source, index, whole(shape)):
                if (piece.key, dtype) not in made:
                    try:
                        values = computed(parsed(piece.key), tensors, move.source.shape)
                        block = in_dtype(values, dtype)
                    except ValueError as error:
                        raise ValueError(f"{name} = {piece.key}: {error}") from None
                    made[piece.key, dtype] = block, _lost(values, block)
                block, lost = made[piece.key, dtype]
                piece.land(raw_view(block[slices(piece.box)]), raw_view(out))
                if lost is not None and too_large is not None and (count := int(lost[slices(piece.box)].sum())):
                    too_large[name] = too_large.get(name, 0) + count
    return arrays


def in_dtype(values: Array, dtype: np.dtype[Any]) -> Array:
    """The values in a dtype: themselves where they have it, rounded once where not; ValueError where whole numbers do not fit."""
    if values.dtype == dtype:
        return values
    if dtype.kind in "biu" or values.dtype.kind in "biu":
        found = values.astype(dtype)
        if not np.array_equal(found.astype(values.dtype), values):
            raise ValueError(f"{values.dtype} does not fit {dtype}")
        return found
    found = np.empty(values.shape, dtype)
    convert(np.ascontiguousarray(values), ValueRule(), found)
    return found


def _lost(values: Array, found: Array) -> Array | None:
    """Where finite numbers have become infinite, or NaN, in a smaller dtype; None where none have."""
    if found is values or found.dtype.kind in "biu" or bool(np.isfinite(found).all()):
        return None
    return np.asarray(np.isfinite(values) & ~np.isfinite(found))


def gaps(moves: Sequence[Bound], shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The arrays that are not filled once, each with what is wrong: nothing fills them, or a part twice, or a part not at all."""
    counts: dict[str, Array] = {}
    filled: dict[str, int] = {}
    shared = Counter(name for move in moves for name, _ in move.target.keys())
    twice = {name for name, count in shared.items() if count > 1}
    for move in moves:
        per_array = move.size // math.prod(move.target.named.values())
        for name, index in move.target.keys():
            filled[name] = filled.get(name, 0) + per_array
            if name in twice:
                count = counts.setdefault(name, np.zeros(move.target.shape, np.uint8))
                ones = np.ones(move.source.shape, np.uint8)
                part = np.zeros(move.target.shape, np.uint8)
                for piece in pieces(move.target, move.source, index, whole(move.target.shape)):
                    piece.land(ones[slices(piece.box)], part)
                count += part
    found = {name: "nothing fills it" for name in shapes if name not in filled}
    for name, count in counts.items():
        if count.max() > 1:
            found[name] = f"{int((count > 1).sum())} of its {count.size} elements are filled twice"
    for name, elements in filled.items():
        size = math.prod(shapes[name])
        if name not in found and elements < size:
            found[name] = f"{size - elements} of its {size} elements are not filled"
    return found
