"""cybn itself, called as any user would."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

import cybn

from ..task import (
    EPS,
    FIRST,
    FRESH,
    LAST,
    REUSED,
    ROWS,
    Contestant,
    Data,
    Peer,
    Task,
    bind,
    first_of,
)


class Cybn(Peer):
    """The functions and layers of cybn, in both layouts."""

    name = "cybn"
    order = 0
    version = cybn.__version__
    note = "fresh outputs from 1 MiB on lie in memory of earlier results"

    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield both layouts, with the output reused and fresh."""
        rows = task.norm in ROWS
        for layout in [FIRST] if rows or len(task.shape) == 2 else [FIRST, LAST]:
            axis = -1 if rows or layout == LAST else 1
            arrays = data.arrays(task, layout)
            out: dict[str, Any] = {"out": data.get("out", task.dtype, layout)}
            if task.residual and task.operation == "backward":
                out["out_residual"] = data.get("out_residual", task.dtype, layout)
            for output, given in ((REUSED, out), (FRESH, {})):
                if task.module:
                    layer = cybn.BatchNorm(task.channels, axis=axis, eps=EPS, dtype=task.dtype)
                    state = {"gamma": arrays.gamma, "beta": arrays.beta}
                    layer.load_state_dict(layer.state_dict() | state)
                    call = partial(layer, arrays.x, num_threads=task.threads, **given)
                else:
                    options = {"axis": axis, "num_threads": task.threads, **given}
                    call = bind(cybn, task, arrays, **options)
                yield Contestant(layout, output, call, partial(_read, layout=layout))


def _read(result: Any, layout: str) -> Any:
    y = first_of(result)
    return np.moveaxis(y, -1, 1) if layout == LAST else y
