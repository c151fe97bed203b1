"""The examples of docs/statistics.md, and the scripts that it quotes."""

import doctest
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_statistics_page():
    text = (DOCS / "statistics.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "statistics.md", None, 0)
    assert len(test.examples) > 50
    assert len(re.findall(r"^>>>", text, re.MULTILINE)) == len(test.examples)
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


def run(script, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return runpy.run_path(os.fspath(DOCS / "examples" / script), run_name="__main__")


def test_brain(monkeypatch, tmp_path, capsys):
    pytest.importorskip("nibabel")
    pytest.importorskip("matplotlib").use("Agg")
    picture = tmp_path / "brain.png"
    run("brain.py", "--picture", os.fspath(picture), monkeypatch=monkeypatch)
    assert picture.stat().st_size > 10_000
    for row in capsys.readouterr().out.splitlines():  # the page has this very table
        assert row in (DOCS / "statistics.md").read_text("utf-8")


@pytest.mark.slow
def test_small_batches(monkeypatch, capsys):
    for name in ("sklearn", "threadpoolctl", "tqdm"):
        pytest.importorskip(name)
    run("small_batches.py", "--epochs", "1", "--repeats", "1", monkeypatch=monkeypatch)
    table = capsys.readouterr().out
    for kind in ("plain", "renorm", "ghost", "group norm"):
        assert (
            len(re.findall(rf"^\| {kind} \|(?: [\d.]+ \([\d.]+ to [\d.]+\) \|){{3}}$", table, re.M))
            == 1
        )
