"""PyTorch models that give their features: ResNet, with the names that torchvision gives its parts, and a small U-Net."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

Features = dict[str, Any]


class Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)
        self.relu = nn.ReLU()
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        else:
            self.downsample = None

    def forward(self, x: Any) -> Any:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, depths: Sequence[int] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        before = width
        for stage, depth in enumerate(depths):
            blocks = []
            for block in range(depth):
                blocks.append(Bottleneck(before, width << stage, 2 if stage and not block else 1))
                before = 4 * width << stage
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(before, classes)
        self.stages = len(depths)

    def forward(self, x: Any) -> Features:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features = {"stem": x}
        for stage in range(self.stages):
            x = features[f"stage{stage + 1}"] = getattr(self, f"layer{stage + 1}")(x)
        return {**features, "logits": self.fc(x.mean((2, 3)))}


class Double(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class UNet(nn.Module):
    def __init__(self, widths: Sequence[int] = (8, 16, 32), classes: int = 2) -> None:
        super().__init__()
        self.widths = widths
        for level, (before, after) in enumerate(zip((3, *widths), widths, strict=False)):
            self.add_module(f"down{level}", Double(before, after))
        for level, (after, before) in enumerate(pairwise(widths)):
            self.add_module(f"up{level}", nn.ConvTranspose2d(before, after, 4, 2, 1))
            self.add_module(f"merge{level}", Double(2 * after, after))
        self.out = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Any) -> Features:
        features: Features = {}
        seen = []
        for level in range(len(self.widths)):
            x = features[f"down{level}"] = getattr(self, f"down{level}")(x)
            if level < len(self.widths) - 1:
                seen.append(x)
                x = nn.functional.max_pool2d(x, 2)
        for level in reversed(range(len(self.widths) - 1)):
            x = getattr(self, f"up{level}")(x)
            x = features[f"merge{level}"] = getattr(self, f"merge{level}")(torch.cat([seen[level], x], 1))
        return {**features, "out": self.out(x)}


def shaken(module: Any, amount: float = 0.2) -> Any:
    """A module in eval mode whose norms are not ones, and whose biases and running statistics are not zeros."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point() and value.ndim == 1 and "inv_freq" not in name:
                value.add_(amount * torch.rand(value.shape, generator=source))
    return module.eval()
