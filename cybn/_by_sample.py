"""Group and instance normalization of a batch, with or without a mask.

Without a mask the dispatch calls one kernel for the whole batch. With a mask, the used positions
differ by sample. So each sample goes through batch normalization by itself, with its groups of
channels in the role of channels.

N = samples, G = groups of a sample, C = channels, K = C / G.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _dispatch, functional
from ._arguments import F32, F64, check_eps, companion, tensor
from ._dispatch.beyond import in_range
from ._dispatch.forms import Form, form_of
from ._moments import Moments

__all__ = ["backward", "forward", "rows_of"]

Array: TypeAlias = NDArray[Any]
Selected: TypeAlias = tuple[ArrayLike | None, ArrayLike | None, str]  # mask, lengths, masked
Settings: TypeAlias = tuple[int, int, float]  # axis, groups or 0, eps


def rows_of(form: Form, moments: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and M2 of the rows of x; raise an error if `moments` do not fit x."""
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


def forward(
    x: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    settings: Settings,
    selected: Selected,
    out: Array | None,
    num_threads: int | None,
) -> tuple[Array, Moments]:
    """Normalize the whole batch at once, or one sample after the other if values are masked."""
    samples = _samples_of(x, settings, selected)
    if samples is None:
        return _dispatch.normalize_rows(x, gamma, beta, settings, True, out, num_threads)
    x, form, keep, counts = samples
    y = _dispatch.destination(out, x, (gamma, beta))
    options = form.axis, settings[2], None, 0.0
    all_found = []
    for i in range(len(x)):
        one = slice(i, i + 1)
        within = _split(keep[one], form), None, None, "normalize"
        part = _split(x[one], form)
        found = _dispatch.statistics(part, form.axis, within, num_threads)
        chosen = keep[one], None, None, selected[2]
        far = in_range(part, form.axis, found, settings[2], within, num_threads)
        if far is None:
            mean, var = _by_channel(form, found.mean, found.var())
            _dispatch.inference(
                x[one], mean, var, gamma, beta, None, options, chosen, y[one], num_threads
            )
        else:
            mean, var = _by_channel(form, far[1], far[2])
            with np.errstate(all="ignore"):  # values too large for a narrower type become infinite
                y[one] = _dispatch.inference(
                    far[0].reshape(x[one].shape), mean, var, gamma, beta, None,
                    (form.axis, 0.0, None, 0.0), chosen, None, num_threads,
                )  # fmt: skip
        all_found.append(found)
    mean, m2 = (np.concatenate(v) for v in zip(*((f.mean, f.m2) for f in all_found), strict=True))
    moments = Moments(counts, mean, m2)
    if np.isinf(m2).any():
        moments._tell(np.concatenate([f.std() for f in all_found]))
    return y, moments


def backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Any,
    gamma: ArrayLike | None,
    settings: Settings,
    selected: Selected,
    out: Array | None,
    num_threads: int | None,
) -> tuple[Array, Array, Array]:
    """Compute dx, dgamma and dbeta of the whole batch at once, or one sample after the other."""
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
    ones, sums = np.ones(form.values), np.zeros((2, form.values))  # float64 gives float64 sums
    for i in range(len(x)):
        one, rows = slice(i, i + 1), slice(i * form.groups, (i + 1) * form.groups)
        own = Moments(int(counts[rows][0]), moments.mean[rows], moments.m2[rows])
        chosen = keep[one], None, None, selected[2]
        within = _split(keep[one], form), None, None, selected[2]
        part, above, kind = x[one], dy[one], scale.dtype
        options = fixed = form.axis, settings[2], None, 0.0
        mean, var, e = own.mean, own.var(), None
        far = in_range(_split(part, form), form.axis, own, settings[2], within, num_threads)
        if far is not None:
            part, mean, var, e = far
            part, above, kind = part.reshape(above.shape), above.astype(F64), F64
            own = Moments(own.count, mean, var * own.count)
            options, fixed = (form.axis, 5e-324, None, 0.0), (form.axis, 0.0, None, 0.0)
        _, *found = _dispatch.backward(
            above, part, _by_channel(form, mean, var), ones, None, None, fixed, chosen, False,
            None, None, num_threads,
        )  # fmt: skip
        with np.errstate(all="ignore"):  # values too large for a half type become infinite
            g = above if gamma is None else above * scale.reshape(_along(form.axis, x.ndim))
            g, part = (_split(v.astype(kind, copy=False), form) for v in (g, part))
            dz, *_ = _dispatch.backward(
                g, part, own, None, None, None, options, within, False, None, None, num_threads
            )
            if e is not None:
                dz = np.ldexp(dz, -e.reshape(_along(form.axis, dz.ndim)))
            dx[one] = dz.reshape(dx[one].shape)
            sums += found
    with np.errstate(all="ignore"):
        dgamma, dbeta = sums.astype(result)
    return dx, dgamma, dbeta


def _samples_of(
    x: ArrayLike, settings: Settings, selected: Selected
) -> tuple[Array, Form, NDArray[np.bool_], NDArray[np.int64]] | None:
    """Return x, its form, the mask, and the number of used values per row; None if all are used."""
    (axis, groups, eps), (mask, lengths, masked) = settings, selected
    functional.is_zero(masked)  # raises ValueError if masked is unknown
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
    """Return the shape that lets one value per channel broadcast to an x of `ndim` axes."""
    return tuple(-1 if i == axis else 1 for i in range(ndim))


def _by_channel(form: Form, mean: Array, var: Array) -> tuple[Array, Array]:
    """Return mean and variance of each channel, given those of each group."""
    each = form.values // form.groups
    return np.repeat(mean, each), np.repeat(var, each)


def _scale(
    gamma: ArrayLike | None, form: Form, dtype: np.dtype[Any]
) -> tuple[Array, np.dtype[Any]]:
    """Return gamma in the type of the computation, and the type of its gradient."""
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
