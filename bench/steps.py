"""What each step from the textbook kernel to the real one gains: ``python bench/steps.py``.

The textbook is `cybn/_kernels/plain.pyx`. A row of a table adds one step to the row above it, in
milliseconds and as a factor; the last row is what a call of cybn does. Everything is float32 and
takes turns; it takes half a minute.

lanes             `moments` and `batch_norm_inference`, one after the other, on one thread, with
                  vectors of 128 bits: sums are taken in 32 lanes. Where a channel is no long run
                  (channels-last, 7x7) these are columns: neighbouring channels, done together
wide lanes        the same at the highest instruction level of this CPU
threads           the same on the threads of this machine, at most two
one region        one call instead of two: one parallel region; backward is one call from the start
past the caches   results are written around the caches, which leaves these to x
blocks            a thread takes some channels through all passes while they lie in its L2
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

import cybn
from cybn import _dispatch, _runtime
from cybn._kernels import plain

SHAPES = {
    "32x64x56x56": (32, 64, 3136),
    "channels-last": (32 * 3136, 64, 1),
    "32x1024x7x7": (32, 1024, 49),
}
HUGE, NONE = 1 << 50, 1  # bytes of a cache that holds everything, and of one that holds nothing
SECONDS = 4  # of a shape and pass, about
EPS = 1e-5


class Pass:
    """Forward or backward of one shape, as it is after each step."""

    def __init__(self, operation: str, shape: tuple[int, int, int], threads: int) -> None:
        rng = np.random.default_rng(0)
        self.x, self.dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
        self.out = np.empty_like(self.x)
        self.gamma, self.beta = np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)
        _, self.moments = cybn.batch_norm(self.x, self.gamma, self.beta, eps=EPS)
        first, last = _runtime.usable_levels()[0], _runtime.usable_levels()[-1]
        whole = getattr(self, operation)
        parts = self.halves if operation == "forward" else whole
        self.steps: dict[str, Callable[[], Any]] = {
            "textbook": getattr(self, f"textbook_{operation}"),
            "lanes": partial(parts, first, 1, HUGE, HUGE),
            "wide lanes": partial(parts, last, 1, HUGE, HUGE),
            "threads": partial(parts, last, threads, HUGE, HUGE),
            "one region": partial(whole, last, threads, HUGE, HUGE),
            "past the caches": partial(whole, last, threads, HUGE, NONE),
            "blocks": partial(whole, last, threads),
        }
        if parts is whole:
            del self.steps["one region"]

    def textbook_forward(self) -> None:
        mean, m2 = np.empty((2, self.x.shape[1]))
        plain.forward(self.x, self.gamma, self.beta, EPS, self.out, mean, m2)

    def textbook_backward(self) -> None:
        given = self.dy, self.x, self.moments.mean, self.moments.m2, self.gamma, EPS, self.out
        plain.backward(*given, *np.empty((2, self.x.shape[1])))

    def halves(self, level: str, threads: int, *caches: int) -> None:
        use(level, *caches)
        found = cybn.moments(self.x, num_threads=threads)
        given = self.x, found.mean, found.var(), self.gamma, self.beta
        cybn.batch_norm_inference(*given, eps=EPS, out=self.out, num_threads=threads)

    def forward(self, level: str, threads: int, *caches: int) -> None:
        use(level, *caches)
        given = self.x, self.gamma, self.beta
        cybn.batch_norm(*given, eps=EPS, out=self.out, num_threads=threads)

    def backward(self, level: str, threads: int, *caches: int) -> None:
        use(level, *caches)
        given = self.dy, self.x, self.moments, self.gamma
        cybn.batch_norm_backward(*given, eps=EPS, out=self.out, num_threads=threads)

    def milliseconds(self) -> dict[str, float]:
        """Let the steps take turns, and return the median of each."""
        turns: dict[str, list[float]] = {step: [] for step in self.steps}
        until = time.perf_counter() + SECONDS
        while time.perf_counter() < until or len(turns["textbook"]) < 3:
            for step, call in self.steps.items():
                start = time.perf_counter()
                call()
                turns[step].append((time.perf_counter() - start) * 1e3)
        return {step: median(found) for step, found in turns.items()}


def use(level: str, *caches: int) -> None:
    """Call the kernels of a level, which are told the real sizes of L2 and L3, or these."""
    kernels = _runtime.kernels_at(level)
    if caches:
        kernels.set_caches(*caches)
    _dispatch.use(kernels.KERNELS, _runtime.kernels_at(level, "layer_norm").KERNELS)


def main() -> None:
    """Print a table for each pass."""
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()
    threads = min(2, len(os.sched_getaffinity(0)))
    levels = _runtime.usable_levels()
    print(f"{levels[0]} to {levels[-1]}, {threads} threads, milliseconds")
    for operation in ("forward", "backward"):
        found = {n: Pass(operation, s, threads).milliseconds() for n, s in SHAPES.items()}
        print(f"\n{operation:16}" + "".join(f"{name:>22}" for name in found))
        before: dict[str, float] = {}
        for step in next(iter(found.values())):
            cells = ""
            for name, times in found.items():
                gain = f"x {before[name] / times[step]:.2f}" if before else ""
                cells += f"{times[step]:>14.2f}{gain:>8}"
            before = {name: times[step] for name, times in found.items()}
            print(f"{step:16}{cells}")


if __name__ == "__main__":
    main()
