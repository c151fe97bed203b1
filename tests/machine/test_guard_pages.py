"""Every kernel runs on arrays that end, or start, at a page that must not be touched.

An access past either end of an array kills the process, whether it is an input, an output or
scratch memory. The sizes give every tail: of lanes, of pieces, of tiles, of whole cache lines.
"""

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cases import same_bits
from family_cases import group, instance, layer, rms
from fence import SIDES, fenced, rows_apart

import cybn
from cybn import _runtime

pytestmark = pytest.mark.row(32)

LEVELS = _runtime.usable_levels()
TURNS = 16  # each variant runs on every 16th size; dtypes and levels start at other sizes
DTYPES = ["f4", "f8", "f2", "bfloat16"]

SIZES = {  # (N, C, S)
    "short rows": [(2, 3, s) for s in range(1, 67)],
    "channels": [(3, c, 1) for c in range(1, 67)],
    "channels of three": [(2, c, 3) for c in range(1, 67)],
    "a tile": [(2, c, 1) for c in (*range(505, 520), *range(1017, 1032))],
    "rows in a tile": [(2, c, s) for s in (100, 511) for c in range(1, 12)],
    "runs": [(2, 2, s) for s in range(511, 577)],
    "a piece": [(1, 2, s) for s in range(1017, 1032)],
}
BATCH_NORM = {  # options of forward and backward
    "no parameters": {"parameters": None},
    "wide parameters": {"parameters": np.float64},
    "relu": {"activation": "relu"},
    "relu6": {"activation": "relu6", "in_place": True},
    "leaky_relu from y": {"activation": "leaky_relu", "from_output": True},
    "silu": {"activation": "silu"},
    "from y": {"from_output": True, "in_place": True},
    "residual": {"residual": True},
    "residual, relu": {"residual": True, "activation": "relu"},
    "residual, tanh": {"residual": True, "activation": "tanh", "in_place": True},
    "mask": {"mask": True},
    "mask, zeros, relu": {"mask": True, "masked": "zero", "activation": "relu"},
    "mask from y": {"mask": True, "from_output": True},
    "weights": {"weights": True},
    "weights, residual, relu": {"weights": True, "residual": True, "activation": "relu"},
    "weights, zeros, sigmoid": {"weights": True, "masked": "zero", "activation": "sigmoid"},
}


def dtype_of(name):
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def batch_norm(values, nsc, axis, apart, options, num_threads=None):
    """Return the results of the five operations on `values`; all arrays are allocated here."""
    n, c, s = nsc
    given = dict(options)

    def tensor(k):
        array = np.array(values[k : k + n * c * s].reshape(n, c, s))
        if axis != 1:
            array = np.array(array.swapaxes(1, 2), order="C")
        return rows_apart(array) if apart else array

    def vector(k):
        kind = given.get("parameters", np.float32)
        return None if kind is None else np.array(values[k : k + c], kind)

    x, dy, gamma, beta = tensor(0), tensor(1), vector(2), vector(3)
    gamma = None if gamma is None else np.abs(gamma) + np.float32(0.5)
    mean, var = np.array(values[4 : 4 + c], np.float64), np.arange(1.0, c + 1)
    shares = np.arange(n * s).reshape(n, s) % 3
    shared = {"axis": axis, "activation": given.get("activation"), "num_threads": num_threads}
    if "residual" in given:
        shared["residual"] = tensor(5)
    if "mask" in given:
        shared["mask"] = shares < 2
    if "weights" in given:
        shared["weights"] = shares / 4 + (np.arange(s) == 0)
    masked, inverse = {"masked": given.get("masked", "normalize")}, "from_output" in given

    def go(function, first, *arguments, **more):
        """Call a function; if it overwrites its first array, give it a copy of that array."""
        out = None
        if "in_place" in given:
            first = out = rows_apart(first) if apart else first.copy()
        return function(first, *arguments, **shared, **more, out=out)

    y, m = go(cybn.batch_norm, x, gamma, beta, **masked)
    fixed = go(cybn.batch_norm_inference, x, mean, var, gamma, beta, **masked)
    selected = {k: v for k, v in shared.items() if k in ("axis", "mask", "weights")}
    again = cybn.moments(x, **selected, num_threads=num_threads)
    m = cybn.Moments(m.count, np.array(m.mean), np.array(m.m2))
    back = {"beta": beta, "from_output": inverse}
    through = go(cybn.batch_norm_backward, dy, y if inverse else x, m, gamma, **back)
    source = fixed if inverse else x
    past = go(cybn.batch_norm_inference_backward, dy, source, mean, var, gamma, **back)
    return [y, m.mean, m.m2, fixed, again.mean, again.m2, *through, *past]


def check(run):
    """Run with both kinds of fences: the process survives and the bits are equal."""
    results = []
    for side in SIDES:
        with fenced(side), np.errstate(all="ignore"):
            results.append(run())
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


