"""State dicts: a bitwise round trip, and bad states that change nothing."""

import numpy as np
import pytest
from layer_cases import snapshot

import cybn

C = 3
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture
def layer(rng):
    bn = cybn.BatchNorm(C)
    for _ in range(3):
        bn(rng.standard_normal((8, C), dtype=np.float32))
    bn.gamma[:], bn.beta[:] = rng.standard_normal((2, C))
    return bn


@each_dtype
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_round_trip(track, affine, dtype, rng):
    def make():
        return cybn.BatchNorm2d(C, affine=affine, track_running_stats=track, dtype=dtype)

    bn, twin = make(), make()
    for _ in range(3):
        bn(rng.standard_normal((2, C, 4, 4)).astype(dtype))
    for parameter in bn.parameters():
        parameter[:] = rng.standard_normal(C)
    twin.load_state_dict(bn.state_dict())
    assert snapshot(twin) == snapshot(bn)
    x = rng.standard_normal((2, C, 4, 4)).astype(dtype)
    np.testing.assert_array_equal(twin.eval()(x), bn.eval()(x))


def test_keys_and_types(layer):
    state = layer.state_dict()
    assert list(state) == ["gamma", "beta", "running_mean", "running_var", "num_batches_tracked"]
    assert {type(value) for value in state.values()} == {np.ndarray}
    assert [value.dtype for value in state.values()] == 4 * [np.dtype("f4")] + [np.dtype("i8")]
    assert [value.shape for value in state.values()] == 4 * [(C,)] + [()]
    assert state["num_batches_tracked"] == 3


def test_state_survives_an_npz_file(layer, tmp_path):
    np.savez(tmp_path / "state.npz", **layer.state_dict())
    twin = cybn.BatchNorm(C)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        twin.load_state_dict(state)
    assert snapshot(twin) == snapshot(layer)


def test_state_is_a_copy(layer):
    state, before = layer.state_dict(), snapshot(layer)
    for value in state.values():
        value[...] = 9
    assert snapshot(layer) == before


def test_loading_takes_a_copy_and_keeps_the_parameters_arrays(layer):
    twin = cybn.BatchNorm(C)
    gamma, beta = twin.parameters()
    state = layer.state_dict()
    twin.load_state_dict(state)
    for value in state.values():
        value[...] = 9
    assert gamma is twin.gamma
    assert beta is twin.beta
    assert snapshot(twin) == snapshot(layer)


@pytest.mark.parametrize("convert", [np.float64, np.float16])
def test_other_float_types_are_converted(convert, layer):
    state = layer.state_dict()
    twin = cybn.BatchNorm(C)
    twin.load_state_dict(
        {k: v.astype(convert) if v.dtype.kind == "f" else v for k, v in state.items()}
    )
    np.testing.assert_array_equal(twin.running_mean, layer.running_mean.astype(convert))
    assert twin.gamma.dtype == np.float32


def test_plain_numbers_and_lists_are_taken():
    bn = cybn.BatchNorm(2)
    bn.load_state_dict(
        {
            "gamma": [1.0, 2.0],
            "beta": (3.0, 4.0),
            "running_mean": [5.0, 6.0],
            "running_var": [0.0, 8.0],
            "num_batches_tracked": 9,
        }
    )
    assert bn.gamma.tolist() + bn.beta.tolist() == [1, 2, 3, 4]
    assert bn.running_mean.tolist() + bn.running_var.tolist() == [5, 6, 0, 8]
    assert bn.num_batches_tracked == 9


def test_the_largest_count_makes_the_round_trip(layer):
    layer.num_batches_tracked = np.iinfo(np.int64).max
    twin = cybn.BatchNorm(C)
    twin.load_state_dict(layer.state_dict())
    assert twin.num_batches_tracked == np.iinfo(np.int64).max


