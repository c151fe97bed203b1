"""Freezing, NaN policies and previews of a layer."""

import copy
import itertools
import pickle
import threading
from contextlib import ExitStack

import numpy as np
import pytest
from bounds import forward_bound, worst
from cases import same_bits
from layer_cases import gradient_bounds, snapshot
from statistics_cases import C, batch, trained

import cybn

# ---- freezing ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("update", "use", "train"),
    list(itertools.product([True, False], [None, True, False], [True, False])),
)
def test_switches_are_independent(update, use, train, training, rng):
    x, dy = batch(rng), batch(rng)
    bn = trained(rng).train(training)
    bn.update_statistics, bn.use_batch_statistics, bn.train_affine = update, use, train
    mean, var, parameters = bn.running_mean, bn.running_var, bn.parameters()
    by_batch = training if use is None else use
    fixed = {} if by_batch else {"mean": mean, "var": var}
    assert worst(bn(x), *forward_bound(x, bn.gamma, bn.beta, 1, **fixed)) <= 1
    moved = training and update
    assert (bn.num_batches_tracked == 4) is moved
    assert same_bits(bn.running_mean, mean) is not moved
    if moved:
        plain = trained(rng)
        plain.running_mean, plain.running_var = mean, var
        plain(x)
        assert same_bits(bn.running_mean, plain.running_mean)
        assert same_bits(bn.running_var, plain.running_var)
    dx = bn.backward(dy)
    exact, bounds = gradient_bounds(dy, x, bn.gamma, **fixed)
    assert worst(dx, exact[0], bounds[0]) <= 1
    if train:
        assert parameters[0] is bn.gamma
        assert bn.gradients()[1] is bn.grad_beta
        assert worst(bn.grad_gamma, exact[1], bounds[1]) <= 1
    else:
        assert parameters == bn.gradients() == []
        assert not bn.grad_gamma.any()
        assert not bn.grad_beta.any()


def test_frozen_running_statistics_and_a_moving_input(rng):
    # x is overwritten by y, but the layer learns from the moments of the input
    x = batch(rng)
    bn = trained(rng)
    bn.use_batch_statistics = False
    twin = copy.deepcopy(bn)
    twin(x)
    bn(x, out=x)
    assert snapshot(bn) == snapshot(twin)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("policy", ["propagate", "raise"])
def test_one_value_a_channel_teaches_nothing(policy, ddof, rng):
    x = batch(rng, 1)
    bn = trained(rng, running_ddof=ddof, nan_policy=policy)
    for use in (None, True, False):
        bn.use_batch_statistics = use
        before = snapshot(bn)
        for options in ({}, {"out": np.empty_like(x)}):
            with pytest.raises(ValueError, match="one value a channel"):
                bn(x, **options)
        assert snapshot(bn) == before
    bn.freeze()
    assert np.isfinite(bn(x)).all()


def test_freeze_and_unfreeze(rng):
    bn = trained(rng)
    x, y = batch(rng), bn(batch(rng))
    bn.backward(y)
    assert bn.freeze() is bn
    state, want = bn.state_dict(), copy.deepcopy(bn).eval()(x)
    assert same_bits(bn.train()(x), want)
    dx = bn.backward(x)
    assert same_bits(
        dx, cybn.batch_norm_inference_backward(x, x, bn.running_mean, bn.running_var, bn.gamma)[0]
    )
    for name, value in bn.state_dict().items():
        assert same_bits(value, state[name])
    assert not bn.grad_gamma.any()  # the array of the gradient is cleared
    assert bn.unfreeze() is bn
    bn(x)
    assert bn.num_batches_tracked == 5
    assert len(bn.parameters()) == 2


