"""ONNX models as exporters write them, and the other norms, tested with the libraries."""

import os

import numpy as np
import pytest
from fold_cases import random_norm
from peer_cases import C, numpy_of, same

import cybn
from cybn import interop

os.environ.setdefault("KERAS_BACKEND", "numpy")
torch = pytest.importorskip("torch")
keras = pytest.importorskip("keras")
onnx = pytest.importorskip("onnx")
pytest.importorskip("flax")

# E402: these imports follow the choice of Keras' backend.
from flax import linen  # noqa: E402
from onnx import helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

# Keras' variables only support the old form of __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# ---- ONNX models as exporters write them -------------------------------------------------------


def rewired(rng, how):
    """Return a batch norm, and its model in which other nodes produce the parameters."""
    bn = random_norm(rng, C, np.float32)
    node, tensors = interop.to_onnx(bn, "n").protos()
    make, before = helper.make_node, []
    if how == "Identity":
        before = [make("Identity", [t.name], [f"i.{t.name}"]) for t in tensors]
        before += [make("Identity", [f"i.{t.name}"], [f"ii.{t.name}"]) for t in tensors]
        node.input[1:] = [f"ii.{t.name}" for t in tensors]
    elif how == "Cast":
        for t in tensors:
            wide = onnx.numpy_helper.to_array(t).astype(np.float64)
            t.CopyFrom(onnx.numpy_helper.from_array(wide, t.name))
        before = [make("Cast", [t.name], [f"c.{t.name}"], to=1) for t in tensors]
        node.input[1:] = [f"c.{t.name}" for t in tensors]
    elif how == "value_floats":
        before = [
            make("Constant", [], [t.name], value_floats=onnx.numpy_helper.to_array(t).tolist())
            for t in tensors
        ]
        tensors = []
    elif how == "ConstantOfShape":
        bn.load_state_dict(bn.state_dict() | {k: np.full(C, 0.5, "f4") for k in
                           ("gamma", "beta", "running_mean", "running_var")})  # fmt: skip
        half = onnx.numpy_helper.from_array(np.array([0.5], np.float32))
        before = [make("ConstantOfShape", ["shape"], [t.name], value=half) for t in tensors]
        tensors = [onnx.numpy_helper.from_array(np.array([C]), "shape")]
    elif how == "Unsqueeze":
        for t in tensors:
            t.dims[:] = [1, C]
        before = [make("Squeeze", [t.name], [f"s.{t.name}"]) for t in tensors]
        node.input[1:] = [f"s.{t.name}" for t in tensors]
    nodes = [*before, node]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("x", "y")]
    if how == "If":
        branches = {
            f"{name}_branch": helper.make_graph([node], name, [], ends[1:])
            for name in ("then", "else")
        }
        nodes = [make("If", ["cond"], ["y"], name="choice", **branches)]
    return bn, helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors))


WAYS = ["Identity", "Cast", "value_floats", "ConstantOfShape", "Unsqueeze", "If"]


@pytest.mark.parametrize("how", WAYS)
def test_parameters_behind_other_nodes(how, rng):
    bn, model = rewired(rng, how)
    layers = interop.onnx_layers(model)
    assert list(layers) == (
        ["n"] if how != "If" else ["choice/else_branch/n", "choice/then_branch/n"]
    ) or sorted(layers) == ["choice/else_branch/n", "choice/then_branch/n"]
    assert layers.passed_over == {}
    for layer in layers.values():
        np.testing.assert_array_equal(layer.running_var, bn.running_var)
        np.testing.assert_array_equal(layer.beta, bn.beta)


def test_constants_without_end_and_too_large(rng):
    _, model = rewired(rng, "Identity")
    for node in model.graph.node[:-1]:
        node.input[0] = node.output[0]  # its own output
    with pytest.raises(ValueError, match="behind more than 50 nodes"):
        interop.onnx_layers(model)
    _, model = rewired(rng, "ConstantOfShape")
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array([2**40]), "shape"))
    with pytest.raises(ValueError, match="it cannot be a parameter"):
        interop.onnx_layers(model)


