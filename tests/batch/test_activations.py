"""Fused activations and residuals equal unfused ones, and follow the rules at 0, -0.0 and NaN."""

from itertools import product

import numpy as np
import pytest
from cases import DTYPES, FAMILIES, lay, same_bits
from levels import LEVELS

import cybn
from cybn import reference

pytestmark = pytest.mark.divided

CLAMPS = ["relu", "relu6", "leaky_relu"]
SMOOTH = ["sigmoid", "tanh", "silu"]
SLOPE = 0.2
MOST_ULP = 4


def apply(z, activation):
    """Return the activation as a separate step in the type of z, which fused results must equal."""
    if activation == "relu":
        return np.where(z < 0, z.dtype.type(0), z)
    if activation == "relu6":
        return np.where(z > 6, z.dtype.type(6), np.where(z < 0, z.dtype.type(0), z))
    if activation == "leaky_relu":
        return np.where(z < 0, z.dtype.type(SLOPE) * z, z)
    return z


def back(dy, z, activation):
    """Return the gradient of the activation, as a separate step."""
    if activation == "relu":
        return np.where(z <= 0, dy.dtype.type(0), dy)
    if activation == "relu6":
        return np.where((z <= 0) | (z >= 6), dy.dtype.type(0), dy)
    if activation == "leaky_relu":
        return np.where(z <= 0, dy.dtype.type(SLOPE) * dy, dy)
    return dy


def data(rng, shape, dtype, axis=1):
    c = shape[1]
    x, dy, r = (lay(rng.standard_normal(shape), axis).astype(dtype) for _ in range(3))
    gamma = (4 * rng.standard_normal(c)).astype(dtype)
    return x, dy, r, gamma, rng.standard_normal(c).astype(dtype)


@pytest.mark.row(15)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", FAMILIES, ids=str)
def test_fused_equals_unfused(rng, level, shape, axis, dtype):
    x, dy, r, gamma, beta = data(rng, shape, dtype, axis)
    z, m = cybn.batch_norm(x, gamma, beta, axis=axis)
    for activation, residual in product((None, *CLAMPS), (None, r)):
        act = {"axis": axis, "activation": activation, "slope": SLOPE}
        total = z if residual is None else z + r
        y, m2 = cybn.batch_norm(x, gamma, beta, residual=residual, **act)
        assert same_bits(y, apply(total, activation))
        assert m2 == m
        g = back(dy, total, activation)
        wanted = cybn.batch_norm_backward(g, x, m, gamma, axis=axis)
        got = cybn.batch_norm_backward(dy, x, m, gamma, beta=beta, residual=residual, **act)
        for one, other in zip(got, [*wanted, *([] if residual is None else [g])], strict=True):
            assert same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", CLAMPS)
