"""CONTRIBUTING.md, CHANGELOG.md and CITATION.cff are in an sdist; files and links in them exist."""

import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import cybn

ROOT = Path(__file__).resolve().parents[2]
FILES = ["CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"]

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the source tree around the tests"
)


def text_of(name):
    return (ROOT / name).read_text("utf-8")


@pytest.mark.parametrize("name", FILES)
def test_an_sdist_takes_it_along(name):
    rules = re.findall(r"^include (.*)$", text_of("MANIFEST.in"), re.MULTILINE)
    assert any(fnmatch(name, rule) for line in rules for rule in line.split())


@pytest.mark.parametrize("name", FILES[:2] + FILES[3:])
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)", text_of(name))
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def anchors(page):
    """Return the headings of a page in the form that links use."""
    heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", ["README.md", *sorted(p.name for p in ROOT.glob("docs/*.md"))])
def test_links_between_pages_lead_to_a_heading(page):
    here = ROOT / page if page == "README.md" else ROOT / "docs" / page
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", here.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        there = here.parent / path if path else here
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_sources_that_are_named_are_there():
    """CONTRIBUTING.md names these sources without their folder."""
    names = set(re.findall(r"`(\w+\.(?:py|pyx|pxd))`", text_of("CONTRIBUTING.md")))
    assert names
    for name in names:
        assert (
            any((ROOT / "cybn").rglob(name))
            or any((ROOT / "tests").rglob(name))
            or (ROOT / name).exists()
        ), name


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_files_that_are_named_are_there(name):
    paths = set(re.findall(r"(?<![\w/])(?:cybn|tests|bench|docs|\.ci)/[\w./-]*\w", text_of(name)))
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_version_is_the_package_s():
    assert re.search(r"^version: (.*)$", text_of("CITATION.cff"), re.M)[1] == cybn.__version__
    versions = re.findall(r"^## \[([^]]+)\]", text_of("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert versions[1] == cybn.__version__


def test_the_changelog_has_the_form():
    """The form is that of Keep a Changelog: dated versions and known kinds of changes."""
    text = text_of("CHANGELOG.md")
    for version in re.findall(r"^## (.*)$", text, re.MULTILINE)[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version)
    kinds = re.findall(r"^### (.*)\n\n(- )?", text, re.MULTILINE)
    known = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {kind for kind, _ in kinds} <= known
    assert all(entry for _, entry in kinds)


def test_the_set_up_takes_what_there_is():
    extras = re.findall(r"pip install -e '\.\[(\w+)\]'", text_of("CONTRIBUTING.md"))
    assert extras
    for extra in extras:
        assert re.search(rf"^{extra} = \[", text_of("pyproject.toml"), re.MULTILINE)


def metadata(folder, home):
    """Return the metadata for a package index, if the repository's address is `home`."""
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"CYBN_HOME": home}, check=True)
    return (folder / "cybn.egg-info" / "PKG-INFO").read_text("utf-8")


def test_links_of_the_index_page_lead_to_files(tmp_path):
    home = "https://example.org/cybn"
    text = metadata(tmp_path, home)
    links = re.findall(r"\]\(([^)#]+)", text) + re.findall(r"^Project-URL: .*, (.*)$", text, re.M)
    assert len(links) > 15
    for link in links:
        assert link.startswith(home), link
        assert (ROOT / link.removeprefix(home).removesuffix("?raw=true").lstrip("/")).exists(), link


def test_an_index_page_without_an_address_has_no_links_into_nothing(tmp_path):
    text = metadata(tmp_path, "")
    assert not re.findall(r"\]\((?!https?://)", text)
    assert "Project-URL" not in text
    assert "All figures" in text  # the text of links is kept


def test_the_thresholds_that_are_tested_are_those_of_the_kernels():
    """tests/batch/test_shapes.py has them as numbers, because it also runs without the sources."""
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "cybn/_kernels").glob("*.p[xy]*"))
    block = re.search(r"# These constants.*?\n\n", text_of("tests/batch/test_shapes.py"), re.DOTALL)
    for names, values in re.findall(r"^([A-Z_, ]+) = ([\d, ]+)$", block[0], re.MULTILINE):
        for name, value in zip(names.split(", "), values.split(", "), strict=True):
            assert re.search(rf"^    {name} = {value} ", sources, re.MULTILINE), name
