"""Layers of the other norms: construction, modes, state, running statistics, errors, pickle."""

import copy
import pickle
import threading

import numpy as np
import pytest

import cybn
from cybn import reference

MAKE = {
    "layer": (lambda **k: cybn.LayerNorm((6, 5), **k), (4, 6, 5)),
    "rms": (lambda **k: cybn.RMSNorm((6, 5), **k), (4, 6, 5)),
    "group": (lambda **k: cybn.GroupNorm(3, 6, **k), (4, 6, 5)),
    "instance 1d": (lambda **k: cybn.InstanceNorm1d(6, affine=True, **k), (4, 6, 5)),
    "instance 2d": (lambda **k: cybn.InstanceNorm2d(6, affine=True, **k), (4, 6, 5, 3)),
    "instance 3d": (lambda **k: cybn.InstanceNorm3d(6, affine=True, **k), (4, 6, 2, 5, 3)),
}
every_layer = pytest.mark.parametrize("name", MAKE)


@pytest.fixture
def case(name, rng):
    """Return a layer with random parameters, x and dy."""
    make, shape = MAKE[name]
    norm = make()
    for parameter in norm.parameters():
        parameter[...] = rng.uniform(0.5, 2, parameter.shape)
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    return norm, x, dy


def snapshot(norm):
    """Return the complete state of a layer, for comparing bits."""
    arrays = norm.parameters() + norm.gradients() + list(norm.state_dict().values())
    return repr(norm), norm.training, [(a.dtype.str, a.shape, a.tobytes()) for a in arrays]


# ---- results -----------------------------------------------------------------------------


def expected(norm, x, dy):
    """Return y and the gradients as computed by the functions."""
    if isinstance(norm, cybn.LayerNorm | cybn.RMSNorm):
        k = {"axis": -len(norm.normalized_shape), "eps": norm.eps}
        names = ["layer_norm" if isinstance(norm, cybn.LayerNorm) else "rms_norm"]
    elif isinstance(norm, cybn.GroupNorm):
        k, names = (
            {"num_groups": norm.num_groups, "axis": norm.axis, "eps": norm.eps},
            ["group_norm"],
        )
    else:
        k, names = {"axis": norm.axis, "eps": norm.eps}, ["instance_norm"]
    y, statistics = getattr(cybn, names[0])(x, *norm.parameters(), **k)
    return y, getattr(cybn, f"{names[0]}_backward")(dy, x, statistics, norm.gamma, **k)


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_its_function(case, training):
    norm, x, dy = case
    norm.train(training)
    y, gradients = expected(norm, x, dy)
    assert np.array_equal(norm(x), y)
    assert np.array_equal(norm.backward(dy), gradients[0])
    for got, value in zip(norm.gradients(), gradients[1:], strict=True):
        assert np.array_equal(got, value)


@every_layer
def test_out_and_threads(case):
    norm, x, dy = case
    y, out = norm(x), np.empty_like(x)
    assert norm(x, out=out, num_threads=1) is out
    assert np.array_equal(out, y)
    dx = norm.backward(dy)
    norm(x)
    assert norm.backward(dy, out=out, num_threads=1) is out
    assert np.array_equal(out, dx)


@every_layer
def test_parameters_and_gradients_are_live(case):
    norm, x, dy = case
    before = norm(x)
    norm.backward(dy)
    for p, g in zip(norm.parameters(), norm.gradients(), strict=True):
        assert p.shape == g.shape
        assert p.dtype == g.dtype
        p -= np.float32(0.1) * g
    assert not np.array_equal(norm(x), before)


def test_fresh_parameters():
    norm = cybn.LayerNorm((2, 3), dtype=np.float64)
    assert (norm.gamma == np.ones((2, 3))).all()
    assert (norm.beta == np.zeros((2, 3))).all()
    assert norm.gamma.dtype == norm.grad_beta.dtype == np.float64
    assert (norm.grad_gamma == 0).all()
    assert norm.training


def test_without_parameters():
    for norm in (
        cybn.LayerNorm(4, elementwise_affine=False),
        cybn.RMSNorm(4, elementwise_affine=False),
        cybn.GroupNorm(2, 4, affine=False),
        cybn.InstanceNorm1d(4),
    ):
        assert norm.parameters() == norm.gradients() == []
        assert norm.state_dict() == {}
        norm.load_state_dict({})
        assert norm.gamma is norm.beta is norm.grad_gamma is norm.grad_beta is None
        x = np.arange(48.0).reshape(3, 4, 4).astype(np.float32)
        norm(x)
        assert norm.backward(x).shape == x.shape
    norm = cybn.LayerNorm(4, bias=False)
    assert norm.beta is None
    assert list(norm.state_dict()) == ["gamma"]
    norm(x)
    norm.backward(x)
    assert len(norm.gradients()) == 1


