"""Random batch norms of PyTorch and their exact results, for the tests of cybn.torch."""

import copy

import numpy as np
import pytest
import torch
from bounds import ULP32, ULP64, forward_bound, wide
from layer_cases import gradient_bounds
from torch import nn

import cybn.torch
from cybn.torch import modules

STOCK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
OURS = {rank: modules.NORMS[stock] for rank, stock in STOCK.items()}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}

each_rank = pytest.mark.parametrize("rank", [2, 3, 4, 5])
each_memory = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def random_module(rng, rank, dtype):
    """Return a stock module with random options, parameters and statistics."""
    options = {
        "eps": float(rng.choice([1e-5, 1e-3, 0.1])),
        "momentum": rng.choice([None, 0.0, 0.1, 0.7, 1.0]),
        "affine": bool(rng.integers(4)),
        "track_running_stats": bool(rng.integers(4)),
    }
    bn = STOCK[rank](int(rng.integers(1, 33)), dtype=dtype, **options)
    if bn.affine and not rng.integers(4):
        bn.bias = None
    for tensor in (*bn.parameters(), *bn.buffers()):
        if tensor.is_floating_point():
            values = np.exp(rng.uniform(-1, 1, tensor.shape))
            tensor.data.copy_(torch.from_numpy(values))
    return bn.train(bool(rng.integers(2)))


def random_batch(rng, channels, rank, dtype, last=False):
    """Return x and dy of a random shape; the means of the channels are not zero and differ."""
    sizes = [int(n) for n in np.exp(rng.uniform(0, 3.5, rank - 1)).round()]
    while np.prod(sizes) < 2 or np.prod(sizes) * channels > 2**14:
        sizes = [max(2, n // 2) for n in sizes]
    shape = (sizes[0], channels, *sizes[1:])
    column = (1, channels) + (1,) * (rank - 2)
    x = rng.standard_normal(shape) * np.exp2(rng.uniform(-4, 4, column))
    x += rng.standard_normal(column) * np.exp2(rng.uniform(-4, 4, column))
    tensors = [torch.from_numpy(a).to(dtype) for a in (x, rng.standard_normal(shape))]
    if last and rank in FORMATS:
        tensors = [t.to(memory_format=FORMATS[rank]) for t in tensors]
    return tensors


def step(bn, x, dy):
    """Return the results of one forward and backward by name; gradients are cleared first."""
    x = x.clone().requires_grad_()
    bn.zero_grad()
    y = bn(x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    names = {"weight": "dgamma", "bias": "dbeta"}
    return found | {names[name]: p.grad for name, p in bn.named_parameters()}


def expected(bn, x, dy):
    """Return the exact value and the bound of each result of `step` and of each buffer after it."""
    n = {name: t.detach().numpy() for name, t in bn.state_dict(keep_vars=True).items()}
    x, dy = x.numpy(), dy.numpy()
    gamma, beta = n.get("weight"), n.get("bias")
    batch = bn.training or not bn.track_running_stats
    fixed = {} if batch else {"mean": n["running_mean"], "var": n["running_var"]}
    exact, bounds = gradient_bounds(dy, x, gamma, eps=bn.eps, **fixed)
    wanted = dict(zip(("dx", "dgamma", "dbeta"), zip(exact, bounds, strict=True), strict=True))
    wanted["y"] = forward_bound(x, gamma, beta, 1, bn.eps, **fixed)
    if bn.training and bn.track_running_stats:
        wanted |= running(n, x, bn.momentum)
    return wanted


def running(state, x, momentum):
    """Return the exact running mean and variance after one more step, and their bounds."""
    ulp = ULP32 if x.dtype == np.float32 else ULP64
    (wx,) = wide(x)
    others = tuple(i for i in range(x.ndim) if i != 1)
    mean, var = wx.mean(others), wx.var(others, ddof=1)
    weight = 1 / (int(state["num_batches_tracked"]) + 1) if momentum is None else momentum
    weight = np.longdouble(weight)
    old_mean, old_var = wide(state["running_mean"], state["running_var"])
    size = (1 - weight) * np.abs(old_mean) + weight * (np.abs(mean) + np.sqrt(var))
    new_var = (1 - weight) * old_var + weight * var
    return {
        "running_mean": ((1 - weight) * old_mean + weight * mean, ulp * size),
        "running_var": (new_var, ulp * new_var),
    }


def twin(module):
    """Return a converted copy of a module."""
    return cybn.torch.convert(copy.deepcopy(module))


def bn2d(channels=5, **options):
    torch.manual_seed(0)
    bn = cybn.torch.BatchNorm2d(channels, **options)
    for p in bn.parameters():
        nn.init.uniform_(p, 0.5, 2)
    return bn


def image(*shape, **options):
    return torch.randn(shape or (4, 5, 6, 7), generator=torch.Generator().manual_seed(1), **options)


def steps(t):
    """Return the strides of the axes that are longer than 1."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
