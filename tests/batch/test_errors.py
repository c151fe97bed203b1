"""Invalid input raises an error whose type and message are right, and changes nothing."""

import numpy as np
import pytest
from layer_cases import snapshot

import cybn

C = 3
X = np.random.default_rng(0).standard_normal((4, C, 5)).astype(np.float32)
M = cybn.moments(X)
V = np.ones(C)


def forward(x=X, gamma=None, beta=None, **options):
    return cybn.batch_norm(x, gamma, beta, **options)


def inference(x=X, mean=V, var=V, gamma=None, beta=None, **options):
    return cybn.batch_norm_inference(x, mean, var, gamma, beta, **options)


def backward(x=X, dy=None, moments=M, gamma=None, **options):
    return cybn.batch_norm_backward(x if dy is None else dy, x, moments, gamma, **options)


def inference_backward(x=X, dy=None, mean=V, var=V, gamma=None, **options):
    return cybn.batch_norm_inference_backward(
        x if dy is None else dy, x, mean, var, gamma, **options
    )


def statistics(x=X, **options):
    return cybn.moments(x, **options)


WRITERS = [forward, inference, backward, inference_backward]
VECTORS = [
    (forward, "gamma"),
    (forward, "beta"),
    (inference, "mean"),
    (inference, "var"),
    (inference, "gamma"),
    (inference, "beta"),
    (backward, "gamma"),
    (inference_backward, "mean"),
    (inference_backward, "var"),
    (inference_backward, "gamma"),
]
TENSORS = [
    *((call, "x") for call in [*WRITERS, statistics]),
    (backward, "dy"),
    (inference_backward, "dy"),
]
each_function = pytest.mark.parametrize("call", [*WRITERS, statistics])
each_writer = pytest.mark.parametrize("call", WRITERS)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def raises(error, message, call, **arguments):
    """Check the error and its message, and that `out` was not written to."""
    out = arguments.get("out")
    before = out.tobytes() if isinstance(out, np.ndarray) else None
    if call is not statistics and "out" not in arguments:
        arguments["out"] = out = np.full(X.shape, 7, np.float32)
        before = out.tobytes()
    with pytest.raises(error, match=message):
        call(**arguments)
    assert before is None or out.tobytes() == before


# ---- shapes ------------------------------------------------------------------------------


@each_function
@pytest.mark.parametrize("shape", [(), (C,)])
def test_rank(call, shape):
    x = np.zeros(shape, np.float32)
    raises(ValueError, r"x has shape \((3,)?\); it must have at least 2 axes", call, x=x)


@each_function
@pytest.mark.parametrize("axis", [3, -4])
def test_axis_out_of_range(call, axis):
    raises(ValueError, rf"axis is {axis}; x has 3 axes.*-3\.\.2", call, axis=axis)


@each_function
@pytest.mark.parametrize("axis", [1.0, None, "1"])
def test_axis_no_int(call, axis):
    raises(TypeError, f"axis is {axis!r}; it must be an int", call, axis=axis)


@pytest.mark.parametrize(("call", "name"), VECTORS)
@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 3), (3, 1)])
def test_vector_of_the_wrong_size(call, name, shape):
    message = rf"{name} has shape \({', '.join(map(str, shape))},?\); it must have shape \(3,\)"
    raises(ValueError, message, call, **{name: np.ones(shape)})


def test_moments_of_another_batch():
    raises(
        ValueError,
        r"moments\.mean has shape \(4,\); it must have shape \(3,\)",
        backward,
        moments=cybn.Moments(20, np.zeros(4), np.ones(4)),
    )
    raises(
        ValueError,
        "moments has count 19; a channel of x has 20 values",
        backward,
        moments=cybn.Moments(19, np.zeros(C), np.ones(C)),
    )
    raises(TypeError, "moments is of type tuple; it must be the Moments", backward, moments=(V, V))


@pytest.mark.parametrize("call", [backward, inference_backward])
def test_dy_of_another_shape(call):
    message = r"dy has shape \(3, 3, 5\); it must have the shape of x, \(4, 3, 5\)"
    raises(ValueError, message, call, dy=X[:3])
    raises(
        ValueError, "dy is float64; it must have the dtype of x, float32", call, dy=X.astype("d")
    )


# ---- dtypes ------------------------------------------------------------------------------

BAD_DTYPES = ["i4", "u1", "?", "c8", "O", "U3", "S3", "M8[s]", "g"]


