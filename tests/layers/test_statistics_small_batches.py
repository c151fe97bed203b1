"""Ghost batches and batch renormalization: exact cases, and comparison with the reference."""

import copy
import pickle

import numpy as np
import pytest
from bounds import column, forward_bound, wide, worst
from cases import same_bits
from layer_cases import gradient_bounds, snapshot

import cybn
from cybn import reference
from cybn._dispatch import cut

pytestmark = pytest.mark.divided

C = 5
SHAPES = [(12, C), (6, C, 7), (4, C, 3, 5), (2, C, 600)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_axis = pytest.mark.parametrize("axis", [1, -1, 0])
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])
each_affine = pytest.mark.parametrize("affine", [True, False])


def trained(rng, **options):
    """Return a layer whose parameters and running statistics are not those of a new one."""
    bn = cybn.BatchNorm(C, **options)
    if bn.affine:
        bn.gamma[:], bn.beta[:] = rng.uniform(-2, 2, C), rng.standard_normal(C)
    bn.running_mean, bn.running_var = rng.standard_normal(C), rng.uniform(0.5, 2, C)
    bn.num_batches_tracked = 3
    return bn


def batch(rng, shape, dtype, axis=1):
    """Return x and dy of this channels-first shape, laid out with channels on `axis`."""
    both = rng.standard_normal((2, *shape)).astype(dtype)
    both[0] = both[0] * column(np.arange(1, C + 1), len(shape), 1) + 2
    return [np.ascontiguousarray(np.moveaxis(a, 1, axis)) for a in both]


def step(bn, x, dy):
    """Return all results and changed values of one training step of a layer."""
    y = bn(x).copy()
    dx = bn.backward(dy)
    return [y, dx, *bn.gradients(), bn.running_mean, bn.running_var]


def check_same_bits(one, two, x, dy):
    for got, want in zip(step(one, x, dy), step(two, x, dy), strict=True):
        assert same_bits(got, want)
    assert one.num_batches_tracked == two.num_batches_tracked


# ---- bit-equal to plain ------------------------------------------------------------------


@each_affine
@each_dtype
@each_axis
@each_shape
@pytest.mark.parametrize("param", [np.float32, np.float64])
def test_one_virtual_batch_is_plain(shape, axis, dtype, affine, param, rng):
    x, dy = batch(rng, shape, dtype, axis)
    plain = trained(rng, axis=axis, affine=affine, dtype=param)
    for size in (shape[0], shape[0] + 1, 10**9):
        ghost = copy.deepcopy(plain)
        ghost.virtual_batch_size = size
        check_same_bits(ghost, copy.deepcopy(plain), x, dy)


@each_affine
@each_dtype
@each_axis
@each_shape
@pytest.mark.parametrize("param", [np.float32, np.float64])
def test_renorm_without_room_is_plain(shape, axis, dtype, affine, param, level, rng):
    x, dy = batch(rng, shape, dtype, axis)
    plain = trained(rng, axis=axis, affine=affine, dtype=param)
    renorm = copy.deepcopy(plain)
    renorm.renorm = cybn.Renorm(r_max=1, d_max=0)
    for _ in range(3):
        check_same_bits(renorm, plain, x, dy)


@pytest.mark.parametrize("offset", [0, 1e4])
def test_both_together_are_plain_at_scale(offset, rng):
    x = (rng.standard_normal((64, C, 40, 40)) + offset).astype(np.float32)
    dy = rng.standard_normal(x.shape, dtype=np.float32)
    plain = trained(rng)
    both = copy.deepcopy(plain)
    both.virtual_batch_size, both.renorm = 64, cybn.Renorm(1, 0)
    check_same_bits(both, plain, x, dy)


# ---- ghost batches -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "size", "sizes"),
    [
        ((12, C), 1, 4, [4, 4, 4]),
        ((11, C), 1, 4, [4, 4, 3]),
        ((13, C), 1, 4, [4, 4, 5]),  # the last sample joins the part before
        ((13, C, 2), 1, 4, [4, 4, 4, 1]),
        ((3, C, 2), 1, 1, [1, 1, 1]),
        ((3, C), 1, 2, [3]),
        ((3, C), 1, 7, [3]),
        ((C, 9), 0, 4, [4, 5]),
    ],
)
def test_parts(shape, axis, size, sizes):
    x = np.zeros(shape)
    parts = [x[where] for where in cut(shape, axis, size)]
    assert [part.shape[1 if axis == 0 else 0] for part in parts] == sizes
    assert sum(part.size for part in parts) == x.size
    assert all(np.shares_memory(part, x) for part in parts)


