"""cybn.torch.convert(fuse=True): batch norms are fused with the operations after them."""

import copy
import io

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import cybn.torch  # noqa: E402
from cybn.torch._fuse import Pending, Watched  # noqa: E402

pytestmark = pytest.mark.usefixtures("fuse_all")

NAMES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.LeakyReLU: "leaky_relu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
FUNCTIONS = {
    "F.relu": (functional.relu, "relu"),
    "F.relu in place": (lambda y: functional.relu(y, inplace=True), "relu"),
    "torch.relu": (torch.relu, "relu"),
    "relu": (lambda y: y.relu(), "relu"),
    "relu_": (lambda y: y.relu_(), "relu"),
    "torch.relu_": (torch.relu_, "relu"),
    "relu_, by name": (lambda y: (functional.relu_(y), y)[1], "relu"),
    "F.relu6": (functional.relu6, "relu6"),
    "F.hardtanh": (lambda y: functional.hardtanh(y, 0, 6), "relu6"),
    "F.silu": (functional.silu, "silu"),
    "F.gelu": (functional.gelu, "gelu"),
    "F.hardswish": (functional.hardswish, "hardswish"),
    "F.leaky_relu": (lambda y: functional.leaky_relu(y, 0.3), "leaky_relu"),
    "sigmoid": (lambda y: y.sigmoid(), "sigmoid"),
    "torch.sigmoid": (torch.sigmoid, "sigmoid"),
    "torch.tanh": (torch.tanh, "tanh"),
}
NOT_FUSED = {
    "tanh gelu": lambda y: functional.gelu(y, approximate="tanh"),
    "hardtanh": functional.hardtanh,
    "softplus": functional.softplus,
    "sum with a row": lambda y: functional.relu(y + y[:1]),
    "scaled sum": lambda y: functional.relu(torch.add(y, y, alpha=2)),
    "product": lambda y: functional.relu(y * 2),
    "cat": lambda y: functional.relu(torch.cat([y, y])),
    "shape alone, then sum": lambda y: y.sum() + y.shape[0],
}

each_activation = pytest.mark.parametrize("activation", NAMES, ids=lambda a: a.__name__)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
each_memory = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])


