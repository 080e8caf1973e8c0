"""ResNet in Flax Linen, written by hand, for a checkpoint with torchvision's names. `MAPPING` is all that its port needs.

    variables = jax.eval_shape(ResNet().init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
    variables = shardconv.convert_module(torch_resnet50, variables, MAPPING)
    features = ResNet().apply(variables, images)          # images are (batch, height, width, 3)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

MAPPING = {
    "stem": "conv1",
    "stem_norm": "bn1",
    "stage{s}_block{b}": "layer{s}.{b}",
    "stage{s}_block{b}.norm{n}": "layer{s}.{b}.bn{n}",
    "stage{s}_block{b}.shortcut": "layer{s}.{b}.downsample.0",
    "stage{s}_block{b}.shortcut_norm": "layer{s}.{b}.downsample.1",
    "head": "fc",
}

# torch pads by 1 on both sides where Flax's "SAME" may pad one side more, which matters where strides are 2.
CONV = partial(nn.Conv, use_bias=False)
NORM = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5, momentum=0.9)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    width: int
    stride: int
    widen: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) to the same, `stride` times smaller, of 4 * `width` channels."""
        y = nn.relu(NORM(name="norm1")(CONV(self.width, (1, 1), name="conv1")(x)))
        y = CONV(self.width, (3, 3), (self.stride, self.stride), padding=1, name="conv2")(y)
        y = NORM(name="norm3")(CONV(4 * self.width, (1, 1), name="conv3")(nn.relu(NORM(name="norm2")(y))))
        if self.widen:
            x = CONV(4 * self.width, (1, 1), (self.stride, self.stride), name="shortcut")(x)
            x = NORM(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-50 unless told otherwise; gives what comes out of the stem, of each stage, and the logits."""

    depths: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, Any]:
        """Features of images (batch, height, width, 3), by name."""
        x = CONV(self.width, (7, 7), (2, 2), padding=3, name="stem")(x)
        x = nn.relu(NORM(name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        features = {"stem": x}
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                x = Bottleneck(self.width << stage, stride, not block, name=f"stage{stage + 1}_block{block}")(x)
            features[f"stage{stage + 1}"] = x
        return {**features, "logits": nn.Dense(self.classes, name="head")(x.mean((1, 2)))}


def make_model() -> Any:
    """ResNet-50's variables, as `[target] layout = "examples.resnet:make_model"` has it."""
    return ResNet().init(jax.random.key(0), jnp.ones((1, 64, 64, 3)))
