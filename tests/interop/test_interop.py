"""State to and from the forms of other libraries, with plain arrays only."""

import copy
import subprocess
import sys

import numpy as np
import pytest
from fold_cases import random_norm
from interop_cases import C, same, vectors

import cybn
from cybn import folding, interop

each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])

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


# ---- one layer -------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("name", TO)
def test_round_trip(name, dtype, rng):
    bn = random_norm(rng, C, dtype)
    for prefix in ("", "block", "net/block_0"):
        prefix = (prefix,) if prefix else ()
        twin = FROM[name](TO[name](bn, *prefix), *prefix)
        same(twin, bn)
        assert twin.dtype == dtype
        assert twin.running_ddof == (1 if name == "torch" else 0)


def test_torch_keys_and_settings(bn):
    state = interop.to_torch(bn, "layer1.0.bn1")
    assert list(state) == [
        f"layer1.0.bn1.{leaf}"
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    assert interop.torch_options(bn) == {
        "num_features": C,
        "eps": bn.eps,
        "momentum": 0.1,
        "affine": True,
        "track_running_stats": True,
    }
    twin = interop.from_torch(state, "layer1.0.bn1", momentum=None, eps=0.5)
    assert (twin.momentum, twin.eps, twin.num_batches_tracked) == (None, 0.5, 7)
    assert interop.torch_options(twin)["momentum"] is None
    del state["layer1.0.bn1.num_batches_tracked"]  # absent before PyTorch 0.4.1
    assert interop.from_torch(state, "layer1.0.bn1").num_batches_tracked == 0


def test_defaults_are_those_of_the_libraries(bn):
    settings = {name: FROM[name](TO[name](bn)) for name in ("torch", "keras", "flax", "nnx")}
    assert {n: (b.eps, b.momentum, b.axis) for n, b in settings.items()} == {
        "torch": (1e-5, 0.1, 1),
        "keras": (1e-3, 0.01, -1),
        "flax": (1e-5, 0.01, -1),
        "nnx": (1e-5, 0.01, -1),
    }
    bare = interop.to_onnx(bn)._replace(attributes={})
    layer = interop.from_onnx(bare)
    assert (layer.eps, layer.momentum, layer.axis) == (1e-5, 0.1, 1)


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.003, 0.5, 1e-7, 0.0, 1.0])
def test_momentum_comes_back_to_the_bit(momentum):
    bn = cybn.BatchNorm(C, momentum=momentum, eps=3e-4)
    keras, flax = interop.keras_options(bn), interop.flax_options(bn)
    assert keras["momentum"] == flax["momentum"] == pytest.approx(1 - momentum)
    for options in (keras, flax):
        assert options["epsilon"] == 3e-4
    kept = {k: keras[k] for k in ("momentum", "epsilon", "axis")}
    assert repr(interop.from_keras(interop.to_keras(bn), **kept, running_ddof=1, count=8)) == repr(
        bn
    )
    twin = interop.from_onnx(interop.to_onnx(bn))
    assert (twin.momentum, twin.eps) == (momentum, 3e-4)


def test_the_mean_of_all_batches_stays_in_pytorch(bn):
    bn.momentum = None
    for call in (
        interop.keras_options,
        interop.flax_options,
        lambda b: interop.to_onnx(b, training=True),
    ):
        with pytest.raises(ValueError, match=r"momentum is None.*set bn\.momentum"):
            call(bn)
    assert "momentum" not in interop.to_onnx(bn).attributes