GOOD = np.array([0.25, 0.5, 4.0], np.float32)
BAD = {
    "missing": ({"running_var": None}, r"missing \['running_var'\]"),
    "unexpected": ({"weight": GOOD}, r"unexpected \['weight'\]"),
    "unexpected, not a string": ({1: GOOD}, r"unexpected \['1'\]"),
    "gamma too long": ({"gamma": np.ones(4)}, r"gamma has shape \(4,\).*\(3,\)"),
    "beta a scalar": ({"beta": 1.0}, r"beta has shape \(\).*\(3,\)"),
    "mean two-dimensional": (
        {"running_mean": np.ones((1, 3))},
        r"running_mean has shape \(1, 3\).*\(3,\)",
    ),
    "var empty": ({"running_var": np.ones(0)}, r"running_var has shape \(0,\).*\(3,\)"),
    "ragged": ({"gamma": [[1.0], [1.0, 2.0]]}, None),
    "gamma int": ({"gamma": np.ones(3, int)}, "gamma is int64; it must be a float"),
    "beta complex": ({"beta": np.ones(3, complex)}, "beta is complex128"),
    "mean strings": ({"running_mean": np.array(["a", "b", "c"])}, "running_mean is <U1"),
    "var objects": ({"running_var": np.array([1.0, 1.0, None])}, "running_var is object"),
    "None": ({"gamma": lambda: None}, "gamma is None"),
    "var NaN": ({"running_var": [1.0, np.nan, 1.0]}, "running_var is nan in channel 1"),
    "var negative": ({"running_var": [1.0, 1.0, -2e-5]}, "running_var is .* in channel 2"),
    "var inf": ({"running_var": [np.inf, 1.0, 1.0]}, "running_var is inf in channel 0"),
    "var inf as float32": ({"running_var": [1e39, 1.0, 1.0]}, "which float32 cannot hold"),
    "mean NaN": ({"running_mean": [np.nan, 0.0, 0.0]}, "running_mean is nan in channel 0"),
    "mean inf": ({"running_mean": [0.0, 0.0, -np.inf]}, "running_mean is -inf in channel 2"),
    "count negative": ({"num_batches_tracked": -1}, "num_batches_tracked is -1"),
    "count fractional": ({"num_batches_tracked": 1.5}, "num_batches_tracked is 1.5"),
    "count float": ({"num_batches_tracked": np.array(3.0)}, "num_batches_tracked"),
    "count bool": ({"num_batches_tracked": True}, "num_batches_tracked"),
    "count of each channel": ({"num_batches_tracked": [1, 2, 3]}, "num_batches_tracked"),
    "count a string": ({"num_batches_tracked": "3"}, "num_batches_tracked"),
    "count beyond int64": ({"num_batches_tracked": 2**63}, "num_batches_tracked"),
    "count beyond uint64": ({"num_batches_tracked": 2**64}, "num_batches_tracked"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_bad_state_changes_nothing(change, message, layer):
    state = {**dict.fromkeys(("gamma", "beta", "running_mean", "running_var"), GOOD)}
    state["num_batches_tracked"] = 12
    for key, value in change.items():
        if value is None:
            del state[key]
        else:
            state[key] = value() if callable(value) else value
    before = snapshot(layer)
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(state)
    assert snapshot(layer) == before


@pytest.mark.parametrize("state", [None, 3, [("gamma", GOOD)], "gamma", b"\x80\x05."])
def test_no_mapping(state, layer):
    before = snapshot(layer)
    with pytest.raises(TypeError, match=f"type {type(state).__name__}; it must be a dict"):
        layer.load_state_dict(state)
    assert snapshot(layer) == before


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_states_of_other_settings_do_not_fit(options, layer):
    other = cybn.BatchNorm(C, **options)
    for to, source in [(layer, other), (other, layer)]:
        before = snapshot(to)
        with pytest.raises(ValueError, match="affine or track_running_stats"):
            to.load_state_dict(source.state_dict())
        assert snapshot(to) == before
