"""Running statistics are restored, set and monitored: snapshots, set_statistics and drift."""

import numpy as np
import pytest
from cases import same_bits
from layer_cases import snapshot
from statistics_cases import C, batch, trained

import cybn

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
        with pytest.raises(RuntimeError, match="call forward before backward"):
            bn.backward(x)
    bn.running_mean[:] = 5
    twin = cybn.BatchNorm(C, **options).restore(taken)  # any similar layer takes the snapshot
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
    """A snapshot also copies the statistics that drift compares."""
    bn = trained(rng)
    before = bn.running_mean
    bn(batch(rng))
    taken, drift = bn.snapshot(), bn.drift()
    before[:] = 99
    for _ in range(2):
        assert not (bn.restore(taken).drift().shift - drift.shift).any()
        bn._running.seen[1].mean[:] = 7


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


# ---- set_statistics and drift ------------------------------------------------------------


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
    now = bn.drift(x)  # the running statistics moved towards x
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
        with pytest.raises(RuntimeError, match="no batch has updated"):
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
        with pytest.raises(RuntimeError, match="no batch has updated"):
            bn.drift()
