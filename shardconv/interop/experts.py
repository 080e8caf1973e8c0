"""The product that models with experts are made of, which torchax has no lowering for."""

from typing import Any

import jax
import jax.numpy as jnp


def grouped_product(rows: Any, experts: Any, ends: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows (n, in), sorted by expert, times the matrix (experts, in, out) of each; expert e has the rows before `ends[e]`."""
    if ends is None or rows.ndim != 2 or bias is not None or out_dtype is not None:
        raise NotImplementedError("a grouped product other than of rows by experts")
    return jax.lax.ragged_dot(rows, experts, jnp.diff(ends, prepend=jnp.zeros(1, ends.dtype)))
