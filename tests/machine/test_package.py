"""The package: it is installed and complete, and its modules import in one direction only."""

import ast
import doctest
import importlib
import importlib.metadata
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cybn
from cybn import _runtime, family, functional, reference

HERE = Path(__file__).resolve().parents[2]  # the source tree, if the tests are in one
PACKAGE = Path(cybn.__file__).resolve().parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

PUBLIC = {
    *("BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Moments", "__version__"),
    *("batch_norm", "batch_norm_backward", "moments"),
    *("batch_norm_inference", "batch_norm_inference_backward"),
    *("Drift", "Layer", "Renorm", "population_statistics"),
    *("GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LayerNorm", "RMSNorm"),
    *("layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward"),
    *("group_norm", "group_norm_backward", "instance_norm", "instance_norm_backward"),
    *("empty_cache", "set_cache_limit"),
    *("get_num_threads", "set_num_threads", "show_config", "threads"),
}

# The modules and subpackages that each one may import. The name "" means cybn/__init__.py.
DOORS = {
    "_version": set(),
    "_words": set(),
    "_kernels": set(),
    "_memory": set(),
    "_foreign": set(),
    "_arguments": {"_foreign", "_memory"},
    "_chunks": set(),
    "_runtime": {"_version", "_kernels"},
    "_dispatch": {"_arguments", "_memory", "_runtime"},
    "_counts": {"_arguments"},
    "_merging": {"_counts"},
    "_measuring": {"_arguments", "_chunks", "_counts", "_dispatch"},
    "_moments": {"_arguments", "_counts", "_dispatch", "_measuring", "_merging", "_runtime"},
    "_gradients": {"_moments", "_dispatch", "_words"},
    "functional": {"_gradients", "_moments", "_arguments", "_dispatch", "_words"},
    "_by_sample": {"functional", "_moments", "_arguments", "_dispatch"},
    "_grouped": {"_by_sample", "_moments", "_arguments", "_words"},
    "family": {"_by_sample", "_grouped", "_moments", "_arguments", "_dispatch"},
    "_sample_moments": {"_arguments", "_counts", "_merging", "_moments"},
    "_trials": {"_moments"},
    "_explain": {"_arguments"},
    "layers": {
        *("family", "functional", "_dispatch", "_moments", "_sample_moments", "_trials"),
        *("_arguments", "_explain", "_runtime", "_words"),
    },
    "folding": {"layers", "interop", "_arguments"},
    "interop": {"layers", "_arguments", "_foreign"},
    "reference": {"_moments"},
    "population": {"layers", "_moments", "_measuring", "_foreign", "_trials"},
    "": {
        *("layers", "family", "functional", "_moments", "population"),
        *("folding", "interop"),  # imported on first use
        *("_memory", "_runtime", "_version"),
    },
    "plot": {""},
    "torch": {"functional", "_moments", "_dispatch", "_memory", "_ranks", "_runtime"},
    "_ranks": {"_dispatch", "_moments"},
    "mpi": {"layers", "_arguments", "_moments", "_ranks", "_trials", "_words"},
    "dask": {"_arguments", "_dispatch", "_moments"},
    "demo": {"", "_moments"},
    "_bench": {"functional", "_runtime", "_version"},
    "__main__": {"", "demo", "_bench", "_runtime", "_version"},
}
VISITORS = {  # only these may import optional packages
    *("dask", "demo", "_bench", "interop", "mpi", "plot", "torch", "__main__"),
}


def room(module):
    """Return the top-level part of a full module name: "layers" for cybn.layers._state."""
    return (module.split(".") + [""])[1]


def imported(path):
    """Yield the full names of all modules that a source file imports, also within functions."""
    parts = ["cybn", *path.relative_to(PACKAGE).with_suffix("").parts]
    package = parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            if base == ["cybn"]:  # from . import _layout, or a public name
                modules = {p.stem for p in PACKAGE.iterdir()} - PUBLIC
                for alias in node.names:
                    yield f"cybn.{alias.name}" if alias.name in modules else "cybn"
            else:
                yield ".".join(base)


def room_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def test_the_installed_package_is_under_test():
    """Tests use the installed package, or this tree if it was installed as editable.

    A cybn.egg-info, which a build leaves in the tree, does not make cybn an installed package.
    """
    found = importlib.metadata.distributions(name="cybn")
    installed = [each for each in found if each.read_text("INSTALLER")]
    if not installed:
        pytest.skip("cybn is on the path, but not installed")
    origin = json.loads(installed[0].read_text("direct_url.json") or "{}")
    editable = origin.get("dir_info", {}).get("editable", False)
    assert editable == (PACKAGE == HERE / "cybn"), "install cybn, and run pytest without python -m"


