"""Every activation and its slope: special values, and errors in units in the last place.

Mean 0, variance 1, eps 0 and beta -0.0 make z equal to x, bit for bit. Results are compared with
`cybn.reference` in long double; only the erfc of its gelu is computed in float64.
"""

import numpy as np
import pytest

import cybn
from cybn import reference

FLOATS = [np.float32, np.float64]
SMOOTH = {"hardswish": 4, "sigmoid": 4, "tanh": 4, "silu": 4, "gelu": 8}
KINKED = ["relu", "relu6", "leaky_relu"]
SLOPE = 0.25
MOST_SLOPE_ULP = {"gelu": 12}  # 8 for other activations
NAN, INF = np.nan, np.inf

# Results at -inf, the lowest number, -1e30, -0.0, 0.0, 1e30, the largest number, inf and NaN.
# `L` stands for the number itself, `S` for SLOPE times the number.
VALUES = {
    "relu": [0, 0, 0, -0.0, 0, "L", "L", INF, NAN],
    "relu6": [0, 0, 0, -0.0, 0, 6, 6, 6, NAN],
    "leaky_relu": [-INF, "S", "S", -0.0, 0, "L", "L", INF, NAN],
    "hardswish": [NAN, -0.0, -0.0, -0.0, 0, "L", "L", INF, NAN],
    "sigmoid": [0, 0, 0, 0.5, 0.5, 1, 1, 1, NAN],
    "tanh": [-1, -1, -1, -0.0, 0, 1, 1, 1, NAN],
    "silu": [NAN, -0.0, -0.0, -0.0, 0, "L", "L", INF, NAN],
    "gelu": [NAN, -0.0, -0.0, -0.0, 0, "L", "L", INF, NAN],
}
SLOPES = {
    "relu": [0, 0, 0, 0, 0, 1, 1, 1, 1],
    "relu6": [0, 0, 0, 0, 0, 0, 0, 0, 1],
    "leaky_relu": [SLOPE, SLOPE, SLOPE, SLOPE, SLOPE, 1, 1, 1, 1],
    "hardswish": [0, 0, 0, 0.5, 0.5, 1, 1, 1, NAN],
    "sigmoid": [0, 0, 0, 0.25, 0.25, 0, 0, 0, NAN],
    "tanh": [0, 0, 0, 1, 1, 0, 0, 0, NAN],
    "silu": [NAN, 0, 0, 0.5, 0.5, 1, 1, NAN, NAN],
    "gelu": [NAN, 0, 0, 0.5, 0.5, 1, 1, NAN, NAN],
}


def special(dtype):
    largest = np.finfo(dtype).max
    return np.array([-INF, -largest, -1e30, -0.0, 0.0, 1e30, largest, INF, NAN], dtype)


def through(z, activation, dy=1.0, module=cybn):
    """Return f(z), and dy times f'(z), as the public functions compute them."""
    x, zero, one = z[np.newaxis, np.newaxis], np.zeros(1), np.ones(1)
    act = {"eps": 0, "activation": activation, "slope": SLOPE}
    y = module.batch_norm_inference(x, zero, one, one, -zero, **act)
    dx, *_ = module.batch_norm_inference_backward(
        np.full_like(x, dy), x, zero, one, one, beta=-zero, **act
    )
    return y[0, 0], dx[0, 0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", VALUES)
def test_special_values(level, activation, dtype):
    """Values are repeated, so that each one meets whole vectors and the rest after them."""
    z = np.tile(special(dtype), 37)
    own = {"L": z[:9], "S": dtype(SLOPE) * z[:9]}
    right = [own[v][i] if isinstance(v, str) else v for i, v in enumerate(VALUES[activation])]
    y, slope = through(z, activation)
    right = np.tile(np.array(right, dtype), 37)
    np.testing.assert_array_equal(y, right)
    numbers = ~np.isnan(right)
    np.testing.assert_array_equal(np.signbit(y[numbers]), np.signbit(right[numbers]))
    np.testing.assert_array_equal(slope, np.tile(np.array(SLOPES[activation], dtype), 37))


@pytest.mark.parametrize("activation", VALUES)
def test_reference_has_the_same_special_values(activation):
    z = special(np.float64)
    with np.errstate(all="ignore"):
        y, slope = reference.activated(z, activation, SLOPE)
    ours, our_slope = through(z, activation)
    np.testing.assert_array_equal(y, ours)
    np.testing.assert_array_equal(slope, our_slope)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
@pytest.mark.parametrize("dy", [NAN, INF])
def test_a_slope_of_zero_stops_what_is_not_finite(level, dy, activation, dtype):
    z = np.tile(np.array([-4, 4, 7], dtype), 50)
    _, dx = through(z, activation, dy)
    assert (dx[0::3] == 0).all()
    assert np.isfinite(dx[2::3]).all() == (activation == "relu6")
    assert not np.isfinite(dx[1::3]).any() or activation == "hardswish"


@pytest.mark.parametrize("dtype", FLOATS)
def test_kinks(level, dtype):
    """Values are -3, 3, 0, 6, and the numbers next to them."""
    ties = np.array([-3, 3, 0, 6], dtype)
    z = np.concatenate([np.nextafter(ties, -INF), ties, np.nextafter(ties, INF)]).astype(dtype)
    for activation in [*KINKED, "hardswish"]:
        y, dx = through(z, activation)
        right, slope = reference.activated(z.astype(np.longdouble), activation, SLOPE)
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(y, right.astype(dtype), 4 * eps, np.finfo(dtype).tiny)
        np.testing.assert_allclose(dx, slope.astype(dtype), 4 * eps, np.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", SMOOTH)
def test_errors_in_ulp(rng, level, activation, dtype):
    """Values are dense where the curve bends, cover the tails, and go down to subnormals."""
    n = 20_000
    end = 37.0 if activation == "gelu" else 760.0  # beyond, the reference's erfc is subnormal
    lowest = np.log10(float(np.finfo(dtype).smallest_subnormal))
    small = 10.0 ** rng.uniform(lowest + 1, 0, n)
    z = np.concatenate([np.linspace(-8, 8, n), rng.uniform(-end, end, n), small, -small])
    z = z.astype(dtype)
    y, slope = through(z, activation)
    with np.errstate(all="ignore"):
        right, right_slope = reference.activated(z.astype(np.longdouble), activation, SLOPE)
        unit = np.spacing(np.abs(right).astype(dtype)).astype(np.longdouble)
        size = np.abs(right_slope)
        if activation in ("silu", "gelu", "hardswish"):  # their slopes pass through 0
            size = np.where((z > -3) & (z < 0), np.maximum(size, 0.1), size)
        slope_unit = np.spacing(size.astype(dtype)).astype(np.longdouble)
    worst = np.max(np.abs(y - right) / unit)
    worst_slope = np.max(np.abs(slope - right_slope) / slope_unit)
    print(f"{activation} {np.dtype(dtype)}: y {worst:.2f} ulp, slope {worst_slope:.2f} ulp")
    assert worst <= SMOOTH[activation]
    assert worst_slope <= MOST_SLOPE_ULP.get(activation, 8)
