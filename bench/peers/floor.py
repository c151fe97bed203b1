"""The floors: what memory itself allows, with NumPy's own copy and add on the same threads.

Each thread repeats its own part as often as the timing asks for, and waits for nobody before the
end, so that a floor holds no handover between threads at all: it is a little lower than any single
call can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise, repeat
from typing import Any

import numpy as np

from ..task import FIRST, REUSED, Contestant, Data, Peer, Task

FLOOR = "floor"


class Floor(Peer):
    """``np.add(x, dy, out=dx)`` for backward, ``np.copyto(y, x)`` for everything else."""

    name = FLOOR
    order = -1
    version = np.__version__
    note = "np.copyto(y, x), or np.add(x, dy, out=dx) for backward, split over the same threads"

    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield the one floor of a plain task."""
        plain = Task(task.operation, task.shape, task.norm, task.dtype, task.threads, task.groups)
        adds = task.operation == "backward"
        if task != plain or (adds and task.dtype not in ("float32", "float64")):
            return
        names = ("x", "dy", "out") if adds else ("x", "out")
        *sources, out = (data.get(name, task.dtype).reshape(-1) for name in names)
        function = np.add if adds else _copy
        cuts = np.linspace(0, out.size, task.threads + 1).astype(int)
        parts = [slice(*pair) for pair in pairwise(cuts)]
        many = _together([partial(function, *(s[p] for s in sources), out[p]) for p in parts])

        def answer(sample: Any) -> Any:
            x = data.get("x", task.dtype)[sample]
            return x + data.get("dy", task.dtype)[sample] if adds else x

        def read(_: Any) -> Any:
            return data.get("out", task.dtype)

        yield Contestant(FIRST, REUSED, partial(many, 1), read, many=many, answer=answer)


def _copy(source: Any, target: Any) -> None:
    np.copyto(target, source)


def _together(jobs: list[Callable[[], Any]]) -> Callable[[int], None]:
    """Return a function that repeats every job, each on a thread of its own, a number of times."""
    mine, *others = jobs
    pool = ThreadPoolExecutor(len(others)) if others else None

    def loop(job: Callable[[], Any], count: int) -> None:
        for _ in repeat(None, count):
            job()

    def many(count: int) -> None:
        waiting = [pool.submit(loop, job, count) for job in others] if pool else []
        loop(mine, count)
        for future in waiting:
            future.result()

    return many
