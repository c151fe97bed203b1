"""More than 2**31 elements in little memory: pages that were never written share a page of zeros.

`test_huge.py` tests functions whose results have that size, which need the memory.
"""

import mmap
import time
from pathlib import Path

import numpy as np
import pytest

import cybn

MOST = 2**31 + 2**16  # elements, not a power of two
SHAPES = {
    "N x S in one channel": ((MOST // 64, 1, 64), 1),
    "C x S in one sample": ((1, MOST // 2**15, 2**15), 1),
    "channels-first": ((2, 128, MOST // 256), 1),
    "channels-last": ((MOST // 128, 128), -1),
}
PLACES = [0, 1, 2**30, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, MOST - 2, MOST - 1]
VALUES = [3, -1, 4, -1, 5, -9, 2, -6, 5]

pytestmark = pytest.mark.row(21)


@pytest.fixture(scope="module")
def zeros():
    """Return MOST float32 values, of which only those at PLACES were written."""
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        pytest.skip("only Linux can be told to use small pages for zeros")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 4 * MOST, flags=flags)
    except OSError as error:
        pytest.skip(f"cannot reserve 8 GiB of addresses: {error}")
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    x = np.frombuffer(memory, np.float32)
    x[PLACES] = VALUES
    return x


def resident():
    """Return the resident memory of this process in MiB."""
    lines = map(str.split, Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == "VmRSS:") / 1024


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_moments(name, threads, zeros, figure):
    """Sums of whole numbers are exact wherever the numbers are in the array."""
    shape, axis = SHAPES[name]
    before, start = resident(), time.perf_counter()
    m = cybn.moments(zeros.reshape(shape), axis=axis, num_threads=threads)
    taken, seconds = resident() - before, time.perf_counter() - start
    channel = np.unravel_index(PLACES, shape)[axis]
    total = np.bincount(channel, VALUES, len(m))
    squares = np.bincount(channel, np.square(VALUES), len(m))
    assert m.count == MOST // len(m)
    np.testing.assert_array_equal(m.mean * m.count, total)
    np.testing.assert_allclose(m.m2, squares - total**2 / m.count, rtol=1e-12)
    assert taken < 64
    figure(21, "sums of zeros: slowest, s", seconds)
    figure(21, "sums of zeros: memory taken, MiB", taken)
