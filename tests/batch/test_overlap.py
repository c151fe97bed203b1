"""If outputs share memory with inputs, the result is right or an error comes before any write."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from cases import same_bits

import cybn

SHAPE = (3, 4, 5)
PAIRS = 5000
rng = np.random.default_rng(9)
GAMMA, BETA = rng.uniform(0.5, 2, 4), rng.standard_normal(4)
MEAN, VAR = rng.standard_normal(4), rng.uniform(0.5, 2, 4)
EACH = rng.uniform(0.5, 2, SHAPE[2:]).astype(np.float32)
MOMENTS = cybn.moments(rng.standard_normal(SHAPE))
ROWS = cybn.layer_norm(rng.standard_normal(SHAPE))[1]
GROUPS = cybn.group_norm(rng.standard_normal(SHAPE), num_groups=2)[1]
SAMPLES = cybn.instance_norm(rng.standard_normal(SHAPE))[1]
SQUARES = cybn.rms_norm(rng.standard_normal(SHAPE))[1]


@dataclass
class Call:
    """A function whose arrays are given by name."""

    function: object
    inputs: tuple
    outputs: tuple = ("out",)
    options: dict = field(default_factory=dict)

    def __call__(self, arrays, **outs):
        """Return all results; large results are written to `outs`."""
        found = self.function(**arrays, **self.options, **outs)
        return found if isinstance(found, tuple) else (found,)

    def results(self, found):
        """Return the arrays that correspond to `outputs`."""
        return [found[0], found[-1]][: len(self.outputs)]


FUSED = {"activation": "leaky_relu", "slope": 0.2, "gamma": GAMMA, "beta": BETA}
BOTH = ("out", "out_residual")
CALLS = {
    "forward": Call(cybn.batch_norm, ("x",), options={"gamma": GAMMA, "beta": BETA}),
    "forward fused": Call(cybn.batch_norm, ("x", "residual"), options=FUSED),
    "inference": Call(cybn.batch_norm_inference, ("x",), options={"mean": MEAN, "var": VAR}),
    "inference fused": Call(
        cybn.batch_norm_inference, ("x", "residual"), options=FUSED | {"mean": MEAN, "var": VAR}
    ),
    "backward": Call(cybn.batch_norm_backward, ("dy", "x"), options={"moments": MOMENTS}),
    "backward fused": Call(
        cybn.batch_norm_backward, ("dy", "x", "residual"), BOTH, FUSED | {"moments": MOMENTS}
    ),
    "inference backward": Call(
        cybn.batch_norm_inference_backward, ("dy", "x"), options={"mean": MEAN, "var": VAR}
    ),
    "inference backward fused": Call(
        cybn.batch_norm_inference_backward,
        ("dy", "x", "residual"),
        BOTH,
        FUSED | {"mean": MEAN, "var": VAR},
    ),
    "layer": Call(cybn.layer_norm, ("x",), options={"gamma": EACH}),
    "layer backward": Call(cybn.layer_norm_backward, ("dy", "x"), options={"moments": ROWS}),
    "rms": Call(cybn.rms_norm, ("x",), options={"gamma": EACH}),
    "rms backward": Call(cybn.rms_norm_backward, ("dy", "x"), options={"mean_square": SQUARES}),
    "group": Call(cybn.group_norm, ("x",), options={"num_groups": 2}),
    "group backward": Call(
        cybn.group_norm_backward, ("dy", "x"), options={"moments": GROUPS, "num_groups": 2}
    ),
    "instance": Call(cybn.instance_norm, ("x",), options={"gamma": GAMMA}),
    "instance backward": Call(
        cybn.instance_norm_backward, ("dy", "x"), options={"moments": SAMPLES}
    ),
}


def random_place(rng, size, shape):
    """Return start and strides, in elements, of a view with random axes, gaps and directions."""
    order = rng.permutation(len(shape))
    strides, step = [0] * len(shape), int(rng.integers(1, 3))
    for i in order:
        strides[i] = step * int(rng.choice([-1, 1, 1, 1]))
        step *= shape[i] + int(rng.integers(0, 2))
    low = sum(min(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True))
    high = sum(max(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True))
    return int(rng.integers(-low, size - high)), strides


def view(room, place):
    start, strides = place
    return np.lib.stride_tricks.as_strided(
        room[start:], SHAPE, [s * room.itemsize for s in strides]
    )


def attempt(call, rng, dtype):
    """Let an output and one other array share a buffer; return what the call did."""
    room = rng.standard_normal(600).astype(dtype)
    written = call.outputs[rng.integers(len(call.outputs))]
    others = [*call.inputs, *(name for name in call.outputs if name != written)]
    partner = others[rng.integers(len(others))]
    places = {name: random_place(rng, room.size, SHAPE) for name in (partner, written)}
    if rng.random() < 0.1:
        places[written] = places[partner]
    arrays = {name: rng.standard_normal(SHAPE).astype(dtype) for name in call.inputs}
    copies = dict(arrays)
    outs = {name: np.zeros(SHAPE, dtype) for name in call.outputs}
    apart = room.copy()
    for name, where in ((partner, places[partner]), (written, places[written])):
        (outs if name in call.outputs else arrays)[name] = view(room, where)
    if partner in call.inputs:
        copies[partner] = view(apart, places[partner])
    one, other = (arrays | outs)[partner], outs[written]
    shared, same = np.shares_memory(one, other), places[partner] == places[written]
    right = call.results(call(copies))
    before = room.copy()
    keep = {name: a.copy() for name, a in (arrays | outs).items()}
    try:
        got = call(arrays, **outs)
    except ValueError as error:
        problem = str(error)
        assert (room == before).all(), problem
        assert all((keep[name] == a).all() for name, a in (arrays | outs).items())
        assert shared, "refused although nothing overlaps"
        assert not (same and written == "out" and partner in call.inputs)
        return "ValueError" if "overlap" in problem else problem
    assert not shared or same, "an overlap was accepted"
    for mine, wanted, out in zip(call.results(got), right, outs.values(), strict=True):
        assert mine is out
        assert same_bits(np.ascontiguousarray(mine), np.ascontiguousarray(wanted))
    for name in call.inputs:
        if name != partner or not shared:
            assert (arrays[name] == keep[name]).all(), f"{name} was written to"
    return "equal in place" if shared else "equal"


@pytest.mark.row(20)
@pytest.mark.parametrize("name", CALLS)
def test_random_pairs(name, figure):
    """All functions together check 5,000 pairs of an array and an output, in both types."""
    seen, rng = Counter(), np.random.default_rng(len(name))
    pairs = -(-PAIRS // len(CALLS))
    for i in range(pairs):
        seen[attempt(CALLS[name], rng, (np.float32, np.float64)[i % 2])] += 1
    assert min(seen[outcome] for outcome in ("ValueError", "equal")) > pairs / 50, seen
    assert seen["equal in place"] > 3 or "fused" in name, seen
    for outcome, times in seen.items():
        figure(20, outcome, times, how="sum")


@pytest.mark.row(20)
@pytest.mark.parametrize("name", ["backward fused", "inference backward fused"])
def test_the_two_outputs_are_two(name):
    call = CALLS[name]
    arrays = {n: np.ones(SHAPE) for n in call.inputs}
    room = np.zeros((4, *SHAPE[1:]))
    for one, other in ((room[:3], room[:3]), (room[:3], room[1:])):
        with pytest.raises(ValueError, match="out_residual overlaps"):
            call(arrays, out=one, out_residual=other)
    assert not room.any()


@pytest.mark.row(20)
def test_out_over_parameters():
    """gamma, beta, mean and var are read while y is written, so overlaps with them are refused."""
    room = np.ones((4, 4, 5))
    x, vector = np.random.default_rng(1).standard_normal(SHAPE), room[1, 2, :4]
    out = room[:3]
    calls = {
        "gamma": lambda: cybn.batch_norm(x, vector, out=out),
        "beta": lambda: cybn.batch_norm(x, None, vector, out=out),
        "mean": lambda: cybn.batch_norm_inference(x, vector, VAR, out=out),
        "var": lambda: cybn.batch_norm_inference(x, MEAN, vector, out=out),
        "backward": lambda: cybn.batch_norm_backward(x, x, MOMENTS, vector, out=out),
        "fixed": lambda: cybn.batch_norm_inference_backward(x, x, vector, VAR, out=out),
        "layer": lambda: cybn.layer_norm(x, room[0, 0], out=out),
        "layer backward": lambda: cybn.layer_norm_backward(x, x, ROWS, room[0, 0], out=out),
        "rms": lambda: cybn.rms_norm(x, room[0, 0], out=out),
        "squares": lambda: cybn.rms_norm_backward(x, x, room.ravel()[:12], out=out),
        "group": lambda: cybn.group_norm(x, vector, num_groups=2, out=out),
        "instance": lambda: cybn.instance_norm(x, None, vector, out=out),
    }
    taken = []
    for name, call in calls.items():
        room[...] = 1
        try:
            call()
        except ValueError as error:
            problem = str(error)
            assert (room == 1).all(), problem
        else:
            problem = "overlaps"
            taken.append(name)
        assert "overlaps" in problem
    # Arguments that are converted are copied first, so nothing can overwrite them.
    assert set(taken) <= {"gamma", "beta", "squares"}, taken


@pytest.mark.row(20)
def test_mask_and_weights_may_lie_in_out():
    """They are read completely before anything is written."""
    x = np.random.default_rng(1).standard_normal(SHAPE)
    room = np.abs(x).copy()
    weights = room[:, 0]
    right, m = cybn.batch_norm(x, weights=weights.copy())
    y, again = cybn.batch_norm(x, weights=weights, out=room)
    assert y is room
    assert same_bits(y, right)
    assert again == m


class Speaks:
    """An object that is not an array, but gives an array that shares its memory."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


