"""Batch, group, layer, instance or RMS normalization? An experiment with handwritten digits.

This program trains the convolutional network of `cybn demo` with each of them, and with none, in
batches of 2 to 64. It prints the tables of docs/which-norm.md and draws its picture. It needs the
extra ``cybn[demo]``:

    python docs/examples/which_norm.py --picture which-norm.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import cybn
from cybn.demo.data import Digits, load_digits
from cybn.demo.network import AveragePool, Conv3x3, Dense, Flatten, Layer, Network, ReLU
from cybn.demo.picture import tidy
from cybn.demo.table import spread, table
from cybn.demo.training import accuracy, train

SIDE = 8  # pixels, in both convolutions
GROUPS = 4
VALIDATION = 300  # training images that are used only to choose the learning rate
RATES_PER_IMAGE = (0.0025, 0.01, 0.04)
BATCH_SIZES = (2, 4, 8, 16, 32, 64)
CONTRAST_BATCH = 32
CONTRASTS = (1.0, 0.75, 0.5, 0.25)

# Functions that make a layer for a number of channels. Group, layer, instance and RMS normalization
# work within each image, and do not use the batch.
KINDS: dict[str, Callable[[int], Layer] | None] = {
    "batch": cybn.BatchNorm2d,
    "group": partial(cybn.GroupNorm, GROUPS),
    "layer": lambda channels: cybn.LayerNorm((channels, SIDE, SIDE)),
    "RMS": lambda channels: cybn.RMSNorm((channels, SIDE, SIDE)),
    "instance": partial(cybn.InstanceNorm2d, affine=True),
    "none": None,
}
# Okabe and Ito's colours, which do not depend on colour vision.
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#D55E00")
MARKERS = "osDv^x"


class Cell(NamedTuple):
    """The results of one kind of normalization with one batch size."""

    rate: float  # per image
    accuracy: list[float]  # in per cent, one for each repeat
    by_contrast: list[list[float]]  # the same for each contrast of the test images


def network(rng: np.random.Generator, make: Callable[[int], Layer] | None) -> Network:
    """Build the convolutional network of the demo with one kind of normalization."""
    layers: list[Layer] = []
    for inputs, outputs in ((1, 8), (8, 16)):
        std = (2 / (9 * inputs)) ** 0.5
        layers.append(Conv3x3(rng, inputs, outputs, std, bias=make is None))
        layers += [ReLU()] if make is None else [make(outputs), ReLU()]
    features = 16 * (SIDE // 2) ** 2
    classifier = Dense(rng, features, 10, std=(1 / features) ** 0.5)
    return Network(*layers, AveragePool(), Flatten(), classifier)


def trained(
    digits: Digits, kind: str, size: int, rate: float, seed: list[int], epochs: int, bar: tqdm
) -> Network:
    """Train once. With one seed all kinds get the same weights and the same batches."""
    net = network(np.random.default_rng([*seed, 1]), KINDS[kind])
    epoch = len(digits.train_x) // size
    train(
        net,
        digits,
        steps=epochs * epoch,
        batch_size=size,
        learning_rate=rate * size,
        rng=np.random.default_rng([*seed, 2]),
        every=epoch,
        advance=lambda steps: bar.update(steps * size),
    )
    return net


def best_rate(digits: Digits, kind: str, size: int, repeats: int, epochs: int, bar: tqdm) -> float:
    """Choose a learning rate on images that are used neither for training here nor for tests."""
    (x, y), cut = digits[:2], VALIDATION
    held_out = Digits(x[cut:], y[cut:], x[:cut], y[:cut])
    scores = {
        rate: np.mean(
            [
                accuracy(trained(held_out, kind, size, rate, [0, r], epochs, bar), held_out)
                for r in range(repeats)
            ]
        )
        for rate in RATES_PER_IMAGE
    }
    return max(scores, key=lambda rate: scores[rate])


def measure(digits: Digits, kind: str, size: int, options: argparse.Namespace, bar: tqdm) -> Cell:
    """Choose the learning rate, then train and test `options.repeats` times with other seeds."""
    rate = best_rate(digits, kind, size, options.trials, options.epochs, bar)
    faded = [digits._replace(test_x=digits.test_x * np.float32(c)) for c in CONTRASTS]
    each = []
    for repeat in range(options.repeats):
        net = trained(digits, kind, size, rate, [1, repeat], options.epochs, bar)
        each.append([accuracy(net, images) for images in faded])
    by_contrast = [list(column) for column in zip(*each, strict=True)]
    return Cell(rate, by_contrast[0], by_contrast)


def draw(results: dict[str, dict[int, Cell]], path: Path) -> None:
    """Draw accuracy against batch size, and against the contrast of the test images."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, cells in results.items():
        draw_kind(left, kind, [cell.accuracy for cell in cells.values()])
        draw_kind(right, kind, cells[CONTRAST_BATCH].by_contrast)
    sizes = [str(size) for size in results["none"]]
    left.set_xticks(range(len(sizes)), sizes)
    left.set_xlabel("training batch size")
    left.set_title("Accuracy: each repeat, and their mean")
    left.legend(loc="lower left", ncols=2)
    right.set_xticks(range(len(CONTRASTS)), [f"{c:.0%}" for c in CONTRASTS])
    right.set_xlabel("contrast of the test images")
    right.set_title(f"The networks of batch size {CONTRAST_BATCH} on fainter images")
    for axes in (left, right):
        axes.set_ylabel("test accuracy in inference (%)")
        tidy(axes)
    figure.savefig(path, dpi=120)