def test_public_names():
    assert set(cybn.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(cybn, name) is not None
    assert {*functional.__all__, *family.__all__} == set(reference.__all__)


@pytest.mark.parametrize("name", [*functional.__all__, *family.__all__])
def test_reference_has_the_same_signature(name):
    ours = inspect.signature(getattr(cybn, name)).parameters.values()
    twins = inspect.signature(getattr(reference, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in twins] == [
        (p.name, p.kind, p.default) for p in ours
    ]


def test_signatures_are_the_promised_ones():
    layer = inspect.signature(cybn.BatchNorm).parameters
    assert {name: p.default for name, p in layer.items()} == {
        "num_features": inspect.Parameter.empty,
        "axis": 1,
        "eps": 1e-5,
        "momentum": 0.1,
        "affine": True,
        "track_running_stats": True,
        "running_ddof": 1,
        "dtype": np.float32,
        "activation": None,
        "slope": 0.01,
        "nan_policy": "propagate",
        "virtual_batch_size": None,
        "renorm": None,
    }
    names = {f: list(inspect.signature(getattr(cybn, f)).parameters) for f in functional.__all__}
    fused = ["axis", "eps", "activation", "slope", "residual"]
    chosen = ["mask", "weights", "lengths"]
    forward = [*fused, *chosen, "masked", "out", "num_threads"]
    back = ["beta", *fused, *chosen, "masked", "from_output", "out", "out_residual", "num_threads"]
    assert names == {
        "batch_norm": ["x", "gamma", "beta", *forward],
        "batch_norm_inference": ["x", "mean", "var", "gamma", "beta", *forward],
        "batch_norm_backward": ["dy", "x", "moments", "gamma", *back],
        "batch_norm_inference_backward": ["dy", "x", "mean", "var", "gamma", *back],
        "moments": ["x", "axis", *chosen, "num_threads"],
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_run_downwards(path):
    here = room_of(path)
    assert here in DOORS, f"list in DOORS what {here} may import"
    for name in imported(path):
        if name.split(".")[0] == "cybn":
            there = room(name)
            assert there == here or there in DOORS[here], f"{here} imports {name}"
        elif here not in VISITORS:
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names | {"numpy"}, f"{here} imports {name}"


def test_import_loads_numpy_and_the_standard_library_alone():
    code = (
        "import sys; import numpy; before = set(sys.modules); import cybn; "
        "print(*sorted(set(sys.modules) - before))"
    )
    out = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    loaded = out.split()
    tops = {name.split(".")[0] for name in loaded}
    cython = {name for name in tops if name.startswith(("_cython", "cython_runtime"))}
    assert tops - cython <= sys.stdlib_module_names | {"numpy", "cybn"}
    assert not {room(name) for name in loaded} & (VISITORS | {"reference"})


def test_submodules_load_on_first_use():
    code = (
        "import sys, cybn; assert not {'cybn.folding', 'cybn.interop'} & set(sys.modules); "
        "assert {'folding', 'interop'} <= set(dir(cybn)); "
        "print(cybn.folding.fold_linear.__module__, cybn.interop.find.__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["cybn.folding._folds", "cybn.interop._convert"]
    with pytest.raises(AttributeError, match="module 'cybn' has no attribute 'foldings'"):
        _ = cybn.foldings


@pytest.mark.parametrize(
    "name",
    [
        *("cybn", "cybn.functional", "cybn._moments", "cybn.layers.batch_norm", "cybn._runtime"),
        *("cybn.folding", "cybn.folding._folds", "cybn.interop", "cybn.interop._arrays"),
        *("cybn.interop._convert", "cybn.interop._flax"),
        *("cybn.layers._parts", "cybn._trials", "cybn.layers.per_sample"),
        "cybn.population",
        "cybn.family",
    ],
)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, verbose=False).failed == 0
    examples = sum(len(test.examples) for test in doctest.DocTestFinder().find(module))
    assert examples, f"{name} has no examples"


@pytest.mark.parametrize("name", ["", *sorted(PUBLIC - {"__version__"})])
def test_public_names_are_documented(name):
    thing = getattr(cybn, name) if name else cybn
    assert inspect.getdoc(thing)


def test_show_config(capsys):
    cybn.show_config()
    lines = capsys.readouterr().out.splitlines()
    for label, value in {
        "cybn": cybn.__version__,
        "numpy": np.__version__,
        "levels compiled": "baseline",
        "levels supported": "baseline",
        "level active": _runtime.level,
        "openmp": str(_runtime.host.openmp() or "NONE"),
        "threads": str(cybn.get_num_threads()),
    }.items():
        assert any(line.startswith(label) and value in line for line in lines), label


def test_what_is_installed():
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file()]
    assert Path("py.typed") in files
    assert not [f for f in files if f.suffix in (".c", ".cpp", ".h")]
    assert not [f for f in files if "tests" in f.parts or f.name.startswith(("test_", "conftest"))]
    compiled = [f.name for f in files if f.suffix in (".so", ".pyd") and "_kernels" in f.parts]
    assert any(name.startswith("host.") for name in compiled)
    for kernel in ("batch_norm", "layer_norm"):
        assert any(name.startswith(f"{kernel}_baseline.") for name in compiled)
