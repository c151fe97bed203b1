"""What a layer lets one see, freeze, refuse and take back: switches, NaN, preview, snapshots."""

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

import cybn

C = 4


def batch(rng, n=9, dtype=np.float32):
    return (rng.standard_normal((n, C)) * np.arange(1, C + 1) + 2).astype(dtype)


def trained(rng, **options):
    bn = cybn.BatchNorm(C, **options)
    if bn.affine:
        bn.gamma[:], bn.beta[:] = rng.uniform(-2, 2, C), rng.standard_normal(C)
    bn.running_mean, bn.running_var = rng.standard_normal(C), rng.uniform(0.5, 2, C)
    bn.num_batches_tracked = 3
    return bn


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
    # out is x, and the batch's own moments are still those of the input
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
        bn.use_batch_statistics, before = use, snapshot(bn)
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
    assert not bn.grad_gamma.any()  # whoever holds the array sees no gradient
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
    bn.backward(dirty)  # belongs to the skipped batch
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
    bn(x)  # the forward that the backward below belongs to
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
        bn(x, out=np.empty_like(x))  # a good batch passes
        assert bn.num_batches_tracked == 5


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_an_overflow_of_the_running_variance(policy):
    bn = cybn.BatchNorm(1, nan_policy=policy, momentum=1)
    x = np.array([[1e300], [-1e300]]) * 1e-150  # a variance beyond float32
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
    bn(x)  # what was there before counts for nothing
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
    with pytest.raises(RuntimeError, match="backward needs a forward"):
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
    assert same_bits(bn.backward(dy), twin.backward(dy))  # still that of the real forward
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
    """A preview is what training would do; a frozen layer would use its running statistics."""
    x = batch(rng)
    for bn in (trained(rng).freeze(), trained(rng)):
        for use in (False, True, None):
            bn.use_batch_statistics = use
            twin = copy.deepcopy(bn).train()
            with bn.eval().preview():
                got = bn(x)
            assert same_bits(got, twin(x))


def test_gradients_of_what_is_not_trained_are_zero(rng):
    """Not those of an earlier step, which an optimizer that holds the arrays would go on with."""
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


# ---- snapshot and restore ----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"dtype": np.float64}], ids=str)
def test_restore_goes_back_to_the_bit(options, rng):
    x = batch(rng)
    bn = trained(rng, **options)
    bn.backward(bn(x))
    before, taken, arrays = snapshot(bn), bn.snapshot(), bn.parameters() + bn.gradients()
    for _ in range(2):
        x[0, 1] = np.nan
        bn.backward(bn(x))
        for parameter in bn.parameters():
            parameter += 1
        bn.running_mean[:] = 5
        bn.freeze().eval()
        assert bn.restore(taken) is bn
        assert snapshot(bn) == before
        for array, same in zip(bn.parameters() + bn.gradients(), arrays, strict=True):
            assert array is same
        with pytest.raises(RuntimeError, match="needs a forward"):
            bn.backward(x)
    bn.running_mean[:] = 5
    twin = cybn.BatchNorm(C, **options).restore(taken)  # the snapshot is not the layer's
    assert snapshot(twin)[2] == before[2]


def test_restore_of_nan(rng):
    bn = trained(rng)
    x = batch(rng)
    x[0, 1] = np.nan
    bn(x)
    taken = bn.snapshot()
    bn.reset_running_stats()
    bn.restore(taken)
    assert np.isnan(bn.running_mean).tolist() == [False, True, False, False]


def test_a_snapshot_holds_copies(rng):
    """Also of what drift compares with."""
    bn = trained(rng)
    before = bn.running_mean
    bn(batch(rng))
    taken, drift = bn.snapshot(), bn.drift()
    before[:] = 99
    for _ in range(2):
        assert not (bn.restore(taken).drift().shift - drift.shift).any()
        bn._seen[1].mean[:] = 7


@pytest.mark.parametrize("track", [True, False])
def test_a_snapshot_of_a_layer_that_tracks_or_not(track, rng):
    bn = cybn.BatchNorm(C, track_running_stats=track)
    other = cybn.BatchNorm(C, track_running_stats=not track)
    bn(batch(rng))
    before = snapshot(bn)
    with pytest.raises(ValueError, match=f"track_running_stats={not track}; here it is {track}"):
        bn.restore(other.snapshot())
    assert snapshot(bn) == before


@pytest.mark.parametrize(
    "other",
    [cybn.BatchNorm(C + 1), cybn.BatchNorm(C, affine=False), cybn.BatchNorm(C, dtype=float)],
    ids=repr,
)
def test_a_snapshot_of_another_layer(other, rng):
    bn = trained(rng)
    before = snapshot(bn)
    with pytest.raises(ValueError, match="another num_features, affine or dtype"):
        bn.restore(other.snapshot())
    with pytest.raises(TypeError, match="snapshot is of type dict"):
        bn.restore(bn.state_dict())
    assert snapshot(bn) == before


