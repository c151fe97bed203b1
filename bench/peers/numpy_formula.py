"""The formula as one writes it in NumPy, on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from ..task import EPS, FIRST, FRESH, Array, Contestant, Data, Peer, Task


class NumpyFormula(Peer):
    """NumPy, channels-first; its output is always fresh."""

    name = "NumPy"
    order = 90
    version = np.__version__
    note = "the formula, one thread"

    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield the one way it is written, for plain batch normalization."""
        if not task.plain:
            return
        a = data.arrays(task)
        ones = (1,) * (len(task.shape) - 2)
        gamma, beta, mean, var = (v.reshape(1, -1, *ones) for v in a[4:])
        axes = (0, *range(2, len(task.shape)))
        if task.operation == "forward":
            call = partial(forward, a.x, gamma, beta, axes)
        elif task.operation == "inference":
            call = partial(normalize, a.x, mean, var, gamma, beta)
        else:
            mean, var = a.x.mean(axes, keepdims=True), a.x.var(axes, keepdims=True)
            call = partial(backward, a.dy, a.x, mean, var, gamma, axes)
        yield Contestant(FIRST, FRESH, call, lambda y: y)


def normalize(x: Array, mean: Array, var: Array, gamma: Array, beta: Array) -> Array:
    """Return y for given statistics."""
    return (x - mean) / np.sqrt(var + x.dtype.type(EPS)) * gamma + beta


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
    return gamma * rstd * (dy - dbeta - xhat * dgamma)
