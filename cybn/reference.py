"""Reference implementation in plain NumPy, used to check the kernels.

Every function has the name and the signature of its counterpart in `cybn`, whose docstring explains
the parameters. A number in a comment, like (7), is an equation of docs/math.md, which also explains
the letters. The code is written for clarity and accuracy, with one formula per line, not for speed.

The functions differ from their counterparts in four ways:

- everything is computed and returned in float64, or in long double if `x` is long double (such
  arrays are called wide below); only `Moments` is always float64;
- `out` may have any dtype and layout: it is filled and returned;
- `num_threads` is ignored;
- bad input is not checked, and NumPy's floating-point warnings are off.

Nothing in `cybn` imports this module. Tests and benchmarks do.
"""

from __future__ import annotations

from math import erfc as erfc_of
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._moments import Moments

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "moments",
    "rms_norm",
    "rms_norm_backward",
]

Array = NDArray[Any]


@np.errstate(all="ignore")
def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    slope: float = 0.01,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: str = "normalize",
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Moments]:
    """Normalize each channel of `x` by its own mean and variance; return y and the moments."""
    rows = _fold(x, axis)
    w = _shares(x, axis, mask, weights, lengths)
    mean, e, m2, power = _statistics(rows, w)
    var = m2 / w.sum()  # (4), (65)
    rstd = 1 / np.sqrt(var + np.ldexp(np.float64(eps), -2 * power))  # (5)
    xhat = e * rstd  # (6)
    z = _column(gamma, 1.0) * xhat + _column(beta, 0.0)  # (7)
    if residual is not None:
        z = z + _fold(residual, axis)
    y, _ = activated(z, activation, slope)
    if masked == "zero":
        y = np.where(w > 0, y, 0)
    return _unfold(y, x, axis, out), _moments(_count(w, weights), mean, m2, power)


@np.errstate(all="ignore")
def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    slope: float = 0.01,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: str = "normalize",
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """Normalize each channel of `x` by a given mean and variance; return y."""
    root = np.sqrt(_column(var, 1.0) + eps)  # (5)
    xhat = _scaled(_fold(x, axis), _column(mean, 0.0), root)
    z = _column(gamma, 1.0) * xhat + _column(beta, 0.0)  # (7)
    if residual is not None:
        z = z + _fold(residual, axis)
    y, _ = activated(z, activation, slope)
    if masked == "zero":
        y = np.where(_shares(x, axis, mask, weights, lengths) > 0, y, 0)
    return _unfold(y, x, axis, out)


@np.errstate(all="ignore")
def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    slope: float = 0.01,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: str = "normalize",
    from_output: bool = False,
    out: Array | None = None,
    out_residual: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, ...]:
    """Return dx, dgamma and dbeta of `batch_norm`, through the batch statistics."""
    w = _shares(x, axis, mask, weights, lengths)
    above, silent = _above(dy, axis, w, masked)
    rows, up = np.where(silent, 0, _fold(x, axis)), _power(above)
    mean, var = _column(moments.mean, 0.0), _column(moments.var(), 1.0)
    root = np.sqrt(var + eps) if from_output else _root(rows, mean, var, eps, w)  # (5)
    xhat, z = _xhat(rows, mean, root, gamma, beta, activation, slope, from_output)
    g, dresidual = _through_activation(
        above, x, z, axis, activation, slope, residual, silent, out_residual
    )
    g = np.ldexp(g, -up)
    dbeta = g.sum(axis=1, keepdims=True)  # (12)
    dgamma = (g * xhat).sum(axis=1, keepdims=True)  # (13)
    shared = np.where(w > 0, w * (dbeta + xhat * dgamma), 0)  # 0, although 0 * NaN is NaN
    projected = g - shared / w.sum()  # (20), (66)
    dx = np.ldexp(_column(gamma, 1.0) * projected / root, up)  # (21)
    dgamma, dbeta = (np.ldexp(v, up)[:, 0] for v in (dgamma, dbeta))
    return _unfold(dx, x, axis, out), dgamma, dbeta, *dresidual


