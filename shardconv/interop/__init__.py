"""PyTorch code as JAX functions, by tracing it: on torchax, which is optional and loaded at the first call.

    environment   torchax, with what its import changes put back, and what it lacks
    arrays        tensors and arrays, bit for bit
    traced        modules and functions: `torch_in_jax`, `t2j`, `j2t`
"""

from shardconv.interop.arrays import j2t
from shardconv.interop.environment import require_torchax
from shardconv.interop.traced import t2j, torch_in_jax, weightless

__all__ = ["j2t", "require_torchax", "t2j", "torch_in_jax", "weightless"]
