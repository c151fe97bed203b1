"""The formula as one writes it in NumPy, on one thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..task import EPS, FIRST, FRESH, Contestant, Task, pick

__all__ = ["NumpyFormula"]

Array = NDArray[Any]


class NumpyFormula:
    """NumPy, channels-first; its output is always fresh."""

    name = "NumPy"
    install = "pip install numpy"
    note = "the formula, one thread"

    def __init__(self) -> None:
        self.version = np.__version__

    def variants(self, operation: str, dtype: np.dtype[Any], threads: int) -> list[tuple[str, str]]:
        """Return the one way it is written."""
        return [] if operation == "layer" else [(FIRST, FRESH)]

    def prepare(self, task: Task) -> Contestant:
        """Bind the arguments, with one axis of length 1 for every axis that is not C."""
        data = task.data
        ones = (1,) * len(data.shape.spatial)
        gamma, beta, mean, var = (
            v.reshape(1, -1, *ones) for v in (data.gamma, data.beta, data.mean, data.var)
        )
        axes = (0, *range(2, 2 + len(ones)))
        x, dy = data.x(), data.dy()
        call: Callable[[], Array]
        if task.operation == "forward":
            call = partial(forward, x, gamma, beta, axes)
        elif task.operation == "inference":
            call = partial(normalize, x, mean, var, gamma, beta)
        else:
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
            call = partial(backward, dy, x, mean, var, gamma, axes)

        def read(y: Any, channels: Any) -> Array:
            return pick(y, FIRST, channels)

        return Contestant(self.name, task.layout, task.output, call, read)


def normalize(x: Array, mean: Array, var: Array, gamma: Array, beta: Array) -> Array:
    """Return y for given statistics."""
    y: Array = (x - mean) / np.sqrt(var + x.dtype.type(EPS)) * gamma + beta
    return y


def forward(x: Array, gamma: Array, beta: Array, axes: tuple[int, ...]) -> Array:
    """Return y for the statistics of the batch."""
    return normalize(x, x.mean(axes, keepdims=True), x.var(axes, keepdims=True), gamma, beta)


def backward(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array, axes: tuple[int, ...]
) -> Array:
    """Return dx, as in Ioffe and Szegedy (2015), simplified."""
    rstd = 1 / np.sqrt(var + x.dtype.type(EPS))
    xhat = (x - mean) * rstd
    dbeta = dy.mean(axes, keepdims=True)
    dgamma = (dy * xhat).mean(axes, keepdims=True)
    dx: Array = gamma * rstd * (dy - dbeta - xhat * dgamma)
    return dx
