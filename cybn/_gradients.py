"""The gradients of batch normalization: functions of arrays, like those in `functional`.

N = everything before the channel axis, C = channels, S = everything after it.
"""

from __future__ import annotations

from typing import Any, TypeAlias, TypedDict, Unpack, overload

from numpy.typing import ArrayLike, NDArray

from . import _dispatch
from ._moments import Moments
from ._words import Activation, Masked

__all__ = ["batch_norm_backward", "batch_norm_inference_backward"]

Array: TypeAlias = NDArray[Any]


class _Options(TypedDict, total=False):
    """Keyword arguments of both functions, apart from the residual."""

    beta: ArrayLike | None
    axis: int
    eps: float
    activation: Activation | None
    slope: float
    mask: ArrayLike | None
    weights: ArrayLike | None
    lengths: ArrayLike | None
    masked: Masked
    from_output: bool
    out: Array | None
    out_residual: Array | None
    num_threads: int | None


@overload
def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    *,
    residual: None = None,
    **options: Unpack[_Options],
) -> tuple[Array, Array, Array]: ...
@overload
def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    *,
    residual: ArrayLike,
    **options: Unpack[_Options],
) -> tuple[Array, Array, Array, Array]: ...
@overload
def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    *,
    residual: ArrayLike | None = None,
    **options: Unpack[_Options],
) -> tuple[Array, ...]: ...
def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    eps: float = 1e-5,
    activation: Activation | None = None,
    slope: float = 0.01,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: Masked = "normalize",
    from_output: bool = False,
    out: NDArray[Any] | None = None,
    out_residual: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], ...]:
    """Return the gradients of `batch_norm`, also through mean and variance of the batch.

    Parameters
    ----------
    dy : array_like, shape and dtype of `x`
        Gradient with respect to y. It is copied first if its memory layout is not that of `x`.
    x : array_like
        The batch given to `batch_norm`.
    moments : Moments
        The moments that `batch_norm` returned for this batch.
    gamma, beta : array_like, shape (C,), optional
        As given to `batch_norm`. beta matters only with an activation or `from_output`.
    axis, eps, activation, slope, residual, mask, weights, lengths, num_threads
        As given to `batch_norm`. The input of the activation is computed again from `x`.
    masked : {"normalize", "zero"}, default "normalize"
        As given to `batch_norm`. With "normalize", dy is used also at masked positions, because y
        there depends on `x`, gamma and beta; dx there is ``dy * f' * gamma / sqrt(var + eps)``.
        With "zero" dy is ignored there, and dx and dresidual are 0.
    from_output : bool, default False
        True if `x` is not the batch but the y that `batch_norm` computed from it, for a forward
        that overwrote its input. The activation must be None or leaky_relu, there must be no
        residual, and no gamma may be 0. The error of xhat is then about ``2**-23 * |y / gamma|`` in
        float32.
    out : ndarray, optional
        Array for dx. It may be `dy`, `x` or `residual` itself.
    out_residual : ndarray, optional
        Array for dresidual. It must not overlap another array.

    Returns
    -------
    dx : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    dgamma, dbeta : ndarray, shape (C,)
        Gradients with respect to gamma and beta, in the dtype of `gamma`. If that is None, they
        have the dtype of `x`, or float32 for half types.
    dresidual : ndarray
        Gradient with respect to the residual, in `out_residual` or a new array. It is returned only
        if `residual` is given.

    Raises
    ------
    TypeError
        If an array has a dtype that `batch_norm` does not accept, or `moments` is not a `Moments`.
    ValueError
        As in `batch_norm`, and if `moments` has another count than a channel of `x`, or
        `from_output` is impossible. `out_residual` is checked like `out`.
    RuntimeError
        As in `batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> x, dy = np.array([[7.0], [9.0], [10.0], [11.0], [13.0]]), np.eye(5)[:, 4:]
    >>> y, moments = cybn.batch_norm(x)
    >>> dx, dgamma, dbeta = cybn.batch_norm_backward(dy, x, moments)
    >>> dgamma.round(2), dbeta
    (array([1.5]), array([1.]))
    """
    if not isinstance(moments, Moments):
        raise TypeError(
            f"moments is of type {type(moments).__name__}; it must be the Moments that "
            "batch_norm returned for x"
        )
    settings, selected = (axis, eps, activation, slope), (mask, weights, lengths, masked)
    return _dispatch.backward(
        dy, x, moments, gamma, beta, residual, settings, selected, from_output, out, out_residual,
        num_threads,
    )  # fmt: skip


@overload
def batch_norm_inference_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    residual: None = None,
    **options: Unpack[_Options],
) -> tuple[Array, Array, Array]: ...
@overload
def batch_norm_inference_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    residual: ArrayLike,
    **options: Unpack[_Options],
) -> tuple[Array, Array, Array, Array]: ...
@overload
def batch_norm_inference_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    residual: ArrayLike | None = None,
    **options: Unpack[_Options],
) -> tuple[Array, ...]: ...
def batch_norm_inference_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    eps: float = 1e-5,
    activation: Activation | None = None,
    slope: float = 0.01,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: Masked = "normalize",
    from_output: bool = False,
    out: NDArray[Any] | None = None,
    out_residual: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], ...]:
    """Return the gradients of `batch_norm_inference`, where mean and variance are constants.

    Parameters
    ----------
    dy, x, gamma, beta, axis, eps, activation, slope, residual, from_output, num_threads
        As in `batch_norm_backward`; `x` may be empty.
    mask, weights, lengths, masked
        As in `batch_norm_backward`; they matter only with ``masked="zero"``, and weights only where
        they are 0.
    mean, var : array_like, shape (C,)
        As given to `batch_norm_inference`.
    out : ndarray, optional
        Array for dx. It may be `dy`, `x` or `residual` itself.
    out_residual : ndarray, optional
        Array for dresidual. It must not overlap another array.

    Returns
    -------
    dx, dgamma, dbeta, dresidual : ndarray
        As in `batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `batch_norm_backward`; but any number of values is allowed, and `eps` may be 0.

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> x, dy = np.array([[8.0], [12.0]]), np.array([[1.0], [0.0]])
    >>> mean, var = np.array([10.0]), np.array([4.0])
    >>> dx, dgamma, dbeta = cybn.batch_norm_inference_backward(dy, x, mean, var)
    >>> dx.round(2).ravel(), dgamma.round(2)
    (array([0.5, 0. ]), array([-1.]))
    """
    settings, selected = (axis, eps, activation, slope), (mask, weights, lengths, masked)
    return _dispatch.backward(
        dy, x, (mean, var), gamma, beta, residual, settings, selected, from_output, out,
        out_residual, num_threads,
    )  # fmt: skip
