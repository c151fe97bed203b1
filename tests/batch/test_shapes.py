"""Every small shape, unusual shapes, and shapes one below, at and above each threshold."""

from functools import lru_cache
from itertools import product

import numpy as np
import pytest
from bounds import ULP32, column, forward_bound
from cases import AXES, DTYPES, backward_bound, every_step, exact_fill, lay, normal_case
from levels import LEVELS

import cybn

# These constants equal those in the sources of the kernels, which test_project_files.py checks.
RUN_MIN, RUN_APPLY, RUN_TO_ROWS = 256, 96, 32
PIECE, COLUMNS, BROAD, LANES, FLUSH = 1024, 1568, 2048, 32, 32
CHUNK, SERIAL, BLOCK, VECTOR, MOST_CHUNKS, GROUP = 65536, 65536, 64, 64, 64, 16384
SUM_ROW, APPLY_ROW = 64, 1024

TILE, NARROW = 1024, SUM_ROW // 2  # columns of a block with few rows; of rows summed as one

every_layout = pytest.mark.parametrize("axis", AXES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def around(*values):
    return [v + d for v in values for d in (-1, 0, 1)]


def within(got, exact, bound):
    return (np.abs(got - exact) <= bound).all()


@pytest.mark.row(14)
@every_dtype
@every_step
def test_every_small_shape(rng, step, dtype, bind, figure):
    """S in 1..70, C in 1..40, N in 1..5. Channels are independent: one reference serves all C.

    By default, each level runs some of the C, so that the levels together run every shape.
    """
    cases = product(range(1, 41), enumerate(LEVELS))
    chosen = [(c, level) for c, (i, level) in cases if c % step == i % step]
    ran, failures = 0, []
    for n in range(1, 6):
        for s in range(1, 71):
            x, dy, gamma, beta = normal_case(rng, (n, 40, s), dtype)
            y_exact, y_bound = (a.astype(np.float64) for a in forward_bound(x, gamma, beta, 1))
            exact, bound = backward_bound(dy, x, gamma, 1)
            dx, dgamma, dbeta = (a.astype(np.float64) for a in exact)
            dx_bound, dgamma_bound, dbeta_bound = (a.astype(np.float64) for a in bound)
            mean, var = x.mean((0, 2), np.float64), x.var((0, 2), np.float64)
            for c, level in chosen:
                bind(level)
                part = np.ascontiguousarray(x[:, :c])
                g, b = gamma[:c], beta[:c]
                ran += 1
                y = cybn.batch_norm_inference(part, mean[:c], var[:c], g, b)
                good = within(y, y_exact[:, :c], y_bound[:, :c])
                if n * s > 1:
                    y, m = cybn.batch_norm(part, g, b)
                    got = cybn.batch_norm_backward(np.ascontiguousarray(dy[:, :c]), part, m, g)
                    good &= (
                        within(y, y_exact[:, :c], y_bound[:, :c])
                        and within(got[0], dx[:, :c], dx_bound[:, :c])
                        and within(got[1], dgamma[:c], dgamma_bound[:c])
                        and within(got[2], dbeta[:c], dbeta_bound[:c])
                    )
                if not good:
                    failures.append((n, c, s, level))
    figure(14, "shapes run", ran, how="sum")
    figure(14, "failures", len(failures), how="sum")
    assert not failures


@lru_cache(maxsize=32)
def case(shape, dtype):
    """Return x, dy, gamma, beta, the exact results and the allowed errors."""
    x, dy, gamma, beta = normal_case(np.random.default_rng(3), shape, dtype)
    exact, bound = backward_bound(dy, x, gamma, 1)
    y = forward_bound(x, gamma, beta, 1)
    return (
        (x, dy, gamma, beta),
        [np.float64(a) for a in (y[0], *exact)],
        [np.float64(a) for a in (y[1], *bound)],
    )


def check(shape, dtype, axis, bind):
    """Check all functions at all levels, and at the highest level also with several threads."""
    (x, dy, gamma, beta), exact, bound = case(shape, dtype)
    x, dy = lay(x, axis), lay(dy, axis)
    for level, threads in [(level, 1) for level in LEVELS] + [(LEVELS[-1], 2), (LEVELS[-1], 3)]:
        bind(level)
        k = {"axis": axis, "num_threads": threads}
        y, m = cybn.batch_norm(x, gamma, beta, **k)
        z = cybn.batch_norm_inference(x, m.mean, m.var(), gamma, beta, **k)
        dx, *sums = cybn.batch_norm_backward(dy, x, m, gamma, **k)
        y, dx, z = (np.moveaxis(a, axis, 1) for a in (y, dx, z))
        for got, right, allowed in zip((y, dx, *sums), exact, bound, strict=True):
            assert within(got, right, allowed), (shape, level, threads)
        assert within(z, exact[0], bound[0]), (shape, level, threads)


AWKWARD = [
    (2, 3, 1, 1),
    (1, 24, 14, 14),
    (12, 4, 8, 8),
    (2, 251, 7, 7),
    (3, 13, 5, 5),
    (4, 1, 9, 9),
    (64, 1, 33, 33),
    (2, 2, 130, 140),
    (1, 3, 512, 1024),
]


@pytest.mark.row(15)
@every_layout
@every_dtype
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_awkward_shapes(shape, dtype, axis, bind):
    check(shape, dtype, axis, bind)


@pytest.mark.row(15)
@every_layout
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 1)], ids=str)
def test_one_value_a_channel(shape, dtype, axis, level):
    x = lay(np.arange(1, shape[1] + 1, dtype=dtype).reshape(shape), axis)
    with pytest.raises(ValueError, match="one value a channel"):
        cybn.batch_norm(x, axis=axis)
    zeros, ones = np.zeros(shape[1], dtype), np.ones(shape[1], dtype)
    for threads in (1, 2, 3):
        y = cybn.batch_norm_inference(x, zeros, ones, axis=axis, eps=0, num_threads=threads)
        assert (y == x).all()
        dx, dgamma, dbeta = cybn.batch_norm_inference_backward(
            x, x, zeros, ones, axis=axis, eps=0, num_threads=threads
        )
        assert (dx == x).all()
        assert (dbeta == x.ravel()).all()
        assert (dgamma == x.ravel() ** 2).all()