@each_dtype
@each_axis
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(7, C, 4), (9, C, 2, 3)], ids=str)
def test_ghost_is_each_part_by_itself(shape, size, axis, dtype, rng):
    x, dy = batch(rng, shape, dtype, axis)
    bn = trained(rng, axis=axis, virtual_batch_size=size, dtype=dtype)
    whole, plain = (cybn.BatchNorm(C, axis=axis, dtype=dtype) for _ in range(2))
    y, dx = bn(x), bn.backward(dy)
    dgamma, dbeta, bounds = 0, 0, 0
    for where in cut(x.shape, axis % x.ndim, size):
        assert worst(y[where], *forward_bound(x[where], bn.gamma, bn.beta, axis)) <= 1
        exact, (dx_bound, *bound) = gradient_bounds(dy[where], x[where], bn.gamma, axis)
        assert worst(dx[where], exact[0], dx_bound) <= 1
        dgamma, dbeta, bounds = dgamma + exact[1], dbeta + exact[2], bounds + np.array(bound)
    assert worst(bn.grad_gamma, dgamma, bounds[0]) <= 1
    assert worst(bn.grad_beta, dbeta, bounds[1]) <= 1
    assert y.strides == dx.strides == x.strides
    # the running statistics are updated from the whole batch
    whole.virtual_batch_size = size
    whole(x)
    plain(x)
    eps = 8 * np.finfo(dtype).eps
    np.testing.assert_allclose(whole.running_mean, plain.running_mean, rtol=eps, atol=eps)
    np.testing.assert_allclose(whole.running_var, plain.running_var, rtol=eps)
    assert whole.num_batches_tracked == plain.num_batches_tracked == 1


def test_ghost_in_place_and_with_out(rng):
    x, dy = batch(rng, (7, C, 4), np.float32)
    bn = trained(rng, virtual_batch_size=3)
    want, dwant = bn(x), bn.backward(dy)
    y, dx = np.empty_like(x), np.empty_like(x)
    assert bn(x, out=y) is y
    assert bn.backward(dy, out=dx) is dx
    assert same_bits(y, want)
    assert same_bits(dx, dwant)
    assert bn(x.copy(), num_threads=3).tobytes() == want.tobytes()
    again = dy.copy()
    assert bn.backward(dy, out=dy, num_threads=3) is dy
    assert same_bits(dy, dwant)
    assert bn(x, out=x) is x
    assert same_bits(x, want)
    np.testing.assert_allclose(bn.backward(again), dwant, rtol=1e-4, atol=1e-4)  # x comes from y


@pytest.mark.parametrize("options", [{"virtual_batch_size": 3}, {"renorm": cybn.Renorm(1.5, 0.5)}])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"])
def test_parts_with_activation_and_residual(rng, options, activation):
    """Results equal those of the plain layer with separate steps for residual and activation."""
    x, dy = batch(rng, (7, C, 40), np.float64)
    r, _ = batch(rng, (7, C, 40), np.float64)
    plain = trained(rng, dtype=np.float64, **options)
    fused = copy.deepcopy(plain)
    fused.activation = activation
    z = plain(x) + r
    y, slope = reference.activated(z, activation, 0.01)
    np.testing.assert_allclose(fused(x, residual=r), y, 1e-12, 1e-12)
    dx, dr = fused.backward(dy)
    np.testing.assert_allclose(dr, dy * slope, 1e-10, 1e-12)
    np.testing.assert_allclose(dx, plain.backward(dy * slope), 1e-9, 1e-10)
    np.testing.assert_allclose(fused.grad_gamma, plain.grad_gamma, 1e-9, 1e-10)
    np.testing.assert_allclose(fused.grad_beta, plain.grad_beta, 1e-9, 1e-10)
    fused(x, residual=r)
    with pytest.raises(ValueError, match="out_residual overlaps an input"):
        fused.backward(dy, out_residual=dy)


