"""The formula as users write it: in NumPy on one thread, and in JAX under jit on all CPUs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ..machine import usable_cpus
from ..task import EPS, FIRST, FRESH, LAST, Contestant, Data, Peer, Task


class NumpyFormula(Peer):
    """NumPy, channels-first; its output is always fresh."""

    name = "NumPy"
    order = 90
    version = np.__version__
    note = "the formula, one thread"

    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield the formula for plain batch normalization."""
        if task.plain:
            x, dy, gamma, beta, mean, var, axes = given(task, data, FIRST)
            call: Callable[[], Any] = partial(forward, x, gamma, beta, axes)
            if task.operation == "inference":
                call = partial(normalize, x, mean, var, gamma, beta)
            elif task.operation == "backward":
                mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
                call = partial(backward, dy, x, mean, var, gamma, axes)
            yield Contestant(FIRST, FRESH, call)


class Jax(Peer):
    """JAX on the CPU; its arrays are immutable, so its output is always fresh."""

    name = "JAX"
    install = "pip install jax"
    order = 30
    note = "jit; mean and var of jax.numpy; backward is the pullback of vjp, forward not counted"
    quick = False

    def __init__(self) -> None:
        self.jax = importlib.import_module("jax")
        self.version = str(self.jax.__version__)
        self.jax.config.update("jax_platforms", "cpu")
        self.jax.config.update("jax_enable_x64", True)  # allows float64; float32 stays float32

    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield both layouts of plain tasks on all CPUs, as JAX chooses its threads itself."""
        for layout in task.layouts if task.plain and task.threads == usable_cpus() else ():
            compute = self.compiled(task, data, layout)
            call = partial(lambda compute: self.jax.block_until_ready(compute()), compute)
            call()  # compiles
            yield Contestant(layout, FRESH, call)

    def compiled(self, task: Task, data: Data, layout: str) -> Callable[[], Any]:
        """Compile the function, and copy the arrays to JAX's device."""
        jit, (*arrays, axes) = self.jax.jit, given(task, data, layout)
        x, dy, gamma, beta, mean, var = map(self.jax.device_put, arrays)
        if task.operation == "inference":
            return partial(jit(normalize), x, mean, var, gamma, beta)
        function = partial(forward, axes=axes)
        if task.operation == "forward":
            return partial(jit(function), x, gamma, beta)
        _, pullback = jit(partial(self.jax.vjp, function))(x, gamma, beta)
        return partial(jit(lambda pull, dy: pull(dy)), pullback, dy)


def given(task: Task, data: Data, layout: str) -> tuple[Any, ...]:
    """Return x, dy, gamma, beta, mean and var, shaped to broadcast, and the axes of a channel."""
    a, rank = data.arrays(task, layout), len(task.shape)
    form = (-1,) if layout == LAST else (-1, *(1,) * (rank - 2))
    axes = tuple(range(rank - 1)) if layout == LAST else (0, *range(2, rank))
    return (a.x, a.dy, *(v.reshape(form) for v in (a.gamma, a.beta, a.mean, a.var)), axes)


def normalize(x: Any, mean: Any, var: Any, gamma: Any, beta: Any) -> Any:
    """Return y for given statistics."""
    return (x - mean) * (gamma / (var + EPS) ** 0.5) + beta


def forward(x: Any, gamma: Any, beta: Any, axes: tuple[int, ...]) -> Any:
    """Return y for the statistics of the batch."""
    return normalize(x, x.mean(axes, keepdims=True), x.var(axes, keepdims=True), gamma, beta)


def backward(dy: Any, x: Any, mean: Any, var: Any, gamma: Any, axes: tuple[int, ...]) -> Any:
    """Return dx, as in Ioffe and Szegedy (2015), simplified."""
    rstd = 1 / (var + EPS) ** 0.5
    xhat = (x - mean) * rstd
    dbeta, dgamma = (v.mean(axes, keepdims=True) for v in (dy, dy * xhat))
    return gamma * rstd * (dy - dbeta - xhat * dgamma)
