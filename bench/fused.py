"""Fused activations, residuals and half types: ``python bench/fused.py``.

A few minutes, in an environment with ``cybn[bench]``, torch and ml_dtypes. The nine layers of
ResNet-50 at batch 32, training mode. All contestants of a layer let each other take turns. cybn
writes over one output; "fresh" is a new one, as PyTorch always has here but for add_ and relu_.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch

import cybn
from cybn.bench.machine import machine
from cybn.bench.shapes import GROUPS
from cybn.bench.task import FRESH, REUSED, Contestant
from cybn.bench.timing import measure

EPS = 1e-5
Calls = dict[str, Callable[[], Any]]


class Data:
    """One layer's arrays, and the same as tensors."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        self.x, self.dy, self.r = rng.standard_normal((3, *shape), dtype=np.float32)
        self.gamma = rng.uniform(0.5, 1.5, shape[1]).astype(np.float32)
        self.beta = rng.standard_normal(shape[1]).astype(np.float32)
        self.y, self.dr = np.zeros_like(self.x), np.zeros_like(self.x)


def ours(d: Data, fresh: bool) -> Calls:
    """Return cybn's calls: plain, with relu, with add and relu."""
    _, m = cybn.batch_norm(d.x, d.gamma, d.beta, eps=EPS)
    out = {} if fresh else {"out": d.y}
    both = {} if fresh else {"out": d.y, "out_residual": d.dr}
    relu: dict[str, Any] = {"activation": "relu", "eps": EPS}
    add: dict[str, Any] = {**relu, "residual": d.r}
    given = (d.dy, d.x, m, d.gamma)
    return {
        "forward": lambda: cybn.batch_norm(d.x, d.gamma, d.beta, eps=EPS, **out),
        "forward relu": lambda: cybn.batch_norm(d.x, d.gamma, d.beta, **relu, **out),
        "forward add relu": lambda: cybn.batch_norm(d.x, d.gamma, d.beta, **add, **out),
        "backward": lambda: cybn.batch_norm_backward(*given, eps=EPS, **out),
        "backward relu": lambda: cybn.batch_norm_backward(*given, beta=d.beta, **relu, **out),
        "backward add relu": lambda: cybn.batch_norm_backward(*given, beta=d.beta, **add, **both),
    }


def theirs(d: Data) -> Calls:
    """Return PyTorch's calls of the same work: its kernels, without autograd around them."""
    x, dy, r, gamma, beta = map(torch.from_numpy, (d.x, d.dy, d.r, d.gamma, d.beta))
    aten = torch.ops.aten

    def normalize() -> Any:
        return aten.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)

    y, mean, rstd = normalize()
    after = {"relu": torch.relu(y), "add relu": torch.relu(y + r)}
    options = (x, gamma, None, None, mean, rstd, True, EPS, [True, True, True])

    def back(kind: str) -> Any:
        return aten.native_batch_norm_backward(
            aten.threshold_backward(dy, after[kind], 0), *options
        )

    return {
        "forward": normalize,
        "forward relu": lambda: normalize()[0].relu_(),
        "forward add relu": lambda: normalize()[0].add_(r).relu_(),
        "backward": lambda: aten.native_batch_norm_backward(dy, *options),
        "backward relu": lambda: back("relu"),
        "backward add relu": lambda: back("add relu"),
    }


def halves(d: Data) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Return training forwards of bfloat16: cybn's, and PyTorch's."""
    x = d.x.astype(ml_dtypes.bfloat16)
    y = np.zeros_like(x)
    tensor = torch.from_numpy(d.x).bfloat16()
    gamma, beta = torch.from_numpy(d.gamma), torch.from_numpy(d.beta)
    native = torch.ops.aten.native_batch_norm
    return {
        "forward bfloat16": (
            lambda: cybn.batch_norm(x, d.gamma, d.beta, eps=EPS, out=y),
            lambda: native(tensor, gamma, beta, None, None, True, 0.1, EPS),
        )
    }


def first(result: Any) -> Any:
    value = result[0] if isinstance(result, tuple) else result
    return value.numpy() if isinstance(value, torch.Tensor) else np.array(value)


def times(d: Data, seconds: float) -> dict[str, dict[str, float]]:
    """Return median seconds: by work, then by contestant."""
    reused, fresh, torch_calls = ours(d, False), ours(d, True), theirs(d)
    half = halves(d)
    found: list[tuple[str, str, Callable[[], Any]]] = []
    for work, call in torch_calls.items():
        same = np.isclose(first(reused[work]()), first(call()), atol=1e-3)
        if np.mean(same) < 0.999_99:  # a z within rounding of 0 may fall on either side of it
            raise SystemExit(f"{work}: results differ")
        found += [(work, "cybn", reused[work]), (work, "fresh", fresh[work])]
        found.append((work, "PyTorch", call))
    for work, (own, other) in half.items():
        found += [(work, "cybn", own), (work, "PyTorch", other)]
    contestants = [
        Contestant(f"{work}|{who}", "", FRESH if who != "cybn" else REUSED, call, lambda y, _: y)
        for work, who, call in found
    ]
    result: dict[str, dict[str, float]] = {}
    for figure in measure(contestants, seconds):
        work, who = figure.contestant.peer.split("|")
        result.setdefault(work, {})[who] = figure.median
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Fused forms and half types.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6, help="a layer; default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cybn.set_num_threads(options.threads)
    for name, value in machine().items():
        print(f"{name:24}{value}")
    print(f"{'torch':24}{torch.__version__}\n")
    ratios: dict[str, list[float]] = {}
    large: list[float] = []
    with torch.no_grad():
        for shape in GROUPS["resnet50"]:
            t = times(Data((shape.n, shape.c, *shape.spatial)), options.seconds)
            for work, by in t.items():
                plain = "forward" if work.startswith("forward") else "backward"
                own = by["cybn"]
                ratios.setdefault(f"{work}: cybn / plain", []).append(own / t[plain]["cybn"])
                ratios.setdefault(f"{work}: PyTorch / cybn", []).append(by["PyTorch"] / own)
                if "fresh" in by:
                    ratios.setdefault(f"{work}: PyTorch / cybn fresh", []).append(
                        by["PyTorch"] / by["fresh"]
                    )
            if shape.size * 4 > 32 << 20:
                large.append(t["forward bfloat16"]["cybn"] / t["forward"]["cybn"])
            print(
                shape.name,
                {w: {k: round(s * 1e3, 3) for k, s in by.items()} for w, by in t.items()},
                flush=True,
            )
    print(f"\ngeometric means, {options.threads} threads")
    for name, values in ratios.items():
        print(f"{name:40} {np.exp(np.log(values).mean()):.2f}   {np.round(values, 2)}")
    print(f"bfloat16 / float32 on layers of more than 32 MiB: {np.round(large, 2)}")


if __name__ == "__main__":
    main()