def draw_kind(axes: Axes, kind: str, runs: list[list[float]]) -> None:
    """Draw the mean over the repeats as a line, and each repeat as a dot."""
    index = list(KINDS).index(kind)
    x = np.arange(len(runs)) + 0.06 * (index - (len(KINDS) - 1) / 2)
    colour = COLOURS[index]
    axes.plot(x, np.mean(runs, axis=1), color=colour, marker=MARKERS[index], label=kind)
    axes.plot(x, runs, ".", color=colour, alpha=0.4)


def report(results: dict[str, dict[int, Cell]]) -> str:
    """Write the three tables: accuracies, learning rates, and accuracies by contrast."""
    sizes = [f"batches of {size}" for size in results["none"]]
    contrasts = [f"contrast {contrast:.0%}" for contrast in CONTRASTS]
    found = {kind: list(cells.values()) for kind, cells in results.items()}
    faded = {kind: cells[CONTRAST_BATCH].by_contrast for kind, cells in results.items()}
    return "\n".join(
        [
            table(["", *sizes], [[k, *(spread(c.accuracy) for c in v)] for k, v in found.items()]),
            table(["", *sizes], [[k, *(f"{c.rate:g}" for c in v)] for k, v in found.items()]),
            table(["", *contrasts], [[k, *map(spread, v)] for k, v in faded.items()]),
        ]
    )


def main() -> None:
    """Run everything, print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trials", type=int, default=2, help="repeats a learning rate is tried")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    sizes = options.batch_sizes
    if CONTRAST_BATCH not in sizes:
        parser.error(f"--batch-sizes must have {CONTRAST_BATCH}, for the table of contrasts")
    digits = load_digits(0)
    count = len(digits.train_x)
    total = (
        sum((count - VALIDATION) // n * n for n in sizes) * options.trials * len(RATES_PER_IMAGE)
    )
    total += sum(count // n * n for n in sizes) * options.repeats
    with tqdm(total=total * options.epochs * len(KINDS), unit="image") as bar:
        results = {
            kind: {size: measure(digits, kind, size, options, bar) for size in sizes}
            for kind in KINDS
        }
    print(report(results))
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    with threadpool_limits(1, user_api="blas"), cybn.threads(1):
        main()
