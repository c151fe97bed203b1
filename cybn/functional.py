"""Functions that remember nothing: arrays in, arrays out.

Each checks its arguments, folds them to (N, C, S), allocates, and calls one kernel; small calls are
offered to a kernel that does all of that at once. Nothing is written before every check has passed.

N = everything before the channel axis, C = channels, S = everything after it.
"""

from __future__ import annotations

from math import prod
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _layout
from ._arguments import (
    channel_axis,
    check_eps,
    destination,
    gradient_pair,
    parameters,
    tensor,
)
from ._runtime import kernels, thread_count
from .moments import Moments

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "moments",
]

_SMALL: int = kernels.SMALL  # elements from which a call is not a small one

_NAMES = {"f": "float", "d": "double"}

_ABSORB: Any
_SMALL_FORWARD: Any
_SMALL_INFERENCE: Any
_STATISTICS: dict[str, Any]
_FORWARD: dict[str, Any]
_INFERENCE: dict[str, Any]
_BACKWARD: dict[str, Any]


def _bind(module: ModuleType) -> None:
    """Call the kernels of `module` from now on; keys are the chars of x's and parameters' types."""
    global _ABSORB, _SMALL_FORWARD, _SMALL_INFERENCE, _STATISTICS, _FORWARD, _INFERENCE, _BACKWARD
    _SMALL_FORWARD, _SMALL_INFERENCE = module.small_forward, module.small_inference
    _ABSORB = module.absorb
    _STATISTICS = {t: module.statistics[name] for t, name in _NAMES.items()}
    _FORWARD, _INFERENCE, _BACKWARD = (
        {t + p: kernel[_NAMES[t], _NAMES[p]] for t in _NAMES for p in _NAMES}
        for kernel in (module.forward, module.inference, module.backward)
    )


