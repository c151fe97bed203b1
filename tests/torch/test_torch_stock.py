"""cybn.torch: calls that PyTorch's own batch norm computes, and other features of PyTorch."""

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_cases import (  # noqa: E402
    bn2d,
    each_mode,
    image,
    step,
    twin,
)

import cybn.torch  # noqa: E402
from cybn.torch import _arrays  # noqa: E402

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("parameters", ["half", "float"])
@pytest.mark.parametrize("dtype", HALF)
@each_mode
def test_half_precision(dtype, parameters, training, kernel_calls):
    """Types are PyTorch's, and errors are at most those of rounding the exact value once."""
    stock = nn.BatchNorm2d(5).train(training)
    stock = stock.to(dtype) if parameters == "half" else stock
    nn.init.uniform_(stock.weight, 0.5, 2)
    ours, exact = twin(stock), copy.deepcopy(stock).double()
    x, dy = image().to(dtype), torch.randn(4, 5, 6, 7).to(dtype)
    a, b, c = (step(bn, t, g) for bn, t, g in (
        (stock, x, dy), (ours, x, dy), (exact, x.double(), dy.double())
    ))  # fmt: skip
    for name in a:
        assert b[name].dtype == a[name].dtype
        wide = c[name].abs().max() * torch.finfo(dtype).eps
        assert (b[name].double() - c[name]).abs().max() <= wide
    for (_, one), (_, other) in zip(ours.named_buffers(), stock.named_buffers(), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert [name for name, _ in kernel_calls] == ["forward", "backward"]


def test_autocast(kernel_calls):
    model = nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4))
    results = []
    for m in (model, twin(model)):
        x = image().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append((y, x.grad, *(p.grad for p in m.parameters())))
    assert results[1][0].dtype == torch.bfloat16
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(b, a, rtol=0.1, atol=0.1 * a.abs().max().item())
    assert len(kernel_calls) == 4


def test_bfloat16_without_its_numpy_type(monkeypatch, kernel_calls):
    monkeypatch.delitem(_arrays.DTYPES, torch.bfloat16)
    bn = bn2d()
    assert bn(image().bfloat16()).dtype == torch.bfloat16
    assert not kernel_calls
    assert cybn.torch.report(bn).rows[0].why == "bfloat16 needs the package ml_dtypes"


@each_mode
def test_empty_batches(training):
    stock = nn.BatchNorm2d(5).train(training)
    x, dy = torch.empty(0, 5, 3, 3), torch.empty(0, 5, 3, 3)
    a, b = step(stock, x, dy), step(twin(stock), x, dy)
    for name in a:
        assert torch.equal(a[name], b[name])


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert cybn.torch.BatchNorm2d(5, device="meta")(image().to("meta")).is_meta
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert bn2d()(mode.from_tensor(image())).shape == (4, 5, 6, 7)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_func_transforms():
    bn = bn2d().eval()
    stock = cybn.torch.revert(copy.deepcopy(bn))
    x = image()
    calls = [
        lambda m: torch.func.vmap(lambda v: m(v[None])[0])(x),
        lambda m: torch.func.grad(lambda v: m(v).square().sum())(x),
        lambda m: torch.func.jvp(m, (x,), (x,))[1],
        lambda m: torch.func.functional_call(m, dict(m.named_parameters()), (x,)),
    ]
    for call in calls:
        torch.testing.assert_close(call(bn), call(stock))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode():
    bn = bn2d()
    x = image()
    with torch.autograd.forward_ad.dual_level():
        y = bn(torch.autograd.forward_ad.make_dual(x, x))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert tangent is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_jit():
    stock = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()).eval()
    traced = torch.jit.trace(twin(stock), image())
    scripted = torch.jit.script(twin(stock))
    for f in (traced, scripted):
        torch.testing.assert_close(f(image()), stock(image()))


def test_symbolic_trace():
    model = twin(nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()))
    graph = torch.fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["0", "1"]
    assert isinstance(graph.get_submodule("0"), cybn.torch.BatchNorm2d)
    torch.testing.assert_close(graph(image()), model(image()))


def test_subclasses_of_tensor():
    class Mine(torch.Tensor):
        pass

    y = bn2d()(image().as_subclass(Mine))
    assert type(y) is Mine