@np.errstate(all="ignore")
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
    activation: str | None = None,
    slope: float = 0.01,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: str = "normalize",
    from_output: bool = False,
    out: Array | None = None,
    out_residual: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, ...]:
    """Return dx, dgamma and dbeta of `batch_norm_inference`; `mean` and `var` are constants."""
    root = np.sqrt(_column(var, 1.0) + eps)  # (5)
    w = _shares(x, axis, mask, weights, lengths)
    above, silent = _above(dy, axis, w, masked)
    rows, up = np.where(silent, 0, _fold(x, axis)), _power(above)
    xhat, z = _xhat(rows, _column(mean, 0.0), root, gamma, beta, activation, slope, from_output)
    g, dresidual = _through_activation(
        above, x, z, axis, activation, slope, residual, silent, out_residual
    )
    g = np.ldexp(g, -up)
    dbeta = np.ldexp(g.sum(axis=1), up[:, 0])  # (12)
    dgamma = np.ldexp((g * xhat).sum(axis=1), up[:, 0])  # (13)
    dx = np.ldexp(_column(gamma, 1.0) * g / root, up)  # (23)
    return _unfold(dx, x, axis, out), dgamma, dbeta, *dresidual


@np.errstate(all="ignore")
def moments(
    x: ArrayLike,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    num_threads: int | None = None,
) -> Moments:
    """Return count, mean and M2 of each channel of `x`."""
    w = _shares(x, axis, mask, weights, lengths)
    mean, _, m2, power = _statistics(_fold(x, axis), w)
    return _moments(_count(w, weights), mean, m2, power)


@np.errstate(all="ignore")
def activated(z: Array, activation: str | None, slope: float) -> tuple[Array, Array]:
    """Return y = f(z), and f'(z)."""
    one, zero = np.ones_like(z), np.zeros_like(z)
    if activation is None:
        return z, one
    if activation == "relu":
        return np.where(z < 0, zero, z), np.where(z <= 0, zero, one)
    if activation == "relu6":
        y = np.where(z > 6, 6 * one, np.where(z < 0, zero, z))
        return y, np.where((z <= 0) | (z >= 6), zero, one)
    if activation == "leaky_relu":
        return np.where(z < 0, slope * z, z), np.where(z <= 0, slope * one, one)
    if activation == "hardswish":
        inside = np.where(z <= -3, zero, (z + 1.5) / 3)
        return z * (np.clip(z + 3, 0, 6) / 6), np.where(z >= 3, one, inside)
    if activation == "gelu":
        phi = np.exp(-z * z / 2) / np.sqrt(8 * np.arctan(one))
        return z * _normal(z), _normal(z) + z * phi
    if activation == "tanh":
        return np.tanh(z), 1 / np.cosh(z) ** 2
    e = np.exp(-np.abs(z))
    up = np.where(z >= 0, one, e) / (1 + e)  # sigmoid
    down = np.where(z >= 0, e, one) / (1 + e)  # 1 - sigmoid
    if activation == "sigmoid":
        return up, up * down
    if activation == "silu":
        return z * up, up * (1 + z * down)
    raise ValueError(f"activation is {activation!r}")


def _normal(z: Array) -> Array:
    """Return the standard normal distribution function, with a small relative error in both tails.

    `math.erfc` computes in float64, so its argument -z / sqrt(2) is rounded. The derivative is used
    to correct that error, which matters in the tail: there a relative error of z grows by z * z.
    """
    exact = -z.astype(np.longdouble) / np.sqrt(np.longdouble(2))
    near = exact.astype(np.float64)
    erfc = np.vectorize(erfc_of, otypes=[np.float64])(near)
    rest = (exact - near) * np.exp(-(near.astype(np.longdouble) ** 2)) / np.sqrt(np.arctan(1.0))
    value: Array = ((erfc - np.where(np.isfinite(z), rest, 0)) / 2).astype(z.dtype)
    return np.where(value < 0, 0, value)  # rounding may go below 0 where erfc is 0


