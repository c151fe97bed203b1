"""Steps of whole networks, one per line of input, which `test_bench.test_training` writes.

``python bench/networks.py ResNet-50 16 224 2 fuse``: network, batch, size, threads, and a way. A
step is forward, loss and, in training, backward and SGD's update, always on the same images. Each
way has its own process, because memory that an earlier way has used changes the speed of the next.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
import vision  # noqa: F401 - torchvision
from torchvision.models import VisionTransformer, convnext_tiny, mobilenet_v2, resnet50

import cybn.torch

CLASSES = 1000
RATE = 1e-3  # small, so that rounding grows slowly
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def double(inputs: int, channels: int) -> nn.Sequential:
    """Return two convolutions, each with GroupNorm and SiLU."""
    parts: list[nn.Module] = []
    for before in (inputs, channels):
        conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
        parts += [conv, nn.GroupNorm(8, channels), nn.SiLU(inplace=True)]
    return nn.Sequential(*parts)


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with GroupNorm and SiLU; `below` has channels of levels."""

    def __init__(self, inputs: int, channels: int, *below: int) -> None:
        super().__init__()
        self.down, self.inner = double(inputs, channels), None
        if below:
            self.inner = UNet(channels, *below)
            self.up = double(below[0] + channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        if self.inner is None:
            return y
        z = self.inner(nn.functional.max_pool2d(y, 2))
        return self.up(torch.cat([nn.functional.interpolate(z, scale_factor=2.0), y], 1))


def unet(size: int) -> nn.Module:
    """Return a U-Net that goes down and up three times, and a classifier."""
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)
    return nn.Sequential(UNet(3, 32, 64, 128, 256), *head)


def transformer(size: int) -> nn.Module:
    """Return a transformer: six blocks of width 256, with RMSNorm, over patches of 16 x 16."""
    model = VisionTransformer(size, 16, 6, 4, 256, 768, norm_layer=nn.RMSNorm)
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision sets it to 0
    return model


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "ResNet-50": lambda size: resnet50(),
    "MobileNetV2": lambda size: mobilenet_v2(dropout=0.0),
    "ConvNeXt": lambda size: convnext_tiny(stochastic_depth_prob=0.0),
    "UNet": unet,
    "transformer": transformer,
}


def arranged(model: nn.Module, words: list[str]) -> nn.Module:
    """Return a model changed by the words of a way: convert, fuse, compile, or bare (no norms)."""
    if "bare" in words:
        for name, module in list(model.named_modules()):
            if isinstance(module, NORMS):
                model.set_submodule(name, nn.Identity())
    if "convert" in words or "fuse" in words:
        model = cybn.torch.convert(model, fuse="fuse" in words)
    return torch.compile(model) if "compile" in words else model


def main() -> None:
    """Do a step for each line, and print its loss, page faults and peak memory."""
    network, *numbers, way = sys.argv[1:]
    batch, size, threads = map(int, numbers)
    words = way.split("+")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    form = torch.contiguous_format if "contiguous" in words else torch.channels_last
    model = NETWORKS[network](size)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    model = arranged(model.to(memory_format=form), words)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, generator=generator).to(memory_format=form)
    target = torch.randint(CLASSES, (batch,), generator=generator)
    torch.set_grad_enabled(model.train("inference" not in words).training)
    for _ in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in words):
            loss = nn.functional.cross_entropy(model(x), target)
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        use = resource.getrusage(resource.RUSAGE_SELF)
        faults, peak = use.ru_minflt - before, use.ru_maxrss << 10
        print(json.dumps({"loss": loss.item(), "faults": faults, "peak": peak}), flush=True)


if __name__ == "__main__":
    main()
