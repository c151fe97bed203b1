"""docs/reference.md lists every public name, and all docstrings are complete."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import cybn

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"
PACKAGE = Path(cybn.__file__).parent
MODULES = ["cybn", "cybn.folding", "cybn.interop", "cybn.plot", "cybn.reference", "cybn.torch"]
MODULES += [f"cybn.{name}" for name in ("dask", "mpi") if (PACKAGE / f"{name}.py").exists()]
NEEDS = {
    "cybn.plot": "matplotlib",
    "cybn.torch": "torch",
    "cybn.mpi": "mpi4py",
    "cybn.dask": "dask",
}

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs docs/ beside the tests")


def listed():
    """Return the names that the page lists for each module."""
    found = {}
    blocks = re.split(r"\.\. currentmodule:: (\S+)\n", PAGE.read_text("utf-8"))
    for module, text in zip(blocks[1::2], blocks[2::2], strict=True):
        found.setdefault(module, []).extend(re.findall(r"^   (\w+)$", text, re.M))
    return found


def public(module):
    """Return the names in a module's __all__, read from its source without importing the module."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
    raise AssertionError(f"{module} has no __all__")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_listed_once(module):
    assert sorted(listed()[module]) == sorted(public(module))


def test_no_other_module_is_listed():
    assert set(listed()) == set(MODULES)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "cybn.reference"])
def test_docstrings_have_all_their_parameters(module):
    """Check numpydoc's rules: there is a docstring, with all parameters and the return value."""
    validate = pytest.importorskip("numpydoc.validate").validate
    if module in NEEDS:
        pytest.importorskip(NEEDS[module])
    found = []
    for name in public(module):
        value = getattr(importlib.import_module(module), name)
        if not inspect.isfunction(value):
            continue
        wrong = {code for code, _ in validate(f"{module}.{name}")["errors"]}
        found += [f"{name}: {code}" for code in wrong & {"GL08", "PR01", "PR02", "RT01", "SS01"}]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "cybn.reference"])
def test_every_public_name_has_an_example_that_runs(module):
    """Names of `cybn.reference` are left out: those of `cybn` have the examples."""
    if module in NEEDS:
        pytest.importorskip(NEEDS[module])
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(verbose=False)
    for name in public(module):
        value = getattr(importlib.import_module(module), name)
        (test,) = finder.find(value, f"{module}.{name}", globs={}) or [None]
        assert test is not None, f"{module}.{name} has no example"
        assert test.examples, f"{module}.{name} has no example"
        assert runner.run(test).failed == 0
