"""ONNX: nodes of normalization, as plain data or protocol buffers.

======================  =====  ===============================  ====================================
node                    opset  inputs after x                   attributes
======================  =====  ===============================  ====================================
BatchNormalization      7      scale, B, mean, var              epsilon, momentum
BatchNormalization      14     scale, B, input_mean, input_var  epsilon, momentum, training_mode
InstanceNormalization   1      scale, B                         epsilon
LayerNormalization      17     scale, and optionally B          epsilon, axis
GroupNormalization      21     scale, bias                      epsilon, num_groups
RMSNormalization        23     scale                            epsilon, axis
======================  =====  ===============================  ====================================

The column "opset" has the first opset in which a node has this form. From opset 14 the standard
says that the variance is biased. It does not say so before, but the functions here assume it. In
training a BatchNormalization also returns new running statistics, and before opset 14 also those of
the batch. Nodes of opsets 1 to 6 can be read, but not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .._arguments import integer_from, is_bfloat16
from ..layers import BatchNorm, GroupNorm, InstanceNorm2d, LayerNorm, RMSNorm
from ._arrays import as_floats
from ._forms import BETA, GAMMA
from ._layers import (
    INSTANCE,
    arrays_of,
    build,
    check_norm,
    family_layer,
    layer_of,
    needs_eps,
    other_momentum,
)
from ._onnx_values import number, package, tensor_array

_SETTINGS = ("epsilon", "momentum", "spatial", "training_mode", "axis", "num_groups", "stash_type")
_ROLES = ("scale", "B", "input_mean", "input_var")
_BATCH = "BatchNormalization"


class Operator(NamedTuple):
    """A node other than BatchNormalization: its first opset and the inputs after x."""

    opset: int
    inputs: tuple[str, ...]
    needs: int  # how many of the inputs are required
    layer: type[Any]


FAMILY = {
    "InstanceNormalization": Operator(1, ("scale", "B"), 2, InstanceNorm2d),
    "LayerNormalization": Operator(17, ("scale", "B"), 1, LayerNorm),
    "GroupNormalization": Operator(21, ("scale", "bias"), 2, GroupNorm),
    "RMSNormalization": Operator(23, ("scale",), 1, RMSNorm),
}
OPERATORS = (_BATCH, *FAMILY)


class OnnxNode(NamedTuple):
    """A node of normalization in plain Python.

    Attributes
    ----------
    name : str
    opset : int
    inputs, outputs : tuple of str
        Their names. The first input is x, and the first output is y.
    attributes : dict of str to float or int
    initializers : dict of str to ndarray
        The other inputs, by name.
    op_type : str

    Examples
    --------
    >>> from cybn import BatchNorm2d, interop
    >>> sorted(interop.to_onnx(BatchNorm2d(2), "bn1").initializers)
    ['bn1.B', 'bn1.input_mean', 'bn1.input_var', 'bn1.scale']
    """

    name: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, float | int]
    initializers: dict[str, NDArray[Any]]
    op_type: str = _BATCH

    def protos(self) -> tuple[Any, list[Any]]:
        """Return a ``NodeProto`` and a list of ``TensorProto``, made by the package onnx.

        Raises
        ------
        ImportError
            If onnx is not installed.
        """
        onnx = package()
        node = onnx.helper.make_node(
            self.op_type,
            list(self.inputs),
            list(self.outputs),
            name=self.name,
            **self.attributes,
        )
        tensors = [onnx.numpy_helper.from_array(a, n) for n, a in self.initializers.items()]
        return node, tensors


def to_onnx(
    bn: Any,
    name: str = "bn",
    *,
    x: str = "x",
    y: str = "y",
    opset: int | None = None,
    training: bool = False,
    count: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> OnnxNode:
    """Return a layer as a node of normalization.

    The node of a batch, instance or group norm has its channels on axis 1, whatever the layer's
    `axis` is.

    Parameters
    ----------
    bn : layer
        A layer of any kind, which is not changed.
    name : str, default "bn"
        The name of the node; its initializers are called name.scale, name.B and so on.
    x, y : str
        Names of the input and of the output.
    opset : int, optional
        The opset of the node. None means 15 for a batch norm, and for other layers the first opset
        that has the node.
    training : bool, default False
        Whether the node of a batch norm normalizes with the statistics of the batch and returns new
        running statistics.
    count : int or array_like, optional
        As in `to_keras`: ONNX uses the biased variance.
    dtype : dtype, optional
        The type of the initializers: float32, float64, float16 or bfloat16. None means the type of
        the layer. In opsets before 15 it must be the type of x. Each value is rounded once.

    Returns
    -------
    OnnxNode
        Plain data with copies of the arrays; `protos` makes protocol buffers of it. If the node
        needs gamma and beta and the layer has none, they are ones and zeros.

    Raises
    ------
    TypeError, ValueError
        As in `to_keras`, and ValueError if `opset` is below the first that has the node, or a value
        does not fit `dtype`. With ``training=True`` ValueError is also raised if the momentum is
        None, `use_batch_statistics` or `update_statistics` is False, or the layer has ghost batches
        or renormalization.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> interop.to_onnx(cybn.BatchNorm2d(2), "bn1").op_type
    'BatchNormalization'
    """
    check_norm(bn)
    if isinstance(bn, BatchNorm) and not isinstance(bn, INSTANCE):
        node = _batch_node(bn, name, x, y, integer_from("opset", 15 if opset is None else opset, 7),
                           training, count)  # fmt: skip
    else:
        node = _family_node(bn, name, x, y, opset)
    arrays = {key: _cast(array, key, dtype) for key, array in node.initializers.items()}
    return node._replace(initializers=arrays)


def _batch_node(
    bn: BatchNorm, name: str, x: str, y: str, opset: int, training: bool, count: Any
) -> OnnxNode:
    if training and not (bn.use_batch_statistics in (None, True) and bn.update_statistics):
        raise ValueError(
            f"use_batch_statistics is {bn.use_batch_statistics} and update_statistics is "
            f"{bn.update_statistics}, so bn does not train as the node would; unfreeze() it, or "
            "leave training out"
        )
    if training and not (bn.virtual_batch_size is None and bn.renorm is None):
        raise ValueError(
            f"virtual_batch_size is {bn.virtual_batch_size} and renorm is {bn.renorm}; a node "
            "trains with whole batches and without renormalization. Leave training out, or convert "
            "a copy in which both are None"
        )
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


def _family_node(bn: Any, name: str, x: str, y: str, opset: int | None) -> OnnxNode:
    kind = next(
        kind
        for kind, operator in FAMILY.items()
        if isinstance(bn, INSTANCE if operator.layer is InstanceNorm2d else operator.layer)
    )
    first = FAMILY[kind].opset
    opset = first if opset is None else integer_from("opset", opset, first)
    arrays_of(bn, "keras", "", None)  # raises an error for a layer with running statistics
    attributes: dict[str, float | int] = {"epsilon": needs_eps(bn)}
    if isinstance(bn, GroupNorm):
        attributes["num_groups"] = bn.num_groups
        shape: tuple[int, ...] = (bn.num_channels,)
    elif isinstance(bn, INSTANCE):
        shape = (bn.num_features,)
    else:
        shape = bn.normalized_shape
        attributes["axis"] = -len(shape)
    scale = np.ones(shape, bn.dtype) if bn.gamma is None else bn.gamma.copy()
    given = [scale]
    if bn.beta is not None or FAMILY[kind].needs == 2:
        given.append(np.zeros(shape, bn.dtype) if bn.beta is None else bn.beta.copy())
    names = [f"{name}.{part}" for part in FAMILY[kind].inputs]
    arrays = dict(zip(names, given, strict=False))
    return OnnxNode(name, opset, (x, *arrays), (y,), attributes, arrays, kind)


def _cast(array: NDArray[Any], name: str, dtype: Any) -> NDArray[Any]:
    """Return an initializer in the type that was asked for."""
    if dtype is None:
        return array
    to = np.dtype(dtype)
    if to not in (np.float16, np.float32, np.float64) and not is_bfloat16(to):
        raise TypeError(f"dtype is {to}; it must be float32, float64, float16 or bfloat16")
    with np.errstate(all="ignore"):
        result = array.astype(to)
        lost = np.isfinite(array) & ~np.isfinite(result.astype(np.float64))
    if lost.any():
        raise ValueError(f"{name} has the value {array[lost][0]}, which does not fit {to}")
    return result


def from_onnx(
    node: Any,
    initializers: Mapping[str, Any] | None = None,
    *,
    axis: int = 1,
    layer: type[Any] | None = None,
    running_ddof: int | None = None,
    count: ArrayLike | None = None,
    state_ddof: int | None = None,
) -> Any:
    """Return a layer with the state and the settings of a node of normalization.

    Parameters
    ----------
    node : OnnxNode or onnx.NodeProto
        A BatchNormalization of any opset, or an InstanceNormalization, LayerNormalization,
        GroupNormalization (from opset 21, with a scale for each channel) or RMSNormalization.
    initializers : mapping of str to array_like or onnx.TensorProto, optional
        The arrays of the node's inputs by name. None means those of an `OnnxNode`.
    axis : int, default 1
        The channel axis of the new layer's input; 1 in ONNX.
    layer : type, optional
        The class of the result, `BatchNorm` by default. For an InstanceNormalization, which does
        not say how many axes its input has, the default is `InstanceNorm2d`.
    running_ddof, count, state_ddof
        As in `from_keras`.

    Returns
    -------
    layer
        A new layer with copies of the arrays. Settings that ONNX stores in float32 become the
        shortest decimal: 0.9, not 0.8999999761581421. `num_batches_tracked` is 0. Without a
        momentum, ONNX's default is used.

    Raises
    ------
    ValueError
        If the node is of another kind, `spatial` is 0, an input is not among the initializers, its
        data is broken or in another file, or `load_state_dict` rejects the arrays.
    TypeError
        If `node` is of another type.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> node = interop.to_onnx(cybn.BatchNorm2d(2), "bn1")
    >>> interop.from_onnx(node).num_features
    2
    """
    if isinstance(node, OnnxNode):
        inputs, attributes, found = node.inputs, dict(node.attributes), node.initializers
        initializers = found if initializers is None else initializers
    elif hasattr(node, "op_type") and hasattr(node, "attribute"):
        if node.op_type not in OPERATORS:
            raise ValueError(f"the node is a {node.op_type}; it must be a {', '.join(OPERATORS)}")
        inputs = tuple(node.input)
        attributes = {a.name: number(a) for a in node.attribute if a.name in _SETTINGS}
    else:
        raise TypeError(
            f"node is of type {type(node).__name__}; it must be an OnnxNode or an onnx.NodeProto"
        )
    known = {} if initializers is None else initializers
    if not attributes.get("spatial", 1):
        raise ValueError("the node has spatial=0, with statistics for each position; not supported")
    roles = _ROLES if node.op_type == _BATCH else FAMILY[node.op_type].inputs
    state = {}
    for key, role in zip(inputs[1:], roles, strict=False):
        if not key and role == "B":  # an optional input that is left out
            continue
        if key not in known:
            raise ValueError(f"the input {key!r}, {role} of the node, is not in initializers")
        state[role] = tensor_array(known[key], key)
    if node.op_type != _BATCH:
        return _from_family(node.op_type, attributes, state, axis, layer)
    momentum = attributes.get("momentum", 0.9)
    if isfinite(momentum) and not 0 <= momentum <= 1 and not attributes.get("training_mode"):
        momentum = 0.9
    options: dict[str, Any] = {
        "eps": attributes.get("epsilon", 1e-5),
        "momentum": other_momentum(momentum),
        "axis": axis,
    }
    kind = BatchNorm if layer is None else layer
    return build(state, "onnx", "", kind, running_ddof, count, state_ddof, **options)


def _from_family(
    kind: str, attributes: dict[str, Any], state: dict[str, Any], axis: int, layer: Any
) -> Any:
    """Return a layer other than a batch norm with the arrays of a node."""
    operator, eps = FAMILY[kind], attributes.get("epsilon", 1e-5)
    if missing := [role for role in operator.inputs[: operator.needs] if role not in state]:
        raise ValueError(f"the {kind} has no input {missing[0]}; the model is broken")
    group = {
        role: as_floats(state[name], name)
        for role, name in zip((GAMMA, BETA), operator.inputs, strict=False)
        if name in state
    }
    if operator.layer is InstanceNorm2d:
        return layer_of(group, InstanceNorm2d if layer is None else layer, eps=eps, axis=axis)
    if operator.layer is GroupNorm:
        return family_layer(group, GroupNorm, attributes.get("num_groups"), eps, axis)
    rank, lead = group[GAMMA].ndim, attributes.get("axis", -1)
    if lead < 0 and -lead != rank:
        raise ValueError(
            f"the {kind} normalizes {-lead} axes, and its scale has the shape "
            f"{group[GAMMA].shape}; a layer needs one value for each position"
        )
    return family_layer(group, operator.layer, None, eps, axis)


def _old_name(key: str) -> str:
    """Return the name that an initializer of opset 14 has in earlier opsets."""
    head, dot, leaf = key.rpartition(".")
    return head + dot + leaf.removeprefix("input_")
