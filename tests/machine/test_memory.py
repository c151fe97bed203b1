"""Row 34: after many calls, including calls that raise errors, memory has not grown."""

import ast
import ctypes
import gc
import os
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from call_cases import ARGUMENTS, BAD, GOOD, error_of, quietly

import cybn
from cybn import _runtime

pytestmark = pytest.mark.row(34)
in_release = pytest.mark.skipif(
    "sanitize" in _runtime.host.build(),
    reason="a sanitizer keeps freed memory, and makes stacks larger",
)

STATM = Path("/proc/self/statm")
PACKAGE = Path(cybn.__file__).parent
# Code that the calls here do not reach: it is not part of the NumPy interface, or has other tests.
ELSEWHERE = {"reference.py", "plot.py", "__main__.py", "_bench.py", "_foreign.py"}
ELSEWHERE |= {"population.py", "__init__.py", "_ranks.py", "dask.py", "mpi.py"}
AT_IMPORT = 2
LIMIT = 1 << 20
FEW = 20  # objects that a test itself may keep

trim = getattr(ctypes.CDLL(None), "malloc_trim", int)  # only glibc has it


def test_what_is_good_and_what_is_bad():
    for call in GOOD:
        quietly(call)
    for call in BAD:
        assert error_of(call) is not None, call


def test_every_raise_is_reached():
    """The list of bad calls is complete: they reach every `raise` in functions of the package."""
    reached = set()
    for call in BAD:
        frames = traceback.extract_tb(error_of(call).__traceback__)
        reached |= {(frame.filename, frame.lineno) for frame in frames}
    missed = [
        f"{file.name}:{node.lineno}"
        for file in PACKAGE.glob("*.py")
        if file.name not in ELSEWHERE
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Raise)
        and not any((str(file), i) in reached for i in range(node.lineno, node.end_lineno + 1))
    ]
    assert len(missed) == AT_IMPORT, missed
    assert all(place.startswith("_runtime.py") for place in missed), missed


def call_all():
    for call in GOOD:
        quietly(call)
    for call in BAD:
        error_of(call)


def resident():
    """Return the resident memory of this process in bytes, after freeing what can be freed."""
    gc.collect()
    trim(0)
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if STATM.exists() else 0


def references():
    return {name: sys.getrefcount(value) for name, value in ARGUMENTS.items()}


def tracked():
    gc.collect()
    return len(gc.get_objects())


def check_flat(rounds, figure):
    for _ in range(3):
        call_all()
    before, counts, objects = resident(), references(), tracked()
    for _ in range(rounds):
        call_all()
    growth = resident() - before
    assert references() == counts
    assert tracked() <= objects + FEW
    assert growth < LIMIT
    figure(34, "calls", rounds * len(GOOD + BAD), how="sum")
    figure(34, "growth of resident memory, KiB", growth / 1024)
    figure(34, "reference counts that changed", 0)


@in_release
def test_nothing_is_left_behind(figure):
    check_flat(6, figure)


@in_release
@pytest.mark.slow
def test_nothing_is_left_behind_in_100_000_calls(figure):
    check_flat(1 + 100_000 // len(GOOD + BAD), figure)


@in_release
@pytest.mark.skipif(not STATM.exists(), reason="needs Linux's /proc to read memory")
def test_a_leak_would_be_seen():
    """The checks above detect one array, one reference or one object that leaks in each call."""
    kept = []
    before, count, objects = resident(), references()["X"], tracked()
    for _ in range(300):
        kept.append([ARGUMENTS["X"], np.ones(1000)])
    assert resident() - before > LIMIT
    assert references()["X"] == count + 300
    assert tracked() > objects + FEW


STACK = """
import threading, sys
sys.path.insert(0, {tests!r})
from call_cases import GOOD, quietly

def run():
    for call in GOOD:
        quietly(call)
    print("done")

threading.stack_size({size})
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@in_release
def test_a_small_stack_is_enough():
    """256 KiB are enough, for the calling thread with all of Python and for those of OpenMP."""
    size = 256 << 10
    code = STACK.format(tests=str(Path(__file__).parents[1] / "helpers"), size=size)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"OMP_STACKSIZE": f"{size}B", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "done\n", (done.returncode, done.stderr)
