from collections.abc import Callable
from typing import Any, TypeAlias

from numpy.typing import ArrayLike, NDArray

from .._moments import Moments
from .forms import Form

Array: TypeAlias = NDArray[Any]
Settings: TypeAlias = tuple[int, int | None, float | None]  # axis, num_groups, eps

def use(capsule: Any) -> None: ...
def normalize_rows(
    x: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    settings: Settings,
    centred: bool,
    out: Array | None,
    num_threads: int | None,
) -> tuple[Array, Moments]: ...
def normalize_rows_backward(
    dy: ArrayLike,
    x: ArrayLike,
    check: Callable[[Form, Any], tuple[Array, Array]],
    statistics: Any,
    gamma: ArrayLike | None,
    settings: Settings,
    centred: bool,
    out: Array | None,
    num_threads: int | None,
) -> tuple[Array, Array, Array]: ...
