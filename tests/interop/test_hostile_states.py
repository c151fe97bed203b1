"""States that are damaged or malicious: loading gives the right state or an error.

The error is a TypeError or a ValueError, and nothing has changed.
"""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from fold_cases import random_norm
from hostile_cases import Bomb, Refusing, damaged
from layer_cases import snapshot

import cybn
from cybn import interop

pytestmark = pytest.mark.row(35)


# ---- states ------------------------------------------------------------------------------


def make_layers():
    return {
        "BatchNorm": lambda: cybn.BatchNorm(3),
        "BatchNorm1d": lambda: cybn.BatchNorm1d(3, dtype=np.float64),
        "BatchNorm2d bare": lambda: cybn.BatchNorm2d(3, affine=False),
        "BatchNorm3d untracked": lambda: cybn.BatchNorm3d(3, track_running_stats=False),
        "BatchNorm renorm": lambda: cybn.BatchNorm(3, renorm=cybn.Renorm()),
        "LayerNorm": lambda: cybn.LayerNorm((3, 1)),
        "LayerNorm without bias": lambda: cybn.LayerNorm(3, bias=False),
        "RMSNorm": lambda: cybn.RMSNorm(3, dtype=np.float64),
        "GroupNorm": lambda: cybn.GroupNorm(1, 3),
        "InstanceNorm1d": lambda: cybn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        "InstanceNorm2d": lambda: cybn.InstanceNorm2d(3, track_running_stats=True),
        "InstanceNorm3d": lambda: cybn.InstanceNorm3d(3, affine=True),
    }


def odd_values(value, dice):
    """Return something odd to replace a good array."""
    value = np.asarray(value)
    flat = value.astype(float)
    endless = []
    endless.append(endless)
    spoilt = flat.copy()
    spoilt[...] = dice.choice([np.nan, np.inf, -np.inf, -1.0, 1e39, -0.0, 5e-324])
    return dice.choice(
        [
            lambda: spoilt,
            lambda: value.astype(dice.choice(["f2", "f4", "f8", "g", ">f4", ">f8"])),
            lambda: value.astype(dice.choice(["i1", "i8", "u8", "?", "c8", "c16"])),
            lambda: value.astype(dice.choice(["O", "U5", "S5"])),
            lambda: flat.astype("M8[s]"),
            lambda: np.zeros(value.shape, [("a", "f4")]),
            lambda: np.zeros(value.shape, "V8"),
            lambda: flat[..., np.newaxis],
            lambda: flat[np.newaxis],
            lambda: np.concatenate([np.atleast_1d(flat)] * 2),
            lambda: flat.reshape(-1)[:-1],
            lambda: flat.reshape(-1)[:0],
            lambda: np.broadcast_to(np.float32(1), (2**40,)),
            lambda: np.broadcast_to(np.float32(1), (2**31, 2**20)),
            lambda: np.ma.array(flat),
            lambda: [np.ma.array(v) for v in np.atleast_1d(flat)],
            lambda: np.atleast_2d(flat).view(np.matrix) if flat.ndim < 2 else flat,
            lambda: flat.tolist(),
            lambda: endless,
            lambda: [[1.0], [1.0, 2.0]],
            lambda: dice.choice([None, "gamma", b"\x80\x05.", 3, 2**70, -1, 1.5, True, {}, set()]),
            lambda: pickle.dumps(Bomb()),
            lambda: np.array([Bomb(), Bomb(), Bomb()], object),
            lambda: Bomb(),
            lambda: Refusing(),
            lambda: np.full(value.shape, 2.0)[::-1] if value.ndim else np.float64(2),
        ]
    )()


def spoil(state, dice):
    """Return a state in which keys were removed, added or renamed, or values were replaced."""
    good = state = dict(state)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        what, keys = dice.random(), list(state)
        if what < 0.08 and keys:
            gone = dice.choice(keys)
            state = {key: value for key, value in state.items() if key != gone}
        elif what < 0.14:
            key = dice.choice(["weight", "", 1, None, "gamma ", ("gamma",), "__class__"])
            state = state | {key: 1.0}
        elif what < 0.2 and len(keys) > 1:  # swap two values
            one, other = dice.sample(keys, 2)
            state = state | {one: state[other], other: state[one]}
        elif what < 0.25:
            dice.shuffle(keys)
            state = {key: state[key] for key in keys}
        elif keys:
            key = dice.choice(keys)
            state = state | {key: odd_values(good.get(key, 1.0), dice)}
    return state


