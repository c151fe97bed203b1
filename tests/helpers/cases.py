"""Cases that several test files share: shapes, layouts, exact fills, the bound of backward."""

from functools import lru_cache

import numpy as np
import pytest
from bounds import ULP32, ULP64, column, wide
from digest_cases import FAMILIES as FAMILIES  # defined in a module that does not need pytest
from levels import LEVELS
from shapes import GROUPS, Shape

from cybn import reference

DTYPES = [np.float32, np.float64]
AXES = [pytest.param(1, id="channels-first"), pytest.param(-1, id="channels-last")]

# Many cases are divided among the levels; the slow tests run all of them at each level.
every_step = pytest.mark.parametrize(
    "step",
    [pytest.param(len(LEVELS), id="divided"), pytest.param(1, marks=pytest.mark.slow, id="all")],
)


def small(shape, most=2**16):
    """Return the shape with a small even batch, and with smaller spatial sizes if necessary."""
    n, c, spatial = min(shape.n, most * shape.n // shape.size), shape.c, shape.spatial
    n = max(2, n - n % 2)
    while Shape(n, c, spatial).size > 4 * most:
        longest = spatial.index(max(spatial))
        spatial = tuple(size // 2 if i == longest else size for i, size in enumerate(spatial))
    return Shape(n, c, spatial)


NETWORK_SHAPES = [
    pytest.param(small(shape), id=f"{group}-{shape.name}".replace(" ", "-"))
    for group, shapes in GROUPS.items()
    for shape in shapes
]


def lay(array, axis):
    """Return a channels-first array in C order with its channel axis moved to `axis`."""
    return np.ascontiguousarray(np.moveaxis(array, 1, axis))


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@lru_cache
def pairs(shape, most):
    """Return small integers whose sum is 0 in each channel of a channels-first shape.

    Each even position holds k and the next one -k. If the number of values is odd, the last is 0.
    """
    rng = np.random.default_rng(1)
    n, c, *spatial = shape
    count = n * int(np.prod(spatial))
    k = np.zeros((c, count), np.int8)
    half = rng.integers(1, most + 1, (c, count // 2), np.int8)
    half *= 1 - 2 * rng.integers(0, 2, half.shape, np.int8)
    k[:, 0 : 2 * (count // 2) : 2] = half
    k[:, 1::2] = -half
    return k.reshape(c, n, *spatial).swapaxes(0, 1)


def exact_fill(shape, dtype):
    """Return x, its mean and its M2. Both are exact in any order of summation.

    The values of a channel are p * (1 + k / 16). The power of two p differs between channels, and
    the small integers k come in pairs of opposite sign.
    """
    k = pairs(shape, most=4)
    p = 2.0 ** (np.arange(shape[1]) % 7 - 3)
    x = column((p / 16).astype(dtype), k.ndim, 1) * k + column(p.astype(dtype), k.ndim, 1)
    squares = (k * k).sum(tuple(i for i in range(k.ndim) if i != 1))
    return x, p, squares * (p / 16) ** 2


def normal_case(rng, shape, dtype, offset=0.0):
    """Return random x, dy, gamma and beta of a channels-first shape."""
    x = (rng.standard_normal(shape) + offset).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    gamma = rng.uniform(0.5, 2, shape[1]).astype(dtype)
    beta = rng.standard_normal(shape[1]).astype(dtype)
    return x, dy, gamma, beta


def backward_bound(dy, x, gamma, axis, eps=1e-5):
    """Return the exact (dx, dgamma, dbeta), and the allowed error of each.

    With size = |xhat| + 1, to which float64 adds |mean| / std, the error that xhat itself may have:
    dbeta: ulp * sum |dy|;  dgamma: ulp * sum (|dy| * size);
    dx: ulp * |gamma| * r * (|dy| + mean |dy| + size * mean (|dy| * size)).
    """
    dy, g, wx = wide(dy, np.ones(x.shape[axis], x.dtype) if gamma is None else gamma, x)
    ulp = ULP32 if x.dtype == np.float32 else ULP64
    axis = axis % x.ndim
    others = tuple(i for i in range(x.ndim) if i != axis)
    m = reference.moments(wx, axis=axis)
    exact = reference.batch_norm_backward(dy, wx, m, g, axis=axis, eps=eps)
    mean, var, g = (column(v, x.ndim, axis) for v in (m.mean, m.var(), g))
    r = 1 / np.sqrt(var + eps)
    size = np.abs(wx - mean) * r + 1
    if x.dtype == np.float64:
        size += np.abs(mean) * r
    dy = np.abs(dy)
    dbeta = dy.mean(others, keepdims=True)
    dgamma = (dy * size).mean(others, keepdims=True)
    dx = np.abs(g) * r * (dy + dbeta + size * dgamma)
    return exact, (ulp * dx, ulp * m.count * dgamma.ravel(), ulp * m.count * dbeta.ravel())
