"""The gain of each step from the textbook kernel to the real one: ``pytest bench -k steps``.

The textbook is `cybn/_kernels/plain.pyx`. Each step adds something to the step before, and the last
step is a normal call of cybn.

lanes             `moments` and `batch_norm_inference`, one after the other, on one thread, with
                  vectors of 128 bits. Sums are taken in 32 lanes. If a channel is not a long run
                  (channels-last, 7x7), the lanes are columns: neighbouring channels
wide lanes        the same at the highest instruction level of this CPU
threads           the same on the threads of the task
one region        one call and parallel region instead of two; backward always is one call
past the caches   results are written past the caches, so that x stays in them
blocks            a thread does all passes for some channels while they are in its L2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any

import numpy as np

import cybn
from cybn import _dispatch, _runtime
from cybn._kernels import plain

from ..task import EPS, LAST, Array, Contestant, Data, Peer, Task, bind

HUGE, NONE = 1 << 50, 1  # bytes of a cache that holds everything, and of one that holds nothing


class Steps(Peer):
    """The kernels of cybn as they are after each step, in float32."""

    name = "steps"
    order = 1
    version = cybn.__version__
    note = "from plain.pyx to the real kernels"
    everywhere = quick = False

    def contestants(self, task: Task, data: Data) -> Iterator[Contestant]:
        """Yield the steps, as outputs of both layouts."""
        first, last = _runtime.usable_levels()[0], _runtime.level
        for layout in task.layouts:
            n, c, size = *task.shape[:2], prod(task.shape[2:])
            form = (n * size, c, 1) if layout == LAST else (n, c, size)
            given = data.arrays(task, layout)
            given = given._replace(x=given.x.reshape(form), dy=given.dy.reshape(form))
            out = data.get("out", layout=layout)
            read = partial(lambda out, _: out, out)
            whole = partial(bind, cybn, task, given, out=out.reshape(form))
            parts = partial(_halves, given, out.reshape(form))
            parts = parts if task.operation == "forward" else whole
            steps: dict[str, tuple[Any, ...]] = {
                "lanes": (parts, first, 1, HUGE, HUGE),
                "wide lanes": (parts, last, 1, HUGE, HUGE),
                "threads": (parts, last, task.threads, HUGE, HUGE),
                "one region": (whole, last, task.threads, HUGE, HUGE),
                "past the caches": (whole, last, task.threads, HUGE, NONE),
                "blocks": (whole, last, task.threads),  # last, as other peers need it
            }
            if parts is whole:
                del steps["one region"]
            yield Contestant(layout, "textbook", _textbook(task, given, out.reshape(form)), read)
            for step, (make, level, threads, *caches) in steps.items():
                call, before = make(num_threads=threads), partial(_use, level, *caches)
                yield Contestant(layout, step, call, read, before=before)


def _halves(a: Any, out: Array, num_threads: int) -> Callable[[], Any]:
    """Return a forward as two calls."""

    def call() -> None:
        found = cybn.moments(a.x, num_threads=num_threads)
        given = a.x, found.mean, found.var(), a.gamma, a.beta
        cybn.batch_norm_inference(*given, eps=EPS, out=out, num_threads=num_threads)

    return call


def _textbook(task: Task, a: Any, out: Array) -> Callable[[], Any]:
    """Return a call of `plain`."""
    mean, m2 = np.empty((2, task.channels))
    forward = partial(plain.forward, a.x, a.gamma, a.beta, EPS, out, mean, m2)
    if task.operation == "forward":
        return forward
    forward()
    given = a.dy, a.x, mean, m2, a.gamma, EPS, out
    return partial(plain.backward, *given, *np.empty((2, task.channels)))


def _use(level: str, *caches: int) -> None:
    """Use the kernels of a level, with the real sizes of L2 and L3 or with these."""
    kernels = _runtime.kernels_at(level)
    if caches:
        kernels.set_caches(*caches)
    _dispatch.use(kernels.KERNELS, _runtime.kernels_at(level, "layer_norm").KERNELS)
