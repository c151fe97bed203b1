"""Group and instance normalization: functions of arrays, like those in `family`."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike, NDArray

from . import _by_sample
from ._arguments import integer_from
from ._moments import Moments
from ._words import Masked

__all__ = ["group_norm", "group_norm_backward", "instance_norm", "instance_norm_backward"]


# ---- group normalization -----------------------------------------------------------------


def group_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    num_groups: int,
    axis: int = 1,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: Masked = "normalize",
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], Moments]:
    """Normalize each group of neighbouring channels of each sample.

    ``y = (x - mean) / sqrt(var + eps) * gamma + beta``, with mean and biased variance taken over
    the C / `num_groups` channels of a group and all positions (Wu and He 2018).

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, at least 2 axes
        Samples along axis 0. It is read without a copy if each sample is dense in memory, with its
        channels first or last; otherwise it is copied first.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, float32 or float64. None means 1 and 0. They are rounded to
        the type of the computation: float64 for float64, otherwise float32.
    num_groups : int
        Number of groups; C must be a multiple of it.
    axis : int, default 1
        The channel axis, not that of the samples; negative numbers count from the end.
    mask : array_like of bool, optional
        True for positions that are used, in all channels of a sample alike. Its shape is
        broadcastable to that of `x` without the channel axis, such as (N, L) for (N, C, L) and (N,
        L, C). Masked values are left out of the statistics of their sample, and may be NaN.
    lengths : array_like of int, shape (N,), optional
        How many positions of each sample are used, from the front, along the first axis that is
        neither samples nor channels (L above). With a mask as well, a position must be used by
        both.
    masked : {"normalize", "zero"}, default "normalize"
        At positions that are not used, "normalize" treats y like the rest and "zero" sets it to 0.
    eps, out, num_threads
        As in `layer_norm`.

    Returns
    -------
    y : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    moments : Moments
        Count, mean and M2 of the N * `num_groups` groups of all samples, one sample after the
        other. The count is an array, with one count per group, if a mask or lengths exclude values.

    Raises
    ------
    TypeError
        If an array has another dtype, or `num_groups` is not an int.
    ValueError
        As in `layer_norm`, and if the channels cannot be divided into `num_groups` groups, if `x`
        has one sample and one value per group, or if a mask or lengths do not fit `x`, or leave
        fewer than two values in a group of a sample.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> y, m = cybn.group_norm(x, num_groups=2, eps=1e-12)
    >>> y.round(6), m.mean
    (array([[-1.,  1., -1.,  1.]]), array([ 2., 20.]))
    """
    settings = axis, integer_from("num_groups", num_groups), eps
    return _by_sample.forward(x, gamma, beta, settings, (mask, lengths, masked), out, num_threads)


def group_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    *,
    num_groups: int,
    axis: int = 1,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: Masked = "normalize",
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the gradients of `group_norm`.

    Parameters
    ----------
    dy, x, moments, out
        As in `layer_norm_backward`; `moments` are those that `group_norm` returned.
    gamma, num_groups, axis, eps, mask, lengths, num_threads
        As given to `group_norm`.
    masked : {"normalize", "zero"}, default "normalize"
        As given to `group_norm`. With "normalize", dy is used also at masked positions, because y
        there depends on `x`, gamma and beta. With "zero" dy is ignored there, and dx is 0.

    Returns
    -------
    dx : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    dgamma, dbeta : ndarray, shape (C,)
        They have the dtype of `gamma`. If that is None, they have the dtype of `x`, or float32 for
        half types.

    Raises
    ------
    TypeError, ValueError
        As in `layer_norm_backward` and `group_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> x = np.random.default_rng(0).standard_normal((2, 4, 3))
    >>> y, moments = cybn.group_norm(x, num_groups=2)
    >>> dx, dgamma, dbeta = cybn.group_norm_backward(np.ones_like(x), x, moments, num_groups=2)
    >>> dbeta
    array([6., 6., 6., 6.])
    """
    settings = axis, integer_from("num_groups", num_groups), eps
    return _by_sample.backward(
        dy, x, moments, gamma, settings, (mask, lengths, masked), out, num_threads
    )


# ---- instance normalization --------------------------------------------------------------


def instance_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: Masked = "normalize",
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], Moments]:
    """Normalize each channel of each sample over its positions.

    ``y = (x - mean) / sqrt(var + eps) * gamma + beta`` (Ulyanov, Vedaldi and Lempitsky 2016).
    This is `group_norm` with a group for each channel.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, at least 3 axes
        As in `group_norm`, with more than one position.
    gamma, beta, axis, eps, mask, lengths, masked, out, num_threads
        As in `group_norm`.

    Returns
    -------
    y : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    moments : Moments
        Count, mean and M2 of the N * C channels of all samples, one sample after the other. The
        count is as in `group_norm`.

    Raises
    ------
    TypeError
        If an array has another dtype.
    ValueError
        As in `group_norm`, and if a channel has only one position.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> y, m = cybn.instance_norm(np.array([[[1.0, 3.0], [5.0, 9.0]]]), eps=1e-12)
    >>> y.round(6), m.mean
    (array([[[-1.,  1.],
            [-1.,  1.]]]), array([2., 7.]))
    """
    selected = mask, lengths, masked
    return _by_sample.forward(x, gamma, beta, (axis, 0, eps), selected, out, num_threads)


def instance_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: Masked = "normalize",
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the gradients of `instance_norm`.

    Parameters
    ----------
    dy, x, moments, out
        As in `layer_norm_backward`; `moments` are those that `instance_norm` returned.
    gamma, axis, eps, mask, lengths, masked, num_threads
        As given to `instance_norm`. For `masked` see `group_norm_backward`.

    Returns
    -------
    dx : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    dgamma, dbeta : ndarray, shape (C,)
        They have the dtype of `gamma`. If that is None, they have the dtype of `x`, or float32 for
        half types.

    Raises
    ------
    TypeError, ValueError
        As in `layer_norm_backward` and `instance_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> x = np.random.default_rng(0).standard_normal((2, 4, 3))
    >>> y, moments = cybn.instance_norm(x)
    >>> dx, dgamma, dbeta = cybn.instance_norm_backward(np.ones_like(x), x, moments)
    >>> dbeta
    array([6., 6., 6., 6.])
    """
    selected = mask, lengths, masked
    return _by_sample.backward(dy, x, moments, gamma, (axis, 0, eps), selected, out, num_threads)
