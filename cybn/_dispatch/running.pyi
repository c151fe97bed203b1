from typing import Any, TypeAlias

from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

def absorb(
    mean: Array, var: Array, batch_mean: Array, batch_m2: Array, degrees: Any, weight: float
) -> tuple[Array, Array]: ...
def marks(
    x: Array | None, gamma: Array | None, beta: Array | None, residual: Array | None
) -> tuple[bytes | None, ...]: ...
