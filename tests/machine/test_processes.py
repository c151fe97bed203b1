"""Other processes: forked, spawned, and forked while other threads are running."""

import functools
import multiprocessing
import os
import pickle
import select
import signal
import threading
import time
import traceback

import numpy as np
import pytest
from layer_cases import KINDS, LEARNING

import cybn
from cybn import _runtime

LIMIT = 60  # seconds until a child counts as hanging

# Python 3.12 and later warn of a fork in a process with threads, which is what these tests do.
may_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture
def batch(rng):
    """Return a batch large enough for several threads, and the result of a parallel call."""
    x = rng.standard_normal((32, 16, 28, 28), dtype=np.float32)
    return x, cybn.batch_norm(x, num_threads=4)


def check(results, want):
    for y, moments in results:
        np.testing.assert_array_equal(y, want[0])
        assert moments == want[1]


# ---- os.fork -----------------------------------------------------------------------------


class Child:
    """A forked child that runs `work`; it is killed if that takes longer than LIMIT."""

    def __init__(self, work):
        self.start = time.perf_counter()
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LIMIT)
        try:  # no exception may leave the child
            work()
            os.write(writer, b"done")
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(0)

    def finish(self, figure):
        """Wait for the child and record its time; raise an error if it failed or hung."""
        with open(self.reader, "rb") as pipe:
            said = pipe.read().decode()
        hung = os.waitpid(self.pid, 0)[1] == signal.SIGALRM
        figure(26, "forks", 1, how="sum")
        figure(26, "hangs", int(hung), how="sum")
        figure(26, "slowest child, s", time.perf_counter() - self.start)
        assert said == "done", said or "the child hung"


def compute(x, want):
    """Make parallel calls of all kinds, with as many threads as the process may use."""
    check([cybn.batch_norm(x, num_threads=4)], want)
    y, m = want
    cybn.batch_norm_backward(y, x, m, num_threads=4)
    cybn.batch_norm_inference(x, m.mean, m.var(), num_threads=4)
    rows = x.reshape(32, -1)
    cybn.layer_norm(rows, num_threads=4)
    cybn.group_norm(x, num_groups=4, num_threads=4)
    cybn.moments(x, num_threads=4)
    with cybn.threads(4):
        cybn.BatchNorm2d(16)(x)


@pytest.mark.row(26)
@needs_fork
@may_fork
def test_forks_after_parallel_calls(batch, figure):
    """Children of a process that ran threads, and their children, compute equal bits serially."""
    x, want = batch

    def work():
        compute(x, want)
        assert cybn.get_num_threads() == 1
        Child(lambda: compute(x, want)).finish(lambda *_, **__: None)

    for _ in range(6):
        compute(x, want)
        children = [Child(work) for _ in range(4)]
        for child in children:
            child.finish(figure)
    compute(x, want)  # the parent still works


@pytest.mark.row(26)
@needs_fork
@may_fork
def test_forks_while_other_threads_compute_and_train(batch, figure):
    """The children use the same layers that other threads of the parent are training."""
    x, want = batch
    layers = {name: KINDS[name].make() for name in LEARNING}
    data = {name: KINDS[name].data(np.random.default_rng(1))[0] for name in layers}
    over = threading.Event()

    def parallel():
        while not over.is_set():
            cybn.batch_norm(x, num_threads=4)

    def train():
        while not over.is_set():
            for name, layer in layers.items():
                KINDS[name].forward(layer, data[name])

    def work():
        compute(x, want)
        for name, layer in layers.items():
            before = layer.num_batches_tracked
            KINDS[name].forward(layer, data[name])
            assert layer.num_batches_tracked == before + 1

    threads = [threading.Thread(target=target) for target in (parallel, parallel, train, train)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            Child(work).finish(figure)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    compute(x, want)


@pytest.mark.row(26)
@needs_fork
@may_fork
def test_a_fork_while_a_lock_is_held(figure):
    """The child does not wait for the lock of running statistics, which a parent's thread holds."""
    held, over = threading.Event(), threading.Event()

    def hold():
        with _runtime.turn:
            held.set()
            over.wait(LIMIT)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    kinds = [KINDS[name] for name in LEARNING]
    x = [kind.data(np.random.default_rng(1))[0] for kind in kinds]
    child = Child(lambda: [kind.forward(kind.make(), a) for kind, a in zip(kinds, x, strict=True)])
    try:
        child.finish(figure)
    finally:
        over.set()
        thread.join()


@pytest.mark.row(26)
@needs_fork
@may_fork
def test_a_preforked_server(batch, figure):
    """The parent computes, forks four workers, and these answer requests at the same time."""
    x, want = batch
    requests, answers = os.pipe(), os.pipe()  # each message is short enough to be atomic

    def serve():
        os.close(requests[1])
        while number := os.read(requests[0], 1):
            compute(x, want)
            os.write(answers[1], number)

    workers = [Child(serve) for _ in range(4)]
    os.write(requests[1], bytes(range(40)))
    os.close(requests[1])
    got = set()
    while len(got) < 40:
        assert select.select([answers[0]], [], [], LIMIT)[0], f"{len(got)} of 40 answers"
        got.update(os.read(answers[0], 40))
        compute(x, want)  # the parent continues to work
    for worker in workers:
        worker.finish(figure)
    for end in (requests[0], *answers):
        os.close(end)


@pytest.mark.slow
@pytest.mark.row(26)
@needs_fork
@may_fork
def test_150_forks_more(batch, figure):
    """With the tests above, these are more than 200 forks."""
    x, want = batch
    for i in range(150):
        cybn.batch_norm(x, num_threads=1 + i % 16)
        Child(lambda: compute(x, want)).finish(figure)


# ---- multiprocessing and joblib ----------------------------------------------------------


@pytest.mark.row(26)
@may_fork
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method, batch, figure):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"needs the start method {method}")
    x, want = batch
    context = multiprocessing.get_context(method)
    start = time.perf_counter()
    with context.Pool(2) as pool:
        call = functools.partial(cybn.batch_norm, num_threads=4)
        check(pool.map_async(call, [x, x, x]).get(LIMIT), want)
        threads = pool.apply_async(cybn.get_num_threads).get(LIMIT)
    figure(26, f"{method} pool, s", time.perf_counter() - start)
    # The server of "forkserver" forks its children before they import cybn.
    assert threads == (1 if method == "fork" else cybn.get_num_threads())


@pytest.mark.row(26, 28)
@may_fork
@pytest.mark.parametrize("backend", ["loky", "multiprocessing", "threading"])
def test_joblib(backend, batch, figure):
    joblib = pytest.importorskip("joblib")
    x, want = batch
    call = joblib.delayed(cybn.batch_norm)
    start = time.perf_counter()
    with joblib.parallel_config(backend, n_jobs=2):
        check(joblib.Parallel(timeout=LIMIT)(call(x, num_threads=4) for _ in range(3)), want)
    figure(26, f"joblib {backend}, s", time.perf_counter() - start)


def test_arrays_from_another_process(rng):
    """Unpickled arrays have new dtype objects, which are equal to the usual ones."""
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
