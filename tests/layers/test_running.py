"""Running statistics agree with their closed forms in float64, after 1 to 1000 updates."""

import numpy as np
import pytest

import cybn
from cybn import reference

C = 4
BATCHES = 16  # different batches, used in turn
BATCH_EPS = 2  # a batch's own mean and variance are right to this many eps of its dtype

each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])
each_ddof = pytest.mark.parametrize("ddof", [0, 1])


@pytest.fixture
def batches(rng):
    loc, scale = rng.uniform(-3, 3, (BATCHES, 1, C)), rng.uniform(0.5, 2, (BATCHES, 1, C))
    return rng.standard_normal((BATCHES, 6, C)) * scale + loc


def statistics(batches, dtype, ddof, updates):
    """Return the mean and variance of the batch of each update: two arrays (updates, C)."""
    all_moments = [reference.moments(x.astype(dtype)) for x in batches]
    turns = np.arange(updates) % BATCHES
    return (
        np.array([m.mean for m in all_moments])[turns],
        np.array([m.var(ddof) for m in all_moments])[turns],
    )


def closed_form(start, values, momentum, tracked=0):
    """Return the running value after `values`, from `start`, which counts as `tracked` batches."""
    n = len(values)
    if momentum is None:
        return (start * tracked + values.sum(axis=0)) / (tracked + n)
    weights = momentum * (1 - momentum) ** np.arange(n - 1, -1, -1)
    return (1 - momentum) ** n * start + weights @ values


def check(bn, start, stats, momentum, figure, tracked=0):
    """Compare a layer's running statistics with the closed form.

    Each update rounds once, by at most half an eps of the layer's dtype. Later updates reduce a
    rounding error, so about min(updates, 1 / momentum) of them add up. With momentum None they
    are reduced as slowly as the mean moves, and all of them add up.
    """
    n = len(stats[0])
    memory = n if momentum is None else min(n, 1 / momentum) if momentum else 0
    for got, first, values in zip((bn.running_mean, bn.running_var), start, stats, strict=True):
        want = closed_form(first, values, momentum, tracked)
        size = max(np.abs(values).max(), np.abs(first).max())
        eps = np.finfo(bn.dtype).eps
        assert got.dtype == bn.dtype
        error = np.abs(got - want).max() / size
        figure(10, f"max relative error, {bn.dtype}", error)
        assert error <= (memory / 2 + BATCH_EPS) * eps
    assert bn.num_batches_tracked == tracked + n


@pytest.mark.row(10)
@each_ddof
@each_dtype
@pytest.mark.parametrize("momentum", [0, 0.1, 1, None])
@pytest.mark.parametrize("updates", [1, 2, 10, 1000])
def test_closed_form(updates, momentum, dtype, ddof, batches, figure):
    bn = cybn.BatchNorm(C, momentum=momentum, running_ddof=ddof, dtype=dtype)
    for i in range(updates):
        bn(batches[i % BATCHES].astype(dtype))
    stats = statistics(batches, dtype, ddof, updates)
    check(bn, (np.zeros(C), np.ones(C)), stats, momentum, figure)


@pytest.mark.row(10)
@each_ddof
@each_dtype
@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_a_step_rounds_once(momentum, dtype, ddof, batches):
    """Updates are computed in float64 from the running values and the batch's, and rounded once."""
    bn = cybn.BatchNorm(C, momentum=momentum, running_ddof=ddof, dtype=dtype)
    for i, x in enumerate(batches, 1):
        mean, var = bn.running_mean.astype(float), bn.running_var.astype(float)
        m = cybn.moments(x.astype(dtype))
        w = 1 / i if momentum is None else momentum
        bn(x.astype(dtype))
        want = (1 - w) * mean + w * m.mean, (1 - w) * var + w * (m.m2 / (m.count - ddof))
        assert bn.running_mean.tobytes() == want[0].astype(dtype).tobytes()
        assert bn.running_var.tobytes() == want[1].astype(dtype).tobytes()


@each_ddof
@each_dtype
@pytest.mark.parametrize("momentum", [0, 0.1, 1, None])
def test_training_a_trained_layer_on(momentum, dtype, ddof, batches, figure):
    start = np.linspace(-3.5, 4.25, C, dtype=dtype), np.linspace(0.125, 7, C, dtype=dtype)
    bn = cybn.BatchNorm(C, momentum=momentum, running_ddof=ddof, dtype=dtype)
    bn.running_mean, bn.running_var, bn.num_batches_tracked = *start, 7
    for x in batches[:10]:
        bn(x.astype(dtype))
    check(bn, start, statistics(batches, dtype, ddof, 10), momentum, figure, tracked=7)


