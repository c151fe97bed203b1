"""cybn.torch's memory for large gradients is used again."""

import gc

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cybn.torch  # noqa: E402
from cybn import _memory as core  # noqa: E402
from cybn.torch import _memory  # noqa: E402


@pytest.fixture
def blocks(monkeypatch):
    """Return the only blocks there are, empty."""
    fresh = core.Blocks()
    monkeypatch.setattr(core, "blocks", fresh)
    monkeypatch.setattr(_memory, "blocks", fresh)
    return fresh


def test_a_tensor_keeps_its_memory(blocks):
    view = torch.from_numpy(blocks.array(np.empty(2 << 20, np.uint8)))[5:].numpy()[1:]
    view.fill(7)
    blocks.array(np.empty(2 << 20, np.uint8)).fill(1)
    assert (view == 7).all()
    del view
    assert blocks.held()[0] == 0


def test_a_training_step_reuses_the_memory_of_the_last(blocks):
    bn = cybn.torch.BatchNorm2d(16)
    x = torch.randn(8, 16, 64, 64, requires_grad=True)
    assert x.nbytes >= core.LEAST
    kept = []
    for _ in range(4):
        y = bn(x)
        y.sum().backward()
        del y
        x.grad = None
        gc.collect()
        kept.append(blocks.held())
    assert len(set(kept)) == 1
    assert kept[0] == (0, core.rounded(x.nbytes + 64))
    cybn.torch.empty_cache()
    assert blocks.held() == (0, 0)


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


def test_small_gradients_are_pytorchs_own(blocks):
    cybn.torch.BatchNorm2d(4)(torch.randn(2, 4, 8, 8)).sum().backward()
    assert blocks.held() == (0, 0)
