"""From the arguments of a public call to a kernel call: checks, layout, masks, allocation.

``calls`` is compiled once, and calls the kernels of the instruction level that `_runtime` chose.
"""

from .._runtime import kernels, row_kernels
from .calls import (
    ACTIVATIONS,
    SMALL,
    absorb,
    backward,
    forward,
    inference,
    layout,
    normalize_rows,
    normalize_rows_backward,
    route,
    statistics,
    use,
)

__all__ = [
    "ACTIVATIONS",
    "SMALL",
    "absorb",
    "backward",
    "forward",
    "inference",
    "layout",
    "normalize_rows",
    "normalize_rows_backward",
    "route",
    "statistics",
    "use",
]

use(kernels.KERNELS, row_kernels.KERNELS)
