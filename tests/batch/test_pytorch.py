"""PyTorch gives the same results, and cybn's errors are never larger than PyTorch's.

Both get the same arrays. Each error is measured against the exact value in long double, as a
fraction of cybn's own bound for that quantity; the largest of all cases counts. Both libraries
compute the sums dgamma and dbeta to about one rounding. Which of them is closer depends on the
data, so one rounding is allowed there. For the other quantities nothing is allowed.
"""

import numpy as np
import pytest
from bounds import ULP32, ULP64, forward_bound, wide, worst
from layer_cases import gradient_bounds

import cybn

torch = pytest.importorskip("torch")

CASES = 200
MOST = 2**17  # elements of the largest shapes
MOMENTUM, EPS = 0.1, 1e-5
SAME_MEANING = 2.0**10  # largest error of PyTorch, in units of cybn's bound

each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])
each_memory = pytest.mark.parametrize("memory", ["channels-first", "channels-last"])


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread, so that the thread pools of the two libraries do not wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with cybn.threads(1):
        yield
    torch.set_num_threads(before)


def random_shape(rng, rank):
    """Return sizes whose logarithms are uniform, with at least two values in each channel."""
    most = {2: (2000, 60), 3: (24, 40, 200), 4: (16, 40, 30, 30), 5: (6, 24, 10, 12, 12)}[rank]
    while True:
        shape = tuple(int(size) for size in np.exp(rng.uniform(0, np.log(np.add(most, 1)))))
        if np.prod(shape) // shape[1] >= 2 and np.prod(shape) <= MOST:
            return shape


def laid(x, memory):
    """Return `x`, channels-first in shape, with its memory in the given order."""
    if memory == "channels-first":
        return np.ascontiguousarray(x)
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def random_case(rng, rank, dtype, memory):
    """Return x, dy and a dict of parameters and running statistics, some channels off zero."""
    shape = random_shape(rng, rank)
    c = shape[1]
    column = (1, c) + (1,) * (rank - 2)
    x = rng.standard_normal(shape) * np.exp2(rng.uniform(-4, 4, column))
    x += rng.standard_normal(column) * np.exp2(rng.uniform(-4, 4, column))
    state = {
        "gamma": rng.uniform(-2, 2, c),
        "beta": rng.standard_normal(c),
        "running_mean": rng.standard_normal(c),
        "running_var": rng.uniform(0.2, 4, c),
    }
    dy = rng.standard_normal(shape)
    x, dy = (laid(a.astype(dtype), memory) for a in (x, dy))
    return x, dy, {name: value.astype(dtype) for name, value in state.items()}


def ours(x, dy, state, training):
    """Return the results of a cybn layer for a case, by quantity."""
    bn = cybn.BatchNorm(x.shape[1], eps=EPS, momentum=MOMENTUM, dtype=x.dtype).train(training)
    bn.load_state_dict(state | {"num_batches_tracked": 0})
    result = {"y": bn(x), "dx": bn.backward(dy)}
    return result | {
        "dgamma": bn.grad_gamma,
        "dbeta": bn.grad_beta,
        "running mean": bn.running_mean,
        "running var": bn.running_var,
    }


def theirs(x, dy, state, training):
    """Return the results of PyTorch for a case, by quantity."""
    tensors = {name: torch.from_numpy(value.copy()) for name, value in state.items()}
    mean, var = tensors["running_mean"], tensors["running_var"]
    inputs = [torch.from_numpy(x), tensors["gamma"], tensors["beta"]]
    for tensor in inputs:
        tensor.requires_grad_()
    tx, gamma, beta = inputs
    y = torch.nn.functional.batch_norm(tx, mean, var, gamma, beta, training, MOMENTUM, EPS)
    gradients = torch.autograd.grad(y, inputs, torch.from_numpy(dy))
    names = ("y", "dx", "dgamma", "dbeta", "running mean", "running var")
    results = (y.detach(), *gradients, mean, var)
    return {name: result.numpy() for name, result in zip(names, results, strict=True)}


def running_bounds(x, state):
    """Return the exact running mean and variance after one step, and their bounds.

    They are ulp * (0.9 * |running| + 0.1 * (|mean| + std)), and the same with the variances.
    """
    ulp = ULP32 if x.dtype == np.float32 else ULP64
    (wx,) = wide(x)
    others = tuple(i for i in range(x.ndim) if i != 1)
    mean, var = wx.mean(others), wx.var(others, ddof=1)
    old_mean, old_var = wide(state["running_mean"], state["running_var"])
    keep, m = 1 - np.longdouble(MOMENTUM), np.longdouble(MOMENTUM)
    size = keep * np.abs(old_mean) + m * (np.abs(mean) + np.sqrt(var))
    new_var = keep * old_var + m * var
    return {
        "running mean": (keep * old_mean + m * mean, ulp * size),
        "running var": (new_var, ulp * new_var),
    }


def bounds_of(x, dy, state, training):
    """Return the exact value and the bound of each quantity."""
    fixed = {} if training else {"mean": state["running_mean"], "var": state["running_var"]}
    gamma, beta = state["gamma"], state["beta"]
    exact, bounds = gradient_bounds(dy, x, gamma, eps=EPS, **fixed)
    gradients = zip(("dx", "dgamma", "dbeta"), zip(exact, bounds, strict=True), strict=True)
    y = forward_bound(x, gamma, beta, 1, EPS, **fixed)
    return {"y": y, **dict(gradients)} | (running_bounds(x, state) if training else {})


@each_dtype
def test_random_shapes(dtype, rng):
    errors = {}
    for i in range(CASES):
        memory = "channels-last" if i // 4 % 2 else "channels-first"
        x, dy, state = random_case(rng, 2 + i % 4, dtype, memory)
        for training in (True, False):
            case = x, dy, state, training
            a, b = ours(*case), theirs(*case)
            for name, (exact, bound) in bounds_of(*case).items():
                both = worst(a[name], exact, bound), worst(b[name], exact, bound)
                errors[name] = np.maximum(errors.get(name, 0), both)
    for name, (own, other) in errors.items():
        print(f"{name:12} cybn {own:9.3g}   PyTorch {other:9.3g}   of the bound")
    # One rounding, in units of the bound.
    rounding = np.finfo(dtype).eps / 2 / (ULP32 if dtype == np.float32 else ULP64)
    for name, (own, other) in errors.items():
        assert own <= 1, name
        assert own <= other + (rounding if name in ("dgamma", "dbeta") else 0), name
        assert other <= SAME_MEANING, name


@each_memory
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_far_from_zero(offset, memory, rng):
    """For float32 with a mean of many standard deviations, a * x + b loses digits."""
    x = laid((rng.standard_normal((32, 16, 14, 14)) + offset).astype(np.float32), memory)
    state = {
        "gamma": np.ones(16, np.float32),
        "beta": np.zeros(16, np.float32),
        "running_mean": np.zeros(16, np.float32),
        "running_var": np.ones(16, np.float32),
    }
    exact, bound = forward_bound(x, state["gamma"], state["beta"], 1, EPS)
    a, b = (f(x, x, state, True)["y"] for f in (ours, theirs))
    own, other = (float(np.abs(y - exact).max()) for y in (a, b))
    print(f"offset {offset:g} {memory}: error of y, cybn {own:.2g}, PyTorch {other:.2g}")
    assert worst(a, exact, bound) <= 1
    assert worst(b, exact, bound) > 1
