"""The floors: NumPy's copy and add, on the same number of threads, as the limit that memory sets.

Each thread repeats its own part as often as the timing requires, and waits for other threads only
at the end. So the time of a floor includes no synchronization of threads, and is a little lower
than that of any single call can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise, repeat
from typing import Any

import numpy as np

from ..task import FIRST, REUSED, Array, Contestant, Data, Peer, Task

FLOOR = "floor"


class Floor(Peer):
    """``np.add(x, dy, out=dx)`` for backward, ``np.copyto(y, x)`` for everything else."""

    name = FLOOR
    order = -1
    version = np.__version__
    note = "np.copyto(y, x), or np.add(x, dy, out=dx) for backward, on the same number of threads"

    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield the floor of a plain task."""
        adds = task.operation == "backward"
        if not task.alone or (adds and task.dtype not in ("float32", "float64")):
            return
        out, *sources = (data.get(n, task.dtype) for n in ("out", "x", "dy")[: 2 + adds])
        function: Callable[..., Any] = np.add if adds else lambda x, out: np.copyto(out, x)
        cuts = np.linspace(0, out.size, task.threads + 1).astype(int)
        flat = [array.reshape(-1) for array in (*sources, out)]
        parts = [[a[start:end] for a in flat] for start, end in pairwise(cuts)]
        many = _together([partial(function, *part) for part in parts])

        def answer(sample: Any) -> Array:
            return sum(source[sample] for source in sources)  # type: ignore[return-value]

        yield Contestant(FIRST, REUSED, partial(many, 1), lambda _: out, many=many, answer=answer)


def _together(jobs: Sequence[Callable[[], Any]]) -> Callable[[int], None]:
    """Return a function that repeats each job a number of times, on its own thread."""
    pool = ThreadPoolExecutor(len(jobs))

    def loop(job: Callable[[], Any], count: int) -> None:
        for _ in repeat(None, count):
            job()

    return lambda count: list(pool.map(loop, jobs, repeat(count)))  # type: ignore[return-value]
