"""Row 33: builds with checks compiled in, and a failing check makes the run fail."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cybn
from cybn import _runtime

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("sanitize.py")

pytestmark = pytest.mark.row(33)


# ---- the builds --------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("kind", ["address", "debug", "thread"])
def test_clean(kind, figure):
    """This takes minutes: it builds cybn from the tree around these tests and tests that build."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs setup.py: run these tests in the source tree")
    done = subprocess.run([sys.executable, str(SCRIPT), kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    figure(33, f"{kind}: tests", int(re.findall(r"(\d+) passed", done.stdout)[-1]))
    figure(33, f"{kind}: reports", 0)


def test_a_build_says_what_it_is(capsys):
    cybn.show_config()
    assert re.search(rf"^build +{_runtime.host.build()}$", capsys.readouterr().out, re.MULTILINE)


# ---- errors that are only printed --------------------------------------------------------

UNRAISABLE = """
class Careless:
    def __del__(self):
        raise IndexError("out of bounds, where nobody can catch it")

def test_it():
    Careless()
"""


def test_an_error_that_nobody_can_catch_fails_the_run(tmp_path):
    """An error in a kernel cannot be raised; Python reports it to sys.unraisablehook."""
    test = tmp_path / "test_careless.py"
    test.write_text(UNRAISABLE)
    options = ["-q", "-p", "no:cacheprovider", "-W", "error", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-P", "-m", "pytest", *options, str(test)]
    own = os.environ | {"PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=own)
    assert done.returncode == 1
    assert "out of bounds, where nobody can catch it" in done.stdout
