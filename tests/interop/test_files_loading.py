"""Loading files: a hostile file gives a ValueError; modes, switches and types come back."""

import io
import json
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest
from file_cases import ARRAYS, ENDINGS, layers, same
from fold_cases import random_norm

import cybn
from cybn import interop
from cybn.interop import _files

# ---- hostile files ---------------------------------------------------------------------------


@pytest.mark.parametrize("load", [interop.load_arrays, interop.load_layers])
def test_any_damage_is_a_value_error_or_harmless(load, path, rng):
    interop.save_layers(path, {n: b for n, b in layers(rng).items() if b.track_running_stats})
    whole, dice = path.read_bytes(), random.Random(0)
    outcomes = {"loaded": 0, "ValueError": 0}
    for _ in range(250):
        data = bytearray(whole)
        if dice.random() < 0.3:
            data = data[: dice.randrange(len(data))]
        for _ in range(dice.choice([0, 1, 1, 2, 8])):
            if data:
                data[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(data)
        try:
            load(path)
            outcomes["loaded"] += 1
        except ValueError:
            outcomes["ValueError"] += 1
    print(path.suffix, outcomes)
    assert outcomes["ValueError"] > 125


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"PK\3\4", b"\xff" * 100, pickle.dumps([1])])
def test_no_file_of_the_kind(content, path):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable"):
        interop.load_arrays(path)


class Bomb:
    """An object that raises an error when it is unpickled."""

    def __reduce__(self):
        return (eval, ("1/0",))