def _xhat(
    rows: Array,
    mean: Array | float,
    root: Array,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    activation: str | None,
    slope: float,
    from_output: bool,
) -> tuple[Array, Array]:
    """Return xhat and z, given rows of x, or rows of y if `from_output` is true."""
    if from_output:
        z = np.where(rows < 0, rows / slope, rows) if activation else rows
        return (z - _column(beta, 0.0)) / _column(gamma, 1.0), z
    xhat = _scaled(rows, mean, root)
    return xhat, _column(gamma, 1.0) * xhat + _column(beta, 0.0)  # (7)


def _above(dy: ArrayLike, axis: int, w: Array, masked: str) -> tuple[Array, Array]:
    """Return the gradient with respect to y, and where both it and the weight of a value are 0."""
    above = _fold(dy, axis)
    if masked == "zero":
        above = np.where(w > 0, above, 0)
    return above, (w == 0) & (above == 0)


def _through_activation(
    above: Array,
    x: ArrayLike,
    z: Array,
    axis: int,
    activation: str | None,
    slope: float,
    residual: ArrayLike | None,
    silent: Array,
    out_residual: Array | None,
) -> tuple[Array, tuple[Array, ...]]:
    """Return the gradient with respect to z, and that of the residual if there is one."""
    if residual is not None:
        z = z + _fold(residual, axis)
    _, derivative = activated(z, activation, slope)
    cut = (derivative == 0) & (activation in ("relu", "relu6", "hardswish"))  # as NaN * 0 = NaN
    g = np.where(cut | silent, 0, above * derivative)
    return g, () if residual is None else (_unfold(g, x, axis, out_residual),)


# ---- the family: rows of a sample instead of channels of a batch ---------------------------


def layer_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Moments]:
    """Normalize each sample over its axes from `axis` on; return y and the moments."""
    shape = np.shape(x)[axis:]
    shift = 0.0 if beta is None else _each(beta, shape)
    y, moments = _normalize_rows(_last_axes(x, axis), _each(gamma, shape), shift, eps)
    return _deliver(y.reshape(np.shape(x)), out), moments


def layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Array, Array]:
    """Return dx, dgamma and dbeta of `layer_norm`."""
    shape = np.shape(x)[axis:]
    g, rows = _last_axes(dy, axis), _last_axes(x, axis)
    dx, dgamma, dbeta = _row_gradients(g, rows, moments, _each(gamma, shape), eps)
    dx = _deliver(dx.reshape(np.shape(x)), out)
    return dx, dgamma.reshape(shape), dbeta.reshape(shape)


@np.errstate(all="ignore")
def rms_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Array]:
    """Divide each sample by its root mean square; return y and the mean squares."""
    rows = _last_axes(x, axis)
    mean_square = (rows * rows).sum(axis=2) / rows.shape[2]  # (52)
    xhat = rows / _root(rows, 0.0, np.inf, _rms_eps(x, eps))  # (53), (54)
    y = _each(gamma, np.shape(x)[axis:]) * xhat  # (55)
    return _deliver(y.reshape(np.shape(x)), out), mean_square[:, 0]


