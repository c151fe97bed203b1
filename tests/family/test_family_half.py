"""float16 and bfloat16 in the other norms: float32 arithmetic, rounded once at the end."""

import numpy as np
import pytest
from bounds import worst
from cases import same_bits
from family_cases import (
    CASES,
    LAYOUTS,
    every_case,
    forward_bound,
    group,
    instance,
    laid_out,
    layer,
    rms,
)
from levels import LEVELS, bind

import cybn
from cybn import _runtime

ml_dtypes = pytest.importorskip("ml_dtypes")
HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
LARGE = [layer(300, 1024), rms(3, 200000), group(4, 3, 16, 128, 128), instance(2, 5, 256, 200)]
LARGE += [group(4, 1, 64, 64, 96, axis=-1), instance(3, 100, 30, 32, axis=-1)]


def data(case, rng, dtype, offset=1.0):
    """Return random x and dy of a half type, and gamma and beta of float32."""
    x, dy, gamma, beta = case.data(rng, np.float32, offset)
    return x.astype(dtype), dy.astype(dtype), gamma, beta


def expected(case, x, dy, gamma, beta, **k):
    """Return all results of the float32 call, with y and dx rounded to the half type."""
    results = case.everything(x.astype(np.float32), dy.astype(np.float32), gamma, beta, **k)
    with np.errstate(over="ignore"):
        return results | {name: results[name].astype(x.dtype) for name in ("y", "dx")}


def differing(got, wanted):
    return [name for name in wanted if not same_bits(np.asarray(got[name]), wanted[name])]


@every_half
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_equals_float32_rounded(case, dtype, rng):
    """Results are equal at every level, for any number of threads, streamed or not."""
    arrays = data(case, rng, dtype)
    case.put(arrays[0], (0, 0, case.sample()), 6e4)  # this row may be summed again
    wanted = expected(case, *arrays, num_threads=1)
    try:
        for level in LEVELS:
            bind(level)
            for l3, threads in ((0, 1), (2**40, 2), (2**40, 3)):
                _runtime.kernels_at(level, "layer_norm").set_caches(2**18, l3)
                got = case.everything(*arrays, num_threads=threads)
                assert not differing(got, wanted), (level, l3, threads)
                assert got["y"].dtype == got["dx"].dtype == dtype
                assert got["dgamma"].dtype == np.float32
    finally:
        for level in LEVELS:
            _runtime.kernels_at(level, "layer_norm")  # sets the caches of this machine
        bind(_runtime.level)


@every_half
@every_case
def test_error_bound(case, dtype, rng):
    """The bound is that of float32 plus half a unit in the last place, for one rounding."""
    x, _, gamma, beta = data(case, rng, dtype)
    y, _ = case.forward(x, gamma, beta)
    exact, bound = forward_bound(case, x.astype(np.float32), gamma, beta)
    half_ulp = float(ml_dtypes.finfo(dtype).eps) / 2
    allowed = bound + half_ulp * (np.abs(exact) + bound) + float(ml_dtypes.finfo(dtype).tiny)
    assert worst(case.rows(y.astype(np.float64)), exact, allowed) <= 1


@every_half
@every_case
def test_in_place(case, dtype, rng):
    x, dy, gamma, beta = data(case, rng, dtype)
    wanted = case.everything(x, dy, gamma, beta)
    _, statistics = case.forward(x, gamma, beta)
    own = x.copy()
    assert case.forward(own, gamma, beta, out=own)[0] is own
    assert same_bits(own, wanted["y"])
    for given in (0, 1):
        pair = [dy.copy(), x.copy()]
        dx = case.backward(*pair, statistics, gamma, out=pair[given])[0]
        assert dx is pair[given]
        assert same_bits(dx, wanted["dx"])
    room = np.zeros(x.size + 3, dtype)
    out = room[1:-2].reshape(x.shape)
    case.forward(x, gamma, beta, out=out)
    assert same_bits(out, wanted["y"])
    assert (room[[0, -2, -1]] == 0).all()


