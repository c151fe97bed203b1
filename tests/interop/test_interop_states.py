"""States as other programs leave them, the other norms, and ONNX nodes in other types."""

import copy
import re

import numpy as np
import pytest
from fold_cases import random_norm

import cybn
from cybn import interop

V, M = np.ones(5, np.float32), np.ones((5, 2), np.float32)
C = 5
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])
FORMS = ("cybn", "torch", "keras", "keras-h5", "flax", "nnx", "onnx")

TO = {
    "torch": interop.to_torch,
    "keras": interop.to_keras,
    "flax": interop.to_flax,
    "nnx": lambda bn, *a, **k: interop.to_flax(bn, *a, api="nnx", **k),
    "onnx": interop.to_onnx,
}
FROM = {
    "torch": interop.from_torch,
    "keras": interop.from_keras,
    "flax": interop.from_flax,
    "nnx": lambda state, *a, **k: interop.from_flax(state, *a, api="nnx", **k),
    "onnx": lambda node, name="", **k: interop.from_onnx(node, **k),
}


@pytest.fixture
def bn(rng):
    layer = random_norm(rng, C, np.float32)
    layer.num_batches_tracked = 7
    return layer


def vectors(bn):
    return [bn.gamma, bn.beta, bn.running_mean, bn.running_var]


def same(a, b):
    for mine, other in zip(vectors(a), vectors(b), strict=True):
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype == other.dtype


# ---- states as other programs leave them -------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "keras", "flax", "nnx", "onnx", "mxnet", "cybn"])
@pytest.mark.parametrize("gone", ["gamma", "beta"])
def test_scale_without_shift_and_the_other_way(gone, name, bn):
    state = interop.convert({f"b.{k}": v for k, v in bn.state_dict().items()}, "cybn", name).state
    group = interop._forms.search(state, name, None, ()).taken["b"]
    state = {key: value for key, value in state.items() if key != group[gone]}
    assert list(interop.find(state, name)) == ["b"]
    twin = interop._layers.build(state, name, "b", cybn.BatchNorm, 1, None, 1, eps=bn.eps)
    expected = bn.state_dict() | {gone: np.full(C, 1.0 if gone == "gamma" else 0.0)}
    for key, value in twin.state_dict().items():
        np.testing.assert_array_equal(
            value, expected[key] if key != "num_batches_tracked" else value
        )


def test_parametrized_and_pruned_states_are_refused(bn):
    state = interop.to_torch(bn, "a")
    for hidden in ("parametrizations.weight.original0", "weight_orig", "bias_mask", "weight_g"):
        changed = state | {f"a.{hidden}": V}
        with pytest.raises(ValueError, match=rf"'a\.{hidden}' shows.*remove_parametrizations"):
            interop.from_torch(changed, "a")
        assert (
            "parametrized or pruned" in interop.convert(changed, "torch", "keras").passed_over["a"]
        )
    other = state | {"conv.weight_orig": V}  # a key of another module
    same(interop.from_torch(other, "a"), bn)


@pytest.mark.parametrize("count", [7.0, np.float32(6.6), np.array([7.25]), np.float16(7)])
def test_counts_that_are_floats(count, bn):
    state = interop.to_torch(bn, "a") | {"a.num_batches_tracked": np.asarray(count)}
    if np.ndim(count):
        state["a.num_batches_tracked"] = count.reshape(1)
    assert interop.from_torch(state, "a").num_batches_tracked == 7
    done = interop.convert(state, "torch", "cybn").state["a.num_batches_tracked"]
    assert done.dtype == np.int64
    assert int(done.item()) == 7
    for bad in (np.nan, -1.0, 1e300):
        with pytest.raises(ValueError, match="num_batches_tracked"):
            interop.from_torch(state | {"a.num_batches_tracked": np.array(bad)}, "a")


def test_bfloat16_states(bn):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    state = {k: v.astype(ml_dtypes.bfloat16) for k, v in interop.to_keras(bn).items()}
    layer = interop.from_keras(state)
    assert layer.dtype == np.float32
    np.testing.assert_array_equal(layer.gamma, state["gamma"].astype(np.float32))
    converted = interop.from_keras(state, running_ddof=1, count=5)
    wide = state["moving_variance"].astype(np.float32)
    np.testing.assert_allclose(converted.running_var, wide * 1.25, rtol=1e-6)


TAILS = [":0", "/ExponentialMovingAverage", "/ExponentialMovingAverage:0"]


@pytest.mark.parametrize("tail", [*TAILS, "/.ATTRIBUTES/VARIABLE_VALUE"])
def test_tails_of_tensorflow(tail, bn):
    state = {f"{key}{tail}": value for key, value in interop.to_keras(bn, "net/bn").items()}
    assert list(interop.find(state, "keras")) == ["net/bn"]
    same(interop.from_keras(state, "net/bn", running_ddof=0), bn)
    both = state | interop.to_keras(bn, "net/bn")
    with pytest.raises(ValueError, match=r"name the same array; leave out .*k\.endswith"):
        interop.find(both, "keras")