def test_switches_are_kept_by_copies(rng):
    bn = trained(rng).freeze()
    for twin in (copy.copy(bn), copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        twin(batch(rng))
        assert twin.num_batches_tracked == 3
        assert twin.parameters() == []


def test_no_running_statistics_to_freeze_to(rng):
    bn = cybn.BatchNorm(C, track_running_stats=False).freeze()
    x = batch(rng)
    assert same_bits(bn(x), cybn.batch_norm(x, bn.gamma, bn.beta)[0])


# ---- NaN ---------------------------------------------------------------------------------

each_bad = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
each_way = pytest.mark.parametrize(
    "options", [{}, {"virtual_batch_size": 4}, {"renorm": cybn.Renorm()}], ids=str
)


@each_bad
@each_way
def test_propagate(bad, options, rng):
    x = batch(rng)
    bn, clean = cybn.BatchNorm(C, **options), cybn.BatchNorm(C, **options)
    clean(x)
    x[2, 1] = bad
    bn(x)
    spoilt = ~np.isfinite([bn.running_mean, bn.running_var])
    np.testing.assert_array_equal(spoilt.any(0), [False, True, False, False])
    for got, want in [(bn.running_mean, clean.running_mean), (bn.running_var, clean.running_var)]:
        np.testing.assert_array_equal(np.delete(got, 1), np.delete(want, 1))
        if np.isnan(bad):
            assert np.isnan(got[1])


@each_bad
@each_way
def test_skip(bad, options, rng):
    x, dirty = batch(rng), batch(rng)
    bn = trained(rng, nan_policy="skip", **options)
    bn(x)
    before = snapshot(bn)
    dirty[2, 1] = bad
    y = bn(dirty)
    assert snapshot(bn) == before
    np.testing.assert_array_equal(np.isfinite(y).all(0), [True, False, True, True])
    bn.backward(dirty)  # for the skipped batch
    bn(x)
    assert bn.num_batches_tracked == 5


@each_bad
@each_way
@pytest.mark.parametrize("out", [None, "new", "x"])
def test_raise(out, bad, options, rng):
    x, dirty, dy = batch(rng), batch(rng), batch(rng)
    bn = trained(rng, nan_policy="raise", **options)
    bn(x)
    want = copy.deepcopy(bn)
    want(x)
    bn.restore(snap := bn.snapshot())
    bn.update_statistics = False
    bn(x)  # the backward below is for this forward
    bn.update_statistics = True
    before = snapshot(bn)
    dirty[2, 1] = bad
    target = {None: None, "new": np.full_like(x, 7), "x": dirty}[out]
    kept = None if target is None else target.tobytes()
    with pytest.raises(FloatingPointError, match=r"channel 1 .*1 of 4 channels.*nan_policy"):
        bn(dirty, out=target)
    assert snapshot(bn) == before
    if target is not None:
        assert target.tobytes() == kept
    assert np.isfinite(bn.backward(dy)).all()
    bn.restore(snap)
    if target is not None:
        bn(x, out=np.empty_like(x))  # a finite batch is accepted
        assert bn.num_batches_tracked == 5


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_an_overflow_of_the_running_variance(policy):
    bn = cybn.BatchNorm(1, nan_policy=policy, momentum=1)
    x = np.array([[1e300], [-1e300]]) * 1e-150  # the variance is too large for float32
    before = snapshot(bn)
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="variance inf"):
            bn(x)
    else:
        bn(x)
    assert snapshot(bn) == before


def test_bad_nan_policy():
    with pytest.raises(ValueError, match=r"nan_policy is 'ignore'.*propagate, raise, skip"):
        cybn.BatchNorm(C, nan_policy="ignore")


def test_momentum_0_and_1_do_not_look_at_what_weighs_nothing(rng):
    x, dirty = batch(rng), batch(rng)
    dirty[2, 1], dirty[3, 2] = np.nan, np.inf
    bn = trained(rng, momentum=0, nan_policy="raise")
    mean, var = bn.running_mean, bn.running_var
    bn(dirty)
    assert same_bits(bn.running_mean, mean)
    assert same_bits(bn.running_var, var)
    assert bn.running_mean is not mean
    assert bn.num_batches_tracked == 4
    bn = trained(rng, momentum=1)
    bn(dirty)
    assert np.isfinite(bn.running_mean).tolist() == [True, False, False, True]
    bn(x)  # the old statistics have weight 0
    fresh = cybn.BatchNorm(C, momentum=1)
    fresh(x)
    assert same_bits(bn.running_mean, fresh.running_mean)
    assert same_bits(bn.running_var, fresh.running_var)


