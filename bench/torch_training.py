"""Training steps of real networks: stock PyTorch, cybn.torch, and no batch norm at all.

    python bench/torch_training.py                      both networks, 224x224; about five minutes
    python bench/torch_training.py --models MobileNetV2 --rounds 3
    python bench/torch_training.py --keep-memory        tell glibc to keep freed memory
    python bench/torch_training.py --curves             compare loss curves, do not time
    python bench/torch_training.py --markdown FILE      write the tables there as well

A step is forward, loss and backward. Each contestant has a process of its own, as memory that one
leaves behind changes what the next one pays for; they take turns, so that a slow minute of the
machine meets them all. Figures are medians over rounds; a gain is the median of the ratios
of turns that follow each other.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from models import MODELS, initialized, without_batch_norm
from torch import nn

import cybn.torch
from cybn.bench.machine import machine

BATCH = {"ResNet-50": 16, "MobileNetV2": 32}
CLASSES = 1000
STEPS = 30  # of a loss curve
RATE = 1e-3  # small, so that rounding grows slowly
KEEP_MEMORY = {  # glibc: do not give memory back to the system between steps
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}

CONTESTANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "PyTorch": lambda model: model,
    "convert": cybn.torch.convert,
    "convert, fuse": lambda model: cybn.torch.convert(model, fuse=True),
    "no batch norm": without_batch_norm,
}


class Turn(NamedTuple):
    """What one step took."""

    seconds: float
    faults: int  # pages
    peak: int  # bytes, of the process so far


def training_step(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Do forward, loss and backward; return the loss."""
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), target)
    loss.backward()
    return loss.detach()


def data(batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels that are the same in every process."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, generator=generator)
    return x, torch.randint(CLASSES, (batch,), generator=generator)


# ---- time --------------------------------------------------------------------------------


def work(pipe: Connection, name: str, contestant: str, batch: int, size: int, threads: int) -> None:
    """Do a step each time the pipe says so; runs in a process of its own."""
    torch.set_num_threads(threads)
    model = CONTESTANTS[contestant](initialized(name))
    x, target = data(batch, size)
    while pipe.recv():
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        training_step(model, x, target)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        pipe.send(Turn(seconds, after.ru_minflt - before.ru_minflt, after.ru_maxrss << 10))


def race(name: str, args: argparse.Namespace) -> dict[str, list[Turn]]:
    """Return the turns of each contestant, taken alternately."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for contestant in args.contestants:
        pipes[contestant], end = context.Pipe()
        job = (end, name, contestant, args.batch or BATCH[name], args.size, args.threads)
        processes.append(context.Process(target=work, args=job, daemon=True))
        processes[-1].start()
    turns: dict[str, list[Turn]] = {contestant: [] for contestant in args.contestants}
    for i in range(args.warmup + args.rounds):
        for contestant, pipe in pipes.items():
            pipe.send(True)
            turn = pipe.recv()
            if i >= args.warmup:
                turns[contestant].append(turn)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    return turns


def time_table(name: str, turns: dict[str, list[Turn]], args: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    yield f"Batch {args.batch or BATCH[name]}, {args.size}x{args.size}"
    yield ""
    yield "| | step | gain | lowest, highest | page faults | peak memory |"
    yield "|---|---|---|---|---|---|"
    for contestant, own in turns.items():
        gains = [a.seconds / b.seconds for a, b in zip(turns["PyTorch"], own, strict=True)]
        yield (
            f"| {contestant} | {median(t.seconds for t in own):.2f} s | {median(gains):.2f} | "
            f"{min(gains):.2f}, {max(gains):.2f} | {median(t.faults for t in own) / 1000:.0f} k | "
            f"{own[-1].peak / 2**30:.1f} GiB |"
        )
    yield ""


# ---- loss curves -------------------------------------------------------------------------


def curve(model: nn.Module, args: argparse.Namespace, batch: int, threads: int) -> torch.Tensor:
    """Return the losses of some steps of plain gradient descent on fresh noise."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    x, target = data(batch * 4, args.size)
    target %= 4  # few enough classes for the loss to fall
    losses = []
    for i in range(args.steps):
        part = slice(i % 4 * batch, (i % 4 + 1) * batch)
        losses.append(training_step(model, x[part], target[part]))
        optimizer.step()
    torch.set_num_threads(before)
    return torch.stack(losses).double()


def curve_table(name: str, args: argparse.Namespace) -> Iterator[str]:
    """Yield how far loss curves are apart: of stock with two thread counts, and of the others."""
    start = initialized(name)
    batch = args.batch or BATCH[name]
    stock = curve(copy.deepcopy(start), args, batch, args.threads)
    others = {"PyTorch, one thread": curve(copy.deepcopy(start), args, batch, 1)}
    for name in args.contestants:
        if name in ("convert", "convert, fuse"):
            model = CONTESTANTS[name](copy.deepcopy(start))
            others[name] = curve(model, args, batch, args.threads)
    yield f"Batch {batch}, {args.size}x{args.size}, {args.steps} steps: the loss goes from "
    yield f"{stock[0]:.4f} to {stock[-1]:.4f}; the largest distance from PyTorch's on "
    yield f"{args.threads} threads, in the first 5, 10, ... steps:"
    yield ""
    ends = [*range(5, args.steps, 5), args.steps]
    yield "| | " + " | ".join(map(str, ends)) + " |"
    yield "|---" * (len(ends) + 1) + "|"
    for other, losses in others.items():
        apart = (losses - stock).abs()
        yield f"| {other} | " + " | ".join(f"{apart[:end].max():.1e}" for end in ends) + " |"
    yield ""


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--batch", type=int, help=f"default: {BATCH}")
    parser.add_argument("--size", type=int, default=224, help="of an image; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--warmup", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--keep-memory", action="store_true", help="glibc keeps freed memory")
    parser.add_argument("--curves", action="store_true", help="loss curves instead of times")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a curve; default: %(default)s")
    parser.add_argument(
        "--contestants",
        type=lambda s: s.split("/"),
        default=list(CONTESTANTS),
        help="separated by slashes, PyTorch first; default: all",
    )
    parser.add_argument("--markdown", type=Path, help="a file to append the tables to")
    args = parser.parse_args()
    if args.keep_memory:
        os.environ.update(KEEP_MEMORY)  # for the processes to come
    lines = [f"{key}: {value}" for key, value in machine().items()]
    lines = [", ".join([*lines, f"torch: {torch.__version__}", f"threads: {args.threads}"]), ""]
    print(*lines, sep="\n", flush=True)
    for name in args.models.split(","):
        found = curve_table(name, args) if args.curves else time_table(name, race(name, args), args)
        table = [name, "", *found]
        print(*table, sep="\n", flush=True)
        lines += table
    if args.markdown:
        with args.markdown.open("a", encoding="utf-8") as file:
            print(*lines, sep="\n", file=file)


if __name__ == "__main__":
    main()
