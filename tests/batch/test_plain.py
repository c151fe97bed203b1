"""Plain calls are done in one compiled step; nobody may notice, but for the time."""

import warnings

import numpy as np
import pytest

import cybn
from cybn import _memory, _runtime, functional

SHAPES = [(2, 1), (32, 16), (60, 100), (5, 3, 1), (4, 1, 9), (3, 5, 7), (2, 4, 8, 8), (1, 2, 600)]
STEPS = ["_PLAIN_FORWARD", "_PLAIN_INFERENCE", "_PLAIN_BACKWARD"]


@pytest.fixture
def both_ways(monkeypatch):
    """Return a function that calls another twice: as it is, and with those steps switched off."""

    def call(function, *arguments, **options):
        taken = []
        with monkeypatch.context() as patch:
            for step in STEPS:
                patch.setattr(functional, step, noting(getattr(functional, step), taken))
            quick = function(*arguments, **options)
        assert taken == [True], "one compiled step does it"
        with monkeypatch.context() as patch:
            for step in STEPS:
                patch.setattr(functional, step, lambda *arguments: None)
            return quick, function(*arguments, **options)

    return call


def noting(step, taken):
    def call(*arguments):
        result = step(*arguments)
        taken.append(result is not None)
        return result

    return call


def parameters(rng, channels, dtype):
    gamma, beta, mean = rng.standard_normal((3, channels)).astype(dtype)
    return mean, rng.uniform(0.5, 2, channels).astype(dtype), gamma, beta


def orders(x):
    """Yield x in memory of several orders of its axes."""
    yield x
    yield np.asfortranarray(x)
    yield np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)  # channels-last
    if x.ndim == 4:
        yield x.transpose(2, 0, 3, 1).copy().transpose(1, 3, 0, 2)


def same(quick, long):
    for a, b in zip(quick, long, strict=True):
        if isinstance(a, cybn.Moments):
            assert a == b
            assert not a.mean.flags.writeable
            assert not a.m2.flags.writeable
        else:
            assert a.dtype == b.dtype
            assert a.strides == b.strides
            assert a.tobytes() == b.tobytes()


