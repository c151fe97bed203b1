from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

class Selection(NamedTuple):
    mask: NDArray[np.bool_] | None
    weights: NDArray[Any] | None
    ends: NDArray[np.intp] | None
    places: NDArray[np.intp] | None

    def at(
        self, index: tuple[slice, ...]
    ) -> tuple[NDArray[np.bool_] | None, NDArray[np.float64] | None]: ...

class Positions(NamedTuple):
    shares: NDArray[Any]
    number: int
    total: int | float

def select(
    shape: tuple[int, ...],
    axis: int,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    lengths: ArrayLike | None,
) -> Selection | None: ...
def choose(
    shape: tuple[int, ...],
    axis: int,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    lengths: ArrayLike | None,
) -> Positions | None: ...
