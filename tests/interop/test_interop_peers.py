"""State goes through PyTorch, Keras, Flax and ONNX themselves, and comes back bit for bit."""

import importlib.util
import os

import numpy as np
import pytest
from fold_cases import random_norm
from peer_cases import AGREE, C, batch, numpy_of, same

import cybn
from cybn import interop

os.environ.setdefault("KERAS_BACKEND", "numpy")
torch = pytest.importorskip("torch")
keras = pytest.importorskip("keras")
onnx = pytest.importorskip("onnx")
pytest.importorskip("flax")

# E402: these imports follow the choice of Keras' backend.
import jax  # noqa: E402
from flax import linen, nnx  # noqa: E402
from onnx import helper, version_converter  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

# Keras' variables only support the old form of __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def into_torch(bn):
    module = torch.nn.BatchNorm2d(**interop.torch_options(bn))
    module.load_state_dict({k: torch.from_numpy(v) for k, v in interop.to_torch(bn).items()})
    return module.eval()


def into_keras(bn, **options):
    layer = keras.layers.BatchNormalization(**interop.keras_options(bn))
    layer.build((None, *(C if i == bn.axis % 4 else 5 for i in range(1, 4))))
    layer.set_weights(list(interop.to_keras(bn, **options).values()))
    return layer


def out_of_keras(layer, **options):
    weights = {f"{w.path}": w for w in layer.weights}
    (prefix,) = interop.find(weights, "keras")
    return interop.from_keras(
        weights, prefix, epsilon=layer.epsilon, momentum=layer.momentum, axis=1, **options
    )


def into_onnx(bn, opset=15, **options):
    node, tensors = interop.to_onnx(bn, opset=opset, **options).protos()
    kind = onnx.TensorProto.FLOAT if bn.dtype == np.float32 else onnx.TensorProto.DOUBLE
    shapes = {"x": [None] * 4, "y": [None] * 4}
    ends = [helper.make_tensor_value_info(n, kind, shapes.get(n, [C])) for n in ("x", *node.output)]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    return onnx.load_from_string(model.SerializeToString())


def run_onnx(model, opset, x):
    """Return the outputs of a model in onnx's evaluator, and in onnxruntime if it is installed.

    Before opset 14 the evaluator takes every node to be in training mode, so onnx first
    converts the model to a newer opset.
    """
    new = model if opset >= 14 else version_converter.convert_version(model, 15)
    outputs = {f"ONNX opset {opset}": ReferenceEvaluator(new).run(None, {"x": x})[0]}
    if importlib.util.find_spec("onnxruntime"):
        session = importlib.import_module("onnxruntime").InferenceSession
        (outputs[f"ORT opset {opset}"],) = session(model.SerializeToString()).run(None, {"x": x})
    return outputs


@pytest.mark.parametrize("opset", [7, 9, 14, 15, 21])
def test_pytorch_keras_onnx_and_back_to_the_bit(opset, module):
    """The objects are real: a state dict, Keras's weights, a serialized ONNX model."""
    options = {"eps": module.eps, "momentum": module.momentum}
    bn = interop.from_torch(module.state_dict(), **options)
    bn = out_of_keras(into_keras(bn))
    (bn,) = interop.onnx_layers(into_onnx(bn, opset)).values()
    bn.num_batches_tracked = 3  # Keras and ONNX have no such count
    back = into_torch(bn)
    same(module.state_dict(), back.state_dict())
    assert (back.eps, back.momentum) == (module.eps, module.momentum)
    assert bn.running_ddof == 0  # the values are PyTorch's, later updates are as in ONNX


