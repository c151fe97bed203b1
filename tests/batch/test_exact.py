"""Data whose statistics are exact in any order of summation: the tolerance is zero."""

from functools import lru_cache

import numpy as np
import pytest
from bounds import column
from cases import AXES, DTYPES, FAMILIES, NETWORK_SHAPES, exact_fill, lay, pairs

import cybn

pytestmark = pytest.mark.divided

THREADS = (1, 2, 3)
ODD = [
    (3, 5, 7),
    (1, 3, 1, 1023),
    (33, 17, 3),
    (1, 2, 131073),
    (4099, 33),
    (7, 1, 9, 9),
    (2, 2, 140000),  # chunks of N, and of S
]

every_layout = pytest.mark.parametrize("axis", AXES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def check_statistics(shape, dtype, axis, figure, threads=THREADS):
    x, mean, m2 = exact_fill(shape, dtype)
    x = lay(x, axis)
    _, fused = cybn.batch_norm(x, axis=axis, activation="relu", residual=x)
    for n in threads:
        _, from_forward = cybn.batch_norm(x, axis=axis, num_threads=n)
        for m in (from_forward, fused, cybn.moments(x, axis=axis, num_threads=n)):
            differing = np.count_nonzero((m.mean != mean) | (m.m2 != m2))
            figure(1, "channels", mean.size, how="sum")
            figure(1, "differing channels", differing, how="sum")
            assert differing == 0


@pytest.mark.row(1)
@every_layout
@every_dtype
@pytest.mark.parametrize("shape", NETWORK_SHAPES)
def test_mean_and_m2_of_network_shapes(shape, dtype, axis, level, figure):
    check_statistics(shape.channels_first, dtype, axis, figure)


@pytest.mark.row(1)
@every_layout
@every_dtype
@pytest.mark.parametrize("shape", ODD)
def test_mean_and_m2_of_odd_counts(shape, dtype, axis, level, figure):
    check_statistics(shape, dtype, axis, figure, threads=(*THREADS, 16))


@lru_cache
def integer_gradients(shape):
    """Return x of +-1 in pairs, sparse integers as dy, and the sums of dy and of dy * x."""
    signs = pairs(shape, most=1)
    few = np.array([0] * 26 + [-3, -2, -1, 1, 2, 3], np.int8)
    dy = few[np.random.default_rng(2).integers(0, 32, shape, np.int8)]
    others = tuple(i for i in range(len(shape)) if i != 1)
    return signs, dy, dy.sum(others), (dy * signs).sum(others)


@pytest.mark.row(2)
@every_layout
@every_dtype
@pytest.mark.parametrize("shape", NETWORK_SHAPES)
def test_dgamma_and_dbeta(shape, dtype, axis, level, figure):
    """x is a power of two +- 1/2, so var is 1/4; eps makes var + eps a power of 4."""
    signs, dy, dbeta, dots = integer_gradients(shape.channels_first)
    p = 2.0 ** (np.arange(shape.c) % 5)
    x = lay(signs * dtype(0.5) + column(p.astype(dtype), signs.ndim, 1), axis)
    dy = lay(dy.astype(dtype), axis)
    for threads, eps, rstd in ((1, 0.75, 1.0), (2, 3.75, 0.5), (3, 0.75, 1.0)):
        m = cybn.moments(x, axis=axis, num_threads=threads)
        arguments = {"axis": axis, "eps": eps, "num_threads": threads}
        open_relu = arguments | {"activation": "relu", "beta": np.full(shape.c, 100.0, dtype)}
        for _, got_gamma, got_beta in (
            cybn.batch_norm_backward(dy, x, m, **arguments),
            cybn.batch_norm_backward(dy, x, m, **open_relu),
            cybn.batch_norm_inference_backward(dy, x, m.mean, m.var(), **arguments),
        ):
            right = dots * (rstd / 2)  # xhat: signs * rstd / 2
            differing = np.count_nonzero((got_gamma != right) | (got_beta != dbeta))
            figure(2, "channels", shape.c, how="sum")
            figure(2, "differing channels", differing, how="sum")
            assert differing == 0


@pytest.mark.row(5)
@every_layout
@every_dtype
@pytest.mark.parametrize("shape", [*FAMILIES, *ODD, (3, 2), (7, 3, 11, 13)])
def test_constant_channels_give_beta(rng, shape, dtype, axis, level, figure):
    values = [0, 1e-30, 0.1, 1e7, 16777217, -0.3]
    n, _, *spatial = shape
    channels = column(np.array(values, dtype), len(shape), 1)
    x = lay(np.broadcast_to(channels, (n, len(values), *spatial)), axis)
    gamma = rng.uniform(-100, 100, len(values)).astype(dtype)
    beta = rng.standard_normal(len(values)).astype(dtype)
    for threads in THREADS:
        y, m = cybn.batch_norm(x, gamma, beta, axis=axis, num_threads=threads)
        error = np.abs(y - column(beta, y.ndim, axis)).max()
        figure(5, "max abs(y - beta)", error)
        assert error == 0
        assert (m.mean == np.array(values, dtype)).all()
        assert (m.m2 >= 0).all()


@pytest.mark.row(5)
@every_dtype
def test_few_values_of_each_constant(dtype, level):
    """The sum of several 0.1 is rounded, but the mean is still exactly 0.1."""
    constants = np.array([0.1, 1 / 3, 1e7 / 7, 1e-30, 16777217], dtype)
    for count in range(2, 1100, 7):
        x = np.repeat(constants[np.newaxis], count, axis=0)
        assert not cybn.batch_norm(x)[0].any()
        assert not cybn.batch_norm(np.ascontiguousarray(x.T)[np.newaxis])[0].any()
