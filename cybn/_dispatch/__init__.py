"""From the arguments of a public call to a kernel call: checks, layout, masks, allocation.

The modules are compiled once, and call the kernels of the level that `_runtime` chose.
"""

from typing import Any

from .._runtime import kernels, row_kernels
from . import batch_norm, rows
from .arguments import destination, use_moments
from .batch_norm import (
    ACTIVATIONS,
    SMALL,
    backward,
    forward,
    inference,
    layout,
    learn,
    statistics,
)
from .routes import route
from .rows import normalize_rows, normalize_rows_backward
from .running import absorb, marks
from .selection import Positions, Selection, choose, cut, select

__all__ = [
    "ACTIVATIONS",
    "SMALL",
    "Positions",
    "Selection",
    "absorb",
    "backward",
    "choose",
    "cut",
    "destination",
    "forward",
    "inference",
    "layout",
    "learn",
    "marks",
    "normalize_rows",
    "normalize_rows_backward",
    "route",
    "select",
    "statistics",
    "use",
    "use_moments",
]


def use(capsule: Any, row_capsule: Any) -> None:
    """Call the kernels of one instruction level from now on."""
    batch_norm.use(capsule)
    rows.use(row_capsule)


use(kernels.KERNELS, row_kernels.KERNELS)