def computed(rng, how):
    """Return a graph whose scale is computed from constants, and the value of the scale."""
    node, tensors = interop.to_onnx(random_norm(rng, C, np.float32), "n").protos()
    base = rng.standard_normal(C).astype(np.float32)
    rows = {
        "Add": ([("Add", ["base", "one"])], 1 + base),
        "softplus": ([("Exp", ["base"]), ("Add", ["t0", "one"]), ("Sqrt", ["t1"])],
                     np.sqrt(np.exp(base) + 1)),
        "Expand": ([("Expand", ["one", "shape"])], np.ones(C)),
        "Concat": ([("Concat", ["base", "none"])], base),
        "CastLike": ([("CastLike", ["half", "one"])], np.float32(np.float16(base))),
        "DequantizeLinear": ([("DequantizeLinear", ["bytes", "two"])], np.full(C, 6)),
    }  # fmt: skip
    steps, want = rows[how]
    nodes = []
    for i, (kind, inputs) in enumerate(steps):
        axis = {"axis": 0} if kind == "Concat" else {}
        nodes.append(helper.make_node(kind, inputs, [f"t{i}"], **axis))
    node.input[1] = nodes[-1].output[0]
    given = {"base": base, "one": np.ones(1, "f4"), "shape": np.array([C]), "two": np.float32(2)}
    given |= {"none": base[:0], "half": base.astype("f2"), "bytes": np.full(C, 3, np.int8)}
    tensors += [onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in given.items()]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("x", "y")]
    return helper.make_graph([*nodes, node], "g", ends[:1], ends[1:], tensors), want


@pytest.mark.parametrize(
    "how", ["Add", "softplus", "Expand", "Concat", "CastLike", "DequantizeLinear"]
)
def test_parameters_that_are_computed_from_constants(how, rng):
    graph, want = computed(rng, how)
    layer = interop.onnx_layers(helper.make_model(graph))["n"]
    np.testing.assert_allclose(layer.gamma, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("node", "match"),
    [
        (("Expand", ["one", "huge"]), "more values than parameters need"),
        (("Add", ["wide", "high"]), "more values than parameters need"),
        (("Add", ["base", "two_of"]), "cannot be computed by its Add"),
        (("Add", ["base", "x"]), "is not in initializers"),
    ],
)
def test_what_cannot_be_computed(node, match, rng):
    graph, _ = computed(rng, "Add")
    zeros = {"huge": np.array([2**50]), "two_of": np.zeros(2, "f4")}
    zeros |= {"wide": np.zeros((1, 10_000), "f4"), "high": np.zeros((10_000, 1), "f4")}
    graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in zeros.items())
    graph.node[0].CopyFrom(helper.make_node(node[0], node[1], ["t0"]))
    with pytest.raises(ValueError, match=match):
        interop.onnx_layers(helper.make_model(graph))


def test_sums_of_sums_take_no_time_without_end(rng):
    """Each of forty nodes adds the two before it, so there are two to the power of forty paths."""
    graph, _ = computed(rng, "Add")
    last = graph.node.pop()
    for i in range(40):
        graph.node.append(helper.make_node("Add", [f"t{i}", f"t{i - 1}" if i else "one"],
                                           [f"t{i + 1}"]))  # fmt: skip
    last.input[1] = "t40"
    graph.node.append(last)
    with pytest.raises(ValueError, match="more values than parameters need"):
        interop.onnx_layers(helper.make_model(graph))


def light_models():
    folder = os.path.join(os.path.dirname(onnx.__file__), "backend", "test", "data", "light")
    for name in sorted(os.listdir(folder)):
        if name.endswith(".onnx"):
            model = onnx.load(os.path.join(folder, name))
            if nodes := [n for n in model.graph.node if n.op_type == "BatchNormalization"]:
                yield name, model, len(nodes)


