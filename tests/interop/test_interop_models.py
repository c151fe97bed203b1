"""Whole models: their state to and from the forms of other libraries, with plain arrays only."""

import itertools

import numpy as np
import pytest
from fold_cases import random_norm
from interop_cases import FORMS, C

from cybn import interop


def model_state(rng, form="torch", keys=("stem.bn", "layer1.0.bn1", "layer1.0.bn2", "head")):
    """Return the state of a model with batch norms among convolutions, layer norms and others."""
    state = {
        "stem.conv.weight": rng.standard_normal((C, 3, 3, 3), dtype=np.float32),
        "ln.weight": np.ones(C, np.float32),
        "ln.bias": np.zeros(C, np.float32),
        "fc.weight": np.ones((2, C), np.float32),
        "fc.bias": np.zeros(2, np.float32),
        "sequential/layer_normalization/gamma": np.ones(C, np.float32),
        "sequential/layer_normalization/beta": np.ones(C, np.float32),
        "layers/layer_normalization/vars/0": np.ones(C, np.float32),
        "layers/layer_normalization/vars/1": np.ones(C, np.float32),
        "params/LayerNorm_0/scale": np.ones(C, np.float32),
        "params/LayerNorm_0/bias": np.ones(C, np.float32),
        "step": np.array(3),
    }
    for key in keys:
        layer = random_norm(rng, C, np.float32)
        state |= interop.convert(
            {f"{key}.{k}": v for k, v in layer.state_dict().items()}, "cybn", form
        ).state
    return state


@pytest.mark.parametrize(
    ("source", "target"), list(itertools.permutations([f for f in FORMS if f != "cybn"], 2))
)
def test_whole_models_there_and_back(source, target, rng):
    names = ["stem/batch_norm_1", "batch_normalization"]
    state = model_state(rng, source, names)
    there = interop.convert(state, source, target)
    assert list(there.taken) == names
    assert there.passed_over == {}
    old = {key for keys in there.taken.values() for key in keys}
    assert old | set(there.state) >= set(state)
    for key in set(state) - old:
        assert there.state[key] is state[key]
    back = interop.convert(there.state, target, source)
    counts = {k for k in state if k.endswith("num_batches_tracked")}
    assert set(back.state) == set(state)
    for key in set(state) - counts:
        assert back.state[key] is state[key]


def test_whole_model_by_layers(rng):
    state = model_state(rng)
    found = interop.find(state, "torch")
    assert list(found) == ["stem.bn", "layer1.0.bn1", "layer1.0.bn2", "head"]
    assert found["head"] == (
        *("head.weight", "head.bias", "head.running_mean", "head.running_var"),
        "head.num_batches_tracked",
    )
    layers = {prefix: interop.from_torch(state, prefix) for prefix in found}
    again = dict(state)
    for prefix, layer in layers.items():
        again |= interop.to_torch(layer, prefix)
    assert list(again) == list(state)
    for key, value in state.items():
        np.testing.assert_array_equal(again[key], value)


def test_renaming_counts_and_choosing(rng):
    state = model_state(rng)
    done = interop.convert(
        state,
        "torch",
        "keras",
        skip=["head"],
        rename=lambda prefix: prefix.replace(".", "/"),
        count={"stem.bn": 4},
    )
    assert list(done.taken) == ["stem.bn", "layer1.0.bn1", "layer1.0.bn2"]
    assert done.passed_over == {"head": "not asked for"}
    assert done.taken["stem.bn"] == {
        "stem.bn.weight": "stem/bn/gamma",
        "stem.bn.bias": "stem/bn/beta",
        "stem.bn.running_mean": "stem/bn/moving_mean",
        "stem.bn.running_var": "stem/bn/moving_variance",
        "stem.bn.num_batches_tracked": None,
    }
    assert done.state["head.weight"] is state["head.weight"]
    np.testing.assert_array_equal(
        done.state["stem/bn/moving_variance"], state["stem.bn.running_var"] * np.float32(0.75)
    )
    key = "layer1.0.bn1"
    variance = done.state[f"{key.replace('.', '/')}/moving_variance"]
    assert variance is state[f"{key}.running_var"]
    with pytest.raises(ValueError, match=r"count is given for \['stem'\], where no batch norm"):
        interop.convert(state, "torch", "keras", count={"stem": 4})
    only = interop.find(state, "torch", only=["head"])
    assert list(only) == ["head"]