@pytest.mark.row(10)
def test_training_on_after_loading(batches):
    one = cybn.BatchNorm(C, dtype=np.float64)
    two = cybn.BatchNorm(C, dtype=np.float64)
    for i, x in enumerate(batches):
        one(x)
        if i == BATCHES // 2:
            two.load_state_dict(one.state_dict())
        elif i > BATCHES // 2:
            two(x)
    for name, value in one.state_dict().items():
        np.testing.assert_array_equal(two.state_dict()[name], value)


@pytest.mark.row(10)
def test_momentum_0_keeps_every_bit(batches):
    bn = cybn.BatchNorm(C, momentum=0)
    bn.running_mean, bn.running_var = np.full(C, 1 / 3), np.full(C, 2 / 3)
    mean, var = bn.running_mean.copy(), bn.running_var.copy()
    for x in batches:
        bn(x.astype(np.float32))
    np.testing.assert_array_equal(bn.running_mean, mean)
    np.testing.assert_array_equal(bn.running_var, var)
    assert bn.num_batches_tracked == BATCHES


@pytest.mark.row(10)
def test_momentum_1_is_the_last_batch(batches):
    bn = cybn.BatchNorm(C, momentum=1, dtype=np.float64)
    for x in batches:
        bn(x)
    last = cybn.moments(batches[-1])
    np.testing.assert_array_equal(bn.running_mean, last.mean)
    np.testing.assert_array_equal(bn.running_var, last.var(ddof=1))


@pytest.mark.row(10)
@pytest.mark.parametrize("momentum", [0.1, 0.5, 1])
def test_momentum_weighs_the_new_value(momentum):
    bn = cybn.BatchNorm(1, momentum=momentum, dtype=np.float64)
    bn(np.array([[2.0], [4.0]]))  # mean 3, unbiased variance 2
    assert bn.running_mean == momentum * 3
    assert bn.running_var == (1 - momentum) * 1 + momentum * 2


@pytest.mark.row(10)
def test_the_cumulative_mean_of_a_new_layer_forgets_0_and_1():
    bn = cybn.BatchNorm(1, momentum=None, dtype=np.float64)
    bn(np.array([[2.0], [4.0]]))
    assert bn.running_mean == 3
    assert bn.running_var == 2
    bn(np.array([[0.0], [8.0]]))  # mean 4, unbiased variance 32
    assert bn.running_mean == 3.5
    assert bn.running_var == 17


def test_only_training_forwards_count(batches):
    bn = cybn.BatchNorm(C, dtype=np.float64)
    bn(batches[0])
    bn.backward(batches[0])
    mean = bn.running_mean.copy()
    bn.eval()(batches[1])
    bn.backward(batches[1])
    assert bn.num_batches_tracked == 1
    np.testing.assert_array_equal(bn.running_mean, mean)


def test_a_batch_replaces_the_arrays(batches):
    bn = cybn.BatchNorm(C, dtype=np.float64)
    mean, var = bn.running_mean, bn.running_var
    bn(batches[0])
    np.testing.assert_array_equal([mean, var], [np.zeros(C), np.ones(C)])


@pytest.mark.row(7)
def test_nan_stays_in_its_channel(batches):
    bn, clean = cybn.BatchNorm(C, dtype=np.float64), cybn.BatchNorm(C, dtype=np.float64)
    clean(batches[0])
    dirty = batches[0].copy()
    dirty[2, 1] = np.nan
    bn(dirty)
    assert np.isnan([bn.running_mean[1], bn.running_var[1]]).all()
    for got, want in [(bn.running_mean, clean.running_mean), (bn.running_var, clean.running_var)]:
        np.testing.assert_array_equal(np.delete(got, 1), np.delete(want, 1))


def unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    moved = np.ndarray(array.shape, array.dtype, memory, 1)
    moved[...] = array
    return moved


class Mapped(np.ndarray):
    """A subclass of ndarray, like `numpy.memmap`."""


@pytest.mark.parametrize(
    "moved", [unaligned, lambda a: a.view(Mapped), lambda a: a.astype(a.dtype.newbyteorder())]
)
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics_in_memory_of_any_kind(batches, moved, momentum):
    """Unpickling may put them into unaligned memory, or map them from a file."""
    bn, other = cybn.BatchNorm(C, momentum=momentum), cybn.BatchNorm(C, momentum=momentum)
    for x in batches[:3]:
        bn(x)
        other(x)
        mean, var, tracked = other._running.values
        other._running.replace(mean=moved(mean), var=moved(var))
        assert bn.num_batches_tracked == tracked
    bn(batches[3])
    other(batches[3])
    for a, b in zip(bn._running.values, other._running.values, strict=True):
        assert type(a) is type(b)
        np.testing.assert_array_equal(a, b)
    assert other.running_mean.flags.aligned
    assert other.running_mean.dtype.isnative