def test_the_light_models_that_onnx_ships():
    read = {name: (len(interop.onnx_layers(model)), n) for name, model, n in light_models()}
    assert len(read) == 4
    for layers, nodes in read.values():
        assert layers == nodes


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: cybn.LayerNorm((4, 5)), (2, 3, 4, 5)),
        (lambda: cybn.LayerNorm(5, bias=False), (2, 3, 5)),
        (lambda: cybn.LayerNorm(5, elementwise_affine=False), (2, 3, 5)),
        (lambda: cybn.RMSNorm(5, eps=1e-4), (2, 3, 5)),
        (lambda: cybn.GroupNorm(2, 4), (2, 4, 3, 3)),
        (lambda: cybn.InstanceNorm1d(4), (2, 4, 6)),
        (lambda: cybn.InstanceNorm2d(4, affine=True), (2, 4, 3, 3)),
    ],
)
def test_the_family_as_onnx_computes_it(layer, shape, rng):
    layer = layer()
    for parameter in layer.parameters():
        parameter[...] = rng.standard_normal(parameter.shape)
    node, tensors = interop.to_onnx(layer, "n").protos()
    kinds = [
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, list(shape)) for n in ("x", "y")
    ]
    graph = helper.make_graph([node], "g", kinds[:1], kinds[1:], tensors)
    opset = interop.to_onnx(layer).opset
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", max(opset, 21))])
    onnx.checker.check_model(model)
    x = rng.standard_normal(shape, dtype=np.float32)
    (y,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(layer(x), y, rtol=1e-4, atol=1e-5)
    (twin,) = interop.onnx_layers(model).values()
    assert type(twin) is type(layer)
    np.testing.assert_allclose(twin(x), y, rtol=1e-4, atol=1e-5)
    if isinstance(layer, cybn.GroupNorm):
        model.opset_import[0].version = 18
        with pytest.raises(ValueError, match="convert_version"):
            interop.onnx_layers(model)


FAMILY = {
    "LayerNorm": ((4,), (3, 4), {}),
    "RMSNorm": ((4,), (3, 4), {}),
    "GroupNorm": ((2, 4), (3, 4, 5), {}),
    "InstanceNorm1d": ((4,), (3, 4, 5), {"affine": True, "track_running_stats": True}),
}


@pytest.mark.parametrize("kind", FAMILY)
def test_the_family_of_pytorch(kind, rng):
    args, shape, options = FAMILY[kind]
    module = getattr(torch.nn, kind)(*args, **options)
    x = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        module(x)
        expected = module.eval()(x).numpy()
    groups = {"num_groups": 2} if kind == "GroupNorm" else {}
    layer = interop.from_torch(module.state_dict(), layer=getattr(cybn, kind), **groups).eval()
    np.testing.assert_allclose(layer(x.numpy()), expected, rtol=1e-5, atol=1e-5)
    again = getattr(torch.nn, kind)(**interop.torch_options(layer))
    again.load_state_dict({k: torch.from_numpy(v) for k, v in interop.to_torch(layer).items()})
    same(module.state_dict(), again.state_dict())


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm2d"])
def test_the_family_of_keras_and_flax(kind, rng):
    layer = {
        "LayerNorm": lambda: cybn.LayerNorm(4, eps=1e-3),
        "RMSNorm": lambda: cybn.RMSNorm(4, eps=1e-3),
        "GroupNorm": lambda: cybn.GroupNorm(2, 4, axis=-1, eps=1e-3),
        "InstanceNorm2d": lambda: cybn.InstanceNorm2d(4, axis=-1, affine=True, eps=1e-3),
    }[kind]()
    for parameter in layer.parameters():
        parameter[...] = rng.standard_normal(parameter.shape)
    x = rng.standard_normal((2, 5, 6, 4), dtype=np.float32)
    y = layer(x)
    names = {"LayerNorm": "LayerNormalization", "RMSNorm": "RMSNormalization"}
    theirs = getattr(keras.layers, names.get(kind, "GroupNormalization"))(
        **interop.keras_options(layer)
    )
    theirs.build(x.shape)
    theirs.set_weights(list(interop.to_keras(layer).values()))
    np.testing.assert_allclose(numpy_of(theirs(x)), y, rtol=1e-4, atol=1e-5)
    weights = {w.path: w for w in theirs.weights}
    prefix = next(iter(weights)).rpartition("/")[0]
    groups = {"num_groups": 2} if kind == "GroupNorm" else {}
    twin = interop.from_keras(weights, prefix, layer=type(layer), epsilon=1e-3, **groups)
    np.testing.assert_array_equal(twin(x), y)
    name = "InstanceNorm" if kind == "InstanceNorm2d" else kind
    module = getattr(linen, name)(**interop.flax_options(layer))
    out = module.apply(interop.to_flax(layer), x)
    np.testing.assert_allclose(np.asarray(out), y, rtol=1e-4, atol=1e-5)
    twin = interop.from_flax(interop.to_flax(layer), layer=type(layer), epsilon=1e-3, **groups)
    np.testing.assert_array_equal(twin(x), y)


def test_states_of_pytorch_in_half_types(module, tmp_path):
    state = {
        k: v.bfloat16() if v.is_floating_point() else v for k, v in module.state_dict().items()
    }
    bn = interop.from_torch(state, eps=module.eps)
    np.testing.assert_array_equal(bn.running_var, state["running_var"].float())
    assert list(interop.find(state, "torch")) == [""]
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, str(tmp_path / "a.safetensors"))
    arrays = interop.load_arrays(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(arrays["running_var"], bn.running_var)


def test_modules_that_pytorch_has_pruned_or_parametrized():
    from torch.nn.utils import parametrizations, parametrize, prune

    pruned, plain = torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4, bias=False)
    prune.l1_unstructured(pruned, "weight", 1)
    with pytest.raises(ValueError, match=r"'weight_(orig|mask)' shows.*prune\.remove"):
        interop.from_torch(pruned.state_dict())
    prune.remove(pruned, "weight")  # as the error advises
    assert sorted(interop.from_torch(pruned.state_dict()).gamma) == [0, 1, 1, 1]
    assert interop.from_torch(plain.state_dict()).gamma.tolist() == [1] * 4  # no bias at all
    parametrize.register_parametrization(plain, "weight", torch.nn.Softplus())
    with pytest.raises(ValueError, match=r"'parametrizations\.weight\.original' shows"):
        interop.from_torch(plain.state_dict())
    parametrize.remove_parametrizations(plain, "weight")
    interop.from_torch(plain.state_dict())
    assert parametrizations is not None
