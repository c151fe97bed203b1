"""Training steps of whole networks in plain PyTorch, one each time a line comes in.

``python bench/training.py ResNet-50 convert 16 224 2``: network, contestant, batch, size, threads.
A process of its own, as memory that one contestant leaves behind changes what the next one pays
for. A step is forward, loss, backward and SGD's update, on the same images every time.

ResNet-50 (He et al. 2015) and MobileNetV2 (Sandler et al. 2018) are written as they usually are:
ResNet's blocks share one in-place ReLU, MobileNet's stages are `nn.Sequential`s.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import cybn.torch

CLASSES = 1000
RATE = 1e-3  # small, so that rounding grows slowly


def conv_bn(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list:
    """Return a convolution, its batch norm and ReLU6."""
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU6(inplace=True)]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the stride sits on the 3x3."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out, self.relu, self.downsample = width * 4, nn.ReLU(inplace=True), None
        self.conv1, self.bn1, _ = conv_bn(channels, width, 1)
        self.conv2, self.bn2, _ = conv_bn(width, width, 3, stride)
        self.conv3, self.bn3, _ = conv_bn(width, out, 1)
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(*conv_bn(channels, out, 1, stride)[:2])

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        y += identity
        return self.relu(y)


def resnet50() -> nn.Module:
    """Return a stem, four stages of bottlenecks, and a classifier."""
    layers = [*conv_bn(3, 64, 7, 2)[:2], nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for i, count in enumerate((3, 4, 6, 3)):
        for j in range(count):
            layers.append(Bottleneck(channels, 64 << i, 2 if i and j == 0 else 1))
            channels = 256 << i
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))
    return nn.Sequential(*layers, *head)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the shortcut joins the narrow ends."""

    def __init__(self, channels: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = channels * expand
        layers = conv_bn(channels, wide, 1) if expand != 1 else []
        layers += [*conv_bn(wide, wide, 3, stride, groups=wide), *conv_bn(wide, out, 1)[:2]]
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


def mobilenet_v2() -> nn.Module:
    """Return table 2 of the paper, at width 1: expand, channels, repeats, stride."""
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)]
    stages += [(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    layers, channels = conv_bn(3, 32, 3, 2), 32
    for expand, out, repeats, stride in stages:
        for i in range(repeats):
            layers.append(InvertedResidual(channels, out, 1 if i else stride, expand))
            channels = out
    layers += conv_bn(channels, 1280, 1)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, CLASSES))
    return nn.Sequential(*layers, *head)


def without_batch_norm(model: nn.Module) -> nn.Module:
    """Replace every batch norm by nothing, in place: what is left is the time of the rest."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


NETWORKS = {"ResNet-50": resnet50, "MobileNetV2": mobilenet_v2}
CONTESTANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "PyTorch": lambda model: model,
    "cybn, convert": cybn.torch.convert,
    "cybn, convert, fuse": lambda model: cybn.torch.convert(model, fuse=True),
    "no batch norm": without_batch_norm,
}


def main() -> None:
    """Do a step for each line, and answer with its loss, page faults and peak memory."""
    network, contestant, *numbers = sys.argv[1:]
    batch, size, threads = map(int, numbers)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = NETWORKS[network]()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    model = CONTESTANTS[contestant](model)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, generator=generator)
    target = torch.randint(CLASSES, (batch,), generator=generator)
    for _ in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        use = resource.getrusage(resource.RUSAGE_SELF)
        told = {"loss": loss.item(), "faults": use.ru_minflt - before, "peak": use.ru_maxrss << 10}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
