"""Conventions: the numbers that a JAX layer must be made with to compute what a PyTorch layer does.

They are in no array, so no conversion can set them: the same weights under another epsilon or padding load without an error and compute
something else.

    torch                              Flax (Linen, NNX)                            Equinox
    LayerNorm(eps=1e-5)                epsilon=1e-5; its default is 1e-6            the same
    RMSNorm(eps=None)                  epsilon=jnp.finfo(x.dtype).eps               eps=jnp.finfo(x.dtype).eps, use_bias=False
    GroupNorm(groups, channels)        GroupNorm(num_groups=groups)                 the same
    InstanceNorm2d(channels)           InstanceNorm()                               GroupNorm(channels, channels)
      (track_running_stats=True)       BatchNorm(use_running_average=True)          BatchNorm(inference=True)
    BatchNorm(momentum=0.1)            momentum=0.9, see `kept_momentum`            momentum=0.9, mode="batch"
    Conv2d(padding=p)                  padding=p                                    padding=p
    Conv2d(padding="same")             padding="SAME"                               the same
    Conv2d(padding_mode="circular")    padding="CIRCULAR", of half a kernel         padding_mode="CIRCULAR", padding=p
    Conv2d(padding_mode="reflect")     padding="REFLECT", of half a kernel          padding_mode="REFLECT", padding=p
    Conv2d(padding_mode="replicate")   has none, see `PAD_MODES`                    padding_mode="REPLICATE", padding=p
    ConvTranspose2d(k, s, p)           see `transposed_padding`                     the same integers
    GELU()                             gelu(approximate=False)                      the same
    MultiheadAttention                 MultiHeadDotProductAttention                 use_query_bias=True and so on
      (add_zero_attn=True)             has none                                     has none
    weight_norm(dim=0)                 WeightNorm(), its axis is the last           WeightNorm()

In training, batch norm gives the same results everywhere, but what it keeps of the variance differs: torch takes n / (n - 1) of a batch's,
n being the numbers per channel, Flax and Equinox the batch's own. Equinox's mode "ema" divides by what is kept in training too.

Flax's `WeightNorm` adds 1e-12 to the square of a row's length, torch nothing: beyond a length of 0.003 no float32 shows it. That of NNX
keeps its scales as plain arrays, which no filter for `nnx.Param` finds, and writes the product into the kernel whenever it is called.
"""

from collections.abc import Mapping, Sequence

# What `jax.numpy.pad` calls torch's padding modes: before a convolution with padding="VALID", for those, and widths, that Flax lacks.
PAD_MODES: Mapping[str, str] = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def kept_momentum(momentum: float) -> float:
    """The momentum of Flax and Equinox, the share that is kept, for torch's, the share that is replaced.

    >>> kept_momentum(0.1)
    0.9
    """
    return 1.0 - momentum


def transposed_padding(
    kernel: Sequence[int], padding: Sequence[int], output_padding: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """The `padding` of Flax's ConvTranspose for that of torch's, for each dim in space; strides are the same.

    torch says what is cut from the result, Flax what surrounds the input: `dilation * (kernel - 1) - padding` on both sides, and torch's
    `output_padding` more on the far one.

    >>> transposed_padding((4, 4), (1, 1), (0, 0), (1, 1))
    ((2, 2), (2, 2))
    """
    sides = [wide * (length - 1) - cut for length, cut, wide in zip(kernel, padding, dilation, strict=True)]
    return tuple((side, side + more) for side, more in zip(sides, output_padding, strict=True))