@pytest.mark.parametrize(("call", "name"), TENSORS + VECTORS)
def test_dtypes(call, name):
    tensor = (call, name) in TENSORS
    good = X if tensor else V
    for dtype in [*BAD_DTYPES, *([] if tensor else ["f2"])]:  # only tensors have half types
        bad = np.zeros(good.shape, dtype)
        message = rf"{name} is {bad.dtype}; it must be float32 or float64".replace("[", r"\[")
        raises(TypeError, message, call, **{name: bad})


@pytest.mark.parametrize(("call", "name"), TENSORS + VECTORS)
def test_masked_arrays(call, name):
    good = X if (call, name) in TENSORS else V
    message = rf"{name} is a masked array.*{name}\.filled"
    raises(TypeError, message, call, **{name: np.ma.masked_array(good)})


# ---- too few values ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, C), (1, C, 1, 1)])
def test_one_value_a_channel(shape):
    x = np.ones(shape, np.float32)
    for call in (forward, backward):
        raises(ValueError, r"one value a channel has no variance.*eval\(\)", call, x=x)
    assert inference(x).shape == inference_backward(x)[0].shape == shape
    assert statistics(x).count == 1


@pytest.mark.parametrize("shape", [(0, C), (0, C, 4), (4, C, 0), (2, C, 3, 0)])
def test_empty(shape):
    x = np.ones(shape, np.float32)
    for call in (forward, backward, statistics):
        raises(ValueError, r"x has shape .*no values", call, x=x)
    assert inference(x).shape == shape
    dx, dgamma, dbeta = inference_backward(x)
    assert dx.shape == shape
    assert dgamma.tolist() == dbeta.tolist() == [0, 0, 0]


# ---- options -----------------------------------------------------------------------------


@each_writer
def test_eps(call):
    bad = [-1e-5, np.nan, np.inf] + [0.0] * (call in (forward, backward))
    for eps in bad:
        raises(ValueError, f"eps is {eps}; it must be", call, eps=eps)


@each_function
def test_num_threads(call):
    for n in (0, -2):
        raises(ValueError, f"num_threads is {n}; it must be at least 1", call, num_threads=n)
    for n in (1.0, "2", True):
        raises(TypeError, f"num_threads is {n!r}; it must be an int", call, num_threads=n)


# ---- out ---------------------------------------------------------------------------------


@each_writer
def test_out(call):
    read_only = X.copy()
    read_only.setflags(write=False)
    raises(ValueError, r"out has shape \(4, 3, 4\).*\(4, 3, 5\)", call, out=X[..., :4].copy())
    raises(ValueError, "out is float64; .* dtype of x, float32", call, out=X.astype("d"))
    raises(ValueError, "out is read-only", call, out=read_only)
    raises(TypeError, "out is of type list; it must be a plain NumPy array", call, out=X.tolist())


@each_writer
def test_out_overlaps_in_part(call):
    buffer = np.full((5, C, 5), 2, np.float32)
    for name in ("x", "dy") if call in (backward, inference_backward) else ("x",):
        raises(ValueError, "out overlaps", call, out=buffer[1:], **{name: buffer[:-1]})


def test_out_may_be_an_input():
    for call, name in [
        (forward, "x"),
        (inference, "x"),
        (backward, "dy"),
        (inference_backward, "dy"),
    ]:
        fresh, same = X.copy(), X.copy()
        want, got = call(**{name: fresh}), call(**{name: same}, out=same)
        want, got = (r if isinstance(r, np.ndarray) else r[0] for r in (want, got))
        assert got is same
        np.testing.assert_array_equal(got, want)


# ---- layers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"num_features": 0}, "num_features is 0; it must be at least 1"),
        (TypeError, {"num_features": 2.0}, "num_features is 2.0; it must be an int"),
        (TypeError, {"num_features": True}, "num_features is True; it must be an int"),
        (TypeError, {"axis": 1.5}, "axis is 1.5; it must be an int"),
        (ValueError, {"eps": -1e-5}, "eps is -1e-05; it must be"),
        (ValueError, {"eps": np.nan}, "eps is nan; it must be"),
        (ValueError, {"momentum": -0.1}, r"momentum is -0.1; it must be in \[0, 1\], or None"),
        (ValueError, {"momentum": 1.1}, r"momentum is 1.1; it must be in \[0, 1\], or None"),
        (ValueError, {"momentum": np.nan}, r"momentum is nan; it must be in \[0, 1\]"),
        (ValueError, {"running_ddof": 2}, "running_ddof is 2; it must be 0"),
        (TypeError, {"dtype": np.float16}, "dtype is float16; it must be float32 or float64"),
        (TypeError, {"dtype": int}, "dtype is int64; it must be float32 or float64"),
    ],
)
@pytest.mark.parametrize("make", [cybn.BatchNorm, cybn.BatchNorm2d])
def test_construction(make, error, options, message):
    with pytest.raises(error, match=message):
        make(**{"num_features": 4} | options)


