"""JAX under jit, from the formula in jax.numpy, on all the CPUs of the process."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from ..task import EPS, FIRST, FRESH, LAST, Contestant, Data, Peer, Task, first_of


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
        self.jax.config.update("jax_enable_x64", True)  # allows float64, forces it on nobody

    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield both layouts of plain tasks on all CPUs: its threads are not ours to choose."""
        if not task.plain or task.threads != len(os.sched_getaffinity(0)):
            return
        for layout in [FIRST] if len(task.shape) == 2 else [FIRST, LAST]:
            compute = self.compiled(task, data, layout)

            def call(compute: Any = compute) -> Any:
                return self.jax.block_until_ready(compute())

            def read(result: Any, layout: str = layout) -> Any:
                y = np.asarray(first_of(result))
                return np.moveaxis(y, -1, 1) if layout == LAST else y

            call()  # compiles
            yield Contestant(layout, FRESH, call, read)

    def compiled(self, task: Task, data: Data, layout: str) -> Any:
        """Compile, and put the arrays where JAX wants them."""
        jax, rank = self.jax, len(task.shape)
        numpy = importlib.import_module("jax.numpy")
        axes = (0, *range(2, rank)) if layout == FIRST else tuple(range(rank - 1))
        form = (1, -1, *(1,) * (rank - 2)) if layout == FIRST else (-1,)

        def normalize(x: Any, mean: Any, var: Any, gamma: Any, beta: Any) -> Any:
            rstd = gamma.reshape(form) / numpy.sqrt(var.reshape(form) + EPS)
            return (x - mean.reshape(form)) * rstd + beta.reshape(form)

        def forward(x: Any, gamma: Any, beta: Any) -> Any:
            return normalize(x, numpy.mean(x, axes), numpy.var(x, axes), gamma, beta)

        a = data.arrays(task, layout)
        x, gamma, beta = map(jax.device_put, (a.x, a.gamma, a.beta))
        if task.operation == "forward":
            return partial(jax.jit(forward), x, gamma, beta)
        if task.operation == "inference":
            mean, var = map(jax.device_put, (a.mean, a.var))
            return partial(jax.jit(normalize), x, mean, var, gamma, beta)
        _, pullback = jax.jit(partial(jax.vjp, forward))(x, gamma, beta)
        return partial(jax.jit(lambda pull, dy: pull(dy)), pullback, jax.device_put(a.dy))
