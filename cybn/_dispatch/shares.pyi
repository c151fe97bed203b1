from typing import Any

from numpy.typing import ArrayLike, NDArray

def checked(
    shape: tuple[int, ...],
    axis: int,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    lengths: ArrayLike | None,
) -> tuple[Any, Any, Any, Any]: ...
def require_alike(
    mask: NDArray[Any] | None, weights: NDArray[Any] | None, shape: tuple[int, ...], axis: int
) -> None: ...
