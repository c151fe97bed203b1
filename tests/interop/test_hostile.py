"""States and files that are damaged or meant to harm: the right state, or an error; never more.

An error is a TypeError or a ValueError, and nothing has changed. No file makes a MemoryError by
what it declares, and no code in one is ever run.
"""

import ast
import io
import json
import pickle
import random
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from fold_cases import random_norm
from layer_cases import snapshot

import cybn
from cybn import interop

pytestmark = pytest.mark.row(35)

PACKAGE = Path(cybn.__file__).parent
MOST_MEMORY = 64 << 10  # KiB that reading hostile files of a few KiB may take


def ran():
    raise AssertionError("code from a state was run")


class Bomb:
    """Unpickling it, or asking it for its array, is noticed."""

    def __reduce__(self):
        return (ran, ())


class Refusing:
    """An array-like that will not be read."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("not today")


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
    """Return something else in the place of a good array."""
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
    """Return a state with a few keys gone, new, renamed, or with other values."""
    good = state = dict(state)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        what, keys = dice.random(), list(state)
        if what < 0.08 and keys:
            gone = dice.choice(keys)
            state = {key: value for key, value in state.items() if key != gone}
        elif what < 0.14:
            key = dice.choice(["weight", "", 1, None, "gamma ", ("gamma",), "__class__"])
            state = state | {key: 1.0}
        elif what < 0.2 and len(keys) > 1:  # the values change places
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
    """Return a state that the layer takes."""
    state = layer.state_dict()
    for key, value in state.items():
        if value.dtype.kind == "f":
            state[key] = rng.uniform(0.5, 2, value.shape).astype(value.dtype)
    return state


def right(layer, state):
    """Check that the layer holds what the state said."""
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
    figure(35, "spoilt states refused", outcomes["refused"], how="sum")
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
    figure(35, "spoilt states refused", refused, how="sum")


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
    figure(35, "spoilt states refused", refused, how="sum")


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
        tensor(onnx, first, dims=[3], data_type=16, raw_data=data[:6]),
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
    """Bytes of a model changed at random: what still parses is read, or refused."""
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


# ---- files -------------------------------------------------------------------------------


def damaged(data, dice):
    """Return bytes that were cut off, changed, doubled, or put in another order."""
    data = bytearray(data)
    what = dice.random()
    if what < 0.15:
        return data[: dice.randrange(len(data))]
    if what < 0.3:
        i, j = sorted(dice.sample(range(len(data)), 2))
        return data[j:] + data[i:j] + data[:i]
    if what < 0.4:
        i, j = sorted(dice.sample(range(len(data)), 2))
        return data[:j] + data[i:]
    if what < 0.5:
        i = dice.randrange(len(data) - 8)
        data[i : i + 8] = dice.choice([b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f"])
        return data
    for _ in range(dice.choice([1, 1, 2, 8])):
        data[dice.randrange(len(data))] = dice.randrange(256)
    return data


def random_header(dice):
    """Return an npy header: mostly of the right form, with extreme values."""
    number = dice.choice([0, 1, 3, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30])
    shape = dice.choice([(number,), (3, number), (number, 0), (), (3,), 3, "(3,)", (3.0,), None])
    descr = dice.choice(
        ["<f4", "<f8", ">f2", "|O", "<U4", "|V4", "<M8[s]", "f4,f4", [("a", "<f4")], "g", "?"]
        + ["S2147483647", "V999999999", "<c16", 3, None, ["<f4"], ""]
        + [{"names": ["a"], "formats": ["O"]}]
    )
    header = {"descr": descr, "fortran_order": dice.choice([False, True, 0, None]), "shape": shape}
    if dice.random() < 0.1:
        header[dice.choice(["more", "shape "])] = 1
    if dice.random() < 0.1:
        del header[dice.choice(list(header))]
    return repr(header)


def npy(text, data):
    text = text.encode()[:60000] + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def random_npz(dice):
    """Return a zip archive whose members, or whose directory, say what is not so."""
    buffer = io.BytesIO()
    method = dice.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(buffer, "w", method) as archive:
        good = "{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}"
        archive.writestr("good.npy", npy(good, b"\0" * 12))
        data = dice.choice([b"", b"\0" * 12, b"\0" * 24, pickle.dumps(Bomb()), b"\0" * 100_000])
        name = dice.choice(["bad.npy", "../bad.npy", "/etc/bad.npy", "bad", "\u00e9.npy", ".npy"])
        archive.writestr(name, npy(random_header(dice), data))
    content = bytearray(buffer.getvalue())
    if dice.random() < 0.5:  # sizes in the central directory
        at = content.rfind(b"PK\1\2")
        size = dice.choice([0, 1, 12, 2**31, 2**32 - 2, 2**32 - 1])
        where = at + dice.choice([20, 24, 42])
        content[where : where + 4] = struct.pack("<I", size)
    if dice.random() < 0.1:  # said to be encrypted
        at = content.rfind(b"PK\1\2")
        content[at + 8] |= 1
    return content


def random_safetensors(dice):
    """Return a header with extreme shapes, offsets and types, keys twice, or nested deep."""
    number = dice.choice([0, 1, 3, -1, 4, 2**31, 2**62, 2**63, 2**64, 1.5, "3", None, True])
    shape = dice.choice([[3], [number], [3, number], [number, number], 3, "3", {}, [[3]]])
    offsets = dice.choice([[0, 12], [0, number], [number, 12], [12, 0], [4, 16], [0], [], "0,12"])
    kind = dice.choice(["F32", "F64", "F16", "BF16", "I64", "O", "pickle", 3, None, "f32"])
    entry = {"dtype": kind, "shape": shape, "data_offsets": offsets}
    if dice.random() < 0.2:
        del entry[dice.choice(list(entry))]
    metadata = dice.choice([{}, {"cybn": "{}"}, {"a": 1}, 3])
    header = json.dumps({"a": entry, "__metadata__": metadata})
    if dice.random() < 0.1:
        header = header[:-1] + f', "a": {json.dumps(entry)}}}'
    if dice.random() < 0.1:
        header = "[" * 100_000
    size = dice.choice([len(header)] * 6 + [0, 1, 2**31, 2**63, 2**64 - 1])
    return struct.pack("<Q", size) + header.encode() + b"\0" * dice.choice([0, 11, 12, 13, 24])


SETTINGS = {
    "class": ["BatchNorm", "BatchNorm1d", "InstanceNorm1d", "object", 3, None, ["BatchNorm"]],
    "num_features": [3, 0, -3, 2, 3.0, "3", None, 2**40, 10**400, True, [3]],
    "axis": [1, -1, 10**30, "1", None, 1.5],
    "eps": [1e-5, 0, -1, "small", None, float("nan"), float("inf"), 1e400, []],
    "momentum": [0.1, None, 2, -1, "0.1", float("nan"), {}],
    "affine": [True, False, None, [], "no"],
    "track_running_stats": [True, False, None],
    "running_ddof": [0, 1, 2, None, "1"],
    "dtype": ["float32", "float64", "O", "object", "f4,f4", "float16", 3, None, {"a": "f4"}],
    "activation": [None, "relu", "eval", 3, ["relu"], {}],
    "slope": [0.01, float("nan"), "a", None],
    "nan_policy": ["propagate", "skip", "eval", 3, None, []],
    "virtual_batch_size": [None, 4, 0, -1, 1.5, "4"],
    "renorm": [None, {"r_max": 3, "d_max": 5}, {"r_max": 0}, {"a": 1}, 3, [], "Renorm()"],
    "__class__": ["object"],
}


def random_layers(path, dice):
    """Write a file of one layer whose settings are changed at random."""
    bn = cybn.BatchNorm(3)
    settings = {"class": "BatchNorm", "num_features": 3}
    for name in dice.sample(list(SETTINGS), dice.randint(0, 3)):
        settings[name] = dice.choice(SETTINGS[name])
    outer = {"version": 1, "single": False, "layers": {"a": settings}}
    if dice.random() < 0.15:
        outer[dice.choice(list(outer))] = dice.choice([None, 1, 2, [], {}, "a", {"a": None}])
    arrays = {f"a.{key}": value for key, value in bn.state_dict().items()}
    if dice.random() < 0.2:
        del arrays[dice.choice(list(arrays))]
    text = json.dumps(outer)
    if path.suffix == ".npz":
        np.savez(path, **arrays, __cybn__=np.frombuffer(text.encode(), np.uint8))
    else:
        from safetensors.numpy import save_file

        save_file(arrays, path, {"cybn": text})


@pytest.fixture(params=["npz", "safetensors"])
def path(request, tmp_path):
    pytest.importorskip("safetensors")
    return tmp_path / f"state.{request.param}"


def peak():
    """Return the most memory that this process had, in KiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))[1])


