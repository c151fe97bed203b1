"""Keras: gamma, beta, moving_mean, moving_variance; momentum weighs the old value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import ArrayLike, NDArray

from ..layers import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from ._layers import INSTANCE, arrays_of, build, needs_eps, other_momentum


def from_keras(
    weights: Mapping[str, Any],
    prefix: str = "",
    *,
    epsilon: float | None = None,
    momentum: float = 0.99,
    axis: int = -1,
    layer: type[Any] = BatchNorm,
    running_ddof: int | None = None,
    count: ArrayLike | None = None,
    state_ddof: int | None = None,
    num_groups: int | None = None,
) -> Any:
    """Return a layer with the weights of a Keras batch normalization, or another normalization.

    Parameters
    ----------
    weights : mapping of str to array_like
        By their paths, as from ``{w.path: w for w in model.weights}``. Read only.
    prefix : str, default ""
        Where in `weights` the layer is, such as "sequential/batch_normalization".
    epsilon, momentum, axis
        The Keras layer's, in Keras's sense: `momentum` weighs the old value. Keras's defaults:
        an epsilon of None is 1e-3, and 1e-6 for an RMSNorm.
    layer : type, default BatchNorm
        As in `from_torch`.
    running_ddof : {None, 0, 1}
        None: the layer follows the variance of the weights, biased as Keras has it. 1: the unbiased
        one from now on, and running_var is converted.
    count : int or array_like, optional
        Values of a channel in a training batch, N * S; needed where the variance is converted.
    state_ddof : {None, 0, 1}
        Which variance the weights have, where it is not the biased one: 1 for what TensorFlow's
        fused kernel left, which Keras 2 and TF1 use for inputs of 4 axes.
    num_groups : int, optional
        Of a GroupNorm: Keras' ``groups``.

    Returns
    -------
    layer
        A new one in training mode with copies of the arrays; its `momentum` is 1 - `momentum`,
        taken in decimal. A scale or a center that Keras left out is 1 or 0. Keras counts no
        batches: `num_batches_tracked` is 0.

    Raises
    ------
    TypeError, ValueError
        As in `from_torch`.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> interop.from_keras(interop.to_keras(cybn.BatchNorm2d(2))).num_features
    2
    """
    if epsilon is None:
        epsilon = 1e-6 if issubclass(layer, RMSNorm) else 1e-3
    options: dict[str, Any] = {"eps": epsilon, "momentum": other_momentum(momentum), "axis": axis}
    given: Any = (layer, running_ddof, count, state_ddof, num_groups)
    return build(weights, "keras", prefix, *given, **options)


def to_keras(
    bn: Any, prefix: str = "", *, count: ArrayLike | None = None
) -> dict[str, NDArray[Any]]:
    """Return the state of a layer as Keras has it.

    Parameters
    ----------
    bn : layer
        Of any kind that cybn has; left as it is. An instance norm is a GroupNormalization there.
    prefix : str, default ""
        What the keys start with, without the slash.
    count : int or array_like, optional
        Values of a channel in a training batch, N * S. Where it is given and the layer follows the
        unbiased variance, running_var is converted to the biased one; else it goes over unchanged,
        and inference gives the same.

    Returns
    -------
    dict of str to ndarray
        Copies, in the order of Keras: ``layer.set_weights(list(...values()))`` takes them. Without
        gamma and beta where the layer has none.

    Raises
    ------
    TypeError, ValueError
        If `bn` is no layer, or has an activation or `use_batch_statistics`, is a batch norm without
        running statistics or an instance norm with them, or `count` is not above 1.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> sorted(interop.to_keras(cybn.BatchNorm2d(2)))
    ['beta', 'gamma', 'moving_mean', 'moving_variance']
    """
    arrays = arrays_of(bn, "keras", prefix, count)
    if isinstance(bn, RMSNorm):
        return {key.removesuffix("gamma") + "scale": array for key, array in arrays.items()}
    return arrays


def keras_options(bn: Any) -> dict[str, Any]:
    """Return what to give the layer of ``keras.layers`` for one like `bn`.

    A BatchNormalization, LayerNormalization, RMSNormalization or GroupNormalization; the last for
    an instance norm, too. A batch norm that `freeze` was called on has ``trainable=False``.

    Parameters
    ----------
    bn : Layer
        Any layer of cybn.

    Returns
    -------
    dict
        Arguments of the layer's constructor, by name.

    Raises
    ------
    ValueError
        If the momentum or eps is None: Keras has neither the mean of all batches nor an epsilon
        of the input's type.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> interop.keras_options(cybn.BatchNorm2d(2))["momentum"]
    0.9
    """
    if isinstance(bn, LayerNorm | RMSNorm):
        axes = list(range(-len(bn.normalized_shape), 0))
        options: dict[str, Any] = {"axis": axes if len(axes) > 1 else -1, "epsilon": needs_eps(bn)}
        if isinstance(bn, RMSNorm):
            return options
        return options | {"center": bn.beta is not None, "scale": bn.gamma is not None}
    shared = {"axis": bn.axis, "epsilon": bn.eps, "center": bn.affine, "scale": bn.affine}
    if isinstance(bn, (GroupNorm, *INSTANCE)):
        groups = bn.num_groups if isinstance(bn, GroupNorm) else bn.num_features
        return {"groups": groups} | shared
    frozen = (bn.update_statistics, bn.use_batch_statistics, bn.train_affine) == (False,) * 3
    trainable = {"trainable": False} if frozen else {}
    return {"momentum": other_momentum(bn.momentum)} | shared | trainable
