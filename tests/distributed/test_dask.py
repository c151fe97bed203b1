"""Moments of dask arrays: bits do not depend on the scheduler, nor results on the chunks."""

import subprocess
import sys

import numpy as np
import pytest

da = pytest.importorskip("dask.array", reason="needs the extra dask: pip install 'cybn[dask]'")

import dask  # noqa: E402  (after importorskip)

import cybn  # noqa: E402  (after importorskip)
from cybn.dask import moments  # noqa: E402  (after importorskip)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed")


def bits(m):
    return m.count, m.mean.tobytes(), m.m2.tobytes(), m.state_dict()["rest"].tobytes()


def random_chunks(rng, shape):
    """Return chunks that cut each axis at random places."""
    found = []
    for size in shape:
        cuts = np.sort(rng.choice(np.arange(1, size), rng.integers(0, min(4, size)), replace=False))
        found.append(tuple(int(n) for n in np.diff([0, *cuts, size])))
    return tuple(found)


def chunkings(rng, number):
    """Return the largest errors over random chunkings: of the mean in ulp, of var relative."""
    ulps = variance = 0.0
    shape = (60, 7, 11)
    x = (rng.standard_normal(shape) * 3 + rng.uniform(-50, 50, 7)[:, np.newaxis]).astype("f4")
    wide = x.astype(np.longdouble)
    mean, var = wide.mean((0, 2)), wide.var((0, 2))
    for _ in range(number):
        found = moments(
            da.from_array(x, chunks=random_chunks(rng, shape)), split_every=int(rng.integers(2, 9))
        ).compute(scheduler="synchronous")
        assert found.count == 660
        ulps = max(ulps, float((np.abs(found.mean - mean) / np.spacing(np.abs(found.mean))).max()))
        variance = max(variance, float((np.abs(found.var() - var) / var).max()))
    return ulps, variance


def test_random_chunkings_are_exact(rng):
    ulps, variance = chunkings(rng, 50)
    assert ulps <= 4
    assert variance <= 1e-12


@pytest.mark.slow  # a thousand graphs
def test_a_thousand_random_chunkings_are_exact(rng):
    ulps, variance = chunkings(rng, 1000)
    print(f"mean within {ulps:.2g} ulp, variance within {variance:.2g}")
    assert ulps <= 4
    assert variance <= 1e-12


@pytest.mark.parametrize("axis", [1, -1, 0])
def test_any_number_of_workers_gives_the_same_bits(rng, axis):
    x = da.from_array(rng.standard_normal((40, 6, 30)), chunks=(7, 4, 8))
    wanted = moments(x, axis=axis)
    first = bits(wanted.compute(scheduler="synchronous"))
    for workers in (1, 2, 5):
        assert bits(wanted.compute(scheduler="threads", num_workers=workers)) == first
    whole = cybn.Moments.empty(x.shape[axis]).update(x.compute(), axis=axis)
    np.testing.assert_allclose(wanted.compute().mean, whole.mean, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("form", ["positions", "row", "full", "channels", "dask"])
@pytest.mark.parametrize("name", ["mask", "weights"])
def test_masks_and_weights_are_those_of_update(rng, form, name):
    x = rng.standard_normal((12, 5, 9))
    shape = {"positions": (12, 9), "row": (9,), "full": (12, 5, 9), "channels": (1, 5, 1)}
    given = rng.random(shape.get(form, (12, 9)))
    given = given < 0.5 if name == "mask" else given * (given < 0.7)
    wanted = cybn.Moments.empty(5).update(x, **{name: given})
    chosen = da.from_array(given, chunks=5) if form == "dask" else given
    found = moments(da.from_array(x, chunks=(5, 3, 4)), **{name: chosen}).compute()
    np.testing.assert_allclose(found.count, wanted.count, rtol=1e-14)
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(found.m2, wanted.m2, rtol=1e-12, atol=1e-13)


def test_masks_of_chunks_of_one_channel(rng):
    """The chunk of each channel has a single count, which differs between channels."""
    x, mask = rng.standard_normal((12, 5, 9)), rng.random((12, 5, 9)) < 0.5
    found = moments(da.from_array(x, chunks=(5, 1, 4)), mask=mask).compute()
    np.testing.assert_array_equal(found.count, mask.sum((0, 2)))


def test_unknown_chunks_and_empty_ones(rng):
    values = rng.standard_normal((50, 3))
    x = da.from_array(values, chunks=(7, 3))
    kept = x[x[:, 0] > 1.2]  # some chunks have no rows, and all sizes are unknown
    found = moments(kept).compute()
    wanted = cybn.Moments.empty(3).update(values[values[:, 0] > 1.2])
    assert found.count == wanted.count
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-14)


