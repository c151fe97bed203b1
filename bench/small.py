"""Small calls of cybn.torch: ``python bench/small.py [batch layer ...] [--kernels]``.

A converted module in turns with PyTorch's own, two threads; microseconds, the least of nine
rounds. With ``--kernels`` cybn computes small calls too: where its times become the lower ones,
the borders of ``cybn/torch/_small.py`` lie.
"""

import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import cybn.torch

ROUNDS, SECONDS = 9, 0.004
Case = tuple[Callable[[], nn.Module], Tensor]


def batches(make: Callable[[int], nn.Module]) -> Iterator[Case]:
    """Yield images of several sizes, in both memory formats."""
    for channels, side in ((64, 8), (64, 28), (64, 56), (256, 14), (256, 28), (512, 7)):
        for samples in (1, 4, 8, 16, 32):
            x = torch.randn(samples, channels, side, side)
            if x.numel() < 1 << 21:
                yield lambda c=channels: make(c), x
                yield lambda c=channels: make(c), x.to(memory_format=torch.channels_last)


def rows(make: Callable[[int], nn.Module]) -> Iterator[Case]:
    """Yield rows of several lengths."""
    for length in (64, 192, 768):
        for count in (64, 1024, 4096):
            yield lambda n=length: make(n), torch.randn(count, length)


def of_batch() -> Iterator[Case]:
    """Yield features and images."""
    for samples in (32, 512, 4096):
        yield lambda: nn.BatchNorm1d(64), torch.randn(samples, 64)
    yield from batches(nn.BatchNorm2d)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "batch": of_batch,
    "layer": lambda: rows(nn.LayerNorm),
    "rms": lambda: rows(nn.RMSNorm),
    "group": lambda: batches(lambda c: nn.GroupNorm(8, c)),
    "instance": lambda: batches(lambda c: nn.InstanceNorm2d(c, affine=True)),
}


def call(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Do a forward, and a backward where a gradient is asked for."""
    y = module(x)
    if x.requires_grad:
        y.backward(dy)
        x.grad = None


def microseconds(module: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Return the time of a call, the mean of many."""
    times = max(1, int(SECONDS / (2e-5 + 1e-9 * x.numel())))
    begun = time.perf_counter()
    for _ in range(times):
        call(module, x, dy)
    return (time.perf_counter() - begun) / times * 1e6


def main() -> None:
    """Print a line for each module, shape and mode."""
    torch.set_num_threads(2)
    kinds = [kind for kind in sys.argv[1:] if kind in CASES] or list(CASES)
    for kind in kinds:
        for make, x in CASES[kind]():
            stock = make()
            ours = cybn.torch.convert(make(), small_calls="--kernels" in sys.argv)
            found = []
            for mode in ("inference", "evaluation step", "training step"):
                given = x.detach().requires_grad_(mode != "inference")
                dy = torch.randn_like(x)
                best = [float("inf")] * 2
                with torch.set_grad_enabled(mode != "inference"):
                    for _ in range(ROUNDS):
                        for i, module in enumerate((stock, ours)):
                            module.train(mode == "training step")
                            best[i] = min(best[i], microseconds(module, given, dy))
                found.append(f"{mode} {best[0]:.0f} {best[1]:.0f} {best[1] / best[0]:.2f}")
            last = x.dim() == 4 and not x.is_contiguous()
            name = f"{kind} {x.numel():8d} {tuple(x.shape)}{' channels-last' if last else ''}"
            print(f"{name:50s} {' | '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
