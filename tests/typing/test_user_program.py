"""The user program, whose types mypy and pyright check, runs and uses every public class."""

import inspect
import runpy
from pathlib import Path

import cybn

PROGRAM = Path(__file__).with_name("user_program.py")


def test_it_runs(capsys):
    runpy.run_path(str(PROGRAM))
    assert "BatchNorm(4" in capsys.readouterr().out


def test_it_names_every_public_class():
    text = PROGRAM.read_text("utf-8")
    forms = {"BatchNorm1d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm3d", "Drift"}
    for name in set(cybn.__all__) - forms:
        if inspect.isclass(getattr(cybn, name)) and name != "threads":
            assert f"cybn.{name}" in text, name
