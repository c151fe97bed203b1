"""The examples on the pages about statistics and padding, and the script that they quote."""

import doctest
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(("page", "least"), [("statistics.md", 45), ("padded-sequences.md", 15)])
def test_examples(page, least):
    text = (DOCS / page).read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page, None, 0)
    assert len(test.examples) > least
    assert len(re.findall(r"^>>>", text, re.MULTILINE)) == len(test.examples)
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


def run(script, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return runpy.run_path(os.fspath(DOCS / "examples" / script), run_name="__main__")


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
