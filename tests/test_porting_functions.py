"""What layers are made with, and pooling: against torch."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax")
pytest.importorskip("equinox")

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import linen, nnx  # noqa: E402

import shardconv  # noqa: E402
from shardconv.porting.conventions import kept_momentum, transposed_padding  # noqa: E402
from shardconv.porting.pooling import avg_pool  # noqa: E402

HALF_A_PLACE = 2.0**-24
Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
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


STEP = np.random.default_rng(0).standard_normal((2, 3, 3, 2)).astype(np.float32) * 2 + 1


def trained(library: str, norm: Any) -> tuple[Array, Array, Array]:
    """A batch norm's results of a step of training, channels first, and the mean and variance that it keeps then."""
    last = jnp.asarray(np.moveaxis(STEP, 1, -1))
    options: dict[str, Any] = {"momentum": kept_momentum(norm.momentum), "epsilon": norm.eps}
    if library == "linen":
        layer = linen.BatchNorm(use_running_average=False, **options)
        variables = shardconv.convert_module(norm, jax.eval_shape(layer.init, jax.random.key(0), last), {"": ""})
        y, after = layer.apply(variables, last, mutable=["batch_stats"])
        kept = after["batch_stats"]["mean"], after["batch_stats"]["var"]
    elif library == "nnx":
        model = nnx.eval_shape(lambda: nnx.BatchNorm(3, **options, rngs=nnx.Rngs(0)))
        model = shardconv.convert_module(norm, model, {"": ""})
        y = model(last, use_running_average=False)
        kept = model.mean[...], model.var[...]
    else:
        make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
        empty = eqx.filter_eval_shape(make, 3, "batch", eps=norm.eps, momentum=options["momentum"], mode="batch")
        module, state = shardconv.convert_module(norm, empty, {"": ""})
        y, state = jax.vmap(lambda x: module(x, state), axis_name="batch", out_axes=(0, None))(jnp.asarray(STEP))
        kept = state.get(module.batch_state_index)
    return np.asarray(y if library == "equinox" else jnp.moveaxis(y, -1, 1)), np.asarray(kept[0]), np.asarray(kept[1])


@pytest.mark.parametrize("library", ["linen", "nnx", "equinox"])
def test_a_step_of_training_differs_from_torchs_in_the_variance_that_is_kept(library: str) -> None:
    """torch keeps n / (n - 1) of a batch's variance, the others the variance itself: `conventions` says so."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3, momentum=0.3)
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value.copy_(torch.rand(3) + 0.5)
    old = norm.running_var.numpy().copy()
    y, mean, variance = trained(library, norm)
    expected = norm.train()(torch.from_numpy(STEP)).detach().numpy()
    found_mean, found_variance = norm.running_mean.numpy(), norm.running_var.numpy()
    assert abs(y - expected).max() < 2e-6
    assert abs(mean - found_mean).max() < 1e-6
    assert abs(variance - found_variance).max() > 0.05
    count = STEP.size / 3
    assert abs(0.7 * old + (variance - 0.7 * old) * count / (count - 1) - found_variance).max() < 1e-6


def test_momentum_is_what_is_kept() -> None:
    """After a step from 0 towards a batch of ones, torch has 0.1 of it."""
    norm = torch.nn.BatchNorm1d(1, momentum=0.1)
    norm(torch.ones(4, 1))
    assert float(norm.running_mean[0]) == pytest.approx(1.0 - kept_momentum(0.1))


def test_flax_has_no_other_padding_than_conventions_says() -> None:
    x = jnp.ones((1, 5, 5, 1))
    for mode in ("REPLICATE", "EDGE"):
        with pytest.raises(RuntimeError, match=f"Unrecognized padding type.*{mode}"):
            linen.Conv(1, (3, 3), padding=mode).init(jax.random.key(0), x)
    wide = linen.Conv(1, (3, 3), padding="CIRCULAR").init_with_output(jax.random.key(0), x)[0]
    assert wide.shape == x.shape  # half a kernel on each side, and no way to say more
