"""The family of batch normalization as functions: layer, RMS, group and instance normalization.

Batch normalization computes one mean and variance per channel over the whole batch. These functions
compute one per *row* of a sample: all D values of the normalized axes (layer, RMS), of a group of
channels (group), or of one channel (instance). Samples do not affect each other, so training and
inference are the same, and results for a sample do not depend on the rest of the batch.

Each function passes its arguments on to the dispatch, which checks them, reshapes the arrays to
rows (N, G, D), allocates, and calls one kernel. There are no activations and no residuals here.

N = samples, G = groups of a sample, D = values of a group. C = channels, S = positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _dispatch
from ._arguments import tensor
from ._by_sample import rows_of
from ._dispatch.forms import Form
from ._grouped import (
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
)
from ._moments import Moments

__all__ = [
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]


# ---- layer normalization -----------------------------------------------------------------


def layer_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], Moments]:
    """Normalize each sample over its last axes, from `axis` on.

    ``y = (x - mean) / sqrt(var + eps) * gamma + beta``, with mean and biased variance taken over
    the normalized axes (Ba, Kiros and Hinton 2016).

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, at least 1 axis
        It is read without a copy if the normalized axes are in C order in memory and the others can
        be merged into one, also with gaps between samples; otherwise it is copied first. It may be
        empty. Half types (bfloat16 is that of ml_dtypes) are computed in float32, and results are
        rounded once, to nearest even.
    gamma, beta : array_like, shape ``x.shape[axis:]``, optional
        Scale and shift of each element of the normalized axes, float32 or float64. None means 1 and
        0. They are rounded to the type of the computation: float64 for float64, otherwise float32.
    axis : int, default -1
        The first normalized axis; negative numbers count from the end. All axes after it are
        normalized, too, as in PyTorch and ONNX. In Keras ``axis=1`` of (N, T, C) means axis 1
        alone. For that, use ``np.moveaxis(layer_norm(np.moveaxis(x, 1, -1))[0], -1, 1)``.
    eps : float, default 1e-5
        A positive number that is added to the variance.
    out : ndarray, optional
        Array for y, with the shape and dtype of `x`. It may be `x` itself, but must not overlap it
        in part, and its values must not share memory.
    num_threads : int, optional
        Threads for this call. None means `cybn.get_num_threads`. Results are bitwise identical for
        any number.

    Returns
    -------
    y : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    moments : Moments
        Count D, mean and M2 of each of the N samples, in the order of ``x.reshape(N, D)``.

    Raises
    ------
    TypeError
        If an array has another dtype, or `gamma` or `beta` has a half type.
    ValueError
        If a shape does not fit, `eps` is not positive, or `out` is read-only, has values that share
        memory, or overlaps an input in part.
    RuntimeError
        If another thread changes the shape of `x` during the call.

    Notes
    -----
    The error of y has the bound of `batch_norm`, with the mean and standard deviation of the
    sample. A NaN stays in its sample.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> y, m = cybn.layer_norm(np.array([[1.0, 3.0], [2.0, 2.0]]), eps=1e-12)
    >>> y.round(6), m.mean
    (array([[-1.,  1.],
           [ 0.,  0.]]), array([2., 2.]))
    """
    settings = axis, None, eps
    return _dispatch.normalize_rows(x, gamma, beta, settings, True, out, num_threads)


def layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the gradients of `layer_norm`.

    Parameters
    ----------
    dy : array_like, shape and dtype of `x`
        Gradient with respect to y. It is copied first if its memory layout is not that of `x`.
    x : array_like
        The input of `layer_norm`.
    moments : Moments
        The moments that `layer_norm` returned for this input.
    gamma : array_like, shape ``x.shape[axis:]``, optional
        The scale given to `layer_norm`.
    axis, eps, num_threads
        As given to `layer_norm`.
    out : ndarray, optional
        Array for dx. It may be `dy` or `x` itself.

    Returns
    -------
    dx : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    dgamma, dbeta : ndarray, shape ``x.shape[axis:]``
        They have the dtype of `gamma`. If that is None, they have the dtype of `x`, or float32 for
        half types.

    Raises
    ------
    TypeError
        If an array has another dtype, or `moments` is not a `Moments`.
    ValueError
        If shapes or dtypes do not fit, or `moments` do not fit `x`.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> x, dy = np.array([[1.0, 3.0, 5.0]]), np.array([[1.0, 0.0, 0.0]])
    >>> y, moments = cybn.layer_norm(x)
    >>> dx, dgamma, dbeta = cybn.layer_norm_backward(dy, x, moments)
    >>> bool(abs(dx.sum()) < 1e-12)
    True
    """
    settings = axis, None, eps
    return _dispatch.normalize_rows_backward(
        dy, x, rows_of, moments, gamma, settings, True, out, num_threads
    )


