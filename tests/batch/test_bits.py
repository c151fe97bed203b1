"""Bits do not depend on the number of threads, instruction level, cache sizes or repetition."""

import subprocess
import sys

import numpy as np
import pytest
from cases import AXES, DTYPES, FAMILIES, NETWORK_SHAPES, every_step, lay, normal_case, same_bits
from family_cases import group, layer
from levels import LEVELS

import cybn
from cybn import _runtime

THREADS = (1, 2, 3, 4, 7, 16)
MEMBERS = [layer(128, 300), group(2, 3, 6, 50, 50)]
NARROW = [(3001, 24, 1), (9001, 8, 1)]  # one chunk, enough for two threads, rows summed as one

every_layout = pytest.mark.parametrize("axis", AXES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def laid(shape, dtype, axis, offset=3.0):
    x, dy, gamma, beta = normal_case(np.random.default_rng(5), shape, dtype, offset)
    x[:, 0] += 1000  # the first values of one channel are outliers, so it is summed again
    x[0, 0] += 1e6
    return lay(x, axis), lay(dy, axis), gamma, beta


def everything(x, dy, gamma, beta, axis, threads):
    """Return the results of all functions."""
    k = {"axis": axis, "num_threads": threads}
    mean, var = beta, gamma  # any values are suitable
    y, m = cybn.batch_norm(x, gamma, beta, **k)
    alone = cybn.moments(x, **k)
    return {
        "y": y,
        "mean": m.mean,
        "m2": m.m2,
        "moments.mean": alone.mean,
        "moments.m2": alone.m2,
        "inference": cybn.batch_norm_inference(x, mean, var, gamma, beta, **k),
    } | {
        f"{which} {name}": value
        for which, results in (
            ("training", cybn.batch_norm_backward(dy, x, m, gamma, **k)),
            ("inference", cybn.batch_norm_inference_backward(dy, x, mean, var, gamma, **k)),
        )
        for name, value in zip(("dx", "dgamma", "dbeta"), results, strict=True)
    }


def differing(got, first):
    """Return the names of the results whose bytes differ."""
    return [name for name in first if got[name].tobytes() != first[name].tobytes()]


def check_threads_and_levels(case, axis, bind, figure):
    bind(LEVELS[-1])
    first = everything(*case, axis, threads=1)
    assert same_bits(first["mean"], first["moments.mean"])
    assert same_bits(first["m2"], first["moments.m2"])
    for level in LEVELS:
        bind(level)
        for threads in THREADS[1:] if level == LEVELS[-1] else THREADS[:2]:
            wrong = differing(everything(*case, axis, threads), first)
            figure(23 if level == LEVELS[-1] else 24, "calls compared", len(first), how="sum")
            figure(23 if level == LEVELS[-1] else 24, "differing results", len(wrong), how="sum")
            assert not wrong, (level, threads)


@pytest.mark.row(23, 24)
@every_layout
@every_dtype
@pytest.mark.parametrize("shape", NETWORK_SHAPES)
def test_threads_and_levels_on_network_shapes(shape, dtype, axis, bind, figure):
    check_threads_and_levels(laid(shape.channels_first, dtype, axis), axis, bind, figure)


@pytest.mark.row(23, 24)
@every_layout
@every_dtype
@pytest.mark.parametrize("shape", [*FAMILIES, *NARROW, (64, 3, 32, 33), (5, 300, 300)], ids=str)
def test_threads_and_levels_on_every_family(shape, dtype, axis, bind, figure):
    check_threads_and_levels(laid(shape, dtype, axis), axis, bind, figure)


@pytest.fixture
def set_caches(level):
    """Return a function that sets the assumed sizes of L2 and L3 until the test ends."""
    yield _runtime.kernels_at(level).set_caches
    _runtime.kernels_at(level)  # sets the sizes of this machine


SIZES = [(1, 0), (2**14, 2**40), (2**18, 0), (2**26, 2**40)]
STREAMED, CACHED = (2**18, 0), (2**18, 2**40)  # outputs bypass the caches if L3 is small


@every_layout
@every_dtype
@pytest.mark.parametrize(
    "shape", [*FAMILIES, (16, 40, 14, 14), (8, 20, 56, 56), (43, 24), (103, 10)], ids=str
)
def test_cache_sizes(shape, dtype, axis, set_caches):
    """Blocks of channels depend on the size of L2 and stores on that of L3, but bits on neither."""
    case = laid(shape, dtype, axis)
    set_caches(*CACHED)
    first = everything(*case, axis, threads=1)
    for sizes in SIZES:
        set_caches(*sizes)
        assert not differing(everything(*case, axis, threads=2), first), sizes


@every_dtype
@every_step
def test_streamed_small_shapes(rng, step, dtype, level, set_caches):
    """500 shapes, with all tails, are streamed to memory that is not aligned to a cache line.

    By default, each level runs some of the C, so that the levels together run all shapes.
    """
    channels = (1, 3, 17)[LEVELS.index(level) % step :: step]
    for n in (1, 2, 5):
        for s in [
            *range(1, 41),
            63,
            64,
            65,
            511,
            512,
            515,
            544,
            1023,
            1024,
            1025,
            2049,
            3001,
            4100,
        ]:
            x, dy, gamma, beta = normal_case(rng, (n, 17, s), dtype)
            for c in channels:
                size = n * c * s
                off = (n + c + s) % 17
                room = np.full(size + 34, np.nan, dtype)
                out = room[off : off + size].reshape(n, c, s)
                part, gradient = x[:, :c].copy(), dy[:, :c].copy()
                given = gamma[:c], beta[:c]
                set_caches(*CACHED)
                y = cybn.batch_norm_inference(part, *given, *given)
                dx, *_ = cybn.batch_norm_inference_backward(gradient, part, *given)
                set_caches(*STREAMED)
                cybn.batch_norm_inference(part, *given, *given, out=out)
                assert same_bits(out, y), (n, c, s)
                cybn.batch_norm_inference_backward(gradient, part, *given, out=out)
                assert same_bits(out, dx), (n, c, s)
                assert np.isnan(room[:off]).all()
                assert np.isnan(room[off + size :]).all()


@every_dtype
@pytest.mark.parametrize("shape", [(5, 9, 7), (33, 40, 1), (513, 1100, 1), (3, 5, 1071)], ids=str)
def test_streamed_training_in_and_beside_place(rng, shape, dtype, set_caches):
    """Bits are equal at every alignment of out, with gaps between rows, and with `out is x`."""
    n, c, s = shape
    x, dy, gamma, beta = normal_case(rng, shape, dtype)
    set_caches(*CACHED)
    y, m = cybn.batch_norm(x, gamma, beta)
    dx, *_ = cybn.batch_norm_backward(dy, x, m, gamma)
    set_caches(*STREAMED)
    for off in range(17):
        for gap in (0, 1, 16):
            room = np.full(off + n * (c + gap) * s + 17, np.nan, dtype)
            out = room[off:][: n * (c + gap) * s].reshape(n, c + gap, s)[:, :c]
            cybn.batch_norm(x, gamma, beta, out=out)
            assert same_bits(out, y)
            cybn.batch_norm_backward(dy, x, m, gamma, out=out)
            assert same_bits(out, dx)
            out[...] = np.nan
            assert np.isnan(room).all()
    own_x, own_dy = x.copy(), dy.copy()
    cybn.batch_norm_backward(own_dy, own_x, m, gamma, out=own_dy)
    assert same_bits(own_dy, dx)
    cybn.batch_norm(own_x, gamma, beta, out=own_x)
    assert same_bits(own_x, y)


@pytest.mark.row(25)
@every_layout
@pytest.mark.parametrize("shape", [(8, 3, 96, 96), (8, 64, 14, 14)], ids=str)
def test_repeats(shape, axis, level, figure):
    """The thread counts include more threads than cores."""
    case = laid(shape, np.float32, axis)
    first = everything(*case, axis, threads=1)
    runs = 0
    for repeat in range(50):
        got = everything(*case, axis, threads=THREADS[repeat % len(THREADS)])
        runs += bool(differing(got, first))
    figure(25, "runs", 50, how="sum")
    figure(25, "differing runs", runs, how="sum")
    assert runs == 0


@pytest.fixture
def load():
    """Keep two other processes busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for other in others:
        other.kill()
        other.wait()


@pytest.mark.slow
@pytest.mark.row(25)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_repeats_under_load(dtype, load, rng, figure):
    """Batch norm in both layouts, fused or not, and the other norms always give equal bits."""
    cases = [(laid((8, 6, 32, 32), dtype, axis), axis) for axis in (1, -1)]
    family = [case.data(rng, dtype) for case in MEMBERS]

    def run(threads):
        results = []
        for (x, dy, gamma, beta), axis in cases:
            got = everything(x, dy, gamma, beta, axis, threads)
            k = {"axis": axis, "activation": "silu", "residual": dy, "num_threads": threads}
            results += [*got.values(), cybn.batch_norm(x, gamma, beta, **k)[0]]
        for case, data in zip(MEMBERS, family, strict=True):
            results += case.everything(*data, num_threads=threads).values()
        return [result.tobytes() for result in results]

    first = run(1)
    runs = sum(run(THREADS[repeat % len(THREADS)]) != first for repeat in range(1000))
    figure(25, "runs", 1000, how="sum")
    figure(25, "differing runs", runs, how="sum")
    assert runs == 0


@pytest.mark.row(8, 18)
@every_layout
@every_dtype
def test_alignment_and_pitch(dtype, axis, level):
    """Equal values at another address, or with a gap between the rows, give equal bits."""
    for shape in FAMILIES[:5]:
        x, dy, gamma, beta = laid(shape, dtype, axis)
        first = everything(x, dy, gamma, beta, axis, threads=1)
        for start in (1, 3, 5):
            room = np.zeros((2, x.size + start), dtype)
            moved = [room[i, start:].reshape(x.shape) for i in (0, 1)]
            moved[0][...], moved[1][...] = x, dy
            got = everything(*moved, gamma, beta, axis, threads=2)
            assert not differing(got, first), start
        if axis == 1:
            n, c, s = shape
            wide = np.full((2, n, c + 1, s), np.nan, dtype)
            wide[0, :, :c], wide[1, :, :c] = x, dy
            got = everything(*wide[:, :, :c], gamma, beta, axis, threads=2)
            assert not differing(got, first)
