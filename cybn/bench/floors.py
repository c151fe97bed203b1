"""The floors: what memory itself allows, with NumPy's own copy and add on the same threads.

Each thread repeats its own part as often as the timing asks for, and waits for nobody before the
end, so that a floor holds no handover between threads at all. It is a little lower than any
single call can be.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .task import FIRST, Contestant, Data, pick

__all__ = ["FLOOR", "floor", "floor_answer"]

FLOOR = "floor"


def floor(operation: str, threads: int, data: Data) -> Contestant:
    """Return the contestant that no other is expected to beat.

    Parameters
    ----------
    operation : str
        ``np.add(x, dy, out=dx)`` for backward, ``np.copyto(y, x)`` for everything else.
    threads : int
        Each gets one contiguous part.
    data : Data
        The batch.
    """
    x, dy, out = (a.reshape(-1) for a in (data.x(), data.dy(), data.out()))
    cuts = np.linspace(0, x.size, threads + 1).astype(int)
    parts = [slice(*pair) for pair in pairwise(cuts)]
    jobs: list[Callable[[], Any]]
    if operation == "backward":
        jobs = [partial(np.add, x[p], dy[p], out=out[p]) for p in parts]
    else:
        jobs = [partial(np.copyto, out[p], x[p]) for p in parts]
    many = _together(jobs)

    def read(_: Any, channels: Any) -> Any:
        return pick(data.out(), FIRST, channels)

    return Contestant(FLOOR, "", "", partial(many, 1), read, many=many)


def floor_answer(operation: str, data: Data) -> NDArray[Any]:
    """Return what a floor gives in the channels that are checked."""
    x: NDArray[Any] = data.x()[:, data.channels]
    return x + data.dy()[:, data.channels] if operation == "backward" else x


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
