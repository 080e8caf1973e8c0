"""What layers are made with, and pooling: against torch."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from shardconv.porting.conventions import kept_momentum, transposed_padding  # noqa: E402
from shardconv.porting.pooling import avg_pool  # noqa: E402

HALF_A_PLACE = 2.0**-24


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    ("rank", "options"), [(1, {"padding": 1}), (2, {"stride": 2, "padding": 1}), (2, {}), (3, {"stride": 1, "padding": 1})]
)
def test_average_pooling_is_torchs(rank: int, options: dict[str, int], include: bool) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, *(7, 6, 5)[:rank])).astype(np.float32)
    layer = getattr(torch.nn, f"AvgPool{rank}d")(3, **options, count_include_pad=include)
    expected = layer(torch.from_numpy(x)).numpy()
    sizes = {name: (value,) * rank for name, value in options.items()}
    strides, padding = sizes.get("stride"), sizes.get("padding")
    first = avg_pool(jnp.asarray(x), (3,) * rank, strides, padding, count_include_pad=include, channels_first=True)
    last = avg_pool(jnp.moveaxis(jnp.asarray(x), 1, -1), (3,) * rank, strides, padding, count_include_pad=include)
    bound = 3**rank * HALF_A_PLACE * abs(x).max()  # a sum of so many numbers, in any order
    assert abs(np.asarray(first) - expected).max() < bound
    assert abs(np.moveaxis(np.asarray(last), -1, 1) - expected).max() < bound
    if options.get("padding"):
        other = avg_pool(jnp.asarray(x), (3,) * rank, strides, padding, count_include_pad=not include, channels_first=True)
        assert abs(np.asarray(other) - expected).max() > 1000 * bound


def test_padding_of_transposed_convolutions_gives_torchs_lengths() -> None:
    """Lengths alone, for hundreds of settings; that the numbers are right too is shown for some in test_porting_layers.py."""
    tried = 0
    for k, stride, padding, more, dilation in product((1, 2, 3, 4, 5), (1, 2, 3), (0, 1, 2), (0, 1, 2), (1, 2)):
        if more >= max(stride, dilation) or padding > dilation * (k - 1):
            continue
        ((low, high),) = transposed_padding((k,), (padding,), (more,), (dilation,))
        expected = torch.nn.functional.conv_transpose1d(
            torch.zeros(1, 1, 7), torch.zeros(1, 1, k), stride=stride, padding=padding, output_padding=more, dilation=dilation
        ).shape[-1]
        assert (7 - 1) * stride + 1 + low + high - dilation * (k - 1) == expected
        tried += 1
    assert tried > 150


def test_momentum_is_what_is_kept() -> None:
    """After a step from 0 towards a batch of ones, torch has 0.1 of it."""
    norm = torch.nn.BatchNorm1d(1, momentum=0.1)
    norm(torch.ones(4, 1))
    assert float(norm.running_mean[0]) == pytest.approx(1.0 - kept_momentum(0.1))
