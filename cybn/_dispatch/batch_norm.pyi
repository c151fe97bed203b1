from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

from numpy.typing import ArrayLike, NDArray

from .._moments import Moments

Array: TypeAlias = NDArray[Any]
Settings: TypeAlias = tuple[int, float, str | None, float]  # axis, eps, activation, slope
Selected: TypeAlias = tuple[  # mask, weights, lengths, masked
    ArrayLike | None, ArrayLike | None, ArrayLike | None, str
]

ACTIVATIONS: dict[str, int]
SMALL: int

def use(capsule: Any) -> None: ...
def statistics(x: ArrayLike, axis: int, selected: Selected, num_threads: int | None) -> Moments: ...
def forward(
    x: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    residual: ArrayLike | None,
    settings: Settings,
    selected: Selected,
    out: Array | None,
    num_threads: int | None,
    exchange: Callable[[int, float, Array, Array], tuple[Array, Array]] | None = None,
) -> tuple[Array, Moments]: ...
def learn(
    x: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    residual: ArrayLike | None,
    settings: Settings,
    selected: Selected,
    out: Array | None,
    num_threads: int | None,
    running_mean: Array,
    running_var: Array,
    weight: float,
    ddof: int,
) -> tuple[Array, Moments, Array, Array]: ...
def inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    residual: ArrayLike | None,
    settings: Settings,
    selected: Selected,
    out: Array | None,
    num_threads: int | None,
    again: bool = False,
) -> Array: ...
def backward(
    dy: ArrayLike,
    x: ArrayLike,
    statistics: Moments | SimpleNamespace | tuple[ArrayLike, ...],
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    residual: ArrayLike | None,
    settings: Settings,
    selected: Selected,
    from_output: bool,
    out: Array | None,
    out_residual: Array | None,
    num_threads: int | None,
    exchange: Callable[[Array], Array] | None = None,
    again: bool = False,
) -> tuple[Array, ...]: ...
def layout(x: ArrayLike, axis: int) -> tuple[int, int, int, bool]: ...