def restart_peak():
    """Take the memory of now as the most so far, and return it."""
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return peak()


def attempt(path):
    """Return how many of the loaders refuse a file."""
    refused = 0
    for load in (interop.load_arrays, interop.load_layers):
        try:
            found = load(path)
        except ValueError:
            refused += 1
        else:
            for value in found.values() if isinstance(found, dict) else ():
                assert isinstance(value, (np.ndarray, cybn.BatchNorm))
                assert isinstance(value, cybn.BatchNorm) or value.dtype.kind in "biufc"
    return refused


@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header")
@pytest.mark.parametrize("way", ["damaged", "made"])
def test_hostile_files(way, path, rng, figure):
    dice = random.Random(f"{way}-{path.suffix}")
    interop.save_layers(path, {"a": random_norm(rng, 3, np.float32), "b": cybn.BatchNorm2d(4)})
    whole, refused, files = path.read_bytes(), 0, 400
    before = restart_peak()
    for _ in range(files):
        if way == "damaged":
            path.write_bytes(damaged(whole, dice))
        else:
            make = random_npz if path.suffix == ".npz" else random_safetensors
            path.write_bytes(make(dice))
        refused += attempt(path)
    grown = peak() - before
    assert grown < MOST_MEMORY, f"{grown} KiB for files of {len(whole)} bytes"
    assert refused > files
    figure(35, "hostile files refused", refused, how="sum")
    figure(35, "most memory for them, KiB", grown)