def good_state(layer, rng):
    """Return a state that the layer accepts."""
    state = layer.state_dict()
    for key, value in state.items():
        if value.dtype.kind == "f":
            state[key] = rng.uniform(0.5, 2, value.shape).astype(value.dtype)
    return state


def right(layer, state):
    """Check that the layer has the values of the state."""
    for key, value in layer.state_dict().items():
        with np.errstate(over="ignore"):
            wanted = np.asarray(state[key]).astype(value.dtype).reshape(value.shape)
        np.testing.assert_array_equal(value, wanted)
        assert value.dtype.kind in "fi"
        if key.startswith("running"):
            assert np.isfinite(value).all()
            assert key == "running_mean" or (value >= 0).all()


@pytest.mark.parametrize("name", make_layers())
def test_load_state_dict(name, rng, figure):
    layer, dice = make_layers()[name](), random.Random(name)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(400):
        state = spoil(good_state(layer, rng), dice)
        before = snapshot(layer)
        try:
            layer.load_state_dict(state)
        except (TypeError, ValueError):
            outcomes["refused"] += 1
            assert snapshot(layer) == before
        else:
            outcomes["loaded"] += 1
            right(layer, state)
    assert min(outcomes.values()) > 20, outcomes
    figure(35, "damaged states refused", outcomes["refused"], how="sum")
    figure(35, "harmless ones loaded", outcomes["loaded"], how="sum")


def test_moments_from_state(rng, figure):
    dice = random.Random(3)
    good = cybn.Moments(7, [1.0, 2.0, 3.0], [0.5, 0.25, 4.0])
    refused = 0
    for _ in range(400):
        state = spoil(good.state_dict(), dice)
        try:
            m = cybn.Moments.from_state_dict(state)
        except (TypeError, ValueError):
            refused += 1
        else:
            for key in ("mean", "m2"):
                np.testing.assert_array_equal(getattr(m, key), np.asarray(state[key], float))
            assert m._rest is None or np.isfinite(m._rest).all()
    assert refused > 100
    figure(35, "damaged states refused", refused, how="sum")


READERS = {
    "torch": (interop.from_torch, interop.to_torch),
    "keras": (interop.from_keras, interop.to_keras),
    "flax": (interop.from_flax, interop.to_flax),
    "nnx": (
        lambda s: interop.from_flax(s, api="nnx"),
        lambda bn: interop.to_flax(bn, api="nnx"),
    ),
    "onnx": (
        lambda s: interop.from_onnx(NODE, s),
        lambda bn: interop.to_onnx(bn).initializers,
    ),
}
NODE = interop.to_onnx(cybn.BatchNorm(3))


@pytest.mark.parametrize("name", READERS)
def test_readers_of_other_libraries(name, rng, figure):
    read, write = READERS[name]
    bn, dice = random_norm(rng, 3, np.float32), random.Random(name)
    refused = 0
    for _ in range(400):
        state = write(bn)
        flat = spoil(interop.flatten(state), dice)
        if dice.random() < 0.1 and name == "flax":
            flat = {k: {"deeper": v} for k, v in flat.items()}
        try:
            layer = read(flat)
        except (TypeError, ValueError):
            refused += 1
        else:
            assert np.isfinite(layer.running_mean).all()
            assert (layer.running_var >= 0).all()
            assert len(layer.running_mean) == layer.num_features
        try:
            interop.find(flat, name if name != "flax" else "flax")
            interop.convert(flat, name, "cybn")
        except (TypeError, ValueError):
            pass
    assert refused > 100
    figure(35, "damaged states refused", refused, how="sum")


def test_nested_without_end():
    endless = {}
    endless["params"] = endless
    deep = {}
    inner = deep
    for _ in range(50_000):
        inner["a"] = inner = {}
    for state in (endless, deep):
        for call in (interop.flatten, interop.from_flax):
            with pytest.raises(ValueError, match="nested more than 100 deep"):
                call(state)
    with pytest.raises(TypeError, match="must be a str"):
        interop.unflatten({1: 2})