@pytest.mark.parametrize("name", ["keras", "flax", "nnx"])
@pytest.mark.parametrize("left_out", ["gamma", "beta", "both"])
def test_scale_or_center_left_out(left_out, name, bn):
    """Keras and Flax may have only gamma or only beta; a layer has both or neither."""
    leaves = {"gamma": ("gamma", "scale"), "beta": ("beta", "bias")}
    gone = sum(leaves.values(), ()) if left_out == "both" else leaves[left_out]
    flat = interop.flatten(TO[name](bn))
    flat = {key: value for key, value in flat.items() if key.split("/")[-1] not in gone}
    layer = FROM[name](flat if name == "keras" else interop.unflatten(flat))
    assert layer.affine == (left_out != "both")
    if left_out == "gamma":
        np.testing.assert_array_equal(layer.gamma, np.ones(C))
        np.testing.assert_array_equal(layer.beta, bn.beta)
    if left_out == "beta":
        np.testing.assert_array_equal(layer.gamma, bn.gamma)
        np.testing.assert_array_equal(layer.beta, np.zeros(C))
    if left_out == "both":
        again = interop.flatten(TO[name](layer))
        assert len(again) == 2
        assert not interop.keras_options(layer)["center"]
        assert not interop.flax_options(layer)["use_scale"]


@pytest.mark.parametrize("name", TO)
def test_an_activation_is_not_dropped(name, bn):
    twin = copy.copy(bn)
    twin.activation = "relu"
    with pytest.raises(ValueError, match=r"activation 'relu'.*copy whose activation is None"):
        TO[name](twin)
    twin = copy.copy(twin)  # the solution that the error names
    twin.activation = None
    same(FROM[name](TO[name](twin)), bn)


@pytest.mark.parametrize("momentum", [1.5, -0.5, np.nan])
def test_a_momentum_out_of_range_is_shown_as_given(momentum, bn):
    for call in (
        lambda: interop.from_keras(interop.to_keras(bn), momentum=momentum),
        lambda: interop.from_flax(interop.to_flax(bn), momentum=momentum),
    ):
        with pytest.raises(ValueError, match=f"momentum is {momentum}; it must be in"):
            call()
    with pytest.raises(TypeError, match="momentum is 'much'; it must be a number"):
        interop.from_keras(interop.to_keras(bn), momentum="much")


def test_without_gamma_and_beta_onnx_gets_ones_and_zeros(rng):
    bn = random_norm(rng, C, np.float32, affine=False)
    node = interop.to_onnx(bn)
    np.testing.assert_array_equal(node.initializers["bn.scale"], np.ones(C, np.float32))
    np.testing.assert_array_equal(node.initializers["bn.B"], np.zeros(C, np.float32))
    x = rng.standard_normal((3, C), dtype=np.float32)
    twin = interop.from_onnx(interop.to_onnx(bn))
    twin.eps = bn.eps
    np.testing.assert_array_equal(twin.eval()(x), bn.eval()(x))


@pytest.mark.parametrize("affine", [True, False])
def test_without_running_statistics(affine):
    bn = cybn.BatchNorm(C, affine=affine, track_running_stats=False)
    state = interop.to_torch(bn)
    assert list(state) == (["weight", "bias"] if affine else [])
    if affine:
        assert repr(interop.from_torch(state)) == repr(bn)
    for call in (interop.to_keras, interop.to_flax, interop.to_onnx):
        with pytest.raises(ValueError, match="track_running_stats is False"):
            call(bn)


def test_results_are_copies(bn):
    before = [v.tobytes() for v in vectors(bn)]
    for name in TO:
        state = TO[name](bn)
        arrays = state.initializers if name == "onnx" else interop.flatten(state)
        for array in arrays.values():
            array[...] = 9
    state = interop.to_torch(bn)
    layer = interop.from_torch(state)
    layer.gamma[:] = 9
    np.testing.assert_array_equal(state["weight"], bn.gamma)
    assert before == [v.tobytes() for v in vectors(bn)]


def test_a_layer_that_is_there_can_be_filled(bn):
    mine = cybn.BatchNorm2d(C)
    gamma = mine.gamma
    mine.load_state_dict(interop.from_torch(interop.to_torch(bn)).state_dict())
    assert mine.gamma is gamma
    same(mine, bn)
    assert mine.num_batches_tracked == 7


