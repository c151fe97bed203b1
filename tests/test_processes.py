"""Other processes: forked, spawned, and started with other environment variables."""

import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest

import cybn
from cybn import _runtime

LIMIT = 60  # seconds until a child that hangs has failed

# Python 3.12 and later warn of a fork in a process with threads. That is what is tested here.
may_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork")


@pytest.fixture
def batch(rng):
    """A batch large enough for several threads, and what a parallel call makes of it."""
    x = rng.standard_normal((32, 16, 28, 28), dtype=np.float32)
    return x, cybn.batch_norm(x, num_threads=4)


def check(results, want):
    for y, moments in results:
        np.testing.assert_array_equal(y, want[0])
        assert moments == want[1]


# ---- forked and spawned ------------------------------------------------------------------


@needs_fork
@may_fork
def test_os_fork(batch):
    x, want = batch
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # nothing may get out of here, not even an exception
        signal.alarm(LIMIT)
        try:
            y, moments = cybn.batch_norm(x, num_threads=4)
            same = y.tobytes() == want[0].tobytes() and moments == want[1]
            os.write(writer, b"same" if same else b"different")
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert pipe.read() == b"same"
    assert os.waitpid(child, 0)[1] == 0
    check([cybn.batch_norm(x, num_threads=4)], want)  # the parent is as it was


@may_fork
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(method, batch):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method}")
    x, want = batch
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        call = functools.partial(cybn.batch_norm, num_threads=4)
        check(pool.map_async(call, [x, x, x]).get(LIMIT), want)


@may_fork
@pytest.mark.parametrize("backend", ["loky", "multiprocessing", "threading"])
def test_joblib(backend, batch):
    joblib = pytest.importorskip("joblib")
    x, want = batch
    call = joblib.delayed(cybn.batch_norm)
    with joblib.parallel_config(backend, n_jobs=2):
        check(joblib.Parallel(timeout=LIMIT)(call(x, num_threads=4) for _ in range(3)), want)


# ---- environment -------------------------------------------------------------------------

WORK = """
import hashlib, os, sys
if hasattr(os, "sched_setaffinity") and "ONE_CORE" in os.environ:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
before = dict(os.environ)
import numpy as np
import cybn
from cybn import _runtime

digest = hashlib.sha256()
rng = np.random.default_rng(5)
for shape in [(4, 3, 5), (7, 19), (8, 33, 14, 14), (3, 5, 5, 5, 5), (2, 2, 70001)]:
    for dtype in (np.float32, np.float64):
        for axis in (1, -1):
            x = (rng.standard_normal(shape) + 3).astype(dtype)
            gamma = rng.standard_normal(x.shape[axis])
            y, m = cybn.batch_norm(x, gamma, axis=axis)
            fixed = cybn.batch_norm_inference(x, m.mean, m.var(), gamma, gamma, axis=axis)
            gradients = cybn.batch_norm_backward(y, x, m, gamma, axis=axis)
            for array in (y, m.mean, m.m2, fixed, *gradients):
                digest.update(array.tobytes())
assert dict(os.environ) == before, "os.environ was changed"
print(_runtime.level, cybn.get_num_threads(), digest.hexdigest())
"""


@pytest.fixture(scope="module")
def finished():
    """Return a function from environment variables to (exit code, stdout words, stderr)."""

    @functools.cache
    def run(**environment):
        ours = ("OMP_", "GOMP_", "CYBN_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        command = [sys.executable, "-P", "-W", "error", "-c", WORK]
        done = subprocess.run(
            command, env=clean | environment, capture_output=True, text=True, timeout=LIMIT
        )
        return done.returncode, done.stdout.split(), done.stderr

    return run


@pytest.fixture
def report(finished):
    """Return a function from environment variables to (level, threads, digest)."""

    def run(**environment):
        code, words, err = finished(**environment)
        assert code == 0, err
        level, threads, digest = words
        return level, int(threads), digest

    return run


@pytest.mark.parametrize("wanted", _runtime.LEVELS)
def test_levels_can_only_be_lowered_and_do_not_change_a_bit(wanted, report):
    best = _runtime.usable_levels()[-1]
    level, _, digest = report(CYBN_LEVEL=wanted)
    assert level == min(wanted, best, key=_runtime.LEVELS.index)
    assert report() == report(CYBN_LEVEL="")
    assert digest == report()[2]


def test_an_unknown_level_is_an_import_error_that_lists_the_known_ones(finished):
    code, _, err = finished(CYBN_LEVEL="avx9")
    assert code == 1
    assert (
        f"ImportError: CYBN_LEVEL is 'avx9'; it must be one of {', '.join(_runtime.LEVELS)}" in err
    )


def test_omp_num_threads(report):
    assert report(OMP_NUM_THREADS="1")[1:] == (1, report()[2])
    many = 3 if _runtime.host.openmp() else 1
    assert report(OMP_NUM_THREADS="3")[1:] == (many, report()[2])


@pytest.mark.parametrize("value", ["0", "garbage", "-1", "1,2"])
def test_odd_omp_num_threads_does_no_harm(value, report):
    _, threads, digest = report(OMP_NUM_THREADS=value)
    assert threads >= 1
    assert digest == report()[2]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no sched_setaffinity")
def test_affinity(report):
    assert report(ONE_CORE="1")[1:] == (1, report()[2])


def test_threadpoolctl(batch):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    x, want = batch
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert cybn.get_num_threads() == 1
        check([cybn.batch_norm(x)], want)


def test_arrays_from_another_process(rng):
    """Unpickled arrays have dtype objects of their own, equal to the usual ones."""
    x, gamma, beta = rng.standard_normal((6, 5)), rng.standard_normal(5), rng.standard_normal(5)
    y, moments = cybn.batch_norm(x, gamma, beta)
    gradients = cybn.batch_norm_backward(y, x, moments, gamma)
    fixed = cybn.batch_norm_inference(x, gamma, beta**2)
    sent = pickle.loads(pickle.dumps((x, gamma, beta, moments, beta**2)))
    x, gamma, beta, moments, var = sent
    check([cybn.batch_norm(x, gamma, beta)], (y, moments))
    np.testing.assert_array_equal(cybn.batch_norm_inference(x, gamma, var), fixed)
    for a, b in zip(cybn.batch_norm_backward(y, x, moments, gamma), gradients, strict=True):
        np.testing.assert_array_equal(a, b)