# ---- RMS normalization -------------------------------------------------------------------


def rms_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Divide each sample by its root mean square over its last axes, from `axis` on.

    ``y = x / sqrt(mean(x**2) + eps) * gamma`` (Zhang and Sennrich 2019). This is layer
    normalization without the mean.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, at least 1 axis
        As in `layer_norm`.
    gamma : array_like, shape ``x.shape[axis:]``, optional
        Scale of each element of the normalized axes. None means 1.
    axis, out, num_threads
        As in `layer_norm`.
    eps : float, optional
        A positive number that is added to the mean square. None means the machine epsilon of the
        input's dtype, as in PyTorch, and that of float32 for half types.

    Returns
    -------
    y : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    mean_square : ndarray of float64, shape (N,)
        Mean square of each sample, which `rms_norm_backward` needs.

    Raises
    ------
    TypeError, ValueError
        As in `layer_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> y, mean_square = cybn.rms_norm(np.array([[3.0, 4.0, 0.0, 0.0]]))
    >>> y.round(6), mean_square
    (array([[1.2, 1.6, 0. , 0. ]]), array([6.25]))
    """
    settings = axis, None, eps
    y, squares = _dispatch.normalize_rows(x, gamma, None, settings, False, out, num_threads)
    return y, squares.m2 / max(1, squares.count)


def rms_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean_square: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float | None = None,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the gradients of `rms_norm`.

    Parameters
    ----------
    dy, x, gamma, axis, out, num_threads
        As in `layer_norm_backward`.
    mean_square : array_like of float64, shape (N,)
        The mean squares that `rms_norm` returned for `x`.
    eps : float, optional
        As given to `rms_norm`.

    Returns
    -------
    dx : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    dgamma : ndarray, shape ``x.shape[axis:]``
        It has the dtype of `gamma`. If that is None, it has the dtype of `x`, or float32 for half
        types.

    Raises
    ------
    TypeError, ValueError
        As in `layer_norm_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> x, dy = np.array([[3.0, 4.0]]), np.array([[1.0, 0.0]])
    >>> y, mean_square = cybn.rms_norm(x)
    >>> dx, dgamma = cybn.rms_norm_backward(dy, x, mean_square)
    >>> dgamma.round(2)
    array([0.85, 0.  ])
    """
    dx, dgamma, _ = _dispatch.normalize_rows_backward(
        dy, x, _squares_of, mean_square, gamma, (axis, None, eps), False, out, num_threads
    )
    return dx, dgamma


# ---- shared ------------------------------------------------------------------------------


def _squares_of(
    form: Form, mean_square: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return means of 0 and the sums of squares of the rows; raise an error for a wrong shape."""
    squares = tensor("mean_square", mean_square, half=False).astype(np.float64, copy=False)
    if squares.shape != (form.rows,):
        raise ValueError(
            f"mean_square has shape {squares.shape}; it must have shape ({form.rows},), "
            "one value a sample: give what rms_norm returned for this x"
        )
    return np.zeros(form.rows), squares * form.size
