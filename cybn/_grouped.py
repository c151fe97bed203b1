"""Group and instance normalization, and what they do where a mask chooses which positions count.

Without a mask the dispatch calls one kernel for the whole batch. With one, each sample has
positions of its own, and goes through batch normalization by itself: a group of its channels is to
that what a channel of a batch is.

N = samples, G = groups of a sample, C = channels, K = C / G.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _dispatch, functional
from ._arguments import F32, F64, check_eps, companion, integer_from, tensor
from ._dispatch.forms import Form, form_of
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
        Samples along axis 0. It is read in place if each sample is dense in memory, with its
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
        neither samples nor channels, such as L. With a mask as well, a position must be used by
        both.
    masked : {"normalize", "zero"}, default "normalize"
        What y is at positions that are not used: normalized like the rest of the sample, or 0.
    eps, out, num_threads
        As in `layer_norm`.

    Returns
    -------
    y : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    moments : Moments
        Count, mean and M2 of each group of each sample: N * `num_groups`, samples first. The count
        is an array, one for each, if a mask or lengths leave something out.

    Raises
    ------
    TypeError
        If an array has another dtype, or `num_groups` is not an int.
    ValueError
        As in `layer_norm`, and if the channels cannot be divided into `num_groups` groups, if `x`
        has one sample and one value per group, or if a mask or lengths do not fit `x`, or leave
        fewer than two values of a group of a sample.

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
    return _forward(x, gamma, beta, settings, (mask, lengths, masked), out, num_threads)


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
    """Gradients of `group_norm`.

    Parameters
    ----------
    dy, x, moments, out
        As in `layer_norm_backward`; `moments` are those that `group_norm` returned.
    gamma, num_groups, axis, eps, mask, lengths, num_threads
        As given to `group_norm`.
    masked : {"normalize", "zero"}, default "normalize"
        As given to `group_norm`. With "normalize", dy counts where a position does not, as y there
        depends on `x`, gamma and beta too. With "zero" dy is ignored there, and dx is 0.

    Returns
    -------
    dx : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    dgamma, dbeta : ndarray, shape (C,)
        In the dtype of `gamma`; where that is None, of `x`, but float32 for half types.

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
    return _backward(dy, x, moments, gamma, settings, (mask, lengths, masked), out, num_threads)


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

    ``y = (x - mean) / sqrt(var + eps) * gamma + beta`` (Ulyanov, Vedaldi and Lempitsky 2016):
    `group_norm` with a group for each channel.

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
        Count, mean and M2 of each channel of each sample: N * C, samples first; the count as in
        `group_norm`.

    Raises
    ------
    TypeError
        If an array is of another dtype.
    ValueError
        As in `group_norm`, and if a channel has but one position.

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
    return _forward(x, gamma, beta, (axis, 0, eps), selected, out, num_threads)


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
    """Gradients of `instance_norm`.

    Parameters
    ----------
    dy, x, moments, out
        As in `layer_norm_backward`; `moments` are those that `instance_norm` returned.
    gamma, axis, eps, mask, lengths, masked, num_threads
        As given to `instance_norm`; `masked` as in `group_norm_backward`.

    Returns
    -------
    dx : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    dgamma, dbeta : ndarray, shape (C,)
        In the dtype of `gamma`; where that is None, of `x`, but float32 for half types.

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
    return _backward(dy, x, moments, gamma, (axis, 0, eps), selected, out, num_threads)


# ---- shared ------------------------------------------------------------------------------

Array: TypeAlias = NDArray[Any]
Selected: TypeAlias = tuple[ArrayLike | None, ArrayLike | None, str]  # mask, lengths, masked
Settings: TypeAlias = tuple[int, int, float]  # axis, groups or 0, eps


def rows_of(form: Form, moments: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and M2 of the rows of x; an error where these are not its moments."""
    _check_moments(moments, form, form.size)
    return moments.mean, moments.m2


def _check_moments(moments: Any, form: Form, count: int | NDArray[np.int64]) -> None:
    if not isinstance(moments, Moments):
        raise TypeError(
            f"moments is of type {type(moments).__name__}; it must be the Moments that the "
            "forward returned for x"
        )
    if len(moments) != form.rows or not np.array_equal(moments.count, count):
        raise ValueError(
            f"moments has {len(moments)} rows of {moments.count} values; x has {form.rows} of "
            f"{count}. Give the Moments that the forward returned for this x"
        )


def _forward(
    x: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    settings: Settings,
    selected: Selected,
    out: Array | None,
    num_threads: int | None,
) -> tuple[Array, Moments]:
    """Normalize the whole batch at once or, where a mask differs by sample, one by one."""
    samples = _samples_of(x, settings, selected)
    if samples is None:
        return _dispatch.normalize_rows(x, gamma, beta, settings, True, out, num_threads)
    x, form, keep, counts = samples
    y = _dispatch.destination(out, x, (gamma, beta))
    options = form.axis, settings[2], None, 0.0
    means, squares = [], []
    for i in range(len(x)):
        one = slice(i, i + 1)
        within = _split(keep[one], form), None, None, "normalize"
        found = _dispatch.statistics(_split(x[one], form), form.axis, within, num_threads)
        mean, var = _by_channel(found, form)
        chosen = keep[one], None, None, selected[2]
        _dispatch.inference(
            x[one], mean, var, gamma, beta, None, options, chosen, y[one], num_threads
        )
        means.append(found.mean)
        squares.append(found.m2)
    return y, Moments(counts, np.concatenate(means), np.concatenate(squares))