@pytest.mark.row(24)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("vectors", [np.float32, np.float64, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits(rng, level, shape, dtype, vectors, both_ways):
    for axis in (1, -1):
        mean, var, gamma, beta = parameters(rng, shape[axis], vectors or dtype)
        given = {} if vectors is None else {"gamma": gamma, "beta": beta}
        options = given | {"axis": axis, "num_threads": 2}
        for x in orders(rng.standard_normal(shape).astype(dtype)):
            dy = np.copysign(x, -x)
            same(*zip(both_ways(cybn.batch_norm_inference, x, mean, var, **options), strict=True))
            same(*both_ways(cybn.batch_norm_inference_backward, dy, x, mean, var, **options))
            if x.size > x.shape[axis]:
                quick, long = both_ways(cybn.batch_norm, x, **options)
                same(quick, long)
                same(*both_ways(cybn.batch_norm_backward, dy, x, quick[1], **options))


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu"])
def test_same_bits_with_activations(rng, activation, both_ways):
    x, dy = rng.standard_normal((2, 6, 5, 7)).astype(np.float32)
    mean, var, gamma, beta = parameters(rng, 5, np.float32)
    options = {"gamma": gamma, "beta": beta, "activation": activation, "slope": 0.2}
    quick, long = both_ways(cybn.batch_norm, x, **options)
    same(quick, long)
    same(*both_ways(cybn.batch_norm_backward, dy, x, quick[1], **options))
    same(*both_ways(cybn.batch_norm_inference_backward, dy, x, mean, var, **options))


def test_out_may_be_an_input(rng, both_ways):
    x, dy = rng.standard_normal((2, 6, 5, 7)).astype(np.float32)
    y, moments = cybn.batch_norm(x)
    dx, dgamma, dbeta = cybn.batch_norm_backward(dy, x, moments)
    for at in (0, 1):
        given = dy.copy(), x.copy()
        options = {"out": given[at]}
        found = cybn.batch_norm_backward(*given, moments, **options)
        assert found[0] is given[at]
        same(found, (dx, dgamma, dbeta))
    assert cybn.batch_norm(x, out=x)[0] is x
    assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_gradients_have_the_type_of_gamma(rng, wide, both_ways):
    x = rng.standard_normal((6, 5))
    gamma, beta = np.ones(5, wide), np.ones(5, np.float64)
    _, moments = cybn.batch_norm(x)
    quick, long = both_ways(cybn.batch_norm_backward, x, x, moments, gamma, beta=beta)
    same(quick, long)
    assert quick[1].dtype == quick[2].dtype == wide


def test_dy_may_be_x(rng, both_ways):
    x = rng.standard_normal((6, 5, 7))
    _, moments = cybn.batch_norm(x)
    same(*both_ways(cybn.batch_norm_backward, x, x, moments))


def test_moments_of_another_batch_are_refused(rng):
    x = rng.standard_normal((6, 5))
    for shape in ((7, 5), (6, 4), (5, 6)):
        _, moments = cybn.batch_norm(rng.standard_normal(shape))
        with pytest.raises(ValueError, match=r"moments has (count|shape)|moments.mean"):
            cybn.batch_norm_backward(x, x, moments)


def not_plain(x, v):
    """List calls that must take the long way, by what is wrong with them."""
    odd = np.frombuffer(b"\0" + v.tobytes(), v.dtype, offset=1)
    memory = np.zeros(x.size + 8, x.dtype)
    memory[: x.size] = x.ravel()
    inside, ahead = memory[: x.size].reshape(x.shape), memory[8:].reshape(x.shape)
    out = np.zeros_like(x)
    return {
        "strided x": (x[:, ::-1], v, v, None, None, out, 1),
        "gaps in x": (np.ones((4, 6), x.dtype)[:, ::2], v, v, None, None, out, 1),
        "broadcast x": (np.broadcast_to(x[:1], x.shape), v, v, None, None, out, 1),
        "Fortran out": (x, v, v, None, None, np.asfortranarray(out), 1),
        "byte order": (x.astype(x.dtype.newbyteorder()), v, v, None, None, out, 1),
        "unaligned": (x, odd, v, None, None, out, 1),
        "strided mean": (x, np.ones(6, v.dtype)[::2], v, None, None, out, 1),
        "list": (x, v, v, v.tolist(), None, out, 1),
        "masked": (np.ma.masked_array(x), v, v, None, None, out, 1),
        "matrix": (np.ones((4, 3), x.dtype).view(np.matrix), v, v, None, None, out, 1),
        "integers": (x, v, v, v.astype(np.int32), None, out, 1),
        "channels": (x, v[:-1], v, None, None, out, 1),
        "two axes": (x, v[:, None], v, None, None, out, 1),
        "axis": (x, v, v, None, None, out, 2),
        "huge axis": (x, v, v, None, None, out, 1 << 70),
        "axis is a bool": (x, v, v, None, None, out, True),
        "other out": (x, v, v, None, None, out[:-1], 1),
        "type of out": (x, v, v, None, None, np.empty(x.shape, np.float16), 1),
        "width of out": (x, v, v, None, None, np.empty(x.shape, np.float64), 1),
        "no mean": (x, None, v, None, None, out, 1),
        "overlap": (inside, v, v, None, None, ahead, 1),
        "overlap with mean": (x, memory[: v.size], v, None, None, inside, 1),
        "empty": (x[:0], v, v, None, None, out[:0], 1),
        "one axis": (v, v, v, None, None, out[0], 0),
    }


ACT = (0, 0.0)


@pytest.mark.parametrize("name", not_plain(np.ones((4, 3), np.float32), np.ones(3, np.float32)))
def test_refused_with_nothing_written(name):
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    x, mean, var, gamma, beta, out, axis = not_plain(x, v)[name]
    out[...] = 7
    more = gamma, beta, axis, 1e-5, ACT, out, None
    assert functional._PLAIN_INFERENCE(x, mean, var, *more) is None
    assert functional._PLAIN_BACKWARD(x, x, mean, var, False, *more) is None
    if name not in ("no mean", "channels", "two axes", "unaligned", "strided mean") and (
        name != "overlap with mean"
    ):
        assert functional._PLAIN_FORWARD(x, *more) is None
    assert (out == 7).all()


@pytest.mark.parametrize("eps", [-1.0, np.nan, np.inf, 1, "1e-5", None, np.float64(1e-5)], ids=repr)
def test_odd_eps_is_refused(eps):
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    more = None, None, 1, eps, ACT, None, None
    assert functional._PLAIN_INFERENCE(x, v, v, *more) is None
    assert functional._PLAIN_FORWARD(x, *more) is None
    assert functional._PLAIN_BACKWARD(x, x, v, v, True, *more) is None


@pytest.mark.parametrize("threads", [0, -1, True, 1.0, "2"], ids=repr)
def test_odd_threads_are_refused(threads):
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    more = None, None, 1, 1e-5, ACT, None, threads
    assert functional._PLAIN_INFERENCE(x, v, v, *more) is None


def test_no_eps_is_for_inference_alone():
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    more = None, None, 1, 0.0, ACT, None, None
    assert functional._PLAIN_INFERENCE(x, v, v, *more) is not None
    assert functional._PLAIN_BACKWARD(x, x, v, v, False, *more) is not None
    assert functional._PLAIN_FORWARD(x, *more) is None
    assert functional._PLAIN_BACKWARD(x, x, v, v, True, *more) is None


def test_one_value_a_channel_is_refused():
    x, v = np.ones((1, 3), np.float32), np.ones(3, np.float32)
    more = None, None, 1, 1e-5, ACT, None, None
    assert functional._PLAIN_FORWARD(x, *more) is None
    assert functional._PLAIN_BACKWARD(x, x, v, v, True, *more) is None


def test_read_only_out_is_refused():
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    out = np.zeros_like(x)
    out.flags.writeable = False
    assert functional._PLAIN_INFERENCE(x, v, v, None, None, 1, 1e-5, ACT, out, None) is None


def test_layers_take_the_short_way(rng, both_ways):
    """The same bits, statistics and gradients, by way of a compiled step or without it."""
    x, dy = rng.standard_normal((2, 6, 5, 7)).astype(np.float32)

    def forward(train):
        layer = cybn.BatchNorm(5, activation="relu").train(train)
        y = layer(x)
        return y, layer.running_mean, layer.running_var, layer.backward(dy), layer.grad_gamma

    for train in (True, False):
        quick, long = forward(train), None
        with pytest.MonkeyPatch.context() as patch:
            for step in STEPS:
                patch.setattr(functional, step, lambda *arguments: None)
            long = forward(train)
        for a, b in zip(quick, long, strict=True):
            assert a.tobytes() == b.tobytes()


def test_a_layer_that_normalizes_in_its_own_way_does_so(rng):
    class Doubled(cybn.BatchNorm):
        @staticmethod
        def _normalize(*arguments, **options):
            y, moments = cybn.batch_norm(*arguments, **options)
            return 2 * y, moments

    x = rng.standard_normal((6, 5)).astype(np.float32)
    assert Doubled(5)(x).tobytes() == (2 * cybn.BatchNorm(5)(x)).tobytes()


def test_x_may_be_reshaped_while_the_result_is_made(rng):
    """By another thread: a large result is made in Python.

    NumPy frees the shape of such a rank; whoever reads it then is found by the sanitizers.
    """
    x = rng.standard_normal((2, 4, *[1] * 14, 16384)).astype(np.float32)
    turned = 4, 2, *[1] * 14, 16384
    want, moments = cybn.batch_norm(x.copy().reshape(turned))

    def reshape(like):
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            x.shape = turned  # NumPy 2.5 advises against it
        return _memory.empty_like(like)

    _runtime.kernels.connect(reshape, _runtime.thread_count)
    try:
        y, found = cybn.batch_norm(x)
    finally:
        _runtime.kernels.connect(_memory.empty_like, _runtime.thread_count)
    assert y.tobytes() == want.tobytes()
    assert found == moments
