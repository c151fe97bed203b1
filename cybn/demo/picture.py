"""The results as one picture: a row of panels for each experiment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from .experiments import BatchSizeRun, ConvRun, Curve, Results, SigmoidRun

__all__ = ["draw"]

# Okabe and Ito's colours, which do not depend on colour vision.
PLAIN, NORMALIZED, RUNNING, EXACT = "#D55E00", "#0072B2", "#CC79A7", "#009E73"
CHANCE = 10.0  # per cent: ten digits


def draw(results: Results, path: Path) -> None:
    """Draw the results and write the picture.

    Parameters
    ----------
    results : Results
        What the experiments measured.
    path : Path
        The PNG file to write.
    """
    figure = Figure(figsize=(12, 12.5), layout="constrained")
    first, second, third = figure.subfigures(3, 1, hspace=0.04, squeeze=False)[:, 0]
    draw_sigmoid(first, results.sigmoid_plain, results.sigmoid_normalized)
    draw_conv(second, results.conv)
    draw_batch_size(third, results.batch_size)
    figure.savefig(path, dpi=120)


def draw_sigmoid(figure: SubFigure, plain: SigmoidRun, normalized: SigmoidRun) -> None:
    """Draw accuracy over time, then the input of a typical unit of either network."""
    headline(figure, "1. A sigmoid network, with and without batch normalization")
    left, middle, right = figure.subplots(1, 3)
    right.sharey(middle)
    draw_curve(left, plain.curve, "plain", PLAIN)
    draw_curve(left, normalized.curve, "normalized", NORMALIZED)
    accuracy_axis(left)
    left.set_title("Three hidden layers of 100 units")
    left.legend(loc="lower right")
    draw_unit(middle, plain, PLAIN)
    middle.legend(loc="best")
    middle.set_title("Input of a typical unit, plain")
    draw_unit(right, normalized, NORMALIZED)
    right.set_title("Input of a typical unit, normalized")


def draw_unit(axes: Axes, run: SigmoidRun, colour: str) -> None:
    """Draw the 15th, 50th and 85th percentile over time."""
    low, middle, high = run.unit.T
    steps, band = run.curve.steps, "15th to 85th percentile"
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0, label=band)
    axes.plot(steps, middle, color=colour, label="median")
    axes.set_xlim(left=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("input of the sigmoid")
    tidy(axes)


def draw_conv(figure: SubFigure, runs: list[ConvRun]) -> None:
    """Draw accuracy over time, one panel for each learning rate."""
    headline(figure, "2. A convolutional network at three learning rates")
    panels = figure.subplots(1, len(runs))
    for axes, run in zip(panels, runs, strict=True):
        draw_curve(axes, run.plain, "plain", PLAIN)
        draw_curve(axes, run.normalized, "normalized", NORMALIZED)
        accuracy_axis(axes)
        axes.set_title(f"Learning rate {run.learning_rate:g}")
    panels[0].legend(loc="lower right")


def draw_batch_size(figure: SubFigure, runs: list[BatchSizeRun]) -> None:
    """Draw accuracy against batch size, then how exact statistics change it."""
    headline(figure, "3. Small training batches, and the statistics used in inference")
    left, right = figure.subplots(1, 2)
    positions = np.log2([run.batch_size for run in runs])
    running = np.array([run.running for run in runs])
    exact = np.array([run.exact for run in runs])
    draw_repeats(left, positions - 0.05, running, "o", "running statistics", RUNNING)
    draw_repeats(left, positions + 0.05, exact, "s", "exact statistics", EXACT)
    left.set_ylabel("test accuracy in inference (%)")
    left.set_title("Accuracy: each repeat, and their mean")
    left.legend(loc="lower right")
    gains = exact - running
    right.axhline(0, color="0.6", linewidth=1)
    right.bar(positions, gains.mean(1), width=0.5, color=EXACT, alpha=0.35, label="mean")
    dots = right.plot(positions, gains, ".", color=EXACT)
    dots[0].set_label("each repeat")
    right.set_ylabel("change of test accuracy (points)")
    right.set_title("Exact statistics instead of running ones")
    right.legend(loc="upper right")
    for axes in (left, right):
        axes.set_xticks(positions, [str(run.batch_size) for run in runs])
        axes.set_xlabel("training batch size")
        tidy(axes)


def draw_repeats(
    axes: Axes,
    x: NDArray[np.float64],
    accuracies: NDArray[np.float64],
    marker: str,
    name: str,
    colour: str,
) -> None:
    """Draw the mean over the repeats as a line, and each repeat as a dot."""
    axes.plot(x, accuracies.mean(1), color=colour, marker=marker, label=name)
    axes.plot(x, accuracies, ".", color=colour, alpha=0.5)


def draw_curve(axes: Axes, curve: Curve, name: str, colour: str) -> None:
    """Draw one run; a cross marks where it diverged."""
    axes.plot(curve.steps, curve.accuracy, color=colour, label=name)
    if curve.diverged is not None:
        axes.plot(curve.diverged, CHANCE, "X", color=colour, markersize=10)
        axes.annotate(f"{name} diverged", (curve.diverged, CHANCE + 4), color=colour)


def accuracy_axis(axes: Axes) -> None:
    """Prepare a panel of test accuracy against steps."""
    axes.axhline(CHANCE, color="0.6", linewidth=1, linestyle=":", label="chance")
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("test accuracy (%)")
    tidy(axes)


def headline(figure: SubFigure, text: str) -> None:
    """Write a headline above a row of panels."""
    figure.suptitle(text, x=0.01, ha="left", fontweight="bold")


def tidy(axes: Axes) -> None:
    """Remove the lines on the top and on the right, and add a grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
