"""Moments: one immutable type for statistics, which is merged without reading the data again."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from bounds import ULP64

import cybn
from cybn import Moments

A = Moments(2, [1.0, -1.0], [2.0, 0.0])
B = Moments(6, [5.0, -1.0], [3.0, 8.0])


def empty(channels=2):
    return Moments(0, np.zeros(channels), np.zeros(channels))


def test_holds_float64_copies():
    mean = np.array([1, 2], np.float32)
    m = Moments(3, mean, [4, 5])
    mean[:] = 9
    assert m.mean.dtype == m.m2.dtype == np.float64
    assert m.mean.tolist() == [1, 2]
    assert m.m2.tolist() == [4, 5]
    assert type(m.count) is int
    assert type(Moments(np.int32(3), mean, mean).count) is int


@pytest.mark.parametrize("m", [A, cybn.moments(np.eye(3)), cybn.batch_norm(np.eye(3))[1]])
def test_immutable(m):
    for name in ("count", "mean", "m2", "other"):
        with pytest.raises(AttributeError, match=f"immutable: {name} cannot be set"):
            setattr(m, name, 1)
    with pytest.raises(AttributeError, match="immutable: mean cannot be deleted"):
        del m.mean
    for array in (m.mean, m.m2):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    m.var()[:] = -1  # a new array each time
    assert (m.var() >= 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, [0.0], [0.0]), "count is -1; it must not be negative"),
        ((1, 0.0, [0.0]), r"mean has shape \(\); it must have shape \(C,\)"),
        ((1, [0.0], [[0.0]]), r"m2 has shape \(1, 1\); it must have shape \(C,\)"),
        ((2, [0.0, 0.0], [1.0, -1.0]), "m2 is -1.0 in channel 1; it must not be negative"),
        ((1, [0.0], [0.0, 0.0]), r"mean has shape \(1,\) and m2 has shape \(2,\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Moments(*arguments)


def test_a_fractional_count_is_not_cut_short():
    assert Moments(2.5, [0.0], [5.0]).count == 2.5
    assert Moments(2.5, [0.0], [5.0]).var() == 2


def test_var():
    np.testing.assert_array_equal(B.var(), B.m2 / 6)
    np.testing.assert_array_equal(B.var(ddof=1), B.m2 / 5)
    with pytest.raises(ValueError, match="ddof=1 needs a count of more than 1, and count is 1"):
        Moments(1, [0.0], [0.0]).var(ddof=1)
    with pytest.raises(ValueError, match="ddof=0 needs a count of more than 0, and count is 0"):
        empty().var()


def test_var_of_a_channel_without_degrees_of_freedom():
    m = Moments(np.array([1, 3, 0]), [1.0, 2.0, 0.0], [0.0, 6.0, 0.0])
    np.testing.assert_array_equal(m.var(), [0.0, 2.0, np.nan])
    np.testing.assert_array_equal(m.var(ddof=1), [np.nan, 3.0, np.nan])


def test_many_merges_keep_the_last_bit():
    """Merges keep the rounding error of the mean, without which it would be about 20 units off."""
    values = 1e6 + np.random.default_rng(0).standard_normal(5000)
    total = Moments.empty(1)
    for value in values:
        total = total.merge(Moments(1, [value], [0.0]))
    assert abs(total.mean[0] - math.fsum(values) / 5000) <= np.spacing(1e6)


def test_len_is_the_number_of_channels():
    assert len(A) == 2
    assert len(Moments(5, [], [])) == 0


def test_equality():
    assert Moments(2, [1.0, -1.0], [2.0, 0.0]) == A
    assert Moments(3, [1.0, -1.0], [2.0, 0.0]) != A
    assert Moments(2, [1.0, -2.0], [2.0, 0.0]) != A
    assert Moments(2, [1.0, -1.0], [2.0, 1.0]) != A
    assert Moments(2, [1.0], [2.0]) != A
    assert (2, A.mean, A.m2) != A
    assert Moments(2, [np.nan], [np.nan]) == Moments(2, [np.nan], [np.nan])
    with pytest.raises(TypeError, match="unhashable"):
        hash(A)


def test_repr():
    assert repr(A) == "Moments(count=2, mean=[ 1., -1.], var=[1., 0.])"
    assert repr(empty(1)) == "Moments(count=0, mean=[0.], var=[0.])"
    assert repr(Moments(1, np.arange(99), np.zeros(99))).startswith(
        "Moments(count=1, mean=[ 0.,  1.,  2., ..., 96., 97., 98.]"
    )


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies(duplicate, rng):
    x = rng.standard_normal((9, 2))
    moments = cybn.moments(x)
    twin = duplicate(moments)
    assert twin == moments
    assert not twin.mean.flags.writeable
    assert not twin.m2.flags.writeable
    dx = cybn.batch_norm_backward(x, x, moments)[0]
    np.testing.assert_array_equal(cybn.batch_norm_backward(x, x, twin)[0], dx)


# ---- merge -------------------------------------------------------------------------------


def test_merge_by_hand():
    # 0, 2 and a sample of 6 about 5: the mean moves by 4 * 6 / 8, M2 grows by 16 * 2 * 6 / 8
    m = A.merge(B)
    assert m == Moments(8, [4.0, -1.0], [2 + 3 + 24.0, 8.0])
    assert Moments(2, [1.0, -1.0], [2.0, 0.0]) == A  # A is unchanged
    assert not m.mean.flags.writeable


def test_merge_with_nothing():
    assert A.merge(empty()) == A
    assert empty().merge(A) == A
    assert empty().merge(empty()) == empty()


def test_merge_of_other_channels():
    with pytest.raises(ValueError, match="other has 3 channels; it must have 2"):
        A.merge(empty(3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0, 1e4])
def test_random_chunkings(offset, dtype, level, rng):
    x = (rng.standard_normal((500, 7)) + offset).astype(dtype)
    whole = cybn.moments(x)
    std = np.sqrt(whole.var())
    for _ in range(20):
        cuts = np.sort(rng.choice(np.arange(1, len(x)), rng.integers(1, 40), replace=False))
        merged = empty(7)
        for part in np.split(x, cuts):
            merged = merged.merge(cybn.moments(part))
        # float32 sums short runs in float32, about a pivot; each merge rounds the mean in float64
        eps = np.finfo(dtype).eps
        rounding = (len(cuts) + 1) * np.finfo(float).eps * np.abs(whole.mean)
        assert merged.count == whole.count == len(x)
        assert (np.abs(merged.mean - whole.mean) <= 4 * eps * std + rounding).all()
        assert (np.abs(merged.m2 - whole.m2) <= 16 * eps * whole.m2 + len(x) * std * rounding).all()


def test_merge_is_exact_in_order_and_close_in_another(rng):
    parts = [cybn.moments(rng.standard_normal((9, 4))) for _ in range(8)]

    def merged(parts):
        total = parts[0]
        for part in parts[1:]:
            total = total.merge(part)
        return total

    assert merged(parts) == merged(parts)
    there, back = merged(parts), merged(parts[::-1])
    assert (np.abs(there.m2 - back.m2) <= ULP64 * there.m2).all()


@pytest.mark.parametrize("count", [2**24 + 1, 2**31 + 1, 2**53 + 1, 2**70 + 1])
def test_large_counts_are_exact(count):
    m = Moments(count, [0.0], [float(count)]).merge(Moments(3, [0.0], [3.0]))
    assert m.count == count + 3
    assert m.merge(m).count == 2 * (count + 3)
    assert math.isclose(m.var()[0], 1, rel_tol=ULP64)


@pytest.mark.parametrize("big", [2**31 + 1, 2**53 + 1])
def test_merging_one_value_into_very_many(big):
    m = Moments(big, [0.25], [2.0 * big]).merge(Moments(1, [1.25], [0.0]))
    mean = Fraction(1, 4) + Fraction(1, big + 1)
    m2 = 2 * Fraction(big) + Fraction(big, big + 1)
    assert abs(Fraction(m.mean[0]) - mean) <= Fraction(ULP64) * mean
    assert abs(Fraction(m.m2[0]) - m2) <= Fraction(ULP64) * m2


def test_a_count_in_an_array_of_no_axes():
    """A state dict has such counts; a float stays a float."""
    assert cybn.Moments(np.array(2.5), [1.0], [2.0]).count == 2.5
    assert cybn.Moments(np.array(3), [1.0], [2.0]).count == 3


def test_merge_with_a_channel_that_is_empty_on_one_side():
    x = np.array([[1e160, 1.0], [1e160, 2.0], [1e160, 3.0]])
    half = cybn.Moments.empty(2).update(x, mask=np.array([[False, True]] * 3))
    for merged in (half.merge(cybn.moments(x)), cybn.moments(x).merge(half)):
        assert merged.m2[0] == 0
        assert list(merged.count) == [3, 6]


# ---- sums, standard deviations, and arrays that are read by slices -----------------------------


def test_sum_takes_moments(rng):
    x = rng.standard_normal((90, 3)) + 1
    parts = [cybn.Moments.empty(3).update(part) for part in np.split(x, 9)]
    total = sum(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert total == merged
    assert sum(parts[1:], parts[0]) == merged
    assert parts[0] + parts[1] == parts[0].merge(parts[1])
    for wrong in (lambda: 1 + parts[0], lambda: parts[0] + 0, lambda: 0.0 + parts[0]):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()
    with pytest.raises(ValueError, match="other has 2 channels"):
        sum([parts[0], cybn.Moments.empty(2).update(x[:, :2])])


def test_std(rng):
    x = rng.standard_normal((40, 3)) * [1, 2, 3]
    m = cybn.Moments.empty(3).update(x)
    for ddof in (0, 1):
        np.testing.assert_allclose(m.std(ddof), x.std(0, ddof=ddof), rtol=1e-14)
        np.testing.assert_array_equal(m.std(ddof), np.sqrt(m.var(ddof)))
    with pytest.raises(ValueError, match="needs a count of more than"):
        cybn.Moments.empty(3).std()


class Store:
    """An array that is read by slices, and records what is read."""

    def __init__(self, array, chunks=None):
        self.array, self.shape, self.dtype, self.reads = array, array.shape, array.dtype, []
        if chunks is not None:
            self.chunks = chunks

    def __getitem__(self, index):
        piece = self.array[index]
        self.reads.append((index, piece.size))
        return piece.copy()


@pytest.mark.parametrize("axis", [1, -1, 0])
@pytest.mark.parametrize("chunks", [None, (64, 1, 8), (7, 3, 8), ((100, 28), (3,), (8, 8))])
def test_arrays_that_are_read_by_slices(chunks, axis, rng, monkeypatch):
    from cybn import _chunks

    monkeypatch.setattr(_chunks, "FEW", 200)  # many pieces
    monkeypatch.setattr(_chunks, "MOST", 4000)
    x = rng.standard_normal((128, 3, 16), dtype=np.float32)
    store = Store(x, chunks)
    channels = x.shape[axis]
    m = cybn.Moments.empty(channels).update(store, axis=axis)
    assert m == cybn.Moments.empty(channels).update(x, axis=axis)
    assert max(size for _, size in store.reads) <= 4000
    mask = rng.random(x.shape) < 0.5
    assert cybn.Moments.empty(channels).update(store, axis=axis, mask=mask) == cybn.Moments.empty(
        channels
    ).update(x, axis=axis, mask=mask)
    if axis == 1 and chunks == (64, 1, 8):  # each block is read for a few pieces at most
        touched = [i for index, _ in store.reads[: len(store.reads) // 2] for i in
                   range(index[0].start // 64, -(-index[0].stop // 64))]  # fmt: skip
        assert touched.count(0) <= 2


@pytest.mark.parametrize("axis", [1, -1, 0])
@pytest.mark.parametrize("form", ["whole", "less an axis", "the last axis", "one a sample"])
def test_selections_that_are_read_by_slices(form, axis, rng, monkeypatch):
    """A mask or weights in a file are read piece by piece with the data, in any allowed shape."""
    from cybn import _chunks

    monkeypatch.setattr(_chunks, "FEW", 200)
    monkeypatch.setattr(_chunks, "MOST", 4000)
    x = rng.standard_normal((128, 3, 16), dtype=np.float32)
    without = tuple(np.delete(x.shape, axis))
    shape = {
        "whole": x.shape,
        "less an axis": without,
        "the last axis": without[1:],
        "one a sample": (*without[:1], 1),
    }[form]
    channels = x.shape[axis]
    mask, weights = rng.random(shape) < 0.7, rng.integers(0, 4, shape).astype(np.float32)
    empty = cybn.Moments.empty(channels)
    for given in ({"mask": mask}, {"weights": weights}, {"mask": mask, "weights": weights}):
        stores = {name: Store(values, None) for name, values in given.items()}
        assert empty.update(Store(x, None), axis=axis, **stores) == empty.update(
            x, axis=axis, **given
        )
        for store in stores.values():
            assert max(size for _, size in store.reads) <= 4000
            assert store.reads[0][1] < mask.size or mask.size < 400
    with pytest.raises(TypeError, match="mask is float32; it must be bool"):
        empty.update(x, axis=axis, mask=Store(weights, None))
    with pytest.raises(ValueError, match="weights has the value -1"):
        empty.update(x, axis=axis, weights=Store(weights - 5 * (weights == 3) + 1, None))


def test_blocks_are_not_read_once_a_row(monkeypatch):
    from cybn import _chunks

    monkeypatch.setattr(_chunks, "FEW", 32)
    store = Store(np.ones((128, 1, 32)), (64, 1, 32))
    cybn.Moments.empty(1).update(store)
    assert [index[0] for index, _ in store.reads] == [slice(0, 64), slice(64, 128)]


def test_what_stores_refuse():
    store = Store(np.ones((4, 3), np.uint8))
    with pytest.raises(TypeError, match=r"x is uint8.*piece by piece"):
        cybn.Moments.empty(3).update(store)
    assert not store.reads
    with pytest.raises(ValueError, match="with 3 channels on axis 1"):
        cybn.Moments.empty(2).update(Store(np.ones((4, 3))))
    with pytest.raises(ValueError, match="at least 2 axes"):
        cybn.Moments.empty(2).update(Store(np.ones(4)))
    assert cybn.Moments.empty(3).update(Store(np.ones((0, 3)))).count == 0
    with pytest.raises(TypeError, match="x is a masked array"):
        cybn.Moments.empty(3).update(Store(np.ma.array(np.ones((4, 3)))))


@pytest.mark.parametrize("chunks", [None, True, (16, 1, 8)])
def test_hdf5(chunks, tmp_path, rng):
    h5py = pytest.importorskip("h5py")
    x = rng.standard_normal((100, 3, 16), dtype=np.float32)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("x", data=x, chunks=chunks)
        assert cybn.Moments.empty(3).update(data) == cybn.Moments.empty(3).update(x)
        half = file.create_dataset("half", data=x.astype(np.float16))
        assert cybn.Moments.empty(3).update(half) == cybn.Moments.empty(3).update(half[()])
        mask = file.create_dataset("mask", data=x > 0, chunks=chunks)
        assert cybn.Moments.empty(3).update(data, mask=mask) == cybn.Moments.empty(3).update(
            x, mask=x > 0
        )


def test_zarr(tmp_path, rng):
    zarr = pytest.importorskip("zarr")
    x = rng.standard_normal((100, 3, 16), dtype=np.float32)
    data = zarr.create_array(str(tmp_path / "x.zarr"), shape=x.shape, chunks=(9, 3, 5), dtype="f4")
    data[:] = x
    assert cybn.Moments.empty(3).update(data) == cybn.Moments.empty(3).update(x)
