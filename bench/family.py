"""Layer, RMS, group and instance normalization beside PyTorch: ``python bench/family.py``.

A few minutes, in an environment with ``cybn[bench]``, torch and ml_dtypes. Shapes of transformers
and of a UNet, small channels, short rows and channels-last; then half types, where PyTorch has
gamma and beta of the half type as well, and cybn in float32 (``-k bfloat16``: those lines alone).
All contestants of a line let each other take turns, and are checked against each other first.
"fresh": the result goes to a new array, on both sides; "reused": it is written over
the same array each time, on both sides, where PyTorch has a function that takes one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch

import cybn
from cybn.bench.machine import machine
from cybn.bench.task import FRESH, REUSED, Contestant
from cybn.bench.timing import Figure, check, measure

EPS = 1e-5
# Against the largest value: a check that the same is computed.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}
ALL = [True, True, True]


class Line(NamedTuple):
    """One member on one shape."""

    member: str
    shape: tuple[int, ...]
    groups: int = 0
    dtype: str = "float32"
    last: bool = False  # channels-last memory

    def __str__(self) -> str:
        words = [self.member, "x".join(map(str, self.shape))]
        words += [self.dtype] if self.dtype != "float32" else []
        return " ".join([*words, "channels-last"] if self.last else words)


TRANSFORMERS = [(32, 512, 768), (8, 2048, 1024), (4096, 4096)]
LINES = [Line(member, shape) for member in ("layer", "rms") for shape in TRANSFORMERS]
LINES += [Line("group", (8, 320, 64, 64), 32), Line("group", (8, 1280, 16, 16), 32)]
LINES += [Line("instance", (4, 64, 256, 256))]
# Small channels and short rows, where what a run or a row costs by itself shows.
LINES += [Line("group", (8, 320, size, size), 32) for size in (16, 32)]
LINES += [Line("instance", (16, 256, 14, 14))]
LINES += [Line("layer", (2**20 // size, size)) for size in (16, 64, 128)]
LINES += [
    Line("group", (8, 320, 32, 32), 32, last=True),
    Line("group", (2, 512, 64, 64), 32, last=True),
    Line("instance", (8, 64, 64, 64), last=True),
]
LINES += [
    Line(member, shape, groups, dtype)
    for dtype in ("bfloat16", "float16")
    for member, shape, groups in (
        ("layer", (8, 2048, 1024), 0),
        ("layer", (4096, 4096), 0),
        ("rms", (8, 2048, 1024), 0),
        ("group", (8, 320, 64, 64), 32),
        ("instance", (4, 64, 256, 256), 0),
    )
]


class Data:
    """The arrays of a line, as NumPy has them and as PyTorch."""

    def __init__(self, line: Line) -> None:
        rng = np.random.default_rng(0)
        self.x, self.dy = (self.array(rng, line) for _ in range(2))
        channels = line.shape[-1 if line.member in ("layer", "rms") else 1]
        self.gamma, self.beta = rng.uniform(0.5, 1.5, (2, channels)).astype(np.float32)
        self.out = np.zeros_like(self.x)
        self.tensors = [
            torch.from_numpy(a.astype(np.float32)).to(getattr(torch, line.dtype))
            for a in (self.x, self.dy, self.gamma, self.beta)
        ]

    @staticmethod
    def array(rng: np.random.Generator, line: Line) -> np.ndarray:
        values = rng.standard_normal(line.shape, dtype=np.float32)
        if line.last:
            values = np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 1, -1)), -1, 1)
        return values.astype(getattr(ml_dtypes, line.dtype, line.dtype))


def ours(line: Line, data: Data) -> dict[str, Callable[..., Any]]:
    """Return forward and backward of cybn; both take `out`."""
    options: dict[str, Any] = {"eps": EPS}
    if line.member == "group":
        options["num_groups"] = line.groups
    parameters = [data.gamma] if line.member == "rms" else [data.gamma, data.beta]
    forward = partial(getattr(cybn, f"{line.member}_norm"), data.x, *parameters, **options)
    _, statistics = forward()
    backward = getattr(cybn, f"{line.member}_norm_backward")
    return {
        "forward": forward,
        "backward": partial(backward, data.dy, data.x, statistics, data.gamma, **options),
    }


def theirs(line: Line, data: Data) -> dict[tuple[str, str], Callable[[], Any]]:
    """Return what PyTorch has, by operation and output."""
    x, dy, gamma, beta = data.tensors
    aten, shape = torch.ops.aten, [line.shape[-1]]
    if line.member in ("layer", "group"):
        if line.member == "layer":
            options: tuple[Any, ...] = (x, shape, gamma, beta, EPS)
            forward, backward = aten.native_layer_norm, aten.native_layer_norm_backward
            y, mean, rstd = forward(*options)
            given: tuple[Any, ...] = (dy, x, shape, mean, rstd, gamma, beta, ALL)
        else:
            n, c, *positions = line.shape
            sizes = (n, c, int(np.prod(positions)), line.groups)
            options = (x, gamma, beta, *sizes, EPS)
            forward, backward = aten.native_group_norm, aten.native_group_norm_backward
            y, mean, rstd = forward(*options)
            given = (dy, x, mean, rstd, gamma, *sizes, ALL)
        outs = {f"out{i}": torch.empty_like(t) for i, t in enumerate((y, mean, rstd))}
        sums = {f"out{i}": torch.empty_like(t) for i, t in enumerate((x, gamma, beta))}
        return {
            ("forward", FRESH): partial(forward, *options),
            ("forward", REUSED): partial(forward.out, *options, **outs),
            ("backward", FRESH): partial(backward, *given),
            ("backward", REUSED): partial(backward.out, *given, **sums),
        }
    leaves = [t.clone().requires_grad_() for t in (x, gamma, beta)]
    if line.member == "rms":
        leaves = leaves[:2]
        call = partial(torch.nn.functional.rms_norm, x, shape, gamma, EPS)
        y = torch.nn.functional.rms_norm(leaves[0], shape, leaves[1], EPS)
    else:
        call = partial(torch.nn.functional.instance_norm, x, weight=gamma, bias=beta, eps=EPS)
        y = torch.nn.functional.instance_norm(leaves[0], weight=leaves[1], bias=leaves[2], eps=EPS)
    gradients = partial(torch.autograd.grad, y, leaves, dy, retain_graph=True)
    return {("forward", FRESH): call, ("backward", FRESH): gradients}


def first(result: Any) -> Any:
    """Return y or dx of a result, as NumPy has it."""
    value = result[0] if isinstance(result, tuple) else result
    value = value.float().numpy() if isinstance(value, torch.Tensor) else value
    return value.astype(np.float32, copy=False)


def contestants(line: Line, operation: str, data: Data) -> list[Contestant]:
    """Return all that can do an operation; each is checked against the first."""
    own, found = ours(line, data)[operation], []
    for (done, output), call in theirs(line, data).items():
        if done == operation:
            out = data.out if output == REUSED else None
            for name, function in (("cybn", partial(own, out=out)), ("PyTorch", call)):
                found.append(Contestant(name, "", output, function, lambda y, _: first(y)))
    expected = np.array(first(found[0].call()))
    for contestant in found:
        wrong = check(contestant, expected, [], TOLERANCE[line.dtype])
        if wrong:
            raise SystemExit(f"{line} {operation}, {contestant.name}: {wrong}")
    return found


def describe(figures: list[Figure]) -> str:
    """Return the medians in ms of pairs of cybn and PyTorch, and their ratio."""
    parts = []
    for own, other in zip(figures[::2], figures[1::2], strict=True):
        parts.append(
            f"{own.contestant.output:>6} {own.median * 1e3:7.2f} {other.median * 1e3:7.2f} "
            f"{other.median / own.median:6.2f}x"
        )
    return "   ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="The family beside PyTorch.")
    parser.add_argument("--threads", default="2,1", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1.5, help="a line; default: %(default)s")
    parser.add_argument("-k", default="", help="only lines that hold these words")
    options = parser.parse_args()
    for name, value in machine().items():
        print(f"{name:24}{value}")
    print(f"{'torch':24}{torch.__version__}\n\nms of cybn, of PyTorch, and their ratio")
    with torch.no_grad():
        for line in LINES:
            name = str(line)
            if options.k not in name:
                continue
            data = Data(line)
            for threads in map(int, options.threads.split(",")):
                torch.set_num_threads(threads)
                cybn.set_num_threads(threads)
                for operation in ("forward", "backward"):
                    with torch.enable_grad():
                        all_of_them = contestants(line, operation, data)
                    figures = measure(all_of_them, options.seconds)
                    print(f"{name:36} {operation:9} {threads}t {describe(figures)}", flush=True)


if __name__ == "__main__":
    main()
