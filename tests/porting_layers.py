"""All layers by name; here those that normalise, attend, remember or bend, and `porting_products` has the others."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import torch
from flax import linen, nnx
from porting_products import PRODUCTS
from porting_targets import KEY, SIZES, Array, Case, Target, in_equinox, in_linen, in_nnx, numbers, rngs

nn = torch.nn


# Norms


def batch_norm_case(rank: int, **options: Any) -> Case:
    x = numbers(4, 6, *SIZES[rank])
    affine = options.get("affine", True)
    names = {"use_scale": affine, "use_bias": affine, "epsilon": 1e-5, "use_running_average": True}

    def equinox(mode: Any) -> Target:
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
TRACKED = replace(batch_norm_case(2), module=lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True))


def instance_norm_case(rank: int) -> Case:
    x = numbers(2, 12, *SIZES[rank])
    return Case(
        lambda: getattr(nn, f"InstanceNorm{rank}d")(12, affine=True),
        (x,),
        {
            "linen": lambda: in_linen(linen.InstanceNorm(epsilon=1e-5), x, channels=True),
            "nnx": lambda: in_nnx(lambda: nnx.InstanceNorm(12, epsilon=1e-5, rngs=rngs()), channels=True),
            "equinox": lambda: in_equinox(lambda: eqx.nn.GroupNorm(12, 12)),
        },
    )


# Attention and recurrence

Q, K, V = numbers(2, 5, 12), numbers(2, 7, 7), numbers(2, 7, 9)
ON = {"use_query_bias": True, "use_key_bias": True, "use_value_bias": True, "use_output_bias": True}


def attention_case(biased: bool = True) -> Case:
    return Case(
        lambda: nn.MultiheadAttention(12, 3, bias=biased, batch_first=True),
        (Q, Q, Q),
        {
            "linen": lambda: in_linen(linen.MultiHeadDotProductAttention(3, use_bias=biased), Q, Q, Q),
            "nnx": lambda: in_nnx(lambda: nnx.MultiHeadAttention(3, 12, use_bias=biased, decode=False, rngs=rngs())),
            "equinox": lambda: in_equinox(lambda: eqx.nn.MultiheadAttention(3, 12, **(ON if biased else {}), key=KEY)),
        },
        unseen=("key.bias", "key_proj.bias"),  # the same number on every score of a query
        output=lambda found: found[0],
    )


OTHER_LENGTH = Case(
    lambda: nn.MultiheadAttention(12, 3, kdim=7, vdim=7, batch_first=True),
    (Q, K, K),
    {"nnx": lambda: in_nnx(lambda: nnx.MultiHeadAttention(3, 12, in_kv_features=7, decode=False, rngs=rngs()))},
    unseen=("key.bias",),
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


NO_BIAS = {"bias": False, "batch_first": True}
LSTM_WITHOUT_BIASES = replace(
    LSTM,
    module=lambda: nn.LSTM(5, 4, **NO_BIAS),
    targets={
        **{name: target for name, target in LSTM.targets.items() if name != "equinox"},
        "equinox": lambda: in_equinox(lambda: EqxSteps(eqx.nn.LSTMCell(5, 4, use_bias=False, key=KEY)), at="cell"),
    },
)
GRUS: Mapping[str, Callable[[], Target]] = {
    "linen": lambda: in_linen(linen.RNN(linen.GRUCell(4)), STEPS, at="cell"),
    "nnx": lambda: in_nnx(lambda: nnx.RNN(nnx.GRUCell(5, 4, rngs=rngs()), rngs=rngs()), at="cell"),
    "equinox": lambda: in_equinox(lambda: EqxSteps(eqx.nn.GRUCell(5, 4, key=KEY)), at="cell"),
}


def gru_case(*libraries: str, zero: bool = False, **options: Any) -> Case:
    def adjust(module: Any) -> Any:
        with torch.no_grad():
            if zero:
                module.bias_hh_l0[8:] = 0.0
        return module

    kept = {name: GRUS[name] for name in libraries}
    return Case(lambda: nn.GRU(5, 4, **options, batch_first=True), (STEPS,), kept, "l0", adjust=adjust, output=lambda found: found[0])


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
    **PRODUCTS,
    **{f"BatchNorm{rank}d": batch_norm_case(rank) for rank in (1, 2, 3)},
    "BatchNorm2d, not affine": batch_norm_case(2, affine=False),
    "SyncBatchNorm": replace(batch_norm_case(2), module=lambda: nn.SyncBatchNorm(6)),
    "LayerNorm": layer_norm_case(8),
    "LayerNorm, no bias": layer_norm_case(8, bias=False),
    "LayerNorm, two dims": layer_norm_case(5, 8),
    "RMSNorm": RMS_NORM,
    "GroupNorm": GROUP_NORM,
    "InstanceNorm1d": instance_norm_case(1),
    "InstanceNorm2d": instance_norm_case(2),
    "InstanceNorm3d": instance_norm_case(3),
    "InstanceNorm2d, running statistics": TRACKED,
    "MultiheadAttention": attention_case(),
    "MultiheadAttention, no bias": attention_case(biased=False),
    "MultiheadAttention, kdim is vdim": OTHER_LENGTH,
    "MultiheadAttention, kdim and vdim": OTHER_LENGTHS,
    "LSTM": LSTM,
    "LSTM, no bias": LSTM_WITHOUT_BIASES,
    "GRU": gru_case("linen", "equinox"),
    "GRU, no bias": gru_case("linen", "nnx", bias=False),
    "GRU, no bias in the reset gate": gru_case("nnx", zero=True),
    "PReLU": PRELU,
    "PReLU, slopes": SLOPES,
}
