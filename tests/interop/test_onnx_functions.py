"""ONNX models with functions and sparse initializers: each call of a function is a layer."""

import numpy as np
import pytest

from cybn import interop

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

NAMES = ("s", "b", "m", "v")
ARRAYS = {name: np.arange(1, 4, dtype=np.float32) + i for i, name in enumerate(NAMES)}
OPSETS = [helper.make_opsetid("", 15), helper.make_opsetid("local", 1)]


def tensors(*names):
    return [numpy_helper.from_array(ARRAYS[name], name) for name in names]


def model(nodes, initializers=(), functions=(), sparse=()):
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3, 4]) for name in "xy")
    graph = helper.make_graph(nodes, "graph", [x], [y], initializers)
    graph.sparse_initializer.extend(sparse)
    return helper.make_model(graph, functions=list(functions), opset_imports=OPSETS)


def norm_function(name, inner):
    """Return a function of one node; its epsilon is the function's attribute eps."""
    node = helper.make_node(inner, ["x", "s", "b", "m", "v"], ["z"], domain="")
    attribute = node.attribute.add()
    attribute.name, attribute.ref_attr_name = "epsilon", "eps"
    attribute.type = onnx.AttributeProto.FLOAT
    relu = helper.make_node("Relu", ["z"], ["y"])
    inputs = ["x", *NAMES]
    return helper.make_function("local", name, inputs, ["y"], [node, relu], OPSETS[:1], ["eps"])


def call(function, x, y, **attributes):
    return helper.make_node(function, [x, *NAMES], [y], domain="local", **attributes)


def test_each_call_is_a_layer():
    function = norm_function("Block", "BatchNormalization")
    nodes = [call("Block", "x", "u", name="first", eps=0.25), call("Block", "u", "y", eps=0.5)]
    built = model(nodes, tensors(*NAMES), [function])
    onnx.checker.check_model(built)
    layers = interop.onnx_layers(built)
    assert {name: bn.eps for name, bn in layers.items()} == {"first/z": 0.25, "1/z": 0.5}
    for bn in layers.values():
        np.testing.assert_array_equal(bn.gamma, ARRAYS["s"])
        np.testing.assert_array_equal(bn.running_var, ARRAYS["v"])


def test_a_function_in_a_function():
    outer = helper.make_function(
        "local",
        "Stage",
        ["x", *NAMES],
        ["y"],
        [call("Block", "x", "y", eps=0.125)],
        OPSETS,
    )
    built = model(
        [call("Stage", "x", "y")],
        tensors(*NAMES),
        [norm_function("Block", "BatchNormalization"), outer],
    )
    (bn,) = interop.onnx_layers(built).values()
    assert bn.eps == 0.125
    np.testing.assert_array_equal(bn.beta, ARRAYS["b"])


def test_an_attribute_that_the_call_leaves_out_is_the_default():
    built = model(
        [call("Block", "x", "y")],
        tensors(*NAMES),
        [norm_function("Block", "BatchNormalization")],
    )
    (bn,) = interop.onnx_layers(built).values()
    assert bn.eps == 1e-5


def test_names_of_the_caller_are_not_seen_inside():
    """A function only sees its inputs, even if the graph around it has equal names."""
    function = norm_function("Block", "BatchNormalization")
    del function.input[-1]
    built = model([call("Block", "x", "y")], tensors(*NAMES), [function])
    with pytest.raises(ValueError, match="the input 'v', input_var of the node, is not in"):
        interop.onnx_layers(built)


@pytest.mark.parametrize("places", [[0, 2], [[0], [2]]], ids=["counted through", "by axis"])
def test_sparse_initializers(places):
    values = numpy_helper.from_array(np.array([2.0, 5.0], np.float32), "s")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array(places)), [3])
    node = helper.make_node("BatchNormalization", ["x", *NAMES], ["y"])
    bn = interop.onnx_layers(model([node], tensors("b", "m", "v"), sparse=[sparse]))["y"]
    np.testing.assert_array_equal(bn.gamma, [2, 0, 5])
    constant = helper.make_node("Constant", [], ["s"], sparse_value=sparse)
    bn = interop.onnx_layers(model([constant, node], tensors("b", "m", "v")))["y"]
    np.testing.assert_array_equal(bn.gamma, [2, 0, 5])


@pytest.mark.parametrize(
    ("places", "dims", "message"),
    [
        ([0, 9], [3], "s cannot be read as an array"),
        ([0], [3], "s cannot be read as an array"),
        ([[0, 0], [1, 1]], [3], "s cannot be read as an array"),
        ([0, 1], [-3], r"s has the shape \(-3,\)"),
        ([0, 1], [2**40], "it cannot be a parameter"),
    ],
)
def test_broken_sparse_initializers(places, dims, message):
    values = numpy_helper.from_array(np.array([2.0, 5.0], np.float32), "s")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array(places)), dims)
    node = helper.make_node("BatchNormalization", ["x", *NAMES], ["y"])
    with pytest.raises(ValueError, match=message):
        interop.onnx_layers(model([node], tensors("b", "m", "v"), sparse=[sparse]))


def test_functions_that_call_each_other_for_ever():
    """Endless recursion, or forty levels of two calls each, raises an error quickly."""

    def twice(name, inner):
        nodes = [
            helper.make_node(inner, [a], [b], domain="local") for a, b in (("x", "u"), ("u", "y"))
        ]
        return helper.make_function("local", name, ["x"], ["y"], nodes, OPSETS)

    top = [helper.make_node("F0", ["x"], ["y"], domain="local")]
    with pytest.raises(ValueError, match="nested more than 50 deep"):
        interop.onnx_layers(model(top, functions=[twice("F0", "F0")]))
    chain = [twice(f"F{i}", f"F{i + 1}") for i in range(40)]
    with pytest.raises(ValueError, match="called more than 10000 times"):
        interop.onnx_layers(model(top, functions=chain))