# ---- statistics, and how far they are off ------------------------------------------------


@pytest.mark.parametrize("ddof", [0, 1])
def test_set_statistics(ddof, rng):
    bn, m = trained(rng, running_ddof=ddof), cybn.moments(batch(rng))
    bn.set_statistics(m)
    assert same_bits(bn.running_mean, m.mean.astype(np.float32))
    assert same_bits(bn.running_var, m.var(ddof).astype(np.float32))
    assert bn.num_batches_tracked == 3


@pytest.mark.parametrize(
    ("moments", "error", "message"),
    [
        (np.ones(C), TypeError, "moments is of type ndarray"),
        (cybn.Moments.empty(C), ValueError, "moments has count 0, which in channel 0 is too few"),
        (cybn.Moments(1, np.zeros(C), np.zeros(C)), ValueError, "running_ddof=1.*running_ddof=0"),
        (cybn.Moments(5, np.zeros(C + 1), np.ones(C + 1)), ValueError, r"shape \(5,\).*\(4,\)"),
        (cybn.Moments(5, np.full(C, np.nan), np.ones(C)), ValueError, "running_mean is nan"),
        (
            cybn.Moments([5, 5, 1, 5], np.zeros(C), np.ones(C)),
            ValueError,
            "in channel 2 is too few",
        ),
    ],
)
def test_set_statistics_whole_or_not_at_all(moments, error, message, rng):
    bn = trained(rng)
    before = snapshot(bn)
    with pytest.raises(error, match=message):
        bn.set_statistics(moments)
    assert snapshot(bn) == before
    with pytest.raises(AttributeError, match="track_running_stats is False"):
        cybn.BatchNorm(C, track_running_stats=False).set_statistics(cybn.moments(batch(rng)))


@pytest.mark.parametrize("ddof", [0, 1])
def test_drift(ddof, rng):
    x, bn = batch(rng), trained(rng, running_ddof=ddof)
    mean, var = bn.running_mean.astype(float), bn.running_var.astype(float) + bn.eps
    bn(x)
    m = cybn.moments(x)
    last = bn.drift()
    np.testing.assert_allclose(last.shift, (m.mean - mean) / np.sqrt(var), rtol=1e-12)
    ratio = (m.var(ddof) + bn.eps) / var
    np.testing.assert_allclose(last.log_variance_ratio, np.log(ratio), rtol=1e-12)
    now = bn.drift(x)  # the running statistics have come closer
    assert (np.abs(now.shift) < np.abs(last.shift)).all()
    for again in (bn.drift(m), bn.drift(x)):
        np.testing.assert_array_equal(now, again)
    bn.set_statistics(m)
    assert np.abs(bn.drift(x)).max() < 1e-6


def test_drift_beyond():
    drift = cybn.Drift(np.array([0.5, -2, 0, np.nan, 0]), np.array([0.1, 0, -3, 0, np.inf]))
    assert drift.beyond().tolist() == [1, 2, 3, 4]
    assert drift.beyond(5, 5).tolist() == [3, 4]


def test_drift_of_nothing(rng):
    bn = trained(rng)
    for make in (lambda: bn, lambda: bn.eval()(batch(rng)) is None or bn):
        make()
        with pytest.raises(RuntimeError, match="no batch has moved"):
            bn.drift()
    with pytest.raises(RuntimeError, match="track_running_stats is False"):
        cybn.BatchNorm(C, track_running_stats=False).drift()
    with pytest.raises(ValueError, match="data has 5 channels"):
        bn.drift(cybn.Moments.empty(C + 1))
    with pytest.raises(ValueError, match="num_features=4"):
        bn.drift(np.ones((3, C + 1)))


def test_drift_forgets_with_the_statistics(rng):
    bn = trained(rng)
    bn(batch(rng))
    bn.drift()
    for forget in (lambda: bn.reset_running_stats(), lambda: bn.load_state_dict(bn.state_dict())):
        bn(batch(rng))
        forget()
        with pytest.raises(RuntimeError, match="no batch has moved"):
            bn.drift()


# ---- conventions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "eps", "momentum", "ddof"),
    [("torch", 1e-5, 0.1, 1), ("keras", 1e-3, 0.01, 0), ("onnx", 1e-5, 0.1, 0)]
    + [("paper", 1e-5, None, 1)],
)
def test_like(library, eps, momentum, ddof):
    bn = cybn.BatchNorm2d.like(library, C)
    assert type(bn) is cybn.BatchNorm2d
    assert bn.eps == eps
    assert bn.momentum == pytest.approx(momentum)
    assert bn.running_ddof == ddof
    assert bn.axis == 1


