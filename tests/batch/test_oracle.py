"""The kernels give the results of the textbook code in plain.pyx, which has no optimization."""

import numpy as np
import pytest
from bounds import ULP32, ULP64
from cases import DTYPES, FAMILIES, normal_case

import cybn
from cybn import _dispatch, _memory
from cybn._dispatch import arguments
from cybn._kernels import plain

SHAPES = [*FAMILIES, (1, 1, 2), (2, 3, 1), (5, 7, 31), (4, 2, 256), (33, 5, 49)]


def textbook(x, dy, gamma, beta, eps, threads):
    """Return y, mean, M2, dx, dgamma and dbeta of the textbook code."""
    y, dx = np.empty_like(x), np.empty_like(x)
    mean, m2, dgamma, dbeta = np.empty((4, x.shape[1]))
    plain.forward(x, gamma, beta, eps, y, mean, m2, threads)
    plain.backward(dy, x, mean, m2, gamma, eps, dx, dgamma, dbeta, threads)
    return y, mean, m2, dx, dgamma, dbeta


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_beside_the_textbook(rng, shape, dtype, level):
    x, dy, gamma, beta = normal_case(rng, shape, dtype, offset=1.0)
    ulp = ULP32 if dtype == np.float32 else ULP64
    y, mean, m2, dx, dgamma, dbeta = textbook(x, dy, gamma, beta, 1e-5, 1)
    ours, m = cybn.batch_norm(x, gamma, beta)
    count = x.size / shape[1]
    near = 64 * ulp
    assert np.abs(ours - y).max() <= near * (np.abs(y).max() + 2)
    assert np.abs(m.mean - mean).max() <= near * (np.abs(mean).max() + 1)
    assert np.abs(m.m2 - m2).max() <= near * m2.max()
    got = cybn.batch_norm_backward(dy, x, m, gamma)
    long = near * np.sqrt(count) * np.abs(dy).max() * np.abs(ours).max()
    assert np.abs(got[0] - dx).max() <= near * (np.abs(dx).max() + 1)
    assert np.abs(got[1] - dgamma).max() <= long + near
    assert np.abs(got[2] - dbeta).max() <= long + near


def test_the_textbook_gives_the_same_bits_on_any_number_of_threads(rng):
    case = normal_case(rng, (6, 5, 40), np.float32)
    one, three = (textbook(*case, 1e-5, threads) for threads in (1, 3))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, three, strict=True))


def test_x_that_is_reshaped_meanwhile_is_refused(rng, monkeypatch):
    """Another thread could do this: Python code allocates large results, so threads may switch."""
    x = rng.standard_normal((4, 2, 40000)).astype(np.float32)

    def reshaping(like):
        calls_before.append(x.shape)
        x.resize((2, 4, 40000), refcheck=False)
        return _memory.empty_like(like)

    calls_before = []
    monkeypatch.setattr(arguments, "kept_empty_like", reshaping)
    with pytest.raises(RuntimeError, match="x was given another shape during the call"):
        cybn.batch_norm(x)
    assert calls_before == [(4, 2, 40000)]


# ---- the path of a call through the kernels ------------------------------------------------

RUNS, SHORT, LAST = (32, 64, 3136), (32, 64, 49), (4096, 64, 1)
PLAIN = {"sums from": "memory", "writes from": "memory", "gradient": "given"}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (("forward", *RUNS), PLAIN | {"schedule": "owned", "sums": "runs", "writes": "runs"}),
        (("forward", *SHORT), PLAIN | {"schedule": "owned", "sums": "columns"}),
        (("forward", *LAST), PLAIN | {"schedule": "shared", "sums": "columns"}),
        (("inference", 32, 64, 100), PLAIN | {"writes": "runs"}),
        (("inference", 32, 64, 49), PLAIN | {"writes": "columns"}),
        (("backward", 1, 3, 40), PLAIN | {"sums": "runs"}),  # few rows
        (("inference_backward", *RUNS), PLAIN),
    ],
)
def test_loops_follow_the_shape(call, expected):
    route = _dispatch.route(*call)
    assert {name: route[name] for name in expected} == expected


@pytest.mark.parametrize("shape", [RUNS, SHORT, LAST], ids=["runs", "short", "last"])
@pytest.mark.parametrize("dtype", "fdeE")
@pytest.mark.parametrize(
    ("activation", "residual", "forward", "backward", "gradient"),
    [
        (None, False, "memory", ("memory", "memory"), "given"),
        ("relu", False, "memory", ("memory", "memory"), "again"),
        ("relu6", False, "memory", ("memory", "memory"), "again"),
        ("leaky_relu", False, "stages", ("memory", "memory"), "again"),
        ("hardswish", False, "stages", ("memory", "memory"), "again"),
        ("silu", False, "stages", ("stages", "memory"), "in dx"),
        ("gelu", False, "stages", ("stages", "memory"), "in dx"),
        (None, True, "memory", ("stages", "memory"), "in dresidual"),
        ("relu", True, "memory", ("stages", "memory"), "in dresidual"),
        ("silu", True, "stages", ("stages", "memory"), "in dresidual"),
    ],
)
def test_stages_follow_what_there_is(
    shape, dtype, activation, residual, forward, backward, gradient
):
    options = {"activation": activation, "residual": residual}
    assert _dispatch.route("forward", *shape, dtype, **options)["writes from"] == forward
    if dtype in "eE" and gradient == "in dx":
        gradient = "again"  # rounded once, at the end
    if gradient == "again" and dtype != "f":
        backward = "stages", "stages"  # only float32 has loops with kinks
    elif dtype in "fd" and gradient.startswith("in"):
        backward = "kept", backward[1]  # not rounded, so the sums can read it
    route = _dispatch.route("backward", *shape, dtype, **options)
    assert (route["sums from"], route["writes from"]) == backward
    assert route["gradient"] == gradient


@pytest.mark.parametrize("masked", ["normalize", "zero"])
@pytest.mark.parametrize("operation", ["forward", "inference", "backward", "inference_backward"])
@pytest.mark.parametrize("shape", [RUNS, SHORT, LAST], ids=["runs", "short", "last"])
@pytest.mark.parametrize("dtype", "fdeE")
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu", "silu"])
def test_masks_are_stages(operation, masked, shape, dtype, residual, activation):
    options = {"activation": activation, "residual": residual, "masked": masked}
    route = _dispatch.route(operation, *shape, dtype, mask=True, **options)
    assert route["sums from"] == "stages"
    plain = operation in ("forward", "inference") and masked == "normalize"
    plain &= activation in (None, "relu", "relu6")  # the loop that writes y has these limits
    assert route["writes from"] == ("memory" if plain else "stages")
    weighted = _dispatch.route(operation, *shape, dtype, weights=True, **options)
    assert weighted == route


@pytest.mark.parametrize(
    ("options", "way", "stream"),
    [
        ({"l2": 1 << 22}, "plain", False),
        ({"l2": 1 << 18}, "plain", True),
        ({"l2": 1 << 22, "l3": 1 << 20}, "plain", True),
        ({"l2": 1 << 18, "in_place": True}, "plain", False),
        ({"l2": 1 << 17, "dtype": "e"}, "float16", True),
        ({"l2": 1 << 22, "dtype": "e"}, "float16", False),
        ({"l2": 1 << 17, "dtype": "E"}, "bfloat16", True),
    ],
)
def test_results_go_past_the_caches_where_these_do_not_hold_them(options, way, stream):
    route = _dispatch.route("forward", 32, 64, 196, **options)
    assert (route["way"], route["stream"]) == (way, stream)