@pytest.mark.parametrize("layer", [cybn.BatchNorm1d, cybn.BatchNorm2d, cybn.BatchNorm3d])
@pytest.mark.parametrize("name", TO)
def test_the_form_of_layer_is_chosen(name, layer, bn):
    assert type(FROM[name](TO[name](bn), layer=layer)) is layer


def test_half_precision_is_widened(bn):
    state = {k: v.astype(np.float16) for k, v in interop.to_keras(bn).items()}
    layer = interop.from_keras(state)
    assert layer.dtype == np.float32
    np.testing.assert_array_equal(layer.gamma, bn.gamma.astype(np.float16))


# ---- the variance's conventions --------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("count", [2, 3, 10, 12544])
@pytest.mark.parametrize("name", ["keras", "flax", "nnx", "onnx"])
def test_variance_converted_and_back_within_one_ulp(name, count, dtype, rng):
    bn = random_norm(rng, 1000, dtype)
    state = TO[name](bn, count=count)
    arrays = state.initializers if name == "onnx" else interop.flatten(state)
    biased = arrays[next(key for key in arrays if "var" in key)]
    exact = bn.running_var.astype(np.longdouble) * (count - 1) / count
    assert (abs(biased - exact) <= np.spacing(biased) * np.longdouble(0.501)).all()
    twin = FROM[name](state, running_ddof=1, count=count)
    assert twin.running_ddof == 1
    difference = abs(twin.running_var - bn.running_var) / np.spacing(bn.running_var)
    print(f"{name} {np.dtype(dtype)} count {count}: {difference.max():.0f} ulp")
    assert difference.max() <= 1


def test_what_a_converted_variance_means():
    """Two layers see the same batches with either convention; converting one gives the other."""
    rng = np.random.default_rng(0)
    unbiased, biased = (cybn.BatchNorm(C, running_ddof=d, dtype="f8") for d in (1, 0))
    for bn in (unbiased, biased):
        bn.running_var, bn.momentum = np.zeros(C), 0.25
    for _ in range(20):
        x = rng.standard_normal((6, C))
        unbiased(x), biased(x)
    weights = interop.to_keras(unbiased, count=6)
    np.testing.assert_allclose(weights["moving_variance"], biased.running_var, rtol=1e-14)
    state = interop.to_torch(biased, count=6)
    np.testing.assert_allclose(state["running_var"], unbiased.running_var, rtol=1e-14)
    assert interop.from_torch(state, running_ddof=0, count=6).running_ddof == 0


def test_count_may_differ_by_channel_and_is_checked(bn):
    count = np.arange(2, 2 + C)
    state = interop.to_keras(bn, count=count)
    np.testing.assert_array_equal(
        state["moving_variance"],
        (bn.running_var * (count - 1.0) / count).astype(np.float32),
    )
    for bad in (1, 0, -3, np.nan, np.inf, [2, 3], np.ones(C)):
        with pytest.raises(ValueError, match=r"count is .*above 1"):
            interop.to_keras(bn, count=bad)
    with pytest.raises(ValueError, match="give count="):
        interop.from_keras(state, running_ddof=1)
    with pytest.raises(ValueError, match="running_ddof is 2"):
        interop.from_keras(state, running_ddof=2)
    np.testing.assert_array_equal(interop.to_torch(bn, count=9)["running_var"], bn.running_var)


# ---- ONNX nodes ------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15, 21])
@pytest.mark.parametrize("training", [True, False])
def test_onnx_forms(training, opset, bn):
    node = interop.to_onnx(bn, "b.n", x="in", y="out", opset=opset, training=training)
    new = opset >= 14
    leaves = ("scale", "B", "input_mean", "input_var") if new else ("scale", "B", "mean", "var")
    assert node.inputs == ("in", *(f"b.n.{leaf}" for leaf in leaves))
    assert tuple(node.initializers) == node.inputs[1:]
    assert len(node.outputs) == (1 if not training else 3 if new else 5)
    assert not set(node.outputs) & set(node.inputs)
    assert node.attributes == {"epsilon": bn.eps, "momentum": 0.9} | (
        {"training_mode": int(training)} if new else {}
    )
    same(interop.from_onnx(node), bn)


