"""`Moments` as an accumulator: pieces, selections, and files too large to be copied."""

import pickle
import tracemalloc

import numpy as np
import pytest
from bounds import column

import cybn
from cybn import Moments, _chunks

C = 5
STD = np.arange(1.0, C + 1)
# (dtype, mean in standard deviations, bound of the relative error of the variance)
BARS = [
    (np.float32, 0.0, 1e-12),
    (np.float64, 0.0, 1e-12),
    (np.float32, 1e4, 1e-10),
    (np.float64, 1e4, 1e-10),
    (np.float64, 1e8, 1e-8),
]


def collect(parts, channels=C, **options):
    m = Moments.empty(channels)
    for part in parts:
        m = m.update(part, num_threads=1, **options)
    return m


def exact(x, axis=1):
    """Return mean and variance in long double, the variance about the mean."""
    x, axis = x.astype(np.longdouble), axis % x.ndim
    others = tuple(i for i in range(x.ndim) if i != axis)
    mean = x.mean(others)
    return mean, ((x - column(mean, x.ndim, axis)) ** 2).mean(others)


def check(m, x, axis=1, var_bar=1e-12, right=None):
    """Check the mean to 4 ulp of max(|mean|, std), and the variance to a relative var_bar.

    `right` is `exact(x, axis)`, or None.
    """
    mean, var = right or exact(x, axis)
    ulp = np.spacing(np.maximum(np.abs(mean), np.sqrt(var)).astype(float))
    assert (np.abs(m.mean - mean) <= 4 * ulp).all()
    assert (np.abs(m.var() - var) <= var_bar * var).all()
    return float(np.max(np.abs(m.mean - mean) / ulp)), float(np.max(np.abs(m.var() - var) / var))


# ---- chunkings ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunkings", [200, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "offset", "bar"), BARS)
def test_random_chunkings(dtype, offset, bar, chunkings, rng):
    x = ((rng.standard_normal((1500, C)) + offset) * STD).astype(dtype)
    worst, right = [], exact(x)
    for _ in range(chunkings):
        pieces = rng.integers(1, rng.choice([3, 30, 150]))
        cuts = np.sort(rng.choice(np.arange(1, len(x)), pieces, replace=False))
        m = collect(np.split(x, cuts))
        assert m.count == len(x)
        worst.append(check(m, x, var_bar=bar, right=right))
    ulps, relative = np.max(worst, axis=0)
    print(f"{dtype.__name__} {offset:g}: mean {ulps:.2f} ulp, variance {relative:.1e}")


@pytest.mark.parametrize("parts", [1, 1500])
@pytest.mark.parametrize(("dtype", "offset", "bar"), BARS)
def test_in_one_go_and_value_by_value(dtype, offset, bar, parts, rng):
    x = ((rng.standard_normal((1500, C)) + offset) * STD).astype(dtype)
    check(collect(np.split(x, parts)), x, var_bar=bar)


def test_merging_goes_on_as_exactly_as_updating(rng):
    x = (rng.standard_normal((1500, C)) + 1e8) * STD
    halves = [collect(np.split(half, 150)) for half in np.split(x, 2)]
    check(halves[0].merge(halves[1]), x, var_bar=1e-8)


def test_one_piece_of_float64_has_the_bits_of_moments(level, rng):
    for axis in (1, -1):
        x = rng.standard_normal((9, C, 30, C)) + 3
        assert Moments.empty(C).update(x, axis=axis) == cybn.moments(x, axis=axis)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bits_on_any_number_of_threads(threads, rng):
    x = rng.standard_normal((300, C, 400), dtype=np.float32)
    assert Moments.empty(C).update(x, num_threads=threads) == Moments.empty(C).update(x)


def test_update_returns_a_new_one(rng):
    empty = Moments.empty(C)
    m = empty.update(rng.standard_normal((9, C)))
    assert empty == Moments(0, np.zeros(C), np.zeros(C))
    assert m.count == 9
    assert m.update(np.empty((0, C))) is m
    assert not m.mean.flags.writeable


# ---- arrays of any size ------------------------------------------------------------------