@pytest.mark.row(31)
def test_backward_after_a_raise_is_that_of_the_forward_before(rng):
    x, dirty, dy = batch(rng), batch(rng, 5), batch(rng)
    dirty[2, 1] = np.nan
    bn, twin = trained(rng, nan_policy="raise"), cybn.BatchNorm(C)
    twin.gamma[:], twin.beta[:] = bn.gamma, bn.beta
    twin(x)
    bn(x)
    with pytest.raises(FloatingPointError):
        bn(dirty)
    assert same_bits(bn.backward(dy), twin.backward(dy))
    with pytest.raises(FloatingPointError):
        bn(dirty)
    with pytest.raises(RuntimeError, match="call forward before backward"):
        bn.backward(dirty)


# ---- preview -----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@each_way
def test_preview_leaves_no_trace(options, training, rng):
    x, dy, other = batch(rng), batch(rng), batch(rng, 5)
    bn = trained(rng, **options).train(training)
    want = copy.deepcopy(bn).train()(other)
    bn(x)
    twin = copy.deepcopy(bn)
    twin_y = twin(x)
    bn(x)
    before = snapshot(bn)
    with bn.preview() as same:
        assert same is bn
        got = bn(other)
        with pytest.raises(RuntimeError, match="no backward in a preview"):
            bn.backward(dy)
    assert snapshot(bn) == before
    assert bn.training is training
    assert same_bits(bn.backward(dy), twin.backward(dy))  # still for the forward before the preview
    if not training and not options:
        assert same_bits(got, want)
    del twin_y


def test_preview_ends_with_an_error_too(rng):
    bn = trained(rng).eval()
    before = snapshot(bn)
    with pytest.raises(ValueError, match="num_features"), bn.preview():
        bn(np.ones((3, C + 1), np.float32))
    bn(batch(rng))
    assert snapshot(bn) == before


def test_switches_hold_in_a_preview(rng):
    """A preview does what training would do; a frozen layer uses its running statistics."""
    x = batch(rng)
    for bn in (trained(rng).freeze(), trained(rng)):
        for use in (False, True, None):
            bn.use_batch_statistics = use
            twin = copy.deepcopy(bn).train()
            with bn.eval().preview():
                got = bn(x)
            assert same_bits(got, twin(x))


def test_gradients_of_what_is_not_trained_are_zero(rng):
    """Otherwise an optimizer with these arrays would use gradients of an earlier step."""
    bn, x = trained(rng), batch(rng)
    bn(x)
    bn.backward(np.ones_like(x))
    assert bn.grad_beta.any()
    bn.train_affine = False
    bn(x)
    bn.backward(np.ones_like(x))
    assert not bn.grad_gamma.any()
    assert not bn.grad_beta.any()


def test_previews_nest_and_are_of_their_layer(rng):
    one, two = trained(rng), trained(rng)
    x = batch(rng)
    with one.preview(), two.preview(), one.preview():
        one(x), two(x)
    assert one.num_batches_tracked == two.num_batches_tracked == 3
    with one.preview():
        one(x), two(x)
    assert (one.num_batches_tracked, two.num_batches_tracked) == (3, 4)
    with ExitStack() as stack:
        for bn in (one, two):
            assert stack.enter_context(bn.preview()) is bn
        one(x), two(x)
    assert (one.num_batches_tracked, two.num_batches_tracked) == (3, 4)
    one(x), two(x)
    assert (one.num_batches_tracked, two.num_batches_tracked) == (4, 5)


def test_another_thread_goes_on_training(rng):
    bn, x = trained(rng), batch(rng)
    with bn.preview():
        thread = threading.Thread(target=lambda: [bn(x) for _ in range(5)])
        thread.start()
        bn(x)
        thread.join()
    assert bn.num_batches_tracked == 8
