"""The source as the check reads it, with tensors that no file has: computed by the converter's own formulas, of inputs that are read here.

What a formula gives is held against torch in its tests, and not a second time here: two ways to sum squares differ in the last bit.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from shardconv.dtypes import dtype_of_code
from shardconv.formats import ComputedTensor
from shardconv.porting.folding import computed, parsed
from shardconv.verify.tensors import Tensors, numpy_dtype

Array = npt.NDArray[Any]


class WithComputed(Tensors):
    """`Tensors`, and those that are computed of them."""

    def __init__(self, root: str, files: tuple[str, ...], prefix: str, made: Iterable[ComputedTensor]) -> None:
        super().__init__(root, files, prefix)
        self._computed = {tensor.name: tensor for tensor in made}
        self._last: tuple[str, Array] = ("", np.empty(0))  # its rows are asked for one after the other

    def __contains__(self, key: str) -> bool:
        return key in self._computed or super().__contains__(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._computed[key].shape if key in self._computed else super().shape(key)

    def dtype(self, key: str) -> str:
        """The name of its dtype; raises InputError for one that takes no whole bytes."""
        return dtype_of_code(self._computed[key].dtype).name if key in self._computed else super().dtype(key)

    def rows(self, key: str, start: int, stop: int, *, passing: bool = False) -> Array:
        """Rows [start, stop) of a tensor along its first dim; all of a scalar. Raises InputError where the file ends before them."""
        if key not in self._computed:
            return super().rows(key, start, stop, passing=passing)
        if self._last[0] != key:
            tensor = self._computed[key]
            inputs = {one.name: self.rows(one.name, 0, one.shape[0] if one.shape else 1) for one in tensor.inputs}
            self._last = key, computed(parsed(key), inputs, tensor.shape).astype(numpy_dtype(self.dtype(key)))
        made = self._last[1]
        return made[start:stop] if made.ndim else made
