"""The collector of the reliability matrix: several runs fill one table, and a hole is an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import ROWS, Matrix

TESTS = Path(__file__).parent
SAMPLE = """
import pytest

@pytest.mark.row(3)
@pytest.mark.parametrize("found", [1, 4, 2])
def test_three(found, figure):
    figure(3, "worst", found)
    figure(3, "cases", found, how="sum")

@pytest.mark.row(4, 5)
def test_four_and_five():
    pass

@pytest.mark.row(6)
def test_six():
    pytest.skip("no room")

@pytest.mark.row(7)
def test_seven():
    raise AssertionError
"""


@pytest.fixture
def collect(tmp_path):
    """Return a function that runs the tests above, and returns what they printed."""
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    own = os.environ | {"PYTEST_ADDOPTS": "", "PYTHONPATH": str(TESTS)}

    def run(*options):
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "matrix", "--rootdir=."]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", *options],
            cwd=tmp_path,
            env=own,
            capture_output=True,
            text=True,
        )
        return done.stdout + done.stderr

    return run


@pytest.mark.slow  # it runs pytest four times
def test_runs_add_up_in_one_table(collect, tmp_path):
    for row, seen in ((3, "3 passed, 3 des"), (3, "3 passed, 3 des"), (5, "1 passed, 5 des")):
        assert seen in collect(f"--row={row}", "--matrix=one")
    assert "1 failed, 1 skipped, 4 des" in collect("--row=6", "--row=7", "--matrix=two")
    command = [sys.executable, str(TESTS / "matrix.py"), "one", "two"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    lines = [line.split(" | ") for line in done.stdout.splitlines()]
    shown = {line[0].removeprefix("| "): line[2:] for line in lines}
    assert shown["3"] == ["6 passed", "worst: 4; cases: 14 |"]
    assert shown["4"] == shown["5"] == ["1 passed", " |"]
    assert shown["6"] == ["skipped: no room", " |"]
    assert shown["7"] == ["0 passed, 1 FAILED", " |"]
    assert shown["8"] == ["NOT RUN", " |"]
    assert done.returncode == 1
    assert f"rows that failed or were never run: {[1, 2, *range(7, 40)]}" in done.stderr


def test_no_holes():
    whole = Matrix()
    empty = {"failed": 0, "skipped": {}, "figures": {}}
    whole.add({str(n): empty | {"passed": 1} for n in ROWS})
    assert whole.holes() == []


def test_there_are_39_rows(collect):
    assert list(ROWS) == list(range(1, 40))
    assert "invalid choice: 40" in collect("--row=40")
    with pytest.raises(ValueError, match="rows 1 to 39, not 40"):
        Matrix().row(40)