def test_onnx_refuses(bn):
    node = interop.to_onnx(bn)
    with pytest.raises(ValueError, match="opset is 6; it must be at least 7"):
        interop.to_onnx(bn, opset=6)
    for opset in (15.0, "15", True):
        with pytest.raises(TypeError, match=f"opset is {opset!r}; it must be an int"):
            interop.to_onnx(bn, opset=opset)
    with pytest.raises(ValueError, match="spatial=0"):
        interop.from_onnx(node._replace(attributes={"spatial": 0}))
    with pytest.raises(ValueError, match=r"the input 'bn\.B', B of the node, is not in"):
        interop.from_onnx(node, {"bn.scale": bn.gamma})
    with pytest.raises(TypeError, match="node is of type dict"):
        interop.from_onnx({})


# ---- arrays of other libraries ---------------------------------------------------------------


class Capsule:
    """An array that only supports DLPack."""

    def __init__(self, array, device=None):
        self.array, self.place = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.place or self.array.__dlpack_device__()


class Listed:
    """An array that only supports __array__."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


@pytest.mark.parametrize("wrap", [Capsule, Listed, np.asarray])
def test_arrays_come_in_without_a_copy(wrap, rng):
    array = rng.standard_normal((3, C))
    assert np.shares_memory(interop.as_array(wrap(array)), array)
    assert interop.as_array(array) is array


def test_arrays_that_do_not():
    with pytest.raises(ValueError, match=r"w lies on the device of DLPack type 2; .*w\.cpu\(\)"):
        interop.as_array(Capsule(np.ones(C, np.float32), (2, 0)), "w")
    for bad in (object(), None, np.array([None]), np.zeros(2, "V4")):
        with pytest.raises(TypeError, match=r"w is .*which NumPy does not compute with"):
            interop.as_array(bad, "w")
    with pytest.raises(TypeError, match=r"w is a masked array.*w\.filled"):
        interop.as_array(np.ma.array([1.0]), "w")
    with pytest.raises(TypeError, match="w, of type list, cannot be read"):
        interop.as_array([[1], [1, 2]], "w")


@pytest.mark.parametrize("wrap", [Capsule, Listed])
def test_functions_and_layers_take_them_too(wrap, rng):
    x, bn = rng.standard_normal((4, C)), random_norm(rng, C, np.float64)
    bn.eval()
    y = bn(x)
    np.testing.assert_array_equal(bn(wrap(x)), y)
    given = [wrap(a) for a in (x, bn.running_mean, bn.running_var, bn.gamma, bn.beta)]
    np.testing.assert_array_equal(cybn.batch_norm_inference(*given, eps=bn.eps), y)
    bn.running_mean = wrap(np.zeros(C))
    np.testing.assert_array_equal(bn.running_mean, np.zeros(C))
    weight = rng.standard_normal((C, 3))
    mine = folding.fold_linear(wrap(weight), None, bn)[0]
    np.testing.assert_array_equal(mine, folding.fold_linear(weight, None, bn)[0])


def test_importing_loads_no_other_library():
    others = "torch", "keras", "onnx", "jax", "flax", "safetensors", "tensorflow", "ml_dtypes"
    code = (
        "import sys, cybn, cybn.folding, cybn.interop as i; bn = cybn.BatchNorm(3); "
        "i.from_torch(i.to_torch(bn)), i.from_keras(i.to_keras(bn)), i.from_flax(i.to_flax(bn)), "
        "i.from_onnx(i.to_onnx(bn)); "
        f"print(*sorted({{n.split('.')[0] for n in sys.modules}} & set({others!r})))"
    )
    run = [sys.executable, "-P", "-W", "error", "-c", code]
    out = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert out.split() == []
