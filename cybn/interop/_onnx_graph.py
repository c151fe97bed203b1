"""The normalization layers of an ONNX model, wherever their nodes and parameters are.

Exporters store parameters as initializers, or as results of nodes that always compute the same:
Constant, ConstantOfShape, Identity, Cast, Reshape, Squeeze, Unsqueeze, and arithmetic with
constants, such as 1 + weight for a scale. These nodes are computed here. Exporters may also put
modules into functions of the model. Each call of a function is searched, with its own inputs.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ._layers import INSTANCE
from ._onnx import OPERATORS, from_onnx
from ._onnx_values import package, tensor_array

_DEEPEST = 50  # nodes in a chain, or graphs nested in each other
_MOST = 1 << 24  # values of a ConstantOfShape or a sparse tensor, and of all computed nodes
_LEAST = 1 << 10  # each computed node counts as at least this many values
_MOST_CALLS = 10_000  # calls of functions that are searched
_LISTS = ("value_float", "value_floats", "value_int", "value_ints")


class OnnxLayers(dict[str, Any]):
    """Layers by name, with the reasons why some nodes could not be read.

    Attributes
    ----------
    passed_over : dict of str to str
        The reason, by the name that the layer would have had.

    Examples
    --------
    >>> import onnx
    >>> import cybn
    >>> from cybn import interop
    >>> node, tensors = interop.to_onnx(cybn.BatchNorm2d(2), "bn1").protos()
    >>> graph = onnx.helper.make_graph([node], "model", [], [], initializer=tensors)
    >>> layers = interop.onnx_layers(onnx.helper.make_model(graph))
    >>> layers.passed_over
    {}
    """

    passed_over: dict[str, str]


class _Constants(Mapping[str, Any]):
    """The constant values in a graph and in the graphs around it, or in a function.

    `given` maps the names of a function's inputs to names in `outer`, the graph that calls it. The
    function can use no other values of `outer`.
    """

    def __init__(
        self, graph: Any, outer: _Constants | None, given: dict[str, str] | None = None
    ) -> None:
        self._tensors = {tensor.name: tensor for tensor in getattr(graph, "initializer", ())}
        self._sparse = {t.values.name: t for t in getattr(graph, "sparse_initializer", ())}
        self._nodes = {output: node for node in graph.node for output in node.output if output}
        self._outer, self._given = outer, given
        self._depth = 0
        self._spent = 0  # values computed so far

    def __getitem__(self, name: str) -> Any:
        if name in self._tensors:
            return self._tensors[name]
        if name in self._sparse:
            return _dense(self._sparse[name], name)
        if name in self._nodes:
            self._depth += 1
            try:
                if self._depth > _DEEPEST:
                    raise ValueError(f"{name} lies behind more than {_DEEPEST} nodes")
                return self._compute(self._nodes[name], name)
            finally:
                self._depth -= 1
        outside = name if self._given is None else self._given.get(name, "")
        if self._outer is not None and outside:
            return self._outer[outside]
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        try:
            self[str(name)]
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _compute(self, node: Any, name: str) -> Any:
        """Return the output of a node. Raise KeyError if it is not always the same."""
        given = {a.name: a for a in node.attribute}
        if node.op_type == "Constant":
            if "value" in given:
                return given["value"].t
            if "sparse_value" in given:
                return _dense(given["sparse_value"].sparse_tensor, name)
            for kind in _LISTS:
                if kind in given:
                    a = given[kind]
                    dtype = np.float32 if "float" in kind else np.int64
                    values = {"value_float": a.f, "value_int": a.i}.get(kind)
                    many = a.floats if "float" in kind else a.ints
                    return np.array(list(many) if values is None else values, dtype)
        if node.op_type in _COMPUTED and node.domain in ("", "ai.onnx"):
            return self._evaluate(node, name)
        if node.op_type not in _FOLLOWED or not node.input:
            raise KeyError(name)
        array = np.asarray(tensor_array(self[node.input[0]], node.input[0]))
        if node.op_type == "ConstantOfShape":
            shape = [int(size) for size in array.ravel()]
            if prod(shape) > _MOST or min(shape, default=0) < 0:
                raise ValueError(f"{name} has the shape {tuple(shape)}; it cannot be a parameter")
            value = tensor_array(given["value"].t, name) if "value" in given else np.float32(0)
            return np.full(shape, np.asarray(value).ravel()[0])
        if node.op_type == "Cast":
            return array.astype(package().helper.tensor_dtype_to_np_dtype(given["to"].i))
        if node.op_type == "Identity":
            return array
        if node.op_type == "Reshape":
            return array.reshape([int(n) for n in tensor_array(self[node.input[1]], name).ravel()])
        return array.ravel()  # Squeeze or Unsqueeze of a vector

    def _evaluate(self, node: Any, name: str) -> Any:
        """Return the output of a node, computed by the reference evaluator of the package onnx."""
        inputs = {n: np.asarray(tensor_array(self[n], n)) for n in dict.fromkeys(node.input) if n}
        evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator
        try:
            size = sum(array.size for array in inputs.values())
            if node.op_type == "Expand":
                size = prod(int(n) for n in inputs[node.input[1]].ravel())
            elif node.op_type not in ("Concat", "DequantizeLinear"):
                size = prod(np.broadcast_shapes(*(array.shape for array in inputs.values())))
            self._spent += max(size, _LEAST)
            if self._spent > _MOST:
                raise ValueError("it would compute more values than parameters need")
            with np.errstate(all="ignore"):
                return evaluator(node).run([name], inputs)[0]
        except Exception as error:  # a broken node raises errors of many kinds
            raise ValueError(f"{name} cannot be computed by its {node.op_type}: {error}") from error


def _dense(tensor: Any, name: str) -> Any:
    """Return a sparse tensor as an array. Its indices are flat, or have a column per axis."""
    shape = [int(size) for size in tensor.dims]
    values = np.asarray(tensor_array(tensor.values, name))
    places = np.asarray(tensor_array(tensor.indices, name))
    if min(shape, default=0) < 0 or prod(shape) > _MOST:
        raise ValueError(f"{name} has the shape {tuple(shape)}; it cannot be a parameter")
    array = np.zeros(shape, values.dtype)
    try:
        if places.ndim == 1:
            array.reshape(-1)[places] = values
        else:
            array[tuple(places.T)] = values
    except (IndexError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as an array: {error}") from error
    return array


_COMPUTED = (
    *("Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal", "Exp", "Softplus"),
    *("Concat", "Expand", "CastLike", "DequantizeLinear", "Flatten", "Transpose"),
)
_FOLLOWED = ("ConstantOfShape", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


class _Found(NamedTuple):
    """A node of normalization, and the constants, path, ranks and opset of its graph."""

    node: Any
    constants: _Constants
    path: str
    ranks: dict[str, int]
    opset: int


def onnx_layers(model: Any, **options: Any) -> OnnxLayers:
    """Return a layer for each node of normalization in an ONNX model.

    The search includes the main graph, the graphs within it, such as the branches of an If, and the
    model's own functions, which are searched once for each call.

    Parameters
    ----------
    model : onnx.ModelProto
        The parameters of the nodes must be initializers or come from constant nodes.
    **options
        As in `from_onnx`; `layer`, `running_ddof`, `state_ddof` and `count` apply to batch norms
        only.

    Returns
    -------
    dict of str to layer
        The layers by the node's name, or by the name of its output if the name is empty or not
        unique. If two would still have the same name, all are named by their outputs. A node that
        cannot be read is left out; the attribute ``passed_over`` has the reason by name.

    Raises
    ------
    ValueError
        If `from_onnx` can read none of the nodes of normalization, two nodes have the same output,
        or a node has no output.
    TypeError
        If `model` is of another type, or an option is unknown.

    Examples
    --------
    >>> import onnx
    >>> import cybn
    >>> from cybn import interop
    >>> node, tensors = interop.to_onnx(cybn.BatchNorm2d(2), "bn1").protos()
    >>> graph = onnx.helper.make_graph([node], "model", [], [], initializer=tensors)
    >>> layers = interop.onnx_layers(onnx.helper.make_model(graph))
    >>> layers["bn1"].num_features
    2
    """
    if not hasattr(model, "graph"):
        raise TypeError(f"model is of type {type(model).__name__}; it must be an onnx.ModelProto")
    opset = max((entry.version for entry in model.opset_import if not entry.domain), default=21)
    functions = {(f.domain, f.name): f for f in getattr(model, "functions", ())}
    root = _Constants(model.graph, None)
    found = list(_Walk(functions).nodes(model.graph, root, "", opset, 0, {}))
    names = _distinct(
        [f"{n.path}{n.node.name}" if n.node.name else "" for n in found],
        [f"{n.path}{n.node.output[0]}" for n in found],
    )
    layers, reasons = OnnxLayers(), dict[str, ValueError]()
    for name, each in zip(names, found, strict=True):
        try:
            layers[name] = _layer(each, options)
        except ValueError as error:
            reasons[name] = error
    if reasons and not layers:
        first, reason = next(iter(reasons.items()))
        raise ValueError(f"no node could be read; the first is {first!r}: {reason}") from reason
    layers.passed_over = {name: str(reason) for name, reason in reasons.items()}
    return layers


def _layer(found: _Found, options: dict[str, Any]) -> Any:
    kind = found.node.op_type
    if kind == "BatchNormalization":
        return from_onnx(found.node, found.constants, **options)
    if kind == "GroupNormalization" and found.opset < 21:
        raise ValueError(
            f"a GroupNormalization of opset {found.opset} has a scale for each group, not for each "
            "channel; onnx.version_converter.convert_version(model, 21) converts it"
        )
    given = {"axis": options["axis"]} if "axis" in options else {}
    if kind == "InstanceNormalization":
        form = found.ranks.get(found.node.input[0], 4) - 3
        given["layer"] = INSTANCE[form] if 0 <= form < len(INSTANCE) else INSTANCE[1]
    return from_onnx(found.node, found.constants, **given)


class _Walk:
    """A walk over all graphs of a model, and over its functions wherever they are called."""

    def __init__(self, functions: dict[tuple[str, str], Any]) -> None:
        self._functions = functions
        self._calls = 0

    def nodes(
        self,
        graph: Any,
        constants: _Constants,
        path: str,
        opset: int,
        depth: int,
        ranks: dict[str, int],
    ) -> Iterator[_Found]:
        """Yield the nodes of normalization of a graph and of those within it."""
        if depth > _DEEPEST:
            raise ValueError(
                f"the graphs are nested more than {_DEEPEST} deep; the model is broken"
            )
        ranks = ranks | _ranks(graph)
        for index, node in enumerate(graph.node):
            if node.op_type in (*OPERATORS, "Constant") and not len(node.output):
                raise ValueError("a node has no output; the model is broken")
            function = self._functions.get((node.domain, node.op_type))
            if function is not None:
                yield from self._call(function, node, constants, f"{path}{node.name or index}/",
                                      depth, ranks)  # fmt: skip
            elif node.op_type in OPERATORS and node.domain in ("", "ai.onnx"):
                yield _Found(node, constants, path, ranks, opset)
            for attribute in node.attribute:
                inner = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
                for i, branch in enumerate(inner):
                    within = f"{path}{node.name or index}/{attribute.name}{i or ''}/"
                    known = _Constants(branch, constants)
                    yield from self.nodes(branch, known, within, opset, depth + 1, ranks)

    def _call(
        self,
        function: Any,
        node: Any,
        constants: _Constants,
        path: str,
        depth: int,
        ranks: dict[str, int],
    ) -> Iterator[_Found]:
        """Yield the nodes of a function, with the inputs and attributes of one call."""
        self._calls += 1
        if self._calls > _MOST_CALLS:
            raise ValueError(f"functions are called more than {_MOST_CALLS} times")
        given = dict(zip(function.input, node.input, strict=False))
        settings = {a.name: a for a in (*function.attribute_proto, *node.attribute)}
        body = type(function)()
        body.CopyFrom(function)
        for inner in body.node:
            for attribute in [a for a in inner.attribute if a.ref_attr_name]:
                inner.attribute.remove(attribute)
                if (value := settings.get(attribute.ref_attr_name)) is not None:
                    own = inner.attribute.add()
                    own.CopyFrom(value)
                    own.name = attribute.name
        opset = max((o.version for o in function.opset_import if not o.domain), default=21)
        known = _Constants(body, constants, given)
        inside = {name: ranks[outside] for name, outside in given.items() if outside in ranks}
        yield from self.nodes(body, known, path, opset, depth + 1, inside)


def _ranks(graph: Any) -> dict[str, int]:
    """Return the number of axes of each value in a graph, if the graph states its type."""
    values = [v for v in (*graph.input, *graph.value_info, *graph.output) if not isinstance(v, str)]
    return {
        v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.HasField("tensor_type")
    }


def _distinct(names: list[str], outputs: list[str]) -> list[str]:
    """Return a unique name for each node: its own name, or that of its output."""
    if len(set(outputs)) < len(outputs):
        raise ValueError("two BatchNormalization nodes have the same output; the model is broken")
    often = Counter(names)
    mixed = [
        name if name and often[name] == 1 else output
        for name, output in zip(names, outputs, strict=True)
    ]
    return mixed if len(set(mixed)) == len(mixed) else outputs