def test_inference_fused_equals_unfused(rng, level, activation, dtype):
    x, dy, r, gamma, beta = data(rng, (3, 5, 1071), dtype)
    mean, var = rng.standard_normal(5), rng.random(5) + 0.5
    z = cybn.batch_norm_inference(x, mean, var, gamma, beta)
    act = {"activation": activation, "slope": SLOPE, "residual": r}
    y = cybn.batch_norm_inference(x, mean, var, gamma, beta, **act)
    assert same_bits(y, apply(z + r, activation))
    g = back(dy, z + r, activation)
    wanted = cybn.batch_norm_inference_backward(g, x, mean, var, gamma)
    got = cybn.batch_norm_inference_backward(dy, x, mean, var, gamma, beta=beta, **act)
    assert all(same_bits(a, b) for a, b in zip(got, (*wanted, g), strict=True))


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_smooth_within_ulps(rng, bind, activation, dtype):
    """Many values of z are computed in one call; mean 0, variance 1 and eps 0 make z = x."""
    largest = 110.0 if dtype == np.float32 else 760.0
    tiny = 10.0 ** rng.uniform(-30, 1, 200_000)
    z = np.concatenate([rng.uniform(-largest, largest, 300_000), tiny, -tiny, [0.0, -0.0]])
    z = z.astype(dtype)[None, None]
    right, slopes = reference.activated(z.astype(np.longdouble), activation, SLOPE)
    # The slope of silu crosses 0, where only its absolute error is small.
    size = np.maximum(np.abs(slopes), 0.1) if activation == "silu" else slopes
    size = np.where(np.abs(z) < largest * 0.9, size, 1)
    ulp, slope_ulp = np.spacing(np.abs(right).astype(dtype)), np.spacing(size.astype(dtype))
    dy, given = np.ones_like(z), (np.zeros(1), np.ones(1))
    for level in LEVELS:
        bind(level)
        y = cybn.batch_norm_inference(z, *given, eps=0, activation=activation)
        dx, *_ = cybn.batch_norm_inference_backward(dy, z, *given, eps=0, activation=activation)
        worst = np.max(np.abs(y - right) / ulp)
        worst_slope = np.max(np.abs(dx - slopes) / slope_ulp)
        print(f"{level} {activation} {np.dtype(dtype)}: {worst:.2f}, slope {worst_slope:.2f} ulp")
        assert worst <= MOST_ULP
        assert worst_slope <= 2 * MOST_ULP


@pytest.mark.row(3)
@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(6, 5, 7), (3, 3, 600)], ids=str)
def test_smooth_against_reference(rng, activation, with_residual, shape):
    x, dy, r, gamma, beta = data(rng, shape, np.float64)
    act = {"activation": activation, "residual": r if with_residual else None}
    y, m = cybn.batch_norm(x, gamma, beta, **act)
    np.testing.assert_allclose(y, reference.batch_norm(x, gamma, beta, **act)[0], 1e-12, 1e-12)
    got = cybn.batch_norm_backward(dy, x, m, gamma, beta=beta, **act)
    for one, other in zip(
        got, reference.batch_norm_backward(dy, x, m, gamma, beta=beta, **act), strict=True
    ):
        np.testing.assert_allclose(one, other, 1e-9, 1e-11)


