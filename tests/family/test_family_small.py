"""Small forwards of the family are done in one compiled step; nobody may notice but by the time."""

import numpy as np
import pytest
from family_cases import group, instance, layer, rms

from cybn import _rows

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
