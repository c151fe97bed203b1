from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]  # all arrays have the same type, float32 or float64
Wide: TypeAlias = NDArray[np.float64]

def forward(
    x: Array,
    gamma: Array,
    beta: Array,
    eps: float,
    y: Array,
    mean: Wide,
    m2: Wide,
    threads: int = 1,
) -> None: ...
def backward(
    dy: Array,
    x: Array,
    mean: Wide,
    m2: Wide,
    gamma: Array,
    eps: float,
    dx: Array,
    dgamma: Wide,
    dbeta: Wide,
    threads: int = 1,
) -> None: ...
