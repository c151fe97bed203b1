"""Show how values change on their way through a deep network, with and without normalization.

This program draws the picture of docs/fifteen-minutes.md. It needs the extra ``cybn[demo]``:

    python docs/examples/why.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

import cybn
from cybn.demo.data import Digits, load_digits
from cybn.demo.network import Dense, Flatten, Layer, Network, ReLU
from cybn.demo.picture import tidy
from cybn.demo.training import accuracy, train

PICTURE = Path(__file__).resolve().parents[1] / "pictures" / "why.png"
DEPTH, WIDTH = 10, 100
SCALES = {"weights too small": 0.5, "weights too large": 2.0}  # times the scale of He et al.
COLOURS = {"plain": "#D55E00", "with batch normalization": "#0072B2"}
SEEDS = 5


def network(seed: int, scale: float, normalized: bool) -> Network:
    """Build ten dense layers with ReLU, and a classifier."""
    rng = np.random.default_rng(seed)
    layers: list[Layer] = [Flatten()]
    for inputs in (64, *[WIDTH] * (DEPTH - 1)):
        layers.append(Dense(rng, inputs, WIDTH, scale * (2 / inputs) ** 0.5, bias=not normalized))
        layers += [cybn.BatchNorm1d(WIDTH), ReLU()] if normalized else [ReLU()]
    return Network(*layers, Dense(rng, WIDTH, 10, (1 / WIDTH) ** 0.5))


def spreads(net: Network, x: np.ndarray) -> list[float]:
    """Return the standard deviation of the input of each ReLU, in training mode."""
    net.train()
    found = []
    for layer in net.layers:
        if isinstance(layer, ReLU):
            found.append(float(x.std()))
        x = layer(x)
    return found


def curve(digits: Digits, seed: int, scale: float, normalized: bool, steps: int) -> list[float]:
    """Train, and return the test accuracy at ten steps of the training."""
    net = network(seed, scale, normalized)
    found: list[float] = []
    train(
        net,
        digits,
        steps=steps,
        batch_size=64,
        learning_rate=0.05,
        rng=np.random.default_rng(seed),
        every=steps // 10,
        observe=lambda step: found.append(accuracy(net, digits)),
        advance=lambda steps: None,
    )
    return found + [10.0] * (10 - len(found))  # a diverged run counts as guessing


def main() -> None:
    """Run everything, print the accuracies, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    digits = load_digits(0)
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, *right = figure.subplots(1, 3)
    for name, scale in SCALES.items():
        for kind, colour in COLOURS.items():
            style = "-" if scale < 1 else "--"
            values = spreads(network(0, scale, kind != "plain"), digits.train_x[:200])
            left.plot(range(1, DEPTH + 1), values, style, color=colour, label=f"{kind}, {name}")
    left.set_yscale("log")
    left.set_title("Size of the values, before training", fontsize=10)
    left.set_xlabel("layer")
    left.set_ylabel("standard deviation")
    left.legend(fontsize=7, loc="upper left")
    left.set_ylim(1e-4, 1e5)
    tidy(left)
    for axes, (name, scale) in zip(right, SCALES.items(), strict=True):
        for kind, colour in COLOURS.items():
            runs = [
                curve(digits, seed, scale, kind != "plain", options.steps)
                for seed in range(options.seeds)
            ]
            x = np.arange(1, 11) * (options.steps // 10)
            axes.plot(x, np.mean(runs, axis=0), color=colour, label=kind)
            axes.fill_between(x, *np.quantile(runs, (0, 1), axis=0), color=colour, alpha=0.2)
            last = [run[-1] for run in runs]
            print(f"{name}, {kind}: {np.mean(last):.1f} ({min(last):.1f} to {max(last):.1f})")
        axes.set_title(f"Accuracy on test images, {name}", fontsize=10)
        axes.set_xlabel("training step")
        axes.set_ylim(0, 100)
        axes.legend(fontsize=8, loc="center right")
        tidy(axes)
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    with threadpool_limits(1, user_api="blas"), cybn.threads(1):
        main()
