"""cybn.torch: the modules compute what PyTorch's own do, and behave as they do."""

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bounds import forward_bound, worst  # noqa: E402
from torch import nn  # noqa: E402
from torch_cases import (  # noqa: E402
    FORMATS,
    STOCK,
    expected,
    random_batch,
    random_module,
    step,
    twin,
)

import cybn.torch  # noqa: E402
from cybn import functional  # noqa: E402
from cybn.torch import _function, modules  # noqa: E402

CONFIGURATIONS = 100
SAME_MEANING = 2.0**10  # bounds within which PyTorch, less exact, still computes the same thing
OURS = {rank: modules.BATCH_NORMS[stock] for rank, stock in STOCK.items()}

each_rank = pytest.mark.parametrize("rank", [2, 3, 4, 5])
each_memory = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture
def kernel_calls(monkeypatch):
    """List the calls that reach cybn.functional."""
    calls = []
    for name in functional.__all__:
        f = getattr(functional, name)

        def call(*args, _f=f, _name=name, **kwargs):
            calls.append((_name, kwargs))
            return _f(*args, **kwargs)

        monkeypatch.setattr(functional, name, call)
    return calls


def bn2d(channels=5, **options):
    torch.manual_seed(0)
    bn = cybn.torch.BatchNorm2d(channels, **options)
    for p in bn.parameters():
        nn.init.uniform_(p, 0.5, 2)
    return bn


def image(*shape, **options):
    return torch.randn(shape or (4, 5, 6, 7), generator=torch.Generator().manual_seed(1), **options)


def steps(t):
    """Return the strides of a tensor where they matter."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


# ---- the same numbers --------------------------------------------------------------------


@pytest.mark.row(15)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_random_configurations(dtype, rng, kernel_calls):
    """Outputs, gradients and buffers of two steps, against exact values, beside PyTorch."""
    most = {}
    for i in range(CONFIGURATIONS // 2):
        rank = 2 + i % 4
        stock = random_module(rng, rank, dtype)
        ours = twin(stock)
        for _ in range(2):
            x, dy = random_batch(rng, stock.num_features, rank, dtype, last=i // 4 % 2)
            own, other = (expected(bn, x, dy) for bn in (ours, stock))
            got, theirs = step(ours, x, dy), step(stock, x, dy)
            assert got.keys() == theirs.keys()
            got, theirs = got | dict(ours.named_buffers()), theirs | dict(stock.named_buffers())
            for name in own.keys() & got.keys():
                assert got[name].dtype == theirs[name].dtype, name
                assert got[name].shape == theirs[name].shape, name
                both = (
                    worst(got[name].numpy(), *own[name]),
                    worst(theirs[name].numpy(), *other[name]),
                )
                most[name] = np.maximum(most.get(name, 0), both)
            for name in ("y", "dx"):
                assert steps(got[name]) == steps(theirs[name]), name
            if ours.num_batches_tracked is not None:
                assert ours.num_batches_tracked == stock.num_batches_tracked
            if not ours.training:
                for name, buffer in ours.named_buffers():
                    assert torch.equal(buffer, stock.get_buffer(name)), name
    assert len(kernel_calls) == 4 * (CONFIGURATIONS // 2)
    for name, (own, other) in most.items():
        print(f"{name:12} cybn {own:9.3g}   PyTorch {other:9.3g}   of the bound")
        assert own <= 1, name
        assert other <= SAME_MEANING, name


@pytest.mark.row(11)
@each_mode
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("rank", "last"), [(2, 0), (3, 0), (4, 0), (4, 1), (5, 0), (5, 1)])
def test_gradcheck(rank, last, affine, training):
    torch.manual_seed(rank)
    bn = OURS[rank](3, affine=affine, dtype=torch.float64).train(training)
    shape = (4, 3, 3, 2, 2)[:rank]
    x = torch.randn(shape, dtype=torch.float64)
    if last:
        x = x.to(memory_format=FORMATS[rank])
    inputs = [x.requires_grad_(), *bn.parameters()]
    assert torch.autograd.gradcheck(lambda *_: bn(x), inputs)


@pytest.mark.row(4)
@each_memory
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_far_from_zero(offset, last, rng):
    """The error of y stays in its bound where the mean is far larger than the deviation."""
    x = torch.from_numpy((rng.standard_normal((16, 16, 28, 28)) + offset).astype(np.float32))
    if last:
        x = x.to(memory_format=torch.channels_last)
    stock = nn.BatchNorm2d(16)
    exact, bound = forward_bound(x.numpy(), None, None, 1)
    own, other = (bn(x).detach().numpy() for bn in (twin(stock), stock))
    print(f"error of y at {offset:g}: {np.abs(own - exact).max()} / {np.abs(other - exact).max()}")
    assert worst(own, exact, bound) <= 1
    assert worst(other, exact, bound) > 1


def test_channels_last_where_torch_is_wrong_by_more_than_one():
    """Half a million values a channel at offset 1e4: PyTorch's float32 sums have lost the variance.

    Its error is printed, not asserted: a later version may well do better.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 512, 512, generator=generator).add_(1e4)
    x = x.to(memory_format=torch.channels_last)
    wide = x.double()
    mean, var = wide.mean((0, 2, 3), keepdim=True), wide.var((0, 2, 3), keepdim=True, correction=0)
    exact = (wide - mean) / torch.sqrt(var + 1e-5)
    stock = nn.BatchNorm2d(4)
    own, other = ((bn(x) - exact).abs().max().item() for bn in (twin(stock), stock))
    print(f"error of y: cybn {own:.2g}, PyTorch {other:.2g}")
    assert own <= 2.0**-21 * (exact.abs().max() + 1)