LAYOUTS = [
    ((7, C, 6, 5), 1),
    ((7, 6, 5, C), -1),
    ((C, 70), 0),
    ((40, 1, 3), 1),
    ((2, 300, 3), 1),
    ((30, C, 4), 0),
]


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
@pytest.mark.parametrize("few", [1, 50, 10**6])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pieces_cover_the_array_once(shape, axis, few, order, monkeypatch, rng):
    monkeypatch.setattr(_chunks, "FEW", few)
    monkeypatch.setattr(_chunks, "ROWS", 2)
    monkeypatch.setattr(_chunks, "MOST", 60)
    x = np.zeros(shape, order=order)
    axis %= x.ndim
    pieces = _chunks.Chunks(x.shape, x.strides, axis)
    sizes = []
    for index in pieces:
        x[index] += 1
        sizes.append(x[index].size)
        assert x[index].shape[axis] == shape[axis]
    assert (x == 1).all()
    assert len(pieces) == len(sizes)
    assert max(sizes) <= max(60, shape[axis])
    x[...] = rng.standard_normal(shape) + 5
    check(Moments.empty(shape[axis]).update(x, axis=axis), x, axis)


@pytest.mark.parametrize("dtype", ["<f4", ">f8"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_memory_mapped_file_in_bounded_memory(turned, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(_chunks, "FEW", 1 << 12)
    monkeypatch.setattr(_chunks, "MOST", 1 << 14)
    shape, count = (4000, 4, 100), 400_000  # 6 or 13 MB, read in pieces of at most 128 KiB
    x = np.memmap(tmp_path / "x", dtype, "w+", shape=shape[::-1] if turned else shape)
    x = x.T if turned else x
    for i, part in enumerate(np.array_split(x, 10)):
        part[...] = i
    tracemalloc.start()
    m = Moments.empty(4).update(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 8 * (1 << 14)
    assert m.count == count
    np.testing.assert_allclose(m.mean, 4.5, rtol=1e-15)
    np.testing.assert_allclose(m.var(), 8.25, rtol=1e-15)


def test_progress_sees_each_piece(rng):
    x = rng.standard_normal((70, 3, 2000))
    seen = []

    def bar(pieces):
        seen.append(len(pieces))
        for piece in pieces:
            yield piece
            seen.append(1)

    assert Moments.empty(3).update(x, progress=bar) == Moments.empty(3).update(x)
    assert seen == [2, 1, 1]


def test_tqdm(rng, capsys):
    tqdm = pytest.importorskip("tqdm")
    m = Moments.empty(3).update(rng.standard_normal((70, 3, 2000)), progress=tqdm.tqdm)
    assert m.count == 140_000
    assert "2/2" in capsys.readouterr().err


# ---- mask, weights, lengths --------------------------------------------------------------

each_axis = pytest.mark.parametrize("axis", [1, -1], ids=["channels-first", "channels-last"])


def poisoned(rng, axis, dtype=np.float32):
    """Return a batch with channels on `axis`, and its mask; x is NaN where the mask is False."""
    x = (rng.standard_normal((12, C, 7, 3)) * column(STD, 4, 1) + 3).astype(dtype)
    mask = rng.random((12, 1, 7, 3)) < 0.6
    x[np.broadcast_to(~mask, x.shape)] = np.nan
    return np.moveaxis(x, 1, axis), np.moveaxis(mask, 1, axis)


def near(m, wanted):
    """Check that moments are equal except for the last bits, which the order of values changes."""
    assert m.count == wanted.count
    np.testing.assert_allclose(m.mean, wanted.mean, rtol=1e-14)
    np.testing.assert_allclose(m.m2, wanted.m2, rtol=1e-13)


@each_axis
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_masked_is_the_same_as_gathered(axis, dtype, rng):
    x, mask = poisoned(rng, axis, dtype)
    m = Moments.empty(C).update(x, axis=axis, mask=mask)
    valid = np.moveaxis(x, axis, -1)[np.moveaxis(mask, axis, -1)[..., 0]]
    near(m, cybn.moments(valid.astype(float)))
    assert type(m.count) is int
    assert m.count == mask.sum()


def test_a_mask_that_differs_by_channel(rng):
    x = rng.standard_normal((50, C)) + 3
    mask = rng.random((50, C)) < 0.7
    mask[:, 2] = False
    m = Moments.empty(C).update(np.where(mask, x, np.nan), mask=mask)
    assert m.count.dtype == np.int64
    np.testing.assert_array_equal(m.count, mask.sum(0))
    assert m.mean[2] == m.m2[2] == 0
    assert np.isnan(m.var()[2])
    for c in (0, 1, 3, 4):
        alone = cybn.moments(x[mask[:, c], c][:, None])
        np.testing.assert_allclose((m.mean[c], m.m2[c]), (alone.mean[0], alone.m2[0]), rtol=1e-14)
    twice = m.update(x)  # merges one count with a count for each channel
    np.testing.assert_array_equal(twice.count, mask.sum(0) + 50)
    everything = [np.concatenate([x[mask[:, c], c], x[:, c]]) for c in range(C)]
    np.testing.assert_allclose(twice.var(1), [v.var(ddof=1) for v in everything], rtol=1e-13)
    assert repr(m).startswith("Moments(count=[")
    assert pickle.loads(pickle.dumps(m)) == m
    assert twice.merge(Moments.empty(C)) is twice
    with pytest.raises(ValueError, match="read-only"):
        m.count[0] = 1


@each_axis
def test_pieces_of_a_selection(axis, monkeypatch, rng):
    x, mask = poisoned(rng, axis)
    weights = rng.random((12, 1, 1, 1))
    whole = Moments.empty(C).update(x, axis=axis, mask=mask, weights=weights)
    monkeypatch.setattr(_chunks, "FEW", 100)
    monkeypatch.setattr(_chunks, "ROWS", 2)
    parts = Moments.empty(C).update(x, axis=axis, mask=mask, weights=weights)
    np.testing.assert_allclose(parts.count, whole.count, rtol=1e-14)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(parts.m2, whole.m2, rtol=1e-13)


@pytest.mark.parametrize("by_channel", [False, True])
def test_whole_weights_are_repetitions(by_channel, rng):
    x = rng.standard_normal((60, C)) + 3
    weights = rng.integers(0, 4, (60, C if by_channel else 1))
    x[np.broadcast_to(weights == 0, x.shape)] = np.nan  # never read
    m = Moments.empty(C).update(x, weights=weights)
    for c in range(C):
        times = weights[:, c if by_channel else 0]
        values = np.repeat(x[:, c], times)
        count = m.count[c] if by_channel else m.count
        assert count == times.sum()
        np.testing.assert_allclose(m.mean[c], values.mean(), rtol=1e-14)
        for ddof in (0, 1):
            np.testing.assert_allclose(m.var(ddof)[c], values.var(ddof=ddof), rtol=1e-13)
    if not by_channel:
        assert type(m.count) is float


def test_weights_of_one_change_only_the_type_of_the_count(rng):
    x = rng.standard_normal((60, C)) + 1e4
    plain, weighted = Moments.empty(C).update(x), Moments.empty(C).update(x, weights=1.0)
    assert type(weighted.count) is float
    assert weighted.count == plain.count
    check(weighted, x, var_bar=1e-10)
    both = plain.merge(weighted)
    assert type(both.count) is float
    assert both.count == 120


@each_axis
def test_lengths(axis, rng):
    x = rng.standard_normal((6, C, 9)) + 3
    lengths = np.array([9, 0, 4, 1, 9, 7], np.uint8)
    mask = np.arange(9) < lengths[:, None, None]
    x[np.broadcast_to(~mask, x.shape)] = np.nan
    valid = x.transpose(0, 2, 1)[mask[:, 0]]
    x = np.moveaxis(x, 1, axis)
    m = Moments.empty(C).update(x, axis=axis, lengths=lengths)
    near(m, cybn.moments(valid))
    m = Moments.empty(C).update(x, axis=axis, lengths=lengths, mask=np.arange(9) % 2 == 0)
    assert m.count == sum((n + 1) // 2 for n in lengths.tolist())


@pytest.mark.parametrize("axis", [1, 2, 0])
def test_a_mask_with_fewer_axes_is_read_as_batch_norm_reads_it(axis, rng):
    x = rng.standard_normal((5, 5, 5)) + 3  # axes of equal sizes, so a mask would fit on any
    for shape in ((5, 5), (5,), (1, 5), (5, 1), ()):
        mask = rng.random(shape) < 0.7 if shape else np.array(True)
        for given in ({"mask": mask}, {"weights": mask * 2.5}):
            m = Moments.empty(5).update(x, axis=axis, **given)
            same = cybn.moments(x, axis=axis, **given)
            assert m.count == same.count
            np.testing.assert_allclose(m.mean, same.mean, rtol=1e-13)
            np.testing.assert_allclose(m.m2, same.m2, rtol=1e-12)
    table = x[0]
    by_row = Moments.empty(5).update(table, mask=[True, True, True, False, False])
    assert by_row == Moments.empty(5).update(table[:3])


def test_masks_with_fewer_axes_that_do_not_fit():
    x = np.ones((4, 5, 3))
    for shape in ((5, 3), (4, 5), (5, 1)):  # fit x by NumPy's rule, or not at all
        for name, value in (("mask", np.ones(shape, bool)), ("weights", np.ones(shape))):
            match = (
                rf"{name} has shape \(\d, \d\).*broadcastable to \(4, 3\), the shape of x without"
            )
            with pytest.raises(ValueError, match=match):
                Moments.empty(5).update(x, **{name: value})
            with pytest.raises(ValueError, match=match):
                cybn.moments(x, **{name: value})


def test_nothing_selected_adds_nothing(rng):
    x = rng.standard_normal((6, C))
    m = Moments.empty(C).update(x)
    assert m.update(x, mask=np.zeros((6, 1), bool)) == m
    assert m.update(x, weights=np.zeros((6, 1))) == m


def test_nan_stays_in_its_channel(rng):
    x = rng.standard_normal((6, C))
    clean = Moments.empty(C).update(x).update(x)
    dirty = x.copy()
    dirty[3, 1] = np.nan
    m = Moments.empty(C).update(x).update(dirty)
    assert np.isnan([m.mean[1], m.m2[1]]).all()
    np.testing.assert_array_equal(np.delete(m.mean, 1), np.delete(clean.mean, 1))
    np.testing.assert_array_equal(np.delete(m.m2, 1), np.delete(clean.m2, 1))


FRAMES = (512, C, 4096)  # 40 MiB of float32


@pytest.mark.parametrize("dtype", [np.float32, np.int16, bool])
def test_weights_and_lengths_are_walked_in_bounded_memory(dtype, tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=FRAMES)
    weights = np.memmap(tmp_path / "w", dtype, "w+", shape=FRAMES)
    weights[:, :, ::3] = 1
    mask = np.memmap(tmp_path / "m", bool, "w+", shape=FRAMES)
    mask[:, :, :2000] = True
    lengths = np.full(len(x), 3000)
    tracemalloc.start()
    m = Moments.empty(C).update(x, weights=weights, mask=mask, lengths=lengths, num_threads=1)
    by_position = Moments.empty(C).update(
        x, weights=weights[:, :1], mask=mask[:, 0], lengths=lengths, num_threads=1
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    each = len(x) * len(range(0, 2000, 3))
    assert m.count.tolist() == [each] * C
    assert by_position.count == each
    piece = 8 * _chunks.FEW  # bytes of a piece in float64; a few exist at once
    assert peak < 12 * piece < x.size * 8 / 3


def test_a_bad_weight_far_in_changes_nothing(rng):
    x = rng.standard_normal((40, C, 30000))
    weights = np.ones((40, 1, 1))
    weights[35] = -1
    m = Moments.empty(C).update(x[:1])
    before, seen = m.state_dict(), []

    def bar(pieces):
        for piece in pieces:
            seen.append(piece)
            yield piece

    with pytest.raises(ValueError, match=r"weights has the value -1\.0"):
        m.update(x, weights=weights, progress=bar)
    assert len(seen) > 1
    for name, value in m.state_dict().items():
        assert value.tobytes() == before[name].tobytes()


# ---- invalid arguments -------------------------------------------------------------------

X = np.ones((4, C, 3), np.float32)
BAD = {
    "integers": (X.astype(np.uint8), {}, TypeError, r"x is uint8.*piece by piece.*astype"),
    "masked array": (np.ma.masked_array(X), {}, TypeError, "masked array"),
    "rank": (X[0, 0], {}, ValueError, "at least 2 axes"),
    "channels": (X[:, :2], {}, ValueError, r"2 channels on axis 1; these moments have 5"),
    "mask of numbers": (X, {"mask": np.ones(X.shape)}, TypeError, "mask is float64.*bool"),
    "mask of another shape": (
        X,
        {"mask": np.ones((4, 2, 3), bool)},
        ValueError,
        r"mask has shape \(4, 2, 3\).*broadcastable.*\(4, 5, 3\)",
    ),
    "mask of more axes": (X, {"mask": np.ones((2, 4, C, 3), bool)}, ValueError, "mask has shape"),
    "negative weights": (X, {"weights": -1.0}, ValueError, r"weights has the value -1\.0"),
    "NaN weights": (X, {"weights": np.nan}, ValueError, "weights has the value nan"),
    "lengths that are too long": (X, {"lengths": [1, 2, 3, 4]}, ValueError, r"1\.\.4.*0\.\.3"),
    "too few lengths": (X, {"lengths": [1, 2]}, ValueError, r"lengths has shape \(2,\).*\(4,\)"),
    "fractional lengths": (X, {"lengths": [1.0] * 4}, TypeError, "lengths is float64"),
    "lengths without an axis": (X[..., 0], {"lengths": [1] * 4}, ValueError, "needs an axis"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    x, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        Moments.empty(C).update(x, **options)


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        ("2", TypeError, "count is '2'"),
        (np.array([1, -1]), ValueError, "count is -1"),
        (np.array([1, 2, 3]), ValueError, r"count has shape \(3,\).*\(2,\)"),
        (float("nan"), ValueError, "count is nan"),
        (-0.5, ValueError, "count is -0.5"),
        (float("inf"), ValueError, "count is inf; it must be finite"),
        ([1.0, np.inf], ValueError, "must be finite"),
        (np.array([1, 2**63], np.uint64), ValueError, "count is 9223372036854775808"),
    ],
)
def test_bad_counts(count, error, message):
    with pytest.raises(error, match=message):
        Moments(count, [0.0, 0.0], [0.0, 0.0])


def test_counts_that_are_too_large_to_be_added():
    most = np.array([2**63 - 1, 1])
    m = Moments(most, [0.0, 0.0], [0.0, 0.0])
    for other in (1, [1, 1], 2**63, most):
        with pytest.raises(OverflowError, match="too large to be added"):
            m.merge(Moments(other, [0.0, 0.0], [0.0, 0.0]))
    assert m.merge(Moments([0, 1], [0.0, 0.0], [0.0, 0.0])).count.tolist() == [2**63 - 1, 2]
    large = Moments(1e308, [0.0], [0.0])
    for other in (1e308, 10**400):
        with pytest.raises(OverflowError, match="too large to be added"):
            large.merge(Moments(other, [0.0], [0.0]))
    assert Moments(2**63, [0.0], [0.0]).merge(Moments(2**63, [0.0], [0.0])).count == 2**64


def test_weights_whose_sum_is_infinite():
    x = np.ones((6, 2))
    for shape in ((6, 1), (6, 2)):
        with pytest.raises(ValueError, match=r"weights sum to .*inf.*; scale them all"):
            Moments.empty(2).update(x, weights=np.full(shape, 1e308))
    with pytest.raises(ValueError, match="weights sum to inf; scale them all"):
        cybn.batch_norm(x, weights=np.full((6, 1), 1e308))


def test_backward_refuses_counts_that_differ_by_channel(rng):
    x = rng.standard_normal((6, C))
    m = Moments.empty(C).update(x, mask=np.ones((6, C), bool))
    with pytest.raises(ValueError, match=r"moments has count \[6 6 6 6 6\]; a channel of x has 6"):
        cybn.batch_norm_backward(x, x, m)


# ---- saving and loading ------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weights": 0.5}, {"mask": np.ones((300, C), bool)}])
def test_saved_as_plain_arrays_and_continued_to_the_bit(options, rng, tmp_path):
    parts = np.split(rng.standard_normal((600, C)) + 1e8, 2)
    m = Moments.empty(C).update(parts[0], **options)
    np.savez(tmp_path / "moments.npz", **m.state_dict())
    with np.load(tmp_path / "moments.npz", allow_pickle=False) as state:
        twin = Moments.from_state_dict(state)
    assert twin == m
    assert type(twin.count) is type(m.count)
    there, back = twin.update(parts[1], **options), m.update(parts[1], **options)
    for name, value in there.state_dict().items():
        assert value.tobytes() == back.state_dict()[name].tobytes()
    again = pickle.loads(pickle.dumps(m)).update(parts[1], **options)
    assert again.state_dict()["rest"].tobytes() == back.state_dict()["rest"].tobytes()


def test_bad_states():
    good = Moments.empty(2).state_dict()
    assert Moments.from_state_dict({k: v for k, v in good.items() if k != "rest"}).count == 0
    for bad in ({"count": 1}, good | {"var": 1}):
        with pytest.raises(ValueError, match="the state has the keys"):
            Moments.from_state_dict(bad)
    with pytest.raises(ValueError, match=r"rest has shape \(3,\)"):
        Moments.from_state_dict(good | {"rest": np.zeros(3)})


def test_weighted_squares_are_about_the_mean_itself(rng):
    """Squares are about the exact mean; its rounding at an offset of 1e12 is about 0.01."""
    x = 1e12 + rng.integers(-3, 4, (300, 2, 5))
    weights = rng.integers(1, 9, x.shape).astype(float)
    m = cybn.Moments.empty(2).update(x, weights=weights)
    e = (x - 1e12).astype(np.longdouble)
    mean = (weights * e).sum((0, 2)) / weights.sum((0, 2))
    m2 = (weights * (e - mean[:, np.newaxis]) ** 2).sum((0, 2))
    np.testing.assert_allclose(m.m2, m2.astype(float), rtol=1e-13)
