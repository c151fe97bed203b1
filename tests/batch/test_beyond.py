"""Results are right even if squares of values or sums of gradients overflow or underflow.

The results are those of values multiplied by a power of two, within the bounds of docs/math.md.
Float64 is compared with long double, if that has a larger range, and float32 with float64.
"""

import ml_dtypes
import numpy as np
import pytest
from bounds import ULP32, ULP64

import cybn
from cybn import reference

pytestmark = [pytest.mark.row(6), pytest.mark.divided]

N, C, L = 24, 6, 20
WIDE = np.finfo(np.longdouble).maxexp > 2000
FACTORS = {  # of the channels of x, by type
    "f4": [2.0**127, 2.0**90, 2.0**50, 2.0**-60, 2.0**-120, 2.0**-140],
    "f8": [2.0**1020, 2.0**600, 2.0**450, 2.0**-420, 2.0**-600, 2.0**-1000],
}
LAYOUTS = ["first", "last", "flat", "runs"]
ACTIVATIONS = [None, "relu", "leaky_relu", "silu", "hardswish"]


def unit(dtype):
    return ULP64 if dtype == "f8" else ULP32


def wider(*arrays):
    """Return arrays in a type with a larger range: float64, or long double for float64."""
    to = np.longdouble if any(a is not None and a.dtype == np.float64 for a in arrays) else "f8"
    return [None if a is None else a.astype(to) for a in arrays]


def batch(rng, dtype, layout, factors):
    """Return x, whose channels have different factors, and its channel axis."""
    if dtype == "f8" and not WIDE:
        pytest.skip("long double is float64 on this machine")
    shape = {"first": (N, C, L), "last": (N, L, C), "flat": (N * L, C), "runs": (2, C, 300)}[layout]
    axis = {"first": 1, "last": 2, "flat": 1, "runs": 1}[layout]
    x = rng.uniform(-1, 1, shape)
    x *= np.asarray(factors).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return x.astype(dtype), axis


def tiny_eps(dtype):
    """Return an eps that hardly changes the smallest variance."""
    return 1e-300 if dtype == "f4" else 5e-324


def assert_close(got, exact, axis, factor):
    """Compare each channel relative to its size; what is too large for the type must be inf."""
    others = tuple(i for i in range(exact.ndim) if i != axis) if exact.ndim > 1 else ()
    size = np.abs(exact).max(others, keepdims=True) if others else np.abs(exact).max()
    beyond = np.abs(exact) > np.finfo(got.dtype).max
    assert (np.isinf(got) == beyond).all(), (
        got[np.isinf(got) != beyond][:3],
        exact[np.isinf(got) != beyond][:3],
    )
    error = np.abs(np.where(beyond, 0, got) - np.where(beyond, 0, exact))
    assert (error <= factor * size + np.finfo(got.dtype).smallest_subnormal).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FACTORS)
def test_batch_norm(rng, dtype, layout, activation, level):
    """Forward and backward are right, and the bits of two ordinary channels do not change."""
    factors = [1.0, 1.0, *rng.choice(FACTORS[dtype], 4, replace=False)]
    x, axis = batch(rng, dtype, layout, factors)
    gamma, beta = rng.uniform(0.5, 2, (2, C)).astype(dtype)
    residual, dy = rng.standard_normal((2, *x.shape)).astype(dtype)
    residual = residual if activation == "relu" else None
    k = {"axis": axis, "eps": tiny_eps(dtype), "activation": activation}
    y, m = cybn.batch_norm(x, gamma, beta, residual=residual, **k)
    wx, wg, wb, wr, wdy = wider(x, gamma, beta, residual, dy)
    exact, _ = reference.batch_norm(wx, wg, wb, residual=wr, **k)
    assert_close(y, exact, axis, 4 * unit(dtype))
    own = x.copy()
    more = None if residual is None else residual.copy()
    assert cybn.batch_norm(own, gamma, beta, residual=more, out=own, **k)[0] is own
    assert own.tobytes() == y.tobytes()

    found = cybn.batch_norm_backward(dy, x, m, gamma, beta=beta, residual=residual, **k)
    want = reference.batch_norm_backward(wdy, wx, m, wg, beta=wb, residual=wr, **k)
    for a, b in zip(found, want, strict=True):
        assert_close(a, b, axis, 64 * unit(dtype))
    for i in range(2):
        given = [dy.copy(), x.copy()]
        more = None if residual is None else residual.copy()
        same = cybn.batch_norm_backward(
            *given, m, gamma, beta=beta, residual=more, out=given[i], **k
        )
        assert same[0] is given[i]
        for a, b in zip(same, found, strict=True):
            assert_close(a, np.asarray(b, "f8"), axis, 64 * unit(dtype))

    ordinary = np.take(x, [0, 1], axis)
    few, _ = cybn.batch_norm(
        ordinary,
        gamma[:2],
        beta[:2],
        residual=None if residual is None else np.take(residual, [0, 1], axis),
        **k,
    )
    if layout in ("first", "runs"):  # others sum shorter rows in another order
        assert few.tobytes() == np.ascontiguousarray(np.take(y, [0, 1], axis)).tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FACTORS)
