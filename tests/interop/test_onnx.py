"""The ONNX backend tests whose graph has a normalization node: cybn gives the standard's outputs.

`onnx` generates the test cases. "Expanded" cases express an operator by primitive ones and have no
such node, so they are left out. Generating the cases of all operators takes a quarter of a minute.
So only modules with "norm" in their names are used here; a slow test checks that this is enough.
"""

import importlib
import pkgutil
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

import cybn

onnx = pytest.importorskip("onnx")

from onnx import numpy_helper  # noqa: E402 - after the skip
from onnx.backend.test.loader import load_model_tests  # noqa: E402


def batch_normalization(x, scale, bias, mean, var, *, epsilon=1e-5, momentum=0.9, **attributes):
    """The momentum is the weight of the old value, and the running variance is the biased one."""
    if not attributes.get("training_mode", 0):
        return [cybn.batch_norm_inference(x, mean, var, scale, bias, eps=epsilon)]
    layer = cybn.BatchNorm(
        scale.size, eps=epsilon, momentum=1 - momentum, running_ddof=0, dtype=x.dtype
    )
    state = {"gamma": scale, "beta": bias, "running_mean": mean, "running_var": var}
    layer.load_state_dict(state | {"num_batches_tracked": 0})
    return [layer(x), layer.running_mean, layer.running_var]


def layer_normalization(x, scale, bias=None, *, axis=-1, epsilon=1e-5, stash_type=1):
    assert stash_type == 1
    y, m = cybn.layer_norm(x, scale, bias, axis=axis, eps=epsilon)
    lead = axis % x.ndim
    shape = (*x.shape[:lead], *(1 for _ in x.shape[lead:]))
    rstd = 1 / np.sqrt(m.var() + epsilon)
    return [y, *(v.astype(np.float32).reshape(shape) for v in (m.mean, rstd))]


def rms_normalization(x, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    assert stash_type == 1
    return [cybn.rms_norm(x, scale, axis=axis, eps=epsilon)[0]]


def instance_normalization(x, scale, bias, *, epsilon=1e-5):
    return [cybn.instance_norm(x, scale, bias, eps=epsilon)[0]]


def group_normalization(x, scale, bias, *, num_groups, epsilon=1e-5, stash_type=1):
    assert stash_type == 1
    return [cybn.group_norm(x, scale, bias, num_groups=num_groups, eps=epsilon)[0]]


OPERATORS = {
    "BatchNormalization": batch_normalization,
    "LayerNormalization": layer_normalization,
    "RMSNormalization": rms_normalization,
    "InstanceNormalization": instance_normalization,
    "GroupNormalization": group_normalization,
}
KINDS = ["node", "pytorch-converted", "pytorch-operator"]


def model_of(case):
    return case.model or onnx.load(Path(case.model_dir, "model.onnx"))


def data_sets(case):
    """Yield inputs and outputs, each in the order of the graph."""
    if case.data_sets:
        yield from case.data_sets
        return
    for folder in sorted(Path(case.model_dir).glob("test_data_set_*")):
        yield tuple(
            [
                numpy_helper.to_array(onnx.load_tensor(folder / f"{which}_{i}.pb"))
                for i in range(len(list(folder.glob(f"{which}_*.pb"))))
            ]
            for which in ("input", "output")
        )


def import_norms(package):
    """Generate the cases of modules with "norm" in their names; for onnx's `import_recursive`."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if "norm" in module.name:
            importlib.import_module(module.name)


def load():
    """Yield the kind and the case for each case that has one of the operators."""
    with warnings.catch_warnings(action="ignore"):  # warnings of onnx's own arithmetic
        for kind in KINDS:
            for case in load_model_tests(kind=kind):
                if OPERATORS.keys() & {node.op_type for node in model_of(case).graph.node}:
                    yield kind, case


with patch("onnx.backend.test.loader.import_recursive", import_norms):
    CASES = [pytest.param(case, id=f"{kind}-{case.name}") for kind, case in load()]


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    graph = model_of(case).graph
    (node,) = graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    constants = {v.name: numpy_helper.to_array(v) for v in graph.initializer}
    names = [v.name for v in graph.input if v.name not in constants]
    runs = 0
    for inputs, expected in data_sets(case):
        values = constants | dict(zip(names, inputs, strict=True))
        arguments = [values[name] for name in node.input]
        got = OPERATORS[node.op_type](*arguments, **attributes)
        for a, b in zip(got, expected, strict=False):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=case.rtol, atol=case.atol)
        assert len(got) >= len(expected)
        runs += 1
    assert runs


def test_there_are_cases_of_every_operator():
    found = [node.op_type for c in CASES for node in model_of(c.values[0]).graph.node]
    assert set(found) == OPERATORS.keys()
    print({name: found.count(name) for name in OPERATORS})
    converted = [c.id for c in CASES if c.id.startswith("pytorch-converted-test_BatchNorm")]
    assert len(converted) >= 5


@pytest.mark.slow
def test_no_case_is_left_out():
    assert sorted(f"{kind}-{case.name}" for kind, case in load()) == sorted(c.id for c in CASES)
