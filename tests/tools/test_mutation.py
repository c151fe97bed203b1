"""Mutation testing: the faults can still be planted, and tests still find them.

The full run is `python tests/tools/mutate.py`; its results are in tests/tools/mutation.json.
"""

import re
import shutil
from pathlib import Path

import pytest
from anchors import anchored, replaced
from mutants import FAULTS
from mutate import (
    AS_CALLS,
    NUMBERS,
    RESULTS,
    ROOT,
    check_sound,
    compiled,
    file_of,
    load,
    outcome_of,
    plant_switches,
    workshop,
)
from schemata import SWITCH, switched

import cybn

pytestmark = pytest.mark.row(36)

# The source tree around the tests, where faults are planted: a wheel has no sources of kernels.
PACKAGE = Path(__file__).resolve().parents[2] / "cybn"
if not PACKAGE.exists():
    PACKAGE = Path(cybn.__file__).parent
needs_sources = pytest.mark.skipif(
    not (PACKAGE / "_kernels" / "loops.pxd").exists(),
    reason="needs the sources of the kernels",
)
LEAST = 0.95  # share of the faults that tests must find

# A fault in each of the two kernel sources, in the dispatch, and in plain Python.
SAMPLE = [
    *("relu-tie", "family-eps-outside-root", "fold-narrow-gaps"),
    *("moments-merge-share", "selection-last-of-length", "state-alias"),
]


@needs_sources
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_can_be_planted(fault):
    """The anchor of each fault is found in the source, and the tests that it names exist."""
    text = (PACKAGE / fault.file).read_text("utf-8")
    assert fault.planted(text) != text
    assert all(file_of(name).exists() for name in fault.likely())


def test_the_last_full_run_found_enough(figure):
    """Faults without a result are counted, too; python tests/tools/mutate.py runs them."""
    results = load(RESULTS)
    assert set(results) <= {m.name for m in FAULTS}, "run python tests/tools/mutate.py"
    killed = sum(by is not None for by in results.values())
    figure(
        36, "killed of run, of planted", f"{killed} of {len(results)} of {len(FAULTS)}", how="last"
    )
    assert killed >= LEAST * len(results) > 70


SOURCE = """from math import prod


def f(n):
    total = 0
    for i in range(n):
        total += i

        total += 1
    if n > 3:
        total = prod((total,
                      2))  # a ) here
    elif n > 1:
        total -= 1
    else:
        total = 7
    return total
"""
CHANGES = {
    1: ("range(n)", "range(n - 1)"),
    2: ("total += 1", "pass"),
    3: ("total, 2", "total, 3"),
    4: ("elif n > 1", "elif n > 2"),
    5: ("total = 7", "total = 8"),
    6: ("total = 0", "total = 1"),
    7: ("total -= 1 else: total = 7", "total -= 2"),
    8: ("return total", "return -total"),
    9: ("total += i", "total += i\ntotal += i"),
}


def values(source, fault=0):
    names = {"cybn_fault": lambda: fault}
    exec(source, names)
    return [names["f"](n) for n in range(6)]


def test_switches():
    """With all faults switched in, the source still gives its own result, or the active fault's."""
    changes = {n: anchored(SOURCE, "f", *change) for n, change in CHANGES.items()}
    source = switched(SOURCE, changes).replace(SWITCH.lstrip(), "")
    assert values(source) == values(SOURCE)
    for number, change in CHANGES.items():
        wrong = values(replaced(SOURCE, "f", *change))
        assert wrong != values(SOURCE)
        assert values(source, number) == wrong


CYTHON = '''# cython: cdivision=True
"""About count(n) and n - 1."""
cdef int count(int n) noexcept nogil

cdef inline Py_ssize_t last(const float* x,
                            Py_ssize_t n,
) noexcept nogil:  # n - 1
    """The last of n - 1."""
    if x[n -
         1] > 0:

        return n - 1
    # return n - 1
    return 0

cdef class Reader:
    cdef int count(self, int n):
        return n - 1

    def size(self, n):
        return self.count(n - 1)

cdef int other(int n):
    return n - 1
'''


@pytest.mark.parametrize(
    ("function", "find", "at", "line"),
    [
        ("last", "n - 1", 1, "if x[n] > 0:"),
        ("last", "n - 1", 2, "return n"),
        ("last", "return\nn-1", None, "return n"),
        ("Reader.count", "n - 1", None, "return n"),
        ("Reader.size", "n - 1", None, "return self.count(n)"),
        ("size", "n - 1", None, "return self.count(n)"),  # only one function has that name
        ("other", "n - 1", None, "return n"),
        ("", "count(n - 1)", None, "return self.n"),
    ],
)
def test_anchors(function, find, at, line):
    """A function ends at the end of its block. Comments, docstrings and spaces are ignored."""
    put = "return n" if find.startswith("return") else "n"
    new = replaced(CYTHON, function, find, put, at).splitlines()
    changed = [text.strip() for text in new if text not in CYTHON.splitlines()]
    assert changed == [line]


@pytest.mark.parametrize(
    ("function", "find", "at", "message"),
    [
        ("last", "n - 1", None, "is in last 2 times, not once"),
        ("last", "n - 1", 3, "is in last 2 times, not 3"),
        ("other", "n - 2", None, "is in other 0 times"),
        ("lost", "n - 1", None, "0 functions of the name lost, not one"),
    ],
)
def test_anchors_that_do_not_hold(function, find, at, message):
    with pytest.raises(LookupError, match=message):
        anchored(CYTHON, function, find, "n", at)


@needs_sources
def test_every_compiled_fault_has_its_switch(tmp_path):
    shutil.copytree(PACKAGE, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so"))
    plant_switches(tmp_path)
    for fault in filter(compiled, FAULTS):
        text = (tmp_path / fault.file).read_text("utf-8")
        assert len(re.findall(rf"cybn_fault\(\) == {NUMBERS[fault.name]}\b", text)) == 1


@pytest.mark.slow
def test_a_sample_is_found(figure):
    """Six faults are built, planted and tested anew; the test of the last full run finds each."""
    pytest.importorskip("Cython")
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree around the tests")
    chosen, known = [m for m in FAULTS if m.name in SAMPLE], load(RESULTS)
    with workshop() as folder:
        check_sound(folder, [known[m.name] for m in chosen])
        found = [outcome_of(m, folder, known[m.name], parts=1) for m in chosen]
    killed = sum(outcome.by is not None for outcome in found)
    figure(
        36,
        "faults found of those planted, sample of this run",
        f"{killed} of {len(SAMPLE)}",
        how="last",
    )
    assert killed == len(SAMPLE), found


def test_the_build_with_faults_knows_setup():
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree around the tests")
    text = (ROOT / "setup.py").read_text("utf-8")
    assert replaced(text, "", *AS_CALLS) != text