def test_masks_of_unknown_chunks(rng):
    values, mask = rng.standard_normal((50, 3, 4)), rng.random((50, 4)) < 0.5
    x, chosen = da.from_array(values, chunks=(7, 3, 4)), da.from_array(mask, chunks=(7, 4))
    kept = x[:, 0, 0] > 0
    found = moments(x[kept], mask=chosen[kept]).compute()
    rows = values[:, 0, 0] > 0
    wanted = cybn.Moments.empty(3).update(values[rows], mask=mask[rows])
    assert found.count == wanted.count
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-14, atol=1e-15)
    with pytest.raises(ValueError, match=r"mask has .* chunks, .* compute_chunk_sizes\(\)"):
        moments(x[kept], mask=da.from_array(mask[rows], chunks=(99, 2)))


def test_values_whose_variance_is_beyond_float64(rng):
    values = rng.standard_normal((40, 3, 5))
    values[:, 1] *= 1e200
    found = moments(da.from_array(values, chunks=(7, 1, 5))).compute()
    wanted = cybn.Moments.empty(3).update(values)
    assert np.isinf(found.var()[1])
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-13)
    np.testing.assert_allclose(found.std(), wanted.std(), rtol=1e-13)


def test_it_is_lazy():
    def fail(block):
        raise RuntimeError("computed")

    x = da.ones((8, 2), chunks=4).map_blocks(fail, dtype=float, meta=np.ones((0, 0)))
    lazy = moments(x)
    assert dask.is_dask_collection(lazy)
    with pytest.raises(RuntimeError, match="computed"):
        lazy.compute()


def test_bad_arguments():
    x = da.ones((8, 2, 3), chunks=4)
    with pytest.raises(TypeError, match=r"x is of type ndarray; .*Moments\.update"):
        moments(np.ones((8, 2)))
    with pytest.raises(ValueError, match=r"mask has shape \(1, 1, 5\)"):
        moments(x, mask=np.ones(5, bool))
    with pytest.raises(ValueError, match="split_every is 1"):
        moments(x, split_every=1)
    with pytest.raises(TypeError, match="x is int64"):
        moments(x.astype(int)).compute()
    with pytest.raises(TypeError, match="mask is float64; it must be bool"):
        moments(x, mask=np.ones(3)).compute()


def test_on_a_local_cluster(rng):
    """Two worker processes get the chunks and return moments."""
    distributed = pytest.importorskip("distributed", reason="needs the extra dask")
    x = da.from_array(rng.standard_normal((40, 6, 30)).astype("f4"), chunks=(7, 6, 30))
    wanted = bits(moments(x).compute(scheduler="synchronous"))
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
    )
    with cluster, distributed.Client(cluster):
        assert bits(moments(x).compute()) == wanted


@pytest.mark.slow  # 8 GiB are made and measured
def test_eight_gib_take_less_than_one():
    code = """
import resource
import dask.array as da, numpy as np, cybn.dask
base = np.random.default_rng(0).standard_normal((512, 64, 256), dtype=np.float32)
def chunk(block_info=None):
    return base + np.float32(block_info[None]["chunk-location"][0] % 7)
x = da.map_blocks(chunk, chunks=((512,) * 256, (64,), (256,)), dtype=np.float32, meta=base[:0])
assert x.nbytes == 8 * 2**30
found = cybn.dask.moments(x).compute(scheduler="threads", num_workers=2)
shifts = np.arange(256) % 7
assert found.count == 2**25
wide = base.astype(np.float64)
assert abs(found.mean - wide.mean((0, 2)) - shifts.mean()).max() < 1e-6
assert abs(found.var() - wide.var((0, 2)) - shifts.var()).max() < 1e-5
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=600
    )
    print(f"peak {float(done.stdout):.2f} GiB")
    assert float(done.stdout) < 1
