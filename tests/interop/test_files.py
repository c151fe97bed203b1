"""Files: arrays come back bit for bit, and saving is all or nothing."""

import io
import re

import numpy as np
import pytest
from file_cases import ARRAYS, layers, same
from fold_cases import random_norm

import cybn
from cybn import interop
from cybn.interop import _files


def test_layers_make_the_round_trip(path, rng):
    saved = layers(rng)
    interop.save_layers(path, saved)
    loaded = interop.load_layers(path)
    assert sorted(loaded) == sorted(saved)
    for name, layer in saved.items():
        same(loaded[name], layer)
        assert loaded[name].training


def test_one_layer_makes_the_round_trip(path, rng):
    for layer in layers(rng).values():
        interop.save_layers(path, layer)
        same(interop.load_layers(path), layer)


def test_no_layers_at_all(path):
    interop.save_layers(path, {})
    assert interop.load_layers(path) == {}


def test_arrays_make_the_round_trip(path):
    interop.save_arrays(path, ARRAYS)
    loaded = interop.load_arrays(path)
    assert sorted(loaded) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype.newbyteorder("=")
        assert loaded[name].shape == array.shape
        assert np.signbit(loaded["nan"][2])


def test_the_same_arrays_give_the_same_bytes(path):
    interop.save_arrays(path, ARRAYS)
    first = path.read_bytes()
    interop.save_arrays(path, ARRAYS)
    assert path.read_bytes() == first


def test_other_programs_read_and_write_them(path, rng):
    arrays = {"a.weight": np.ones((2, 3), np.float32), "n": np.array(3)}
    if path.suffix == ".npz":
        interop.save_arrays(path, arrays)
        with np.load(path, allow_pickle=False) as file:
            assert {k: v.tolist() for k, v in file.items()} == {"a.weight": [[1] * 3] * 2, "n": 3}
        for save in (np.savez, np.savez_compressed):
            save(path, **arrays)
            assert interop.load_arrays(path)["a.weight"].tolist() == [[1] * 3] * 2
    else:
        from safetensors.numpy import load_file, save_file

        interop.save_arrays(path, arrays)
        assert load_file(path)["a.weight"].tolist() == [[1] * 3] * 2
        save_file(arrays, path)
        assert interop.load_arrays(path)["n"] == 3


def test_the_arrays_of_a_file_of_layers(path, rng):
    saved = {"a": random_norm(rng, 3, np.float32)}
    interop.save_layers(path, saved)
    arrays = interop.load_arrays(path)
    state = interop.convert(arrays, "cybn", "torch").state
    assert sorted(state) == sorted(interop.to_torch(saved["a"], "a"))


def test_saving_is_whole_or_not_at_all(path, rng):
    interop.save_arrays(path, ARRAYS)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="bad is object"):
        interop.save_arrays(path, {"good": np.ones(3), "bad": np.array([None])})
    with pytest.raises(TypeError, match="bad is <U1; it must consist of numbers"):
        interop.save_arrays(path, {"bad": np.array(["a"])})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a\0b", "has NUL in it"),
        ("\ud800", "is not valid Unicode"),
        ("é" * 32501, "bytes; 65000 is the most"),
        ("__metadata__", "is taken"),
    ],
)
def test_names_that_could_not_be_read_back(name, why, path):
    interop.save_arrays(path, ARRAYS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=why):
        interop.save_arrays(path, {name: np.ones(3)})
    assert path.read_bytes() == before
    if name != "__metadata__":
        with pytest.raises(ValueError, match=why):
            interop.save_layers(path, {name: cybn.BatchNorm(3)})
    assert path.read_bytes() == before
    longest = {"é" * 32500: np.ones(3)}
    interop.save_arrays(path, longest)
    assert list(interop.load_arrays(path)) == list(longest)


def test_saving_touches_no_other_file(path):
    other = path.with_name(f"{path.name}.partial")
    other.write_text("mine")
    usual = path.with_name("usual")
    usual.touch()
    interop.save_arrays(path, ARRAYS)
    assert other.read_text() == "mine"
    assert path.stat().st_mode == usual.stat().st_mode
    assert len(list(path.parent.iterdir())) == 3


def test_a_link_stays_a_link_and_a_private_file_private(path):
    """Arrays are saved to the file that a link points to, with that file's permissions."""
    real = path.with_name(f"real{path.suffix}")
    interop.save_arrays(real, {"old": np.ones(2)})
    real.chmod(0o600)
    path.symlink_to(real.name)
    interop.save_arrays(path, ARRAYS)
    assert path.is_symlink()
    assert sorted(interop.load_arrays(real)) == sorted(ARRAYS)
    assert real.stat().st_mode & 0o777 == 0o600
    assert len(list(path.parent.iterdir())) == 2
    real.unlink()
    interop.save_arrays(path, ARRAYS)  # creates the file that the link points to
    assert path.is_symlink()
    assert real.exists()


def test_a_file_that_takes_only_a_part(path):
    class Short(io.BytesIO):
        def write(self, data):
            return super().write(data[:10])

    with pytest.raises(OSError, match=r"took 10 of \d+ bytes"):
        interop.save_arrays(Short(), ARRAYS, format=path.suffix[1:])


def test_saving_fails_cleanly(path, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(_files.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        interop.save_arrays(path, ARRAYS)
    assert not list(path.parent.iterdir())


def test_what_cannot_be_saved(path, tmp_path, rng):
    class Mine(cybn.BatchNorm):
        pass

    bn = cybn.BatchNorm(3)
    with pytest.raises(TypeError, match="layer 'a' is of type Mine"):
        interop.save_layers(path, {"a": Mine(3)})
    with pytest.raises(TypeError, match="layers is of type list"):
        interop.save_layers(path, [bn])
    with pytest.raises(ValueError, match="has the name ''"):
        interop.save_layers(path, {"": bn})
    with pytest.raises(ValueError, match="'__cybn__' is taken"):
        interop.save_arrays(path, {"__cybn__": np.ones(3)})
    with pytest.raises(TypeError, match="dict of str"):
        interop.save_arrays(path, {1: np.ones(3)})
    for call in (interop.load_arrays, interop.load_layers, lambda p: interop.save_layers(p, bn)):
        with pytest.raises(ValueError, match=r"must end in \.npz or \.safetensors"):
            call(tmp_path / "state.pt")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there(path):
    for load in (interop.load_arrays, interop.load_layers):
        with pytest.raises(FileNotFoundError):
            load(path)


def test_arrays_are_no_layers(path):
    interop.save_arrays(path, {"gamma": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="is not a file of layers"):
        interop.load_layers(path)


def test_what_is_set_later_comes_back(path):
    """The constructor of an instance norm has no nan_policy, but it can be set as an attribute."""
    layers = {"one": cybn.InstanceNorm1d(3, track_running_stats=True), "two": cybn.BatchNorm(3)}
    for layer in layers.values():
        layer.nan_policy = "skip"
        layer.eval().freeze()
    interop.save_layers(path, layers)
    for name, layer in interop.load_layers(path).items():
        assert layer.nan_policy == "skip"
        assert repr(layer) == repr(layers[name])
        assert not layer.training


def test_an_unreadable_file_is_named(path):
    path.write_bytes(b"nothing of the kind")
    for load in (interop.load_arrays, interop.load_layers):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not a readable"):
            load(path)