def test_inference(rng, dtype, layout, level):
    """The given mean and variance are about those of x."""
    factors = [1.0, *rng.choice(FACTORS[dtype], 5, replace=False)]
    x, axis = batch(rng, dtype, layout, factors)
    dy = rng.standard_normal(x.shape).astype(dtype)
    mean, scale = np.asarray(factors) / 4, np.asarray(factors) / 2
    with np.errstate(over="ignore", under="ignore"):
        var = scale**2
    keep = np.isfinite(var) & (var > 1e-290)  # otherwise it is not a normal float64
    mean, var = np.where(keep, mean, 0.0), np.where(keep, var, 1.0)
    x = np.where(
        np.moveaxis(np.broadcast_to(keep, (*x.shape[:axis], *x.shape[axis + 1 :], C)), -1, axis),
        x,
        0,
    )
    x = x.astype(dtype)
    k = {"axis": axis, "eps": 0.0}
    y = cybn.batch_norm_inference(x, mean, var, **k)
    wx, wdy, wmean, wvar = wider(x, dy, mean, var)
    assert_close(y, reference.batch_norm_inference(wx, wmean, wvar, **k), axis, 4 * unit(dtype))
    found = cybn.batch_norm_inference_backward(dy, x, mean, var, **k)
    want = reference.batch_norm_inference_backward(wdy, wx, wmean, wvar, **k)
    for a, b in zip(found, want, strict=True):
        assert_close(a, b, axis, 64 * unit(dtype))


@pytest.mark.parametrize("masked", ["normalize", "zero"])
@pytest.mark.parametrize("dtype", FACTORS)
def test_masks_and_weights(rng, dtype, masked, level):
    factors = [1.0, *rng.choice(FACTORS[dtype], 5, replace=False)]
    x, axis = batch(rng, dtype, "first", factors)
    dy = rng.standard_normal(x.shape).astype(dtype)
    weights = rng.integers(0, 4, (N, L)).astype(dtype)
    for chosen in (
        {"mask": weights > 0},
        {"weights": weights},
        {"lengths": [L - i % 9 for i in range(N)]},
    ):
        k = {"eps": tiny_eps(dtype), "masked": masked, **chosen}
        y, m = cybn.batch_norm(x, **k)
        wx, wdy = wider(x, dy)
        assert_close(y, reference.batch_norm(wx, **k)[0], axis, 4 * unit(dtype))
        for a, b in zip(
            cybn.batch_norm_backward(dy, x, m, **k),
            reference.batch_norm_backward(wdy, wx, m, **k),
            strict=True,
        ):
            assert_close(a, b, axis, 64 * unit(dtype))


