"""Errors of the other norms against long double: random and exact data, extremes, NaN and Inf.

Levels are compared bit by bit in test_family_bits.py, so most tests here run one level only.
"""

import numpy as np
import pytest
from bounds import ULP32, ULP64, worst
from cases import same_bits
from family_cases import (
    CASES,
    backward_bound,
    every_case,
    every_dtype,
    forward_bound,
    group,
    instance,
    layer,
    rms,
)

SHORT = [layer(9, 70), layer(67, 1025), group(3, 4, 12, 7, 7), group(2, 3, 6, 515)]
SHORT += [instance(3, 5, 11), instance(2, 3, 600)]
SHORT += [group(3, 4, 7, 7, 12, axis=-1), instance(2, 37, 70, axis=-1)]
every_short = pytest.mark.parametrize("case", SHORT, ids=str)


def ratios(case, rng, dtype, offset=0.0):
    """Return the largest ratios of error to bound of y, dx, dgamma and dbeta."""
    x, dy, gamma, beta = case.data(rng, dtype, offset)
    got = case.everything(x, dy, gamma, beta)
    found = [worst(case.rows(got["y"]), *forward_bound(case, x, gamma, beta))]
    names = ["dx", "dgamma", "dbeta"] if case.centred else ["dx", "dgamma"]
    exact, bounds = backward_bound(case, dy, x, gamma)
    got["dx"] = case.rows(got["dx"])
    return found + [
        worst(got[name], a, b) for name, a, b in zip(names, exact, bounds, strict=False)
    ]


@pytest.mark.row(3)
@every_dtype
@every_case
def test_random_data(case, dtype, rng, figure):
    found = ratios(case, rng, dtype)
    figure(
        3,
        f"largest error of the other norms, of the bound, {dtype.__name__}",
        max(found),
    )
    assert max(found) <= 1


@pytest.mark.row(4)
@every_dtype
@every_short
@pytest.mark.parametrize("power", range(7))
def test_offset(case, dtype, power, rng, figure):
    """For mean 10**power and std 1, forward and backward meet their bounds up to 10**6."""
    found = ratios(case, rng, dtype, 10.0**power)
    figure(4, "largest error up to 1e6, of the bound", max(found))
    assert max(found) <= 1


@pytest.mark.row(4)
@every_dtype
@every_short
def test_an_outlier_among_the_samples(case, dtype, rng):
    """The pivot is then far from the mean, and the row is summed again."""
    x, _, gamma, beta = case.data(rng, dtype)
    case.put(x, np.s_[:, :, case.sample()], 1e6)
    y, _ = case.forward(x, gamma, beta)
    assert worst(case.rows(y), *forward_bound(case, x, gamma, beta)) <= 1


@pytest.mark.row(5)
@every_dtype
@every_short
def test_constant_rows_give_exactly_beta(case, dtype, rng):
    for value in (0, 1e-30, 0.1, 1e7, 16777217):
        x = np.full(case.shape, value, dtype)
        _, dy, gamma, beta = case.data(rng, dtype)
        y, m = case.forward(x, gamma, beta)
        assert (case.rows(y) == case.along(beta)).all()
        assert (m.m2 == 0).all()
        assert np.isfinite(case.backward(dy, x, m, gamma)[0]).all()


