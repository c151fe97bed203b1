"""Environment variables for threads and levels, and the number of threads that really run."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cybn
from cybn import _runtime

LIMIT = 300  # seconds until a call counts as hanging, even on a busy machine

WORK = """
import hashlib, os, sys
if hasattr(os, "sched_setaffinity") and "ONE_CORE" in os.environ:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
if "CGROUP" in os.environ:
    open(os.environ["CGROUP"] + "/cgroup.procs", "w").write(str(os.getpid()))
before = dict(os.environ)
import numpy as np

def threads():
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else -1

others = threads()
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
cybn.moments(np.ones((256, 256, 64), np.float32))  # work for as many as there may be
cybn.layer_norm(np.ones((4096, 512), np.float32))
used = threads() - others + 1  # OpenMP keeps its threads
assert dict(os.environ) == before, "os.environ was changed"
print(_runtime.level, cybn.get_num_threads(), used, digest.hexdigest())
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
    """Return a function from environment variables to (level, threads, digest).

    The number of threads is what cybn reports; the number that really ran must be equal.
    """

    def run(**environment):
        code, words, err = finished(**environment)
        assert code == 0, err
        level, said, used, digest = words
        if _runtime.host.openmp() and Path("/proc/self/task").exists():
            assert said == used
        return level, int(said), digest

    return run


@pytest.mark.row(24)
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


# ---- OpenMP's variables ------------------------------------------------------------------

ALL = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
MOST = max(64, 4 * (os.cpu_count() or 1))
USED = [
    ({"OMP_NUM_THREADS": "1"}, 1),
    ({"OMP_NUM_THREADS": "3"}, 3),
    ({"OMP_NUM_THREADS": "1,2"}, 1),
    ({"OMP_NUM_THREADS": "0"}, ALL),
    ({"OMP_NUM_THREADS": "-3"}, ALL),
    ({"OMP_NUM_THREADS": "garbage"}, ALL),
    ({"OMP_NUM_THREADS": ""}, ALL),
    ({"OMP_NUM_THREADS": "1000000"}, MOST),
    ({"OMP_NUM_THREADS": "9" * 30}, ALL),
    ({"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "2"}, 2),
    ({"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "1"}, 1),
]
OFTEN = ("1", "0", "garbage", "1000000")  # the others take long, so they are slow tests


@pytest.mark.row(29)
@pytest.mark.skipif(not _runtime.host.openmp(), reason="built without OpenMP")
@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        pytest.param(
            environment,
            threads,
            id=" ".join(f"{k}={v}" for k, v in environment.items()),
            marks=[] if environment["OMP_NUM_THREADS"] in OFTEN else pytest.mark.slow,
        )
        for environment, threads in USED
    ],
)
def test_threads_used(environment, threads, report, figure):
    _, used, digest = report(**environment)
    name = " ".join(f"{key.removeprefix('OMP_')}={value:.9}" for key, value in environment.items())
    figure(29, f"threads with {name}", used, how="last")
    assert used == threads
    assert digest == report()[2]


@pytest.mark.slow
@pytest.mark.row(29)
def test_a_dynamic_number_of_threads(finished, report):
    """With OMP_DYNAMIC the load of the machine decides on the number of threads in each call."""
    code, words, err = finished(OMP_NUM_THREADS="4", OMP_DYNAMIC="true")
    assert code == 0, err
    assert 1 <= int(words[2]) <= 4
    assert words[3] == report()[2]


@pytest.mark.row(29)
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs os.sched_setaffinity")
def test_affinity(report, figure):
    _, used, digest = report(ONE_CORE="1")
    figure(29, "threads with affinity of one core", used, how="last")
    assert (used, digest) == (1, report()[2])


@pytest.mark.row(29)
def test_threadpoolctl(rng, figure):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    x = rng.standard_normal((32, 16, 28, 28), dtype=np.float32)
    want, m = cybn.batch_norm(x, num_threads=4)
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        figure(29, "threads with threadpool_limits(1)", cybn.get_num_threads(), how="last")
        assert cybn.get_num_threads() == 1
        y, again = cybn.batch_norm(x)
    assert again == m
    np.testing.assert_array_equal(y, want)


# ---- cgroups -----------------------------------------------------------------------------


def tree(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


CGROUPS = {
    "version 2": ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
    "version 2, no quota": ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    "version 2, less than one": ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
    "version 2, own folder": ("0::/a/b\n", {"a/b/cpu.max": "300000 100000"}, 3),
    "version 2, a folder above": (
        "0::/a/b\n",
        {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 200000"},
        2,
    ),
    "version 2, the least counts": (
        "0::/a/b\n",
        {"a/b/cpu.max": "800000 100000", "a/cpu.max": "500000 100000"},
        5,
    ),
    "version 2, not this process's": ("0::/a\n", {"b/cpu.max": "100000 100000"}, None),
    "version 1": (
        "2:cpuset:/\n1:cpu:/\n0::/\n",
        {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        3,
    ),
    "version 1, no quota": (
        "1:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "version 1, own folder, two controllers": (
        "4:cpu,cpuacct:/job/1\n0::/\n",
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/job/1/cpu.cfs_quota_us": "200000\n",
            "cpu,cpuacct/job/1/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "version 1, seen from inside a container": (
        "1:cpu:/docker/f00\n",
        {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        1,
    ),
    "a path with a colon": ("0::/a:b\n", {"a:b/cpu.max": "200000 100000"}, 2),
    "garbage": ("0::/\n", {"cpu.max": "many of 100000\n"}, None),
    "a period of 0": ("0::/\n", {"cpu.max": "100000 0\n"}, None),
    "an empty file": ("", {"cpu.max": "100000 100000\n"}, None),
}


@pytest.mark.row(29)
@pytest.mark.parametrize("name", CGROUPS)
def test_quotas_of_cgroups(name, tmp_path):
    own, files, cpus = CGROUPS[name]
    (tmp_path / "own").write_text(own)
    tree(tmp_path / "root", files)
    assert _runtime._cgroup_cpus(tmp_path / "root", tmp_path / "own") == cpus


def test_no_cgroups(tmp_path):
    assert _runtime._cgroup_cpus(tmp_path / "root", tmp_path / "own") is None


@pytest.fixture
def one_cpu():
    """Return a new cgroup, of version 1 or 2, with the quota of one CPU."""
    root = Path("/sys/fs/cgroup")
    top = root / "cpu" if (root / "cpu" / "cpu.cfs_quota_us").exists() else root
    folder = top / f"cybn-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make a cgroup: {error.strerror}")
    try:
        if top == root:
            (folder / "cpu.max").write_text("100000 100000")
        else:
            (folder / "cpu.cfs_quota_us").write_text("100000")
    except OSError as error:
        folder.rmdir()
        pytest.skip(f"cannot set a quota: {error.strerror}")
    yield folder
    folder.rmdir()


@pytest.mark.row(29)
def test_a_real_quota(one_cpu, report, figure):
    _, used, digest = report(CGROUP=str(one_cpu))
    figure(29, "threads with a quota of one CPU", used, how="last")
    assert (used, digest) == (1, report()[2])
