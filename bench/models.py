"""ResNet-50 (He et al. 2015) and MobileNetV2 (Sandler et al. 2018) in plain PyTorch.

Written as they are usually written: ResNet's blocks share one in-place ReLU, MobileNet's stages are
`nn.Sequential`s. Only convolutions, batch norms, activations, pooling and one linear layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the stride sits on the 3x3."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += identity
        return self.relu(y)


class ResNet(nn.Module):
    """A stem, four stages of bottlenecks, and a classifier."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, channels = [], 64
        for i, count in enumerate(blocks):
            width = 64 << i
            stage = []
            for j in range(count):
                stage.append(Bottleneck(channels, width, 2 if i and j == 0 else 1))
                channels = width * Bottleneck.expansion
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.stages(x).mean((2, 3)))


def conv_bn_relu6(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list:
    """Return a convolution, its batch norm and ReLU6."""
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU6(inplace=True)]


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the shortcut joins the narrow ends."""

    def __init__(self, channels: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = channels * expand
        layers = conv_bn_relu6(channels, wide, 1) if expand != 1 else []
        layers += conv_bn_relu6(wide, wide, 3, stride, groups=wide)
        layers += [nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class MobileNetV2(nn.Module):
    """Table 2 of the paper, at width 1."""

    STAGES = (  # expand, channels, repeats, stride
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    )

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers, channels = conv_bn_relu6(3, 32, 3, 2), 32
        for expand, out, repeats, stride in self.STAGES:
            for i in range(repeats):
                layers.append(InvertedResidual(channels, out, 1 if i else stride, expand))
                channels = out
        layers += conv_bn_relu6(channels, 1280, 1)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet-50": ResNet, "MobileNetV2": MobileNetV2}


def without_batch_norm(model: nn.Module) -> nn.Module:
    """Replace every batch norm by nothing, in place: what is left is the time of the rest."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


def initialized(name: str, seed: int = 0) -> nn.Module:
    """Return a model whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return model