LAST = {"num_groups": 4, "axis": 2}
MASKED = {"num_groups": 4, "lengths": [30, 20, 9, 4, 30, 7]}
ROWS = {
    "layer short": (cybn.layer_norm, cybn.layer_norm_backward, (40, 16), {}),
    "layer": (cybn.layer_norm, cybn.layer_norm_backward, (40, 100), {}),
    "layer long": (cybn.layer_norm, cybn.layer_norm_backward, (3, 70000), {}),
    "rms short": (cybn.rms_norm, cybn.rms_norm_backward, (40, 16), {}),
    "rms": (cybn.rms_norm, cybn.rms_norm_backward, (40, 100), {}),
    "group runs": (cybn.group_norm, cybn.group_norm_backward, (6, 8, 200), {"num_groups": 4}),
    "group along": (cybn.group_norm, cybn.group_norm_backward, (6, 8, 30), {"num_groups": 4}),
    "group last": (cybn.group_norm, cybn.group_norm_backward, (6, 30, 8), LAST),
    "instance": (cybn.instance_norm, cybn.instance_norm_backward, (6, 8, 200), {}),
    "instance last": (cybn.instance_norm, cybn.instance_norm_backward, (6, 200, 8), {"axis": -1}),
    "masked": (cybn.group_norm, cybn.group_norm_backward, (6, 8, 30), MASKED),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", FACTORS)
def test_rows(rng, dtype, kind, level):
    """Every third sample has ordinary values."""
    function, gradients, shape, options = ROWS[kind]
    axis, k = options.get("axis", 1) % len(shape), options | {"eps": tiny_eps(dtype)}
    if dtype == "f8" and not WIDE:
        pytest.skip("long double is float64 on this machine")
    factors = rng.choice(FACTORS[dtype], shape[0])
    factors[::3] = 1
    x = (rng.uniform(-1, 1, shape) * factors.reshape(-1, *[1] * (len(shape) - 1))).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    gamma, beta = rng.uniform(0.5, 2, (2, shape[axis])).astype(dtype)
    affine = (gamma,) if "rms" in kind else (gamma, beta)
    y, m = function(x, *affine, **k)
    wx, wdy, *wide = wider(x, dy, *affine)
    exact, _ = getattr(reference, function.__name__)(wx, *wide, **k)
    assert_close(y, exact, 0, 4 * unit(dtype))
    own = x.copy()
    assert function(own, *affine, out=own, **k)[0].tobytes() == y.tobytes()
    found = gradients(dy, x, m, gamma, **k)
    want = getattr(reference, gradients.__name__)(wdy, wx, m, wide[0], **k)
    assert_close(found[0], want[0], 0, 64 * unit(dtype))
    for a, b in zip(found[1:], want[1:], strict=True):
        assert np.abs(a - b).max() <= 256 * unit(dtype) * np.abs(b).max()
    for i in range(2):
        given = [dy.copy(), x.copy()]
        assert gradients(*given, m, gamma, out=given[i], **k)[0].tobytes() == found[0].tobytes()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_gradients_whose_sums_overflow(rng, dtype, layout, activation, level):
    """dy is near the largest value, with both signs: dbeta is small, dx is in range."""
    x, axis = batch(rng, dtype, layout, np.full(C, 1000.0))
    top = 2.0 ** (127 if dtype == "f4" else 1023)
    dy = np.ones(x.shape, dtype)
    half = dy.reshape(-1)[: x.size // 2]
    half[...] = -1
    dy = (np.ascontiguousarray(dy) * np.asarray(top, dtype)).astype(dtype)
    k = {"axis": axis, "activation": activation}
    mean, var = np.zeros(C, dtype), np.full(C, 1e6, dtype)
    m = cybn.moments(x, axis=axis)
    wx, wdy = wider(x, dy)
    pairs = [
        (cybn.batch_norm_backward(dy, x, m, **k), reference.batch_norm_backward(wdy, wx, m, **k)),
        (
            cybn.batch_norm_inference_backward(dy, x, mean, var, **k),
            reference.batch_norm_inference_backward(wdy, wx, mean, var, **k),
        ),
    ]
    for found, want in pairs:
        assert_close(found[0], want[0], axis, 256 * unit(dtype))
        for a, b in zip(found[1:], want[1:], strict=True):
            inside = np.abs(b) <= np.finfo(dtype).max
            assert np.array_equal(np.isfinite(a), inside)
            error = np.abs(a[inside] - b[inside]) / (np.longdouble(top) * x.size)
            assert (error <= 64 * unit(dtype)).all()
    own = dy.copy()
    dx, *_ = cybn.batch_norm_backward(own, x, m, out=own, **k)
    assert_close(dx, np.asarray(pairs[0][0][0], "g"), axis, 256 * unit(dtype))


def test_exact_values(level):
    """Results computed by hand: +-a has mean 0 and variance a * a, and y is the sign."""
    signs = np.where(np.arange(48) % 2, 1.0, -1.0)
    for size in (1e154, 1e160, 1e200, 1e308, 1.7e308):
        y, m = cybn.batch_norm(signs[:, None] * size)
        assert np.abs(y[:, 0] - signs).max() <= 2.0**-50
        assert m.mean[0] == 0
    for size in (1e-160, 1e-200, 1e-300):
        y = cybn.batch_norm_inference(signs[:, None] * size, [0.0], [0.0], eps=1.0)
        assert (y[:, 0] == signs * size).all()
    x = np.array([3e38] * 15 + [-3e38], "f4")[:, None]
    y, _ = cybn.batch_norm(x)
    np.testing.assert_allclose(y[:15, 0], 15**-0.5, rtol=2.0**-22)
    np.testing.assert_allclose(y[15, 0], -(15**0.5), rtol=2.0**-22)
    y, square = cybn.rms_norm(np.full((1, 4), 1e200))
    assert np.abs(y - 1).max() <= 2.0**-52
    assert square[0] == np.inf


def test_bfloat16_has_the_range_of_float32(level):
    x = np.array([3e38] * 15 + [-3e38], ml_dtypes.bfloat16)[:, None]
    y, m = cybn.batch_norm(x)
    np.testing.assert_allclose(y.astype("f8")[:15, 0], 15**-0.5, rtol=2.0**-8)
    np.testing.assert_allclose(y.astype("f8")[15, 0], -(15**0.5), rtol=2.0**-8)
    dx, *_ = cybn.batch_norm_backward(np.ones_like(x), x, m)
    assert np.isfinite(dx.astype("f8")).all()


def test_nan_stays_in_its_channel(level):
    """The NaN is in one of two channels that are computed again; the third is ordinary."""
    x = np.tile(np.where(np.arange(48) % 2, 1e200, -1e200)[:, None], (1, 3))
    x[:, 1] = np.arange(48)
    clean, _ = cybn.batch_norm(x)
    x[5, 0] = np.nan
    y, m = cybn.batch_norm(x)
    assert np.isnan(y[:, 0]).all()
    assert y[:, 1:].tobytes() == clean[:, 1:].tobytes()
    dx, *_ = cybn.batch_norm_backward(np.ones_like(x), x, m)
    assert np.isnan(dx[:, 0]).all()
    assert np.isfinite(dx[:, 1:]).all()
    x[5, 0] = np.inf
    y, _ = cybn.batch_norm(x)
    assert np.isnan(y[:, 0]).all()
    assert y[:, 1:].tobytes() == clean[:, 1:].tobytes()


@pytest.mark.parametrize("norm", [cybn.layer_norm, cybn.rms_norm])
def test_a_row_that_is_the_whole_array(norm):
    x = np.array([1e38, -2e38, 3e38, -3e38, 2.5e38, 1.5e38, 0], "f4")
    y, wide = norm(x)[0], norm(x.astype("f8") / 1e38, eps=1e-30)[0]
    np.testing.assert_allclose(y, wide, rtol=1e-6)


@pytest.mark.parametrize("eps", [1e-5, 1e-300, 5e-324])
@pytest.mark.parametrize("value", [2.0**600, 2.0**999, -1e308])
def test_a_large_constant_with_a_tiny_eps(value, eps, rng):
    """y is exactly beta, because x - mean is 0; x / sqrt(eps) would overflow float64."""
    x, beta = np.full((10, 2, 3), value), np.array([0.25, -1.0])
    dy = rng.standard_normal(x.shape)
    y, m = cybn.batch_norm(x, None, beta, eps=eps)
    dx, dgamma, _ = cybn.batch_norm_backward(dy, x, m, eps=eps)
    np.testing.assert_allclose(dx * np.sqrt(eps), dy - dy.mean((0, 2), keepdims=True), rtol=1e-9)
    assert (dgamma == 0).all()
    lengths = [3, 2] * 5
    for got in (
        y,
        cybn.batch_norm_inference(x, [value] * 2, [0.0] * 2, None, beta, eps=eps),
        cybn.instance_norm(x, None, beta, eps=eps)[0],
        cybn.instance_norm(x, None, beta, eps=eps, lengths=lengths)[0],
        cybn.group_norm(x, None, beta, num_groups=1, eps=eps)[0],
        cybn.group_norm(x, None, beta, num_groups=2, eps=eps, lengths=lengths)[0],
        cybn.layer_norm(x.swapaxes(1, 2).copy(), None, beta, eps=eps)[0].swapaxes(1, 2),
    ):
        assert (np.moveaxis(got, 1, -1) == beta).all()


@pytest.mark.parametrize("var", [0.0, 1e-320, 1e-300, 1.0, 1e200])
@pytest.mark.parametrize("mean", [0.0, 1.0, 1e308, -1.7e308, 1e-250])
@pytest.mark.parametrize("value", [1e308, -1e200, 1.0, 0.0])
def test_inference_far_from_the_mean(value, mean, var):
    """x / std may overflow float64, but gamma brings it back into range."""
    if not WIDE:
        pytest.skip("long double is float64 on this machine")
    x = np.array([value, 0.0, 1.0, -1e100])[:, np.newaxis]
    dy = np.array([2.0, 1e-3, 0.0, 1.0])[:, np.newaxis]
    for gamma, eps in [(1e-150, 1e-300), (1.0, 5e-324), (0.0, 1e-300), (-1e-100, 1e-5)]:
        fixed, k = ([mean], [var], [gamma]), {"eps": eps}
        wx, wdy, wmean, wvar, wgamma = wider(x, dy, *map(np.array, fixed))
        xhat = (wx - wmean) / np.sqrt(wvar + np.longdouble(eps))
        with np.errstate(over="ignore"):
            want = (xhat * wgamma).astype("f8"), (wdy * xhat).sum().astype("f8")
        np.testing.assert_allclose(cybn.batch_norm_inference(x, *fixed, **k), want[0], rtol=1e-14)
        dx, dgamma, _ = cybn.batch_norm_inference_backward(dy, x, *fixed, **k)
        np.testing.assert_allclose(dgamma[0], want[1], rtol=1e-12)
        exact = wdy * wgamma / np.sqrt(wvar + np.longdouble(eps))
        np.testing.assert_allclose(dx, exact.astype("f8"), rtol=1e-12)


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("size", [2.0**530, 2.0**1000])
def test_backward_from_y(rng, size, activation, level):
    """The standard deviation comes from the moments, not from y, even if M2 is infinite."""
    x, axis = batch(rng, "f8", "first", [1.0, size, 2.0**-300, size, 2.0, 3.0])
    gamma, beta = rng.uniform(0.5, 2, (2, C))
    dy = rng.standard_normal(x.shape)
    k = {"axis": axis, "eps": 1e-200, "activation": activation}
    y, m = cybn.batch_norm(x, gamma, beta, **k)
    assert np.isinf(m.m2[[1, 3]]).all()
    exact = cybn.batch_norm_backward(dy, x, m, gamma, beta=beta, **k)
    found = cybn.batch_norm_backward(dy, y, m, gamma, beta=beta, from_output=True, **k)
    for a, b in zip(found, exact, strict=True):
        assert_close(a, b, axis, 1e-12)
    layer = cybn.BatchNorm(C, eps=1e-200, dtype="f8", activation=activation)
    layer.gamma, layer.beta = gamma, beta
    own = x.copy()
    layer(own, out=own)
    assert_close(layer.backward(dy), exact[0], axis, 1e-12)