def _backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Any,
    gamma: ArrayLike | None,
    settings: Settings,
    selected: Selected,
    out: Array | None,
    num_threads: int | None,
) -> tuple[Array, Array, Array]:
    """Return dx, dgamma and dbeta: of the whole batch at once, or one sample after the other."""
    samples = _samples_of(x, settings, selected)
    if samples is None:
        return _dispatch.normalize_rows_backward(
            dy, x, rows_of, moments, gamma, settings, True, out, num_threads
        )
    x, form, keep, counts = samples
    dy = companion("dy", dy, x)
    _check_moments(moments, form, counts)
    scale, result = _scale(gamma, form, x.dtype)
    dx = _dispatch.destination(out, x, (dy, scale))
    ones, sums = np.ones(form.values), np.zeros((2, form.values))  # sums come in float64
    options = form.axis, settings[2], None, 0.0
    for i in range(len(x)):
        one, rows = slice(i, i + 1), slice(i * form.groups, (i + 1) * form.groups)
        own = Moments(int(counts[rows][0]), moments.mean[rows], moments.m2[rows])
        chosen = keep[one], None, None, selected[2]
        _, *found = _dispatch.backward(
            dy[one], x[one], _by_channel(own, form), ones, None, None, options, chosen, False,
            None, None, num_threads,
        )  # fmt: skip
        with np.errstate(all="ignore"):  # what is beyond a half type is infinite
            g = dy[one] if gamma is None else dy[one] * scale.reshape(_along(form.axis, x.ndim))
            g, part = (_split(v.astype(scale.dtype, copy=False), form) for v in (g, x[one]))
            chosen = _split(keep[one], form), None, None, selected[2]
            dz, *_ = _dispatch.backward(
                g, part, own, None, None, None, options, chosen, False, None, None, num_threads
            )
            dx[one] = dz.reshape(dx[one].shape)
            sums += found
    with np.errstate(all="ignore"):
        dgamma, dbeta = sums.astype(result)
    return dx, dgamma, dbeta


def _samples_of(
    x: ArrayLike, settings: Settings, selected: Selected
) -> tuple[Array, Form, NDArray[np.bool_], NDArray[np.int64]] | None:
    """Return x, its form, which positions count, and how many values of each row; None: all."""
    (axis, groups, eps), (mask, lengths, masked) = settings, selected
    functional.is_zero(masked)  # known, or an error
    if mask is None and lengths is None:
        return None
    x = tensor("x", x)
    form = form_of(x.shape, axis, groups)
    positions = _dispatch.choose(x.shape, form.axis, mask, None, lengths)
    if positions is None:
        return None
    check_eps(eps)
    keep, each = positions.shares, form.values // form.groups
    counts = each * np.count_nonzero(keep.reshape(len(x), -1), axis=1)
    for i in np.flatnonzero(counts < 2)[:1]:
        raise ValueError(
            f"mask or lengths leave {counts[i]} of {form.size} values a "
            f"{'channel' if each == 1 else 'group'} in sample {i}; at least 2 must count, as one "
            "value has no variance. Leave that sample out, or let more of its positions count"
        )
    return x, form, keep, np.repeat(counts, form.groups)


def _split(part: Array, form: Form) -> Array:
    """Return a view with the channel axis split into groups and the channels of each."""
    axis, channels = form.axis, part.shape[form.axis]
    groups = form.groups if channels > 1 else 1
    return part.reshape(*part.shape[:axis], groups, channels // groups, *part.shape[axis + 1 :])


def _along(axis: int, ndim: int) -> tuple[int, ...]:
    """Return the shape of one value a channel beside an x of `ndim` axes."""
    return tuple(-1 if i == axis else 1 for i in range(ndim))


def _by_channel(moments: Moments, form: Form) -> tuple[Array, Array]:
    """Return mean and variance of each channel, of those of each group."""
    each = form.values // form.groups
    return np.repeat(moments.mean, each), np.repeat(moments.var(), each)


def _scale(
    gamma: ArrayLike | None, form: Form, dtype: np.dtype[Any]
) -> tuple[Array, np.dtype[Any]]:
    """Return gamma in the type that is computed in, and the type of its gradient."""
    computed = F64 if dtype == F64 else F32
    if gamma is None:
        return np.ones(form.values, computed), computed
    given = tensor("gamma", gamma, half=False)
    if given.shape != form.shape:
        raise ValueError(
            f"gamma has shape {given.shape}; it must have shape {form.shape}, one value a channel"
        )
    with np.errstate(all="ignore"):
        return given.astype(computed), given.dtype
