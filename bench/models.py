"""Training steps of five models, stock and converted: the table of docs/pytorch.md.

``python bench/models.py MobileNetV2 32 [--rounds 5] [--of stock convert ...]``; the models are
ResNet-50, MobileNetV2, ConvNeXt, UNet and transformer, the number is the batch. A step is forward,
loss, backward and SGD's update on the same images each time, on two threads. Every way has a
process of its own, and they take turns, after two steps that are not counted. Printed are medians,
and the median, lowest and highest of the gains over the first way within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from training import CLASSES, NETWORKS, RATE

import cybn.torch

THREADS, WARM = 2, 2


class ConvNextBlock(nn.Module):
    """A depthwise convolution, LayerNorm and GELU over the channels, and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        wide = 4 * channels
        self.mlp = nn.Sequential(nn.Linear(channels, wide), nn.GELU(), nn.Linear(wide, channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    """A layer norm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """Return ConvNeXt-T (Liu et al. 2022) with a third of its blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, 96, 4, 4), LayerNorm2d(96, eps=1e-6)]
    for channels, count in ((96, 1), (192, 1), (384, 3), (768, 1)):
        if channels > 96:
            half = channels // 2
            layers += [LayerNorm2d(half, eps=1e-6), nn.Conv2d(half, channels, 2, 2)]
        layers += [ConvNextBlock(channels) for _ in range(count)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(768), nn.Linear(768, CLASSES)
    return nn.Sequential(*layers, *head)


def double(inputs: int, channels: int) -> nn.Sequential:
    """Return two convolutions, each with GroupNorm and SiLU."""
    parts: list[nn.Module] = []
    for before in (inputs, channels):
        conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
        parts += [conv, nn.GroupNorm(8, channels), nn.SiLU(inplace=True)]
    return nn.Sequential(*parts)


class UNet(nn.Module):
    """Three times down and up again (Ronneberger et al. 2015), with GroupNorm and SiLU."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (32, 64, 128, 256)
        self.down = nn.ModuleList(double(a, b) for a, b in zip((3, *sizes), sizes, strict=False))
        self.up = nn.ModuleList(double(3 * size, size) for size in sizes[-2::-1])
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if i else x)
            seen.append(x)
        seen.pop()
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, seen.pop()], 1))
        return self.head(x)


class TransformerBlock(nn.Module):
    """Attention and a gated MLP, each after RMSNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 6 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1)
        y = nn.functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        gate, value = self.wide(self.norms[1](x)).chunk(2, -1)
        return x + self.narrow(nn.functional.silu(gate) * value)


def transformer() -> nn.Module:
    """Return six blocks of width 256 over patches of 16 x 16."""
    patches = nn.Conv2d(3, 256, 16, 16), nn.Flatten(2)
    blocks = [TransformerBlock(256, 4) for _ in range(6)]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.blocks = nn.Sequential(*patches), nn.Sequential(*blocks)
            self.norm, self.head = nn.RMSNorm(256), nn.Linear(256, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y = self.blocks(self.patches(x).transpose(1, 2))
            return self.head(self.norm(y).mean(1))

    return Model()


MODELS: dict[str, Callable[[], nn.Module]] = {
    **NETWORKS,
    "ConvNeXt": convnext,
    "UNet": UNet,
    "transformer": transformer,
}
WAYS = {  # what is done to a model, in words: the first is the one that gains are over
    "channels-last": "",
    "contiguous": "contiguous",
    "convert": "convert",
    "fuse": "fuse",
    "compile": "compile",
    "convert, compile": "convert compile",
    "bfloat16": "bfloat16",
    "bfloat16, convert": "bfloat16 convert",
    "bfloat16, fuse": "bfloat16 fuse",
}


def work(name: str, batch: int, way: str) -> None:
    """Do a step for each line that comes in, and answer with its seconds and its loss."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    words = WAYS[way].split()
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    form = torch.contiguous_format if "contiguous" in words else torch.channels_last
    model = model.to(memory_format=form)
    if "convert" in words or "fuse" in words:
        model = cybn.torch.convert(model, fuse="fuse" in words)
    run = torch.compile(model) if "compile" in words else model
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 224, 224, generator=generator).to(memory_format=form)
    target = torch.randint(CLASSES, (batch,), generator=generator)
    for _ in sys.stdin:
        begun = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in words):
            loss = nn.functional.cross_entropy(run(x), target)
        loss.backward()
        optimizer.step()
        print(json.dumps([time.perf_counter() - begun, loss.item()]), flush=True)


def step(process: subprocess.Popen[str]) -> Any:
    """Let a process do a step, and return what it tells."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


def main() -> None:
    """Print a table of the ways that a model is trained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("batch", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--of", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--work", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.model, given.batch, given.work)
        return
    seconds: dict[str, list[float]] = {way: [] for way in given.of}
    losses: dict[str, float] = {}
    with ExitStack() as stack:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, __file__, given.model, str(given.batch), "--work"]
        running = {
            way: stack.enter_context(subprocess.Popen([*command, way], **pipes)) for way in seconds
        }
        for turn in range(WARM + given.rounds):
            for way, process in running.items():
                taken, loss = step(process)
                losses.setdefault(way, loss)
                if turn >= WARM:
                    seconds[way].append(taken)
    first = seconds[given.of[0]]
    for way, own in seconds.items():
        gains = sorted(a / b for a, b in zip(first, own, strict=True))
        print(
            f"| {given.model}, {given.batch} | {way} | {statistics.median(own):.3f} s "
            f"| {statistics.median(gains):.2f} | {gains[0]:.2f}, {gains[-1]:.2f} "
            f"| {losses[way]:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
