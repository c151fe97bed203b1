"""Instance norm: running statistics, population statistics and drift are averages over samples."""

import copy
import pickle

import numpy as np
import pytest
from cases import same_bits

import cybn
from cybn._sample_moments import SampleMoments

C = 3


@pytest.fixture
def data(rng):
    """Return samples whose means are far apart, which must not affect within-sample variances."""
    x = rng.standard_normal((12, C, 50)) * np.arange(1, C + 1)[:, None]
    return x + 20 * rng.standard_normal((12, C, 1))


def layer(**options):
    options = {"track_running_stats": True, "momentum": 1.0, "dtype": float} | options
    return cybn.InstanceNorm1d(C, **options)


def within(x, ddof):
    return x.mean((0, 2)), x.var(2, ddof=ddof).mean(0)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("parts", [[12], [4, 4, 4], [7, 5], [11, 1]])
def test_population_statistics_are_averages_over_the_samples(parts, ddof, data):
    norm = layer(running_ddof=ddof)
    batches = np.split(data, np.cumsum(parts)[:-1])
    m = cybn.population_statistics(norm, batches)[norm]
    mean, var = within(data, ddof)
    assert (m.count, m.samples) == (12 * 50, 12)
    np.testing.assert_allclose(m.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(m.var(ddof), var, rtol=1e-12)
    assert norm.num_batches_tracked == 0
    norm.set_statistics(m)
    np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(norm.running_var, var, rtol=1e-12)
    trained = layer(running_ddof=ddof)
    trained(data)  # momentum 1 takes the statistics of the batch
    np.testing.assert_allclose(trained.running_var, norm.running_var, rtol=1e-12)


@pytest.mark.parametrize("upstream", ["batch", "running"])
@pytest.mark.parametrize("axis", [1, -1])
def test_in_eval_and_frozen_too(axis, upstream, data):
    x = np.moveaxis(data, 1, axis)
    for norm in (layer(axis=axis).eval(), layer(axis=axis).freeze()):
        m = cybn.population_statistics(norm, [x[:5], x[5:]], upstream=upstream)[norm]
        np.testing.assert_allclose(m.var(1), within(data, 1)[1], rtol=1e-12)


def test_samples_of_different_sizes_weigh_by_their_size(data):
    norm = layer()
    m = cybn.population_statistics(norm, [data, data[:, :, :10]])[norm]
    assert m.count == 12 * 60
    np.testing.assert_allclose(
        m.mean, (data.sum((0, 2)) + data[..., :10].sum((0, 2))) / 720, rtol=1e-12
    )
    m2 = data.var(2).sum(0) * 50 + data[..., :10].var(2).sum(0) * 10
    np.testing.assert_allclose(m.var(1), m2 / (12 * 49 + 12 * 9), rtol=1e-12)


@pytest.mark.parametrize("ddof", [0, 1])
def test_drift_is_nothing_where_nothing_drifts(ddof, data):
    norm = layer(running_ddof=ddof)
    start = norm.drift(data)
    norm(data)
    assert np.abs(norm.drift(data)).max() < 1e-12
    for again in (norm.drift(), start):
        mean, var = within(data, ddof)
        np.testing.assert_allclose(again.shift, mean / np.sqrt(1 + norm.eps), rtol=1e-12)
        want = np.log((var + norm.eps) / (1 + norm.eps))
        np.testing.assert_allclose(again.log_variance_ratio, want, rtol=1e-12)
    one = norm.drift(data[0])  # one sample, without the axis of samples
    np.testing.assert_array_equal(one, norm.drift(data[:1]))
    m = cybn.population_statistics(norm, [data])[norm]
    np.testing.assert_allclose(norm.drift(m), 0, atol=1e-12)
    with pytest.raises(ValueError, match="num_features=3"):
        norm.drift(data[:, :2])


def test_what_was_measured_is_kept_and_merged(data):
    norm = layer()
    parts = [cybn.population_statistics(norm, [part])[norm] for part in (data[:5], data[5:])]
    whole = cybn.population_statistics(norm, [data])[norm]
    both = parts[0].merge(parts[1])
    np.testing.assert_allclose(both.var(1), whole.var(1), rtol=1e-12)
    for twin in (
        pickle.loads(pickle.dumps(whole)),
        copy.deepcopy(whole),
        SampleMoments.from_state_dict(whole.state_dict()),
        cybn.Moments.empty(C).merge(whole),
        whole.merge(cybn.Moments.empty(C)),
    ):
        assert twin == whole
        assert twin.samples == 12
        assert same_bits(twin.var(1), whole.var(1))
    plain = cybn.moments(data)
    assert plain != whole
    assert repr(whole).startswith("SampleMoments(count=600, mean=[")
    for one, other in [(plain, whole), (whole, plain)]:
        with pytest.raises(TypeError, match=r"within samples.* others of that kind"):
            one.merge(other)
    with pytest.raises(ValueError, match="samples is"):
        SampleMoments.from_state_dict(plain.state_dict())


def test_begun_with_nothing(data):
    """`empty` and the constructor work; the error of `update` names an alternative."""
    norm, start = layer(), SampleMoments.empty(C)
    assert (len(start), start.count, start.samples) == (C, 0, 0)
    assert SampleMoments.from_state_dict(start.state_dict()) == start
    assert repr(start).startswith("SampleMoments(count=0, mean=[0., 0., 0.]")
    with pytest.raises(TypeError, match=r"m\.merge\(cybn\.population_statistics\("):
        start.update(data)
    whole = cybn.population_statistics(norm, [data])[norm]
    for one, other in [(start, whole), (whole, start)]:
        assert one.merge(other) == whole
    assert SampleMoments(whole.count, whole.mean, whole.m2, 12) == whole
    assert SampleMoments(whole.count, whole.mean, whole.m2, 11) != whole


@pytest.mark.parametrize(
    ("count", "samples", "error", "message"),
    [
        (600, 10**9, ValueError, r"samples is 1000000000; .* at least 1 and at most count"),
        (600, 601, ValueError, "samples is 601"),
        (600, 0, ValueError, "samples is 0"),
        (600, -1, ValueError, "samples is -1"),
        (0, 1, ValueError, "samples is 1; with count 0"),
        ([600] * C, 12, ValueError, r"count has shape \(3,\); .* one number"),
        (600, 1.5, TypeError, "samples is 1.5; it must be an int"),
        (-1, 1, ValueError, "count is -1"),
    ],
)
def test_samples_that_the_count_does_not_hold(count, samples, error, message):
    zeros = np.zeros(C)
    with pytest.raises(error, match=message):
        SampleMoments(count, zeros, zeros, samples)
    state = {"count": count, "mean": zeros, "m2": zeros, "samples": samples}
    with pytest.raises(ValueError, match=message):
        SampleMoments.from_state_dict(state)


def test_no_statistics_of_a_batch_norm(data):
    """Their variance leaves out differences between samples, which a batch norm needs."""
    norm, bn = layer(), cybn.BatchNorm1d(C, dtype=float)
    within_samples = cybn.population_statistics(norm, [data])[norm]
    before = bn.state_dict()
    message = r"within samples.*population_statistics returns for this layer, or cybn\.moments"
    with pytest.raises(TypeError, match=f"^moments is .*{message}"):
        bn.set_statistics(within_samples)
    with pytest.raises(TypeError, match=f"^data is .*{message}"):
        bn.drift(within_samples)
    assert all(same_bits(before[name], value) for name, value in bn.state_dict().items())
    bn.set_statistics(cybn.moments(data))
    assert np.abs(bn.drift(cybn.moments(data)).shift).max() == 0


def test_explain(capsys, data):
    norm = layer(momentum=0.25)
    norm.explain(1)
    text = capsys.readouterr().out
    assert "training mode, with the statistics of each sample; each channel" in text
    assert "M    = values of a channel in each sample: all axes but 0 and axis 1\n" in text
    assert "running_mean = 0.75 * 0 + 0.25 * average(mean)\n" in text
    assert "running_var  = 0.75 * 1 + 0.25 * average(var * M / (M - 1))\n" in text
    names = {"average": lambda v: v.mean(0), "sqrt": np.sqrt, "sum": lambda v: v.sum(-1)[..., None]}
    names |= {"x": data[:, 1], "M": data.shape[2]}
    for line in text.splitlines():
        name, found, formula = line.partition("=")
        if found and name.strip().isidentifier() and "values of" not in line:
            names[name.strip()] = eval(formula, {}, names)
    np.testing.assert_allclose(norm(data)[:, 1], names["y"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(norm.running_mean[1], names["running_mean"][0], rtol=1e-4)
    np.testing.assert_allclose(norm.running_var[1], names["running_var"][0], rtol=1e-4)
    norm.eval().explain()
    text = capsys.readouterr().out
    assert "with the statistics of training so far" in text
    assert "average" not in text
    cybn.InstanceNorm1d(C).eval().explain()
    assert "with the statistics of each sample" in capsys.readouterr().out


def test_samples_of_no_positions_are_nothing(data):
    norm, nothing = layer(), np.empty((2, C, 0))
    empty = cybn.population_statistics(norm, [nothing, nothing])[norm]
    assert (empty.count, empty.samples) == (0, 0)
    whole = cybn.population_statistics(norm, [data])[norm]
    mixed = cybn.population_statistics(norm, [nothing, data, nothing])[norm]
    assert mixed == whole
    assert same_bits(mixed.var(1), whole.var(1))


def test_counts_too_large_to_be_added(data):
    norm = layer()
    m = cybn.population_statistics(norm, [data])[norm]
    most = SampleMoments.from_state_dict(m.state_dict() | {"count": np.finfo(float).max})
    with pytest.raises(OverflowError, match="are too large to be added"):
        most.merge(most)


@pytest.mark.parametrize("state", [None, 3, [("count", 1)]])
def test_a_state_is_a_mapping(state):
    with pytest.raises(TypeError, match=r"the state is of type \w+; it must be a dict"):
        SampleMoments.from_state_dict(state)