def each_variant(values, sizes, turn, turns, num_threads=None):
    """Check each variant of the options on every `turns`-th size; return the number of runs."""
    runs = 0
    for i, nsc in enumerate(sizes):
        for j, options in enumerate(BATCH_NORM.values()):
            if nsc[0] * nsc[2] > 1 and (i + j) % turns == turn:
                axis, apart = (1, -1)[(i // 2 + j) % 2], (i // 3 + j) % 2
                check(partial(batch_norm, values, nsc, axis, apart, options, num_threads))
                runs += 1
    return runs


@pytest.fixture(scope="module")
def values():
    return np.random.default_rng(32).standard_normal(1 << 18).astype(np.float32)


@pytest.fixture
def tiny_caches(level):
    """Make the kernels assume tiny caches, so that all outputs are streamed past them."""
    modules = [_runtime.kernels_at(level, kernel) for kernel in ("batch_norm", "layer_norm")]
    for module in modules:
        module.set_caches(4096, 4096)
    yield
    for kernel in ("batch_norm", "layer_norm"):
        _runtime.kernels_at(level, kernel)


every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@every_dtype
@every_size
def test_batch_norm(values, sizes, dtype, level, figure):
    turn = 4 * DTYPES.index(dtype) + LEVELS.index(level)
    runs = each_variant(values.astype(dtype_of(dtype)), sizes, turn, TURNS)
    figure(32, "shapes", runs, how="sum")


@pytest.mark.slow
@every_dtype
@every_size
def test_batch_norm_every_variant_on_every_size(values, sizes, dtype, level, figure):
    runs = each_variant(values.astype(dtype_of(dtype)), sizes, 0, 1)
    figure(32, "shapes", runs, how="sum")


@every_dtype
def test_past_the_caches(values, dtype, tiny_caches, figure):
    sizes = [(2, 3, s) for s in range(130, 148)] + [(2, 2, s) for s in range(1020, 1042)]
    sizes += [(40, c, 1) for c in range(30, 52)]
    runs = each_variant(values.astype(dtype_of(dtype)), sizes, DTYPES.index(dtype), 8)
    figure(32, "shapes", runs, how="sum")


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_several_threads(values, dtype, level, figure):
    sizes = [(5, 7, 1873), (257, 257, 1), (4099, 17, 1), (16385, 5, 1), (1, 2, 65541), (3, 83, 511)]
    runs = each_variant(values.astype(dtype), sizes, 0, 4, num_threads=3)
    figure(32, "shapes", runs, how="sum")


# ---- the other norms, and layers ---------------------------------------------------------

ROWS = [
    *(make(3, d) for make in (layer, rms) for d in (*range(2, 67), *range(1017, 1032))),
    *(group(2, 2, 4, s) for s in (*range(2, 67), *range(505, 520))),
    *(group(3, 2, c, 7) for c in range(3, 160, 3)),
    *(instance(2, 3, s) for s in (*range(2, 67), *range(505, 577), *range(1017, 1032))),
    *(instance(2, s, 3, axis=-1) for s in range(2, 67)),
    *(group(2, 2, 5, c, axis=-1) for c in (*range(2, 134, 2), *range(1018, 1032, 2))),
]


def family(case, values, in_place):
    size, parameters = np.prod(case.shape), np.prod(case.parameter_shape)
    x, dy = (np.array(values[k : k + size].reshape(case.shape)) for k in (0, 1))
    gamma, beta = (
        np.array(values[k : k + parameters].reshape(case.parameter_shape)) for k in (2, 3)
    )
    out = x.copy() if in_place else None
    y, statistics = case.forward(out if in_place else x, gamma, beta, out=out)
    if case.centred:
        fields = np.array(statistics.mean), np.array(statistics.m2)
        statistics = cybn.Moments(statistics.count, *fields)
    else:
        fields = (statistics,)
    out = dy if in_place else None
    return [y, *fields, *case.backward(dy, x, statistics, gamma, out=out)]


def check_family(values, figure):
    for i, case in enumerate(ROWS):
        check(partial(family, case, values, i % 2))
    figure(32, "shapes", len(ROWS), how="sum")


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_family(values, dtype, level, figure):
    check_family(values.astype(dtype), figure)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_family_past_the_caches(values, dtype, tiny_caches, figure):
    check_family(values.astype(dtype), figure)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_layer(values, dtype, level):
    def run(c):
        bn = cybn.BatchNorm(c, dtype=dtype)
        x = np.array(values[: 3 * c].reshape(3, c), dtype)
        results = [bn(x), bn.backward(np.array(x))]
        return [*results, bn.running_mean, bn.running_var, bn.eval()(x), bn.grad_gamma]

    for c in range(1, 67):
        check(partial(run, c))


# ---- the fence ---------------------------------------------------------------------------

TOUCH = """
import ctypes, sys
sys.path.insert(0, {tests!r})
from fence import fenced
import numpy as np

with fenced({side!r}):
    x = np.zeros({shape})
address = x.ctypes.data + {offset}
ctypes.memset(x.ctypes.data, 1, x.nbytes)
print("touched what is its own", flush=True)
{access}
"""


@pytest.mark.parametrize("access", ["ctypes.memset(address, 0, 1)", "ctypes.string_at(address, 1)"])
@pytest.mark.parametrize(("side", "offset"), [("end", "x.nbytes"), ("start", "-1")])
def test_the_fence_holds(side, offset, access):
    tests = str(Path(__file__).parents[1] / "tools")
    code = TOUCH.format(tests=tests, side=side, offset=offset, access=access, shape=(3, 7))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "touched what is its own\n", done.stderr
    assert done.returncode == -signal.SIGSEGV