@every_half
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case, dtype, rng):
    x, dy, gamma, beta = data(case, rng, dtype)
    wanted = case.everything(x, dy, gamma, beta)
    for name, other in laid_out(x):
        if not other.dtype.isnative:
            continue
        got = case.everything(other, dy, gamma, beta)
        for key in ("y", "mean", "m2", "mean_square", "dx"):
            if key in got:
                assert same_bits(np.ascontiguousarray(got[key]), wanted[key]), (name, key)


@every_half
def test_poison_stays_in_its_row(dtype, rng):
    last = group(3, 4, 7, 7, 12, axis=-1)
    for case in (layer(9, 70), group(3, 4, 12, 7, 7), instance(2, 3, 600), last):
        x, _, gamma, beta = data(case, rng, dtype)
        clean = case.rows(case.forward(x, gamma, beta)[0])
        for poison in (np.nan, np.inf):
            bad = x.copy()
            case.put(bad, (0, 0, 0), poison)
            y = case.rows(case.forward(bad, gamma, beta)[0])
            assert np.isnan(y[0, 0].astype(np.float32)).any()
            assert same_bits(y[1:], clean[1:])
            assert same_bits(y[0, 1:], clean[0, 1:])


@every_half
def test_beyond_the_largest_value(dtype):
    x = np.array([[1.0, -1.0]]).astype(dtype)
    y, _ = cybn.layer_norm(x, [70000.0, 70000.0], eps=1e-12)
    limit = np.inf if dtype == np.float16 else 70144.0
    assert np.array_equal(y.astype(np.float32), [[limit, -limit]])


@every_half
def test_gradients_without_gamma_are_float32(dtype, rng):
    for case in (layer(9, 70), rms(9, 70), group(3, 4, 12, 7), instance(2, 3, 60)):
        x, dy, *_ = data(case, rng, dtype)
        got = case.everything(x, dy, None, None)
        assert not differing(got, expected(case, x, dy, None, None))
        assert got["dgamma"].dtype == np.float32


@every_half
def test_empty(dtype):
    x = np.empty((0, 4, 5), dtype)
    assert cybn.layer_norm(x)[0].dtype == dtype
    assert cybn.instance_norm_backward(x, x, cybn.instance_norm(x)[1])[1].dtype == np.float32


@every_half
def test_layers(dtype, rng):
    """Outputs are those of a float32 layer, rounded once; statistics and gradients are equal."""
    x, dy = rng.standard_normal((2, 5, 6, 7)).astype(dtype)
    instance_norm = {"affine": True, "track_running_stats": True}
    for make in (
        lambda: cybn.LayerNorm((6, 7)),
        lambda: cybn.RMSNorm(7),
        lambda: cybn.GroupNorm(3, 6),
        lambda: cybn.InstanceNorm1d(6),
        lambda: cybn.InstanceNorm1d(6, **instance_norm),
        lambda: cybn.InstanceNorm1d(6, momentum=None, **instance_norm),
    ):
        norm, wide = make(), make()
        for training in (True, True, False):
            norm.train(training)
            wide.train(training)
            y, expected_y = norm(x), wide(x.astype(np.float32))
            assert y.dtype == dtype
            assert same_bits(y, expected_y.astype(dtype))
            dx = norm.backward(dy)
            assert same_bits(dx, wide.backward(dy.astype(np.float32)).astype(dtype))
            for got, value in zip(norm.gradients(), wide.gradients(), strict=True):
                assert got.dtype == np.float32
                assert same_bits(got, value)
        for name, value in wide.state_dict().items():
            assert same_bits(norm.state_dict()[name], value), name


def test_parameters_are_no_half_types():
    x = np.ones((3, 2), np.float16)
    with pytest.raises(TypeError, match="gamma is float16; it must be float32 or float64"):
        cybn.layer_norm(x, np.ones(2, np.float16))
    with pytest.raises(ValueError, match="out is float32; it must have the dtype of x, float16"):
        cybn.rms_norm(x, out=np.ones((3, 2), np.float32))
    with pytest.raises(ValueError, match="dy is float32; it must have the dtype of x, float16"):
        cybn.layer_norm_backward(np.ones((3, 2), np.float32), x, cybn.layer_norm(x)[1])