@pytest.fixture
def bn():
    layer = cybn.BatchNorm1d(C)
    layer(X)
    layer.backward(X)
    return layer


@each_mode
@pytest.mark.parametrize(
    ("error", "x", "message"),
    [
        (ValueError, X[0, 0], r"x has shape \(5,\); BatchNorm1d takes 2 axes, \(N, C\)"),
        (ValueError, X[:, :2], r"x has shape \(4, 2, 5\), with 2 channels.*num_features=3"),
        (TypeError, X.astype(int), "x is int64; it must be float32 or float64"),
        (TypeError, [["a", "b", "c"]], "x is <U1; it must be float32 or float64"),
        (TypeError, np.ma.masked_array(X), "x is a masked array"),
    ],
)
def test_layer_input(error, x, message, training, bn):
    before = snapshot(bn.train(training))
    with pytest.raises(error, match=message):
        bn(x)
    assert snapshot(bn) == before


def test_layer_too_few_values(bn):
    before = snapshot(bn)
    with pytest.raises(ValueError, match=r"eval\(\)"):
        bn(X[:1, :, :1])
    with pytest.raises(ValueError, match="no values"):
        bn(X[:0])
    assert snapshot(bn) == before
    assert bn.eval()(X[:1, :, :1]).shape == (1, C, 1)
    assert bn(X[:0]).shape == (0, C, 5)
    assert bn.backward(X[:0]).shape == (0, C, 5)


@each_mode
def test_layer_out(training, bn):
    before, out = snapshot(bn.train(training)), np.full((5, C, 5), 2, np.float32)
    for x, bad in [(X, out), (X, out[1:].astype("d")), (out[1:], out[:-1])]:
        with pytest.raises(ValueError, match=r"out (has shape|is float64|overlaps)"):
            bn(x, out=bad)
    assert snapshot(bn) == before
    assert (out == 2).all()


@each_mode
def test_layer_backward(training, bn):
    bn.train(training)
    before = snapshot(bn)
    with pytest.raises(RuntimeError, match="call forward before backward"):
        bn.backward(X)
    assert snapshot(bn) == before
    bn(X)
    before = snapshot(bn)
    with pytest.raises(ValueError, match=r"dy has shape \(3, 3, 5\).*\(4, 3, 5\)"):
        bn.backward(X[:3])
    with pytest.raises(TypeError, match="dy is int64"):
        bn.backward(X.astype(int))
    assert snapshot(bn) == before


@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_layer_load(bad, bn):
    before = snapshot(bn)
    with pytest.raises(ValueError, match=r"running_var is .* in channel 1; it must be finite"):
        bn.load_state_dict(bn.state_dict() | {"running_var": [1.0, bad, 1.0]})
    assert snapshot(bn) == before


@pytest.mark.parametrize("size", [4, 40_000], ids=["small", "large"])
def test_mean_and_var_are_needed(size):
    """An untracked layer has None for both, which must not be taken for zeros."""
    x, v = np.ones((size, 3), np.float32), np.ones(3, np.float32)
    for function, first in [
        (cybn.batch_norm_inference, (x,)),
        (cybn.batch_norm_inference_backward, (x, x)),
    ]:
        with pytest.raises(TypeError, match=r"mean is None; it must have shape \(3,\)"):
            function(*first, None, v)
        with pytest.raises(TypeError, match=r"var is None; it must have shape \(3,\)"):
            function(*first, v, None)


@pytest.mark.row(31)
def test_nothing_is_half_done_in_a_layer_whose_arrays_cannot_be_written():
    bn = cybn.BatchNorm(3)
    state = cybn.BatchNorm(3).state_dict() | {"running_mean": np.full(3, 5.0)}
    bn.gamma.setflags(write=False)
    with pytest.raises(ValueError, match="gamma of this layer must be a writeable array"):
        bn.load_state_dict(state)
    assert (bn.running_mean == 0).all()
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    bn(x)
    bn.grad_beta.setflags(write=False)
    dy = np.ones_like(x)
    with pytest.raises(ValueError, match="grad_beta of this layer must be"):
        bn.backward(dy, out=dy)
    assert (dy == 1).all()
    assert (bn.grad_gamma == 0).all()


def test_backward_refuses_an_input_that_was_overwritten():
    bn = cybn.BatchNorm(3, activation="relu")
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    bn(x, out=x)
    with pytest.raises(RuntimeError, match="wrote its output over its input"):
        bn.backward(np.ones_like(x))