def test_keras_keys_of_earlier_versions():
    state = {f"bn/{leaf}:0": np.ones(2) for leaf in ("gamma", "beta")}
    state |= {f"bn/moving_{leaf}:0": np.ones(2) for leaf in ("mean", "variance")}
    done = interop.convert(state, "keras", "torch")
    assert list(done.taken["bn"]) == list(state)
    assert done.state["bn.num_batches_tracked"] == 0
    assert done.state["bn.num_batches_tracked"].dtype == np.int64
    assert interop.from_keras(state, "bn").num_features == 2
    with pytest.raises(ValueError, match="name the same array"):
        interop.find(state | {"bn/gamma": np.ones(2)}, "keras")


V, M = np.ones(C, np.float32), np.ones((C, 2), np.float32)
PASSED = {
    "one of two": ("torch", {"a.running_mean": V}, "not both"),
    "a convolution with statistics": (
        "torch",
        {"a.weight": M, "a.bias": V, "a.running_mean": V, "a.running_var": V},
        "one shape",
    ),
    "two lengths": ("torch", {"a.running_mean": V, "a.running_var": V[:2]}, "one shape"),
    "a parametrized module": (
        "torch",
        {"a.parametrizations.weight.original": V, "a.running_mean": V, "a.running_var": V},
        "remove_parametrizations",
    ),
    "a pruned module": (
        "torch",
        {"a.weight_orig": V, "a.weight_mask": V, "a.running_mean": V, "a.running_var": V},
        "prune.remove",
    ),
    "numbered keys of another layer": (
        "keras-h5",
        {f"lstm/vars/{i}": V for i in range(4)},
        "name it in only=",
    ),
    "numbered keys, one short": (
        "keras-h5",
        {f"batch_norm/vars/{i}": V for i in (0, 2, 3)},
        "fit other layers",
    ),
    "a mean and a variance": ("nnx", {"input/mean": V, "input/var": V}, "name it in only="),
    "the same in ONNX": ("onnx", {"input.mean": V, "input.var": V}, "name it in only="),
}


@pytest.mark.parametrize(("form", "state", "why"), PASSED.values(), ids=PASSED)
def test_doubtful_groups_are_passed_over(form, state, why):
    done = interop.convert(state, form, "cybn")
    assert done.state == state
    assert done.taken == {}
    ((_, reason),) = done.passed_over.items()
    assert why in reason
    if "parametrized or pruned" in reason:
        with pytest.warns(UserWarning, match="is passed over: .*remove_parametrizations"):
            assert not interop.find(state, form)
    else:
        assert not interop.find(state, form)


def test_a_variance_that_is_unbiased_already():
    """TensorFlow's fused kernel leaves it so in a Keras form; `state_ddof` declares it."""
    state = {f"bn/{name}": V for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    same = interop.convert(state, "keras", "torch", count=10, state_ddof=1).state
    np.testing.assert_array_equal(same["bn.running_var"], V)
    other = interop.convert(state, "keras", "torch", count=10).state
    np.testing.assert_allclose(other["bn.running_var"], V * np.float32(10 / 9), rtol=1e-6)
    back = interop.convert(same, "torch", "keras", count=10, state_ddof=0).state
    np.testing.assert_array_equal(back["bn/moving_variance"], V)
    with pytest.raises(ValueError, match="state_ddof is 2; it must be"):
        interop.convert(state, "keras", "torch", state_ddof=2)


def test_states_that_are_none():
    """A module, a checkpoint that contains a state, other layers' arrays, and None are refused."""

    class Module:
        def state_dict(self):
            return {}

    with pytest.raises(TypeError, match=r"of type Module; .*flat dict. Give its state_dict\(\)"):
        interop.from_torch(Module())
    state = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), V)
    with pytest.raises(ValueError, match=r"there is a dict in it: give state\['model'\]"):
        interop.from_torch({"model": state, "epoch": 3})
    with pytest.raises(ValueError, match=r"gamma has shape \(2, 2\).*layer of another kind"):
        interop.from_torch({"weight": np.ones((2, 2)), "bias": np.ones(2)})
    bn = interop.from_torch(state | {"weight": None, "bias": None})
    assert not bn.affine
    assert interop.find({f"a.{k}": v for k, v in state.items()} | {"b.bias": None}, "torch")


