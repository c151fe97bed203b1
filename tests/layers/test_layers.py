"""The layers: modes, gradients, parameters, copies, and references that they keep."""

import copy
import pickle
import weakref

import numpy as np
import pytest
from bounds import forward_bound, worst
from layer_cases import gradient_bounds, snapshot

import cybn
from cybn import functional

pytestmark = pytest.mark.divided

C = 5
LAYERS = [
    (cybn.BatchNorm, (7, C)),
    (cybn.BatchNorm, (2, C, 2, 1, 2, 3)),
    (cybn.BatchNorm1d, (6, C)),
    (cybn.BatchNorm1d, (4, C, 7)),
    (cybn.BatchNorm2d, (3, C, 4, 6)),
    (cybn.BatchNorm3d, (2, C, 3, 4, 2)),
]
each_layer = pytest.mark.parametrize(
    ("make", "shape"), LAYERS, ids=[f"{make.__name__}-{len(shape)}d" for make, shape in LAYERS]
)
each_axis = pytest.mark.parametrize("axis", [1, -1], ids=["channels-first", "channels-last"])
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def normal(rng, shape, dtype=np.float32, axis=1):
    """Return a batch whose C channels differ in mean and spread, with channels on `axis`."""
    x = rng.standard_normal((*shape[:1], *shape[2:], C)) * np.arange(1, C + 1) + np.arange(C)
    return np.ascontiguousarray(np.moveaxis(x.astype(dtype), -1, axis))


def trained(make, rng, dtype=np.float32, **options):
    """Return a layer whose parameters and running statistics are not those of a new one."""
    bn = make(C, dtype=dtype, **options)
    if bn.affine:
        bn.gamma[:] = rng.uniform(-2, 2, C)
        bn.beta[:] = rng.standard_normal(C)
    if bn.track_running_stats:
        bn.running_mean = rng.standard_normal(C)
        bn.running_var = rng.uniform(0.5, 2, C)
        bn.num_batches_tracked = 3
    return bn


def check_backward(bn, x, dy, mean=None, var=None):
    """Compare backward with the exact gradients, through the batch or through (mean, var)."""
    exact, bounds = gradient_bounds(dy, x, bn.gamma, bn.axis, bn.eps, mean, var)
    dx = bn.backward(dy)
    assert dx.dtype == x.dtype
    assert dx.strides == x.strides
    for got, want, bound in zip((dx, *bn.gradients()), exact, bounds, strict=False):
        assert worst(got, want, bound) <= 1


# ---- forward and backward ----------------------------------------------------------------


@each_dtype
@each_axis
@each_layer
def test_training(make, shape, axis, dtype, level, rng):
    x, bn = normal(rng, shape, dtype, axis), trained(make, rng, dtype, axis=axis)
    dy = rng.standard_normal(x.shape).astype(dtype)
    y = bn(x)
    assert y.dtype == dtype
    assert worst(y, *forward_bound(x, bn.gamma, bn.beta, axis)) <= 1
    check_backward(bn, x, dy)


@each_dtype
@each_axis
@each_layer
def test_eval(make, shape, axis, dtype, level, rng):
    x, bn = normal(rng, shape, dtype, axis), trained(make, rng, dtype, axis=axis).eval()
    dy = rng.standard_normal(x.shape).astype(dtype)
    mean, var, before = bn.running_mean, bn.running_var, snapshot(bn)
    y = bn(x)
    assert worst(y, *forward_bound(x, bn.gamma, bn.beta, axis, mean=mean, var=var)) <= 1
    assert snapshot(bn) == before
    check_backward(bn, x, dy, mean, var)


@each_axis
def test_no_arithmetic_of_its_own(axis, rng):
    x, bn = normal(rng, (4, C, 6), axis=axis), trained(cybn.BatchNorm, rng, axis=axis)
    dy = normal(rng, (4, C, 6), axis=axis)
    options = {"axis": axis, "eps": bn.eps}
    y, batch = functional.batch_norm(x, bn.gamma, bn.beta, **options)
    dx, dgamma, dbeta = functional.batch_norm_backward(dy, x, batch, bn.gamma, **options)
    np.testing.assert_array_equal(bn(x), y)
    np.testing.assert_array_equal(bn.backward(dy), dx)
    np.testing.assert_array_equal(bn.gradients(), [dgamma, dbeta])


def test_backward_belongs_to_the_mode_of_its_forward(rng):
    x, dy = normal(rng, (9, C)), normal(rng, (9, C))
    bn = trained(cybn.BatchNorm, rng)
    bn.train()(x)
    bn.eval()
    check_backward(bn, x, dy)
    bn(x)
    bn.train()
    check_backward(bn, x, dy, bn.running_mean, bn.running_var)