def test_mxnet_and_hints(bn):
    keras = interop.to_keras(bn, "bn0")
    state = interop.convert(keras, "keras", "mxnet").state
    assert sorted(state) == ["bn0_beta", "bn0_gamma", "bn0_moving_mean", "bn0_moving_var"]
    parts = {"gamma": "arg", "beta": "arg", "moving_mean": "aux", "moving_var": "aux"}
    headed = {f"{parts[k.removeprefix('bn0_')]}:{k}": v for k, v in state.items()}
    assert list(interop.convert(headed, "mxnet", "torch").taken) == ["bn0"]
    gluon = {k.replace("moving", "running"): v for k, v in state.items()}
    assert list(interop.find(gluon, "mxnet")) == ["bn0"]
    with pytest.raises(ValueError, match=r"The keys are those of the form 'mxnet', at 'bn0'"):
        interop.from_torch(state, "bn0")
    with pytest.raises(ValueError, match=r"The keys are those of the form 'keras', at 'bn0'"):
        interop.from_torch(keras, "bn0")


def test_a_variance_that_is_unbiased_already(bn):
    state = interop.to_keras(bn)
    layer = interop.from_keras(state, state_ddof=1)
    assert layer.running_ddof == 1
    np.testing.assert_array_equal(layer.running_var, bn.running_var)
    layer = interop.from_keras(state, state_ddof=1, running_ddof=0, count=4)
    np.testing.assert_array_equal(layer.running_var, bn.running_var * np.float32(0.75))
    assert interop.from_torch(interop.to_torch(bn), state_ddof=0).running_ddof == 0
    with pytest.raises(ValueError, match="state_ddof is 2"):
        interop.from_keras(state, state_ddof=2)


@pytest.mark.parametrize("name", TO)
def test_switches_are_not_dropped(name, bn):
    """A layer that infers by the batch is refused; a frozen layer is converted like any other."""
    bn.use_batch_statistics = True
    with pytest.raises(ValueError, match=r"use_batch_statistics is True.*copy whose"):
        TO[name](bn)
    same(FROM[name](TO[name](bn.freeze())), bn)
    assert interop.keras_options(bn)["trainable"] is False
    assert "trainable" not in interop.keras_options(bn.unfreeze())
    for switch in ("use_batch_statistics", "update_statistics"):
        setattr(bn.unfreeze(), switch, False)
        interop.to_onnx(bn)
        with pytest.raises(ValueError, match=r"does not train as the node would; unfreeze\(\)"):
            interop.to_onnx(bn, training=True)


@pytest.mark.parametrize("name", ["torch", "keras", "flax"])
def test_options_do_not_drop_what_to_refuses(name, bn):
    options = getattr(interop, f"{name}_options")
    bn.use_batch_statistics = True
    with pytest.raises(ValueError, match="use_batch_statistics is True"):
        options(bn)
    bn.use_batch_statistics, bn.activation = None, "relu"
    with pytest.raises(ValueError, match="bn has the activation 'relu'"):
        options(bn)
    with pytest.raises(TypeError, match="bn is of type int; it must be a layer"):
        options(3)


def test_a_node_trains_neither_in_parts_nor_renormalized(bn):
    for name, value in (("virtual_batch_size", 2), ("renorm", cybn.Renorm())):
        twin = copy.copy(bn)
        setattr(twin, name, value)
        interop.to_onnx(twin)
        with pytest.raises(ValueError, match=f"{name} is {re.escape(str(value))}.*both are None"):
            interop.to_onnx(twin, training=True)


# ---- the other norms ---------------------------------------------------------------------------

FAMILY = {
    "layer": lambda: cybn.LayerNorm((2, 3), eps=1e-3),
    "layer without beta": lambda: cybn.LayerNorm(4, bias=False, dtype=np.float64),
    "rms": lambda: cybn.RMSNorm(4, eps=1e-3),
    "group": lambda: cybn.GroupNorm(2, 6, eps=1e-3),
    "instance": lambda: cybn.InstanceNorm1d(3, affine=True, eps=1e-3),
}


def made(kind, rng):
    layer = FAMILY[kind]()
    for parameter in layer.parameters():
        parameter[...] = rng.standard_normal(parameter.shape)
    return layer


def options_of(layer, library):
    options = {} if library == "onnx" else {"layer": type(layer)}
    if library == "onnx":
        return options | ({"layer": type(layer)} if isinstance(layer, cybn.InstanceNorm1d) else {})
    options["eps" if library == "torch" else "epsilon"] = layer.eps
    if isinstance(layer, cybn.GroupNorm):
        options["num_groups"] = layer.num_groups
    if library != "torch":
        options["axis"] = 1
    return options


