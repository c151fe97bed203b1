"""The code blocks of the documentation's pages run as they are."""

import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs docs/ beside the tests")


# Pages whose Python blocks are run, here or as doctests in test_statistics_docs.py. Blocks that
# cannot be run are marked: ```python fragment.
RUN = {"README.md", "index.md", "fifteen-minutes.md", "training-loop.md", "speed.md", "interop.md"}
RUN |= {"inference.md", "which-norm.md", "statistics.md", "padded-sequences.md"}


def text_of(page):
    return (ROOT / page if page == "README.md" else DOCS / page).read_text("utf-8")


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", text_of(page), re.S | re.M)


@pytest.mark.parametrize("page", ["README.md", *sorted(p.name for p in DOCS.glob("*.md"))])
def test_every_block_is_run_or_marked_as_a_fragment(page):
    assert bool(blocks(page)) == (page in RUN)


def run(page, **changes):
    """Run the Python blocks of a page in one namespace, and return it."""
    code = "\n".join(blocks(page))
    for old, new in changes.values():
        assert old in code
        code = code.replace(old, new)
    names = {"__name__": page}
    exec(compile(code, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", ["README.md", "index.md", "speed.md"])
def test_short_examples(page):
    names = run(page)
    assert np.all(np.isfinite(names["y"]))


def test_readme_is_short():
    assert len(text_of("README.md").splitlines()) < 90


def test_fifteen_minutes(capsys):
    run("fifteen-minutes.md")
    out = capsys.readouterr().out.splitlines()
    said = re.findall(r"print\(.*?\)  # (.*?)(?::.*)?$", text_of("fifteen-minutes.md"), re.M)
    assert len(said) == 6
    assert out == said


def test_training_loop(tmp_path, capsys):
    pytest.importorskip("sklearn")
    names = run(
        "training-loop.md", epochs=("range(20)", "range(2)"), place=("/tmp/", f"{tmp_path}/")
    )
    assert names["same"]
    assert names["one"].shape == (1, 10)
    assert names["accuracy"] > 0.8
    assert re.fullmatch(r"loss [\d.]+, test accuracy [\d.]+%\n", capsys.readouterr().out)


def test_interop(tmp_path):
    names = run("interop.md", place=("/tmp/", f"{tmp_path}/"))
    assert list(names["done"].taken) == ["stem.bn"]
    assert names["done"].passed_over == {}
    assert "stem/bn/moving_variance" in names["done"].state
    assert list(names["layers"]) == ["stem.bn"]
    assert len(names["model"]) == 8


def test_inference(capsys):
    torch = pytest.importorskip("torch")
    less = {"rounds": ("range(200)", "range(1)"), "size": ("320, 320", "64, 64")}
    less |= {"steps": ("range(20)", "range(4)"), "images": ("128, 128", "64, 64")}
    with torch.random.fork_rng():
        names = run("inference.md", **less)
    out = capsys.readouterr().out
    errors = [float(e) for e in re.findall(r"error (\S+) of the largest output", out)]
    assert len(errors) == len(names["networks"])
    assert max(errors) <= 1e-5
    worst = [float(e) for e in re.findall(r"(\S+) eps of the sum", out)]
    assert len(worst) == 6
    assert max(worst) <= 0.5
    assert len(re.findall(r"least \S+ ms$", out, re.M)) == len(names["networks"])
    assert np.all(np.isfinite(names["exact"].numpy()))


def test_which_norm():
    names = run("which-norm.md")
    assert names["shapes"] == {"batch": (32,), "group": (8, 4), "layer": (8,), "instance": (8, 32)}
    eps = np.finfo(np.float32).eps
    assert names["largest"] <= 4 * eps
    np.testing.assert_allclose(names["squares"], 1, rtol=4 * eps)
    assert np.abs(names["one_group"]).max() <= 8 * eps
    assert np.abs(names["c_groups"]).max() <= 8 * eps


def test_which_norm_script(monkeypatch, capsys, tmp_path):
    for name in ("sklearn", "threadpoolctl", "tqdm", "matplotlib"):
        pytest.importorskip(name)
    picture = tmp_path / "which-norm.png"
    less = ["--epochs", "1", "--repeats", "1", "--trials", "1", "--batch-sizes", "32", "--picture"]
    monkeypatch.setattr(sys, "argv", ["which_norm.py", *less, os.fspath(picture)])
    runpy.run_path(os.fspath(DOCS / "examples" / "which_norm.py"), run_name="__main__")
    table, rates, contrasts = capsys.readouterr().out.strip().split("\n\n")
    cell = r"\d+\.\d \(\d+\.\d to \d+\.\d\) \|"
    for kind in ("batch", "group", "layer", "RMS", "instance", "none"):
        assert re.search(rf"^\| +{kind} \|( +{cell})$", table, re.M)
        assert re.search(rf"^\| +{kind} \| +0\.(0025|01|04) \|$", rates, re.M)
        row = re.search(rf"^\| +{kind} \|( +{cell}){{4}}$", contrasts, re.M)
        assert row
        if kind not in ("batch", "none"):  # these norms remove contrast
            first, *fainter = re.findall(r"(\S+) \(", row[0])
            assert all(abs(float(other) - float(first)) <= 1 for other in fainter)
    assert picture.stat().st_size > 10_000