_bind(kernels)


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], Moments]:
    """Normalize each channel with the mean and biased variance of this batch.

    ``y = (x - mean) / sqrt(var + eps) * gamma + beta`` (Ioffe and Szegedy 2015, Algorithm 1).

    Parameters
    ----------
    x : array_like of float32 or float64, at least 2 axes
        The batch. Read in place where its memory is contiguous in any order of its axes, or
        channels-first and sliced along N; copied first where it is not.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, float32 or float64; 1 and 0 where None.
    axis : int, default 1
        The channel axis; negative counts from the end.
    eps : float, default 1e-5
        Added to the variance. Positive.
    out : ndarray, optional
        Where y goes: shape and dtype of `x`. May be `x` itself; must not overlap it otherwise.
        With the memory layout of `x` it is written in place, without a copy.
    num_threads : int, optional
        Threads for this call; `cybn.get_num_threads` where None. Results are the same bits for
        any number.

    Returns
    -------
    y : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    moments : Moments
        Count N * S, mean and M2 of each channel, in float64.

    Raises
    ------
    TypeError
        If an array is not float32 or float64.
    ValueError
        If a shape does not fit, a channel has fewer than two values, `eps` is not positive, or
        `out` is read-only or overlaps `x` in part.

    Notes
    -----
    For float32, mean and variance come from float64 sums of short float32 sums, centred near the
    mean; the error of y stays below ``2**-21 * (|gamma * xhat| + |gamma| + |beta|)`` while the
    mean is no larger than 1e6 standard deviations.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> y, m = cybn.batch_norm(np.array([[1.0], [3.0]]), eps=1e-12)
    >>> y.ravel().round(6), m.mean, m.var()
    (array([-1.,  1.]), array([2.]), array([1.]))
    """
    if _may_be_small(axis, eps, num_threads):
        small = _small_forward(x, gamma, beta, axis, eps, out)
        if small is not None:
            return small
    x = tensor("x", x)
    axis = channel_axis(x, axis)
    _check_batch(x, axis)
    check_eps(eps)
    vectors, p = parameters(x.shape[axis], gamma=gamma, beta=beta)
    nt = thread_count(num_threads)
    y = destination(out, x, (x, *vectors))
    if x.size == 0:
        return y, _no_channels(x, axis)
    x, plan = _layout.fold(x, axis)
    target = _layout.like_empty(y, x, plan)
    work = _work(plan)
    _FORWARD[x.dtype.char + p](plan.view(x), plan.view(target), *vectors, work, eps, nt)
    return _deliver(y, target), _moments(plan, work)


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """Normalize each channel with a given mean and variance.

    ``y = (x - mean) / sqrt(var + eps) * gamma + beta``.

    Parameters
    ----------
    x : array_like of float32 or float64, at least 2 axes
        As in `batch_norm`; may be empty.
    mean, var : array_like, shape (C,)
        Mean and variance of each channel, float32 or float64. A float64 mean is used in full
        with float32 data too.
    gamma, beta, axis, out, num_threads
        As in `batch_norm`.
    eps : float, default 1e-5
        Added to the variance. Not negative.

    Returns
    -------
    ndarray
        `out`, or a new array with the dtype and memory layout of `x`.

    Raises
    ------
    TypeError
        If an array is not float32 or float64.
    ValueError
        If a shape does not fit, `eps` is negative, or `out` is read-only or overlaps an input.
    """
    if (
        out is not None
        and _may_be_small(axis, eps, num_threads)
        and _SMALL_INFERENCE(x, mean, var, gamma, beta, out, axis, eps)
    ):
        return out
    x = tensor("x", x)
    axis = channel_axis(x, axis)
    check_eps(eps, least=0)
    vectors, p = parameters(x.shape[axis], mean=mean, var=var, gamma=gamma, beta=beta)
    nt = thread_count(num_threads)
    y = destination(out, x, (x, *vectors))
    if x.size == 0:
        return y
    x, plan = _layout.fold(x, axis)
    target = _layout.like_empty(y, x, plan)
    _INFERENCE[x.dtype.char + p](plan.view(x), plan.view(target), *vectors, plan.chunks, eps, nt)
    return _deliver(y, target)


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Gradients of `batch_norm`: through the mean and the variance of the batch.

    Parameters
    ----------
    dy : array_like, shape and dtype of `x`
        Gradient with respect to y. Copied first where it does not lie in memory as `x` does.
    x : array_like of float32 or float64
        The batch given to `batch_norm`.
    moments : Moments
        What `batch_norm` returned for it.
    gamma : array_like, shape (C,), optional
        The scale given to `batch_norm`.
    axis, eps, num_threads
        As given to `batch_norm`.
    out : ndarray, optional
        Where dx goes; may be `dy` or `x` itself.

    Returns
    -------
    dx : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    dgamma, dbeta : ndarray, shape (C,)
        Gradients with respect to gamma and beta, in the dtype of `gamma`, or of `x` where that
        is None.

    Raises
    ------
    TypeError
        If an array is not float32 or float64, or `moments` is no `Moments`.
    ValueError
        If shapes or dtypes do not fit, or `moments` has another count than a channel of `x`.
    """
    dy, x, axis = _gradient_pair(dy, x, axis)
    _check_batch(x, axis)
    check_eps(eps)
    if not isinstance(moments, Moments):
        raise TypeError(
            f"moments is of type {type(moments).__name__}; it must be the Moments that "
            "batch_norm returned for x"
        )
    count = x.size // max(1, x.shape[axis])
    if x.size and moments.count != count:
        raise ValueError(
            f"moments has count {moments.count}; a channel of x has {count} values. "
            "Give the Moments that batch_norm returned for this x"
        )
    fixed, _ = parameters(x.shape[axis], **{"moments.mean": moments.mean, "moments.m2": moments.m2})
    return _backward(dy, x, fixed, gamma, True, axis, eps, out, num_threads)


def batch_norm_inference_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Gradients of `batch_norm_inference`: mean and variance are constants.

    Parameters
    ----------
    dy, x, gamma, axis, eps, num_threads
        As in `batch_norm_backward`; `x` may be empty.
    mean, var : array_like, shape (C,)
        As given to `batch_norm_inference`.
    out : ndarray, optional
        Where dx goes; may be `dy` or `x` itself.

    Returns
    -------
    dx, dgamma, dbeta : ndarray
        As in `batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm_inference`.
    """
    dy, x, axis = _gradient_pair(dy, x, axis)
    check_eps(eps, least=0)
    given, _ = parameters(x.shape[axis], mean=mean, var=var)
    fixed = [v.astype(np.float64, copy=False) for v in given]
    return _backward(dy, x, fixed, gamma, False, axis, eps, out, num_threads)


def moments(x: ArrayLike, *, axis: int = 1, num_threads: int | None = None) -> Moments:
    """Count, mean and M2 of each channel of `x`, as `batch_norm` computes them.

    Parameters
    ----------
    x : array_like of float32 or float64, at least 2 axes
        At least one value a channel.
    axis, num_threads
        As in `batch_norm`.

    Returns
    -------
    Moments
        In float64. Merge those of several arrays with `Moments.merge`.

    Raises
    ------
    TypeError
        If `x` is not float32 or float64.
    ValueError
        If `x` has fewer than 2 axes, or no values.
    """
    x = tensor("x", x)
    axis = channel_axis(x, axis)
    _check_batch(x, axis, least=1)
    nt = thread_count(num_threads)
    if x.size == 0:
        return _no_channels(x, axis)
    x, plan = _layout.fold(x, axis)
    work = _work(plan)
    _STATISTICS[x.dtype.char](plan.view(x), work, nt)
    return _moments(plan, work)