def archive(tmp_path, method=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(tmp_path / "bad.npz", "w", method) as file:
        for name, data in members.items():
            file.writestr(name.replace("_npy", ".npy"), data)
    return tmp_path / "bad.npz"


def npy(header, data=b""):
    text = header.encode().ljust(118 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def header(descr="'<f4'", shape="(3,)"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


HOSTILE = {
    "a pickle among the arrays": npy(header("'|O'"), pickle.dumps(Bomb())),
    "a bare pickle": pickle.dumps(Bomb()),
    "strings": npy(header("'<U4'"), b"\0" * 48),
    "records": npy(header("[('a', '<f4')]"), b"\0" * 12),
    "dates": npy(header("'<M8[s]'"), b"\0" * 24),
    "a terabyte": npy(header(shape="(1000000000000,)"), b"\0" * 12),
    "more than memory has": npy(header(shape=f"({2**62}, {2**62})"), b"\0" * 12),
    "a negative length": npy(header(shape="(-3,)"), b"\0" * 12),
    "two negative lengths": npy(header(shape="(-3, -1)"), b"\0" * 12),
    "too short": npy(header(), b"\0" * 11),
    "too long": npy(header(), b"\0" * 13),
    "a version of the future": npy(header(), b"\0" * 12).replace(b"Y\x01", b"Y\x07", 1),
    "code for a header": npy("__import__('os').abort()"),
    "nested without end": npy("(" * 110),
    "a header of 60 KB": b"\x93NUMPY\x01\x00"
    + struct.pack("<H", 60000)
    + header().encode().ljust(60000)
    + b"\0" * 12,
    "a header longer than the file": b"\x93NUMPY\x01\x00\xff\xff" + header().encode(),
    "nothing": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_members(data, tmp_path):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = archive(tmp_path, method, good_npy=npy(header(), b"\0" * 12), bad_npy=data)
        with pytest.raises(ValueError, match="not a readable npz file"):
            interop.load_arrays(path)


def test_the_well_formed_member_of_these_tests_is_read(tmp_path):
    path = archive(tmp_path, good_npy=npy(header(), struct.pack("<3f", 1, 2, 3)))
    assert interop.load_arrays(path)["good"].tolist() == [1, 2, 3]


def test_hostile_archives(tmp_path):
    member = npy(header(), b"\0" * 12)
    with pytest.raises(ValueError, match="not an npy file"):
        interop.load_arrays(archive(tmp_path, readme=b"hello"))
    with pytest.raises(ValueError, match="packed by method"):
        interop.load_arrays(archive(tmp_path, zipfile.ZIP_LZMA, a_npy=member))
    with zipfile.ZipFile(tmp_path / "two.npz", "w") as file:
        file.writestr("a.npy", member)
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("a.npy", member)
    with pytest.raises(ValueError, match="or occurs twice"):
        interop.load_arrays(tmp_path / "two.npz")


def test_what_a_packed_file_may_unpack_to(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(2**20))
    path = archive(tmp_path, zipfile.ZIP_DEFLATED, zeros_npy=buffer.getvalue())
    assert path.stat().st_size < 2**14
    with pytest.raises(ValueError, match="unpacks to 8388736 bytes; most_bytes is 1000000"):
        interop.load_arrays(path, most_bytes=10**6)
    assert interop.load_arrays(path)["zeros"].size == 2**20
    stored = archive(tmp_path, zeros_npy=buffer.getvalue())
    assert interop.load_arrays(stored, most_bytes=0)["zeros"].size == 2**20


GOOD = {
    "class": "BatchNorm",
    "num_features": 3,
    "axis": 1,
    "eps": 1e-5,
    "momentum": 0.1,
    "affine": True,
    "track_running_stats": True,
    "running_ddof": 1,
    "dtype": "float32",
}
BAD = {
    "another class": {"class": "Pickle"},
    "a class that is none": {"class": ["BatchNorm"]},
    "fewer channels": {"num_features": 2},
    "channels a string": {"num_features": "3"},
    "channels fractional": {"num_features": 3.5},
    "eps": {"eps": -1},
    "eps a word": {"eps": "small"},
    "momentum": {"momentum": 2},
    "ddof": {"running_ddof": 7},
    "dtype": {"dtype": "object"},
    "dtype of another kind": {"dtype": {"a": 1}},
    "axis": {"axis": 1.5},
    "not affine": {"affine": False},
    "a setting of the future": {"activation_of_2050": "relu"},
    "many channels and no arrays": {
        "num_features": 10**15,
        "affine": False,
        "track_running_stats": False,
    },
}


def write_layers(path, settings, arrays, **outer):
    text = settings
    if not isinstance(settings, str):
        outer = {"version": 1, "single": False} | outer
        text = json.dumps(outer | {"layers": {"a": settings}})
    _files._save(path, arrays, {})
    if path.suffix == ".npz":
        np.savez(path, **arrays, __cybn__=np.frombuffer(text.encode(), np.uint8))
    else:
        from safetensors.numpy import save_file

        save_file(arrays, path, {"cybn": text})


def arrays_of(bn):
    return {f"a.{key}": value for key, value in bn.state_dict().items()}


def test_the_good_settings_of_these_tests_load(path):
    bn = cybn.BatchNorm(3)
    write_layers(path, GOOD, arrays_of(bn))
    same(interop.load_layers(path)["a"], bn)


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_bad_settings(change, path):
    stateless = change.get("num_features") == 10**15
    write_layers(path, GOOD | change, {} if stateless else arrays_of(cybn.BatchNorm(3)))
    with pytest.raises(ValueError, match="is not a file of layers"):
        interop.load_layers(path)


TEXTS = {
    "no JSON": "{",
    "a number": "3",
    "null": "null",
    "nested without end": "[" * 100_000,
    "no layers": '{"version": 1, "single": false}',
    "layers a list": '{"version": 1, "single": false, "layers": [1]}',
    "a layer a number": '{"version": 1, "single": false, "layers": {"a": 1}}',
    "another version": '{"version": 2, "single": false, "layers": {}}',
    "single without one": '{"version": 1, "single": true, "layers": {}}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_bad_texts(text, path):
    write_layers(path, text, {})
    with pytest.raises(ValueError, match="is not a file of layers"):
        interop.load_layers(path)


@pytest.mark.parametrize(
    "change",
    [
        {"a.running_var": np.array([1, -1, 1], np.float32)},
        {"a.running_mean": np.array([1, np.nan, 1], np.float32)},
        {"a.gamma": np.ones(3, np.int32)},
        {"a.gamma": np.ones((3, 1), np.float32)},
        {"a.num_batches_tracked": np.array(-1)},
        {"a.num_batches_tracked": np.array(1.5)},
        {"b.gamma": np.ones(3, np.float32)},
    ],
)
def test_arrays_that_do_not_fit(change, path):
    write_layers(path, GOOD, arrays_of(cybn.BatchNorm(3)) | change)
    with pytest.raises(ValueError, match="is not a file of layers"):
        interop.load_layers(path)


def test_hostile_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "bad.safetensors"

    def content(text, data=b"", length=None):
        size = len(text) if length is None else length
        return struct.pack("<Q", size) + text.encode() + data

    entry = '{"a":{"dtype":"%s","shape":[%s],"data_offsets":[%s]}}'
    for bad in (
        content(entry % ("F32", "3", "0,12"), b"\0" * 11),
        content(entry % ("F32", "3", "0,12"), b"\0" * 13),
        content(entry % ("F32", "4", "0,12"), b"\0" * 12),
        content(entry % ("F32", "3", "4,16"), b"\0" * 12),
        content(entry % ("F32", str(2**62) + ",8", "0,12"), b"\0" * 12),
        content(entry % ("O", "3", "0,12"), b"\0" * 12),
        content(entry % ("F8_E8M0", "12", "0,12"), b"\0" * 12),
        content("{}", length=2**40),
        content("{}", length=2**64 - 1),
        content("[" * 1000),
        content('{"__metadata__":{"cybn":3}}'),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            interop.load_arrays(path)
    path.write_bytes(content(entry % ("F8_E8M0", "12", "0,12"), b"\0" * 12))
    with pytest.raises(ValueError, match="the tensor 'a' is F8_E8M0, which NumPy does not"):
        interop.load_arrays(path)
    path.write_bytes(content(entry % ("F32", "3", "0,12"), b"\0" * 12))
    assert interop.load_arrays(path)["a"].tolist() == [0, 0, 0]


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"pip install 'cybn\[interop\]'"):
        interop.save_layers(tmp_path / "a.safetensors", cybn.BatchNorm(3))
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install 'cybn\[interop\]'"):
        interop.load_layers(tmp_path / "a.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    monkeypatch.setitem(__import__("sys").modules, "onnx.numpy_helper", None)
    with pytest.raises(ImportError, match=r"onnx: pip install 'cybn\[interop\]'"):
        interop.to_onnx(cybn.BatchNorm(3)).protos()


# ---- modes and switches, open files, paths, types ----------------------------------------------

SWITCHES = ("training", "update_statistics", "use_batch_statistics", "train_affine")


def switched():
    """Return layers in every mode and with every switch, of all kinds of norms."""
    limits = cybn.Renorm(2, 1)
    made = {
        "eval": cybn.BatchNorm(3).eval(),
        "frozen": cybn.BatchNorm2d(3).freeze(),
        "by the batch": cybn.BatchNorm(3),
        "one": cybn.BatchNorm(3, renorm=limits),
        "other": cybn.BatchNorm(3, renorm=limits).eval(),
        "alone": cybn.BatchNorm(3, renorm=cybn.Renorm(2, 1)),
        "instance": cybn.InstanceNorm1d(3, affine=True, track_running_stats=True).eval(),
        "instance, bare": cybn.InstanceNorm3d(3),
        "layer": cybn.LayerNorm((2, 3), eps=1e-3).eval(),
        "layer without beta": cybn.LayerNorm(3, bias=False, dtype=np.float64),
        "layer, bare": cybn.LayerNorm(4, elementwise_affine=False),
        "rms": cybn.RMSNorm(3),
        "rms, eps": cybn.RMSNorm((1, 3), eps=0.5, elementwise_affine=False),
        "group": cybn.GroupNorm(2, 6, axis=-1),
    }
    made["by the batch"].use_batch_statistics = True
    for layer in made.values():
        if layer.gamma is not None:
            layer.gamma[...] = np.arange(1, layer.gamma.size + 1).reshape(layer.gamma.shape)
    return made


def modes(layer):
    return {name: getattr(layer, name) for name in SWITCHES if hasattr(layer, name)}


def same_family(a, b):
    assert (type(a), repr(a), a.dtype) == (type(b), repr(b), b.dtype)
    assert modes(a) == modes(b)
    mine, other = a.state_dict(), b.state_dict()
    assert list(mine) == list(other)
    for key, value in mine.items():
        np.testing.assert_array_equal(value, other[key])


def test_modes_switches_and_the_family_come_back(path):
    saved = switched()
    interop.save_layers(path, saved)
    loaded = interop.load_layers(path)
    for name, layer in saved.items():
        same_family(loaded[name], layer)
    assert loaded["one"].renorm is loaded["other"].renorm  # both share one schedule, as before
    assert loaded["one"].renorm is not loaded["alone"].renorm
    for layer in saved.values():
        interop.save_layers(path, layer)
        same_family(interop.load_layers(path), layer)


def test_a_layer_in_eval_mode_goes_on_as_it_was(path, rng):
    bn = random_norm(rng, 4, np.float32).eval()
    x = rng.standard_normal((5, 4), dtype=np.float32)
    interop.save_layers(path, bn)
    twin = interop.load_layers(path)
    np.testing.assert_array_equal(twin(x), bn(x))
    np.testing.assert_array_equal(twin.running_mean, bn.running_mean)


@pytest.mark.parametrize("change", [{"modes": {"training": 1}}, {"modes": {"gamma": True}}])
def test_bad_modes(change, path):
    write_layers(path, GOOD | change, arrays_of(cybn.BatchNorm(3)))
    with pytest.raises(ValueError, match=r"is not a file of layers.*'a': it has the mode"):
        interop.load_layers(path)


def test_what_could_not_be_loaded_is_not_saved(path, rng):
    good, bad = random_norm(rng, 3, np.float32), cybn.BatchNorm(3)
    interop.save_layers(path, {"good": good})
    before = path.read_bytes()
    bad(np.full((4, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"layer 'bad' could not be loaded again: running_mean is"):
        interop.save_layers(path, {"good": good, "bad": bad})
    assert path.read_bytes() == before
    bad.reset_running_stats()  # the solution
    interop.save_layers(path, {"good": good, "bad": bad})
    bad.running_var[:] = -1  # in place, so it is not checked
    with pytest.raises(ValueError, match=r"'bad' could not be loaded again: running_var is -1"):
        interop.save_layers(path, {"good": good, "bad": bad})
    assert sorted(interop.load_layers(path)) == ["bad", "good"]


def test_an_error_of_loading_names_the_layer_and_a_way_out(path):
    bad = arrays_of(cybn.BatchNorm(3)) | {"a.running_mean": np.full(3, np.nan, "f4")}
    write_layers(path, GOOD, bad)
    with pytest.raises(ValueError, match=r"layer 'a': running_mean is nan.*load_arrays reads"):
        interop.load_layers(path)
    assert np.isnan(interop.load_arrays(path)["a.running_mean"]).all()


@pytest.mark.parametrize("format", [None, *ENDINGS])
def test_open_files(format, tmp_path, rng):
    if format == "safetensors":
        pytest.importorskip("safetensors")
    saved = switched() | layers(rng)
    with io.BytesIO() as file:
        interop.save_layers(file, saved, format=format)
        file.seek(0)
        loaded = interop.load_layers(file)
        with pytest.raises(ValueError, match=r"file\.seek\(0\)"):
            interop.load_layers(file)
    assert sorted(loaded) == sorted(saved)
    for name, layer in saved.items():
        same_family(loaded[name], layer)
    with open(tmp_path / "any.name", "wb") as file:
        interop.save_arrays(file, ARRAYS, format=format)
    with open(tmp_path / "any.name", "rb") as file:
        arrays = interop.load_arrays(file)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].flags.writeable
    with io.BytesIO() as file:
        with pytest.raises(TypeError, match="bad is object"):
            interop.save_arrays(file, {"good": np.ones(3), "bad": [None]}, format=format)
        assert file.tell() == 0
    for broken in (b"PK\3\4", b"\xff" * 100, b"{}"):
        with pytest.raises(ValueError, match="not a readable"):
            interop.load_arrays(io.BytesIO(broken))


def test_the_format_of_a_path_and_what_is_no_file(tmp_path):
    pytest.importorskip("safetensors")
    arrays = {"a": np.ones(3)}
    interop.save_arrays(tmp_path / "a.bin", arrays, format="safetensors")
    (tmp_path / "a.bin").rename(tmp_path / "a.safetensors")
    assert interop.load_arrays(tmp_path / "a.safetensors")["a"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="format is 'zip'; it must be one of npz, safetensors"):
        interop.save_arrays(io.BytesIO(), arrays, format="zip")
    for bad in (3, None, io.StringIO()):
        with pytest.raises(TypeError, match=r"path is of type .*in binary mode"):
            interop.save_arrays(bad, arrays)
        with pytest.raises(TypeError, match=r"path is of type .*in binary mode"):
            interop.load_arrays(bad)


def test_errors_name_the_path_as_it_was_written(tmp_path, monkeypatch, path):
    ending = path.suffix
    monkeypatch.chdir(tmp_path)
    given = f"./missing//there{ending}"
    for call in (lambda: interop.save_arrays(given, ARRAYS), lambda: interop.load_arrays(given)):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert caught.value.filename == given
        assert "partial" not in str(caught.value)
    (tmp_path / f"folder{ending}").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        interop.save_arrays(f"./folder{ending}", ARRAYS)
    assert caught.value.filename == f"./folder{ending}"
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        interop.save_layers(f"file/../x/a{ending}", cybn.BatchNorm(3))
    assert caught.value.filename == f"file/../x/a{ending}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", f"folder{ending}"]


def test_bfloat16_and_float8(path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    wide = np.array([1.0, -2.5, np.inf, -0.0, 2.0**-130], np.float32)
    arrays = {"half": wide.astype(ml_dtypes.bfloat16), "plain": np.ones(2)}
    interop.save_arrays(path, arrays)
    loaded = interop.load_arrays(path)
    assert loaded["half"].dtype == np.float32
    np.testing.assert_array_equal(loaded["half"], arrays["half"].astype(np.float32))
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # NumPy does not save the name of the type
        np.testing.assert_array_equal(
            interop.load_arrays(path)["half"], arrays["half"].astype(np.float32)
        )
        return
    from safetensors.numpy import save

    codes = np.arange(256, dtype=np.uint8)
    for name, kind in (("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2")):
        eight = codes.view(getattr(ml_dtypes, name))
        data = save({"u": codes}).replace(b'"U8"', f'"{kind}"'.encode())
        size = int.from_bytes(data[:8], "little") + len(kind) - 2
        path.write_bytes(size.to_bytes(8, "little") + data[8:])
        for place in (path, io.BytesIO(path.read_bytes())):
            found = interop.load_arrays(place)["u"]
            np.testing.assert_array_equal(found, eight.astype(np.float32))
            np.testing.assert_array_equal(np.signbit(found), np.signbit(eight.astype(np.float32)))