@pytest.mark.parametrize("library", TO)
@pytest.mark.parametrize("kind", FAMILY)
def test_the_family_there_and_back(kind, library, rng):
    layer = made(kind, rng)
    for prefix in ((), ("net",)):
        state = TO[library](layer, *prefix)
        twin = FROM[library](state, *prefix, **options_of(layer, library))
        assert type(twin) is type(layer)
        assert twin.eps == layer.eps
        mine, theirs = layer.state_dict(), twin.state_dict()
        assert list(mine) == list(theirs)
        for key, value in mine.items():
            np.testing.assert_array_equal(theirs[key], value)
            assert theirs[key].dtype == value.dtype


def test_options_of_the_family():
    assert interop.torch_options(cybn.LayerNorm(3, bias=False)) == {
        "normalized_shape": (3,),
        "eps": 1e-5,
        "elementwise_affine": True,
        "bias": False,
    }
    assert interop.torch_options(cybn.RMSNorm(3))["eps"] is None
    assert interop.torch_options(cybn.GroupNorm(2, 4))["num_groups"] == 2
    assert interop.keras_options(cybn.LayerNorm((2, 3)))["axis"] == [-2, -1]
    assert interop.keras_options(cybn.InstanceNorm2d(5))["groups"] == 5
    for call in (interop.keras_options, interop.flax_options, interop.to_onnx):
        with pytest.raises(ValueError, match=r"eps is None.*set bn\.eps to a number"):
            call(cybn.RMSNorm(3))


def test_the_family_refuses(rng):
    tracked = cybn.InstanceNorm1d(3, track_running_stats=True)
    for call in (interop.to_keras, interop.to_flax, interop.to_onnx):
        with pytest.raises(ValueError, match="an instance norm of that library has no running"):
            call(tracked)
    assert "running_mean" in interop.to_torch(tracked)
    state = {"weight": V, "bias": V}
    with pytest.raises(ValueError, match="num_groups is None"):
        interop.from_torch(state, layer=cybn.GroupNorm)
    with pytest.raises(ValueError, match="num_groups is 2; it is for layer=GroupNorm"):
        interop.from_torch(state, num_groups=2)
    with pytest.raises(ValueError, match=r"there is a shift.*layer=LayerNorm"):
        interop.from_torch(state, layer=cybn.RMSNorm)
    with pytest.raises(ValueError, match="no batch norm of the form"):
        interop.from_torch({}, layer=cybn.LayerNorm)


def test_the_family_in_whole_models_by_name():
    state = {"ln.weight": V, "ln.bias": V, "fc.weight": M, "rms.weight": V}
    assert not interop.find(state, "torch")
    assert list(interop.find(state, "torch", only=["ln", "rms"])) == ["ln", "rms"]
    done = interop.convert(state, "torch", "keras", only=["ln"])
    assert sorted(done.state) == ["fc.weight", "ln/beta", "ln/gamma", "rms.weight"]


# ---- ONNX nodes in other types -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_onnx_in_another_type(dtype, rng):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    bn = random_norm(rng, C, np.float64)
    node = interop.to_onnx(bn, dtype=dtype)
    assert {str(a.dtype) for a in node.initializers.values()} == {dtype}
    twin = interop.from_onnx(node)
    np.testing.assert_allclose(twin.running_var, bn.running_var, rtol=2.0**-7)
    assert twin.dtype == (np.float64 if dtype == "float64" else np.float32)


def test_onnx_types_refused(bn):
    with pytest.raises(TypeError, match="dtype is int32; it must be float32"):
        interop.to_onnx(bn, dtype=np.int32)
    bn.running_var[0] = 1e6
    with pytest.raises(ValueError, match=r"bn\.input_var has the value 1000000.*not fit float16"):
        interop.to_onnx(bn, dtype=np.float16)


@pytest.mark.parametrize("momentum", [2.0, -1.0])
def test_the_momentum_of_inference_plays_no_part(momentum, bn):
    node = interop.to_onnx(bn)
    node.attributes["momentum"] = momentum
    assert interop.from_onnx(node).momentum == pytest.approx(0.1)
    node.attributes["training_mode"] = 1
    with pytest.raises(ValueError, match=f"momentum is {momentum}"):
        interop.from_onnx(node)


# ---- eps 0 and variances slightly below 0 ------------------------------------------------------


def test_eps_0_and_variances_slightly_below_0(bn):
    """Both are accepted; they occur in averaged weights and in models without an epsilon."""
    bn.eps = 0
    x = np.linspace(-2, 2, 4 * C, dtype=np.float32).reshape(4, C)
    y = bn.eval()(x)
    for name in TO:
        options = {} if name == "onnx" else {"eps" if name == "torch" else "epsilon": 0}
        options |= {} if name in ("torch", "onnx") else {"axis": 1}
        twin = FROM[name](TO[name](bn), **options)
        assert twin.eps == 0
        np.testing.assert_array_equal(twin.eval()(x), y)
    state = interop.to_torch(bn)
    state["running_var"][0] = -1e-9
    layer = interop.from_torch(state, eps=1e-3).eval()
    given = state["running_mean"], state["running_var"], state["weight"], state["bias"]
    expected = cybn.batch_norm_inference(x, *given, eps=1e-3)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-6)
