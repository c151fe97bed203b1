"""Bits of the other norms do not depend on threads, level, cache sizes, address or repetition."""

import ml_dtypes
import numpy as np
import pytest
from cases import same_bits
from family_cases import CASES, every_case, every_dtype, group, instance, layer, rms
from levels import LEVELS, bind

from cybn import _runtime

LARGE = [layer(300, 1024), rms(40, 8192), layer(3, 200000), group(4, 3, 16, 128, 128)]
LARGE += [group(1, 2, 200, 400), instance(2, 5, 256, 200)]
LARGE += [group(4, 1, 64, 64, 96, axis=-1), instance(3, 100, 30, 32, axis=-1)]
THREADS = (1, 2, 3, 4, 7, 16)


@pytest.fixture
def restore():
    yield
    bind(_runtime.level)


def differing(got, first):
    return [name for name in first if not same_bits(got[name], first[name])]


@pytest.mark.row(23, 24)
@every_dtype
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_threads_and_levels(case, dtype, rng, restore, figure):
    data = case.data(rng, dtype, offset=3.0)
    case.put(data[0], (0, 0, case.sample()), 1e6)  # this row may be summed again
    bind(LEVELS[-1])
    first = case.everything(*data, num_threads=1)
    for level in LEVELS:
        bind(level)
        for threads in THREADS[1:] if level == LEVELS[-1] else THREADS[:2]:
            wrong = differing(case.everything(*data, num_threads=threads), first)
            figure(23 if level == LEVELS[-1] else 24, "calls compared", len(first), how="sum")
            figure(23 if level == LEVELS[-1] else 24, "differing results", len(wrong), how="sum")
            assert not wrong, (level, threads)


@pytest.mark.row(18)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@every_case
def test_cache_sizes_and_alignment(case, dtype, rng):
    """Bits do not depend on streaming, on writing in place, or on the addresses of the arrays."""
    data = case.data(rng, np.float64 if dtype == "float64" else np.float32)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x, dy, gamma, beta = *(a.astype(dtype) for a in data[:2]), *data[2:]
    kernels = _runtime.row_kernels
    first = case.everything(x, dy, gamma, beta)
    _, statistics = case.forward(x, gamma, beta)
    try:
        for l3 in (0, 2**40):
            kernels.set_caches(2**18, l3)
            assert not differing(case.everything(x, dy, gamma, beta), first)
            for start in (1, 3):
                room = np.full(x.size + start + 16, np.nan, dtype)
                out = room[start : start + x.size].reshape(x.shape)
                case.forward(x, gamma, beta, out=out)
                assert same_bits(out, first["y"])
                case.backward(dy, x, statistics, gamma, out=out)
                assert same_bits(out, first["dx"])
                assert np.isnan(room[:start]).all()
                assert np.isnan(room[start + x.size :]).all()
            own = x.copy()
            assert case.forward(own, gamma, beta, out=own)[0] is own
            assert same_bits(own, first["y"])
            for given in (0, 1):
                pair = [dy.copy(), x.copy()]
                dx = case.backward(*pair, statistics, gamma, out=pair[given])[0]
                assert dx is pair[given]
                assert same_bits(dx, first["dx"])
    finally:
        _runtime.kernels_at(_runtime.level, "layer_norm")  # sets the caches of this machine


@pytest.mark.row(25)
@pytest.mark.parametrize("case", [layer(300, 1024), group(4, 3, 16, 64, 64)], ids=str)
def test_repeats(case, rng, level):
    """The thread counts include more threads than cores."""
    data = case.data(rng, np.float32)
    first = case.everything(*data, num_threads=1)
    for repeat in range(30):
        got = case.everything(*data, num_threads=THREADS[repeat % len(THREADS)])
        assert not differing(got, first)


@every_dtype
def test_a_sample_does_not_depend_on_the_batch(dtype, rng):
    """y, dx and statistics of a sample alone equal those of the sample in a batch."""
    for case in CASES:
        x, dy, gamma, beta = case.data(rng, dtype)
        whole = case.everything(x, dy, gamma, beta)
        i = len(x) // 2
        alone = case.everything(x[i : i + 1], dy[i : i + 1], gamma, beta)
        assert same_bits(alone["y"][0], whole["y"][i])
        assert same_bits(alone["dx"][0], whole["dx"][i])