def test_doubtful_groups_are_taken_when_named():
    state = {f"blocks/bn1/vars/{i}": V for i in range(4)}
    assert list(interop.find(state, "keras-h5", only=["blocks/bn1"])) == ["blocks/bn1"]
    state = {"norm/mean": V, "norm/var": V}
    assert list(interop.find(state, "nnx", only=["norm"])) == ["norm"]
    with pytest.raises(
        ValueError, match=r"no batch norm of the form 'nnx' at.*other.*no such keys"
    ):
        interop.find(state, "nnx", only=["norm", "other"])


def test_conversion_refuses(rng):
    state = model_state(rng)
    with pytest.raises(ValueError, match="form is 'tf'; it must be one of cybn, torch, keras"):
        interop.convert(state, "tf", "torch")
    with pytest.raises(ValueError, match="form is 'tf'"):
        interop.find(state, "tf")
    with pytest.raises(TypeError, match="type list; it must be a flat dict"):
        interop.find([], "torch")
    with pytest.raises(ValueError, match=r"'head/gamma' is in the state already; change it by"):
        interop.convert(state | {"head/gamma": V}, "torch", "keras")


def test_reading_one_layer_refuses(bn):
    state = {f"block.{key}": value for key, value in interop.to_torch(bn).items()}
    with pytest.raises(
        ValueError, match=r"no batch norm of the form 'torch' at prefix ''.*'block'"
    ):
        interop.from_torch(state)
    with pytest.raises(TypeError, match="type list; it must be a flat dict"):
        interop.from_torch([("weight", V)])
    with pytest.raises(ValueError, match=r"'running_mean' is there, but not 'running_var'"):
        interop.from_torch({"weight": V, "bias": V, "running_mean": V})
    with pytest.raises(ValueError, match=r"no 'ln/moving_mean', so no batch norm is at prefix"):
        interop.from_keras({"ln/gamma": V, "ln/beta": V}, "ln")
    with pytest.raises(ValueError, match=r"running_var is -1.0 in channel 0"):
        interop.from_torch({"running_mean": V, "running_var": -V})
    with pytest.raises(ValueError, match=r"shape \(\)"):
        interop.from_torch({"running_mean": np.float32(1), "running_var": np.float32(1)})
    with pytest.raises(ValueError, match="api is 'haiku'"):
        interop.from_flax({}, api="haiku")
    with pytest.raises(TypeError, match="bn is of type dict"):
        interop.to_torch({})


def test_integer_variances_are_not_truncated(bn):
    state = {f"bn.{k}": np.arange(1, 4) for k in ("running_mean", "running_var", "weight", "bias")}
    with pytest.raises(TypeError, match=r"running variance is int64.*make it float32"):
        interop.convert(state, "torch", "keras", count=10)
    with pytest.raises(TypeError, match="running variance is int64"):
        interop.from_torch(state, "bn", running_ddof=0, count=10)
    done = interop.convert(state, "torch", "keras")  # only renames keys
    assert done.state["bn/moving_variance"] is state["bn.running_var"]


def test_flattening():
    nested = {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    flat = {"a/b/c": 1, "a/d": 2, "e": 3}
    assert interop.flatten(nested) == flat
    assert interop.unflatten(flat) == nested
    for bad in ({"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}):
        with pytest.raises(ValueError, match="has a value"):
            interop.unflatten(bad)
    for bad in ({"x/y": 3, "x": {"y": 4}}, {"a": {"x": {"y": 4}, "x/y": 3}}):
        with pytest.raises(ValueError, match=r"two values have the path '(a/)?x/y'"):
            interop.flatten(bad)


def test_a_checkpoint_is_not_a_state(rng):
    """A dict of dicts of arrays has no batch norms: an error is raised, not an empty result."""
    bn = random_norm(rng, 3, np.float32)
    checkpoint = {"state_dict": interop.to_torch(bn, "bn"), "epoch": 3}
    flax = interop.to_flax(bn, "bn")
    for call in (interop.find, lambda s, f: interop.convert(s, f, "cybn")):
        with pytest.raises(ValueError, match=r"is nested.*give one of them.*\['state_dict'\]"):
            call(checkpoint, "torch")
        with pytest.raises(ValueError, match=r"is nested.*give interop\.flatten\(state\)"):
            call(flax, "flax")
    assert interop.find(interop.flatten(flax), "flax")
    assert interop.find({}, "torch") == {}
    assert interop.find({"fc.weight": [[1.0]], "meta": {"epoch": 3}}, "torch") == {}
