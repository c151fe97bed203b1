"""docs/reference.md has every public name, and their docstrings say what a reader looks for."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"
MODULES = ["cybn", "cybn.folding", "cybn.interop", "cybn.plot", "cybn.reference", "cybn.torch"]
NEEDS = {"cybn.plot": "matplotlib", "cybn.torch": "torch"}

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the pages are not beside the tests")


def listed():
    """Return the names that the page lists for each module."""
    found = {}
    blocks = re.split(r"\.\. currentmodule:: (\S+)\n", PAGE.read_text("utf-8"))
    for module, text in zip(blocks[1::2], blocks[2::2], strict=True):
        found.setdefault(module, []).extend(re.findall(r"^   (\w+)$", text, re.M))
    return found


def public(module):
    if module in NEEDS:
        pytest.importorskip(NEEDS[module])
    names = importlib.import_module(module).__all__
    return [name for name in names if not name.startswith("__")]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_listed_once(module):
    assert sorted(listed()[module]) == sorted(public(module))


def test_no_other_module_is_listed():
    assert set(listed()) <= {*MODULES, "cybn.mpi", "cybn.dask"}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "cybn.reference"])
def test_docstrings_have_all_their_parameters(module):
    """By numpydoc's own rules: a docstring, all parameters, and what is returned."""
    validate = pytest.importorskip("numpydoc.validate").validate
    found = []
    for name in public(module):
        value = getattr(importlib.import_module(module), name)
        if not inspect.isfunction(value):
            continue
        wrong = {code for code, _ in validate(f"{module}.{name}")["errors"]}
        found += [f"{name}: {code}" for code in wrong & {"GL08", "PR01", "PR02", "RT01", "SS01"}]
    assert not found, "\n".join(found)
