"""The other norms give PyTorch's results, running statistics and shapes."""

import numpy as np
import pytest
from bounds import worst
from family_cases import CASES, backward_bound, eps_of, every_dtype, forward_bound

import cybn

torch = pytest.importorskip("torch")

SAME_MEANING = 2.0**10  # largest error of PyTorch, in units of cybn's bound


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread, so that the thread pools of the two libraries do not wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with cybn.threads(1):
        yield
    torch.set_num_threads(before)


def by_torch(case, x, dy, gamma, beta):
    """Return y, dx, dgamma and dbeta as computed by PyTorch."""
    functions = torch.nn.functional
    tensors = [torch.tensor(np.ascontiguousarray(a)) for a in (x, gamma, beta)]
    tx, tg, tb = (t.requires_grad_() for t in tensors)
    first = tx if case.last_axes else tx.movedim(case.axis, 1)
    if case.member == "layer":
        y = functions.layer_norm(first, case.parameter_shape, tg, tb)
    elif case.member == "rms":
        y = functions.rms_norm(first, case.parameter_shape, tg)
    elif case.member == "group":
        y = functions.group_norm(first, case.groups, tg, tb)
    else:
        y = functions.instance_norm(first, weight=tg, bias=tb)
    y = y if case.last_axes else y.movedim(1, case.axis)
    y.backward(torch.tensor(dy))
    grads = [t.grad for t in (tx, tg, tb)]
    return [y.detach().numpy(), *(g.numpy() for g in grads if g is not None)]


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, dtype, rng):
    x, dy, gamma, beta = case.data(rng, dtype, offset=2.0)
    exact_y, bound_y = forward_bound(case, x, gamma, beta)
    exact, bounds = backward_bound(case, dy, x, gamma)
    got = case.everything(x, dy, gamma, beta)
    ours = [got[name] for name in ("y", "dx", "dgamma", "dbeta") if name in got]
    theirs = by_torch(case, x, dy, gamma, beta)
    names = ["y", "dx", "dgamma", "dbeta"][: len(ours)]
    for name, a, b, right, bound in zip(
        names, ours, theirs, [exact_y, *exact], [bound_y, *bounds], strict=False
    ):
        if name in ("y", "dx"):
            a, b = case.rows(a), case.rows(b)
        assert worst(a, right, bound) <= 1, name
        assert worst(b, right, bound) <= SAME_MEANING, name
    assert eps_of(case, x) in ({}, {"eps": torch.finfo(getattr(torch, x.dtype.name)).eps})


PAIRS = [
    ("LayerNorm", (5,), {}, (3, 4, 5)),
    ("LayerNorm", ((4, 5),), {"eps": 0.1}, (3, 4, 5)),
    ("LayerNorm", (5,), {"bias": False}, (3, 5)),
    ("LayerNorm", (5,), {"elementwise_affine": False}, (5,)),
    ("RMSNorm", (5,), {}, (3, 4, 5)),
    ("RMSNorm", ((4, 5),), {"eps": 1e-3}, (3, 4, 5)),
    ("RMSNorm", (5,), {"elementwise_affine": False}, (3, 5)),
    ("GroupNorm", (2, 6), {}, (3, 6, 4, 5)),
    ("GroupNorm", (3, 6), {"affine": False}, (3, 6)),
    ("GroupNorm", (6, 6), {"eps": 0.1}, (3, 6)),
    ("InstanceNorm1d", (4,), {}, (3, 4, 7)),
    ("InstanceNorm1d", (4,), {"affine": True}, (4, 7)),
    ("InstanceNorm1d", (4,), {"track_running_stats": True}, (3, 4, 7)),
    ("InstanceNorm2d", (4,), {"affine": True, "track_running_stats": True}, (3, 4, 5, 6)),
    ("InstanceNorm2d", (4,), {"momentum": 0.3, "track_running_stats": True}, (4, 5, 6)),
    ("InstanceNorm3d", (2,), {"affine": True, "track_running_stats": True}, (3, 2, 3, 4, 5)),
]


@pytest.mark.parametrize(("name", "arguments", "options", "shape"), PAIRS, ids=str)
def test_layers(name, arguments, options, shape, rng):
    """Outputs, gradients and running statistics agree in training steps and in eval mode."""
    ours = getattr(cybn, name)(*arguments, **options, dtype=np.float64)
    theirs = getattr(torch.nn, name)(*arguments, **options, dtype=torch.float64)
    weights = [theirs.weight, getattr(theirs, "bias", None)]
    for array, weight in zip(ours.parameters(), weights, strict=False):
        array[...] = rng.uniform(0.5, 2, array.shape)
        weight.data = torch.tensor(array)
    assert len(ours.parameters()) == sum(w is not None for w in weights)
    for step in range(4):
        training = step < 3
        ours.train(training), theirs.train(training)
        x, dy = rng.standard_normal((2, *shape)) + 1
        tx = torch.tensor(x, requires_grad=True)
        theirs.zero_grad()
        ty = theirs(tx)
        ty.backward(torch.tensor(dy))
        assert np.allclose(ours(x), ty.detach(), rtol=1e-10, atol=1e-12)
        assert np.allclose(ours.backward(dy), tx.grad, rtol=1e-9, atol=1e-11)
        for gradient, weight in zip(ours.gradients(), weights, strict=False):
            assert np.allclose(gradient, weight.grad, rtol=1e-9, atol=1e-11)
        if options.get("track_running_stats"):
            assert np.allclose(ours.running_mean, theirs.running_mean, rtol=1e-12)
            assert np.allclose(ours.running_var, theirs.running_var, rtol=1e-12)


def test_what_pytorch_refuses_is_refused():
    for call, theirs in (
        (
            lambda x: cybn.group_norm(x, num_groups=3),
            lambda x: torch.nn.functional.group_norm(x, 3),
        ),
        (cybn.instance_norm, torch.nn.functional.instance_norm),
    ):
        x = np.ones((1, 3, 1), np.float32)
        with pytest.raises(ValueError, match=r"one .* no variance"):
            call(x)
        with pytest.raises(ValueError, match="Expected more than 1"):
            theirs(torch.tensor(x))