def test_like_with_options():
    keras = cybn.BatchNorm.like("keras", C, momentum=0.75, axis=-1, eps=0.5, running_ddof=1)
    assert (keras.momentum, keras.axis, keras.eps, keras.running_ddof) == (0.25, -1, 0.5, 1)
    assert cybn.BatchNorm.like("torch", C, momentum=0.75).momentum == 0.75
    assert cybn.BatchNorm.like("onnx", C, momentum=0.75).momentum == 0.25
    assert cybn.BatchNorm.like("onnx", C, momentum=None).momentum is None
    with pytest.raises(ValueError, match="library is 'tf'; it must be one of torch, keras"):
        cybn.BatchNorm.like("tf", C)
    with pytest.raises(
        ValueError, match=r"momentum is 1\.5; .*old value in the convention of keras"
    ):
        cybn.BatchNorm.like("keras", C, momentum=1.5)


def test_like_gives_the_momentum_as_it_would_be_written():
    for library, given, momentum in [
        ("keras", None, 0.01),
        ("onnx", None, 0.1),
        ("keras", 0.9, 0.1),
        ("keras", 0.999, 0.001),
        ("keras", np.nextafter(1, 0), 2.0**-53),
        ("onnx", np.float32(0.5), 0.5),
    ]:
        options = {} if given is None else {"momentum": given}
        got = cybn.BatchNorm.like(library, C, **options).momentum
        assert abs(got - momentum) <= 2.0**-54 * (given is not None)
        if given is None:
            assert got == momentum


def explained(bn, capsys, **options):
    bn.explain(**options)
    return capsys.readouterr().out


def test_explain(capsys, rng):
    bn = cybn.BatchNorm(C, eps=0.25)
    text = explained(bn, capsys)
    assert "training mode, with the statistics of the batch" in text
    assert "y    = (x - mean) / sqrt(var + 0.25) * 1 + 0\n" in text
    assert "running_mean = 0.9 * 0 + 0.1 * mean\n" in text
    assert "running_var  = 0.9 * 1 + 0.1 * var * M / (M - 1)\n" in text
    bn.gamma[2], bn.beta[2], bn.running_mean[2], bn.running_var[2] = 3, -4, 1.5, 2
    text = explained(bn.eval(), capsys, channel=2)
    assert "y    = (x - 1.5) / sqrt(2 + 0.25) * 3 - 4\n" in text
    assert "the running statistics stay as they are" in text
    with pytest.raises(ValueError, match=r"channel is 4; it must be in 0\.\.3"):
        bn.explain(4)
    for channel in (1.5, "gamma", None):
        with pytest.raises(TypeError, match=r"channel is .*; it must be an int"):
            bn.explain(channel)


def test_explain_says_what_happens(capsys, rng):
    """Each line that a layer's settings call for, and only then."""
    lines = {
        "all three are not changed, and it raises": {"nan_policy": "raise"},
        "cut into virtual batches of 2 samples": {"virtual_batch_size": 2},
        "M    = values of a channel in each virtual batch:": {"virtual_batch_size": 2},
        "running_mean = 0.9 * 0 + 0.1 * mean_all": {"virtual_batch_size": 2},
        "d    = clip((mean - 0) / sqrt(1 + 1e-05), -5, 5)": {"renorm": cybn.Renorm()},
        "with no gradient through r and d": {"renorm": cybn.Renorm()},
        "running_mean = 0 * 0 + 1 * mean": {"momentum": None},
        "y    = (x - mean) / sqrt(var + 1e-05)\n": {"affine": False},
    }
    plain = explained(cybn.BatchNorm(C), capsys)
    for line, options in lines.items():
        assert line in explained(cybn.BatchNorm(C, **options), capsys)
        assert line not in plain
    assert "M / (M - 1)" not in explained(cybn.BatchNorm(C, running_ddof=0), capsys)
    untracked = explained(cybn.BatchNorm(C, track_running_stats=False).eval(), capsys)
    assert "running" not in untracked.split("\n", 1)[1]
    frozen = explained(cybn.BatchNorm(C).freeze(), capsys)
    assert "gamma and beta are not trained" in frozen
    assert "y    = (x - 0) / sqrt(1 + 1e-05)" in frozen


def test_explain_is_what_is_computed(capsys, rng):
    """The printed right-hand sides, evaluated, are what the layer computes."""
    x = batch(rng, dtype=np.float64)
    for options in ({}, {"renorm": cybn.Renorm(1.5, 0.2)}, {"momentum": None, "running_ddof": 0}):
        bn = trained(rng, dtype=np.float64, **options)
        for _ in range(2):
            text = explained(bn, capsys, channel=1)
            names = {"x": x[:, 1], "M": len(x), "sum": np.sum, "sqrt": np.sqrt, "clip": np.clip}
            for line in text.splitlines():
                name, found, formula = line.partition("=")
                if found and name.strip().isidentifier() and "values of" not in line:
                    names[name.strip()] = eval(formula, {}, names)
            y = bn(x)
            np.testing.assert_allclose(y[:, 1], names["y"], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(bn.running_mean[1], names["running_mean"], rtol=1e-4)
            np.testing.assert_allclose(bn.running_var[1], names["running_var"], rtol=1e-4)
            assert bn.num_batches_tracked == names["num_batches_tracked"]