def test_eval_backward_uses_the_statistics_of_its_forward(rng):
    x, dy = normal(rng, (9, C)), normal(rng, (9, C))
    bn = trained(cybn.BatchNorm, rng).eval()
    bn(x)
    mean, var = bn.running_mean, bn.running_var
    bn.running_mean, bn.running_var = mean + 1, var + 1
    check_backward(bn, x, dy, mean, var)


@pytest.mark.parametrize("training", [True, False])
def test_without_parameters(training, rng):
    x, dy = normal(rng, (9, C)), normal(rng, (9, C))
    bn = trained(cybn.BatchNorm, rng, affine=False).train(training)
    fixed = {} if training else {"mean": bn.running_mean, "var": bn.running_var}
    assert bn.parameters() == bn.gradients() == []
    assert bn.gamma is bn.beta is bn.grad_gamma is bn.grad_beta is None
    assert worst(bn(x), *forward_bound(x, None, None, 1, **fixed)) <= 1
    check_backward(bn, x, dy, **fixed)
    assert set(bn.state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("training", [True, False])
def test_without_running_statistics(training, rng):
    x, dy = normal(rng, (9, C)), normal(rng, (9, C))
    bn = trained(cybn.BatchNorm, rng, track_running_stats=False).train(training)
    assert worst(bn(x), *forward_bound(x, bn.gamma, bn.beta, 1)) <= 1  # also in eval mode
    check_backward(bn, x, dy)
    assert bn.running_mean is bn.running_var is bn.num_batches_tracked is None
    assert set(bn.state_dict()) == {"gamma", "beta"}
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        with pytest.raises(AttributeError, match=f"{name}.*track_running_stats"):
            setattr(bn, name, 1)


@pytest.mark.parametrize("training", [True, False])
def test_other_float_type_than_the_layer(training, rng):
    x, bn = normal(rng, (9, C), np.float64), trained(cybn.BatchNorm, rng).train(training)
    fixed = {} if training else {"mean": bn.running_mean, "var": bn.running_var}
    y = bn(x)
    assert y.dtype == np.float64
    assert worst(y, *forward_bound(x, bn.gamma, bn.beta, 1, **fixed)) <= 1
    assert bn.backward(y).dtype == np.float64
    assert {a.dtype for a in (*bn.gradients(), bn.running_mean)} == {np.dtype(np.float32)}


def test_a_list_is_an_array_of_float64():
    y = cybn.BatchNorm(1, eps=1e-12)([[1.0], [3.0]])
    assert y.dtype == np.float64
    np.testing.assert_array_equal(np.sign(y), [[-1], [1]])


@pytest.mark.parametrize("training", [True, False])
def test_out(training, rng):
    x, dy = normal(rng, (9, C)), normal(rng, (9, C))
    bn = trained(cybn.BatchNorm, rng).train(training)
    twin, y, dx = copy.deepcopy(bn), np.empty_like(x), np.empty_like(x)
    assert bn(x, out=y) is y
    assert bn.backward(dy, out=dx) is dx
    np.testing.assert_array_equal(y, twin(x))
    np.testing.assert_array_equal(dx, twin.backward(dy))
    twin(x)
    assert twin.backward(dy, out=dy) is dy
    np.testing.assert_array_equal(dx, dy)
    assert bn(x, out=x) is x
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("training", [True, False])
def test_threads_do_not_change_a_bit(training, rng):
    x, dy = normal(rng, (40, C, 300)), normal(rng, (40, C, 300))
    bn = trained(cybn.BatchNorm1d, rng).train(training)
    twin = copy.deepcopy(bn)
    np.testing.assert_array_equal(bn(x, num_threads=1), twin.forward(x, num_threads=3))
    np.testing.assert_array_equal(bn.backward(dy, num_threads=3), twin.backward(dy, num_threads=1))
    assert snapshot(bn) == snapshot(twin)


# ---- valid input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "ranks", "needs"),
    [
        (cybn.BatchNorm1d, (1, 4), r"\(N, C\) or 3 axes, \(N, C, L\)"),
        (cybn.BatchNorm2d, (2, 3, 5), r"4 axes, \(N, C, H, W\)"),
        (cybn.BatchNorm3d, (4, 6), r"5 axes, \(N, C, D, H, W\)"),
        (cybn.BatchNorm, (0, 1), "at least 2 axes"),
    ],
)
def test_wrong_rank(make, ranks, needs):
    for rank in ranks:
        bn, x = make(C), np.zeros((C,) * rank, np.float32)
        with pytest.raises(ValueError, match=f"x has shape .*{needs}"):
            bn(x)


