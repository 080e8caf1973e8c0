"""Layers that multiply: linear ones, embeddings, convolutions, and those of them whose weights are normalised."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from porting_targets import KEY, SIZES, Array, Case, Target, first, in_equinox, in_linen, in_nnx, last, numbers, rngs

from shardconv.porting.conventions import PAD_MODES, transposed_padding

nn = torch.nn


KERNELS = {1: (3,), 2: (3, 2), 3: (3, 2, 3)}


def conv_case(rank: int, i: int = 8, o: int = 12, kernel: tuple[int, ...] | None = None, **options: Any) -> Case:
    kernel = kernel or KERNELS[rank]
    x = numbers(2, i, *SIZES[rank])
    mode = options.get("padding_mode", "zeros").upper()
    around = mode != "ZEROS"
    stride, dilation, groups = options.get("stride", 1), options.get("dilation", 1), options.get("groups", 1)
    padding = options.get("padding", 0)
    flax = mode if around else "SAME" if padding == "same" else [(padding, padding)] * rank
    names: dict[str, Any] = {
        "strides": (stride,) * rank,
        "kernel_dilation": (dilation,) * rank,
        "feature_group_count": groups,
        "padding": flax,
        "use_bias": options.get("bias", True),
    }
    there: dict[str, Any] = {"padding_mode": mode}
    there |= {"stride": stride, "dilation": dilation, "groups": groups, "use_bias": options.get("bias", True)}
    there["padding"] = padding.upper() if isinstance(padding, str) else "SAME" if around else padding
    return Case(
        lambda: getattr(nn, f"Conv{rank}d")(i, o, kernel, **options),
        (x,),
        {
            "linen": lambda: in_linen(linen.Conv(o, kernel, **names), x, channels=True),
            "nnx": lambda: in_nnx(lambda: nnx.Conv(i, o, kernel, **names, rngs=rngs()), channels=True),
            "equinox": lambda: in_equinox(lambda: getattr(eqx.nn, f"Conv{rank}d")(i, o, kernel, **there, key=KEY)),
        },
    )


class Padded(linen.Module):
    """A convolution of an input that is padded by hand."""

    mode: str
    padding: int
    stride: int

    @linen.compact
    def __call__(self, x: Array) -> Array:
        around = [(0, 0), *[(self.padding, self.padding)] * (x.ndim - 2), (0, 0)]
        x = jnp.pad(x, around, mode=PAD_MODES[self.mode])
        return linen.Conv(4, (3, 3), self.stride, padding="VALID", name="conv")(x)


def padded_case(mode: Any, padding: int, stride: int) -> Case:
    """Any padding, any mode: Flax has neither `replicate`, nor another amount than half a kernel of the two others."""
    x = numbers(2, 3, 9, 8)
    there: dict[str, Any] = {"stride": stride, "padding": padding, "padding_mode": mode.upper()}
    return Case(
        lambda: nn.Conv2d(3, 4, 3, stride, padding, padding_mode=mode),
        (x,),
        {
            "linen": lambda: in_linen(Padded(mode, padding, stride), x, channels=True, at="conv"),
            "equinox": lambda: in_equinox(lambda: eqx.nn.Conv2d(3, 4, 3, **there, key=KEY)),
        },
    )


def transposed_case(rank: int, k: int, stride: int = 1, padding: int = 0, out: int = 0, dilation: int = 1, groups: int = 1) -> Case:
    i, o, kernel = 4, 6, (k,) * rank
    x = numbers(2, i, *SIZES[rank])
    sides = transposed_padding(kernel, (padding,) * rank, (out,) * rank, (dilation,) * rank)
    names = {"strides": (stride,) * rank, "kernel_dilation": (dilation,) * rank, "padding": sides}
    targets: dict[str, Callable[[], Target]] = {}
    for turned in (True, False):
        options = {**names, "transpose_kernel": turned}
        word = "" if turned else " untransposed"
        targets[f"linen{word}"] = lambda options=options: in_linen(linen.ConvTranspose(o, kernel, **options), x, channels=True)
        targets[f"nnx{word}"] = lambda options=options: in_nnx(
            lambda: nnx.ConvTranspose(i, o, kernel, **options, rngs=rngs()), channels=True
        )
    there = {"stride": stride, "padding": padding, "output_padding": out, "dilation": dilation, "groups": groups}
    kind = f"ConvTranspose{rank}d"
    targets["equinox"] = lambda: in_equinox(lambda: getattr(eqx.nn, kind)(i, o, kernel, **there, key=KEY))
    return Case(lambda: getattr(nn, kind)(i, o, kernel, stride, padding, out, groups, dilation=dilation), (x,), targets)


def linear_case(**options: Any) -> Case:
    x, bias = numbers(2, 5, 3), options.get("bias", True)
    return Case(
        lambda: nn.Linear(3, 4, **options),
        (x,),
        {
            "linen": lambda: in_linen(linen.Dense(4, use_bias=bias), x),
            "nnx": lambda: in_nnx(lambda: nnx.Linear(3, 4, use_bias=bias, rngs=rngs())),
            "equinox": lambda: in_equinox(lambda: eqx.nn.Linear(3, 4, use_bias=bias, key=KEY), 2),
        },
    )


TOKENS = np.array([[1, 7, 3], [9, 0, 2]], np.int32)
EMBEDDING = Case(
    lambda: nn.Embedding(10, 6),
    (TOKENS,),
    {
        "linen": lambda: in_linen(linen.Embed(10, 6), TOKENS),
        "nnx": lambda: in_nnx(lambda: nnx.Embed(10, 6, rngs=rngs())),
        "equinox": lambda: in_equinox(lambda: eqx.nn.Embedding(10, 6, key=KEY), 2),
    },
)


# Weight norm


def old_weight_norm(layer: Any) -> Any:
    with pytest.warns(FutureWarning):  # torch would rather have the new one
        return nn.utils.weight_norm(layer)


class Beside(linen.Module):
    """A layer that Linen keeps beside its WeightNorm."""

    axis: int | None

    @linen.compact
    def __call__(self, x: Array) -> Array:
        return linen.WeightNorm(linen.Dense(4), feature_axes=self.axis)(x)


def wrapped_in_nnx(make: Callable[[], Any], axis: int | None = -1, channels: bool = False) -> Target:
    """A layer in NNX's WeightNorm, which must be called as it is: scales are no part of an abstract model's structure."""
    turn, back = (last, first) if channels else (lambda x: x, lambda x: x)
    model = nnx.eval_shape(lambda: nnx.WeightNorm(make(), feature_axes=axis, rngs=rngs()))
    return Target(model, lambda model, x: back(model(turn(x))))


def normed_case(norm: Any, axis: int | None = -1, **options: Any) -> Case:
    """A weight-normalised Linear in plain layers, and in those with a WeightNorm; Flax's axes are given for torch's `dim`."""
    x = numbers(2, 5, 3)
    normed: dict[str, Callable[[], Target]] = {
        "linen beside": lambda: in_linen(Beside(axis), x, at="Dense_0"),
        "linen inside": lambda: in_linen(linen.WeightNorm(linen.Dense(4), feature_axes=axis), x),
        "nnx inside": lambda: wrapped_in_nnx(lambda: nnx.Linear(3, 4, rngs=rngs()), axis),
    }
    if axis == -1:
        normed["equinox wrapped"] = lambda: in_equinox(lambda: eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=KEY)), 2)
    if norm is nn.utils.parametrizations.spectral_norm:
        normed = {}
    return Case(lambda: norm(nn.Linear(3, 4), **options), (x,), {**linear_case().targets, **normed})


def weight_normed(case: Case) -> Case:
    return replace(case, module=lambda: nn.utils.parametrizations.weight_norm(case.module()))


def normed_conv_case() -> Case:
    x, plain = numbers(2, 8, 9), conv_case(1, o=8, groups=4)
    options: dict[str, Any] = {"feature_group_count": 4, "padding": "VALID"}
    normed: dict[str, Callable[[], Target]] = {
        "linen inside": lambda: in_linen(linen.WeightNorm(linen.Conv(8, (3,), **options)), x, channels=True),
        "nnx inside": lambda: wrapped_in_nnx(lambda: nnx.Conv(8, 8, (3,), **options, rngs=rngs()), channels=True),
        "equinox wrapped": lambda: in_equinox(lambda: eqx.nn.WeightNorm(eqx.nn.Conv1d(8, 8, 3, groups=4, key=KEY))),
    }
    return replace(weight_normed(plain), targets={**plain.targets, **normed})


PRODUCTS: Mapping[str, Case] = {
    "Linear": linear_case(),
    "Linear, no bias": linear_case(bias=False),
    "Embedding": EMBEDDING,
    **{f"Conv{rank}d": conv_case(rank) for rank in (1, 2, 3)},
    "Conv2d, stride and padding": conv_case(2, stride=2, padding=1),
    "Conv2d, groups": conv_case(2, o=16, groups=4, bias=False),
    "Conv3d, groups": conv_case(3, o=16, groups=4),
    "Conv1d, depthwise": conv_case(1, o=8, groups=8),
    "Conv2d, depthwise and dilated": conv_case(2, o=8, groups=8, dilation=2, padding=2),
    "Conv2d, strided and dilated": conv_case(2, o=4, stride=2, dilation=2, padding=3),
    "Conv2d, same": conv_case(2, i=3, o=4, kernel=(3, 3), padding="same"),
    "Conv2d, same, even and dilated": conv_case(2, i=3, o=4, kernel=(4, 2), dilation=2, padding="same"),
    "Conv2d, circular": conv_case(2, i=3, o=4, kernel=(3, 3), padding=1, padding_mode="circular"),
    "Conv2d, reflected": conv_case(2, i=3, o=4, kernel=(3, 3), padding=1, padding_mode="reflect"),
    **{
        f"Conv2d, {mode} of any width": padded_case(mode, padding, 2)
        for mode, padding in (("replicate", 2), ("reflect", 2), ("circular", 3))
    },
    "ConvTranspose2d, k=2": transposed_case(2, 2),
    "ConvTranspose2d, k=3 p=1": transposed_case(2, 3, padding=1),
    "ConvTranspose2d, k=4 s=2 p=1": transposed_case(2, 4, 2, 1),
    "ConvTranspose2d, k=3 s=2 p=1 out=1": transposed_case(2, 3, 2, 1, 1),
    "ConvTranspose2d, dilated": transposed_case(2, 3, 2, 1, 1, 2),
    "ConvTranspose2d, groups": transposed_case(2, 4, 2, 1, groups=2),
    "ConvTranspose1d": transposed_case(1, 4, 2, 1),
    "ConvTranspose1d, dilated, groups": transposed_case(1, 3, 2, 1, 1, 2, groups=2),
    "ConvTranspose3d": transposed_case(3, 3, 2, 1, 1),
    "ConvTranspose3d, dilated, groups": transposed_case(3, 2, 2, 1, 1, 2, groups=2),
    "weight_norm": normed_case(nn.utils.parametrizations.weight_norm),
    "weight_norm, old": normed_case(old_weight_norm),
    "weight_norm, dim=1": normed_case(nn.utils.parametrizations.weight_norm, -2, dim=1),
    "weight_norm, dim=None": normed_case(nn.utils.parametrizations.weight_norm, None, dim=None),
    "weight_norm of Conv1d, groups": normed_conv_case(),
    "weight_norm of ConvTranspose1d": weight_normed(transposed_case(1, 4, 2, 1)),
    "spectral_norm": normed_case(nn.utils.parametrizations.spectral_norm),
}
