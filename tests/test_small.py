"""Small calls are done in one compiled step; nobody may notice, but for the time."""

import numpy as np
import pytest
from family_cases import group, instance, layer, rms

import cybn
from cybn import _rows, functional

SHAPES = [(2, 1), (32, 16), (60, 100), (5, 3, 1), (4, 1, 9), (3, 5, 7), (2, 4, 8, 8), (1, 2, 600)]


@pytest.fixture
def both_ways(monkeypatch):
    """Return a function that calls another twice: as it is, and with small calls switched off."""

    def call(function, *arguments, **options):
        quick = function(*arguments, **options)
        with monkeypatch.context() as patch:
            patch.setattr(functional, "_may_be_small", lambda *arguments: False)
            return quick, function(*arguments, **options)

    return call


def parameters(rng, channels, dtype):
    gamma, beta, mean = rng.standard_normal((3, channels)).astype(dtype)
    return mean, rng.uniform(0.5, 2, channels).astype(dtype), gamma, beta


@pytest.mark.row(24)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("vectors", [np.float32, np.float64, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits(rng, level, shape, dtype, vectors, both_ways):
    x = rng.standard_normal(shape).astype(dtype)
    for axis in (1, -1):
        mean, var, gamma, beta = parameters(rng, shape[axis], vectors or dtype)
        if vectors is None:
            gamma = beta = None
        if x.size > x.shape[axis]:
            (y, m), (y_long, m_long) = both_ways(cybn.batch_norm, x, gamma, beta, axis=axis)
            assert y.tobytes() == y_long.tobytes()
            assert m == m_long
        y, y_long = (
            y.copy()
            for y in both_ways(
                lambda given, axis: cybn.batch_norm_inference(
                    x, *given, axis=axis, out=np.empty_like(x)
                ),
                (mean, var, gamma, beta),
                axis,
            )
        )
        assert y.tobytes() == y_long.tobytes()


def test_small_calls_are_taken(rng):
    """The plain case does not take the long way."""
    x = rng.standard_normal((32, 16)).astype(np.float32)
    mean, var, gamma, beta = parameters(rng, 16, np.float32)
    assert functional._small_forward(x, gamma, beta, 1, 1e-5, (0, 0.0), None) is not None
    assert functional._SMALL_INFERENCE(x, mean, var, gamma, beta, np.empty_like(x), 1, 1e-5)
    assert functional._SMALL_INFERENCE(x, mean, var, None, None, x, 1, 1e-5)


def not_plain(x, v):
    """List calls that must take the long way, by what is wrong with them."""
    odd = np.frombuffer(b"\0" + v.tobytes(), v.dtype, offset=1)
    memory = np.zeros(x.size + 8, x.dtype)
    memory[: x.size] = x.ravel()
    inside, ahead = memory[: x.size].reshape(x.shape), memory[8:].reshape(x.shape)
    out = np.zeros_like(x)
    return {
        "strided x": (x[:, ::-1], v, v, None, None, out, 1),
        "Fortran out": (x, v, v, None, None, np.asfortranarray(out), 1),
        "byte order": (x.astype(x.dtype.newbyteorder()), v, v, None, None, out, 1),
        "unaligned": (x, odd, v, None, None, out, 1),
        "list": (x, v, v, v.tolist(), None, out, 1),
        "masked": (np.ma.masked_array(x), v, v, None, None, out, 1),
        "integers": (x, v, v, v.astype(np.int32), None, out, 1),
        "channels": (x, v[:-1], v, None, None, out, 1),
        "two axes": (x, v[:, None], v, None, None, out, 1),
        "axis": (x, v, v, None, None, out, 2),
        "other out": (x, v, v, None, None, out[:-1], 1),
        "type of out": (x, v, v, None, None, np.empty(x.shape, np.float16), 1),
        "no mean": (x, None, v, None, None, out, 1),
        "overlap": (inside, v, v, None, None, ahead, 1),
        "overlap with mean": (x, memory[: v.size], v, None, None, inside, 1),
        "empty": (x[:0], v, v, None, None, out[:0], 1),
        "large": (np.zeros((1 << 16, 2), x.dtype), v[:2], v[:2], None, None, None, 1),
    }


@pytest.mark.parametrize("name", not_plain(np.ones((4, 3), np.float32), np.ones(3, np.float32)))
def test_refused_with_nothing_written(name):
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    x, mean, var, gamma, beta, out, axis = not_plain(x, v)[name]
    out = np.empty_like(x) if out is None else out
    out[...] = 7
    assert not functional._SMALL_INFERENCE(x, mean, var, gamma, beta, out, axis, 1e-5)
    assert (out == 7).all()


def test_read_only_out_is_refused():
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    out = np.zeros_like(x)
    out.flags.writeable = False
    assert not functional._SMALL_INFERENCE(x, v, v, None, None, out, 1, 1e-5)


# ---- the family --------------------------------------------------------------------------

MEMBERS = [layer(1, 1), layer(5, 33), layer(3, 4, 70), rms(9, 7), rms(1, 1500)]
MEMBERS += [group(2, 3, 4), group(2, 4, 8, 4, 4), group(1, 2, 3, 65), instance(2, 3, 5)]
MEMBERS += [instance(1, 2, 200)]


@pytest.mark.row(24)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", MEMBERS, ids=str)
def test_the_family_gives_the_same_bits(case, dtype, rng, level, monkeypatch):
    """With and without gamma and beta, into new memory, a given array, and in place."""
    x, _, gamma, beta = case.data(rng, dtype, offset=2.0)
    calls, kernel = [], _rows._SMALL

    def counted(*arguments):
        calls.append(kernel(*arguments))
        return calls[-1]

    monkeypatch.setattr(_rows, "_SMALL", counted)
    for vectors in ((gamma, beta), (None, None), (gamma, None)):
        y, statistics = case.forward(x, *vectors)
        long, wanted = case.forward(x, *vectors, num_threads=1)
        assert y.tobytes() == long.tobytes()
        if case.centred:
            assert statistics == wanted
        else:
            assert statistics.tobytes() == wanted.tobytes()
        out = np.full_like(x, np.nan)
        assert case.forward(x, *vectors, out=out)[0] is out
        own = x.copy()
        assert case.forward(own, *vectors, out=own)[0] is own
        assert out.tobytes() == own.tobytes() == long.tobytes()
    assert calls == [True] * 9


def test_what_the_family_refuses_as_a_small_call_is_left_alone(rng):
    """The kernel says no before it writes."""
    x = rng.standard_normal((4, 6)).astype(np.float32)
    gamma, beta = rng.standard_normal((2, 6)).astype(np.float32)
    room = np.zeros(25, np.float32)
    read_only = np.zeros_like(x)
    read_only.setflags(write=False)
    work = np.zeros((4, 4))
    plain = {"x": x, "out": np.zeros_like(x), "gamma": gamma, "beta": beta, "eps": 1e-5}
    for change in (
        {"x": x[::-1]},
        {"x": x.astype(np.float64)},
        {"x": x.astype(np.float16), "out": np.zeros((4, 6), np.float16)},
        {"x": x.astype(">f4")},
        {"x": room[:24].reshape(4, 6), "out": room[1:].reshape(4, 6)},
        {"x": np.ma.array(x)},
        {"out": np.zeros((6, 4), np.float32)},
        {"out": np.zeros((4, 6), order="F", dtype=np.float32)},
        {"out": read_only},
        {"gamma": gamma.astype(np.float64)},
        {"gamma": gamma[:5]},
        {"beta": np.zeros(12, np.float32)[::2]},
        {"gamma": room[:6], "out": room[:24].reshape(4, 6)},
        {"eps": 0.0},
        {"eps": np.nan},
        {"eps": np.inf},
    ):
        given = plain | change
        before = given["out"].tobytes()
        arrays = given["x"], given["out"], given["gamma"], given["beta"], work
        assert not _rows._SMALL(*arrays, 4, 1, 6, 1, given["eps"], True), change
        assert given["out"].tobytes() == before
        assert (work == 0).all()
    arrays = plain["x"], plain["out"], gamma, beta, work
    assert _rows._SMALL(*arrays, 4, 1, 6, 1, 1e-5, True)
