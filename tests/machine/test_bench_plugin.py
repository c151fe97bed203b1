"""The developers' bench: wrong results are not timed, contestants alternate, pages are filled."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "bench").exists(), reason="needs bench/")
pytest.importorskip("pytest_benchmark")


FIND = f"import sys; sys.path.append({str(ROOT)!r})\n"  # after the path of the tested cybn
REPORT = FIND + "from bench.report import main; main()"


def run(*arguments):
    """Run Python in the source tree, but import the installed packages first."""
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Run two cases, and return the output and the JSON file."""
    file = tmp_path_factory.mktemp("bench") / "figures.json"
    cases = "tiny-inference-32x16 or calls-forward-masked-32x16"
    words = ["-m", "pytest", "bench", "--quick", "-q", "-k", cases, "-p", "no:cacheprovider"]
    done = run(*words, "--peers", "numpy", f"--benchmark-json={file}")
    assert done.returncode == 0, done.stdout
    return done.stdout, file


def test_a_run_says_who_took_part_and_what_became_of_the_bars(figures):
    out, file = figures
    assert re.search(r"a call: inference, out= +(met|missed) +[\d.]+ us +1 us", out)
    assert re.search(r"a call: masked, forward +(met|missed)", out)
    assert "GB/s" in out
    stored = json.loads(file.read_text())
    info = stored["machine_info"]
    assert info["cybn"]["cpus usable"] == len(os.sched_getaffinity(0))
    assert set(info["peers"]) == {"cybn", "floor", "NumPy"}
    peers = {one["extra_info"]["peer"] for one in stored["benchmarks"]}
    assert peers == {"cybn", "floor", "NumPy"}
    rounds = {one["stats"]["rounds"] for one in stored["benchmarks"] if "tiny" in one["group"]}
    assert len(rounds) == 1  # every contestant of the case took the same number of turns


def test_pages_are_filled_all_or_none(figures, tmp_path):
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    marks = "above\n<!-- bench: {} -->\nold\n<!-- end of bench -->\nbelow\n"
    good.write_text(marks.format("tiny"))
    bad.write_text(marks.format("figures"))
    report = ("-c", REPORT, str(figures[1]), "--pages", str(good))
    done = run(*report, str(bad))
    assert done.returncode == 2
    assert "asks for 'figures'" in done.stderr
    assert good.read_text() == marks.format("tiny")
    assert run(*report).returncode == 0
    once = good.read_text()
    assert once.startswith("above\n<!-- bench: tiny -->\n")
    assert once.endswith("<!-- end of bench -->\nbelow\n")
    assert re.search(r"^\| 32x16 \| [\d.]+ \| [\d.]+ \|", once, re.M)
    run(*report)
    assert good.read_text() == once


@pytest.mark.parametrize("page", ["docs/performance.md", "docs/performance-tables.md"])
def test_the_pages_of_the_project_can_be_filled(figures, page, tmp_path):
    copy = tmp_path / "copy.md"
    copy.write_text((ROOT / page).read_text("utf-8"), "utf-8")
    done = run("-c", REPORT, str(figures[1]), "--pages", str(copy))
    assert done.returncode == 0, done.stderr


CODE = """
from types import SimpleNamespace
import numpy as np
from bench.bars import Bar, bars
from bench.cases import LAYERS, every_case
from bench.race import Race
from bench.task import Contestant, Data, Peer, Task

names = [case.name for case in every_case()]
assert len(names) == len(set(names))
assert sum(LAYERS) == 53
assert len({bar.name for bar in bars(1)}) == len(list(bars(1)))

class Liar(Peer):
    name = "Liar"
    def contestants(self, task, data):
        yield Contestant("channels-first", "fresh", lambda: data.get("x"), lambda y: y)

class Refuser(Peer):
    name = "Refuser"
    def contestants(self, task, data):
        raise RuntimeError("not this shape")
        yield

task = Task("forward", (4, 3, 5, 5), threads=1)
race = Race(None, "a race", 0.0, 3)
for peer in (Liar(), Refuser()):
    race.enter(peer, task, Data(task.shape), {})
assert not race.contestants
liar, refuser = race.errors
assert "Liar" in liar and "wrong by" in liar, liar
assert "Refuser" in refuser and "not this shape" in refuser, refuser

order = []
class Stats:
    def update(self, seconds): order.append("|")
def runner(function, args, kwargs):
    return lambda loops: [function(*args) for _ in loops] and 1.0
benchmark = SimpleNamespace(_make_stats=lambda calls: Stats(), _make_runner=runner, disabled=False)
race = Race(benchmark, "turns", 0.0, 3)
for name in "abc":
    race.add(lambda name=name: order.append(name), peer=name).estimate = 1.0  # a turn is one call
race.run()
assert "".join(order) == "a|b|c|" * 3, order

record = {"group": "g", "case": "c", "layout": "l", "shape": "s", "work": "w", "layers": 2}
found = [record | {"peer": p, "seconds": s} for p, s in (("cybn", 2), ("x", 8), ("x", 4))]
(pair,) = Bar("", ("g",), 1.0, {"peer": "cybn"}, {"peer": "x"}).pairs(found)
assert pair.ratio == 0.5  # the quickest of theirs
assert not list(Bar("", ("g",), 1.0, {"peer": "cybn"}, {"peer": "y"}).pairs(found))
"""


def test_races_and_bars():
    done = run("-c", FIND + CODE)
    assert done.returncode == 0, done.stderr
