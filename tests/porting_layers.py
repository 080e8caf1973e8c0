"""Layers of PyTorch, and the same layers of the JAX libraries: what they are made with, and how they are called.

All layers take and give torch's order of dims here; inside, Flax has channels last and Equinox has no batch. The JAX layers are abstract:
all that they compute with comes from the conversion.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

from shardconv.porting.conventions import transposed_padding

Array = Any
nn = torch.nn
KEY = jax.random.key(0)
QUICK = {"xla_backend_optimization_level": 0}  # XLA takes longer over these layers than they run


@dataclass(frozen=True)
class Target:
    """A JAX layer: the abstract model, and how it is called with arrays of torch's order. `at` is the layer's place in the model."""

    model: Any
    call: Callable[..., Array]
    at: str = ""


@dataclass(frozen=True)
class Case:
    """A torch layer, its inputs, and the JAX layers by library. `layer` is its name where it is not the whole module.

    `unseen` are arrays that no output shows. `adjust` gives its weights a property.
    """

    module: Callable[[], Any]
    inputs: tuple[Array, ...]
    targets: Mapping[str, Callable[[], Target]]
    layer: str = ""
    unseen: tuple[str, ...] = ()
    adjust: Callable[[Any], Any] = field(default=lambda module: module)
    output: Callable[[Any], Any] = field(default=lambda found: found)


def last(x: Array) -> Array:
    return jnp.moveaxis(x, 1, -1) if x.ndim > 2 else x


def first(x: Array) -> Array:
    return jnp.moveaxis(x, -1, 1) if x.ndim > 2 else x


def numbers(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def in_linen(layer: Any, *example: Array, channels: bool = False, at: str = "", **options: Any) -> Target:
    turn, back = (last, first) if channels else (lambda x: x, lambda x: x)
    model = jax.eval_shape(lambda: layer.init(KEY, *(turn(jnp.asarray(x)) for x in example), **options))
    call = jax.jit(lambda variables, *inputs: back(layer.apply(variables, *map(turn, inputs), **options)), compiler_options=QUICK)
    return Target(model, call, at)


def in_nnx(make: Callable[[], Any], *, channels: bool = False, at: str = "", **options: Any) -> Target:
    turn, back = (last, first) if channels else (lambda x: x, lambda x: x)
    model = nnx.eval_shape(make)
    structure = nnx.graphdef(model)
    call = jax.jit(
        lambda state, *inputs: back(nnx.merge(structure, state)(*map(turn, inputs), **options)), compiler_options=QUICK
    )
    return Target(model, lambda model, *inputs: call(nnx.state(model), *inputs), at)


def in_equinox(make: Callable[[], Any], dims: int = 1, at: str = "") -> Target:
    """`dims` are the leading dims that the layer has no notion of."""

    def call(model: Any, *inputs: Array) -> Array:
        function = model
        for _ in range(dims):
            function = jax.vmap(function)
        return function(*inputs)

    return Target(eqx.filter_eval_shape(make), eqx.filter_jit(call), at)


def rngs() -> Any:
    return nnx.Rngs(0)


def shaken(module: Any) -> Any:
    """A module in eval mode with numbers everywhere: norms are not ones, running statistics not zeros."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point() and not name.endswith(("_u", "_v")):
                value.add_(0.3 * torch.rand(value.shape, generator=source) + 0.05)
    return module.eval()


# Linear, embedding, convolution

SIZES = {1: (9,), 2: (9, 8), 3: (7, 6, 7)}
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


# Norms


def batch_norm_case(rank: int, **options: Any) -> Case:
    x = numbers(4, 6, *SIZES[rank])
    affine = options.get("affine", True)
    names = {"use_scale": affine, "use_bias": affine, "epsilon": 1e-5, "use_running_average": True}

    def equinox(mode: str) -> Target:
        def make() -> Any:
            return eqx.nn.make_with_state(eqx.nn.BatchNorm)(6, "batch", channelwise_affine=affine, inference=True, mode=mode)

        def call(model: Any, x: Array) -> Array:
            layer, state = model
            return jax.vmap(lambda x: layer(x, state)[0], axis_name="batch")(x)

        return Target(eqx.filter_eval_shape(make), call)

    return Case(
        lambda: getattr(nn, f"BatchNorm{rank}d")(6, **options),
        (x,),
        {
            "linen": lambda: in_linen(linen.BatchNorm(**names), x, channels=True),
            "nnx": lambda: in_nnx(lambda: nnx.BatchNorm(6, **names, rngs=rngs()), channels=True),
            "equinox": lambda: equinox("batch"),
            "equinox ema": lambda: equinox("ema"),
        },
        unseen=("batch_counter", "ema_first_time_index"),
    )