def test_reprs():
    assert repr(cybn.LayerNorm(8)) == "LayerNorm((8,), eps=1e-05, elementwise_affine=True)"
    assert repr(cybn.LayerNorm((2, 8), bias=False, eps=0.1)) == (
        "LayerNorm((2, 8), eps=0.1, elementwise_affine=True, bias=False)"
    )
    assert repr(cybn.RMSNorm([8])) == "RMSNorm((8,), eps=None, elementwise_affine=True)"
    assert repr(cybn.GroupNorm(2, 8, dtype=np.float64)) == (
        "GroupNorm(2, 8, eps=1e-05, affine=True, dtype=float64)"
    )
    assert repr(cybn.GroupNorm(2, 8, axis=-1)).startswith("GroupNorm(2, 8, axis=-1, ")
    assert repr(cybn.InstanceNorm2d(8)) == (
        "InstanceNorm2d(8, eps=1e-05, momentum=0.1, affine=False, track_running_stats=False)"
    )


# ---- state -------------------------------------------------------------------------------


@every_layer
def test_state_round_trip(case):
    norm, x, dy = case
    norm(x)
    norm.backward(dy)
    fresh = MAKE_BY_TYPE[type(norm)]()
    fresh.load_state_dict(norm.state_dict())
    assert np.array_equal(fresh(x), norm(x))
    state = norm.state_dict()
    state["gamma"][...] = 0
    assert not (norm.gamma == 0).any()


MAKE_BY_TYPE = {type(make()): make for make, _ in MAKE.values()}


@every_layer
def test_pickle_and_copy(case):
    norm, x, dy = case
    norm(x)
    for twin in (pickle.loads(pickle.dumps(norm)), copy.deepcopy(norm)):
        assert snapshot(twin) == snapshot(norm)
        with pytest.raises(RuntimeError, match="call forward before backward"):
            twin.backward(dy)
        assert np.array_equal(twin(x), norm(x))
        twin.gamma[...] = 0
        assert not (norm.gamma == 0).any()


@every_layer
def test_a_state_that_does_not_fit_changes_nothing(case):
    norm, _, _ = case
    before = snapshot(norm)
    good = norm.state_dict()
    for bad, error, text in (
        ({}, ValueError, "missing"),
        (good | {"more": 1}, ValueError, "unexpected"),
        (good | {"gamma": np.ones(7)}, ValueError, "gamma has shape"),
        (good | {"gamma": np.ones(norm.gamma.shape, int)}, ValueError, "gamma is int64"),
        ([], TypeError, "must be a dict"),
    ):
        with pytest.raises(error, match=text):
            norm.load_state_dict(bad)
        assert snapshot(norm) == before


# ---- errors ------------------------------------------------------------------------------


@every_layer
def test_backward_needs_a_forward_of_its_own(case):
    norm, x, dy = case
    with pytest.raises(RuntimeError, match="call forward before backward"):
        norm.backward(dy)
    norm(x)
    norm.backward(dy)
    with pytest.raises(RuntimeError, match="call forward before backward"):
        norm.backward(dy)
    norm(x, out=x)
    with pytest.raises(RuntimeError, match="over its input"):
        norm.backward(dy)


@every_layer
def test_a_failed_backward_changes_nothing(case):
    norm, x, dy = case
    norm(x)
    before = snapshot(norm)
    with pytest.raises(ValueError, match="dy has shape"):
        norm.backward(dy[:2])
    with pytest.raises(ValueError, match="grad_gamma is None; it must be a float array"):
        norm.grad_gamma = None
    norm.grad_beta = None if norm.grad_beta is None else norm.grad_beta
    norm.grad_gamma.setflags(write=False)
    with pytest.raises(ValueError, match="grad_gamma of this layer"):
        norm.backward(dy)
    norm.grad_gamma.setflags(write=True)
    assert snapshot(norm) == before
    norm.backward(dy)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: cybn.LayerNorm(0), ValueError, "at least 1"),
        (lambda: cybn.LayerNorm(()), ValueError, "normalized_shape is empty"),
        (lambda: cybn.LayerNorm("ab"), TypeError, "normalized_shape is 'ab'"),
        (lambda: cybn.LayerNorm(None), TypeError, "normalized_shape is None"),
        (lambda: cybn.LayerNorm(4.0), TypeError, "normalized_shape is 4.0"),
        (lambda: cybn.LayerNorm(4, eps=0), ValueError, "eps is 0"),
        (lambda: cybn.LayerNorm(4, eps="x"), TypeError, "eps is 'x'"),
        (lambda: cybn.LayerNorm(4, dtype=int), TypeError, "dtype is int64"),
        (lambda: cybn.RMSNorm(4, eps=-1.0), ValueError, "eps is -1"),
        (lambda: cybn.GroupNorm(4, 6), ValueError, "multiple of num_groups, 4"),
        (lambda: cybn.GroupNorm(0, 6), ValueError, "num_groups is 0"),
        (lambda: cybn.GroupNorm(2, 6.0), TypeError, "num_channels is 6.0"),
        (lambda: cybn.GroupNorm(2, 6, axis=None), TypeError, "axis is None"),
        (lambda: cybn.InstanceNorm1d(0), ValueError, "num_features is 0"),
        (lambda: cybn.InstanceNorm1d(2, momentum=2), ValueError, "momentum is 2"),
        (lambda: cybn.LayerNorm(4)(np.ones((4, 5))), ValueError, "last axes must have the shape"),
        (lambda: cybn.LayerNorm((4, 5))(np.ones(5)), ValueError, "last axes must have the shape"),
        (lambda: cybn.GroupNorm(2, 4)(np.ones((4, 5, 4))), ValueError, "num_channels=4"),
        (lambda: cybn.GroupNorm(2, 4)(np.ones(4)), ValueError, "at least 2 axes"),
        (lambda: cybn.InstanceNorm2d(4)(np.ones((4, 5))), ValueError, "takes 4 axes"),
        (lambda: cybn.InstanceNorm1d(4)(np.ones((2, 5, 3))), ValueError, "num_features=4"),
        (lambda: cybn.InstanceNorm1d(4)(np.ones((2, 4, 1))), ValueError, "no variance"),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()


