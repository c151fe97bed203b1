"""ONNX: a BatchNormalization node, in both of its forms.

=========  =========================  ==================  ==========================================
opset      statistics among inputs    attributes          outputs when training
=========  =========================  ==================  ==========================================
7 to 13    mean, var                  epsilon, momentum   y, mean, var, saved_mean, saved_var
14 on      input_mean, input_var      and training_mode   y, running_mean, running_var
=========  =========================  ==================  ==========================================

Opset 14 says that the variance is the biased one; before, the standard does not say, and it is
taken to be so. Nodes of opset 1 to 6 are read, not written.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._arguments import integer_from
from ..layers import BatchNorm
from ._layers import arrays_of, build, other_momentum

_FLOAT, _INT = 1, 2  # of onnx.AttributeProto
_SETTINGS = ("epsilon", "momentum", "spatial")
_ROLES = ("scale", "B", "input_mean", "input_var")


class OnnxNode(NamedTuple):
    """A BatchNormalization node in plain Python.

    Attributes
    ----------
    name : str
    opset : int
    inputs, outputs : tuple of str
        Their names; the first input is x, the first output y.
    attributes : dict of str to float or int
    initializers : dict of str to ndarray
        The other four inputs, by name.
    """

    name: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, float | int]
    initializers: dict[str, NDArray[Any]]

    def protos(self) -> tuple[Any, list[Any]]:
        """Return it as a ``NodeProto`` and a list of ``TensorProto``, with the package onnx.

        Raises
        ------
        ImportError
            If onnx is not installed.
        """
        onnx = _onnx()
        node = onnx.helper.make_node(
            "BatchNormalization",
            list(self.inputs),
            list(self.outputs),
            name=self.name,
            **self.attributes,
        )
        tensors = [onnx.numpy_helper.from_array(a, n) for n, a in self.initializers.items()]
        return node, tensors


def _onnx() -> Any:
    try:
        importlib.import_module("onnx.numpy_helper")
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError("this needs the package onnx: pip install 'cybn[interop]'") from error


def to_onnx(
    bn: BatchNorm,
    name: str = "bn",
    *,
    x: str = "x",
    y: str = "y",
    opset: int = 15,
    training: bool = False,
    count: ArrayLike | None = None,
) -> OnnxNode:
    """Return a layer as a BatchNormalization node.

    ONNX normalizes axis 1, whatever the layer's axis is.

    Parameters
    ----------
    bn : BatchNorm
        Left as it is.
    name : str, default "bn"
        Of the node; its initializers are called name.scale, name.B and so on.
    x, y : str
        Names of the input and of the output.
    opset : int, default 15
        Which form: 7 to 13, or 14 on.
    training : bool, default False
        Whether the node normalizes with the batch and gives new running statistics.
    count : int or array_like, optional
        As in `to_keras`: ONNX follows the biased variance.

    Returns
    -------
    OnnxNode
        Of copies, plain data; `protos` makes protocol buffers of it. A layer without gamma and
        beta gives ones and zeros.

    Raises
    ------
    TypeError, ValueError
        As in `to_keras`; ValueError too if `opset` is below 7, or the layer's momentum is None and
        `training` is True. For inference such a node goes without momentum.
    """
    opset = integer_from("opset", opset, 7)
    arrays = arrays_of(bn, "onnx", name, count)
    if opset < 14:
        arrays = {_old_name(key): array for key, array in arrays.items()}
    attributes: dict[str, float | int] = {"epsilon": bn.eps}
    if training or bn.momentum is not None:
        attributes["momentum"] = other_momentum(bn.momentum)
    if opset >= 14:
        attributes["training_mode"] = int(training)
    extra = ["running_mean", "running_var"]
    if opset < 14:
        extra += ["saved_mean", "saved_var"]
    outputs = [y] + [f"{name}.{part}" for part in extra if training]
    return OnnxNode(name, opset, (x, *arrays), tuple(outputs), attributes, arrays)


def from_onnx(
    node: Any,
    initializers: Mapping[str, Any] | None = None,
    *,
    axis: int = 1,
    layer: type[BatchNorm] = BatchNorm,
    running_ddof: int | None = None,
    count: ArrayLike | None = None,
) -> BatchNorm:
    """Return a layer with the state and the settings of a BatchNormalization node.

    Parameters
    ----------
    node : OnnxNode or onnx.NodeProto
        Of any opset.
    initializers : mapping of str to array_like or onnx.TensorProto, optional
        Where the node's inputs are found by name; those of an `OnnxNode` where None.
    axis : int, default 1
        The channel axis of the new layer's input; 1 in ONNX.
    layer, running_ddof, count
        As in `from_keras`.

    Returns
    -------
    BatchNorm
        A new layer with copies of the arrays. Settings that ONNX holds in float32 come back as the
        shortest decimal: 0.9, not 0.8999999761581421. `num_batches_tracked` is 0.

    Raises
    ------
    ValueError
        If the node is of another kind or `spatial` is 0, or an input is not among the
        initializers, or its data is broken or lies in another file, or the arrays do not pass
        `load_state_dict`.
    TypeError
        If `node` is of another type.
    """
    if isinstance(node, OnnxNode):
        inputs, attributes, found = node.inputs, dict(node.attributes), node.initializers
        initializers = found if initializers is None else initializers
    elif hasattr(node, "op_type") and hasattr(node, "attribute"):
        if node.op_type != "BatchNormalization":
            raise ValueError(f"the node is a {node.op_type}; it must be a BatchNormalization")
        inputs = tuple(node.input)
        attributes = {a.name: _number(a) for a in node.attribute if a.name in _SETTINGS}
    else:
        raise TypeError(
            f"node is of type {type(node).__name__}; it must be an OnnxNode or an onnx.NodeProto"
        )
    if not attributes.get("spatial", 1):
        raise ValueError("the node has spatial=0, with statistics for each position; not supported")
    state = {}
    for key, role in zip(inputs[1:], _ROLES, strict=False):
        if key not in (initializers or {}):
            raise ValueError(f"the input {key!r}, {role} of the node, is not in initializers")
        state[role] = _array((initializers or {})[key], key)
    options = {
        "eps": attributes.get("epsilon", 1e-5),
        "momentum": other_momentum(attributes.get("momentum", 0.9)),
        "axis": axis,
    }
    return build(state, "onnx", "", layer, running_ddof, count, **options)


def onnx_layers(model: Any, **options: Any) -> dict[str, BatchNorm]:
    """Return a layer for each BatchNormalization node of an ONNX model's main graph.

    Parameters
    ----------
    model : onnx.ModelProto
        Its initializers and Constant nodes are looked in for the nodes' inputs.
    **options
        As in `from_onnx`.

    Returns
    -------
    dict of str to BatchNorm
        By the node's name, or that of its output where the name is empty or not the only one. By
        the outputs of all nodes where even so two would have the same name.

    Raises
    ------
    ValueError
        As in `from_onnx`, and if two nodes have the same output, or one has none.
    TypeError
        If `model` is of another type.
    """
    if not hasattr(model, "graph"):
        raise TypeError(f"model is of type {type(model).__name__}; it must be an onnx.ModelProto")
    graph = model.graph
    constants = [node for node in graph.node if node.op_type == "Constant"]
    known: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "BatchNormalization"]
    if not all(len(node.output) for node in constants + nodes):
        raise ValueError("a node has no output; the model is broken")
    known |= {n.output[0]: a.t for n in constants for a in n.attribute if a.name == "value"}
    names = _distinct([n.name for n in nodes], [n.output[0] for n in nodes])
    return {
        name: from_onnx(node, known, **options) for name, node in zip(names, nodes, strict=True)
    }


def _distinct(names: list[str], outputs: list[str]) -> list[str]:
    """Return a name of its own for each node: its name, or that of its output."""
    if len(set(outputs)) < len(outputs):
        raise ValueError("two BatchNormalization nodes have the same output; the model is broken")
    often = Counter(names)
    mixed = [
        name if name and often[name] == 1 else output
        for name, output in zip(names, outputs, strict=True)
    ]
    return mixed if len(set(mixed)) == len(mixed) else outputs


def _old_name(key: str) -> str:
    """Return what an initializer of opset 14 is called in the older form."""
    head, dot, leaf = key.rpartition(".")
    return head + dot + leaf.removeprefix("input_")


def _array(value: Any, name: str) -> Any:
    """Return an initializer; a TensorProto as an array. No file is opened for it."""
    if not (hasattr(value, "data_type") and hasattr(value, "raw_data")):
        return value
    if value.data_location:
        raise ValueError(
            f"{name} has its data in another file; load the model with onnx.load(path), which "
            "reads it, or save it with all data in one file"
        )
    if min(value.dims, default=0) < 0:
        raise ValueError(f"{name} has the shape {tuple(value.dims)}; the model is broken")
    try:
        return _onnx().numpy_helper.to_array(value)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as an array: {error}") from error


def _number(attribute: Any) -> float | int:
    if attribute.type not in (_FLOAT, _INT):
        raise ValueError(f"the attribute {attribute.name!r} of the node is not a number")
    return _shortest(attribute.f) if attribute.type == _FLOAT else int(attribute.i)


def _shortest(value: float) -> float:
    """Return the shortest decimal that is this float32."""
    return float(str(np.float32(value)))