def layer_norm_case(*shape: int, **options: Any) -> Case:
    x, dims = numbers(3, 2, *shape), tuple(range(-len(shape), 0))
    biased = options.get("bias", True)
    names = {"epsilon": 1e-5, "reduction_axes": dims, "feature_axes": dims, "use_bias": biased}
    targets = {
        "linen": lambda: in_linen(linen.LayerNorm(**names), x),
        "equinox": lambda: in_equinox(lambda: eqx.nn.LayerNorm(shape, use_bias=biased), 2),
    }
    if len(shape) == 1:
        targets["nnx"] = lambda: in_nnx(lambda: nnx.LayerNorm(shape[0], epsilon=1e-5, use_bias=biased, rngs=rngs()))
    return Case(lambda: nn.LayerNorm(shape, **options), (x,), targets)


X8, X12 = numbers(3, 5, 8), numbers(2, 12, 5, 4)
EPS = float(jnp.finfo(jnp.float32).eps)
RMS_NORM = Case(
    lambda: nn.RMSNorm(8),
    (X8,),
    {
        "linen": lambda: in_linen(linen.RMSNorm(epsilon=EPS), X8),
        "nnx": lambda: in_nnx(lambda: nnx.RMSNorm(8, epsilon=EPS, rngs=rngs())),
        "equinox": lambda: in_equinox(lambda: eqx.nn.RMSNorm(8, eps=EPS, use_bias=False), 2),
    },
)
GROUP_NORM = Case(
    lambda: nn.GroupNorm(4, 12),
    (X12,),
    {
        "linen": lambda: in_linen(linen.GroupNorm(4, epsilon=1e-5), X12, channels=True),
        "nnx": lambda: in_nnx(lambda: nnx.GroupNorm(12, num_groups=4, epsilon=1e-5, rngs=rngs()), channels=True),
        "equinox": lambda: in_equinox(lambda: eqx.nn.GroupNorm(4, 12)),
    },
)
INSTANCE_NORM = Case(
    lambda: nn.InstanceNorm2d(12, affine=True),
    (X12,),
    {
        "linen": lambda: in_linen(linen.InstanceNorm(epsilon=1e-5), X12, channels=True),
        "nnx": lambda: in_nnx(lambda: nnx.InstanceNorm(12, epsilon=1e-5, rngs=rngs()), channels=True),
        "equinox": lambda: in_equinox(lambda: eqx.nn.GroupNorm(12, 12)),
    },
)


# Attention and recurrence

Q, K, V = numbers(2, 5, 12), numbers(2, 7, 7), numbers(2, 7, 9)
ON = {"use_query_bias": True, "use_key_bias": True, "use_value_bias": True, "use_output_bias": True}
ATTENTION = Case(
    lambda: nn.MultiheadAttention(12, 3, batch_first=True),
    (Q, Q, Q),
    {
        "linen": lambda: in_linen(linen.MultiHeadDotProductAttention(3), Q, Q, Q),
        "nnx": lambda: in_nnx(lambda: nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs())),
        "equinox": lambda: in_equinox(lambda: eqx.nn.MultiheadAttention(3, 12, **ON, key=KEY)),
    },
    unseen=("key.bias", "key_proj.bias"),  # the same number on every score of a query
    output=lambda found: found[0],
)
OTHER_LENGTHS = Case(
    lambda: nn.MultiheadAttention(12, 3, kdim=7, vdim=9, batch_first=True),
    (Q, K, V),
    {
        "linen": lambda: in_linen(linen.MultiHeadDotProductAttention(3, qkv_features=12, out_features=12), Q, K, V),
        "equinox": lambda: in_equinox(
            lambda: eqx.nn.MultiheadAttention(3, 12, key_size=7, value_size=9, output_size=12, qk_size=4, vo_size=4, **ON, key=KEY)
        ),
    },
    unseen=("key.bias", "key_proj.bias"),
    output=lambda found: found[0],
)
STEPS = numbers(2, 6, 5)


class EqxSteps(eqx.Module):
    """An Equinox cell over a sequence."""

    cell: Any

    def __call__(self, x: Array) -> Array:
        size = self.cell.hidden_size
        zeros = (jnp.zeros(size), jnp.zeros(size)) if isinstance(self.cell, eqx.nn.LSTMCell) else jnp.zeros(size)

        def step(carry: Any, x: Array) -> tuple[Any, Array]:
            carry = self.cell(x, carry)
            return carry, carry[0] if isinstance(carry, tuple) else carry

        return jax.lax.scan(step, zeros, x)[1]


LSTM = Case(
    lambda: nn.LSTM(5, 4, batch_first=True),
    (STEPS,),
    {
        "linen": lambda: in_linen(linen.RNN(linen.OptimizedLSTMCell(4)), STEPS, at="cell"),
        "linen plain": lambda: in_linen(linen.RNN(linen.LSTMCell(4)), STEPS, at="cell"),
        "nnx": lambda: in_nnx(lambda: nnx.RNN(nnx.OptimizedLSTMCell(5, 4, rngs=rngs()), rngs=rngs()), at="cell"),
        "nnx plain": lambda: in_nnx(lambda: nnx.RNN(nnx.LSTMCell(5, 4, rngs=rngs()), rngs=rngs()), at="cell"),
        "equinox": lambda: in_equinox(lambda: EqxSteps(eqx.nn.LSTMCell(5, 4, key=KEY)), at="cell"),
    },
    layer="l0",
    output=lambda found: found[0],
)


