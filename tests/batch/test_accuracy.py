"""Errors against long double: random data, large offsets, extreme scales, NaN, Inf, subnormals."""

from functools import lru_cache
from itertools import product

import numpy as np
import pytest
from bounds import REPEATED, ULP32, ULP64, column, forward_bound, wide, worst
from cases import AXES, DTYPES, FAMILIES, backward_bound, exact_fill, lay, normal_case, same_bits
from levels import LEVELS

import cybn

pytestmark = pytest.mark.divided

VAR_RTOL = 2.0**-20  # the bound of the variance, about 1e-6

every_layout = pytest.mark.parametrize("axis", AXES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_family = pytest.mark.parametrize("shape", FAMILIES, ids=str)


def exact_var(x):
    """Return the variance of each channel of channels-first x, in long double."""
    others = tuple(i for i in range(x.ndim) if i != 1)
    return x.astype(np.longdouble).var(others)


# ---- random data -------------------------------------------------------------------------


@lru_cache(maxsize=1)
def random_case(shape, dtype, offset=0.0):
    x, dy, gamma, beta = normal_case(np.random.default_rng(4), shape, dtype, offset)
    return (
        (x, dy, gamma, beta),
        forward_bound(x, gamma, beta, 1),
        backward_bound(dy, x, gamma, 1),
        exact_var(x),
    )


def ratios(shape, dtype, axis, offset=0.0):
    """Return the largest ratios of error to bound of y, dx, dgamma and dbeta."""
    (x, dy, gamma, beta), forward, backward, var = random_case(shape, dtype, offset)
    x, dy = lay(x, axis), lay(dy, axis)
    y, m = cybn.batch_norm(x, gamma, beta, axis=axis)
    z = cybn.batch_norm_inference(x, m.mean, m.var(), gamma, beta, axis=axis)
    dx, *sums = cybn.batch_norm_backward(dy, x, m, gamma, axis=axis)
    y, z, dx = (np.moveaxis(a, axis, 1) for a in (y, z, dx))
    assert (np.abs(m.var() - var) <= VAR_RTOL * var).all()
    return [worst(y, *forward), worst(z, *forward)] + [
        worst(*triple) for triple in zip((dx, *sums), *backward, strict=True)
    ]


@pytest.mark.row(3)
@every_layout
@every_dtype
@every_family
def test_random_data(shape, dtype, axis, figure):
    found = ratios(shape, dtype, axis)
    figure(3, f"largest error, of the bound, {dtype.__name__}", max(found))
    assert max(found) <= 1


@pytest.mark.row(4)
@every_layout
@every_dtype
@pytest.mark.parametrize("shape", [(9, 6, 7), (3, 5, 1071), (3001, 4, 1)], ids=str)
@pytest.mark.parametrize("power", range(7))
def test_offset(shape, dtype, axis, power, figure):
    """For mean 10**power and std 1, forward and backward meet their bounds up to 10**6."""
    found = ratios(shape, dtype, axis, 10.0**power)
    figure(4, "largest error up to 1e6, of the bound", max(found))
    assert max(found) <= 1


@pytest.mark.row(4)
def test_variance_curve(figure):
    """The error of the variance does not grow with the offset, unlike that of E[x^2] - E[x]^2.

    The exact variance is that of the rounded values, so the test measures the arithmetic, not the
    rounding of x. At 1e7 float32 contains whole numbers only, so std is 16 there.
    """
    rng = np.random.default_rng(7)
    for power in range(8):
        std = 16 if power == 7 else 1
        x = (rng.standard_normal((16, 4, 500)) * std + 10.0**power).astype(np.float32)
        var = exact_var(x)
        error = float(np.max(np.abs(cybn.moments(x).var() - var) / var))
        naive = (x * x).mean((0, 2)) - x.mean((0, 2)) ** 2
        figure(
            4,
            f"1e{power}",
            f"{error:.0e} ({float(np.max(np.abs(naive - var) / var)):.0e})",
            how="last",
        )
        assert error <= 1e-6
    figure(4, "in brackets", "relative error of var by E[x^2] - E[x]^2 in float32", how="last")


@pytest.mark.row(4)
@every_layout
@every_dtype
@pytest.mark.parametrize("shape", [(9, 6, 7), (3, 5, 1071), (3001, 4, 1)], ids=str)
def test_variance_at_offset_1e7(rng, shape, dtype, axis, level):
    """At 1e7 float32 contains whole numbers only; the variance of these is right."""
    x = (rng.standard_normal(shape) * 16 + 1e7).astype(dtype)
    var = exact_var(x)
    m = cybn.moments(lay(x, axis), axis=axis)
    assert (np.abs(m.var() - var) <= VAR_RTOL * var).all()


@pytest.mark.row(4)
@every_layout
def test_an_outlier_among_the_samples(rng, axis, level):
    """The first value is one of those whose mean is the pivot."""
    for shape in FAMILIES[:4]:
        x = rng.standard_normal(shape).astype(np.float32)
        x[0, :, 0] = 1e6
        y, m = cybn.batch_norm(lay(x, axis), axis=axis)
        var = exact_var(x)
        assert (np.abs(m.var() - var) <= VAR_RTOL * var).all()
        assert worst(np.moveaxis(y, axis, 1), *forward_bound(x, None, None, 1)) <= 1


@every_dtype
@pytest.mark.parametrize(
    "shape",
    [(30, 4, 13), (3, 5, 1071), (20001, 3, 1), (20001, 40, 1), (900, 2, 77), (3, 2, 45000)],
    ids=str,
)
def test_samples_that_are_all_outliers(rng, shape, dtype, bind):
    """The pivot is the mean of eight values, and these are sqrt(M / 8) standard deviations away."""
    n, _, s = shape
    count = n * s
    at = [count // 8 * i + count % 8 * i // 8 + count // 16 for i in range(8)]
    x = rng.standard_normal(shape)
    x[np.array(at) // s, :, np.array(at) % s] += 1e5
    x = x.astype(dtype)
    var, exact = exact_var(x), forward_bound(x, None, None, 1)
    for level, axis in product(LEVELS, (1, -1)):
        bind(level)
        y, m = cybn.batch_norm(lay(x, axis), axis=axis)
        assert (np.abs(m.var() - var) <= VAR_RTOL * var).all(), (level, axis)
        assert worst(np.moveaxis(y, axis, 1), *exact) <= 1, (level, axis)


@pytest.mark.row(3)
@every_dtype
def test_patterns_of_few_values(dtype, rng, level, figure):
    """A lane that adds the same number many times always rounds in the same direction."""
    found = []
    for trial in range(60):
        values = rng.standard_normal(2 ** (1 + trial % 5)) + trial % 2
        row = np.resize(np.repeat(values, 2 ** rng.integers(6)), 4096).astype(dtype)
        gamma, beta = np.ones(1, dtype), np.zeros(1, dtype)
        for x in (row[None, None], row[:, None, None], row.reshape(64, 1, 64)):
            y, _ = cybn.batch_norm(x, gamma, beta)
            exact, bound = forward_bound(x, gamma, beta, 1)
            found.append(worst(y, exact, REPEATED * bound))
    figure(
        3,
        f"largest error for patterns of few values, of their bound, {np.dtype(dtype)}",
        max(found),
    )
    assert max(found) <= 1


# ---- extreme scales ----------------------------------------------------------------------


@pytest.mark.row(6)
@every_layout
@every_dtype
@pytest.mark.parametrize("std", [1e-18, 1e18])
def test_extreme_std(rng, dtype, axis, std, level, figure):
    eps = 1e-3 * std**2
    for shape in FAMILIES[:4]:
        x = (rng.standard_normal(shape) * std + std).astype(dtype)
        var = exact_var(x)
        y, m = cybn.batch_norm(lay(x, axis), axis=axis, eps=eps)
        assert (np.abs(m.var() - var) <= VAR_RTOL * var).all()
        found = worst(np.moveaxis(y, axis, 1), *forward_bound(x, None, None, 1, eps))
        figure(6, f"largest error, of the bound, std {std:g}", found)
        assert found <= 1
        y, _ = cybn.batch_norm(lay(x, axis), axis=axis)
        assert worst(np.moveaxis(y, axis, 1), *forward_bound(x, None, None, 1)) <= 1


@pytest.mark.row(6)
@every_layout
@pytest.mark.parametrize("std", [1e-21, 1e-30, 1e-40])
def test_squares_below_float32(rng, axis, std, level):
    """Squares are subnormal or 0 in float32, but the variance is right."""
    for shape in FAMILIES[:4]:
        x = (rng.standard_normal(shape) * std + std).astype(np.float32)
        var = exact_var(x)
        m = cybn.moments(lay(x, axis), axis=axis)
        assert (np.abs(m.var() - var) <= VAR_RTOL * var).all()


@every_layout
def test_near_the_largest_float32(rng, axis, level):
    """Squares are too large for float32, but statistics and y are not."""
    for shape in FAMILIES[:4]:
        x = np.where(rng.random(shape) < 0.5, -3e38, 3e38).astype(np.float32)
        x[0, :, 0], x[1, :, 0] = 3e38, -3e38  # both signs in every channel
        x /= np.float32(4)  # so that x - mean stays in range too
        var = exact_var(x)
        y, m = cybn.batch_norm(lay(x, axis), axis=axis)
        assert (np.abs(m.var() - var) <= VAR_RTOL * var).all()
        assert worst(np.moveaxis(y, axis, 1), *forward_bound(x, None, None, 1)) <= 1


@pytest.mark.row(6)
@every_layout
def test_beyond_the_range_of_float32(rng, axis, level, figure):
    """If x - mean itself is too large for float32, y is right or an infinity of the right sign."""
    for shape in FAMILIES[:4]:
        x = np.where(rng.random(shape) < 0.2, -3e38, 3e38).astype(np.float32)
        x[0, :, 0], x[1, :, 0] = 3e38, -3e38
        var = exact_var(x)
        y, m = cybn.batch_norm(lay(x, axis), axis=axis)
        assert (np.abs(m.var() - var) <= VAR_RTOL * var).all()
        y = np.moveaxis(y, axis, 1)
        exact, bound = forward_bound(x, None, None, 1)
        finite = np.isfinite(y)
        assert worst(y[finite], exact[finite], bound[finite]) <= 1
        assert (np.sign(y[~finite]) == np.sign(exact[~finite])).all()
        figure(
            6,
            "values beyond the range: infinite, of the right sign",
            int((~finite).sum()),
            how="sum",
        )


@every_layout
@every_dtype
def test_neither_variance_nor_eps(rng, axis, dtype, level):
    """Inference divides by 0: values above the mean give infinity, those below minus infinity."""
    for n, c, s in FAMILIES[:4]:
        up = rng.random((n, c, s)) < 0.5
        x = lay(np.where(up, 3, 1).astype(dtype), axis)
        mean, beta = np.full(c, 2.0), rng.standard_normal(c)
        y = cybn.batch_norm_inference(x, mean, np.zeros(c), None, beta, axis=axis, eps=0)
        assert (np.moveaxis(y, axis, 1) == np.where(up, np.inf, -np.inf)).all()


# ---- NaN and Inf -------------------------------------------------------------------------


def everything(x, dy, gamma, beta, fixed, axis):
    """Return all results with (C,) or channels-first axes, by name."""
    y, m = cybn.batch_norm(x, gamma, beta, axis=axis)
    z = cybn.batch_norm_inference(x, *fixed, gamma, beta, axis=axis)
    dx, dgamma, dbeta = cybn.batch_norm_backward(dy, x, m, gamma, axis=axis)
    ex, egamma, ebeta = cybn.batch_norm_inference_backward(dy, x, *fixed, gamma, axis=axis)
    tensors = {"y": y, "inference": z, "dx": dx, "inference dx": ex}
    return {name: np.moveaxis(a, axis, 1) for name, a in tensors.items()} | {
        "mean": m.mean[np.newaxis],
        "m2": m.m2[np.newaxis],
        "dgamma": np.array([dgamma, egamma]),
        "dbeta": np.array([dbeta, ebeta]),
    }


@pytest.mark.row(7)
@every_layout
@every_dtype
@every_family
def test_poison_stays_in_its_channel(rng, shape, dtype, axis, level, figure):
    x, dy, gamma, beta = normal_case(rng, shape, dtype)
    fixed = [gamma.copy(), gamma + 1]
    clean = everything(lay(x, axis), lay(dy, axis), gamma, beta, fixed, axis)
    n, c, s = shape
    first, middle, last = (0, 0, 0), (n // 2, c // 2, s // 3), (n - 1, c - 1, s - 1)
    for target, place, poison in (
        (x, first, np.nan),
        (x, last, -np.inf),
        (dy, middle, np.nan),
    ):
        kept = target[place]
        target[place] = poison
        got = everything(lay(x, axis), lay(dy, axis), gamma, beta, fixed, axis)
        target[place] = kept
        others = np.arange(c) != place[1]
        for name, value in got.items():
            same = same_bits(value[:, others], clean[name][:, others])
            figure(7, "other channels changed", 0 if same else int(others.sum()), how="sum")
            assert same, name
        spoilt = ["y", "m2", "dx", "dgamma"] if target is x else ["dx", "dbeta"]
        for name in spoilt:
            assert not np.isfinite(got[name][:, place[1]]).any(), name
        # With fixed statistics a value has no influence on the other values.
        name = "inference" if target is x else "inference dx"
        assert not np.isfinite(got[name][place])
        assert np.count_nonzero(got[name] != clean[name]) == 1


@pytest.mark.row(7)
@every_layout
@every_dtype
@pytest.mark.parametrize("name", ["mean", "var", "gamma", "beta"])
def test_poisoned_parameter_stays_in_its_channel(rng, dtype, axis, name, level):
    for n, c, s in FAMILIES[:4]:
        x, _, gamma, beta = normal_case(rng, (n, c, s), dtype)
        given = {"mean": beta.copy(), "var": gamma.copy(), "gamma": gamma, "beta": beta}
        clean = np.moveaxis(cybn.batch_norm_inference(lay(x, axis), **given, axis=axis), axis, 1)
        given[name][c // 2] = np.nan
        y = np.moveaxis(cybn.batch_norm_inference(lay(x, axis), **given, axis=axis), axis, 1)
        others = np.arange(c) != c // 2
        assert same_bits(y[:, others], clean[:, others])
        assert np.isnan(y[:, c // 2]).all()


# ---- subnormals --------------------------------------------------------------------------


@every_layout
@every_dtype
@every_family
def test_subnormals_are_not_flushed(rng, shape, dtype, axis, level):
    smallest = np.finfo(dtype).smallest_subnormal
    c = shape[1]
    zeros, ones = np.zeros(c, dtype), np.ones(c, dtype)
    x = lay((rng.integers(-1000, 1001, shape) * smallest).astype(dtype), axis)  # subnormal inputs
    y = cybn.batch_norm_inference(x, zeros, ones, axis=axis, eps=0)
    assert same_bits(y, x)
    dx, _, dbeta = cybn.batch_norm_inference_backward(x, x, zeros, ones, axis=axis, eps=0)
    assert same_bits(dx, x)
    assert (dbeta == np.moveaxis(x, axis, 1).sum((0, 2), np.float64)).all()
    normal = lay(rng.integers(-1000, 1001, shape).astype(dtype), axis)  # subnormal outputs
    y = cybn.batch_norm_inference(normal, zeros, ones, ones * smallest, axis=axis, eps=0)
    assert same_bits(y, normal * smallest)


@every_dtype
def test_a_batch_of_subnormals(rng, dtype, level):
    """var + eps equals eps, so y is (x - mean) / sqrt(eps), within one or two roundings.

    In float64 the mean itself is rounded to a subnormal, and 1 / sqrt(eps) magnifies that error.
    """
    smallest = np.finfo(dtype).smallest_subnormal
    eps = 2.0**-10
    allowed = 2 if dtype == np.float32 else 2 + 0.5 / np.sqrt(eps)
    for shape in FAMILIES[:4]:
        x = (rng.integers(-1000, 1001, shape) * smallest).astype(dtype)
        y, _ = cybn.batch_norm(x, eps=eps)
        (wx,) = wide(x)
        exact = (wx - wx.mean((0, 2), keepdims=True)) / np.sqrt(np.longdouble(eps))
        ulps = np.abs(y - exact) / smallest
        print(f"worst error: {float(ulps.max()):.2f} subnormals")
        assert (ulps <= allowed).all()


# ---- many values -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(8200, 5, 1), (8200, 33, 1), (8200, 6, 7), (3, 5, 8200)], ids=str
)
def test_long_sums_keep_small_parts(rng, shape, level):
    """Values are +-(1 + 2**-20). If a float32 sum reaches 2048, it rounds the 2**-20 away.

    Sums that stay in float32 always lose it downwards. Their errors are 2 to 4 times 2**-22 in the
    mean and 6 to 8 times in the variance. With at most 32 values in a lane they are 0.7 and 2.1.
    """
    sign = rng.choice([-1, 1], shape)
    x = (sign * (1 + 2.0**-20)).astype(np.float32)
    m = cybn.moments(x)
    mean = sign.mean((0, 2)) * (1 + 2.0**-20)
    assert np.abs(m.mean - mean).max() <= 2.0**-22
    assert np.abs(m.var() / ((1 + 2.0**-20) ** 2 - mean**2) - 1).max() <= 2.0**-20


@every_layout
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_small_values_beside_a_huge_one(channels, axis, level):
    """If one value is 2**60, float64 loses each 32 that is added later, but not their sum."""
    n = 2**15
    x = np.full((n, channels, 1), 2, np.float32)
    x[n // 16 :: n // 8] = 1  # the pivot is the mean of these
    x[0] = 2.0**60
    m = cybn.moments(lay(x, axis), axis=axis)
    assert (np.abs((m.mean - 1) * n - (2.0**60 + n)) <= n // 8).all()


@pytest.mark.row(13)
@pytest.mark.parametrize("shape", [(2, 1, 2**23 + 5), (2**23 + 5, 2, 2)], ids=str)
def test_counts_above_2_to_the_24(shape, figure):
    """A count in float32 would not grow past 2**24."""
    x, mean, m2 = exact_fill(shape, np.float32)
    m = cybn.moments(x)
    assert m.count == 2**24 + 10
    error = max(np.abs(m.mean - mean).max(), np.abs(m.m2 / m2 - 1).max())
    figure(13, "max relative error", error)
    assert error == 0
    y, again = cybn.batch_norm(x, out=x)
    assert again == m
    sums = y.sum((0, 2), np.float64)
    squares = np.einsum("ncs,ncs->c", y, y, dtype=np.float64)
    assert (np.abs(sums) <= ULP32 * 2 * m.count).all()
    assert (np.abs(squares - m.m2 / (m.var() + 1e-5)) <= ULP32 * 4 * m.count).all()


@pytest.mark.row(3)
def test_bounds_are_not_loose(rng):
    """Bounds are a few roundings wide, so the tests above detect larger errors."""
    for dtype, ulp in ((np.float32, ULP32), (np.float64, ULP64)):
        x, _, gamma, beta = normal_case(rng, FAMILIES[0], dtype)
        exact, bound = forward_bound(x, gamma, beta, 1)
        sizes = np.abs(exact) + np.abs(column(gamma, 3, 1)) + np.abs(column(beta, 3, 1))
        assert (bound <= 4 * ulp * sizes).all()
