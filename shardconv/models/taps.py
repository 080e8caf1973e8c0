"""A look at what a block's parts give, for who asks where two implementations part ways.

Code under `jax.jit` runs as Python once, to be traced. `tap` marks a part there; it does nothing unless somebody listens while that
happens, so a compiled block that nobody listens to has no trace of it.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_heard: ContextVar[dict[str, jax.Array] | None] = ContextVar("heard", default=None)


def tap(part: str, x: jax.Array) -> jax.Array:
    """`x`, which is what a part gives."""
    heard = _heard.get()
    if heard is not None:
        heard[part] = x
    return x


@contextlib.contextmanager
def listening() -> Iterator[dict[str, jax.Array]]:
    """While this is entered, what parts give goes into a dict.

    >>> with listening() as heard:
    ...     _ = tap("q", jax.numpy.ones(2)) * 3
    >>> heard["q"].tolist()
    [1.0, 1.0]
    """
    heard: dict[str, jax.Array] = {}
    before = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(before)
