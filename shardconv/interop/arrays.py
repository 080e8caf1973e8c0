"""Tensors as arrays and back, bit for bit, by way of NumPy.

NumPy has no bfloat16 of its own and torch takes no foreign dtype, so what NumPy lacks crosses as unsigned integers of the same width.
"""

from typing import Any

import ml_dtypes
import numpy as np

from shardconv.errors import ConfigError, Problem

# torch's name of a dtype that NumPy lacks, and what JAX calls it by.
FOREIGN = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
}
BITS = {1: "uint8", 2: "uint16"}


def array_of(tensor: Any) -> Any:
    """A torch.Tensor as a jax.Array, a copy with the same bits.

    Without JAX's x64 mode, float64 is rounded to float32, and 64-bit integers become 32-bit ones: ConfigError where a value does not fit.
    """
    import jax
    import jax.numpy as jnp

    stored = numpy_of(tensor)
    kept = stored.astype(jax.dtypes.canonicalize_dtype(stored.dtype))
    if stored.dtype.kind in "iu" and not np.array_equal(kept, stored):
        remedy = 'jax.config.update("jax_enable_x64", True)'
        title = f"a tensor of {stored.dtype.name} does not fit JAX's 32-bit integers"
        raise ConfigError(title, [Problem("some values are beyond 32 bits", remedy)])
    return jnp.array(kept)


def numpy_of(tensor: Any) -> Any:
    """A torch.Tensor as a NumPy array with the same bits, of the same memory if it is a contiguous one on the CPU."""
    plain = tensor.detach().cpu().contiguous()
    name = str(plain.dtype).removeprefix("torch.")
    if name not in FOREIGN:
        return plain.numpy()
    import torch

    dtype = FOREIGN[name]
    return plain.view(getattr(torch, BITS[dtype.itemsize])).numpy().view(dtype)


def j2t(array: Any) -> Any:
    """A jax.Array as a torch.Tensor on the CPU, a copy with the same bits.

    >>> import jax.numpy as jnp
    >>> j2t(jnp.arange(3.0))  # doctest: +SKIP
    tensor([0., 1., 2.])
    """
    import torch

    stored = np.array(array)
    foreign = {dtype: name for name, dtype in FOREIGN.items()}
    if stored.dtype in foreign:
        return torch.from_numpy(stored.view(BITS[stored.dtype.itemsize])).view(getattr(torch, foreign[stored.dtype]))
    return torch.from_numpy(stored)