def image(*shape, dtype=torch.float64, last=False):
    x = torch.randn(shape or (4, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x.to(memory_format=torch.channels_last) if last else x


class Follows(nn.Module):
    """A batch norm, and a function that is called with the module and the input."""

    def __init__(self, function):
        super().__init__()
        self.bn, self.other, self.function = nn.BatchNorm2d(3), nn.BatchNorm2d(3), function

    def forward(self, x):
        return self.function(self, x)


def follows(function):
    return Follows(lambda m, x: function(m.bn(x * 1))).double()


def stack(activation, **options):
    """Return two batch norms and activations, with parameters that reach every branch."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation(**options)]
    layers += [nn.BatchNorm2d(4), nn.Identity(), activation(**options)]
    for layer in (layers[1], layers[3]):
        nn.init.uniform_(layer.weight, 2, 5)
        nn.init.uniform_(layer.bias, 1, 3)
    return nn.Sequential(*layers).double()


def fused(model, x=None):
    """Return a fused copy that has already learned which operations follow, if x is given."""
    ours = cybn.torch.convert(copy.deepcopy(model), fuse=True)
    if x is not None:
        state = copy.deepcopy(ours.state_dict())
        ours(x)
        ours.load_state_dict(state)
    return ours


def results(model, x):
    """Return the output, the gradients and the buffers of a training step."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same(a, b):
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert type(one) is not Watched
            torch.testing.assert_close(one, other)


def computed(calls):
    return [norm.activation for name, norm in calls if name == "forward"]


# ---- modules -----------------------------------------------------------------------------


@each_activation
@each_mode
@each_memory
def test_same_as_unfused(activation, training, last, kernel_calls):
    model = stack(activation).train(training)
    x = image(last=last)
    other = fused(model)
    for _ in range(3):
        assert_same(results(other, x), results(model, x))
    assert computed(kernel_calls) == [None] * 2 + [NAMES[activation]] * 4
    rows = [row.fused_with for row in cybn.torch.report(other)]
    assert rows == [NAMES[activation]] * 2


@each_activation
@each_mode
def test_gradcheck(activation, training):
    x = image(3, 3, 4, 4)
    model = fused(stack(activation).train(training), x)
    x.requires_grad_()
    inputs = [x, *model[1].parameters()]
    assert torch.autograd.gradcheck(lambda *_: model(x), inputs)
    if activation in (nn.SiLU, nn.Tanh):
        assert torch.autograd.gradgradcheck(lambda *_: model(x), inputs)


@each_activation
@pytest.mark.parametrize("value", [0.0, 6.0, -3.0, 3.0])
def test_at_the_borders(value, activation):
    """At the kinks, where the derivative is a convention, it follows PyTorch."""
    model = nn.Sequential(nn.BatchNorm1d(2), activation()).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(value)
    x = torch.randn(5, 2, dtype=torch.float64)
    assert_same(results(fused(model, x), x), results(model, x))


@each_activation
def test_nan_stays(activation):
    x = image(4, 4)
    x[1, 2] = float("nan")
    y = fused(nn.Sequential(nn.BatchNorm1d(4), activation()).double(), x)(x)
    assert y.isnan().any(0).tolist() == [False, False, True, False]


def test_slope():
    model = stack(nn.LeakyReLU, negative_slope=0.3)
    other = fused(model, image())
    assert_same(results(other, image()), results(model, image()))
    for m in (model, other):
        for i in (2, 5):
            m[i].negative_slope = 0.6
    assert_same(results(other, image()), results(model, image()))


def test_modes_are_learned_apart(kernel_calls):
    model = Follows(lambda m, x: functional.relu(m.bn(x)) if m.training else m.bn(x)).double()
    other = fused(model)
    for training in (True, False, True, False):
        assert_same(
            results(other.train(training), image()), results(model.train(training), image())
        )
    assert computed(kernel_calls) == [None, None, "relu", None]


# ---- functions and sums ------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
@each_mode
def test_functions(name, training, kernel_calls):
    function, activation = FUNCTIONS[name]
    model = follows(function).train(training)
    other = fused(model)
    for _ in range(2):
        assert_same(results(other, image()), results(model, image()))
    assert computed(kernel_calls) == [None, activation]


@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_is_not_fused(name, kernel_calls):
    model = follows(NOT_FUSED[name])
    other = fused(model)
    for _ in range(3):
        assert_same(results(other, image()), results(model, image()))
    assert computed(kernel_calls) == [None] * 3
    row = cybn.torch.report(other).rows[0]
    assert row.fused_with == ""
    assert "uses its output" in row.why


SUMS = {
    "sum": lambda m, x: functional.relu(m.bn(x * 1) + x),
    "reflected": lambda m, x: functional.relu(x + m.bn(x * 1)),
    "torch.add": lambda m, x: torch.tanh(torch.add(m.bn(x * 1), x)),
    "in place": lambda m, x: functional.silu(m.bn(x * 1).add_(x)),
    "augmented": lambda m, x: functional.relu_(iadd(m.bn(x * 1), x)),
    "of two norms": lambda m, x: functional.gelu(m.bn(x * 1) + m.other(x)),
}


def iadd(y, x):
    y += x
    return y


@pytest.mark.parametrize("name", SUMS)
@each_mode
@each_memory
def test_residuals(name, training, last, kernel_calls):
    model = Follows(SUMS[name]).double().train(training)
    other = fused(model)
    for _ in range(3):
        assert_same(results(other, image(last=last)), results(model, image(last=last)))
    found = [row.fused_with for row in cybn.torch.report(other)]
    assert sum(text.startswith("add, ") for text in found) == 1
    assert sum(name is not None for name in computed(kernel_calls)) == 2


def test_a_residual_that_lies_otherwise():
    model = Follows(lambda m, x: functional.relu(m.bn(x * 1) + x.mT.contiguous().mT)).double()
    other = fused(model, image())
    assert_same(results(other, image()), results(model, image()))


@pytest.mark.parametrize("forward", ["assert", "*args", "shape", "branch"])
def test_any_python_in_the_same_forward(forward, kernel_calls):
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x, *more):
            if forward == "assert":
                assert x.shape[1] == 3
            elif forward == "shape":
                x = x.view(x.shape[0], *x.shape[1:])
            elif forward == "branch" and x.sum() > 1e9:
                return x
            return functional.relu(self.bn(x))

    model = Any().double()
    other = fused(model, image())
    assert_same(results(other, image()), results(model, image()))
    assert computed(kernel_calls)[-1] == "relu"


# ---- hooks and changes of a fused model --------------------------------------------------


@pytest.mark.parametrize("where", [1, 2])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_see_what_they_would_see(where, register, kernel_calls):
    model = stack(nn.SiLU)
    other = fused(model, image())
    kernel_calls.clear()
    seen = [], []
    for m, notes in zip((model, other), seen, strict=True):
        handle = getattr(m[where], register)(lambda *a, n=notes: n.append(a[-1]) and None)
        m.handle = handle
    assert_same(results(other, image()), results(model, image()))
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(b, a)
    assert computed(kernel_calls) == [None, "silu"]
    other.handle.remove()
    kernel_calls.clear()
    other(image())
    assert computed(kernel_calls) == ["silu", "silu"]


def test_global_hooks():
    model = stack(nn.SiLU)
    other = fused(model, image())
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        assert_same(results(other, image()), results(model, image()))
    finally:
        handle.remove()


SURGERY = {
    "another activation": lambda m: m.__setitem__(2, nn.GELU()),
    "an identity": lambda m: m.__setitem__(2, nn.Identity()),
    "removed": lambda m: m.__delitem__(2),
    "a slice": lambda m: m[:2],
    "the norm alone": lambda m: copy.deepcopy(m[1]),
    "a part": lambda m: nn.Sequential(m[1], nn.Softplus()),
    "another place": lambda m: nn.Sequential(m[1], m[2], m[1], nn.Tanh()),
    "a convolution": lambda m: nn.Sequential(m[0], m[1], nn.Conv2d(4, 2, 1).double()),
}


@pytest.mark.parametrize("name", SURGERY)
@each_mode
def test_surgery(name, training):
    """If a fused model and a stock model are changed in the same way, their results are equal."""
    model = stack(nn.ReLU).train(training)
    other = fused(model, image())
    first = (
        image() if name not in ("the norm alone", "a part", "another place") else image(4, 4, 8, 8)
    )
    parts = []
    for m in (other, model):
        torch.manual_seed(2)
        parts.append((SURGERY[name](m) or m).train(training))
    for _ in range(2):
        assert_same(results(parts[0], first), results(parts[1], first))


def test_surgery_on_a_graph():
    model = stack(nn.ReLU)
    graph = torch.fx.symbolic_trace(fused(model, image()))
    graph.add_submodule("2", nn.GELU())
    model[2] = nn.GELU()
    for _ in range(2):
        assert_same(results(graph, image()), results(model, image()))


def test_a_pending_result_is_like_any_other():
    model = fused(stack(nn.ReLU), image())
    y = model[1](model[0](image()))
    assert type(y) is Pending
    assert (y.shape, y.dtype, y.dim(), len(y)) == ((4, 4, 6, 6), torch.float64, 4, 4)
    assert isinstance(y, torch.Tensor)
    assert y.is_contiguous()
    wanted = cybn.torch.revert(copy.deepcopy(model))[:2](image())
    torch.testing.assert_close(y.detach().numpy(), wanted.detach().numpy())
    assert y.requires_grad
    assert "tensor(" in repr(y)
    torch.testing.assert_close(torch.stack([y, y])[1], wanted)


def test_statistics_move_once():
    model = fused(Follows(lambda m, x: functional.relu(m.bn(x))).double(), image())
    y = model.bn(image())
    functional.relu(y), y.sum(), functional.relu(y + y)
    assert model.bn.num_batches_tracked == 1
    other = cybn.torch.revert(copy.deepcopy(model))
    other.bn.reset_running_stats()
    other(image())
    torch.testing.assert_close(model.bn.running_mean, other.bn.running_mean)


def test_an_input_that_changes_in_between_raises():
    model = fused(Follows(lambda m, x: functional.relu(m.bn(x))).double(), image())
    x = image()
    y = model.bn(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"changed in place.*without fuse=True"):
        functional.relu(y)


def test_what_goes_past_torchs_functions_raises():
    """An autograd function takes the tensor itself, so an error prevents a lost gradient."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    model = fused(Follows(lambda m, x: functional.relu(m.bn(x))).double(), image())
    with pytest.raises(RuntimeError, match="without fuse=True"):
        Twice.apply(model.bn(image())).sum().backward()


def test_no_grad_stays_no_grad():
    model = fused(Follows(lambda m, x: functional.relu(m.bn(x))).double(), image())
    with torch.no_grad():
        y = model.bn(image())
    assert not functional.relu(y).requires_grad


def test_small_calls_are_apart(monkeypatch, kernel_calls):
    from cybn.torch import _fuse

    monkeypatch.setattr(_fuse, "LEAST", 1 << 14)
    model = fused(stack(nn.ReLU), image())
    model(image())
    assert computed(kernel_calls) == [None] * 4
    assert "no call of 16384 values or more" in cybn.torch.report(model).rows[0].why


# ---- copies, and the rest of PyTorch -----------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies(how):
    model = stack(nn.SiLU)
    ours = fused(model, image())
    if how == "deepcopy":
        other = copy.deepcopy(ours)
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    for _ in range(2):
        assert_same(results(other, image()), results(model, image()))


def test_repr_and_state_dict():
    model = stack(nn.ReLU6)
    other = fused(model, image())
    assert repr(other[1]) == repr(model[1])[:-1] + ", then relu6)"
    assert list(other.state_dict()) == list(model.state_dict())
    assert len(list(other.modules())) == len(list(model.modules()))
    assert repr(cybn.torch.revert(other)) == repr(model)


def test_fuse_false_undoes_fuse_true(kernel_calls):
    model = fused(stack(nn.SiLU), image())
    cybn.torch.convert(model)
    kernel_calls.clear()
    model(image())
    assert computed(kernel_calls) == [None, None]


def test_a_compiled_activation():
    model = stack(nn.SiLU).eval()
    ours = fused(model, image())
    for i in (2, 5):
        ours[i].compile(backend="eager")
    with torch.no_grad():  # dynamo warns of tensors that are not leaves
        torch.testing.assert_close(ours(image()), model(image()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_watches_operations_sees_both_steps():
    model = stack(nn.SiLU).eval()
    x = image()
    ways = [
        lambda m: torch.compile(m, backend="eager", fullgraph=True)(x),
        lambda m: torch.export.export(m, (x,)).module()(x),
        lambda m: torch.jit.trace(m, x)(x),
        lambda m: torch.jit.script(m)(x),
        lambda m: torch.fx.symbolic_trace(m)(x),
        lambda m: torch.func.vmap(lambda v: m(v[None])[0])(x),
        lambda m: torch.func.jvp(m, (x,), (x,))[1],
    ]
    expected = [model(x)] * 6 + [torch.func.jvp(model, (x,), (x,))[1]]
    for way, wanted in zip(ways, expected, strict=True):
        torch.testing.assert_close(way(fused(model, x)), wanted)


def test_half_precision():
    model = stack(nn.SiLU).bfloat16()
    x = image().bfloat16()
    torch.testing.assert_close(fused(model, x)(x), model(x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    model = stack(nn.SiLU)
    other = fused(model)
    for _ in range(2):
        grads = []
        for m in (model, other):
            x = image().requires_grad_()
            m.zero_grad()
            y = torch.utils.checkpoint.checkpoint(m, x, use_reentrant=reentrant)
            y.square().sum().backward()
            grads.append([x.grad, *(p.grad for p in m.parameters())])
        assert_same(*grads)