@pytest.mark.parametrize("count", [2, 5, 100])
def test_with_the_variance_converted_within_one_ulp(count, rng):
    bn = random_norm(rng, C, np.float32)
    module = into_torch(bn)
    options = {"running_ddof": 1, "count": count}
    bn = interop.from_torch(module.state_dict(), eps=module.eps)
    bn = out_of_keras(into_keras(bn, count=count), **options)
    (bn,) = interop.onnx_layers(into_onnx(bn, count=count), **options).values()
    assert bn.running_ddof == 1
    state, back = module.state_dict(), into_torch(bn).state_dict()
    var, again = (s.pop("running_var").numpy() for s in (state, back))
    same(state, back)
    ulps = float((abs(again - var) / np.spacing(var)).max())
    print(f"count {count}: running_var within {ulps:.0f} ulp after four conversions")
    assert ulps <= 1


def test_all_libraries_give_the_same_inference(module, rng):
    bn = interop.from_torch(module.state_dict(), eps=module.eps).eval()
    x = batch(rng)
    variables = interop.to_flax(bn)
    flax = linen.BatchNorm(use_running_average=True, **interop.flax_options(bn))
    outputs = {
        "cybn": bn(x),
        "PyTorch": module(torch.from_numpy(x)).detach().numpy(),
        "Keras": numpy_of(into_keras(bn)(x, training=False)),
        "Flax": np.asarray(flax.apply(variables, x)),
    }
    for opset in (7, 9, 14, 15):
        outputs |= run_onnx(into_onnx(bn, opset), opset, x)
    state = {k: np.asarray(v, np.float64) for k, v in bn.state_dict().items() if "num" not in k}
    mean, var, gamma, beta = (
        state[k].reshape(C, 1, 1) for k in ("running_mean", "running_var", "gamma", "beta")
    )
    exact = (x - mean) / np.sqrt(var + bn.eps) * gamma + beta
    print(f"outputs up to {abs(exact).max():.1f}")
    for name, y in outputs.items():
        print(f"{name:14} within {abs(y - exact).max():.1e} of the exact value")
    values = np.stack([y.astype(np.float64) for y in outputs.values()])
    apart = (values.max(0) - values.min(0)).max()
    print(f"largest difference of any two: {apart:.1e}")
    assert apart <= AGREE


def test_training_goes_on_as_in_the_other_library(rng):
    """A converted layer and the original train on one more batch; their statistics agree."""
    x = batch(rng)
    start = random_norm(rng, C, np.float32)
    start.eps = 1e-3
    layer = into_keras(start)
    mine = out_of_keras(layer)
    mine(x)
    layer(x, training=True)
    after = out_of_keras(layer)
    np.testing.assert_allclose(mine.running_mean, after.running_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mine.running_var, after.running_var, rtol=1e-5)

    flax = linen.BatchNorm(use_running_average=False, **interop.flax_options(start))
    _, state = flax.apply(interop.to_flax(start), x, mutable=["batch_stats"])
    mine = interop.from_flax(interop.to_flax(start), momentum=0.9, axis=1)
    mine(x)
    mean, var = (np.asarray(state["batch_stats"][key]) for key in ("mean", "var"))
    np.testing.assert_allclose(mine.running_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mine.running_var, var, rtol=1e-5)

    model = into_onnx(start, 15, training=True)
    _, mean, var = ReferenceEvaluator(model).run(None, {"x": x})
    (mine,) = interop.onnx_layers(model).values()
    mine(x)
    np.testing.assert_allclose(mine.running_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mine.running_var, var, rtol=1e-5)


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (("a", "b"), ["a", "b"]),
        (("", "b"), ["y0", "b"]),
        (("a", "a"), ["y0", "y1"]),
        (("", "y0"), ["y0", "y1"]),
        (("y1", ""), ["y0", "y1"]),
    ],
)
def test_no_onnx_node_is_lost_by_its_name(names, keys, rng):
    made = [random_norm(rng, C, np.float32) for _ in names]
    graph = helper.make_graph([], "g", [], [])
    for i, (bn, name) in enumerate(zip(made, names, strict=True)):
        node, tensors = interop.to_onnx(bn, f"n{i}", x="x", y=f"y{i}").protos()
        node.name = name
        graph.node.append(node)
        graph.initializer.extend(tensors)
    model = helper.make_model(graph)
    layers = interop.onnx_layers(model)
    assert list(layers) == keys
    for bn, layer in zip(made, layers.values(), strict=True):
        np.testing.assert_array_equal(bn.running_mean, layer.running_mean)
    model.graph.node[1].output[0] = "y0"
    with pytest.raises(ValueError, match="two BatchNormalization nodes have the same output"):
        interop.onnx_layers(model)


