"""cybn itself, called as any user would."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

import cybn

from ..task import EPS, FIRST, FRESH, LAST, REUSED, Contestant, Data, Task, pick

__all__ = ["Cybn"]


class Cybn:
    """The functions and the layer of cybn, in both layouts."""

    name = "cybn"
    install = "pip install cybn"
    note = "functions; fresh output: from 1 MiB on in memory of earlier results"

    def __init__(self) -> None:
        self.version = cybn.__version__

    def variants(self, operation: str, dtype: np.dtype[Any], threads: int) -> list[tuple[str, str]]:
        """Return both layouts, with the output reused and fresh."""
        return [(layout, output) for layout in (FIRST, LAST) for output in (REUSED, FRESH)]

    def prepare(self, task: Task) -> Contestant:
        """Bind the arguments."""
        layout, data = task.layout, task.data
        axis = 1 if layout == FIRST else -1
        options: dict[str, Any] = {"axis": axis, "eps": EPS, "num_threads": task.threads}
        if task.output == REUSED:
            options["out"] = data.out(layout)
        x = data.x(layout)
        call: Any
        if task.operation == "forward":
            call = partial(cybn.batch_norm, x, data.gamma, data.beta, **options)
        elif task.operation == "inference":
            given = (data.mean, data.var, data.gamma, data.beta)
            call = partial(cybn.batch_norm_inference, x, *given, **options)
        elif task.operation == "backward":
            moments = cybn.moments(x, axis=axis, num_threads=task.threads)
            dy = data.dy(layout)
            call = partial(cybn.batch_norm_backward, dy, x, moments, data.gamma, **options)
        else:
            out = options.get("out")
            call = partial(_layer(data, axis), x, out=out, num_threads=task.threads)

        def read(output: Any, channels: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            return pick(y, layout, channels)

        return Contestant(self.name, layout, task.output, call, read)


def _layer(data: Data, axis: int) -> cybn.BatchNorm:
    layer = cybn.BatchNorm(data.shape.c, axis=axis, eps=EPS, dtype=data.dtype)
    layer.load_state_dict(layer.state_dict() | {"gamma": data.gamma, "beta": data.beta})
    return layer
