"""cybn.torch: what is left to PyTorch's own batch norm, and PyTorch's other machinery."""

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


@pytest.mark.parametrize("parameters", ["half", "float"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_mode
def test_half_precision_is_left_to_torch(dtype, parameters, training, kernel_calls):
    stock = nn.BatchNorm2d(5).train(training)
    stock = stock.to(dtype) if parameters == "half" else stock
    ours = twin(stock)
    x = image().to(dtype)
    a, b = stock(x), ours(x)
    assert b.dtype == dtype
    assert torch.equal(a, b)
    assert not kernel_calls


def test_autocast(kernel_calls):
    model = nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4))
    results = []
    for m in (model, twin(model)):
        x = image().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        y.float().square().sum().backward()
        results.append((y, x.grad, *(p.grad for p in m.parameters())))
    assert results[1][0].dtype == torch.bfloat16
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(b, a, rtol=0.1, atol=0.1 * a.abs().max().item())
    assert len(kernel_calls) == 2  # the first batch norm gets float32


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


def test_second_derivatives_after_revert():
    bn = cybn.torch.revert(bn2d().double())
    x = image(dtype=torch.float64).requires_grad_()
    (g,) = torch.autograd.grad(bn(x).pow(3).sum(), x, create_graph=True)
    g.square().sum().backward()


def test_compile():
    model = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU())
    compiled = torch.compile(twin(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image()), model(image()))


def test_export():
    model = twin(nn.Sequential(nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
    exported = torch.export.export(model, (image(),))
    torch.testing.assert_close(exported.module()(image()), model(image()))


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