@pytest.mark.row(1)
@every_dtype
@every_short
def test_exact_statistics(case, dtype, rng, figure):
    """Values are pairs p * (1 + k / 16) and p * (1 - k / 16), exact in any order of summation."""
    rows = case.rows(np.empty(case.shape))
    n, g, d = rows.shape
    k = np.zeros((n, g, d))
    half = rng.integers(1, 5, (n, g, d // 2))
    k[:, :, 0 : 2 * (d // 2) : 2], k[:, :, 1 : 2 * (d // 2) : 2] = half, -half
    p = 2.0 ** (np.arange(n * g).reshape(n, g, 1) % 7 - 3)
    x = np.empty(case.shape, dtype)
    case.put(x, ..., p * (1 + k / 16))
    m2 = ((p / 16) ** 2 * (k * k).sum(2, keepdims=True)).ravel()
    for threads in (1, 3, 16):
        _, m = case.forward(x, num_threads=threads)
        differing = np.count_nonzero((m.mean != p.ravel()) | (m.m2 != m2))
        figure(1, "differing rows of the other norms", differing, how="sum")
        assert differing == 0


@pytest.mark.row(2)
@every_dtype
@pytest.mark.parametrize("case", [case for case in CASES if case.centred], ids=str)
def test_exact_sums(case, dtype, rng, figure):
    """dbeta of small integers is exact in any order of summation."""
    x, _, gamma, beta = case.data(rng, dtype)
    dy = rng.integers(-4, 5, case.shape).astype(dtype)
    dbeta = case.everything(x, dy, gamma, beta)["dbeta"]
    expected = case.rows(dy).sum(0, dtype=np.float64)
    differing = np.count_nonzero(dbeta != expected.reshape(*case.parameter_shape, -1).sum(-1))
    figure(2, "differing dbeta of the other norms", differing, how="sum")
    assert differing == 0


@pytest.mark.row(6)
@every_dtype
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
@pytest.mark.parametrize("case", [rms(9, 70), rms(5, 1500)], ids=str)
def test_rms_at_extreme_scales(case, scale, dtype, rng, level):
    x, _, gamma, _ = case.data(rng, dtype)
    x *= dtype(scale)
    y, mean_square = case.forward(x, gamma, eps=1e-6 * scale**2)
    wx = x.astype(np.longdouble)
    exact = wx / np.sqrt((wx * wx).mean(1, keepdims=True) + 1e-6 * scale**2) * gamma
    ulp = ULP32 if dtype is np.float32 else ULP64
    assert worst(y, exact, ulp * np.abs(exact) + np.finfo(dtype).tiny) <= 1
    assert np.allclose(mean_square, (wx * wx).mean(1).astype(float), rtol=2.0**-20, atol=0)


@pytest.mark.row(6)
@every_short
@pytest.mark.parametrize("std", [1e-18, 1e18])
def test_extreme_std(case, std, rng, level):
    x = (rng.standard_normal(case.shape) * std + std).astype(np.float32)
    y, m = case.forward(x, eps=1e-3 * std**2)
    var = case.rows(x).astype(np.longdouble).var(2).ravel()
    assert (np.abs(m.var() - var) <= 2.0**-20 * var).all()
    assert np.isfinite(y).all()


@pytest.mark.row(6)
def test_near_the_largest_float32(rng, level):
    """Squares are too large for float32, but statistics and y are not."""
    for case in SHORT:
        x = np.where(rng.random(case.shape) < 0.5, -7e37, 7e37).astype(np.float32)
        case.put(x, np.s_[:, :, :2], [7e37, -7e37])
        y, m = case.forward(x)
        var = case.rows(x).astype(np.longdouble).var(2).ravel()
        assert (np.abs(m.var() - var) <= 2.0**-20 * var).all()
        exact = (case.rows(x) - m.mean.reshape(*case.rows(x).shape[:2], 1)) / np.sqrt(
            var.reshape(*case.rows(x).shape[:2], 1)
        )
        assert np.allclose(case.rows(y), exact.astype(float), atol=1e-5)


@pytest.mark.row(7)
@every_dtype
@every_case
def test_poison_stays_in_its_row(case, dtype, rng):
    """With NaN or Inf in a row, other rows and the gradients of other groups keep their bits."""
    x, dy, gamma, beta = case.data(rng, dtype)
    clean = case.everything(x, dy, gamma, beta)
    n, g, d = case.rows(x).shape
    places = [(0, 0, 0), (n - 1, g - 1, d - 1), (n // 2, g // 2, d // 3)]
    for place, poison in zip(places, (np.nan, -np.inf, np.nan), strict=True):
        for target in (x, dy):
            bad = target.copy()
            case.put(bad, place, poison)
            pair = (bad, dy) if target is x else (x, bad)
            got = case.everything(*pair, gamma, beta)
            for name in ("y", "dx") if target is x else ("dx",):
                a, b = case.rows(got[name]), case.rows(clean[name])
                assert np.isnan(a[place[:2]]).any()
                others = np.ones((n, g), bool)
                others[place[:2]] = False
                assert same_bits(a[others], b[others]), name
            for name in {"dgamma", "dbeta"} & got.keys():
                a, b = (
                    v[name].reshape(g, -1) if not case.last_axes else v[name].reshape(1, -1)
                    for v in (got, clean)
                )
                keep = np.arange(g) != place[1]
                assert same_bits(a[keep], b[keep]), name


@pytest.mark.row(8)
def test_nan_beside_the_view_has_no_effect(rng):
    for case in CASES:
        x, dy, gamma, beta = case.data(rng, np.float32)
        first = case.everything(x, dy, gamma, beta)
        room = np.full((2, x.size + 40), np.nan, np.float32)
        moved = [room[i, 17 : 17 + x.size].reshape(x.shape) for i in (0, 1)]
        moved[0][...], moved[1][...] = x, dy
        again = case.everything(*moved, gamma, beta)
        assert all(same_bits(again[name], first[name]) for name in first), str(case)
