"""JAX under jit, from the formula in jax.numpy, on all the CPUs of the process."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import numpy as np

from ..machine import usable_cpus
from ..task import EPS, FIRST, FRESH, LAST, Contestant, Task, pick

__all__ = ["Jax"]


class Jax:
    """JAX on the CPU; its arrays are immutable, so its output is always fresh."""

    name = "JAX"
    install = "pip install jax"
    note = "jit; mean and var of jax.numpy; backward is the pullback of vjp, forward not counted"

    def __init__(self) -> None:
        self.jax = importlib.import_module("jax")
        self.version = str(self.jax.__version__)
        self.jax.config.update("jax_platforms", "cpu")
        self.jax.config.update("jax_enable_x64", True)  # allows float64, forces it on nobody

    def variants(self, operation: str, dtype: np.dtype[Any], threads: int) -> list[tuple[str, str]]:
        """Return both layouts; its number of threads is not ours to choose."""
        if operation == "layer" or threads != usable_cpus():
            return []
        return [(FIRST, FRESH), (LAST, FRESH)]

    def prepare(self, task: Task) -> Contestant:
        """Compile, and put the arrays where JAX wants them."""
        jax, data, layout = self.jax, task.data, task.layout
        numpy = importlib.import_module("jax.numpy")
        rank = 2 + len(data.shape.spatial)
        axes = (0, *range(2, rank)) if layout == FIRST else tuple(range(rank - 1))
        form = (1, -1, *(1,) * (rank - 2)) if layout == FIRST else (-1,)

        def normalize(x: Any, mean: Any, var: Any, gamma: Any, beta: Any) -> Any:
            rstd = gamma.reshape(form) / numpy.sqrt(var.reshape(form) + EPS)
            return (x - mean.reshape(form)) * rstd + beta.reshape(form)

        def forward(x: Any, gamma: Any, beta: Any) -> Any:
            return normalize(x, numpy.mean(x, axes), numpy.var(x, axes), gamma, beta)

        x, dy, gamma, beta, mean, var = map(
            jax.device_put,
            (data.x(layout), data.dy(layout), data.gamma, data.beta, data.mean, data.var),
        )
        if task.operation == "forward":
            compute = partial(jax.jit(forward), x, gamma, beta)
        elif task.operation == "inference":
            compute = partial(jax.jit(normalize), x, mean, var, gamma, beta)
        else:
            _, pullback = jax.jit(partial(jax.vjp, forward))(x, gamma, beta)
            compute = partial(jax.jit(lambda pull, dy: pull(dy)), pullback, dy)

        def call() -> Any:
            return jax.block_until_ready(compute())

        call()  # compiles

        def read(output: Any, channels: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            return pick(np.asarray(y), layout, channels)

        return Contestant(self.name, layout, task.output, call, read)
