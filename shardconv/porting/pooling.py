"""Average pooling as PyTorch does it, for code of any JAX library.

`torch.nn.AvgPool2d` divides by the whole window, padding included, unless `count_include_pad=False`; Equinox's layers cannot do the latter.
"""

from collections.abc import Sequence
from typing import Any


def avg_pool(
    x: Any,
    window: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Sequence[int] | None = None,
    *,
    count_include_pad: bool = True,
    channels_first: bool = False,
) -> Any:
    """Averages over windows of the last dims of `x` before the channels, or after them if `channels_first`.

    `strides` are the window's lengths if not given, `padding` is that of torch, on both sides. Dims before are batches.

    >>> import jax.numpy as jnp
    >>> float(avg_pool(jnp.ones((4, 4, 1)), (2, 2), padding=(1, 1))[0, 0, 0])
    0.25
    """
    import jax
    import jax.numpy as jnp

    first = x.ndim - len(window) - (0 if channels_first else 1)

    def every(inner: Sequence[Any], outside: Any) -> tuple[Any, ...]:
        return (*(outside,) * first, *inner, *(outside,) * (x.ndim - first - len(inner)))

    sides = every([(side, side) for side in padding or (0,) * len(window)], (0, 0))
    lengths, steps = every(window, 1), every(strides or window, 1)

    def summed(values: Any) -> Any:
        return jax.lax.reduce_window(values, jnp.zeros((), values.dtype), jax.lax.add, lengths, steps, sides)

    if not count_include_pad:
        return summed(x) / summed(jnp.ones_like(x))
    size = 1
    for length in window:
        size *= length
    return summed(x) / size