def absorb(
    mean: NDArray[Any], var: NDArray[Any], batch: Moments, weight: float, ddof: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Move running statistics towards those of a batch; what a layer does in training.

    ``(1 - weight) * running + weight * batch``, in float64, rounded once.

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
    result = np.empty_like(mean), np.empty_like(var)
    _ABSORB(mean, var, batch.mean, batch.m2, *result, batch.count - ddof, weight)
    return result


# ---- shared ------------------------------------------------------------------------------


def _may_be_small(axis: Any, eps: Any, num_threads: Any) -> bool:
    """Whether these need no other check before a small call, which takes one thread."""
    return (
        type(axis) is int
        and -64 <= axis < 64
        and type(eps) is float
        and (num_threads is None or (type(num_threads) is int and num_threads == 1))
    )


def _small_forward(
    x: Any, gamma: Any, beta: Any, axis: Any, eps: Any, out: Any
) -> tuple[NDArray[Any], Moments] | None:
    """Do a plain small `batch_norm` in one compiled step; None where it is not one."""
    if type(x) is not np.ndarray or not 0 < x.size < _SMALL or not -x.ndim <= axis < x.ndim:
        return None
    channels = x.shape[axis]
    y = np.empty_like(x) if out is None else out
    work = np.empty((3, channels))
    if not _SMALL_FORWARD(x, gamma, beta, y, work, axis, eps):
        return None
    work.setflags(write=False)
    return y, Moments._adopt(x.size // channels, work[0], work[1])


def _check_batch(x: NDArray[Any], axis: int, least: int = 2) -> None:
    """Refuse a batch whose channels have no variance, or no values."""
    count = x.size // x.shape[axis] if x.shape[axis] else least
    if count == 0:
        raise ValueError(f"x has shape {x.shape}: it has no values to take statistics of")
    if count < least:
        raise ValueError(
            f"x has shape {x.shape}: one value a channel has no variance, and would be "
            "normalized to beta whatever it is. Train with more values a channel, or normalize "
            "with running statistics: eval() on a layer that has them, or batch_norm_inference"
        )


def _gradient_pair(
    dy: ArrayLike, x: ArrayLike, axis: int
) -> tuple[NDArray[Any], NDArray[Any], int]:
    dy, x = gradient_pair(dy, x)
    return dy, x, channel_axis(x, axis)


def _backward(
    dy: NDArray[Any],
    x: NDArray[Any],
    fixed: list[NDArray[np.float64]],
    gamma: ArrayLike | None,
    through_statistics: bool,
    axis: int,
    eps: float,
    out: NDArray[Any] | None,
    num_threads: int | None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Check what both backwards share and call the kernel; `fixed` is mean and m2, or var."""
    (scale,), p = parameters(x.shape[axis], gamma=gamma)
    dtype = x.dtype if scale is None else scale.dtype
    nt = thread_count(num_threads)
    dx = destination(out, x, (x, dy, scale, *fixed))
    if x.size == 0:
        zeros = np.zeros(x.shape[axis], dtype)
        return dx, zeros, zeros.copy()
    x, plan = _layout.fold(x, axis)
    target = _layout.like_empty(dx, x, plan)
    work = _work(plan)
    _BACKWARD[x.dtype.char + p](
        plan.view(_layout.like(dy, x, plan)),
        plan.view(x),
        plan.view(target),
        *fixed,
        scale,
        work,
        eps,
        through_statistics,
        nt,
    )
    with np.errstate(over="ignore"):  # a sum beyond float32 is inf, as in the kernels
        return _deliver(dx, target), work[1].astype(dtype), work[0].astype(dtype)


def _no_channels(x: NDArray[Any], axis: int) -> Moments:
    count = prod(size for i, size in enumerate(x.shape) if i != axis)
    return Moments(count, np.empty(0), np.empty(0))


def _work(plan: _layout.Plan) -> NDArray[np.float64]:
    """Return room for the sums of each chunk, two results and the pivot of each channel."""
    return np.empty((2 * plan.chunks + 1, plan.shape[1]))


def _moments(plan: _layout.Plan, work: NDArray[np.float64]) -> Moments:
    n, _, s = plan.shape
    if plan.chunks > 1:
        work = work[:2].copy()
    work.setflags(write=False)
    return Moments._adopt(n * s, work[0], work[1])


def _deliver(out: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    """Return `out`, filled from `target` where the kernel could not write to it in place."""
    if out is not target:
        np.copyto(out, target)
    return out