def test_ghost_only_in_training(rng):
    x, _ = batch(rng, (8, C), np.float32)
    bn = trained(rng, virtual_batch_size=2)
    assert same_bits(bn.eval()(x), copy.deepcopy(bn)(x))
    untracked = cybn.BatchNorm(C, virtual_batch_size=2, track_running_stats=False).eval()
    assert same_bits(untracked(x), cybn.batch_norm(x)[0])


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.ones((4, C)), {}, "virtual_batch_size is 1 .*one value a channel"),
        (np.ones((1, C)), {}, "one value a channel has no variance"),
        (np.ones((0, C, 2)), {}, "no values"),
        (np.ones((4, C, 2)), {"out": np.ones((4, C, 3))}, r"out has shape \(4, 5, 3\)"),
    ],
)
def test_a_ghost_step_that_raises_changes_nothing(x, options, message, rng):
    bn = trained(rng, virtual_batch_size=1)
    before = snapshot(bn)
    with pytest.raises(ValueError, match=message):
        bn(x, **options)
    assert snapshot(bn) == before
    x, dy = batch(rng, (4, C, 2), np.float32)
    bn(x)
    with pytest.raises(ValueError, match=r"dy has shape \(4, 5, 3\)"):
        bn.backward(np.ones((4, C, 3), np.float32))
    bn.backward(dy)


def test_out_that_overlaps_a_part(rng):
    memory = rng.standard_normal((10, C, 4))
    bn = trained(rng, virtual_batch_size=2)
    with pytest.raises(ValueError, match="overlaps"):
        bn(memory[:8], out=memory[2:])


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)]
)
def test_bad_virtual_batch_size(value, error):
    with pytest.raises(error, match=f"virtual_batch_size is {value}"):
        cybn.BatchNorm(C, virtual_batch_size=value)


# ---- renormalization ---------------------------------------------------------------------


def renormalize(x, bn, limits):
    """Return y, r and d of the paper's Algorithm 1 in long double."""
    wx, gamma, beta, mean, var = wide(x, bn.gamma, bn.beta, bn.running_mean, bn.running_var)
    axis = bn.axis % x.ndim
    others = tuple(i for i in range(x.ndim) if i != axis)
    batch_mean = wx.mean(others)
    e = wx - column(batch_mean, x.ndim, axis)
    std, running_std = np.sqrt((e * e).mean(others) + bn.eps), np.sqrt(var + bn.eps)
    r = np.clip(std / running_std, 1 / np.longdouble(limits.r_max), limits.r_max)
    d = np.clip((batch_mean - mean) / running_std, -limits.d_max, limits.d_max)
    r, d, std, gamma, beta = (column(v, x.ndim, axis) for v in (r, d, std, gamma, beta))
    return (e / std * r + d) * gamma + beta, r, d


@each_dtype
@each_axis
@each_shape
@pytest.mark.parametrize("limits", [(3, 5), (1.1, 0.2), (1, 5), (3, 0)])
def test_renorm_is_the_formula(shape, axis, dtype, limits, rng):
    x, dy = batch(rng, shape, dtype, axis)
    limits = cybn.Renorm(*limits)
    bn = trained(rng, axis=axis, renorm=limits, dtype=np.float64)
    want, r, d = renormalize(x, bn, limits)
    scale = (r.ravel() * bn.gamma).astype(float)
    _, bound = forward_bound(x, scale, d.ravel() * bn.gamma + bn.beta, axis, bn.eps)
    assert worst(bn(x), want, bound) <= 1
    dx = bn.backward(dy)
    exact, (dx_bound, dgamma_bound, dbeta_bound) = gradient_bounds(dy, x, scale, axis)
    assert worst(dx, exact[0], dx_bound) <= 1
    r, d = r.ravel(), d.ravel()
    dgamma = r * exact[1] + d * exact[2]  # r and d are constants
    assert worst(bn.grad_gamma, dgamma, r * dgamma_bound + (np.abs(d) + 1) * dbeta_bound) <= 1
    assert worst(bn.grad_beta, exact[2], dbeta_bound) <= 1