def gru_case(zero: bool) -> Case:
    def adjust(module: Any) -> Any:
        with torch.no_grad():
            module.bias_hh_l0[8:] *= 0.0 if zero else 1.0
        return module

    targets = {
        "linen": lambda: in_linen(linen.RNN(linen.GRUCell(4)), STEPS, at="cell"),
        "nnx": lambda: in_nnx(lambda: nnx.RNN(nnx.GRUCell(5, 4, rngs=rngs()), rngs=rngs()), at="cell"),
        "equinox": lambda: in_equinox(lambda: EqxSteps(eqx.nn.GRUCell(5, 4, key=KEY)), at="cell"),
    }
    kept = {name: target for name, target in targets.items() if (name == "nnx") == zero}
    return Case(lambda: nn.GRU(5, 4, batch_first=True), (STEPS,), kept, layer="l0", adjust=adjust, output=lambda found: found[0])


# Weight norm, PReLU


def old_weight_norm(layer: Any) -> Any:
    with pytest.warns(FutureWarning):  # torch would rather have the new one
        return nn.utils.weight_norm(layer)


def normed_case(norm: Any, **options: Any) -> Case:
    x = numbers(2, 5, 3)
    plain = linear_case().targets
    wrapped = lambda: in_equinox(lambda: eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=KEY)), 2)  # noqa: E731
    targets = {**plain, "equinox wrapped": wrapped} if norm is not nn.utils.parametrizations.spectral_norm else plain
    return Case(lambda: norm(nn.Linear(3, 4), **options), (x,), targets)


PRELU = Case(
    lambda: nn.PReLU(),
    (X8,),
    {
        "linen": lambda: in_linen(linen.PReLU(), X8),
        "nnx": lambda: in_nnx(lambda: nnx.PReLU()),
        "equinox": lambda: in_equinox(lambda: eqx.nn.PReLU(0.1)),
    },
)
SLOPES = Case(
    lambda: nn.PReLU(12),
    (X12,),
    {"equinox": lambda: in_equinox(lambda: eqx.nn.PReLU(jnp.ones((12, 1, 1))))},
)

CASES: Mapping[str, Case] = {
    "Linear": linear_case(),
    "Linear, no bias": linear_case(bias=False),
    "Embedding": EMBEDDING,
    **{f"Conv{rank}d": conv_case(rank) for rank in (1, 2, 3)},
    "Conv2d, stride and padding": conv_case(2, stride=2, padding=1),
    "Conv2d, groups": conv_case(2, o=16, groups=4, bias=False),
    "Conv3d, groups": conv_case(3, o=16, groups=4),
    "Conv1d, depthwise": conv_case(1, o=8, groups=8),
    "Conv2d, depthwise and dilated": conv_case(2, o=8, groups=8, dilation=2, padding=2),
    "Conv2d, same": conv_case(2, i=3, o=4, kernel=(3, 3), padding="same"),
    "Conv2d, circular": conv_case(2, i=3, o=4, kernel=(3, 3), padding=1, padding_mode="circular"),
    "Conv2d, reflected": conv_case(2, i=3, o=4, kernel=(3, 3), padding=1, padding_mode="reflect"),
    "ConvTranspose2d, k=2": transposed_case(2, 2),
    "ConvTranspose2d, k=3 p=1": transposed_case(2, 3, padding=1),
    "ConvTranspose2d, k=4 s=2 p=1": transposed_case(2, 4, 2, 1),
    "ConvTranspose2d, k=3 s=2 p=1 out=1": transposed_case(2, 3, 2, 1, 1),
    "ConvTranspose2d, dilated": transposed_case(2, 3, 2, 1, 1, 2),
    "ConvTranspose2d, groups": transposed_case(2, 4, 2, 1, groups=2),
    "ConvTranspose1d": transposed_case(1, 4, 2, 1),
    "ConvTranspose3d": transposed_case(3, 3, 2, 1, 1),
    **{f"BatchNorm{rank}d": batch_norm_case(rank) for rank in (1, 2, 3)},
    "BatchNorm2d, not affine": batch_norm_case(2, affine=False),
    "LayerNorm": layer_norm_case(8),
    "LayerNorm, no bias": layer_norm_case(8, bias=False),
    "LayerNorm, two dims": layer_norm_case(5, 8),
    "RMSNorm": RMS_NORM,
    "GroupNorm": GROUP_NORM,
    "InstanceNorm2d": INSTANCE_NORM,
    "MultiheadAttention": ATTENTION,
    "MultiheadAttention, kdim and vdim": OTHER_LENGTHS,
    "LSTM": LSTM,
    "GRU": gru_case(zero=False),
    "GRU, no bias in the reset gate": gru_case(zero=True),
    "weight_norm": normed_case(nn.utils.parametrizations.weight_norm),
    "weight_norm, old": normed_case(old_weight_norm),
    "spectral_norm": normed_case(nn.utils.parametrizations.spectral_norm),
    "PReLU": PRELU,
    "PReLU, slopes": SLOPES,
}
