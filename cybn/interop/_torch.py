"""PyTorch: weight, bias, running_mean, running_var, num_batches_tracked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import ArrayLike, NDArray

from ..layers import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from ._layers import arrays_of, build, check_norm


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
        A state dict of the module or of a whole model, with tensors or arrays. It is not changed.
    prefix : str, default ""
        The path of the module in `state`, such as "layer1.0.bn1".
    eps, momentum : float
        The settings of the module, which a state dict does not have. An eps of None means PyTorch's
        default: 1e-5, or for an RMSNorm the machine epsilon of the input's dtype.
    axis : int, default 1
        The channel axis of the new layer's input; 1 in PyTorch.
    layer : type, default BatchNorm
        The class of the result: `BatchNorm` or `BatchNorm1d` to `3d`; or `InstanceNorm1d` to `3d`,
        `LayerNorm`, `RMSNorm` or `GroupNorm`, if the state is that of such a layer.
    running_ddof : {None, 1, 0}
        With None the layer continues with the kind of variance in the state, which is unbiased in
        PyTorch. With 0 it uses the biased variance from now on, and running_var is converted.
    count : int or array_like, optional
        The number of values per channel in a training batch, N * S; needed if the variance is
        converted.
    state_ddof : {None, 0, 1}
        The kind of variance in the state: 0 for biased, 1 for unbiased. None means unbiased, as in
        PyTorch.
    num_groups : int, optional
        The number of groups of a GroupNorm, which a state dict does not have either.

    Returns
    -------
    layer
        A new layer in training mode with copies of the arrays, in float64 if one of them is, else
        in float32. It has running statistics if `state` has them. If only one of weight and bias is
        there, the other becomes 1 or 0. A `num_batches_tracked` that is a float, as in averaged
        checkpoints, is rounded.

    Raises
    ------
    TypeError
        If `state` is not a mapping, or NumPy cannot read the type or the device of an array.
    ValueError
        If there is no such layer at `prefix`, it is parametrized or pruned, or `load_state_dict`
        rejects its arrays.

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
    """Return the state of a layer in PyTorch's form.

    Parameters
    ----------
    bn : layer
        A layer of any kind, which is not changed. Its mode and switches are not transferred.
    prefix : str, default ""
        The beginning of the keys, without the dot.
    count : int or array_like, optional
        The number of values per channel in a training batch, N * S. If it is given and the layer
        has the biased variance, running_var is converted to the unbiased one. Otherwise it is
        copied unchanged, and inference gives the same results.

    Returns
    -------
    dict of str to ndarray
        Copies. ``{k: torch.from_numpy(v) for k, v in ...items()}`` makes a state dict of them.

    Raises
    ------
    TypeError, ValueError
        If `bn` is not a layer, or has an activation or `use_batch_statistics`, or `count` is not
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
    """Return the settings for the module of the same name in ``torch.nn``.

    Parameters
    ----------
    bn : Layer
        Any layer of cybn.

    Returns
    -------
    dict
        Arguments of the module's constructor, by name.

    Raises
    ------
    TypeError, ValueError
        If `bn` is not a layer, or has an activation or `use_batch_statistics`.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> interop.torch_options(cybn.BatchNorm2d(2))["momentum"]
    0.1
    """
    check_norm(bn)
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
