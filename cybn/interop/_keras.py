"""Keras: gamma, beta, moving_mean, moving_variance; momentum weighs the old value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import ArrayLike, NDArray

from ..layers import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from ._layers import INSTANCE, arrays_of, build, check_norm, needs_eps, other_momentum


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
        The weights by path, as in ``{w.path: w for w in model.weights}``. They are not changed.
    prefix : str, default ""
        The path of the layer in `weights`, such as "sequential/batch_normalization".
    epsilon, momentum, axis
        The settings of the Keras layer, with Keras's meaning: `momentum` is the weight of the old
        value. An epsilon of None is Keras's default, 1e-6 for an RMSNorm and 1e-3 for all others.
    layer : type, default BatchNorm
        As in `from_torch`.
    running_ddof : {None, 0, 1}
        With None the layer continues with the kind of variance in the weights, which is biased in
        Keras. With 1 it uses the unbiased variance from now on, and running_var is converted.
    count : int or array_like, optional
        The number of values per channel in a training batch, N * S; needed if the variance is
        converted.
    state_ddof : {None, 0, 1}
        The kind of variance in the weights. None means biased. Pass 1 for weights from TensorFlow's
        fused kernel, which Keras 2 and TF1 use for inputs with 4 axes.
    num_groups : int, optional
        The number of groups of a GroupNorm, ``groups`` in Keras.

    Returns
    -------
    layer
        A new layer in training mode with copies of the arrays. Its `momentum` is 1 - `momentum`,
        computed in decimal. If only one of gamma and beta is there, the other becomes 1 or 0.
        `num_batches_tracked` is 0, because Keras does not count batches.

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
    """Return the state of a layer in Keras's form.

    Parameters
    ----------
    bn : layer
        A layer of any kind, which is not changed. An instance norm is a GroupNormalization in
        Keras.
    prefix : str, default ""
        The beginning of the keys, without the slash.
    count : int or array_like, optional
        The number of values per channel in a training batch, N * S. If it is given and the layer
        has the unbiased variance, running_var is converted to the biased one. Otherwise it is
        copied unchanged, and inference gives the same results.

    Returns
    -------
    dict of str to ndarray
        Copies, in the order of Keras: ``layer.set_weights(list(...values()))`` takes them. gamma
        and beta are missing if the layer has none.

    Raises
    ------
    TypeError, ValueError
        If `bn` is not a layer, has an activation or `use_batch_statistics`, is a batch norm without
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
    """Return the settings for the corresponding layer of ``keras.layers``.

    That is a BatchNormalization, LayerNormalization, RMSNormalization or GroupNormalization. An
    instance norm is a GroupNormalization, too. A batch norm after `freeze` has ``trainable=False``.

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
    TypeError, ValueError
        As in `torch_options`, and if the momentum or eps is None, because Keras supports neither
        the mean of all batches nor an epsilon that depends on the input's dtype.

    Examples
    --------
    >>> import cybn
    >>> from cybn import interop
    >>> interop.keras_options(cybn.BatchNorm2d(2))["momentum"]
    0.9
    """
    check_norm(bn)
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
