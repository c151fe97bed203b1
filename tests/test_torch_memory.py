"""cybn.torch's memory for large gradients: used again, bounded, and given back."""

import gc
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cybn.torch  # noqa: E402
from cybn.torch import _memory  # noqa: E402
from cybn.torch._memory import LEAST, Blocks  # noqa: E402

MIB = 1 << 20


@pytest.fixture
def blocks():
    return Blocks()


def held(blocks):
    """Return the bytes that are lent and kept, after what died has come back."""
    with blocks._lock:
        blocks._collect()
    return blocks._lent, blocks._kept


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


def test_a_view_keeps_its_memory(blocks):
    view = torch.from_numpy(array(blocks, 2))[5:].numpy()[1:]
    view.fill(7)
    other = array(blocks, 2)
    other.fill(1)
    assert (view == 7).all()


def test_never_more_than_was_in_use_at_once(blocks, rng):
    most, alive = 0, []
    for _ in range(300):
        if alive and rng.integers(2):
            del alive[rng.integers(len(alive))]
        else:
            alive.append(array(blocks, int(rng.integers(1, 9))))
        lent, kept = held(blocks)
        most = max(most, lent)
        assert lent + kept <= most
        assert lent <= sum(a.nbytes for a in alive) * 9 / 8 + len(alive) * MIB


@pytest.mark.parametrize("size", [*range(MIB, 20 * MIB, 7777777), MIB + 1, 2 * MIB - 1])
def test_sizes_waste_an_eighth_at_most(size):
    rounded = _memory._rounded(size)
    assert size <= rounded <= size * 9 / 8
    assert _memory._rounded(rounded) == rounded


@pytest.mark.parametrize("failures", [1, 2])
def test_no_memory(blocks, failures, monkeypatch):
    """Free blocks are given up before the error is; the bound is not moved by what failed."""
    alive, spare = array(blocks, 2), array(blocks, 3)
    del spare
    before = held(blocks)
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
    lent, kept = held(blocks)
    assert (lent, blocks._most) == (before[0], sum(before))
    assert (kept > 0) == (failures == 1)
    assert alive.nbytes


def test_clear(blocks):
    keep = array(blocks, 2)
    array(blocks, 4)
    blocks.clear()
    lent, kept = held(blocks)
    assert kept == 0
    assert 2 * MIB <= lent < 3 * MIB
    keep.fill(1)
    del keep
    assert held(blocks)[0] == 0


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
    assert held(blocks)[0] == 0


def test_a_training_step_reuses_the_memory_of_the_last(monkeypatch):
    fresh = Blocks()
    monkeypatch.setattr(_memory, "_blocks", fresh)
    bn = cybn.torch.BatchNorm2d(16)
    x = torch.randn(8, 16, 64, 64, requires_grad=True)
    assert x.nbytes >= LEAST
    kept = []
    for _ in range(4):
        y = bn(x)
        y.sum().backward()
        del y
        x.grad = None
        gc.collect()
        kept.append(held(fresh))
    assert len(set(kept)) == 1
    assert kept[0] == (0, _memory._rounded(x.nbytes + 64))
    cybn.torch.empty_cache()
    assert held(fresh) == (0, 0)


@pytest.mark.parametrize("brief", [True, False])
@pytest.mark.parametrize("side", [8, 64])
@pytest.mark.parametrize("kind", ["first", "last", "sliced"])
def test_results_lie_as_the_tensor_does(kind, side, brief):
    x = torch.empty(8, 16, side, side)
    if kind == "last":
        x = x.to(memory_format=torch.channels_last)
    x = x[:, ::2] if kind == "sliced" else x
    y = _memory.empty_like(x, brief=brief)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert y.stride() == torch.empty_like(x).stride()
    assert y.data_ptr() % 64 == 0
    assert y._base is None


def test_small_gradients_are_pytorchs_own(monkeypatch):
    fresh = Blocks()
    monkeypatch.setattr(_memory, "_blocks", fresh)
    cybn.torch.BatchNorm2d(4)(torch.randn(2, 4, 8, 8)).sum().backward()
    assert fresh._most == 0
