"""Every weight layout, before and after the fold, tested with the library of that name."""

import os

import numpy as np
import pytest
from fold_cases import random_norm

import cybn
from cybn import folding

os.environ.setdefault("KERAS_BACKEND", "numpy")
keras = pytest.importorskip("keras")
onnx = pytest.importorskip("onnx")
flax = pytest.importorskip("flax")

# E402: these imports follow the choice of Keras' backend.
import jax  # noqa: E402  (after importorskip)
from flax import linen  # noqa: E402  (after importorskip)
from onnx import helper  # noqa: E402  (after importorskip)
from onnx.reference import ReferenceEvaluator  # noqa: E402  (after importorskip)

# Keras' variables only support the old form of __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MOST = 2.0**-19  # of the largest output: allowed for float32 sums of a few dozen terms


def close(after, before):
    after, before = np.asarray(after), np.asarray(before)
    assert after.shape == before.shape
    assert np.abs(after - before).max() <= MOST * np.abs(before).max()


def numpy_of(value):
    return keras.ops.convert_to_numpy(value)


def normalized(bn, y, axis=-1):
    last = np.moveaxis(np.asarray(y), axis, -1)
    return np.moveaxis(
        cybn.batch_norm_inference(
            np.ascontiguousarray(last),
            bn.running_mean,
            bn.running_var,
            bn.gamma,
            bn.beta,
            axis=-1,
            eps=bn.eps,
        ),
        -1,
        axis,
    )


KERAS = {
    "Conv1D": (folding.fold_conv, {"groups": 2}, (9, 4), {"kernel_size": 3, "groups": 2}),
    "Conv2D": (folding.fold_conv, {}, (9, 8, 4), {"kernel_size": (3, 2)}),
    "Conv3D": (folding.fold_conv, {}, (5, 6, 4, 4), {"kernel_size": 3}),
    "DepthwiseConv2D": (
        folding.fold_conv,
        {"layout": "keras-depthwise"},
        (9, 8, 3),
        {"kernel_size": (3, 2), "depth_multiplier": 2},
    ),
    "Conv1DTranspose": (folding.fold_conv_transpose, {}, (5, 4), {"kernel_size": 3}),
    "Conv2DTranspose": (
        folding.fold_conv_transpose,
        {},
        (5, 6, 4),
        {"kernel_size": (3, 2), "strides": 2},
    ),
    "Dense": (folding.fold_linear, {}, (5,), {}),
}


@pytest.mark.parametrize("name", KERAS)
def test_keras(name, rng):
    fold, options, shape, settings = KERAS[name]
    outputs = {} if name.startswith("Depthwise") else {"units" if name == "Dense" else "filters": 6}
    layer, bn = getattr(keras.layers, name)(**outputs, **settings), random_norm(rng, 6, np.float32)
    x = rng.standard_normal((2, *shape), dtype=np.float32)
    layer.build(x.shape)
    kernel, bias = (numpy_of(w) for w in layer.weights)
    bias = rng.standard_normal(bias.shape, dtype=np.float32)
    layer.set_weights([kernel, bias])
    before = normalized(bn, numpy_of(layer(x)))
    layer.set_weights(list(fold(kernel, bias, bn, **{"layout": "keras"} | options)))
    close(numpy_of(layer(x)), before)


def test_keras_dense_after_a_flattening(rng):
    bn = random_norm(rng, 3, np.float32)
    x = rng.standard_normal((2, 4, 5, 3), dtype=np.float32)
    flatten, dense = keras.layers.Flatten(), keras.layers.Dense(7)
    before = numpy_of(dense(flatten(normalized(bn, x))))
    kernel, bias = (numpy_of(w) for w in dense.weights)
    options = {"layout": "keras", "flatten": "channels-last"}
    dense.set_weights(list(folding.fold_into_next_linear(kernel, bias, bn, **options)))
    close(numpy_of(dense(flatten(x))), before)


ONNX = {
    "Conv": (folding.fold_conv, "onnx", (6, 2, 3, 2), (2, 4, 8, 9), {"group": 2}),
    "Conv, strided": (
        folding.fold_conv, "onnx", (6, 4, 3), (2, 4, 9), {"strides": [2], "pads": [1, 1]}
    ),
    "ConvTranspose": (folding.fold_conv_transpose, "onnx", (4, 6, 3, 2), (2, 4, 5, 6), {}),
    "Gemm, transB": (folding.fold_linear, "onnx", (6, 4), (2, 4), {"transB": 1}),
    "Gemm": (folding.fold_linear, "onnx-matmul", (4, 6), (2, 4), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ONNX)
def test_onnx(name, rng):
    fold, layout, weight, shape, attributes = ONNX[name]
    node = helper.make_node(name.split(",")[0], ["x", "w", "b"], ["y"], **attributes)
    types = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in "xwby"]
    graph = helper.make_graph([node], "one", types[:3], types[3:])
    opset = [helper.make_opsetid("", 21)]
    model = ReferenceEvaluator(helper.make_model(graph, opset_imports=opset))
    bn = random_norm(rng, 6, np.float32)
    x, w = (rng.standard_normal(s, dtype=np.float32) for s in (shape, weight))
    b = rng.standard_normal(6, dtype=np.float32)
    (y,) = model.run(None, {"x": x, "w": w, "b": b})
    groups = {"groups": attributes["group"]} if "group" in attributes else {}
    w, b = fold(w, b, bn, layout=layout, **groups)
    (z,) = model.run(None, {"x": x, "w": w, "b": b})
    close(z, normalized(bn, y, 1))


FLAX = {
    "Conv": (
        folding.fold_conv,
        {"groups": 2},
        (2, 8, 9, 4),
        linen.Conv(6, (3, 2), feature_group_count=2),
    ),
    "ConvTranspose": (
        folding.fold_conv_transpose,
        {},
        (2, 5, 6, 4),
        linen.ConvTranspose(6, (3, 2), strides=(2, 2)),
    ),
    "Dense": (folding.fold_linear, {}, (2, 5), linen.Dense(6)),
}


@pytest.mark.parametrize("name", FLAX)
def test_flax(name, rng):
    fold, options, shape, layer = FLAX[name]
    bn, x = random_norm(rng, 6, np.float32), rng.standard_normal(shape, dtype=np.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    kernel, bias = (
        rng.standard_normal(shapes[n].shape, dtype=np.float32) for n in ("kernel", "bias")
    )
    before = normalized(bn, layer.apply({"params": {"kernel": kernel, "bias": bias}}, x))
    kernel, bias = fold(kernel, bias, bn, layout="flax", **options)
    close(layer.apply({"params": {"kernel": kernel, "bias": bias}}, x), before)
