"""The results as a page of markdown tables."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .experiments import (
    CONV_BATCH,
    PERCENTILES,
    RATE_PER_IMAGE,
    SIGMOID_BATCH,
    SIGMOID_RATE,
    BatchSizeRun,
    ConvRun,
    Curve,
    Results,
    SigmoidRun,
)

__all__ = ["write_table"]


def write_table(results: Results) -> str:
    """Return the results as a page of Markdown.

    Parameters
    ----------
    results : Results
        What the experiments measured.

    Returns
    -------
    str
        Markdown: three sections, each with one table.
    """
    sections = [
        f"# cybn demo, seed {results.seed}\n",
        "Test accuracy is in per cent of 500 images of handwritten digits.\n",
        sigmoid_section(results.sigmoid_plain, results.sigmoid_normalized),
        conv_section(results.conv, results.settings.conv_steps),
        batch_size_section(results.batch_size),
    ]
    return "\n".join(sections)


def sigmoid_section(plain: SigmoidRun, normalized: SigmoidRun) -> str:
    """Write the results of both networks at each tenth of the run."""
    tenth = len(normalized.curve.steps) // 10
    low, middle, high = PERCENTILES
    rows = [
        [
            str(normalized.curve.steps[i]),
            f"{plain.curve.accuracy[i]:.1f}",
            f"{normalized.curve.accuracy[i]:.1f}",
            triple(plain.unit[i]),
            triple(normalized.unit[i]),
        ]
        for i in range(tenth - 1, 10 * tenth, tenth)
    ]
    header = [
        "step",
        "accuracy, plain",
        "accuracy, normalized",
        "input, plain",
        "input, normalized",
    ]
    return (
        "## 1. Three hidden layers of 100 sigmoid units\n\n"
        f"Batch size {SIGMOID_BATCH}, learning rate {SIGMOID_RATE}. Input: that of a typical "
        f"unit of the last hidden layer,\nas its {low}th / {middle}th / {high}th percentile over "
        "the test images.\n\n" + table(header, rows)
    )


def conv_section(runs: list[ConvRun], steps: int) -> str:
    """Write the last accuracy for each learning rate."""
    rows = [[f"{r.learning_rate:g}", ending(r.plain), ending(r.normalized)] for r in runs]
    return (
        "## 2. A small convolutional network at three learning rates\n\n"
        f"Test accuracy after {steps} steps, batch size {CONV_BATCH}.\n\n"
        + table(["learning rate", "plain", "normalized"], rows)
    )


def batch_size_section(runs: list[BatchSizeRun]) -> str:
    """Write the mean and the range over the repeats."""
    rows = []
    for run in runs:
        gain = float(np.mean(np.subtract(run.exact, run.running)))
        change = decimal(gain, 1, sign="+")
        rows.append([str(run.batch_size), spread(run.running), spread(run.exact), change])
    return (
        "## 3. Small training batches, and the statistics used in inference\n\n"
        f"The sigmoid network, normalized; learning rate {RATE_PER_IMAGE:g} x batch size, equal "
        f"epochs.\nTest accuracy: mean (lowest to highest) of {len(runs[0].running)} repeats.\n\n"
        + table(["batch size", "running statistics", "exact statistics", "change"], rows)
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """Write a markdown table with its columns aligned to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * (width - 1) + ":" for width in widths], *rows]
    return "".join("| " + " | ".join(map(str.rjust, line, widths)) + " |\n" for line in lines)


def triple(percentiles: NDArray[np.float32]) -> str:
    """Write three percentiles."""
    return " / ".join(decimal(p, 2) for p in percentiles)


def decimal(value: float, digits: int, sign: str = "-") -> str:
    """Write a number with `digits` decimals, but never negative zero."""
    return f"{round(float(value), digits) + 0.0:{sign}.{digits}f}"


def ending(curve: Curve) -> str:
    """Write the last accuracy, or the step at which training diverged."""
    if curve.diverged is not None:
        return f"diverged at step {curve.diverged}"
    return f"{curve.accuracy[-1]:.1f}"


def spread(values: list[float]) -> str:
    """Write a mean with its range."""
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