@each_layer
def test_wrong_number_of_channels(make, shape, rng):
    bn = make(C + 1)
    before = snapshot(bn)
    for mode in (bn.train, bn.eval):
        with pytest.raises(ValueError, match=r"5 channels on axis 1.* has num_features=6"):
            mode()(normal(rng, shape))
    bn.train()
    assert snapshot(bn) == before


def test_axis_outside_the_array():
    with pytest.raises(ValueError, match=r"axis is 3; x has 2 axes"):
        cybn.BatchNorm(C, axis=3)(np.zeros((C, C)))


def test_mode():
    bn = cybn.BatchNorm(C)
    assert bn.training is True
    assert bn.eval() is bn
    assert bn.training is False
    assert bn.train() is bn
    assert bn.training is True
    assert bn.train(False) is bn
    assert bn.training is False


# ---- parameters --------------------------------------------------------------------------


def test_new_layer():
    bn = cybn.BatchNorm2d(C)
    np.testing.assert_array_equal(bn.parameters(), [np.ones(C), np.zeros(C)])
    np.testing.assert_array_equal(bn.gradients(), np.zeros((2, C)))
    np.testing.assert_array_equal([bn.running_mean, bn.running_var], [np.zeros(C), np.ones(C)])
    assert bn.num_batches_tracked == 0
    assert {a.dtype for a in bn.parameters() + bn.gradients()} == {np.dtype(np.float32)}


def test_parameters_and_gradients_are_the_arrays_themselves(rng):
    x, bn = normal(rng, (9, C)), cybn.BatchNorm(C)
    gamma, beta = bn.parameters()
    grad_gamma, grad_beta = bn.gradients()
    y = bn(x)
    bn.backward(y)
    assert grad_gamma.all()
    assert gamma is bn.gamma
    assert beta is bn.beta
    assert grad_gamma is bn.grad_gamma
    assert grad_beta is bn.grad_beta
    gamma *= 0
    beta += 7
    np.testing.assert_array_equal(bn(x), np.full_like(x, 7))


def test_gradients_are_overwritten_not_added_to(rng):
    x, dy, bn = normal(rng, (9, C)), normal(rng, (9, C)), cybn.BatchNorm(C)
    for _ in range(2):
        bn(x)
        bn.backward(dy)
    once = cybn.BatchNorm(C)
    once(x)
    once.backward(dy)
    np.testing.assert_array_equal(bn.gradients(), once.gradients())


@each_dtype
def test_setting_running_statistics(dtype):
    bn, mean, var = cybn.BatchNorm(C, dtype=dtype), np.arange(C) / 3, np.arange(C) + 1.0
    bn.running_mean, bn.running_var, bn.num_batches_tracked = mean, var, np.int64(4)
    np.testing.assert_array_equal(bn.running_mean, mean.astype(dtype))
    np.testing.assert_array_equal(bn.running_var, var.astype(dtype))
    assert bn.running_mean.dtype == bn.running_var.dtype == dtype
    assert bn.num_batches_tracked == 4
    mean[:] = 9  # the layer must have copied it
    assert not np.any(bn.running_mean == 9)
    before = snapshot(bn)
    for name, bad in [
        ("running_mean", np.zeros(C + 1)),
        ("running_var", 1.0),
        ("running_var", np.ones(C, int)),
        ("num_batches_tracked", -1),
        ("num_batches_tracked", 1.5),
    ]:
        with pytest.raises(ValueError, match=name):
            setattr(bn, name, bad)
    assert snapshot(bn) == before


def test_reset_running_stats(rng):
    bn = trained(cybn.BatchNorm, rng)
    bn.reset_running_stats()
    np.testing.assert_array_equal([bn.running_mean, bn.running_var], [np.zeros(C), np.ones(C)])
    assert bn.num_batches_tracked == 0


# ---- repr and copies ---------------------------------------------------------------------


def test_repr():
    text = "BatchNorm2d(64, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)"
    assert repr(cybn.BatchNorm2d(64)) == text
    bn = cybn.BatchNorm(3, axis=-1, momentum=None, affine=False, running_ddof=0, dtype=float)
    assert repr(bn) == (
        "BatchNorm(3, axis=-1, eps=1e-05, momentum=None, affine=False, "
        "track_running_stats=True, running_ddof=0, dtype=float64)"
    )
    assert repr(eval(repr(bn), vars(cybn) | {"float64": np.float64})) == repr(bn)


