"""Keras: gamma, beta, moving_mean, moving_variance; momentum weighs the old value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import ArrayLike, NDArray

from ..layers import BatchNorm
from ._layers import arrays_of, build, other_momentum


def from_keras(
    weights: Mapping[str, Any],
    prefix: str = "",
    *,
    epsilon: float = 1e-3,
    momentum: float = 0.99,
    axis: int = -1,
    layer: type[BatchNorm] = BatchNorm,
    running_ddof: int | None = None,
    count: ArrayLike | None = None,
) -> BatchNorm:
    """Return a layer with the weights of a Keras batch normalization.

    Parameters
    ----------
    weights : mapping of str to array_like
        By their paths, as from ``{w.path: w for w in model.weights}``. Read only.
    prefix : str, default ""
        Where in `weights` the layer is, such as "sequential/batch_normalization".
    epsilon, momentum, axis
        The Keras layer's, in Keras's sense: `momentum` weighs the old value. Keras's defaults.
    layer : type, default BatchNorm
        `BatchNorm` or a form of it, such as `BatchNorm2d`.
    running_ddof : {None, 0, 1}
        None: the layer follows the biased variance, as Keras does. 1: the unbiased one from now
        on, and running_var is converted.
    count : int or array_like, optional
        Values of a channel in a training batch, N * S; needed where the variance is converted.

    Returns
    -------
    BatchNorm
        A new layer in training mode with copies of the arrays; its `momentum` is 1 - `momentum`,
        taken in decimal. A scale or a center that Keras left out is 1 or 0. Keras counts no
        batches: `num_batches_tracked` is 0.

    Raises
    ------
    TypeError, ValueError
        As in `from_torch`.
    """
    options = {"eps": epsilon, "momentum": other_momentum(momentum), "axis": axis}
    return build(weights, "keras", prefix, layer, running_ddof, count, **options)


def to_keras(
    bn: BatchNorm, prefix: str = "", *, count: ArrayLike | None = None
) -> dict[str, NDArray[Any]]:
    """Return the state of a layer as Keras has it.

    Parameters
    ----------
    bn : BatchNorm
        Left as it is.
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
        If `bn` is no layer, or has an activation or no running statistics, or `count` is not
        above 1.
    """
    return arrays_of(bn, "keras", prefix, count)


def keras_options(bn: BatchNorm) -> dict[str, Any]:
    """Return what to give ``keras.layers.BatchNormalization`` for a layer like `bn`.

    Raises
    ------
    ValueError
        If the momentum is None: Keras has no mean of all batches.
    """
    return {
        "axis": bn.axis,
        "momentum": other_momentum(bn.momentum),
        "epsilon": bn.eps,
        "center": bn.affine,
        "scale": bn.affine,
    }