def test_renorm_within_its_limits_is_inference(rng):
    x, _ = batch(rng, (6, C, 7), np.float64)
    bn = trained(rng, renorm=cybn.Renorm(100, 100), dtype=np.float64)
    want = copy.deepcopy(bn).eval()(x)
    np.testing.assert_allclose(bn(x), want, rtol=1e-12, atol=1e-12)


def test_renorm_uses_the_statistics_before_the_batch_and_moves_them_as_plain(rng):
    x, _ = batch(rng, (6, C, 7), np.float32)
    bn = trained(rng, renorm=cybn.Renorm())
    plain = trained(rng)
    plain.load_state_dict(bn.state_dict())
    want = bn(x)
    plain(x)
    assert snapshot(bn)[2] == snapshot(plain)[2]
    bn.load_state_dict(plain.state_dict())
    assert not same_bits(bn(x), want)


def test_a_schedule_by_assigning(rng):
    x, _ = batch(rng, (6, C), np.float32)
    limits = cybn.Renorm(1, 0)
    layers = [trained(rng, renorm=limits) for _ in range(2)]
    before = [copy.deepcopy(bn)(x) for bn in layers]
    limits.r_max, limits.d_max = 3, 5
    for bn, y in zip(layers, before, strict=True):
        assert not same_bits(bn(x), y)
    bn.renorm = None
    assert same_bits(bn(x), cybn.batch_norm(x, bn.gamma, bn.beta)[0])


def test_ghost_batches_are_renormalized_each(rng):
    x, _ = batch(rng, (6, C, 4), np.float64)
    bn = trained(rng, renorm=cybn.Renorm(1.5, 0.3), virtual_batch_size=2, dtype=np.float64)
    alone = copy.deepcopy(bn)
    alone.virtual_batch_size, alone.update_statistics = None, False
    want = np.concatenate([alone(part) for part in np.split(x, 3)])
    assert same_bits(bn(x), want)


def test_renorm_object():
    assert repr(cybn.Renorm()) == "Renorm(r_max=3, d_max=5)"
    bn = cybn.BatchNorm2d(C, renorm=cybn.Renorm(2, 1), virtual_batch_size=8, nan_policy="skip")
    assert repr(eval(repr(bn), vars(cybn))) == repr(bn)
    twin = pickle.loads(pickle.dumps(bn))
    assert repr(twin) == repr(bn)
    assert twin.renorm is not bn.renorm
    limits = cybn.Renorm()
    for name, bad in [("r_max", 0.9), ("d_max", -1), ("r_max", float("nan"))]:
        with pytest.raises(ValueError, match=f"{name} is"):
            setattr(limits, name, bad)
    with pytest.raises(TypeError, match="r_max is 'a'"):
        cybn.Renorm("a")
    with pytest.raises(AttributeError, match="no rmax"):
        limits.rmax = 1
    with pytest.raises(TypeError, match=r"renorm is \(3, 5\); it must be a Renorm"):
        cybn.BatchNorm(C, renorm=(3, 5))
    with pytest.raises(ValueError, match="needs running statistics"):
        cybn.BatchNorm(C, renorm=cybn.Renorm(), track_running_stats=False)


def test_reference_agrees_with_itself(rng):
    # the formula of this file with r = 1 and d = 0 equals the reference
    x, _ = batch(rng, (6, C, 4), np.float64)
    bn = trained(rng, dtype=np.float64)
    y, _, _ = renormalize(x, bn, cybn.Renorm(1, 0))
    exact, _ = reference.batch_norm(*wide(x, bn.gamma, bn.beta))
    np.testing.assert_allclose(y.astype(float), exact.astype(float), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}, {"renorm": cybn.Renorm()}])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_overflow_is_silent_and_visible(dtype, options):
    """Values too large for the type become infinite, as in the kernels, without a warning."""
    large = np.finfo(dtype).max / 4
    x = np.array([[1.0], [-1.0], [1.0], [-1.0]], dtype) * large
    bn = cybn.BatchNorm(1, momentum=1, dtype=dtype, **options)
    for _ in range(2):  # the second time, running statistics are infinite
        bn(x)
        bn.backward(np.full_like(x, large * 3))
        assert not np.isfinite(bn.running_var).any()
        assert np.isinf(bn.grad_beta).all()
    for values in bn.scale_shift():
        assert values.shape == (1,)