# ---- instance normalization with running statistics --------------------------------------


@pytest.mark.row(10)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("axis", [1, -1])
def test_running_statistics(momentum, ddof, axis, rng):
    """They move towards the averages over the samples of each sample's mean and variance."""
    norm = cybn.InstanceNorm1d(
        3,
        axis=axis,
        momentum=momentum,
        track_running_stats=True,
        running_ddof=ddof,
        dtype=np.float64,
    )
    mean, var = np.zeros(3), np.ones(3)
    for step in range(1, 6):
        x = rng.standard_normal((4, 3, 7)) * 3 + 2
        norm(np.ascontiguousarray(np.moveaxis(x, 1, axis)))
        weight = 1 / step if momentum is None else momentum
        mean = (1 - weight) * mean + weight * x.mean(2).mean(0)
        var = (1 - weight) * var + weight * x.var(2, ddof=ddof).mean(0)
        assert np.allclose(norm.running_mean, mean, rtol=1e-12)
        assert np.allclose(norm.running_var, var, rtol=1e-12)
        assert norm.num_batches_tracked == step
    norm.eval()
    y = norm(np.moveaxis(x, 1, axis))
    exact = reference.batch_norm_inference(x, mean, var)
    assert np.allclose(np.moveaxis(y, axis, 1), exact, rtol=1e-12)
    assert norm.num_batches_tracked == 5


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    ("make", "shape", "axis"),
    [
        (cybn.InstanceNorm1d, (3, 7), 1),
        (cybn.InstanceNorm2d, (3, 4, 5), 1),
        (cybn.InstanceNorm3d, (3, 2, 4, 5), 1),
        (cybn.InstanceNorm2d, (4, 5, 3), -1),
    ],
)
def test_one_sample_alone_is_a_batch_of_one(make, shape, axis, mode, rng):
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    alone, batch = (
        make(3, axis=axis, affine=True, track_running_stats=True).train(mode) for _ in (0, 1)
    )
    out = np.empty_like(x)
    assert np.array_equal(alone(x, out=out), batch(x[np.newaxis])[0])
    assert np.array_equal(alone.backward(dy), batch.backward(dy[np.newaxis])[0])
    assert snapshot(alone) == snapshot(batch)
    assert np.array_equal(alone(x), batch(x[np.newaxis])[0])
    assert alone.backward(dy, out=out) is out
    assert np.array_equal(out, batch.backward(dy[np.newaxis])[0])


def test_no_samples_do_not_move_running_statistics():
    norm = cybn.InstanceNorm1d(3, track_running_stats=True)
    before = snapshot(norm)
    with pytest.raises(ValueError, match="no samples"):
        norm(np.empty((0, 3, 5), np.float32))
    assert snapshot(norm) == before
    assert cybn.InstanceNorm1d(3)(np.empty((0, 3, 5), np.float32)).shape == (0, 3, 5)


@pytest.mark.row(27)
def test_threads_share_a_layer(rng):
    """Updates of running statistics are serialized, so none is lost."""
    norm = cybn.InstanceNorm1d(3, track_running_stats=True, momentum=None)
    x = rng.standard_normal((2, 3, 40)).astype(np.float32)
    workers = [
        threading.Thread(target=lambda: [norm(x, num_threads=1) for _ in range(50)])
        for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert norm.num_batches_tracked == 400