def test_hostile_settings(path, figure):
    dice, refused = random.Random(6), 0
    for _ in range(200):
        random_layers(path, dice)
        try:
            loaded = interop.load_layers(path)
        except ValueError:
            refused += 1
        else:
            layers = loaded.values() if isinstance(loaded, dict) else [loaded]
            assert all(isinstance(bn, cybn.BatchNorm) for bn in layers)
    assert 50 < refused < 200
    figure(35, "hostile files refused", refused, how="sum")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    """60 KiB that would be 10 MiB a thousand times over: its members are all the same bytes."""
    header = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (10485760,)}", b"")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(header + b"\0" * (10 << 20)) + packer.flush()
    names = [f"{i}.npy".encode() for i in range(1000)]
    size, crc = len(header) + (10 << 20), zlib.crc32(header + b"\0" * (10 << 20))
    fields = (20, 0, 8, 0, 33, crc, len(packed), size)
    local = b"PK\3\4" + struct.pack("<HHHHHIII", *fields) + struct.pack("<HH", len(names[0]), 0)
    directory = b"".join(
        b"PK\1\2"
        + struct.pack("<HHHHHHIII", 20, *fields)
        + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0)
        + name
        for name in names
    )
    body = local + names[0] + packed
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1000, 1000, len(directory), len(body), 0)
    path = tmp_path / "bomb.npz"
    path.write_bytes(body + directory + end)
    before = restart_peak()
    with pytest.raises(ValueError, match="unpacks to 10485"):
        interop.load_arrays(path)
    assert peak() - before < MOST_MEMORY


# ---- no pickle ---------------------------------------------------------------------------

LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUNNERS = {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_nothing_in_the_package_unpickles_or_runs_text(path):
    """By the syntax tree: no pickle by any name, no allow_pickle but False, no np.load."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & LOADERS
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in LOADERS
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        assert not (isinstance(node.func, ast.Name) and name in RUNNERS), name
        if name == "import_module" and node.args and isinstance(node.args[0], ast.Constant):
            assert node.args[0].value.split(".")[0] not in LOADERS
        for keyword in node.keywords:
            if keyword.arg == "allow_pickle":
                assert keyword.value.value is False
            assert keyword.arg != "weights_only" or keyword.value.value is True
        module = getattr(getattr(node.func, "value", None), "id", "")
        assert (module, name) not in {("np", "load"), ("numpy", "load"), ("torch", "load")}


def test_the_bomb_of_these_tests_goes_off():
    with pytest.raises(AssertionError, match="was run"):
        pickle.loads(pickle.dumps(Bomb()))
