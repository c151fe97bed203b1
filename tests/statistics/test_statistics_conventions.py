"""Layers of `BatchNorm.like` have the running statistics of that library after a few batches.

Keras is tested in test_statistics_keras.py.
"""

import numpy as np
import pytest

import cybn

C = 4
MOMENTUM = 0.7  # not the default of any library
each_momentum = pytest.mark.parametrize("options", [{}, {"momentum": MOMENTUM}], ids=str)


@pytest.fixture
def batches(rng):
    return rng.standard_normal((3, 6, C)).astype(np.float32) * 2 + 1


def ours(library, batches, options):
    bn = cybn.BatchNorm.like(library, C, **options)
    outputs = [bn(x) for x in batches]
    return outputs[-1], bn.running_mean, bn.running_var


def check(got, want):
    """Compare within the few float32 roundings that both sides make."""
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@each_momentum
def test_torch(options, batches):
    torch = pytest.importorskip("torch")
    bn = torch.nn.BatchNorm1d(C, **options)
    y = [bn(torch.tensor(x)) for x in batches][-1]
    state = [v.detach().numpy() for v in (y, bn.running_mean, bn.running_var)]
    check(ours("torch", batches, options), state)


@each_momentum
def test_onnx(options, batches):
    onnx = pytest.importorskip("onnx")
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    names = ["x", "scale", "bias", "mean", "var"]
    outputs = ["y", "new_mean", "new_var"]
    node = helper.make_node("BatchNormalization", names, outputs, training_mode=1, **options)

    def value(name):
        shape = [None, C] if name in ("x", "y") else [C]
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = helper.make_graph([node], "step", [*map(value, names)], [*map(value, outputs)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
    step = ReferenceEvaluator(model)
    ones, zeros = np.ones(C, np.float32), np.zeros(C, np.float32)
    mean, var = zeros, ones
    for x in batches:
        given = dict(zip(names, (x, ones, zeros, mean, var), strict=True))
        y, mean, var = step.run(None, given)
    check(ours("onnx", batches, options), (y, mean, var))


def test_paper(batches):
    """In Algorithm 2, batch means and unbiased batch variances are averaged over the batches."""
    _, mean, var = ours("paper", batches, {})
    np.testing.assert_allclose(mean, batches.mean(1).mean(0), rtol=2e-6)
    np.testing.assert_allclose(var, batches.var(1, ddof=1).mean(0), rtol=2e-6)
