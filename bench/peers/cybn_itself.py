"""cybn itself, called as a user would call it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import cybn

from ..task import EPS, FRESH, LAST, REUSED, ROWS, Contestant, Data, Peer, Task, bind


class Cybn(Peer):
    """The functions and layers of cybn, in both layouts."""

    name = "cybn"
    order = 0
    version = cybn.__version__
    note = "new outputs of 1 MiB or more reuse the memory of freed results"

    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield both layouts, with the output reused and fresh."""
        for layout in task.layouts:
            axis = -1 if task.norm in ROWS or layout == LAST else 1
            arrays = data.arrays(task, layout)
            out: dict[str, Any] = {"out": data.get("out", task.dtype, layout)}
            if task.residual and task.operation == "backward":
                out["out_residual"] = data.get("out_residual", task.dtype, layout)
            for output, given in ((REUSED, out), (FRESH, {})):
                options = {"num_threads": task.threads, **given}
                if task.module:
                    layer = cybn.BatchNorm(task.channels, axis=axis, eps=EPS, dtype=task.dtype)
                    layer.gamma, layer.beta = arrays.gamma, arrays.beta
                    yield Contestant(layout, output, partial(layer, arrays.x, **options))
                else:
                    call = bind(cybn, task, arrays, axis=axis, **options)
                    yield Contestant(layout, output, call)
