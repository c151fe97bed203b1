"""PyTorch: weight, bias, running_mean, running_var, num_batches_tracked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import ArrayLike, NDArray

from ..layers import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from ._layers import arrays_of, build


def from_torch(
    state: Mapping[str, Any],
    prefix: str = "",
    *,
    eps: float | None = None,
    momentum: float | None = 0.1,
    axis: int = 1,
    layer: type[Any] = BatchNorm,
    running_ddof: int | None = None,
    count: ArrayLike | None = None,
    state_ddof: int | None = None,
    num_groups: int | None = None,
) -> Any:
    """Return a layer with the state of a PyTorch batch norm, or another of its normalizations.

    Parameters
    ----------
    state : mapping of str to array_like
        A state dict, of the module or of a whole model: tensors or arrays. Read only.
    prefix : str, default ""
        Where in `state` the module is, such as "layer1.0.bn1".
    eps, momentum : float
        The module's, which a state dict does not have. PyTorch's defaults, and cybn's: an eps of
        None is 1e-5, and for an RMSNorm None itself.
    axis : int, default 1
        The channel axis of the new layer's input; 1 in PyTorch.
    layer : type, default BatchNorm
        `BatchNorm` or a form of it, such as `BatchNorm2d`; or an `InstanceNorm1d`, `2d` or `3d`,
        `LayerNorm`, `RMSNorm` or `GroupNorm`, where the state is that of one.
    running_ddof : {None, 1, 0}
        None: the layer follows the variance of the state, unbiased as PyTorch has it. 0: the
        biased one from now on, and running_var is converted.
    count : int or array_like, optional
        Values of a channel in a training batch, N * S; needed where the variance is converted.
    state_ddof : {None, 0, 1}
        Which variance the state has, where it is not that of the library: 0 biased, 1 unbiased.
    num_groups : int, optional
        Of a GroupNorm, which a state dict does not have either.

    Returns
    -------
    layer
        A new one in training mode with copies of the arrays: float64 where one of them is, else
        float32. Without running statistics where `state` has none. A weight or a bias that stands
        alone is joined by a bias of 0 or a weight of 1; counts of batches that are floats, as in
        averaged checkpoints, are rounded.

    Raises
    ------
    TypeError
        If `state` is no mapping, or an array is of a type or on a device that NumPy does not read.
    ValueError
        If there is no such layer at `prefix`, it is parametrized or pruned, or its arrays do not
        pass `load_state_dict`.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> interop.from_torch(interop.to_torch(cybn.BatchNorm2d(2))).num_features
    2
    """
    if eps is None and not issubclass(layer, RMSNorm):
        eps = 1e-5
    options: dict[str, Any] = {"eps": eps, "momentum": momentum, "axis": axis}
    given: Any = (layer, running_ddof, count, state_ddof, num_groups)
    return build(state, "torch", prefix, *given, **options)


def to_torch(
    bn: Any, prefix: str = "", *, count: ArrayLike | None = None
) -> dict[str, NDArray[Any]]:
    """Return the state of a layer as PyTorch has it.

    Parameters
    ----------
    bn : layer
        Of any kind that cybn has; left as it is. Its mode and switches stay behind.
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
        If `bn` is no layer, or has an activation or `use_batch_statistics`, or `count` is not
        above 1.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> sorted(interop.to_torch(cybn.BatchNorm2d(2)))
    ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    return arrays_of(bn, "torch", prefix, count)


def torch_options(bn: Any) -> dict[str, Any]:
    """Return what to give the module of ``torch.nn`` of the same name for one like `bn`.

    Parameters
    ----------
    bn : Layer
        Any layer of cybn.

    Returns
    -------
    dict
        Arguments of the module's constructor, by name.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> interop.torch_options(cybn.BatchNorm2d(2))["momentum"]
    0.1
    """
    if isinstance(bn, LayerNorm | RMSNorm):
        shape = {"normalized_shape": bn.normalized_shape, "eps": bn.eps}
        bias = {"bias": bn.beta is not None} if isinstance(bn, LayerNorm) else {}
        return shape | {"elementwise_affine": bn.elementwise_affine} | bias
    if isinstance(bn, GroupNorm):
        groups = {"num_groups": bn.num_groups, "num_channels": bn.num_channels}
        return groups | {"eps": bn.eps, "affine": bn.affine}
    return {
        "num_features": bn.num_features,
        "eps": bn.eps,
        "momentum": bn.momentum,
        "affine": bn.affine,
        "track_running_stats": bn.track_running_stats,
    }
