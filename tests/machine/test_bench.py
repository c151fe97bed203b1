"""`cybn bench`: its output, its errors, and its time limit."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from cybn import _bench
from cybn.__main__ import main

SHAPE = (4, 8, 6, 6)
NUMBER = r" +[\d.]+"


@pytest.fixture
def short(monkeypatch):
    """Make a run take no time: one small batch, no PyTorch."""
    monkeypatch.setattr(_bench, "SHAPES", (SHAPE,))
    monkeypatch.setattr(_bench, "LIMIT", 0.0)
    monkeypatch.setattr(_bench, "_torch", lambda threads: None)


def test_a_run(short, capsys, tmp_path):
    file = tmp_path / "figures.json"
    assert main(["bench", "--threads", "1", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar, as this is not a terminal
    assert "1 threads; NumPy" in out
    assert "PyTorch is not installed" in out
    assert re.search(r"Takes about \d+ seconds", out)
    for operation in ("training forward", "inference", "backward"):
        assert re.search(rf"^{operation} +8x6x6{NUMBER * 5} +-$", out, re.M)
        what = "an add" if operation == "backward" else "a copy"
        line = rf"^{operation}: \d+ GB/s, [\d.]+ times {what}; [\d.]+ times as fast as NumPy here$"
        assert re.search(line, out, re.M)
    for column in ("ms", "GB/s", "copy GB/s", "cybn/copy", "NumPy", "PyTorch"):
        assert re.search(rf"^.*\b{column}.*: ", out.split("\n\n")[2], re.M | re.S), column
    rows = json.loads(file.read_text())["rows"]
    assert [row["operation"] for row in rows] == ["training forward", "inference", "backward"]
    assert all(set(row["seconds"]) == {"copy", "cybn", "NumPy"} for row in rows)


def test_beside_pytorch(short, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(_bench, "_torch", lambda threads: torch)
    assert main(["bench"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(rf"8x6x6{NUMBER * 6}$", out, re.M)) == 3
    assert len(re.findall(r"times as fast as PyTorch here$", out, re.M)) == 3


def test_figures_are_worked_out_as_they_are_explained():
    seconds = {"cybn": 2e-3, "copy": 1e-3, "NumPy": 2e-2, "PyTorch": 1.2e-2, "PyTorch, last": 6e-3}
    rows = [{"operation": "backward", "shape": [10, 100, 1000, 1], "seconds": seconds}]
    row = _bench.table(rows).splitlines()[1].split()
    assert row == ["backward", "100x1000x1", "2.00", "6.0", "12.0", "2.00", "10.0", "3.0"]
    said = _bench.summary(rows, "backward")
    assert said == "backward: 6 GB/s, 2.0 times an add; 3.0 times as fast as PyTorch here"


@pytest.mark.parametrize("name", ["nowhere/figures.json", "."])
def test_a_path_is_refused_before_anything_is_measured(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_bench, "contestants", lambda *a: pytest.fail("measured"))
    before = list(tmp_path.iterdir())
    assert main(["bench", "--json", str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert str(tmp_path) in err
    assert list(tmp_path.iterdir()) == before


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc, in which nobody can write")
def test_a_folder_in_which_not_even_root_can_write(short, capsys):
    assert main(["bench", "--json", "/proc/cybn.json"]) == 1
    out, err = capsys.readouterr()
    assert (out, "json is /proc/cybn.json: No such file" in err) == ("", True)


def test_a_wrong_result_is_not_timed(short, monkeypatch, capsys):
    def wrong(x, *parameters, **options):
        return x, None

    monkeypatch.setattr(_bench.functional, "batch_norm", wrong)
    assert main(["bench"]) == 1
    assert "training forward of cybn on (4, 8, 6, 6) is wrong by" in capsys.readouterr().err


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (64.0, True)])
def test_a_busy_machine(load, warned, monkeypatch):
    monkeypatch.setattr(_bench.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(_bench.os, "cpu_count", lambda: 2)
    assert bool(_bench.busy()) == warned


def test_progress_is_for_a_terminal(short, monkeypatch, capsys):
    monkeypatch.setattr(_bench.sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["bench"]) == 0
    out, err = capsys.readouterr()
    assert "1 of 3" in err
    assert "1 of 3" not in out


def test_turns_and_their_limit():
    order = []
    calls = {name: lambda name=name: order.append(name) or time.sleep(0.021) for name in "ab"}
    seconds = _bench.race(calls, limit=0.0)
    assert order == list("aabb" + "ab" * _bench.ROUNDS[0])  # a warm-up each, then alternating
    assert all(0.02 < s < 0.2 for s in seconds.values())


def test_the_floor_moves_everything():
    a, b, out = np.arange(7.0), np.ones(7), np.zeros(7)
    _bench._floor((a,), out, 3)()
    np.testing.assert_array_equal(out, a)
    _bench._floor((a, b), out, 2)()
    np.testing.assert_array_equal(out, a + 1)
