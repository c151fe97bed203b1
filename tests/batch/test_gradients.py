"""Gradients: central differences, identities of docs/math.md, and invariances."""

import numpy as np
import pytest
from bounds import ULP32, ULP64, column, forward_bound
from cases import AXES, DTYPES, FAMILIES, backward_bound, lay, normal_case, same_bits

import cybn

pytestmark = pytest.mark.divided

STEP = 2.0**-17  # near the cube root of eps, where central differences are best
ATOL, RTOL = 1e-5, 1e-3

every_layout = pytest.mark.parametrize("axis", AXES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def differences(loss, values):
    """Return d loss / d values by central differences; `loss` reads `values`."""
    gradient = np.empty(values.size)
    flat = values.reshape(-1)
    for i in range(flat.size):
        kept = flat[i]
        flat[i] = kept + STEP
        above = loss()
        flat[i] = kept - STEP
        gradient[i] = (above - loss()) / (2 * STEP)
        flat[i] = kept
    return gradient.reshape(values.shape)


def distance(got, numeric):
    """Return the largest ratio of the difference to what is allowed."""
    return float(np.max(np.abs(got - numeric) / (ATOL + RTOL * np.abs(numeric))))


SHAPES = [(5, 7), (2, 1), (3, 5, 7), (2, 3, 3, 5), (3, 1, 1, 3), (1, 2, 521), (67, 3)]


@pytest.mark.row(11)
@every_layout
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_central_differences_in_training(rng, shape, eps, axis, level, figure):
    x, dy, gamma, beta = normal_case(rng, shape, np.float64)
    if shape == (2, 1):
        x = np.array([[1.0], [2.5]])
    x, dy = lay(x, axis), lay(dy, axis)

    def loss():
        return np.vdot(cybn.batch_norm(x, gamma, beta, axis=axis, eps=eps)[0], dy)

    m = cybn.moments(x, axis=axis)
    dx, dgamma, dbeta = cybn.batch_norm_backward(dy, x, m, gamma, axis=axis, eps=eps)
    for got, values in ((dx, x), (dgamma, gamma), (dbeta, beta)):
        found = distance(got, differences(loss, values))
        figure(11, "worst, as a fraction of atol 1e-5 + rtol 1e-3", found)
        assert found <= 1


@pytest.mark.row(11)
@every_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_central_differences_in_inference(rng, shape, axis, level, figure):
    x, dy, gamma, beta = normal_case(rng, shape, np.float64)
    x, dy = lay(x, axis), lay(dy, axis)
    mean, var = rng.standard_normal(shape[1]), rng.uniform(0.5, 2, shape[1])

    def loss():
        return np.vdot(cybn.batch_norm_inference(x, mean, var, gamma, beta, axis=axis), dy)

    dx, dgamma, dbeta = cybn.batch_norm_inference_backward(dy, x, mean, var, gamma, axis=axis)
    for got, values in ((dx, x), (dgamma, gamma), (dbeta, beta)):
        found = distance(got, differences(loss, values))
        figure(11, "worst, as a fraction of atol 1e-5 + rtol 1e-3", found)
        assert found <= 1


@pytest.mark.row(12)
@every_layout
@every_dtype
@pytest.mark.parametrize("shape", FAMILIES, ids=str)
def test_identities(rng, shape, dtype, axis, figure):
    """(24) is sum dx = 0; (26) is sum dx * xhat = gamma * r * dgamma * eps / (var + eps)."""
    eps = 0.25
    x, dy, gamma, _ = normal_case(rng, shape, dtype)
    (_, dgamma, _), (allowed, _, _) = backward_bound(dy, x, gamma, 1, eps)
    m = cybn.moments(lay(x, axis), axis=axis)
    dx, _, _ = cybn.batch_norm_backward(lay(dy, axis), lay(x, axis), m, gamma, axis=axis, eps=eps)
    dx = np.moveaxis(dx, axis, 1)
    r = 1 / np.sqrt(m.var() + eps)
    xhat = (x - column(m.mean, 3, 1)) * column(r, 3, 1)
    expected = gamma * r * dgamma * eps * r**2
    total, product = dx.sum((0, 2), np.float64), (dx * xhat).sum((0, 2)) - expected
    found = max(
        np.max(np.abs(total) / allowed.sum((0, 2))),
        np.max(np.abs(product) / (allowed * (np.abs(xhat) + 1)).sum((0, 2))),
    )
    figure(12, "worst, as a fraction of the bound", found)
    assert found <= 1


@pytest.mark.row(12)
@every_layout
@every_dtype
@pytest.mark.parametrize("shape", FAMILIES, ids=str)
def test_scale_invariance(rng, shape, dtype, axis):
    """Scale x by a power of two and eps by its square: y and dx * scale are bitwise equal."""
    x, dy, gamma, beta = normal_case(rng, shape, dtype)
    x, dy = lay(x, axis), lay(dy, axis)
    y, m = cybn.batch_norm(x, gamma, beta, axis=axis)
    dx, dgamma, dbeta = cybn.batch_norm_backward(dy, x, m, gamma, axis=axis)
    for scale in (2.0**-7, 2.0**9):
        eps, scaled = 1e-5 * scale**2, x * dtype(scale)
        y2, m2 = cybn.batch_norm(scaled, gamma, beta, axis=axis, eps=eps)
        dx2, dgamma2, dbeta2 = cybn.batch_norm_backward(dy, scaled, m2, gamma, axis=axis, eps=eps)
        assert same_bits(y2, y)
        assert same_bits(dx2 * dtype(scale), dx)
        assert same_bits(dgamma2, dgamma)
        assert same_bits(dbeta2, dbeta)


@pytest.mark.row(12)
@every_dtype
@pytest.mark.parametrize("shape", FAMILIES, ids=str)
def test_shift_invariance(rng, shape, dtype):
    """Shifts are multiples of 1/64, so shifted x is exact; y and dx only differ by rounding."""
    x, dy, gamma, beta = normal_case(rng, shape, dtype)
    x = np.round(x * 64) / 64
    exact, _ = forward_bound(x, gamma, beta, 1)
    exact_backward, _ = backward_bound(dy, x, gamma, 1)
    x += dtype(4096)
    _, allowed = forward_bound(x, gamma, beta, 1)  # float64 bounds grow with the mean
    _, allowed_backward = backward_bound(dy, x, gamma, 1)
    for axis in (1, -1):
        laid = lay(x, axis)
        y, m = cybn.batch_norm(laid, gamma, beta, axis=axis)
        dx, *sums = cybn.batch_norm_backward(lay(dy, axis), laid, m, gamma, axis=axis)
        assert (np.abs(np.moveaxis(y, axis, 1) - exact) <= allowed).all()
        got = (np.moveaxis(dx, axis, 1), *sums)
        for a, b, bound in zip(got, exact_backward, allowed_backward, strict=True):
            assert (np.abs(a - b) <= bound).all()


@pytest.mark.row(12)
@every_dtype
def test_dx_of_a_constant_dy_is_nothing(rng, dtype, level):
    """A constant added to every y would not change x, so dx is 0 within rounding."""
    ulp = ULP32 if dtype == np.float32 else ULP64
    for shape in FAMILIES:
        x, _, gamma, _ = normal_case(rng, shape, dtype)
        m = cybn.moments(x)
        dx, dgamma, dbeta = cybn.batch_norm_backward(np.ones_like(x), x, m, gamma)
        r = 1 / np.sqrt(m.var() + 1e-5)
        size = np.abs(x - column(m.mean, 3, 1)) * column(r, 3, 1) + 1
        assert (dbeta == m.count).all()
        assert (np.abs(dgamma) <= ulp * size.sum((0, 2))).all()
        assert (np.abs(dx) <= ulp * column(gamma * r, 3, 1) * 4 * size).all()
