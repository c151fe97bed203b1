"""cybn.torch in graphs: compiled, exported, traced and batched, with the kernels as operators."""

import copy
import io

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_cases import twin  # noqa: E402

import cybn.torch  # noqa: E402
from cybn.torch._calls import Norm  # noqa: E402

each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

NORMS = {
    "batch": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 6)),
    "batch, cumulative": (lambda: nn.BatchNorm1d(4, momentum=None), (3, 4, 5)),
    "batch, plain": (lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False), (6, 4)),
    "layer": (lambda: nn.LayerNorm((5, 6)), (3, 4, 5, 6)),
    "rms": (lambda: nn.RMSNorm(6), (3, 4, 6)),
    "group": (lambda: nn.GroupNorm(2, 4), (3, 4, 5, 6)),
    "instance": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 5, 6)),
}
each_norm = pytest.mark.parametrize("name", NORMS)


def pair(name, training=True):
    torch.manual_seed(0)
    make, shape = NORMS[name]
    stock = make().double().train(training)
    return stock, twin(stock), torch.randn(shape, dtype=torch.float64)


def step(module, call, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = call(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


def operators(graph):
    return [n.target for n in graph.nodes if n.op == "call_function" and "cybn" in str(n.target)]


@each_norm
@each_mode
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(name, training, backend):
    if name == "batch, cumulative" and training:
        pytest.skip("PyTorch's own forward reads its counter, which breaks the graph")
    torch._dynamo.reset()
    stock, ours, x = pair(name, training)
    seen = []

    def backend_of(graph, inputs):
        seen.extend(operators(graph.graph))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(ours, backend=backend_of, fullgraph=True)
    for _ in range(2):
        for a, b in zip(step(ours, compiled, x), step(stock, stock, x), strict=True):
            torch.testing.assert_close(a, b)
    assert seen == [torch.ops.cybn.normalize.default] * len(seen)
    assert seen


def test_compile_of_sizes_that_change():
    torch._dynamo.reset()
    stock, ours, _ = pair("batch")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((3, 4, 5, 6), (2, 4, 7, 3), (9, 4, 2, 2)):
        x = torch.randn(shape, dtype=torch.float64)
        for a, b in zip(step(ours, compiled, x), step(stock, stock, x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@each_norm
@each_mode
@pytest.mark.parametrize("last", [False, True])
def test_inductor(name, training, last):
    """Test the default backend, which rearranges memory formats and neighbouring modules."""
    torch._dynamo.reset()
    stock, _, x = pair(name, training)
    layers = nn.Conv2d(3, 4, 1, dtype=torch.float64), nn.SiLU()
    whole = nn.Sequential(layers[0], stock, layers[1])
    whole = whole if x.dim() == 4 else nn.Sequential(stock, layers[1])
    x = torch.randn(3, 3, *x.shape[2:], dtype=torch.float64) if x.dim() == 4 else x
    if last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    other = twin(whole)
    compiled = torch.compile(other)
    for _ in range(2):
        for a, b in zip(step(other, compiled, x), step(whole, whole, x), strict=True):
            torch.testing.assert_close(a, b)


@each_norm
def test_export(name, tmp_path):
    stock, ours, x = pair(name, training=False)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(ours, (x,), dynamic_shapes=({0: batch},))
    assert operators(program.graph) == [torch.ops.cybn.normalize.default]
    torch.export.save(program, tmp_path / "norm.pt2")
    loaded = torch.export.load(tmp_path / "norm.pt2").module()
    for y in (x, torch.cat([x, x])):
        torch.testing.assert_close(loaded(y), stock(y))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Converting a tensor"
)
@each_norm
def test_jit_trace(name):
    stock, ours, x = pair(name, training=False)
    traced = torch.jit.trace(ours, x)
    assert "cybn::normalize" in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), stock(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@each_norm
def test_jit_script(name):
    """Scripted programs contain PyTorch's own norms, so they can be loaded without cybn."""
    stock, ours, x = pair(name, training=False)

    class Derived(type(ours)):
        pass

    derived = copy.deepcopy(ours)
    derived.__class__ = Derived
    for module in (ours, derived, nn.Sequential(ours)):
        scripted = torch.jit.script(module)
        assert "cybn" not in str(scripted.inlined_graph)
        torch.testing.assert_close(scripted(x), stock(x))


@each_norm
def test_operators_are_whole(name, monkeypatch):
    """Operators pass PyTorch's own checks: schema, fake results, autograd, compilation."""
    _, ours, x = pair(name)
    seen = []
    from cybn.torch import _autograd

    plain = _autograd.forward
    monkeypatch.setattr(
        _autograd,
        "forward",
        lambda norm, inputs: (seen.append((norm, inputs)), plain(norm, inputs))[1],
    )
    with torch.no_grad():
        ours(x)
    norm, inputs = seen[0]
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.cybn.normalize.default, (*inputs, *norm))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("given", [True, False])
def test_derivatives_of_the_operator(given, activation):
    torch.manual_seed(0)
    norm = Norm("batch", 1e-5, activation=activation)
    x, residual = (torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = (torch.rand(3, dtype=torch.float64) if given else None for _ in range(2))

    def call(x, weight, bias, residual):
        return torch.ops.cybn.normalize(x, weight, bias, residual, mean, var, *norm)[0]

    inputs = (x, weight, bias, residual)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_batches_of_the_operator():
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    norm = Norm("batch", 1e-5)

    def call(x):
        return torch.ops.cybn.normalize(x, None, None, None, None, None, *norm)[0]

    batched = torch.vmap(call)(x)
    torch.testing.assert_close(batched, torch.stack([call(one) for one in x]))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@each_norm
def test_func(name):
    stock, ours, x = pair(name, training=False)
    x = x[:2]
    calls = [
        lambda m: torch.func.vmap(lambda v: m(torch.stack([v, 2 * v])))(x),
        lambda m: torch.func.grad(lambda v: m(v).square().sum())(x),
        lambda m: torch.func.jvp(m, (x,), (x,))[1],
        lambda m: torch.func.jacrev(m)(x),
        lambda m: torch.func.functional_call(m, dict(m.named_parameters()), (x,)),
    ]
    for call in calls:
        torch.testing.assert_close(call(ours), call(stock))


def test_modes_of_dispatch_see_one_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Notes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    stock, ours, x = pair("batch", training=False)
    with Notes() as notes:
        y = ours(x)
    assert "cybn.normalize.default" in notes.seen
    torch.testing.assert_close(y, stock(x))


def test_fused_models_in_graphs():
    """A graph contains separate steps; its compiler fuses pointwise ones itself."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    ours = cybn.torch.convert(copy.deepcopy(model), fuse=True)
    x = torch.randn(8, 3, 24, 24)
    for _ in range(2):
        ours(x)
    compiled = torch.compile(ours.eval(), backend="eager", fullgraph=True)
    reverted = cybn.torch.revert(copy.deepcopy(ours))
    torch.testing.assert_close(compiled(x), reverted(x))
