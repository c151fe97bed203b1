"""cybn.torch in PyTorch's autograd: saved tensors, requested gradients, and errors."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_cases import (  # noqa: E402
    bn2d,
    each_memory,
    each_mode,
    image,
    step,
    twin,
)


@each_mode
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias"), ("x",)])
def test_only_wanted_gradients(frozen, training):
    stock = nn.BatchNorm2d(5).train(training)
    grads = []
    for bn in (stock, twin(stock)):
        x = image().requires_grad_("x" not in frozen)
        for name, p in bn.named_parameters():
            p.requires_grad_(name not in frozen)
        bn(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in bn.parameters())])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "dy",
    [
        pytest.param(lambda y: y.sum(), id="expanded"),
        pytest.param(lambda y: y.sum((0, 2, 3))[2], id="expanded, few channels"),
        pytest.param(lambda y: (y.mT * image(4, 5, 7, 6)).sum(), id="transposed"),
        pytest.param(lambda y: (y[:, :, ::2] ** 2).sum(), id="strided"),
        pytest.param(lambda y: (y.contiguous() ** 2).sum(), id="first"),
        pytest.param(
            lambda y: (y.contiguous(memory_format=torch.channels_last) ** 2).sum(), id="last"
        ),
        pytest.param(lambda y: (y[1:] ** 2).sum() + (y[:1] ** 3).sum(), id="parts"),
    ],
)
@each_memory
def test_gradients_of_any_layout(dy, last):
    stock = nn.BatchNorm2d(5, dtype=torch.float64)
    x = image(dtype=torch.float64)
    if last:
        x = x.to(memory_format=torch.channels_last)
    grads = []
    for bn in (stock, twin(stock)):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(dy(bn(leaf)), (leaf, *bn.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.row(17)
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[:, ::2],
        lambda x: x[::2, 1:],
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, 1:-1, 2:],
        lambda x: x.expand(3, 5, 6, 7) if x.shape[0] == 1 else x[:1].expand(3, 5, 6, 7),
        lambda x: x.as_strided((4, 5, 3, 3), (210, 42, 14, 2)),
    ],
    ids=["channels", "batch", "transposed", "inner", "expanded", "steps"],
)
@each_mode
def test_inputs_of_any_strides(make, training):
    x = make(image())
    stock = nn.BatchNorm2d(x.shape[1], dtype=torch.float32).train(training)
    dy = torch.randn(x.shape)
    a, b = step(stock, x, dy), step(twin(stock), x, dy)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-4)


@each_mode
def test_change_of_a_saved_tensor_is_noticed(training):
    bn = bn2d().train(training)
    x = image().requires_grad_()
    h = x * 2
    y = bn(h)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_training_between_evaluation_and_backward():
    x = image().requires_grad_()
    bn = bn2d().eval()
    bn(x).square().sum().backward()
    expected, x.grad = x.grad, None
    y = bn(x)
    bn.train()(image() + 5)
    y.square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_output_may_be_changed_in_place():
    bn = bn2d()
    x = image().requires_grad_()
    y = bn(x)
    nn.functional.relu_(y)
    y.sum().backward()
    other = image().requires_grad_()
    nn.functional.relu(bn2d()(other)).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


@each_mode
def test_backward_twice_over_a_kept_graph(training):
    bn = bn2d().train(training)
    x = image().requires_grad_()
    loss = bn(x).square().sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@each_mode
@pytest.mark.parametrize("leaf", ["x", "weight", "dy"])
def test_second_derivatives(leaf, training):
    stock = nn.BatchNorm2d(5, dtype=torch.float64).train(training)
    second = []
    for bn in (stock, twin(stock)):
        x = image(dtype=torch.float64).requires_grad_()
        dy = image(dtype=torch.float64).requires_grad_()
        source = {"x": x, "weight": bn.weight, "dy": x}[leaf]
        (gradient,) = torch.autograd.grad(bn(x), source, dy, create_graph=True)
        wanted = (x, dy, bn.weight)
        second.append(torch.autograd.grad(gradient.pow(3).sum(), wanted, allow_unused=True))
    for a, b in zip(*second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a)


def test_gradient_penalty_beside_another_path():
    """A penalty includes the part of its gradient that goes through the batch norm."""
    stock = nn.BatchNorm2d(5, dtype=torch.float64)
    grads = []
    for bn in (stock, twin(stock)):
        x = image(dtype=torch.float64).requires_grad_()
        (g,) = torch.autograd.grad(bn(x).square().sum() + x.pow(3).sum(), x, create_graph=True)
        g.square().sum().backward()
        grads.append([x.grad, bn.weight.grad])
    torch.testing.assert_close(grads[1], grads[0])


def test_third_derivatives():
    stock = nn.BatchNorm1d(3, dtype=torch.float64)
    found = []
    for bn in (stock, twin(stock)):
        x = image(6, 3, dtype=torch.float64).requires_grad_()
        y = bn(x).pow(4).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.pow(2).sum()
        found.append(g.detach())
    torch.testing.assert_close(found[1], found[0])


@each_mode
def test_batched_gradients(training):
    stock = nn.BatchNorm1d(3, dtype=torch.float64).train(training)
    ours = twin(stock)
    x = image(6, 3, dtype=torch.float64)
    whole = [
        torch.autograd.functional.jacobian(bn, x, vectorize=way)
        for bn, way in ((stock, False), (ours, True), (ours, False))
    ]
    torch.testing.assert_close(whole[1], whole[0])
    torch.testing.assert_close(whole[2], whole[0])
    x.requires_grad_()
    seeds = torch.randn(4, 6, 3, dtype=torch.float64)
    grads = [
        torch.autograd.grad(bn(x), (x, bn.weight), seeds, is_grads_batched=True)
        for bn in (stock, ours)
    ]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.filterwarnings("ignore:Using backward")
def test_create_graph_alone_works():
    bn = bn2d()
    x = image().requires_grad_()
    bn(x).square().sum().backward(create_graph=True)
    other = image().requires_grad_()
    bn2d()(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("norms", [1, 2, 3])
def test_checkpoint(norms, reentrant):
    """Gradients, statistics and counters are PyTorch's, also if recomputation stops early."""
    layers = [nn.Conv2d(5, 5, 3), nn.Tanh()]
    for _ in range(norms):
        layers += [nn.BatchNorm2d(5), nn.ReLU()]
    model = nn.Sequential(*layers[: len(layers) - norms % 2])
    found = []
    for m in (model, twin(model)):
        x = image().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(m, x, use_reentrant=reentrant)
        y.square().sum().backward()
        found.append([x.grad, *m.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_no_grad_saves_nothing():
    bn = bn2d()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = bn(image().requires_grad_())
        assert y.grad_fn is None
        assert not y.requires_grad
    assert bn.num_batches_tracked == 2