@pytest.mark.parametrize("name", ["x", "residual", "gamma", "beta"])
def test_memory_that_is_lent_is_looked_at_too(name):
    memory = np.ones(30)
    given = {"x": np.arange(24.0).reshape(4, 6), "residual": np.ones((4, 6))}
    given |= {"gamma": np.ones(6), "beta": np.ones(6)}
    shape = given[name].shape
    given[name] = Speaks(memory[: given[name].size].reshape(shape))
    with pytest.raises(ValueError, match="out overlaps"):
        cybn.batch_norm(**given, out=memory[3:27].reshape(4, 6))
    assert (memory == 1).all()


@pytest.mark.parametrize("strides", [(0, 8), (8, 8), (4, 12)], ids=str)
def test_values_at_one_place_are_refused(strides):
    """Each value of a result needs its own place in memory."""
    room = np.zeros(20)
    if 4 in strides:  # strides of float32
        room = room.view(np.float32)
    x = np.arange(6, dtype=room.dtype).reshape(3, 2)
    out = np.lib.stride_tricks.as_strided(room, (3, 2), strides)
    m = cybn.moments(x)
    for call in (
        lambda: cybn.batch_norm(x, out=out),
        lambda: cybn.batch_norm_inference(x, [0.0, 0.0], [1.0, 1.0], out=out),
        lambda: cybn.batch_norm_backward(x, x, m, out=out),
        lambda: cybn.layer_norm(x, out=out),
        lambda: cybn.group_norm(x, num_groups=1, out=out),
    ):
        if strides == (4, 12):  # another order of axes, without overlap
            call()
            continue
        with pytest.raises(ValueError, match="several of its values at one place in memory"):
            call()
        assert not room.any()
