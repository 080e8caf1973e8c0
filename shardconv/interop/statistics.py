"""Batch norm that keeps its statistics: torchax computes what a batch comes to, and forgets what torch would have written."""

from typing import Any

import jax.numpy as jnp
from torchax.ops.jaten import _aten_native_batch_norm

from shardconv.interop.views import copied


def batch_norm(environment: Any, *args: Any) -> Any:
    """aten's batch norm of wrapped tensors: input, weight, bias, running mean, running variance, training, momentum, epsilon.

    In training the running statistics are written, in place as torch does: a share of the batch's mean, and of its variance times
    n / (n - 1), n being the numbers per channel.
    """
    arrays = environment.t2j_iso(args)
    x, _, _, mean, variance, training, momentum, _ = arrays
    if training and mean is not None:
        axes, count = [axis for axis in range(x.ndim) if axis != 1], x.size // x.shape[1]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        for kept, old, new in ((args[3], mean, wide.mean(axes)), (args[4], variance, wide.var(axes) * (count / (count - 1)))):
            copied(kept, environment.j2t_iso((1 - momentum) * old + momentum * new), environment)
    return environment.j2t_iso(_aten_native_batch_norm(*arrays))
