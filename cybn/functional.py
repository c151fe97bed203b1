"""Batch normalization as functions of arrays, without state.

Each function passes its arguments on to the dispatch, which checks them, reshapes the arrays to
(N, C, S), allocates, and calls one kernel. Nothing is written before every check has passed.

N = everything before the channel axis, C = channels, S = everything after it.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike, NDArray

from . import _dispatch
from ._arguments import channel_axis_of
from ._dispatch import Positions, choose
from ._gradients import batch_norm_backward, batch_norm_inference_backward
from ._moments import Moments
from ._words import Activation, Masked

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "moments",
]


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: Activation | None = None,
    slope: float = 0.01,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: Masked = "normalize",
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], Moments]:
    """Normalize each channel with the mean and biased variance of this batch.

    ``y = f((x - mean) / sqrt(var + eps) * gamma + beta + residual)`` (Ioffe and Szegedy 2015,
    Algorithm 1), where f is the activation.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, at least 2 axes
        The batch. It is read without a copy if its memory is contiguous in any order of its axes,
        or channels-first and sliced along N or C; otherwise it is copied first. Half types
        (bfloat16 is that of ml_dtypes) are computed in float32, and results are rounded to nearest
        even. Values that are too large for the type become infinite.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, float32 or float64. None means 1 and 0.
    axis : int, default 1
        The channel axis. Negative numbers count from the end.
    eps : float, default 1e-5
        A positive number that is added to the variance.
    activation : {None, "relu", "relu6", "leaky_relu", "hardswish", "sigmoid", "tanh", "silu", \
            "gelu"}
        The function f, computed in the same pass. gelu is the exact one, with erf. NaN stays NaN,
        and -0.0 stays -0.0 if f(0) is 0. At 0, relu, relu6 and leaky_relu use the derivative of the
        negative side.
    slope : float, default 0.01
        The slope of leaky_relu for negative arguments.
    residual : array_like, shape and dtype of `x`, optional
        It is added before the activation. If its memory layout is not that of `x`, it is copied.
    mask : array_like of bool, optional
        True for positions that are used, in all channels alike. Its shape is broadcastable to that
        of `x` without the channel axis, such as (N, L) for (N, C, L) and (N, L, C). It may also
        have that axis, with size 1. Other values are left out of the statistics, and may be NaN.
    weights : array_like, optional
        How often each position counts: finite and not negative, with a shape as for `mask`. A
        weight of 0 has the effect of a mask. Weights are rounded to the type of the computation,
        which is float32 for half types.
    lengths : array_like of int, shape (N,), optional
        How many positions of each sample are used, from the front, along the first axis that is
        neither samples nor channels (L above). If several of `mask`, `weights` and `lengths` are
        given, a position must be used by all of them.
    masked : {"normalize", "zero"}, default "normalize"
        At positions that are not used, "normalize" treats y like the rest and "zero" sets it to 0,
        also with an activation and a residual.
    out : ndarray, optional
        Array for y, with the shape and dtype of `x`. It may be `x` or `residual` itself, but must
        not overlap them in part, and its values must not share memory. It is written without a copy
        if it has the memory layout of `x`.
    num_threads : int, optional
        Threads for this call. None means `cybn.get_num_threads`. Results are bitwise identical for
        any number.

    Returns
    -------
    y : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    moments : Moments
        Count, mean and M2 of each channel, in float64. The count is N * S, or the number of
        positions that are used, or the sum of the weights, a float.

    Raises
    ------
    TypeError
        If an array has another dtype, or `gamma` or `beta` has a half type.
    ValueError
        If a shape does not fit, a channel has fewer than two used values, `eps` is not positive,
        `activation` or `masked` is unknown, a weight is negative or not finite, or `out` is
        read-only, has values that share memory, or overlaps an input in part.
    RuntimeError
        If another thread changes the shape of `x` during the call.

    Notes
    -----
    For float32, mean and variance come from float64 sums of short float32 sums, centred near the
    mean. The error of y stays below ``2**-21 * (|gamma * xhat| + |gamma| + |beta|)`` as long as the
    mean is at most 1e6 standard deviations. If x repeats a few values (a broadcast or periodic
    array), the bound is four times as large, because rounding errors then add up (docs/math.md,
    6.5).

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> y, m = cybn.batch_norm(np.array([[1.0], [3.0]]), eps=1e-12)
    >>> y.ravel().round(6), m.mean, m.var()
    (array([-1.,  1.]), array([2.]), array([1.]))
    """
    settings, selected = (axis, eps, activation, slope), (mask, weights, lengths, masked)
    return _dispatch.forward(x, gamma, beta, residual, settings, selected, out, num_threads)


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: Activation | None = None,
    slope: float = 0.01,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: Masked = "normalize",
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """Normalize each channel with a given mean and variance.

    ``y = f((x - mean) / sqrt(var + eps) * gamma + beta + residual)``.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, at least 2 axes
        As in `batch_norm`, but it may be empty.
    mean, var : array_like, shape (C,)
        Mean and variance of each channel, float32 or float64. A float64 mean is used with its full
        precision, also for float32 data.
    gamma, beta, axis, activation, slope, residual, out, num_threads
        As in `batch_norm`.
    mask, weights, lengths, masked
        As in `batch_norm`. They matter only with ``masked="zero"``, which writes 0 at positions
        that are not used or have weight 0.
    eps : float, default 1e-5
        A number that is added to the variance. It must not be negative.

    Returns
    -------
    ndarray
        `out`, or a new array with the dtype and memory layout of `x`.

    Raises
    ------
    TypeError, RuntimeError
        As in `batch_norm`, also for a `mean` or `var` of a half type.
    ValueError
        As in `batch_norm`, but any number of values is allowed, and `eps` may be 0.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> x = np.array([[8.0], [12.0]])
    >>> cybn.batch_norm_inference(x, mean=np.array([10.0]), var=np.array([4.0])).round(2)
    array([[-1.],
           [ 1.]])
    """
    settings, selected = (axis, eps, activation, slope), (mask, weights, lengths, masked)
    return _dispatch.inference(
        x, mean, var, gamma, beta, residual, settings, selected, out, num_threads
    )


def moments(
    x: ArrayLike,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    num_threads: int | None = None,
) -> Moments:
    """Return count, mean and M2 of each channel of `x`, as `batch_norm` computes them.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, at least 2 axes
        It needs at least one used value per channel.
    axis, mask, weights, lengths, num_threads
        As in `batch_norm`.

    Returns
    -------
    Moments
        They are float64. Merge those of several arrays with `Moments.merge`.

    Raises
    ------
    TypeError
        If `x` has another dtype.
    ValueError
        If `x` has fewer than 2 axes, or a channel has no used values.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> cybn.moments(np.array([[1.0, 10.0], [3.0, 30.0]]))
    Moments(count=2, mean=[ 2., 20.], var=[  1., 100.])
    """
    selected = mask, weights, lengths, "normalize"
    return _dispatch.statistics(x, axis, selected, num_threads)


def absorb(
    mean: NDArray[Any], var: NDArray[Any], batch: Moments, weight: float, ddof: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Update running statistics with those of a batch, as a layer does in training.

    The result is ``(1 - weight) * running + weight * batch``, computed in float64 and rounded once.
    A term with weight 0 is skipped, and may be NaN.

    Parameters
    ----------
    mean, var : ndarray, shape (C,)
        Running mean and variance, of one float type. They are not changed.
    batch : Moments
        Moments of the batch, with more than `ddof` values per channel.
    weight : float
        Weight of the batch, in [0, 1].
    ddof : int
        1 for the unbiased variance of the batch, 0 for the biased one.

    Returns
    -------
    mean, var : ndarray, shape (C,)
        New arrays.

    Raises
    ------
    ValueError
        If `batch` has another number of channels.
    """
    if len(batch) != mean.size:
        raise ValueError(f"batch has {len(batch)} channels; it must have {mean.size}")
    return _dispatch.absorb(mean, var, batch.mean, batch.m2, batch._degrees(ddof), weight)


def positions_of(
    x: NDArray[Any],
    axis: int,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> Positions | None:
    """Return which positions of `x` are used, or None if all are used once."""
    return choose(x.shape, channel_axis_of(x.shape, axis), mask, weights, lengths)


def is_zero(masked: str) -> bool:
    """Return whether masked values become 0; raise ValueError if `masked` is unknown."""
    if masked not in ("normalize", "zero"):
        raise ValueError(f"masked is {masked!r}; it must be 'normalize' or 'zero'")
    return masked == "zero"
