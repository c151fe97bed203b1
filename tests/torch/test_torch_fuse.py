"""cybn.torch.convert(fuse=True): batch norms that compute the activation after them too."""

import copy
import io

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import cybn.torch  # noqa: E402
from cybn import functional  # noqa: E402

ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.SiLU, nn.LeakyReLU]

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.__name__)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
each_memory = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])


@pytest.fixture
def activations(monkeypatch):
    """List the activation of each call that reaches cybn.functional."""
    calls = []
    for name in functional.__all__:
        f = getattr(functional, name)

        def call(*args, _f=f, **kwargs):
            calls.append(kwargs.get("activation"))
            return _f(*args, **kwargs)

        monkeypatch.setattr(functional, name, call)
    return calls


def image(*shape, dtype=torch.float64, last=False):
    x = torch.randn(shape or (4, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x.to(memory_format=torch.channels_last) if last else x


def stack(activation, **options):
    """Return two batch norms, each with an activation, with parameters that reach every branch."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation(**options)]
    layers += [nn.BatchNorm2d(4), activation(**options)]
    for layer in (layers[1], layers[3]):
        nn.init.uniform_(layer.weight, 2, 5)
        nn.init.uniform_(layer.bias, 1, 3)
    return nn.Sequential(*layers).double()


def fused(model):
    return cybn.torch.convert(copy.deepcopy(model), fuse=True)


def results(model, x):
    """Return the output, the gradients and the buffers of a step."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same(a, b):
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other)


class Block(nn.Module):
    """A residual block whose one activation is used three times."""

    def __init__(self, activation):
        super().__init__()
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.act = activation

    def forward(self, x):
        y = self.act(self.bn1(x))
        y = self.act(self.bn2(y))
        y = self.bn3(y)
        y += x
        return self.act(y)


@each_activation
@each_mode
@each_memory
def test_same_as_unfused(activation, training, last, activations):
    model = stack(activation).train(training)
    x = image(last=last)
    assert_same(results(fused(model), x), results(model, x))
    name = cybn.torch.modules.ACTIVATIONS[activation].name
    assert activations == [name] * 4


@each_activation
@each_mode
def test_gradcheck(activation, training):
    model = fused(stack(activation)).train(training)
    x = image(3, 3, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: model(x), [x, *model[1].parameters()])


@each_activation
@pytest.mark.parametrize("value", [0.0, 6.0])
def test_at_the_borders(value, activation):
    """At the kinks, where the derivative is a convention, it is PyTorch's."""
    model = nn.Sequential(nn.BatchNorm1d(2), activation()).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(value)
    x = torch.randn(5, 2, dtype=torch.float64)
    assert_same(results(fused(model), x), results(model, x))


@each_activation
def test_nan_stays(activation):
    x = image(4, 4)
    x[1, 2] = float("nan")
    y = fused(nn.Sequential(nn.BatchNorm1d(4), activation()).double())(x)
    assert y.isnan().any(0).tolist() == [False, False, True, False]


def test_a_shared_activation(activations):
    for activation in (nn.ReLU(inplace=True), nn.SiLU()):
        model = Block(activation).double()
        other = fused(model)
        assert_same(results(other, image()), results(model, image()))
    assert activations.count("relu") == activations.count("silu") == 4
    assert activations.count(None) == 4


def test_slope():
    model = stack(nn.LeakyReLU, negative_slope=0.3)
    other = fused(model)
    assert_same(results(other, image()), results(model, image()))
    for m in (model, other):
        for i in (2, 4):
            m[i].negative_slope = 0.6
    assert_same(results(other, image()), results(model, image()))


def test_the_activation_costs_no_memory():
    """What a fused batch norm saves is its input; the activation is the same tensor."""
    model = fused(stack(nn.SiLU))
    y = model[1](model[0](image()))
    assert model[2](y) is y
    assert "_cybn_activation_done" not in y.__dict__


def test_only_the_output_of_its_own_batch_norm_passes():
    model, other = fused(stack(nn.SiLU)), fused(stack(nn.SiLU))
    y = model[1](model[0](image()))
    assert other[2](y) is not y
    assert model[2](y) is y
    assert model[2](y) is not y


@pytest.mark.parametrize("where", [1, 2])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_see_what_they_would_see(where, register, activations):
    model = stack(nn.SiLU)
    other = fused(model)
    seen = [], []
    for m, notes in zip((model, other), seen, strict=True):
        handle = getattr(m[where], register)(lambda *a, n=notes: n.append(a[-1]) and None)
        m.handle = handle
    assert_same(results(other, image()), results(model, image()))
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(b, a)
    assert activations == [None, "silu", "silu", None]
    other.handle.remove()
    activations.clear()
    other(image())
    assert activations == ["silu", "silu"]


def test_global_hooks():
    model = stack(nn.SiLU)
    other = fused(model)
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        assert_same(results(other, image()), results(model, image()))
    finally:
        handle.remove()


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies(how):
    model = fused(stack(nn.SiLU))
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other[1].follower[0] is other[2]
    assert_same(results(other, image()), results(model, image()))


def test_repr_and_state_dict():
    model = stack(nn.ReLU6)
    other = fused(model)
    assert repr(other[1]) == repr(model[1])[:-1] + ", then ReLU6)"
    assert repr(other[2]) == repr(model[2])
    assert list(other.state_dict()) == list(model.state_dict())
    assert len(list(other.modules())) == len(list(model.modules()))


@pytest.mark.parametrize("part", [1, 2])
def test_one_of_the_two_reverted(part):
    model = stack(nn.SiLU)
    other = fused(model)
    cybn.torch.revert(other[part])
    assert_same(results(other, image()), results(model, image()))


def test_reverted():
    model = stack(nn.SiLU)
    other = cybn.torch.revert(fused(model))
    assert repr(other) == repr(model)
    assert_same(results(other, image()), results(model, image()))


def test_a_compiled_activation():
    """Compiled alone, it cannot see the mark, so nothing is fused."""
    model = stack(nn.SiLU).eval()
    ours = fused(model)
    for i in (2, 4):
        ours[i].compile(backend="eager")
    with torch.no_grad():  # dynamo warns of tensors that are no leaves
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
        torch.testing.assert_close(way(fused(model)), wanted)


def test_half_precision_is_left_to_torch(activations):
    model = stack(nn.SiLU).bfloat16()
    torch.testing.assert_close(fused(model)(image().bfloat16()), model(image().bfloat16()))
    assert not activations


def test_checkpoint():
    model = stack(nn.SiLU)
    other = fused(model)
    grads = []
    for m in (model, other):
        x = image().requires_grad_()
        torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in m.parameters())])
    assert_same(*grads)
