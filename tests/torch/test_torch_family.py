"""Layer, RMS, group and instance norms of PyTorch: random modules against exact values."""

import copy
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bounds import ULP32, ULP64, wide, worst  # noqa: E402
from family_cases import Case, backward_bound, forward_bound  # noqa: E402
from torch import nn  # noqa: E402
from torch_cases import expected, step, twin  # noqa: E402

CONFIGURATIONS = 200  # of each norm
KINDS = ["layer", "rms", "group", "instance"]
INSTANCE = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d


def random_case(kind, rng, dtype):
    """Return a module with random options, and x and dy for it."""
    sizes = [int(n) for n in rng.integers(1, 9, size=rng.integers(1, 4))]
    batch, channels = int(rng.integers(1, 6)), int(rng.integers(1, 5)) * 4
    shape = (batch, channels, *sizes)
    options = {"eps": float(rng.choice([1e-5, 1e-3, 0.1])), "dtype": dtype}
    affine = bool(rng.integers(4))
    if kind in ("layer", "rms"):
        normalized = shape[int(rng.integers(1, len(shape))) :]
        options["elementwise_affine"], values = affine, np.prod(normalized)
        if kind == "layer":
            module = nn.LayerNorm(normalized, bias=bool(rng.integers(2)), **options)
        else:
            module = nn.RMSNorm(normalized, **options)
    elif kind == "group":
        groups = int(rng.choice([1, 2, 4, channels]))
        module = nn.GroupNorm(groups, channels, affine=affine, **options)
        values = channels // groups * np.prod(sizes)
    else:
        options["track_running_stats"] = bool(rng.integers(2))
        momentum = float(rng.choice([0.0, 0.1, 0.7, 1.0]))
        module = INSTANCE[len(sizes) - 1](channels, momentum=momentum, affine=affine, **options)
        values = np.prod(sizes)
    if values == 1 and kind != "rms":
        return random_case(kind, rng, dtype)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.from_numpy(rng.uniform(0.5, 2, tensor.shape)))
    x = torch.from_numpy(rng.standard_normal(shape) * np.exp2(rng.uniform(-3, 3))).to(dtype)
    x = x + float(rng.standard_normal() * 3)
    if kind in ("group", "instance") and x.dim() == 4 and rng.integers(2):
        x = x.to(memory_format=torch.channels_last)
    dy = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    return module.train(bool(rng.integers(2))), x, dy


def exact(kind, module, x, dy):
    """Return the exact value and the bound of all that `step` returns, and of the buffers after."""
    if kind == "instance" and not module.training and module.track_running_stats:
        return expected(module, x, dy)
    axis = x.dim() - len(module.normalized_shape) if kind in ("layer", "rms") else 1
    groups = getattr(module, "num_groups", 0)
    case = Case(kind, tuple(x.shape), axis, groups, {"eps": module.eps})
    state = {name: t.detach().numpy() for name, t in module.state_dict(keep_vars=True).items()}
    x, dy = x.numpy(), dy.numpy()
    gamma = state.get("weight", np.ones(case.parameter_shape))
    y, limit = forward_bound(case, x, gamma, state.get("bias", np.zeros(case.parameter_shape)))
    gradients = zip(*backward_bound(case, dy, x, gamma), strict=False)
    wanted = dict(zip(("dx", "dgamma", "dbeta"), gradients, strict=False))
    for name, rows in (("y", (y, limit)), ("dx", wanted["dx"])):
        wanted[name] = tuple(back(case, v) for v in rows)
    if state.get("running_mean") is not None and module.training:
        wanted |= running(state, x, module.momentum)
    return wanted


def back(case, rows):
    """Return the rows of a case as an array of its shape."""
    a = np.empty(case.shape, rows.dtype)
    case.put(a, ..., rows)
    return a


def running(state, x, momentum):
    """Return the running mean and variance after one more step, and their bounds.

    Each sample has a mean and an unbiased variance, whose means over the samples count.
    """
    ulp = ULP32 if x.dtype == np.float32 else ULP64
    x, old_mean, old_var = wide(x, state["running_mean"], state["running_var"])
    inner = tuple(range(2, x.ndim))
    mean, var = x.mean(inner).mean(0), x.var(inner, ddof=1).mean(0)
    size = (1 - momentum) * np.abs(old_mean) + momentum * np.abs(x).mean((0, *inner))
    new_var = (1 - momentum) * old_var + momentum * var
    return {
        "running_mean": ((1 - momentum) * old_mean + momentum * mean, ulp * size),
        "running_var": (new_var, ulp * new_var),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_modules(kind, dtype, rng, kernel_calls):
    most = {}
    for _ in range(CONFIGURATIONS // 2):
        stock, x, dy = random_case(kind, rng, dtype)
        ours = twin(stock)
        wanted = exact(kind, ours, x, dy)
        got, theirs = step(ours, x, dy), step(stock, x, dy)
        assert got.keys() == theirs.keys()
        got, theirs = got | dict(ours.named_buffers()), theirs | dict(stock.named_buffers())
        for name, value in got.items():
            assert value.stride() == theirs[name].stride(), name
            assert value.dtype == theirs[name].dtype, name
            if name in wanted:
                most[name] = max(most.get(name, 0), worst(value.numpy(), *wanted[name]))
            else:  # a buffer that does not move
                assert torch.equal(value, theirs[name]), name
    print({name: f"{value:.2g}" for name, value in most.items()}, "of the bound")
    assert len(kernel_calls) == CONFIGURATIONS
    assert max(most.values()) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, rng):
    cases = iter(lambda: random_case(kind, rng, torch.float64), None)
    for module, x, _ in itertools.islice((c for c in cases if c[1].numel() <= 200), 4):
        ours = twin(module)
        inputs = [x.requires_grad_(), *ours.parameters()]
        assert torch.autograd.gradcheck(lambda *_, m=ours, t=x: m(t), inputs)
        assert torch.autograd.gradgradcheck(lambda *_, m=ours, t=x: m(t), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_half_types(kind, dtype, rng, kernel_calls):
    for parameters in (torch.float32, dtype):
        stock, x, dy = random_case(kind, rng, torch.float64)
        stock = stock.to(parameters)
        ours, wide = twin(stock), copy.deepcopy(stock).double()
        x, dy = x.to(dtype), dy.to(dtype)
        got, theirs = step(ours, x, dy), step(stock, x, dy)
        wanted = step(wide, x.double(), dy.double())
        for name in got:
            assert got[name].dtype == theirs[name].dtype
            scale = wanted[name].abs().max() + dy.abs().double().sum() * (name[0] == "d")
            off = (got[name].double() - wanted[name]).abs().max()
            assert off <= torch.finfo(dtype).eps * scale
    assert len(kernel_calls) == 4