def test_loss_curve():
    """Thirty steps of a small network stay as near to a float64 run as PyTorch's own do."""
    torch.manual_seed(0)
    layers = []
    for c in (3, 8, 16):
        layers += [nn.Conv2d(c, max(8, 2 * c // 8 * 8), 3, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(layers[-1].out_channels), nn.ReLU()]
    start = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4))
    x = torch.randn(32, 3, 32, 32)
    target = torch.randint(4, (32,))
    start(x)

    def curve(model, x):
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return np.array(losses)

    exact = curve(copy.deepcopy(start).double(), x.double())
    stock, ours = (np.abs(curve(m, x) - exact) for m in (copy.deepcopy(start), twin(start)))
    print(f"largest distance of the loss from float64: cybn {ours.max()}, PyTorch {stock.max()}")
    assert exact[-1] < exact[0] / 2
    assert ours.max() <= 4 * max(stock.max(), 1e-6)


@pytest.mark.row(10)
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_statistics_move_in_place(momentum):
    bn = bn2d(momentum=momentum)
    buffers, pointers = list(bn.buffers()), [b.data_ptr() for b in bn.buffers()]
    versions = [b._version for b in buffers]
    bn(image())
    assert all(a is b for a, b in zip(buffers, bn.buffers(), strict=True))
    assert pointers == [b.data_ptr() for b in bn.buffers()]
    assert all(b._version > v for b, v in zip(buffers, versions, strict=True))


@each_mode
def test_broadcast_statistics_are_left_to_torch(training, kernel_calls):
    x = image()
    results = []
    for bn in (nn.BatchNorm2d(x.shape[1]), cybn.torch.BatchNorm2d(x.shape[1])):
        bn.train(training)
        bn.running_mean = torch.zeros(1).expand(x.shape[1])
        bn.running_var = torch.ones(1).expand(x.shape[1])
        try:
            results.append(bn(x).detach())
        except RuntimeError as error:
            results.append(str(error))
    assert not kernel_calls  # the buffers themselves: PyTorch's threads race for the one number
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(results[1], results[0])


def test_statistics_shared_between_processes():
    bn = bn2d()
    bn.share_memory()
    bn(image() + 3)
    assert bn.running_mean.is_shared()
    assert bn.running_mean.min() > 0.2


def test_cumulative_average_without_a_counter():
    stock = nn.BatchNorm1d(3, momentum=None)
    stock.num_batches_tracked = None
    ours = twin(stock)
    x = torch.randn(8, 3)
    for bn in (stock, ours):
        bn(x)
    assert torch.equal(ours.running_mean, stock.running_mean)


@pytest.mark.parametrize("track", [True, False])
@each_mode
def test_tracking_switched_off_later(training, track):
    stock = nn.BatchNorm1d(3).train(training)
    stock(torch.randn(8, 3) + 5)
    stock.track_running_stats = track
    ours = twin(stock)
    x = torch.randn(8, 3)
    torch.testing.assert_close(ours(x), stock(x))
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


# ---- memory and threads ------------------------------------------------------------------


@each_rank
@each_memory
def test_views_share_memory(rank, last, kernel_calls):
    x = torch.randn((4, 3, 3, 2, 2)[:rank])
    if last and rank in FORMATS:
        x = x.to(memory_format=FORMATS[rank])
    view = _function._view(x)
    assert view.ctypes.data == x.data_ptr()
    folded, plan = cybn._layout.fold(view, 1)
    assert folded is view
    assert np.shares_memory(plan.view(folded), view)


@pytest.mark.parametrize("shape", [(4, 5, 6, 7), (16, 32, 40, 40)], ids=["small", "large"])
@each_memory
def test_results_lie_as_the_input(shape, last):
    x = image(*shape)
    if last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    y = bn2d(shape[1])(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    for t in (y, dx):
        assert t.stride() == x.stride()
        assert t.data_ptr() % 16 == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_follow_torch(threads, kernel_calls):
    before = torch.get_num_threads()
    x = image(8, 5, 60, 60).requires_grad_()
    try:
        torch.set_num_threads(threads)
        bn2d()(x).sum().backward()
    finally:
        torch.set_num_threads(before)
    assert [kwargs["num_threads"] for _, kwargs in kernel_calls] == [threads] * 2


@pytest.mark.row(23)
def test_threads_give_the_same_bits():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(step(bn2d(), image(8, 5, 60, 60), image(8, 5, 60, 60)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in other)


# ---- autograd ----------------------------------------------------------------------------


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
def test_second_derivatives_are_refused(leaf, training):
    bn = bn2d().train(training).requires_grad_(leaf == "weight")
    x = image().requires_grad_(leaf == "x")
    dy = image().requires_grad_(leaf == "dy")
    y = bn(x)
    if leaf == "dy":
        x.requires_grad_()
        y = bn(x)
    source = {"x": x, "weight": bn.weight, "dy": x}[leaf]
    (gradient,) = torch.autograd.grad(y, source, dy, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*revert\(model\)"):
        gradient.sum().backward()


def test_gradient_penalty_beside_another_path_is_refused():
    """A penalty must not lose the part that goes through the batch norm without a word."""
    bn = bn2d()
    x = image().requires_grad_()
    (g,) = torch.autograd.grad(bn(x).square().sum() + x.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        g.square().sum().backward()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_create_graph_alone_works():
    bn = bn2d()
    x = image().requires_grad_()
    bn(x).square().sum().backward(create_graph=True)
    other = image().requires_grad_()
    bn2d()(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_checkpoint():
    model = nn.Sequential(nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5), nn.Tanh())
    grads = []
    for m in (model, twin(model)):
        x = image().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False)
        y.sum().backward()
        grads.append((x.grad, m[1].running_mean, m[1].num_batches_tracked))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_no_grad_saves_nothing():
    bn = bn2d()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = bn(image().requires_grad_())
        assert y.grad_fn is None
        assert not y.requires_grad
    assert bn.num_batches_tracked == 2


# ---- a module like any other -------------------------------------------------------------


@each_rank
def test_constructor_and_state_dict(rank):
    options = {"eps": 1e-3, "momentum": 0.3, "affine": True, "dtype": torch.float64}
    ours, stock = OURS[rank](4, **options), STOCK[rank](4, **options)
    assert isinstance(ours, STOCK[rank])
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    x = torch.randn((4, 4, 3, 2, 2)[:rank], dtype=torch.float64)
    stock(x)
    ours.load_state_dict(stock.state_dict(), strict=True)
    ours(x)
    stock.load_state_dict(ours.state_dict(), strict=True)
    assert stock.num_batches_tracked == 2
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x))


def test_signature_is_the_stock_one():
    import inspect

    for stock, ours in modules.BATCH_NORMS.items():
        assert inspect.signature(ours) == inspect.signature(stock)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    bn = bn2d()
    bn(image())
    if how == "deepcopy":
        other = copy.deepcopy(bn)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(bn))
    else:
        file = io.BytesIO()
        torch.save(bn, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(bn)
    assert other.weight is not bn.weight
    for a, b in zip(bn.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(bn(image()), other(image()))


def test_saved_weights_load_without_unpickling_code():
    file = io.BytesIO()
    torch.save(bn2d().state_dict(), file)
    file.seek(0)
    nn.BatchNorm2d(5).load_state_dict(torch.load(file, weights_only=True), strict=True)


def test_double_and_back():
    bn = bn2d().double()
    assert bn(image(dtype=torch.float64)).dtype == torch.float64
    assert bn.float()(image()).dtype == torch.float32


@pytest.mark.row(31)
def test_a_step_that_raises_changes_nothing():
    bn = bn2d()
    before = copy.deepcopy(bn.state_dict())
    for wrong in (image(4, 5, 6), image(4, 6, 6, 7), image(1, 5, 1, 1), image().long()):
        with pytest.raises((ValueError, RuntimeError)):
            bn(wrong)
    del before["num_batches_tracked"]  # PyTorch counts before it refuses
    assert all(torch.equal(value, bn.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("x", "options"),
    [
        pytest.param(image(1, 5, 1, 1), {}, id="one value a channel"),
        pytest.param(image(4, 5, 6), {}, id="rank"),
        pytest.param(image(4, 3, 6, 7), {}, id="channels"),
        pytest.param(image(), {"eps": 0.0}, id="eps"),
        pytest.param(image(dtype=torch.float64), {}, id="dtype"),
        pytest.param([1.0], {}, id="list"),
    ],
)
def test_errors_are_the_stock_ones(x, options):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        nn.BatchNorm2d(5, **options)(x)
    with pytest.raises(theirs.type) as ours:
        cybn.torch.BatchNorm2d(5, **options)(x)
    assert str(ours.value) == str(theirs.value)


# ---- what is left to PyTorch -------------------------------------------------------------


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


# ---- import ------------------------------------------------------------------------------


def run(code):
    command = [sys.executable, "-P", "-W", "error", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_importing_cybn_does_not_import_torch():
    assert run("import cybn, sys; print('torch' in sys.modules)") == ["False"]


def test_without_torch_the_import_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "try:\n    import cybn.torch\n"
        "except ImportError as error:\n    print(error)"
    )
    assert "pip install 'cybn[torch]'" in " ".join(run(code))