@np.errstate(all="ignore")
def rms_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean_square: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int = -1,
    eps: float | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Array]:
    """Return dx and dgamma of `rms_norm`."""
    g, rows, shape = _last_axes(dy, axis), _last_axes(x, axis), np.shape(x)[axis:]
    square = _wide(mean_square)[:, np.newaxis, np.newaxis]
    root = _root(rows, 0.0, square, _rms_eps(x, eps))  # (53)
    xhat = rows / root  # (54)
    up = _power(g.ravel())
    g = np.ldexp(g, -up)
    dgamma = np.ldexp((g * xhat).sum(axis=0), up)  # (48)
    dz = g * _each(gamma, shape)  # (49)
    c2 = (dz * xhat).mean(axis=2, keepdims=True)  # (50)
    dx = np.ldexp((dz - xhat * c2) / root, up)  # (57)
    return _deliver(dx.reshape(np.shape(x)), out), dgamma.reshape(shape)


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
    masked: str = "normalize",
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Moments]:
    """Normalize each group of channels of each sample; return y and the moments."""
    rows, moved = _groups(x, axis, num_groups)
    scale, shift = (
        _spread(v, default, moved, num_groups) for v, default in ((gamma, 1), (beta, 0))
    )
    w = _row_shares(x, axis, num_groups, mask, lengths)
    y, moments = _normalize_rows(rows, scale, shift, eps, w)
    if masked == "zero" and w is not None:
        y = np.where(w > 0, y, 0)
    return _deliver(np.moveaxis(y.reshape(moved), 1, axis), out), moments


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
    masked: str = "normalize",
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Array, Array]:
    """Return dx, dgamma and dbeta of `group_norm`."""
    (g, _), (rows, moved) = _groups(dy, axis, num_groups), _groups(x, axis, num_groups)
    scale = _spread(gamma, 1, moved, num_groups)
    w = _row_shares(x, axis, num_groups, mask, lengths)
    if masked == "zero" and w is not None:
        g = np.where(w > 0, g, 0)
    dx, *sums = _row_gradients(g, rows, moments, scale, eps, w)
    dgamma, dbeta = (v.reshape(moved[1], -1).sum(axis=1) for v in sums)
    return _deliver(np.moveaxis(dx.reshape(moved), 1, axis), out), dgamma, dbeta


def instance_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: str = "normalize",
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Moments]:
    """Normalize each channel of each sample; return y and the moments."""
    groups = np.shape(x)[axis]
    options: dict[str, Any] = {"mask": mask, "lengths": lengths, "masked": masked, "out": out}
    return group_norm(x, gamma, beta, num_groups=groups, axis=axis, eps=eps, **options)


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
    masked: str = "normalize",
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Array, Array]:
    """Return dx, dgamma and dbeta of `instance_norm`."""
    groups = np.shape(x)[axis]
    options: dict[str, Any] = {"mask": mask, "lengths": lengths, "masked": masked, "out": out}
    return group_norm_backward(
        dy, x, moments, gamma, num_groups=groups, axis=axis, eps=eps, **options
    )


@np.errstate(all="ignore")
def _normalize_rows(
    rows: Array, gamma: Array | float, beta: Array | float, eps: float, w: Array | None = None
) -> tuple[Array, Moments]:
    """Return y and the moments of rows (N, G, D), with gamma and beta for (G, D).

    w has shape (N, 1, D). Values with w = 0 are ignored.
    """
    n, groups, count = rows.shape
    if w is None:
        mean, e, m2, power = _statistics(rows.reshape(n * groups, count), np.ones((1, count)))
        sizes: Any = count
    else:
        parts = [_statistics(row, keep) for row, keep in zip(rows, w, strict=True)]
        mean, e, m2, power = (np.concatenate(v) for v in zip(*parts, strict=True))
        sizes = np.repeat(w.sum(axis=2).astype(np.int64).ravel(), groups)
    var = m2 / np.reshape(sizes, (-1, 1))  # (4)
    rstd = 1 / np.sqrt(var + np.ldexp(np.float64(eps), -2 * power))  # (5)
    xhat = (e * rstd).reshape(rows.shape)  # (6)
    return gamma * xhat + beta, _moments(sizes, mean, m2, power)  # (46)