THRESHOLDS = {
    "run_min": [(n, c, s) for s in around(RUN_MIN) for n, c in ((1, 1), (3, 5), (9, 5))],
    "run_apply": [(9, 5, s) for s in around(RUN_APPLY)],
    "few rows": [(n, 5, s) for n in (1, 2, 3) for s in around(n * RUN_TO_ROWS)],
    "piece": [(2, 3, s) for s in around(PIECE, 2 * PIECE)],
    "lanes": [(2, 3, s) for s in around(RUN_MIN + LANES, PIECE + LANES, 2 * PIECE + LANES)],
    "tile of columns": [(6, c, 1) for c in around(TILE, 2 * TILE)],
    "broad tile of columns": [(260, c, 1) for c in around(BROAD)],
    "far rows of a sweep": [(n, c, 1) for n in (9, 135, 259) for c in (7, 40, TILE + 1)],
    "tile of short runs": [
        (9, c, s) for s in (2, 7, 100, RUN_MIN - 1) for c in around(COLUMNS // s)
    ],
    "flush": [(n, 5, s) for n in around(FLUSH, 2 * FLUSH) for s in (1, 9)],
    "four rows": [(n, 5, s) for n in around(4, 8) for s in (1, 9)],
    "narrow rows": [(1100, c, 1) for c in around(NARROW, SUM_ROW)],
    "sums of several rows": [(n, 3, 1) for n in around(SUM_ROW // 3, FLUSH * (SUM_ROW // 3))],
    "several rows at once": [(150, c, s) for c in around(APPLY_ROW) for s in (1, 2)]
    + [(n, 3, 5) for n in around(APPLY_ROW // 15)],
    "group": [(n, TILE, 1) for n in around(GROUP // TILE)],
    "block": [(2, c, RUN_MIN) for c in around(BLOCK, 2 * BLOCK)],
    "vector": [(3, c, s) for c in around(VECTOR, 2 * VECTOR) for s in (1, 5)],
    "serial": [(1, 1, s) for s in around(SERIAL)] + [(7, 31, 302), (16, 64, 64), (9, 11, 662)],
    "two chunks of a run": [(1, 2, s) for s in around(CHUNK, 2 * CHUNK)],
    "two chunks of rows": [(n, 3, 1024) for n in around(2 * CHUNK // 1024)],
    "two chunks of short runs": [(n, 2, 128) for n in around(2 * CHUNK // 128)],
    "two chunks of columns": [(n, 1024, 1) for n in around(128)],
    "two chunks of few columns": [(n, 2, 1) for n in around(CHUNK)],
}


# References of float64 are computed in long double, so the largest ones are slow.
BY_DTYPE = [
    pytest.param(
        name,
        dtype,
        id=f"{name}-{np.dtype(dtype)}",
        marks=[pytest.mark.slow] * (dtype == np.float64 and name.startswith("two chunks")),
    )
    for name in THRESHOLDS
    for dtype in DTYPES
]


@pytest.mark.row(16)
@every_layout
@pytest.mark.parametrize(("name", "dtype"), BY_DTYPE)
def test_around_each_threshold(name, dtype, axis, bind, figure):
    for shape in THRESHOLDS[name]:
        check(shape, dtype, axis, bind)
    figure(16, "shapes run", len(THRESHOLDS[name]), how="sum")


@pytest.mark.row(16)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, s) for s in around(MOST_CHUNKS * CHUNK)]
    + [(2 * MOST_CHUNKS + 1, 1, CHUNK // 2 + 1)]
    + [(n, 1024, 1) for n in around(64 * MOST_CHUNKS)],
    ids=str,
)
def test_most_chunks(shape):
    """Exact data with dy = x - mean makes dbeta 0 and dgamma m2 * r, with dx as below."""
    eps = 1.0
    x, mean, m2 = exact_fill(shape, np.float32)
    m = cybn.moments(x)
    assert (m.mean == mean).all()
    assert (m.m2 == m2).all()
    e = x - column(mean.astype(np.float32), 3, 1)
    var = column(m.var(), 3, 1)
    r = 1 / np.sqrt(var + eps)
    y, _ = cybn.batch_norm(x, eps=eps)
    assert within(y, e * r, ULP32 * (np.abs(e) * r + 1))
    dx, dgamma, dbeta = cybn.batch_norm_backward(e, x, m, eps=eps)
    assert within(dx, e * (r * eps / (var + eps)), ULP32 * 2 * (np.abs(e) * r + var))
    assert within(dgamma, m2 * r.ravel(), ULP32 * m2)
    assert not dbeta.any()