def test_a_whole_pytorch_model(rng):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, C, 3),
        torch.nn.BatchNorm2d(C),
        torch.nn.LayerNorm([C, 6, 6]),
        torch.nn.Sequential(torch.nn.Conv2d(C, C, 1), torch.nn.BatchNorm2d(C)),
        torch.nn.GroupNorm(2, C),
        torch.nn.BatchNorm2d(C, track_running_stats=False),
    )
    state = model.state_dict()
    assert list(interop.find(state, "torch")) == ["1", "3.1"]
    keras_state = interop.convert(state, "torch", "keras").state
    back = interop.convert(keras_state, "keras", "torch").state
    same(state, back)
    model.load_state_dict({k: torch.as_tensor(v) for k, v in back.items()})


def test_a_whole_keras_model(rng, tmp_path):
    norm = keras.layers.BatchNormalization
    layers = [keras.layers.Dense(C), norm(), keras.layers.LayerNormalization(), norm(scale=False)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    for w in model.weights:
        w.assign(rng.uniform(0.5, 2, w.shape).astype(np.float32))
    weights = {w.path: w for w in model.weights}
    done = interop.convert(weights, "keras", "torch")
    first, second = done.taken
    assert "batch_normalization" in first
    np.testing.assert_array_equal(done.state[f"{second}.weight"], np.ones(C))
    x = rng.standard_normal((9, C), dtype=np.float32)
    for layer, prefix in zip([layers[1], layers[3]], done.taken, strict=True):
        mine = interop.from_keras(weights, prefix).eval()
        assert np.abs(numpy_of(layer(x)) - mine(x)).max() <= AGREE * 4

    h5py = pytest.importorskip("h5py")
    model.save_weights(tmp_path / "model.weights.h5")
    flat = {}
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visititems(
            lambda name, item: flat.update({name: item[()]}) if hasattr(item, "dtype") else None
        )
    done = interop.convert(flat, "keras-h5", "torch")
    assert list(done.taken) == ["layers/batch_normalization"]
    assert list(done.passed_over) == ["layers/batch_normalization_1"]  # it has no scale
    np.testing.assert_array_equal(
        done.state["layers/batch_normalization.running_var"], weights[f"{first}/moving_variance"]
    )


def test_a_whole_flax_model(rng):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            for _ in range(2):
                x = linen.BatchNorm(use_running_average=True)(linen.Dense(C)(x))
            return linen.LayerNorm()(x)

    x = rng.standard_normal((3, 4), dtype=np.float32)
    shapes = jax.eval_shape(Model().init, jax.random.key(0), x)
    variables = jax.tree.map(lambda s: rng.uniform(1, 2, s.shape).astype(s.dtype), shapes)
    done = interop.convert(interop.flatten(variables), "flax", "torch")
    assert list(done.taken) == ["BatchNorm_0", "BatchNorm_1"]
    back = interop.unflatten(interop.convert(done.state, "torch", "flax").state)
    same(interop.flatten(back), interop.flatten(variables))
    assert interop.from_flax(variables, "BatchNorm_1").num_features == C


def test_flax_nnx(rng):
    norm = nnx.BatchNorm(C, rngs=nnx.Rngs(0), epsilon=1e-2, momentum=0.75)
    start = random_norm(rng, C, np.float32)
    for name, value in interop.to_flax(start, api="nnx").items():
        getattr(norm, name)[...] = value
    state = nnx.to_pure_dict(nnx.state(norm))
    mine = interop.from_flax(state, api="nnx", epsilon=1e-2, momentum=0.75)
    for a, b in zip(mine.state_dict().values(), start.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b)
    norm.eval()
    x = rng.standard_normal((5, C), dtype=np.float32)
    y = mine.eval()(x)
    assert np.abs(np.asarray(norm(x)) - y).max() <= 2.0**-20 * np.abs(y).max()


def test_a_whole_onnx_model(rng):
    """The model has two nodes with the same name; Constant nodes feed one of them."""
    a, b = (random_norm(rng, C, np.float32) for _ in range(2))
    one, tensors = interop.to_onnx(a, "same", y="h").protos()
    two, constants = interop.to_onnx(b, "same", x="h", opset=15).protos()
    two.input[:] = ["h", *(f"c{i}" for i in range(4))]
    constants = [
        helper.make_node("Constant", [], [f"c{i}"], value=tensor)
        for i, tensor in enumerate(constants)
    ]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("x", "y")]
    graph = helper.make_graph([*constants, one, two], "two", ends[:1], ends[1:], tensors)
    layers = interop.onnx_layers(helper.make_model(graph))
    assert list(layers) == ["h", "y"]  # layers are named by their outputs
    for mine, original in zip(layers.values(), (a, b), strict=True):
        np.testing.assert_array_equal(mine.running_var, original.running_var)
        assert mine.eps == pytest.approx(original.eps, rel=1e-6)
    graph.node[-1].input[4] = "computed"
    layers = interop.onnx_layers(helper.make_model(graph))
    assert list(layers) == ["h"]  # one node that cannot be read does not hide the other
    assert "the input 'computed', input_var of the node" in layers.passed_over["y"]
    del graph.node[-2]
    with pytest.raises(ValueError, match=r"no node could be read.*the input 'computed', input_var"):
        interop.onnx_layers(helper.make_model(graph))
    with pytest.raises(ValueError, match="the node is a Relu"):
        interop.from_onnx(helper.make_node("Relu", ["x"], ["y"]))