@each_dtype
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_go_on_alike(duplicate, mode, dtype, rng):
    x, dy = normal(rng, (9, C), dtype), normal(rng, (9, C), dtype)
    bn = getattr(trained(cybn.BatchNorm1d, rng, dtype), mode)()
    twin = duplicate(bn)
    assert type(twin) is type(bn)
    assert snapshot(twin) == snapshot(bn)
    np.testing.assert_array_equal(twin(x), bn(x))
    np.testing.assert_array_equal(twin.backward(dy), bn.backward(dy))
    assert snapshot(twin) == snapshot(bn)


def test_copies_do_not_hold_the_input(rng):
    x, bn = normal(rng, (9, C)), cybn.BatchNorm(C)
    y = bn(x)
    assert len(pickle.dumps(bn)) == len(pickle.dumps(cybn.BatchNorm(C)))
    for twin in (copy.copy(bn), copy.deepcopy(bn)):
        with pytest.raises(RuntimeError, match="call forward before backward"):
            twin.backward(y)
    bn.backward(y)


def test_a_deep_copy_is_separate(rng):
    x, bn = normal(rng, (9, C)), trained(cybn.BatchNorm, rng)
    before, twin = snapshot(bn), copy.deepcopy(bn)
    twin.backward(twin(x))
    twin.gamma += 1
    twin.running_mean[:] = 5
    assert snapshot(bn) == before


# ---- the stored input --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_input_is_held_by_reference_until_backward(mode, rng):
    x, bn = normal(rng, (9, C)), getattr(cybn.BatchNorm(C), mode)()
    y, held = bn(x), weakref.ref(x)
    del x
    assert held() is not None  # the layer keeps the object itself, not a copy
    bn.backward(y)
    assert held() is None


def test_input_is_let_go_of_by_the_next_forward(rng):
    x, bn = normal(rng, (9, C)), cybn.BatchNorm(C)
    bn(x)
    held = weakref.ref(x)
    del x
    bn(normal(rng, (9, C)))
    assert held() is None


def test_one_backward_a_forward(rng):
    x, bn = normal(rng, (9, C)), cybn.BatchNorm(C)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="call forward before backward"):
            bn.backward(x)
        bn(x)
        bn.backward(x)


# ---- all or nothing ----------------------------------------------------------------------


@pytest.mark.row(31)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_forward_that_raises_changes_nothing(mode, rng):
    x, dy = normal(rng, (9, C)), normal(rng, (9, C))
    bn = getattr(trained(cybn.BatchNorm, rng), mode)()
    bn(x)
    before = snapshot(bn)
    read_only = np.zeros_like(x)
    read_only.setflags(write=False)
    for bad, options in [
        (x.astype(int), {}),
        (x[:, :2], {}),
        (x, {"out": np.zeros((C, 9), np.float32)}),
        (x, {"out": read_only}),
        (x, {"num_threads": 0}),
    ]:
        with pytest.raises((TypeError, ValueError)):
            bn(bad, **options)
    assert snapshot(bn) == before
    assert not read_only.any()
    dx = bn.backward(dy)  # still for the forward that succeeded
    fixed = {} if bn.training else {"mean": bn.running_mean, "var": bn.running_var}
    exact, bounds = gradient_bounds(dy, x, bn.gamma, **fixed)
    assert worst(dx, exact[0], bounds[0]) <= 1


@pytest.mark.row(31)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_backward_that_raises_changes_nothing(mode, rng):
    x, dy = normal(rng, (9, C)), normal(rng, (9, C))
    bn = getattr(trained(cybn.BatchNorm, rng), mode)()
    bn(x)
    bn.backward(dy)
    bn(x)
    before = snapshot(bn)
    for bad, options in [
        (dy[:-1], {}),
        (dy.astype(np.float64), {}),
        (dy.astype(complex), {}),
        (dy, {"out": np.zeros((1, C), np.float32)}),
        (dy, {"num_threads": -1}),
    ]:
        with pytest.raises((TypeError, ValueError)):
            bn.backward(bad, **options)
    assert snapshot(bn) == before
    bn.backward(dy)  # the input is still stored


@pytest.mark.parametrize("what", ["y", "beta", "gamma", "next layer"])
def test_in_place_and_changed_since(rng, what):
    """backward recovers x from y, gamma and beta, so it raises an error if one of them changed."""
    x, dy = rng.standard_normal((2, 5, 3, 7))
    bn, after = cybn.BatchNorm(3, dtype="f8"), cybn.BatchNorm(3, dtype="f8")
    after.beta[...] = 1
    y = bn(x, out=x)
    if what == "y":
        y *= 2
    elif what == "next layer":
        after(y, out=y)
    else:
        getattr(bn, what)[1] += 0.5
    with pytest.raises(RuntimeError, match="has changed since"):
        bn.backward(dy)
