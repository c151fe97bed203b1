"""cybn in one process with joblib, executors, PyTorch, scikit-learn or numba."""

import importlib.util
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cybn

pytestmark = pytest.mark.row(28)

LIMIT = 300  # seconds

HEAD = """
import numpy as np

def mine():
    import cybn
    x = np.random.default_rng(5).standard_normal((16, 32, 28, 28), dtype=np.float32)
    y, m = cybn.batch_norm(x, num_threads=3)
    dx, *_ = cybn.batch_norm_backward(y, x, m, num_threads=3)
    z, _ = cybn.layer_norm(x.reshape(512, -1), num_threads=3)
    return y.tobytes() + dx.tobytes() + z.tobytes()
"""

OTHERS = {
    "torch": """
def other():
    import torch
    x = torch.ones(16, 32, 28, 28, requires_grad=True)
    y = torch.nn.functional.conv2d(x, torch.ones(8, 32, 3, 3))
    y.sum().backward()
    from cybn.torch import BatchNorm2d
    assert torch.isfinite(BatchNorm2d(32)(x)).all()
    return x.grad.numpy().tobytes() + y.detach().numpy().tobytes()
""",
    "sklearn": """
def other():
    from sklearn.cluster import KMeans
    from sklearn.ensemble import HistGradientBoostingClassifier
    x = np.random.default_rng(5).standard_normal((500, 4))
    labels = KMeans(4, n_init=1, random_state=0).fit(x).labels_
    trees = HistGradientBoostingClassifier(max_iter=1, random_state=0).fit(x, labels)
    return trees.predict(x).tobytes()
""",
    "numba": """
from functools import cache

@cache
def compiled():
    import numba
    @numba.njit(parallel=True)
    def twice(a):
        b = np.empty_like(a)
        for i in numba.prange(a.size):
            b[i] = 2 * a[i]
        return b
    return twice

def other():
    return compiled()(np.arange(100000.0)).tobytes()
""",
}

TAIL = """
import threading

FIRST, SECOND = (mine, other) if MINE_FIRST else (other, mine)
first, second = FIRST(), SECOND()
for _ in range(2):  # in turn, from the main thread
    assert FIRST() == first and SECOND() == second
wrong = []

def alternate(f, want):
    for _ in range(2):
        if f() != want:
            wrong.append(f.__name__)

# at once, from several threads: numba's own workqueue layer may not be entered by two
two = [(FIRST, first), (SECOND, second)] + [(mine, mine())]
threads = [threading.Thread(target=alternate, args=job) for job in two]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong, wrong
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mine_first", [True, False], ids=["cybn first", "cybn last"])
@pytest.mark.parametrize("name", OTHERS)
def test_beside_another_library(name, mine_first, figure):
    """In either import order, alternating and at once, no call hangs and no result changes."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}")
    code = f"MINE_FIRST = {mine_first}\n{HEAD}{OTHERS[name]}{TAIL}"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    figure(28, "orders of imports tried", 1, how="sum")


def test_in_an_executor_in_threads_of_threads(rng, figure):
    """Eight Python threads start executors, and each call in them uses several OpenMP threads."""
    x = rng.standard_normal((16, 16, 28, 28), dtype=np.float32)
    want, moments = cybn.batch_norm(x, num_threads=1)

    def inner(n):
        y, m = cybn.batch_norm(x, num_threads=n)
        return m == moments and y.tobytes() == want.tobytes()

    def outer(_):
        with ThreadPoolExecutor(2) as pool:
            return all(pool.map(inner, (1, 2, 4)))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(outer, range(8)))
    figure(28, "nested calls", 24, how="sum")
    assert all(results)


def test_python_threads_leave_no_threads_behind(rng):
    """The OpenMP threads of a Python thread end with it."""
    tasks = "/proc/self/task"
    if not os.path.isdir(tasks):
        pytest.skip("needs /proc/self/task")
    x = rng.standard_normal((16, 16, 28, 28), dtype=np.float32)

    def run():
        thread = threading.Thread(target=cybn.batch_norm, args=(x,), kwargs={"num_threads": 3})
        thread.start()
        thread.join()

    run()
    before = len(os.listdir(tasks))
    for _ in range(50):
        run()
    assert len(os.listdir(tasks)) <= before + 6  # some may just be ending


def test_nested_in_joblib(rng):
    joblib = pytest.importorskip("joblib")
    x = rng.standard_normal((16, 16, 28, 28), dtype=np.float32)
    want = cybn.batch_norm(x, num_threads=1)[0]

    def inner():
        with joblib.parallel_config("threading", n_jobs=2):
            jobs = (joblib.delayed(cybn.batch_norm)(x, num_threads=3) for _ in range(2))
            return [y for y, _ in joblib.Parallel()(jobs)]

    with joblib.parallel_config("threading", n_jobs=3):
        for ys in joblib.Parallel()(joblib.delayed(inner)() for _ in range(3)):
            for y in ys:
                np.testing.assert_array_equal(y, want)
