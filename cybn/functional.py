"""Functions that remember nothing: arrays in, arrays out.

Each passes its arguments on to the dispatch, which checks them, folds the arrays to (N, C, S),
allocates, and calls one kernel. Nothing is written before every check has passed.

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
        The batch. Read in place where its memory is contiguous in any order of its axes, or
        channels-first and sliced along N or C; copied first where it is not. Half types (bfloat16
        is that of ml_dtypes) are widened to float32 as they are read, and results are rounded to
        them, to nearest even; what is beyond their largest value becomes infinite.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, float32 or float64; 1 and 0 where None.
    axis : int, default 1
        The channel axis; negative counts from the end.
    eps : float, default 1e-5
        Added to the variance. Positive.
    activation : {None, "relu", "relu6", "leaky_relu", "hardswish", "sigmoid", "tanh", "silu", \
            "gelu"}
        f, computed before y leaves the cache. gelu is the exact one, by erf. NaN stays NaN, and
        where f(0) is 0, -0.0 stays -0.0. At 0, relu, relu6 and leaky_relu use the derivative of
        the negative side.
    slope : float, default 0.01
        Of leaky_relu below 0.
    residual : array_like, shape and dtype of `x`, optional
        Added before the activation. Copied first where it does not lie in memory as `x` does.
    mask : array_like of bool, optional
        True where a position counts, in all channels alike: broadcastable to the shape of `x`
        without its channel axis, such as (N, L) for (N, C, L) and (N, L, C); or with as many
        axes as `x`, of size 1 along that one. Masked values are left out of the statistics,
        and may be NaN there.
    weights : array_like, optional
        How often each position counts: finite, not negative, and of a shape as that of `mask`. A
        weight of 0 masks out. Held in the type that is computed in, float32 for half types too.
    lengths : array_like of int, shape (N,), optional
        How many positions of each sample count, from the front, along the first axis beside those
        of batch and channels, such as L. Where several of the three are given, all must agree.
    masked : {"normalize", "zero"}, default "normalize"
        What y is where a position does not count: normalized like the rest, or 0, also with an
        activation and a residual.
    out : ndarray, optional
        Where y goes: shape and dtype of `x`. May be `x` or `residual` itself; must not overlap
        them otherwise, nor hold two values at one place. With the memory layout of `x` it is
        written in place, without a copy.
    num_threads : int, optional
        Threads for this call; `cybn.get_num_threads` where None. Results are the same bits for
        any number.

    Returns
    -------
    y : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    moments : Moments
        Count, mean and M2 of each channel, in float64. Count is N * S, or how many positions
        count, or the sum of the weights, a float.

    Raises
    ------
    TypeError
        If an array is of another dtype; `gamma` and `beta` are of no half type.
    ValueError
        If a shape does not fit, a channel has fewer than two values that count, `eps` is not
        positive, `activation` or `masked` is unknown, a weight is negative or not finite, or `out`
        is read-only, has several values at one place, or overlaps an input in part.
    RuntimeError
        If another thread gives `x` a new shape during the call.

    Notes
    -----
    For float32, mean and variance come from float64 sums of short float32 sums, centred near the
    mean; the error of y stays below ``2**-21 * (|gamma * xhat| + |gamma| + |beta|)`` while the
    mean is no larger than 1e6 standard deviations. If x repeats a few values (a
    broadcast or periodic array), the bound is four times as large, because rounding errors then add
    up (docs/math.md, 6.5).

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
        As in `batch_norm`; may be empty.
    mean, var : array_like, shape (C,)
        Mean and variance of each channel, float32 or float64. A float64 mean is used in full
        with float32 data too.
    gamma, beta, axis, activation, slope, residual, out, num_threads
        As in `batch_norm`.
    mask, weights, lengths, masked
        As in `batch_norm`. They matter only with ``masked="zero"``, which puts 0 where a position
        does not count, or has weight 0.
    eps : float, default 1e-5
        Added to the variance. Not negative.

    Returns
    -------
    ndarray
        `out`, or a new array with the dtype and memory layout of `x`.

    Raises
    ------
    TypeError, RuntimeError
        As in `batch_norm`; `mean` and `var` are of no half type either.
    ValueError
        As in `batch_norm`; but any number of values will do, and `eps` may be 0.

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
    """Count, mean and M2 of each channel of `x`, as `batch_norm` computes them.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, at least 2 axes
        At least one value a channel that counts.
    axis, mask, weights, lengths, num_threads
        As in `batch_norm`.

    Returns
    -------
    Moments
        In float64. Merge those of several arrays with `Moments.merge`.

    Raises
    ------
    TypeError
        If `x` is of another dtype.
    ValueError
        If `x` has fewer than 2 axes, or a channel no values that count.

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
    """Move running statistics towards those of a batch; what a layer does in training.

    ``(1 - weight) * running + weight * batch``, in float64, rounded once. A term with
    weight 0 is skipped, and may be NaN.

    Parameters
    ----------
    mean, var : ndarray, shape (C,)
        Running mean and variance, of one float type. Not changed.
    batch : Moments
        Of the batch, with more than `ddof` values a channel.
    weight : float
        Of the batch, in [0, 1].
    ddof : int
        1 keeps the unbiased variance of the batch, 0 the biased one.

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
    return _dispatch.absorb(mean, var, batch.mean, batch.m2, batch.count - ddof, weight)


def positions_of(
    x: NDArray[Any],
    axis: int,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> Positions | None:
    """Return which positions of `x` count; None where all of them count once."""
    return choose(x.shape, channel_axis_of(x.shape, axis), mask, weights, lengths)


def is_zero(masked: str) -> bool:
    """Whether what a mask leaves out becomes 0; ValueError where `masked` is unknown."""
    if masked not in ("normalize", "zero"):
        raise ValueError(f"masked is {masked!r}; it must be 'normalize' or 'zero'")
    return masked == "zero"