# ---- ONNX --------------------------------------------------------------------------------


def tensor(onnx, name, **fields):
    proto = onnx.TensorProto(name=name, data_type=fields.pop("data_type", 1))
    for field, value in fields.items():
        if isinstance(value, (list, tuple)):
            getattr(proto, field).extend(value)
        else:
            setattr(proto, field, value)
    return proto


def test_broken_onnx_tensors(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    node, tensors = interop.to_onnx(cybn.BatchNorm(3)).protos()
    good = {t.name: t for t in tensors}
    interop.from_onnx(node, good)
    data, first = b"\0" * 12, tensors[0].name
    monkeypatch.chdir(tmp_path)
    Path("weights.bin").write_bytes(data)
    outside = tensor(onnx, first, dims=[3], data_location=1)
    outside.external_data.add(key="location", value="weights.bin")
    for bad in (
        outside,
        tensor(onnx, first, dims=[3], raw_data=data[:11]),
        tensor(onnx, first, dims=[-3], raw_data=data),
        tensor(onnx, first, dims=[-1], raw_data=data),
        tensor(onnx, first, dims=[2**40], raw_data=data),
        tensor(onnx, first, dims=[2**62, 2**62], raw_data=data),
        tensor(onnx, first, dims=[2**40], float_data=[1.0]),
        tensor(onnx, first, dims=[3]),
        tensor(onnx, first, dims=[0]),
        tensor(onnx, first, dims=[3], data_type=999, raw_data=data),
        tensor(onnx, first, dims=[3], data_type=0),
        tensor(onnx, first, dims=[3], data_type=8, string_data=[b"a"] * 3),
        tensor(onnx, first, dims=[3], data_type=16, raw_data=data[:5]),
        tensor(onnx, first, dims=[30], data_type=22, raw_data=data[:2]),
        tensor(onnx, first, dims=[3], data_type=14, float_data=[1.0] * 5),
    ):
        with pytest.raises((TypeError, ValueError)):
            interop.from_onnx(node, good | {first: bad})
    make = onnx.helper.make_node
    for bad in (
        make("BatchNormalization", list(node.input), ["y"], epsilon="small"),
        make("BatchNormalization", list(node.input), ["y"], momentum=[0.5]),
        make("BatchNormalization", list(node.input), ["y"], epsilon=float("nan")),
        make("BatchNormalization", list(node.input), ["y"], momentum=float("inf")),
        make("BatchNormalization", list(node.input)[:3], ["y"]),
        make("BatchNormalization", [], ["y"]),
    ):
        with pytest.raises(ValueError, match=r"not a number|epsilon|eps is|momentum|no batch norm"):
            interop.from_onnx(bad, good)
    for nodes in (
        [make("BatchNormalization", list(node.input), [])],
        [make("Constant", [], [])],
    ):
        model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))
        with pytest.raises(ValueError, match="no output"):
            interop.onnx_layers(model)
    with pytest.raises(TypeError, match=r"must be an onnx\.ModelProto"):
        interop.onnx_layers(b"PK")


def test_damaged_onnx_models(figure):
    """Bytes of a model are changed at random; if it can still be parsed, it is read or refused."""
    onnx = pytest.importorskip("onnx")
    from google.protobuf.message import DecodeError

    node, tensors = interop.to_onnx(cybn.BatchNorm(3)).protos()
    graph = onnx.helper.make_graph([node], "g", [], [], tensors)
    whole, dice = onnx.helper.make_model(graph).SerializeToString(), random.Random(4)
    refused = 0
    for _ in range(400):
        data = damaged(whole, dice)
        model = onnx.ModelProto()
        try:
            model.ParseFromString(bytes(data))
        except DecodeError:
            continue
        try:
            layers = interop.onnx_layers(model)
        except (TypeError, ValueError):
            refused += 1
        else:
            assert all(np.isfinite(bn.running_mean).all() for bn in layers.values())
    assert refused > 50
    figure(35, "damaged files refused", refused, how="sum")