@np.errstate(all="ignore")
def _row_gradients(
    g: Array,
    rows: Array,
    moments: Moments,
    gamma: Array | float,
    eps: float,
    w: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Return dx of rows (N, G, D), and dgamma and dbeta for (G, D); w as in `_normalize_rows`."""
    by_row = (*rows.shape[:2], 1)
    mean, var = moments.mean.reshape(by_row), moments.var().reshape(by_row)
    root = _root(rows, mean, var, eps, w)  # (5)
    xhat = _scaled(rows, mean, root)
    if w is not None:
        xhat = np.where((w == 0) & (g == 0), 0, xhat)  # as NaN * 0 = NaN
    up = _power(g.ravel())
    g = np.ldexp(g, -up)
    dbeta = np.ldexp(g.sum(axis=0), up)  # (47)
    dgamma = np.ldexp((g * xhat).sum(axis=0), up)  # (48)
    dz = g * gamma  # (49)
    count = np.reshape(moments.count, (-1, 1, 1)) if w is None else w.sum(axis=2, keepdims=True)
    c1 = dz.sum(axis=2, keepdims=True) / count  # (50)
    c2 = (dz * xhat).sum(axis=2, keepdims=True) / count  # (50)
    dx = np.ldexp((dz - (1 if w is None else w) * (c1 + xhat * c2)) / root, up)  # (51)
    return dx, dgamma, dbeta


def _last_axes(x: ArrayLike, axis: int) -> Array:
    """Return `x` as a wide array (N, 1, D), where D combines the axes from `axis` on."""
    wide = _wide(x)
    return wide.reshape(prod(wide.shape[:axis]), 1, prod(wide.shape[axis:]))


def _each(values: ArrayLike | None, shape: tuple[int, ...]) -> Array | float:
    """Return one wide number for each element of a row, shape (1, D), or 1 if `values` is None."""
    return 1.0 if values is None else _wide(values).reshape(1, prod(shape))


def _groups(x: ArrayLike, axis: int, groups: int) -> tuple[Array, tuple[int, ...]]:
    """Return `x` as a wide array (N, G, D), and its shape with the channels on axis 1."""
    moved = np.moveaxis(_wide(x), axis, 1)
    return moved.reshape(len(moved), groups, prod(moved.shape[1:]) // groups), moved.shape


def _row_shares(
    x: ArrayLike, axis: int, groups: int, mask: ArrayLike | None, lengths: ArrayLike | None
) -> Array | None:
    """Return how often each value of a row counts, shape (N, 1, D), or None if all count once."""
    if mask is None and lengths is None:
        return None
    n, each = len(np.asarray(x)), np.shape(x)[axis] // groups
    w = _shares(x, axis, mask, None, lengths).reshape(n, 1, 1, -1)
    if w.all():
        return None
    return np.broadcast_to(w, (n, 1, each, w.shape[3])).reshape(n, 1, -1)


def _spread(
    values: ArrayLike | None, default: float, moved: tuple[int, ...], groups: int
) -> Array | float:
    """Return one wide number for each element of a row, shape (G, D), given one per channel."""
    if values is None:
        return float(default)
    return np.repeat(_wide(values), prod(moved[2:])).reshape(groups, -1)


def _rms_eps(x: ArrayLike, eps: float | None) -> float:
    if eps is not None:
        return eps
    dtype = np.asarray(x).dtype
    return float(np.finfo(np.float32 if dtype.itemsize == 2 else dtype).eps)


def _deliver(y: Array, out: Array | None) -> Array:
    """Return `y`, or `out` filled with it if there is one."""
    if out is None:
        return y
    out[...] = y
    return out


# ---- shared ------------------------------------------------------------------------------


def _statistics(rows: Array, w: Array) -> tuple[Array, Array, Array, NDArray[np.intc]]:
    """Return mean (C, 1), deviations e (C, M), M2 (C, 1) and p (C, 1).

    The algorithm is the corrected two-pass one. Mean and M2 are those of values with w > 0, each of
    which counts w times. Deviations are those of all values. They are divided by 2**p, and M2 by
    its square, so that squares do not overflow.
    """
    count, valid = w.sum(), w[0] > 0  # (62)
    w = w[:, valid]
    most = np.abs(rows[:, valid]).max(axis=1, keepdims=True)
    first = np.where(np.isfinite(most) & (most > 2.0**900), 600, 0)
    rows = np.ldexp(rows, -first)
    v = rows[:, valid]
    pivot = (w * v).sum(axis=1, keepdims=True) / count  # (1), (63)
    pivot = np.clip(pivot, v.min(axis=1, keepdims=True), v.max(axis=1, keepdims=True))  # (31)
    residual = (w * (v - pivot)).sum(axis=1, keepdims=True) / count  # (30)
    e = (rows - pivot) - residual  # (2), (33)
    power = _power(e[:, valid])
    e = np.ldexp(e, -power)
    m2 = (w * e[:, valid] ** 2).sum(axis=1, keepdims=True)  # (3), (64)
    total = np.where(m2 == 0, 0, first + power).astype(np.intc)
    return np.ldexp(pivot + residual, first), e, m2, total  # (32)


def _moments(count: Any, mean: Array, m2: Array, power: NDArray[np.intc]) -> Moments:
    """Return the `Moments` of the results of `_statistics`."""
    std = np.ldexp(np.sqrt(m2 / np.reshape(count, (-1, 1))), power)[:, 0].astype(np.float64)
    return Moments(count, mean[:, 0], np.ldexp(m2, 2 * power)[:, 0])._tell(std)


def _power(values: Array) -> NDArray[np.intc]:
    """Return the least p >= -500 with all absolute values of the last axis below 2**p.

    If all values are 0, or one is not finite, p is 0.
    """
    most = np.abs(values).max(axis=-1, keepdims=True, initial=0)
    power = np.maximum(np.frexp(most)[1], -500)
    return np.where(np.isfinite(most) & (most > 0), power, 0).astype(np.intc)


def _scaled(rows: Array, mean: Array | float, root: Array) -> Array:
    """Return (2) and (6): (rows - mean) / root, also if the difference overflows."""
    near = (rows - mean) / root
    return np.where(np.abs(rows) > 1, (rows / 4 - mean / 4) / (root / 4), near)


def _root(
    rows: Array, mean: Array | float, var: Array | float, eps: float, w: Array | None = None
) -> Array:
    """Return sqrt(var + eps), computed from the rows if var has overflowed or is very small."""
    root = np.sqrt(var + eps)
    lost = (var == np.inf) | (np.asarray(var) < 1e-290)
    if not np.any(lost):
        return np.asarray(root)
    w = np.ones_like(rows[..., :1]) + np.zeros_like(rows) if w is None else w + np.zeros_like(rows)
    e = np.where(w > 0, rows / 4 - mean / 4, 0)
    power = _power(e)
    squares = (w * np.ldexp(e, -power) ** 2).sum(axis=-1, keepdims=True)
    power = power + 2
    scaled = squares / w.sum(axis=-1, keepdims=True) + np.ldexp(np.float64(eps), -2 * power)
    return np.where(lost, np.ldexp(np.sqrt(scaled), power), root)


def _shares(
    x: ArrayLike,
    axis: int,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    lengths: ArrayLike | None,
) -> Array:
    """Return how often each position counts, as one row for all channels, shape (1, M)."""
    first = np.moveaxis(np.asarray(x), axis, 0)
    w = np.ones(first.shape[1:], _wide(x).dtype)
    for given in (mask, weights):
        if given is not None:
            array = np.asarray(given)
            w = w * (array.squeeze(axis) if array.ndim == first.ndim else array)
    if lengths is not None:
        ends = np.asarray(lengths).reshape(-1, *[1] * (w.ndim - 1))
        w = w * (np.indices(w.shape)[1] < ends)
    return w.reshape(1, w.size)


def _count(w: Array, weights: ArrayLike | None) -> int | float:
    """Return how many values count, or the sum of their weights."""
    return int(w.sum()) if weights is None else float(w.sum())


def _wide(values: ArrayLike) -> Array:
    """Return a copy in float64, or in long double if the values are long double."""
    array = np.asarray(values)
    return array.astype(np.promote_types(array.dtype, np.float64))


def _fold(x: ArrayLike, axis: int) -> Array:
    """Return `x` as wide rows, one for each channel: shape (C, M) with M = N * S."""
    moved = np.moveaxis(_wide(x), axis, 0)
    return moved.reshape(moved.shape[0], prod(moved.shape[1:]))


def _unfold(rows: Array, x: ArrayLike, axis: int, out: Array | None) -> Array:
    """Undo `_fold`, into `out` if there is one."""
    y = np.moveaxis(rows.reshape(np.moveaxis(np.asarray(x), axis, 0).shape), 0, axis)
    return _deliver(y, out)


def _column(values: ArrayLike | None, default: float) -> Array | float:
    """Return one wide number per channel, shape (C, 1), or `default` if `values` is None."""
    return default if values is None else _wide(values)[:, np.newaxis]