def test_tensors_come_in_without_a_copy():
    tensor = torch.arange(6.0)
    for given in (tensor, torch.nn.Parameter(tensor), tensor[::2]):
        array = interop.as_array(given)
        assert array.ctypes.data == tensor.data_ptr()
        np.testing.assert_array_equal(array, given.detach())
    array = jax.numpy.arange(6.0)
    assert interop.as_array(array).ctypes.data == array.unsafe_buffer_pointer()
    assert interop.as_array(torch.tensor(3)) == 3


def test_tensors_that_numpy_does_not_read():
    tensor = torch.tensor([1.0, 1.25, -2.5, 3.0])
    with pytest.raises(ValueError, match="w lies on the device meta"):
        interop.as_array(torch.ones(3, device="meta"), "w")
    with pytest.raises(TypeError, match=r"w, of type Tensor.*convert it first: w\.to_dense\(\)"):
        interop.as_array(tensor.to_sparse(), "w")
    for wide in (
        tensor.bfloat16(),
        tensor.to(torch.float8_e4m3fn),
        tensor.bfloat16().requires_grad_(),
    ):
        array = interop.as_array(wide, "w")
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, tensor)
    array = interop.as_array(jax.numpy.ones(3, "bfloat16"), "w")
    assert array.dtype.name == "bfloat16"


def test_a_tensor_goes_through_a_layer(module, rng):
    bn = interop.from_torch(module.state_dict(), eps=module.eps).eval()
    x = batch(rng)
    np.testing.assert_array_equal(bn(torch.from_numpy(x)), bn(x))
    np.testing.assert_array_equal(bn(jax.numpy.asarray(x)), bn(x))
    assert isinstance(cybn.batch_norm(torch.from_numpy(x))[0], np.ndarray)
