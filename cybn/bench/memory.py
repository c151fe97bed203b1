"""The memory that a training forward with ``out=`` takes beside its arguments, at its peak.

Two measures. `tracemalloc` sees what Python and NumPy allocate, to the byte. The system sees the
rest, such as what kernels and OpenMP allocate and the stacks they use: pages that are touched for
the first time, and the high-water mark of resident memory for pages larger than those. A process
of its own is measured, in which the C library takes every block from the system (its threshold for
that is put down to a page), so that no memory from earlier work is used again unseen. The code has
run before, on a small batch; the batch itself is new, and its first call is the one that counts.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import cybn

from .results import Peak
from .shapes import Shape
from .task import FIRST, LAST

__all__ = ["SHAPES", "peaks"]

SHAPES = [Shape(32, 64, (112, 112)), Shape(32, 2048, (7, 7)), Shape(1, 1, (2048, 2048))]

WARM = Shape(8, 8, (64, 64))  # small, but not too small for several threads

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peaks(threads: int, shapes: Sequence[Shape] = SHAPES, dtype: str = "float32") -> list[Peak]:
    """Measure a training forward of each shape in both layouts, each in a process of its own.

    Parameters
    ----------
    threads : int
        Of the call.
    shapes : sequence of Shape
        Batches.
    dtype : str, default "float32"
        Their type.
    """
    return [
        _elsewhere(shape, layout, dtype, threads) for shape in shapes for layout in (FIRST, LAST)
    ]


def _elsewhere(shape: Shape, layout: str, dtype: str, threads: int) -> Peak:
    task = json.dumps([shape, layout, dtype, threads])
    code = f"from {__name__} import report; report({task!r})"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "4096"}
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        check=True,
        capture_output=True,
        env=environment,
        text=True,
    )
    traced, touched = json.loads(found.stdout)
    return Peak(shape.name, shape.c, layout, dtype, threads, traced, touched)


def report(task: str) -> None:
    """Print the two measures of one task; the work of the process that is measured."""
    (n, c, spatial, _), layout, dtype, threads = json.loads(task)
    shape = Shape(n, c, tuple(spatial))
    forward(WARM, layout, dtype, threads)()
    first, again = forward(shape, layout, dtype, threads), forward(shape, layout, dtype, threads)
    touched = touched_by(first)
    print(json.dumps([traced_by(again), touched]))


def forward(shape: Shape, layout: str, dtype: str, threads: int) -> Callable[[], Any]:
    """Return a call whose arguments are in memory already."""
    sizes = shape.channels_first if layout == FIRST else shape.channels_last
    x = np.full(sizes, 0.5, dtype)
    x.reshape(-1)[::3] = 2
    gamma, beta, out = np.ones(shape.c, dtype), np.zeros(shape.c, dtype), np.full_like(x, np.nan)
    axis = 1 if layout == FIRST else -1
    return partial(cybn.batch_norm, x, gamma, beta, axis=axis, out=out, num_threads=threads)


def traced_by(call: Callable[[], Any]) -> int:
    """Return the bytes that Python and NumPy allocate during a call, at their peak."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def touched_by(call: Callable[[], Any]) -> int:
    """Return the bytes of memory that are touched for the first time during a call.

    The count of page faults is exact, but holds a huge page for a small one; the high-water mark
    of resident memory is not, but sees those. It also sees code that is loaded, which is taken off
    again. The larger counts; Linux alone has the latter.
    """
    with suppress(OSError):
        _CLEAR.write_text("5")  # the high-water mark starts from what is resident now
    before, faults = _resident(), _faults()
    call()
    touched = (_faults() - faults) * os.sysconf("SC_PAGE_SIZE")
    return max(touched, _resident() - before)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _resident() -> int:
    """Return the high-water mark of resident memory, less files, in bytes; 0 if not known."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    sizes = {name: int(rest[0]) << 10 for name, *rest in map(str.split, lines) if "kB" in rest}
    return sizes["VmHWM:"] - sizes["RssFile:"]
