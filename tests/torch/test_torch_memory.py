"""cybn.torch's memory: storages of gradients are reused, and stay resizable."""

import gc

import pytest

torch = pytest.importorskip("torch")

from torch_cases import bn2d  # noqa: E402

import cybn.torch  # noqa: E402
from cybn import _memory as core  # noqa: E402
from cybn.torch import _memory  # noqa: E402


@pytest.fixture
def storages(monkeypatch):
    """Replace the storages by an empty set of storages, and return it."""
    fresh = _memory.Storages()
    monkeypatch.setattr(_memory, "storages", fresh)
    return fresh


def large(**options):
    return torch.randn(8, 16, 64, 64, **options)


def test_a_tensor_keeps_its_memory(storages):
    first = _memory.empty(large(), torch.contiguous_format, brief=True).fill_(7)
    view = first[1:].numpy()[1:]
    del first
    _memory.empty(large(), torch.contiguous_format, brief=True).fill_(1)
    assert (view == 7).all()
    del view
    gc.collect()
    assert storages.held()[0] == 0


def test_a_training_step_reuses_the_memory_of_the_last(storages):
    bn = cybn.torch.BatchNorm2d(16)
    x = large(requires_grad=True)
    assert x.nbytes >= core.LEAST
    kept = []
    for _ in range(4):
        y = bn(x)
        y.sum().backward()
        del y
        x.grad = None
        gc.collect()
        kept.append(storages.held())
    assert len(set(kept)) == 1
    assert kept[0] == (0, core.rounded(x.nbytes))
    cybn.torch.empty_cache()
    assert storages.held() == (0, 0)


def test_no_more_is_kept_than_the_limit(storages, monkeypatch):
    monkeypatch.setattr(core.blocks, "limit", 5 << 20)
    sizes = [torch.empty(n << 18) for n in (1, 2, 3, 4)]
    alive = [_memory.empty(x, torch.contiguous_format, brief=True) for x in sizes]
    assert sum(storages.held()) <= 5 << 20
    del alive
    x = torch.empty(5 << 18)
    _memory.empty(x, torch.contiguous_format, brief=True)
    assert storages.held() == (0, 5 << 20)


def test_a_storage_that_was_resized_is_not_used_again(storages):
    first = _memory.empty(large(), torch.contiguous_format, brief=True)
    first.untyped_storage().resize_(64)
    del first
    assert _memory.empty(large(), torch.contiguous_format, brief=True).fill_(1).sum() == 8 << 16


@pytest.mark.parametrize("brief", [True, False])
@pytest.mark.parametrize("side", [8, 64])
@pytest.mark.parametrize("last", [False, True])
def test_results_lie_as_was_asked(side, last, brief):
    x = torch.empty(8, 16, side, side)
    form = torch.channels_last if last else torch.contiguous_format
    y = _memory.empty(x, form, brief=brief)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert y.is_contiguous(memory_format=form)
    assert y.data_ptr() % 16 == 0
    assert y._base is None


def test_small_gradients_are_pytorchs_own(storages):
    cybn.torch.BatchNorm2d(4)(torch.randn(2, 4, 8, 8)).sum().backward()
    assert storages.held() == (0, 0)


@pytest.mark.parametrize("shape", [(4, 5, 6, 7), (8, 5, 90, 90)], ids=["small", "large"])
def test_storages_stay_resizable(shape):
    """Inputs, parameters, statistics, results and gradients can all be resized."""
    bn = bn2d(5)
    x = torch.randn(shape, requires_grad=True)
    y = bn(x)
    y.sum().backward()
    for t in (x, y, x.grad, *bn.parameters(), *bn.buffers()):
        assert t.untyped_storage().resizable()
    with torch.no_grad():
        z = bn.eval()(x)
    z.resize_(2 * shape[0], *shape[1:])
    x.detach().resize_(2 * shape[0], *shape[1:])
    torch.mul(y.detach(), 2, out=y.detach())