@pytest.mark.row(11)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", [None, *CLAMPS, *SMOOTH])
def test_gradients_by_differences(rng, activation, with_residual, training):
    """Gradients of a whole layer equal central differences in float64, away from kinks."""
    h = 1e-5
    bn = cybn.BatchNorm(3, activation=activation, slope=SLOPE, dtype=np.float64)
    bn.gamma[...], bn.beta[...] = [1.5, -0.7, 4.0], [0.3, -0.2, 1.0]
    bn.running_mean, bn.running_var = np.array([0.1, -0.2, 0.0]), np.array([1.2, 0.8, 2.0])
    bn.train(training)
    x, dy, r = rng.standard_normal((3, 5, 3, 4))
    r = r if with_residual else None

    def loss():
        z = (
            cybn.batch_norm(x, bn.gamma, bn.beta)[0]
            if training
            else cybn.batch_norm_inference(x, *bn._running.values[:2], bn.gamma, bn.beta)
        )
        z = z if r is None else z + r
        kink = np.minimum(np.abs(z), np.abs(z - 6)).min()
        assert activation not in CLAMPS or kink > 20 * h
        return (reference.activated(z, activation, SLOPE)[0] * dy).sum()

    running = bn._running.values
    bn.forward(x, residual=r)
    bn._running.values = running
    dx = bn.backward(dy)
    pairs = [(bn.gamma, bn.grad_gamma), (bn.beta, bn.grad_beta)]
    if r is not None:
        dx, dr = dx
        pairs.append((r, dr))
    pairs.append((x, dx))
    for array, gradient in pairs:
        for i in np.ndindex(array.shape):
            keep = array[i]
            array[i] = keep + h
            up = loss()
            array[i] = keep - h
            down = loss()
            array[i] = keep
            assert gradient[i] == pytest.approx((up - down) / (2 * h), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", CLAMPS + SMOOTH)
def test_rules(activation, dtype, level):
    """NaN passes through, piecewise-linear ones keep -0.0, and ties have the slope below them."""
    zero, one = np.zeros(1), np.ones(1)
    x = np.array([np.nan, -0.0, 0.0, 6.0, np.inf, -np.inf], dtype)[None, None]
    act = {"eps": 0, "activation": activation, "slope": SLOPE}
    y = cybn.batch_norm_inference(x, zero, one, one, -zero, **act)[0, 0]  # beta -0.0: z = x
    assert np.isnan(y[0])
    if activation in CLAMPS:
        assert y[1] == 0
        assert np.signbit(y[1])
        assert not np.signbit(y[2])
    assert y[4] == {"relu6": 6, "sigmoid": 1, "tanh": 1}.get(activation, np.inf)
    dy = np.full_like(x, 3)
    dx, _, _ = cybn.batch_norm_inference_backward(dy, x, zero, one, **act)
    below = {"relu": 0, "relu6": 0, "leaky_relu": 3 * dtype(SLOPE)}
    if activation in CLAMPS:
        assert dx[0, 0, 0] == 3
        assert (dx[0, 0, 1:3] == below[activation]).all()
        assert dx[0, 0, 3] == (0 if activation == "relu6" else 3)
        blocked = cybn.batch_norm_inference_backward(np.full_like(x, np.nan), x, zero, one, **act)
        assert np.isnan(blocked[0][0, 0, 1]) == (activation == "leaky_relu")
        if dtype is np.float64:  # the reference has the same rules, also for the slope at ties
            act |= {"slope": 0.0}
            for module in (cybn, reference):
                call = module.batch_norm_inference_backward
                g = call(np.full_like(x, np.nan), x, zero, one, **act)[0][0, 0]
                assert np.isnan(g[1]) == (activation == "leaky_relu"), module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", FAMILIES[:4], ids=str)
def test_ties_in_training(shape, axis, dtype, level):
    """Values are -1, 0 and 1, so z at 0 is exactly beta. The test counts the side of each tie.

    dy is 1, so dbeta is the number of values at which the gradient passes.
    """
    n, c, s = shape
    sign = np.resize([1, 0, -1, 0, 0], n * s)
    sign[-(n * s % 5) or n * s :] = 0  # as many 1 as -1
    x = lay(np.broadcast_to(sign.reshape(n, 1, s), shape), axis).astype(dtype)
    dy, up, down = np.ones_like(x), (sign == 1).sum(), (sign == -1).sum()
    assert up == down
    _, m = cybn.batch_norm(x, axis=axis)
    passed = {("relu", 0): up, ("relu6", 0): up, ("relu6", 6): down, ("leaky_relu", 0): None}
    for (activation, beta), count in passed.items():
        if count is None:
            count = up + SLOPE * (n * s - up)
        act = {"axis": axis, "activation": activation, "slope": SLOPE}
        act["beta"] = np.full(c, beta, dtype)
        for residual in (None, np.zeros_like(x)):
            _, _, dbeta, *_ = cybn.batch_norm_backward(dy, x, m, residual=residual, **act)
            assert dbeta == pytest.approx(np.full(c, count), rel=1e-5), (activation, beta)


@pytest.mark.row(23)
def test_same_bits_on_any_number_of_threads(rng, level):
    for shape, activation in product(FAMILIES, ["relu", "silu"]):
        x, dy, r, gamma, beta = data(rng, shape, np.float32)
        act = {"activation": activation, "residual": r}
        results = []
        for n in (1, 2, 3, 7):
            y, m = cybn.batch_norm(x, gamma, beta, num_threads=n, **act)
            g = cybn.batch_norm_backward(dy, x, m, gamma, beta=beta, num_threads=n, **act)
            results.append([y, *g])
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.row(24)
def test_levels_give_the_same_bits(rng):
    from levels import LEVELS, bind

    from cybn import _runtime

    x, dy, r, gamma, beta = data(rng, (5, 6, 600), np.float32)
    seen = {}
    try:
        for name in LEVELS:
            bind(name)
            for activation in CLAMPS + SMOOTH:
                y, m = cybn.batch_norm(x, gamma, beta, activation=activation, residual=r)
                g = cybn.batch_norm_backward(
                    dy, x, m, gamma, beta=beta, activation=activation, residual=r
                )
                assert seen.setdefault(activation, [a.tobytes() for a in (y, *g)]) == [
                    a.tobytes() for a in (y, *g)
                ]
    finally:
        bind(_runtime.level)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape", [(4, 6, 9), (64, 64, 600)], ids=str)
def test_out_may_be_the_residual_or_x(rng, activation, shape):
    x, dy, r, gamma, beta = data(rng, shape, np.float32)
    act = {"activation": activation, "residual": r}
    y, m = cybn.batch_norm(x, gamma, beta, **act)
    wanted = cybn.batch_norm_backward(dy, x, m, gamma, beta=beta, **act)
    for out in ("dy", "x", "r"):
        a = {"dy": dy.copy(), "x": x.copy(), "r": r.copy()}
        act["residual"] = a["r"]
        dr = np.empty_like(x)
        got = cybn.batch_norm_backward(
            a["dy"], a["x"], m, gamma, beta=beta, out=a[out], out_residual=dr, **act
        )
        assert got[0] is a[out]
        assert got[3] is dr
        assert all(same_bits(p, q) for p, q in zip(got, wanted, strict=True))
    act["residual"] = r
    assert same_bits(cybn.batch_norm(x.copy(), gamma, beta, out=r, **act)[0], y)


def test_residual_of_another_layout(rng):
    x, dy, r, gamma, beta = data(rng, (4, 6, 10), np.float32)
    act = {"activation": "relu"}
    y, m = cybn.batch_norm(x, gamma, beta, residual=r, **act)
    other = np.asfortranarray(r)
    assert same_bits(cybn.batch_norm(x, gamma, beta, residual=other, **act)[0], y)
    wide = np.full((4, 6, 20), np.nan, np.float32)
    wide[:, :, ::2] = r
    assert same_bits(cybn.batch_norm(x, gamma, beta, residual=wide[:, :, ::2], **act)[0], y)
    got = cybn.batch_norm_backward(dy, x, m, gamma, beta=beta, residual=other, **act)
    want = cybn.batch_norm_backward(dy, x, m, gamma, beta=beta, residual=r, **act)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape", [(9, 6, 7), (40, 33, 1), (3, 5, 600)], ids=str)
def test_each_array_may_have_gaps_of_its_own(rng, activation, shape, level):
    """The rows of one array are further apart than those of the others; nothing is copied."""
    x, dy, r, gamma, beta = data(rng, shape, np.float32)
    act = {"activation": activation}
    y, m = cybn.batch_norm(x, gamma, beta, residual=r, **act)
    dx, _, _, dr = cybn.batch_norm_backward(dy, x, m, gamma, beta=beta, residual=r, **act)
    right = {"x": x, "dy": dy, "r": r, "y": y, "dx": dx, "dr": dr}
    n, c, s = shape
    for apart in right:
        room = np.full((n, c + 1, s), np.nan, np.float32)
        a = {name: array.copy() for name, array in right.items()} | {apart: room[:, :c]}
        room[:, :c] = right[apart]
        for name in ("y", "dx", "dr"):
            a[name][...] = np.nan
        cybn.batch_norm(a["x"], gamma, beta, residual=a["r"], out=a["y"], **act)
        outs = {"out": a["dx"], "out_residual": a["dr"]}
        cybn.batch_norm_backward(
            a["dy"], a["x"], m, gamma, beta=beta, residual=a["r"], **outs, **act
        )
        assert all(same_bits(a[name], right[name]) for name in right), apart
        assert np.isnan(room[:, c:]).all(), apart


def test_errors(rng):
    x, dy, r, _, _ = data(rng, (4, 6, 10), np.float32)
    with pytest.raises(ValueError, match="activation is 'softplus'; it must be None or one of"):
        cybn.batch_norm(x, activation="softplus")
    with pytest.raises(ValueError, match="activation is 'softplus'"):
        cybn.BatchNorm(6, activation="softplus")
    with pytest.raises(ValueError, match="slope is nan; it must be finite"):
        cybn.batch_norm(x, activation="leaky_relu", slope=float("nan"))
    with pytest.raises(ValueError, match="residual has shape"):
        cybn.batch_norm(x, residual=r[:2])
    with pytest.raises(ValueError, match="residual is float64; it must have the dtype of x"):
        cybn.batch_norm(x, residual=r.astype(np.float64))
    _, m = cybn.batch_norm(x)
    with pytest.raises(ValueError, match="out_residual overlaps an input, and"):
        cybn.batch_norm_backward(dy, x, m, residual=r, out_residual=r)
    room = np.empty((1, 4, 6, 10), np.float32)
    with pytest.raises(ValueError, match="out_residual overlaps an input, and"):
        cybn.batch_norm_backward(dy, x, m, residual=r, out=room[0], out_residual=room[0])
    room = np.ones((5, 6, 10), np.float32)
    for call in (
        cybn.batch_norm,
        lambda x, **k: cybn.batch_norm_inference(x, np.zeros(6), np.ones(6), **k),
    ):
        with pytest.raises(ValueError, match="out overlaps an input in part"):
            call(x, residual=room[1:], out=room[:4])
    with pytest.raises(ValueError, match="out_residual has shape"):
        cybn.batch_norm_backward(dy, x, m, residual=r, out_residual=r[:2].copy())


# ---- backward from the output --------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("shape", [(6, 5, 7), (3, 4, 1071), (200, 33, 1)], ids=str)
def test_backward_from_the_output(rng, level, shape, activation, training):
    x, dy, _, _, _ = data(rng, shape, np.float64)
    layers = []
    for _ in range(2):
        bn = cybn.BatchNorm(shape[1], activation=activation, slope=SLOPE, dtype=np.float64)
        bn.gamma[...] = np.linspace(-1.5, 2, shape[1])
        bn.beta[...] = np.linspace(-1, 3, shape[1])
        layers.append(bn.train(training))
    plain, inplace = layers
    plain(x)
    wanted = plain.backward(dy)
    one = x.copy()
    assert inplace(one, out=one) is one
    got = inplace.backward(dy)
    np.testing.assert_allclose(got, wanted, 1e-9, 1e-11)
    np.testing.assert_allclose(inplace.grad_gamma, plain.grad_gamma, 1e-9, 1e-10)
    np.testing.assert_allclose(inplace.grad_beta, plain.grad_beta, 1e-9, 1e-10)


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "sigmoid", "tanh"])
def test_an_input_that_cannot_be_recovered_is_missed(rng, activation):
    x, dy, r, _, _ = data(rng, (4, 6, 10), np.float32)
    bn = cybn.BatchNorm(6, activation=activation)
    bn(x, out=x)
    with pytest.raises(RuntimeError, match="wrote its output over its input or residual"):
        bn.backward(dy)
    bn(x, residual=r, out=r)
    with pytest.raises(RuntimeError, match="wrote its output over its input or residual"):
        bn.backward(dy)


def test_a_gamma_of_zero_cannot_be_inverted(rng):
    x, dy, _, _, _ = data(rng, (4, 6, 10), np.float32)
    bn = cybn.BatchNorm(6)
    bn.gamma[2] = 0
    bn(x, out=x)
    with pytest.raises(ValueError, match="gamma is 0 in channel 2"):
        bn.backward(dy)
    assert (bn.grad_gamma == 0).all()
    with pytest.raises(ValueError, match="from_output needs an activation with an inverse"):
        cybn.batch_norm_backward(dy, x, cybn.moments(x), activation="relu", from_output=True)
