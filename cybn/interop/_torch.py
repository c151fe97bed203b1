"""PyTorch: weight, bias, running_mean, running_var, num_batches_tracked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import ArrayLike, NDArray

from ..layers import BatchNorm
from ._layers import arrays_of, build


def from_torch(
    state: Mapping[str, Any],
    prefix: str = "",
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    axis: int = 1,
    layer: type[BatchNorm] = BatchNorm,
    running_ddof: int | None = None,
    count: ArrayLike | None = None,
) -> BatchNorm:
    """Return a layer with the state of a PyTorch batch norm.

    Parameters
    ----------
    state : mapping of str to array_like
        A state dict, of the module or of a whole model: tensors or arrays. Read only.
    prefix : str, default ""
        Where in `state` the module is, such as "layer1.0.bn1".
    eps, momentum : float
        The module's, which a state dict does not have. PyTorch's defaults, and cybn's.
    axis : int, default 1
        The channel axis of the new layer's input; 1 in PyTorch.
    layer : type, default BatchNorm
        `BatchNorm` or a form of it, such as `BatchNorm2d`.
    running_ddof : {None, 1, 0}
        None: the layer follows the unbiased variance, as PyTorch does. 0: the biased one from now
        on, and running_var is converted.
    count : int or array_like, optional
        Values of a channel in a training batch, N * S; needed where the variance is converted.

    Returns
    -------
    BatchNorm
        A new layer in training mode with copies of the arrays: float64 where one of them is, else
        float32. Without running statistics where `state` has none.

    Raises
    ------
    TypeError
        If `state` is no mapping, or an array is of a type or on a device that NumPy does not read.
    ValueError
        If there is no batch norm at `prefix`, or its arrays do not pass `load_state_dict`.
    """
    options = {"eps": eps, "momentum": momentum, "axis": axis}
    return build(state, "torch", prefix, layer, running_ddof, count, **options)


def to_torch(
    bn: BatchNorm, prefix: str = "", *, count: ArrayLike | None = None
) -> dict[str, NDArray[Any]]:
    """Return the state of a layer as PyTorch has it.

    Parameters
    ----------
    bn : BatchNorm
        Left as it is.
    prefix : str, default ""
        What the keys start with, without the dot.
    count : int or array_like, optional
        Values of a channel in a training batch, N * S. Where it is given and the layer follows the
        biased variance, running_var is converted to the unbiased one; else it goes over unchanged,
        and inference gives the same.

    Returns
    -------
    dict of str to ndarray
        Copies. ``{k: torch.from_numpy(v) for k, v in ...items()}`` makes a state dict of it.

    Raises
    ------
    TypeError, ValueError
        If `bn` is no layer, or has an activation, or `count`
        is not above 1.
    """
    return arrays_of(bn, "torch", prefix, count)


def torch_options(bn: BatchNorm) -> dict[str, Any]:
    """Return what to give ``torch.nn.BatchNorm1d``, ``2d`` or ``3d`` for a module like `bn`."""
    return {
        "num_features": bn.num_features,
        "eps": bn.eps,
        "momentum": bn.momentum,
        "affine": bn.affine,
        "track_running_stats": bn.track_running_stats,
    }
