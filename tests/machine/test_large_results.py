"""Memory of large results: it is reused, never given twice, bounded, and freed."""

import threading

import numpy as np
import pytest

import cybn
from cybn import _memory
from cybn._memory import LEAST, Blocks

MIB = 1 << 20


@pytest.fixture
def blocks(monkeypatch):
    """Replace the memory blocks by an empty set of blocks, and return it."""
    fresh = Blocks()
    monkeypatch.setattr(_memory, "blocks", fresh)
    return fresh


def array(blocks, mib):
    return blocks.array(np.empty(mib * MIB, np.uint8))


def test_memory_is_used_again(blocks):
    first = array(blocks, 3)
    address = first.ctypes.data
    del first
    assert array(blocks, 3).ctypes.data == address


def test_memory_in_use_is_not_given_twice(blocks):
    arrays = [array(blocks, 2) for _ in range(5)]
    for i, a in enumerate(arrays):
        a.fill(i)
    del arrays[2]
    arrays.append(array(blocks, 2))
    arrays[-1].fill(9)
    assert [int(a[0]) for a in arrays] == [int(a[-1]) for a in arrays] == [0, 1, 3, 4, 9]


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[5:][1:],
        lambda a: a.reshape(-1, 2).T[1:],
        lambda a: np.lib.stride_tricks.as_strided(a, (7,), (3,)),
        lambda a: np.asarray(memoryview(a)),
        lambda a: a.view(np.float32),
        lambda a: np.from_dlpack(a),
        lambda a: a.flat,
        lambda a: np.nditer(a),
    ],
)
def test_a_view_keeps_its_memory(blocks, view):
    taken = view(array(blocks, 2))
    assert blocks.held()[1] == 0
    other = array(blocks, 2)
    assert blocks.held()[0] > 4 * MIB
    del taken, other
    assert blocks.held()[0] == 0


def test_never_more_than_the_limit(rng):
    blocks, alive = Blocks(limit=24 * MIB), []
    for i in range(300):
        if alive and rng.integers(2):
            del alive[rng.integers(len(alive))]
        else:
            alive.append(array(blocks, int(rng.integers(1, 9))))
            alive[-1].fill(i % 251)
        used, free = blocks.held()
        assert used + free <= blocks.limit
        assert used <= sum(a.nbytes for a in alive) * 9 / 8 + len(alive) * MIB
    assert all((a == a[0]).all() for a in alive)


def test_the_block_used_last_goes_last():
    blocks = Blocks(limit=10 * MIB)
    for mib in (1, 2, 3, 4, 2):  # the block of 1 is dropped for the second 2
        array(blocks, mib)
    assert sorted(block.size // MIB for block in blocks._blocks) == [2, 3, 4]


@pytest.mark.parametrize("size", [*range(MIB, 20 * MIB, 7777777), MIB + 1, 2 * MIB - 1])
def test_sizes_waste_an_eighth_at_most(size):
    rounded = _memory.rounded(size)
    assert size <= rounded <= size * 9 / 8
    assert _memory.rounded(rounded) == rounded


@pytest.mark.parametrize("failures", [1, 2])
def test_no_memory(blocks, failures, monkeypatch):
    """Free blocks are released before a MemoryError is raised."""
    alive, spare = array(blocks, 2), array(blocks, 3)
    del spare
    empty, left = np.empty, [failures]

    def fails(shape, dtype):
        if dtype is np.uint8 and shape > 2 * MIB and left[0]:
            left[0] -= 1
            raise MemoryError
        return empty(shape, dtype)

    like = empty(2 * MIB + MIB // 2, np.uint8)
    monkeypatch.setattr(_memory.np, "empty", fails)
    if failures == 1:
        assert blocks.array(like).nbytes == like.nbytes
    else:
        with pytest.raises(MemoryError):
            blocks.array(like)
    monkeypatch.undo()
    assert blocks.held()[1] == 0 if failures == 2 else blocks.held()[1] >= like.nbytes
    assert alive.nbytes <= blocks.held()[0]


def test_arrays_are_aligned_and_lie_as_asked(blocks):
    x = np.empty((3, 200, 30, 40), np.float32).transpose(0, 3, 1, 2)
    a = blocks.array(x)
    assert a.strides == x.strides
    assert a.ctypes.data % 64 == 0


def test_threads(blocks):
    def work(value):
        for _ in range(200):
            a = array(blocks, 1)
            a[::4096] = value
            wrong.extend(a[::4096][a[::4096] != value])

    wrong = []
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert blocks.held()[0] == 0


@pytest.mark.parametrize("order", ["C", "F", "sliced"])
def test_results_use_the_memory_of_the_last(blocks, order, rng):
    x = rng.standard_normal((8, 16, 64, 64), dtype=np.float32)
    x = np.asfortranarray(x) if order == "F" else x
    x = x[:, ::2] if order == "sliced" else x
    bn = cybn.BatchNorm2d(x.shape[1])
    assert x.nbytes >= LEAST
    places = set()
    for _ in range(4):
        y = bn(x)
        assert y.strides == np.empty_like(x).strides
        dx = bn.backward(y)
        places |= {y.ctypes.data, dx.ctypes.data}
        del y, dx
    assert len(places) == 2
    size = _memory.rounded(x.nbytes + 64)
    assert blocks.held() == (0, 2 * size)
    cybn.empty_cache()
    assert blocks.held() == (0, 0)


def test_small_results_own_their_memory(blocks, rng):
    x = rng.standard_normal((4, 8, 16, 16))
    assert cybn.batch_norm(x)[0].flags.owndata
    assert blocks.held() == (0, 0)


def test_the_limit_can_be_set(blocks):
    x = np.ones((4, 4, 256, 256), np.float32)
    y, _ = cybn.batch_norm(x)
    assert blocks.held()[0] >= y.nbytes
    cybn.set_cache_limit(0)
    y, _ = cybn.batch_norm(x)
    assert y.flags.owndata
    assert blocks.held() == (0, 0)
    cybn.set_cache_limit(64 * MIB)
    y, _ = cybn.batch_norm(x)
    assert blocks.held()[0] >= y.nbytes
    with pytest.raises(TypeError, match="it must be an int"):
        cybn.set_cache_limit(1.5)
    with pytest.raises(ValueError, match="limit is -1"):
        cybn.set_cache_limit(-1)


def test_the_limit_counts_blocks_in_use(blocks):
    cybn.set_cache_limit(3 * MIB)
    x = np.ones((2, 4, 128, 256))
    results = [cybn.batch_norm(x)[0] for _ in range(3)]
    used, free = blocks.held()
    assert used + free <= 3 * MIB
    for result in results:
        np.testing.assert_array_equal(result, 0)


def test_strides_of_size_one_are_those_of_numpy(blocks, rng):
    x = rng.standard_normal((2, 64, 64, 64), dtype=np.float32)[::-1][-1:]
    y, _ = cybn.batch_norm(x)
    assert y.nbytes >= LEAST
    assert min(y.strides) > 0


def test_more_than_the_limit_leaves_the_rest(blocks):
    cybn.set_cache_limit(20 * MIB)
    array(blocks, 14)
    held = blocks.held()
    array(blocks, 32)
    assert blocks.held() == held
