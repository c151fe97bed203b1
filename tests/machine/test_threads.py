"""The number of threads of a call, and several Python threads that use one layer."""

import contextvars
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from layer_cases import KINDS, LEARNING

import cybn
from cybn import _runtime

PYTHON_THREADS = 8


@pytest.fixture(autouse=True)
def default():
    """Start each test with the default number of threads."""
    cybn.set_num_threads(None)
    yield cybn.get_num_threads()
    cybn.set_num_threads(None)


@pytest.fixture
def eager_switching():
    """Make Python switch between threads as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_set_and_get(default):
    for n in (1, 3, np.int64(5)):
        cybn.set_num_threads(n)
        assert cybn.get_num_threads() == n
    cybn.set_num_threads(None)
    assert cybn.get_num_threads() == default


def test_default_is_what_openmp_says(default):
    assert 1 <= default <= max(1, _runtime.host.max_threads())


def test_absurd_numbers_are_cut(default):
    assert _runtime.thread_count(10**9) == _runtime.thread_count(10**6) <= 4096
    cybn.set_num_threads(10**9)
    assert cybn.get_num_threads() == _runtime.thread_count(10**9)


def test_scope(default):
    cybn.set_num_threads(3)
    with cybn.threads(2):
        assert cybn.get_num_threads() == 2
        with cybn.threads(5):
            assert cybn.get_num_threads() == 5
            cybn.set_num_threads(4)
            assert cybn.get_num_threads() == 5
        assert cybn.get_num_threads() == 2
    assert cybn.get_num_threads() == 4


def test_scope_ends_with_an_exception(default):
    with pytest.raises(KeyError), cybn.threads(default + 1):
        raise KeyError
    assert cybn.get_num_threads() == default


def test_scope_is_of_this_thread_alone(default):
    entered, asked, seen = threading.Event(), threading.Event(), []

    def other():
        entered.wait()
        seen.append(cybn.get_num_threads())
        with cybn.threads(default + 2):
            seen.append(cybn.get_num_threads())
        asked.set()

    # some Pythons give a new thread the context of its parent, so give it an empty one
    thread = threading.Thread(target=contextvars.Context().run, args=(other,))
    thread.start()
    with cybn.threads(default + 1):
        entered.set()
        asked.wait()
        assert cybn.get_num_threads() == default + 1
    thread.join()
    assert seen == [default, default + 2]


@pytest.mark.parametrize("setter", [cybn.set_num_threads, lambda n: cybn.threads(n).__enter__()])
def test_bad_numbers(setter, default):
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"n is {n}; it must be at least 1"):
            setter(n)
    for n in (1.5, "2", True):
        with pytest.raises(TypeError, match=f"n is {n!r}; it must be an int of at least 1"):
            setter(n)
    assert cybn.get_num_threads() == default


@pytest.mark.row(23)
def test_num_threads_is_for_one_call(default, rng):
    x = rng.standard_normal((64, 8, 400), dtype=np.float32)
    want, moments = cybn.batch_norm(x, num_threads=1)
    for n in (2, 3, 16, 10**6, np.int32(4)):
        y, m = cybn.batch_norm(x, num_threads=n)
        np.testing.assert_array_equal(y, want)
        assert m == moments
        assert cybn.get_num_threads() == default


def together(work, count=PYTHON_THREADS):
    """Run work(i) in `count` Python threads that start at once; return the results in order."""
    barrier = threading.Barrier(count)

    def start(i):
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


@pytest.mark.row(27)
def test_one_layer_in_eval(eager_switching, rng):
    bn = cybn.BatchNorm1d(6)
    bn.running_mean, bn.running_var = rng.standard_normal(6), rng.uniform(0.5, 2, 6)
    bn.eval()
    batches = rng.standard_normal((PYTHON_THREADS, 32, 6, 200), dtype=np.float32)
    want = [bn(x) for x in batches]
    for i, ys in enumerate(together(lambda i: [bn(batches[i]) for _ in range(20)])):
        for y in ys:
            np.testing.assert_array_equal(y, want[i])


@pytest.mark.row(27)
def test_one_layer_in_training(eager_switching, rng):
    """With momentum None, updates in any order give the same statistics."""
    steps = 100
    batches = rng.standard_normal((PYTHON_THREADS, 12, 5)) + np.arange(5)
    layer = cybn.BatchNorm(5, momentum=None, dtype=np.float64)
    wants = [cybn.batch_norm(x, layer.gamma, layer.beta) for x in batches]

    def train(i):
        return [layer(batches[i]) for _ in range(steps)]

    for ys, (want, _) in zip(together(train), wants, strict=True):
        for y in ys:
            np.testing.assert_array_equal(y, want)
    assert layer.num_batches_tracked == PYTHON_THREADS * steps
    rounding = layer.num_batches_tracked * np.finfo(float).eps
    mean = np.mean([m.mean for _, m in wants], axis=0)
    var = np.mean([m.var(ddof=1) for _, m in wants], axis=0)
    assert (np.abs(layer.running_mean - mean) <= rounding * (1 + np.abs(mean))).all()
    assert (np.abs(layer.running_var - var) <= rounding * var).all()


@pytest.mark.row(27)
def test_functions_in_many_threads(eager_switching, rng):
    x, gamma = rng.standard_normal((16, 5, 300), dtype=np.float32), rng.uniform(1, 2, 5)
    y, m = cybn.batch_norm(x, gamma)
    gradients = cybn.batch_norm_backward(y, x, m, gamma)

    def both(i):
        y, m = cybn.batch_norm(x, gamma, num_threads=1 + i % 3)
        return y, m, cybn.batch_norm_backward(y, x, m, gamma)

    for got_y, got_m, got in together(both):
        np.testing.assert_array_equal(got_y, y)
        assert got_m == m
        for a, b in zip(got, gradients, strict=True):
            np.testing.assert_array_equal(a, b)


# ---- every kind of layer -----------------------------------------------------------------


@pytest.mark.row(27)
@pytest.mark.parametrize("name", KINDS)
def test_inference_takes_no_lock(name, rng):
    """Inference continues while another thread holds the lock of running statistics."""
    kind = KINDS[name]
    layer, x = kind.make().eval(), kind.data(rng)[0]
    want, done, held = kind.forward(layer, x), threading.Event(), threading.Event()

    def hold():
        with _runtime.turn:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        got = []
        other = threading.Thread(target=lambda: got.append(kind.forward(layer, x)))
        other.start()
        other.join(20)
        assert got, "inference waits for training"
    finally:
        done.set()
        thread.join()
    np.testing.assert_array_equal(got[0], want)


def train_together(name, updates, rng, figure):
    """Train one layer of a kind in all threads, and count lost updates.

    Mean, variance and count of a layer are replaced together, from the previous ones. So if the
    count is right, no update was lost. The mean of all batches, which does not depend on their
    order, is also compared.
    """
    kind = KINDS[name]
    each = updates // PYTHON_THREADS
    batches = kind.data(rng, PYTHON_THREADS) + np.arange(PYTHON_THREADS, dtype=np.float32).reshape(
        -1, *(1 for _ in kind.shape)
    )
    layer = kind.make(dtype=np.float64)
    layer.momentum = None
    wants, means = [], []
    for x in batches:
        alone = kind.make(dtype=np.float64)
        alone.momentum = 1.0
        wants.append(kind.forward(alone, x))
        means.append(alone.running_mean)
    exact = kind.make().renorm is None  # renorm depends on what other threads have learnt

    def train(i):
        wrong = 0
        for _ in range(each):
            y = kind.forward(layer, batches[i])
            wrong += exact and y.tobytes() != wants[i].tobytes()
        return wrong

    wrong = sum(together(train))
    lost = PYTHON_THREADS * each - layer.num_batches_tracked
    figure(27, "updates", PYTHON_THREADS * each, how="sum")
    figure(27, "lost", lost, how="sum")
    figure(27, "wrong results", wrong, how="sum")
    assert lost == 0
    assert wrong == 0
    mean, rounding = np.mean(means, axis=0), PYTHON_THREADS * each * np.finfo(float).eps
    assert (np.abs(layer.running_mean - mean) <= rounding * (8 + np.abs(mean))).all()


@pytest.mark.row(27)
@pytest.mark.parametrize("name", LEARNING)
def test_no_update_is_lost(name, eager_switching, rng, figure):
    train_together(name, 160, rng, figure)


@pytest.mark.slow
@pytest.mark.row(27)
@pytest.mark.parametrize("name", LEARNING)
def test_no_update_of_100_000_is_lost(name, eager_switching, rng, figure):
    train_together(name, 100_000 // len(LEARNING) + PYTHON_THREADS, rng, figure)


@pytest.mark.row(27)
def test_setting_statistics_while_others_train(eager_switching, rng):
    """Setting one statistic keeps the other, and no update of other threads is lost."""
    layer, x = cybn.BatchNorm1d(6), rng.standard_normal((4, 6, 5), dtype=np.float32)

    def work(i):
        for _ in range(50):
            if i == 0:
                layer.running_mean = np.zeros(6)
            elif i == 1:
                layer.running_var = np.ones(6)
            else:
                layer(x)

    together(work)
    assert layer.num_batches_tracked == (PYTHON_THREADS - 2) * 50


@pytest.mark.row(27)
def test_a_handler_of_a_signal_may_train_the_layer_it_interrupts(rng):
    signal = pytest.importorskip("signal")
    if not hasattr(signal, "setitimer"):
        pytest.skip("needs signal.setitimer")
    layer, x = cybn.BatchNorm1d(6), rng.standard_normal((4, 6, 5), dtype=np.float32)
    handled = []

    def handle(*_):
        layer(x)
        layer.snapshot()
        handled.append(1)

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
        steps = 0
        while len(handled) < 50:
            layer(x)
            steps += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert layer.num_batches_tracked == steps + len(handled)


@pytest.mark.row(27)
def test_one_pytorch_module(figure):
    torch = pytest.importorskip("torch")
    from cybn.torch import BatchNorm1d

    module, each = BatchNorm1d(5, momentum=None).double(), 25
    x = torch.arange(8 * 12 * 5).reshape(8, 12, 5).double()
    together(lambda i: [module(x[i]) for _ in range(each)])
    lost = PYTHON_THREADS * each - int(module.num_batches_tracked)
    figure(27, "updates", PYTHON_THREADS * each, how="sum")
    figure(27, "lost", lost, how="sum")
    assert lost == 0
    mean = x.mean((0, 1))
    assert torch.allclose(module.running_mean, mean, rtol=1e-12, atol=0)
