"""Layer, RMS, group and instance norms of PyTorch: random modules against exact values."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_cases import step, twin  # noqa: E402

from cybn import reference  # noqa: E402

CONFIGURATIONS = 200
# Four times the bound of docs/math.md for these norms, relative to the sizes in the test below.
ULPS = {torch.float32: 2.0**-19, torch.float64: 2.0**-46}
KINDS = ["layer", "rms", "group", "instance"]


def random_case(kind, rng, dtype):
    """Return a module with random options, and x and dy for it."""
    sizes = [int(n) for n in rng.integers(1, 9, size=rng.integers(1, 4))]
    batch, channels = int(rng.integers(1, 6)), int(rng.integers(1, 5)) * 4
    eps = float(rng.choice([1e-5, 1e-3, 0.1]))
    if kind in ("layer", "rms"):
        shape = (batch, channels, *sizes)
        normalized = shape[int(rng.integers(1, len(shape))) :]
        module = (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(
            normalized, eps=eps, elementwise_affine=bool(rng.integers(4)), dtype=dtype
        )
        if kind == "layer" and np.prod(normalized) == 1:
            return random_case(kind, rng, dtype)
    elif kind == "group":
        shape = (batch, channels, *sizes)
        groups = int(rng.choice([1, 2, 4, channels]))
        module = nn.GroupNorm(groups, channels, eps=eps, affine=bool(rng.integers(4)), dtype=dtype)
        if channels // groups * np.prod(sizes) == 1:
            return random_case(kind, rng, dtype)
    else:
        shape = (batch, channels, *sizes)
        if np.prod(sizes) == 1:
            return random_case(kind, rng, dtype)
        cls = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[len(sizes) - 1]
        options = {"affine": bool(rng.integers(4)), "track_running_stats": bool(rng.integers(2))}
        module = cls(channels, eps=eps, dtype=dtype, **options)
    for p in module.parameters():
        nn.init.uniform_(p, 0.5, 2)
    x = torch.from_numpy(rng.standard_normal(shape) * np.exp2(rng.uniform(-3, 3))).to(dtype)
    x = x + float(rng.standard_normal() * 3)
    if kind in ("group", "instance") and x.dim() == 4 and rng.integers(2):
        x = x.to(memory_format=torch.channels_last)
    return module, x, torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def exact(kind, module, x, dy):
    """Return y, dx, dgamma and dbeta by name, as computed by the reference in float64."""
    wide = [t.detach().double().numpy() for t in (x, dy)]
    parameters = dict(module.named_parameters())
    gamma, beta = (
        parameters[name].detach().double().numpy() if name in parameters else None
        for name in ("weight", "bias")
    )
    x, dy = wide
    if kind in ("layer", "rms"):
        axis = x.ndim - len(module.normalized_shape)
        forward, backward = (
            (reference.layer_norm, reference.layer_norm_backward)
            if kind == "layer"
            else (reference.rms_norm, reference.rms_norm_backward)
        )
        options = {"axis": axis, "eps": module.eps}
    elif kind == "group":
        forward, backward = reference.group_norm, reference.group_norm_backward
        options = {"num_groups": module.num_groups, "eps": module.eps}
    else:
        forward, backward = reference.instance_norm, reference.instance_norm_backward
        options = {"eps": module.eps}
    shifts = () if kind == "rms" else (beta,)
    y, statistics = forward(x, gamma, *shifts, **options)
    dx, dgamma, *dbeta = backward(dy, x, statistics, gamma, **options)
    return dict(zip(("y", "dx", "dgamma", "dbeta"), (y, dx, dgamma, *dbeta), strict=False))


@pytest.mark.parametrize("dtype", list(ULPS), ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_modules(kind, dtype, rng, kernel_calls):
    most = {}
    for _ in range(CONFIGURATIONS // 2):
        stock, x, dy = random_case(kind, rng, dtype)
        ours = twin(stock)
        got, theirs = step(ours, x, dy), step(stock, x, dy)
        wanted = exact(kind, stock, x, dy)
        assert got.keys() == theirs.keys()
        for name, value in got.items():
            assert value.stride() == theirs[name].stride(), name
            assert value.dtype == theirs[name].dtype, name
            off = np.abs(value.double().numpy() - wanted[name]).max()
            size = np.abs(wanted[name]).max() + np.abs(dy.numpy()).sum() * (name[0] == "d")
            size += np.abs(x.numpy()).max() / max(float(x.std(correction=0)), 1e-3)
            most[name] = max(most.get(name, 0), off / (ULPS[dtype] * (size + 1)))
        for a, b in zip(ours.buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    print({name: f"{value:.2g}" for name, value in most.items()}, "of the bound")
    assert len(kernel_calls) == CONFIGURATIONS
    assert max(most.values()) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, rng):
    for _ in range(4):
        module, x, _ = random_case(kind, rng, torch.float64)
        x = x.flatten()[: 4 * 2 * 6].reshape(-1) if x.numel() > 200 else x
        if x.dim() == 1:
            continue
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
