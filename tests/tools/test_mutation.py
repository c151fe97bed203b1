"""Mutation testing: planted faults are still there to plant, and tests still find them.

The full run is `python tests/tools/mutate.py`; its outcome is tests/tools/mutation.json.
"""

import re
import shutil
from pathlib import Path

import pytest
from mutants import LIKELY, MUTANTS
from mutate import (
    NUMBERS,
    QUICK_BUILD,
    RESULTS,
    ROOT,
    check_sound,
    file_of,
    in_kernel,
    load,
    outcome_of,
    plant_switches,
    workshop,
)
from schemata import SWITCH, switched

import cybn

pytestmark = pytest.mark.row(36)

PACKAGE = Path(cybn.__file__).parent
LEAST = 0.95  # of the faults that must be found

# Plain Python, and a kernel of each of the two sources, with the tests that found them.
SAMPLE = [
    *("runs-relu-tie", "family-eps-outside-root"),
    *("moments-merge-share", "layout-narrow-gaps", "selection-last-of-length", "state-alias"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name for m in MUTANTS])
def test_can_be_planted(mutant):
    """What a fault replaces occurs once, so that none is lost when the source changes."""
    text = (PACKAGE / mutant.file).read_text("utf-8")
    assert text.count(mutant.old) == 1
    assert mutant.new != mutant.old
    for name in (mutant.tests or LIKELY[mutant.file]).split():
        assert file_of(name).exists()


def test_names_are_different():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


def test_the_last_full_run_found_enough(figure):
    results = load(RESULTS)
    assert set(results) == {m.name for m in MUTANTS}, "run python tests/tools/mutate.py"
    killed = sum(by is not None for by in results.values())
    figure(36, "killed of planted, last full run", f"{killed} of {len(results)}", how="last")
    assert killed >= LEAST * len(results)


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
FAULTS = {
    1: ("range(n)", "range(n - 1)"),
    2: ("total += i\n\n        total += 1\n    if", "total += i\n    if"),
    3: ("                      2))", "                      3))"),
    4: ("elif n > 1", "elif n > 2"),
    5: ("        total = 7\n", "        total = 8\n"),
    6: ("    total = 0\n", "    total = 1\n"),
    7: ("        total -= 1\n    else:\n        total = 7\n", "        total -= 2\n"),
    8: ("return total", "return -total"),
}


def values(source, fault=0):
    names = {"cybn_fault": lambda: fault}
    exec(source, names)
    return [names["f"](n) for n in range(6)]


def test_switches():
    """A source with all faults does as the source does, or as the fault whose number is on."""
    source = switched(SOURCE, FAULTS).replace(SWITCH, "")
    assert values(source) == values(SOURCE)
    for number, (old, new) in FAULTS.items():
        wrong = values(SOURCE.replace(old, new))
        assert wrong != values(SOURCE)
        assert values(source, number) == wrong


def test_every_kernel_fault_has_its_switch(tmp_path):
    shutil.copytree(PACKAGE / "_kernels", tmp_path / "_kernels")
    plant_switches(tmp_path)
    for mutant in filter(in_kernel, MUTANTS):
        text = (tmp_path / mutant.file).read_text("utf-8")
        assert len(re.findall(rf"cybn_fault\(\) == {NUMBERS[mutant.name]}\b", text)) == 1


@pytest.mark.slow
def test_a_sample_is_found(figure):
    """Built, planted and found anew: the test that found a fault in the last full run does."""
    pytest.importorskip("Cython")
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree around the tests")
    chosen, known = [m for m in MUTANTS if m.name in SAMPLE], load(RESULTS)
    with workshop() as folder:
        check_sound(folder, [known[m.name] for m in chosen])
        found = [outcome_of(m, folder, known[m.name], parts=1) for m in chosen]
    killed = sum(outcome.by is not None for outcome in found)
    figure(36, "killed of planted, sample of this run", f"{killed} of {len(SAMPLE)}", how="last")
    assert killed == len(SAMPLE), found


def test_the_quick_build_knows_setup():
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree around the tests")
    text = (ROOT / "setup.py").read_text("utf-8")
    assert [text.count(old) for old, _ in QUICK_BUILD] == [1] * len(QUICK_BUILD)
