"""More than 2**31 elements: 32-bit indices would overflow."""

import time
from pathlib import Path

import numpy as np
import pytest

import cybn

pytestmark = [pytest.mark.slow, pytest.mark.row(21)]

MOST = 2**31 + 2**16  # elements, not a power of two
SHAPES = {
    "N x S in one channel": ((MOST // 64, 1, 64), 1),
    "C x S in one sample": ((1, MOST // 2**15, 2**15), 1),
    "channels-first": ((2, 128, MOST // 256), 1),
    "channels-last": ((MOST // 128, 128), -1),
}
BOTH = ("channels-first", "channels-last")
PERIOD = 251  # a prime, so every channel and chunk contains all of the wave
WAVE = (np.arange(PERIOD) ** 2 % PERIOD % 6 - 2).astype(np.float32)  # integers from -2 to 3


def memory(name, file):
    """Return the value that the Linux kernel reports as `name`, in GiB."""
    lines = (line.split() for line in Path(file).read_text().splitlines())
    return next(int(words[1]) / 2**20 for words in lines if words[0] == f"{name}:")


@pytest.fixture(scope="module")
def room():
    """Return MOST float32 values, or skip the test if there is not enough free memory."""
    if not Path("/proc/meminfo").exists():
        pytest.skip("only Linux reports free memory in /proc/meminfo")
    need, there = 4 * MOST / 2**30 + 1.5, memory("MemAvailable", "/proc/meminfo")
    if there < need:
        pytest.skip(f"needs {need:.1f} GiB of free memory; {there:.1f} are available")
    return np.empty(MOST, np.float32)


@pytest.fixture
def fill(room, figure):
    """Return a function from the name of a shape to x, filled with the wave, and its axis."""
    start = time.perf_counter()

    def filled(name):
        shape, axis = SHAPES[name]
        size, block = int(np.prod(shape)), np.tile(WAVE, 2**12)
        assert size > 2**31
        for i in range(0, size, block.size):
            room[i : min(size, i + block.size)] = block[: size - i]
        return room[:size].reshape(shape), axis

    yield filled
    figure(21, "slowest test, s", time.perf_counter() - start)
    figure(21, "peak, GiB", memory("VmHWM", "/proc/self/status"))
    figure(21, "outcome", "ran", how="last")


def exact(shape, axis, channel):
    """Return the exact sums of the wave and of its squares over a channel, as ints."""
    n, c = shape[0], shape[axis]
    s = int(np.prod(shape)) // (n * c)
    runs = [(channel, c, n)] if axis == -1 else [((i * c + channel) * s, 1, s) for i in range(n)]
    if c == 1:
        runs = [(0, 1, n * s)]
    total = squares = 0
    for start, step, count in runs:
        wave = WAVE[(start + step * np.arange(PERIOD)) % PERIOD].astype(int)
        periods, rest = divmod(count, PERIOD)
        total += periods * wave.sum() + wave[:rest].sum()
        squares += periods * (wave**2).sum() + (wave[:rest] ** 2).sum()
    return int(total), int(squares)


def channels(x, axis):
    """Return the first, middle and last channels."""
    return sorted({0, x.shape[axis] // 2, x.shape[axis] - 1})


def places(x):
    """Return flat indices at both ends and around 2**31, and the values there before a call."""
    found = np.array([0, 1, 2**30, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, x.size - 2, x.size - 1])
    return found, WAVE[found % PERIOD].astype(np.float64)


def channel_of(x, axis, index):
    return index % x.shape[-1] if axis == -1 else index // x[0, 0].size % x.shape[1]


@pytest.mark.parametrize("name", SHAPES)
def test_forward_in_place(name, fill):
    x, axis = fill(name)
    y, m = cybn.batch_norm(x, axis=axis, out=x)
    count = x.size // x.shape[axis]
    assert y is x
    assert m.count == count
    for c in channels(x, axis):
        total, squares = exact(x.shape, axis, c)
        assert abs(m.mean[c] - total / count) <= 1e-12
        assert abs(m.m2[c] / (squares - total**2 / count) - 1) <= 1e-12
    found, before = places(x)
    c = channel_of(x, axis, found)
    want = (before - m.mean[c]) / np.sqrt(m.var()[c] + 1e-5)
    assert (np.abs(x.reshape(-1)[found] - want) <= 2.0**-21 * (np.abs(want) + 1)).all()


@pytest.mark.parametrize("name", BOTH)
def test_inference_and_its_backward(name, fill):
    """With mean 0, variance 1 and dy = x, dbeta is sum x and dgamma is sum x * x."""
    x, axis = fill(name)
    zeros, ones = np.zeros(x.shape[axis], np.float32), np.ones(x.shape[axis], np.float32)
    k = {"axis": axis, "eps": 0, "out": x}
    _, dgamma, dbeta = cybn.batch_norm_inference_backward(x, x, zeros, ones, ones * 2, **k)
    for c in channels(x, axis):
        assert (dbeta[c], dgamma[c]) == exact(x.shape, axis, c)
    found, before = places(x)
    assert (x.reshape(-1)[found] == 2 * before).all()
    cybn.batch_norm_inference(x, zeros, ones, ones * 2, ones, **k)
    assert (x.reshape(-1)[found] == 4 * before + 1).all()


@pytest.mark.parametrize("name", BOTH)
def test_training_backward(name, fill):
    """With dy = x, e = x - mean and eps 1, dx is e / (var + 1) ** 1.5."""
    x, axis = fill(name)
    m = cybn.moments(x, axis=axis)
    cybn.batch_norm_backward(x, x, m, axis=axis, eps=1.0, out=x)
    found, before = places(x)
    c = channel_of(x, axis, found)
    want = (before - m.mean[c]) / (m.var()[c] + 1) ** 1.5
    assert (np.abs(x.reshape(-1)[found] - want) <= 2.0**-19 * (np.abs(before) + 1)).all()


def test_layer_norm_of_many_rows(fill):
    x, _ = fill("N x S in one channel")
    rows, d = 2**16, MOST // 2**16
    x = x.reshape(rows, d)
    _, m = cybn.layer_norm(x, out=x)
    check_rows(x, m, d)


def test_group_norm_of_one_row(fill):
    x, _ = fill("N x S in one channel")
    x = x.reshape(1, 64, -1)
    _, m = cybn.group_norm(x, num_groups=1, out=x)
    check_rows(x, m, x.size)


def check_rows(y, m, d):
    """Check the means of the first and last rows, of d values each, and some values of y."""
    for row in {0, y.size // d - 1}:
        wave = WAVE[(row * d + np.arange(PERIOD)) % PERIOD].astype(int)
        periods, rest = divmod(d, PERIOD)
        assert abs(m.mean[row] - (periods * wave.sum() + wave[:rest].sum()) / d) <= 1e-12
    found, before = places(y)
    row = found // d
    want = (before - m.mean[row]) / np.sqrt(m.var()[row] + 1e-5)
    assert (np.abs(y.reshape(-1)[found] - want) <= 2.0**-21 * (np.abs(want) + 1)).all()
