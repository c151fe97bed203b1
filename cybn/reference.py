"""The slow twin: batch normalization in plain NumPy, to check the kernels against.

Every function has the name and the signature of its counterpart in `cybn.functional`, where
the long docstrings are. A number in a comment, like (7), is an equation of docs/math.md, which
also explains the letters. One formula a line; clarity and accuracy first, speed last.

It differs from `cybn.functional` in four ways:

- everything is computed and returned in float64, or in long double where `x` is long double;
  only `Moments` holds float64 always;
- `out` may have any dtype and layout: it is filled and returned;
- `num_threads` is ignored;
- bad input is not checked, and NumPy's floating-point warnings are off.

Nothing in `cybn` but its bench imports this module. Tests and benches do.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .moments import Moments

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "moments",
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
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Moments]:
    """Normalize each channel of `x` by its own mean and variance; return y and the moments."""
    rows = _fold(x, axis)
    mean, e, m2 = _statistics(rows)
    var = m2 / rows.shape[1]  # (4)
    rstd = 1 / np.sqrt(var + eps)  # (5)
    xhat = e * rstd  # (6)
    z = _column(gamma, 1.0) * xhat + _column(beta, 0.0)  # (7)
    if residual is not None:
        z = z + _fold(residual, axis)
    y, _ = activated(z, activation, slope)
    return _unfold(y, x, axis, out), Moments(rows.shape[1], mean[:, 0], m2[:, 0])


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
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """Normalize each channel of `x` by a given mean and variance; return y."""
    e = _fold(x, axis) - _column(mean, 0.0)  # (2)
    rstd = 1 / np.sqrt(_column(var, 1.0) + eps)  # (5)
    xhat = e * rstd  # (6)
    z = _column(gamma, 1.0) * xhat + _column(beta, 0.0)  # (7)
    if residual is not None:
        z = z + _fold(residual, axis)
    y, _ = activated(z, activation, slope)
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
    from_output: bool = False,
    out: Array | None = None,
    out_residual: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, ...]:
    """Return dx, dgamma and dbeta of `batch_norm`, through the batch statistics."""
    rows = _fold(x, axis)
    rstd = 1 / np.sqrt(_column(moments.var(), 1.0) + eps)  # (5)
    xhat, z = _xhat(
        rows, _column(moments.mean, 0.0), rstd, gamma, beta, activation, slope, from_output
    )
    g, dresidual = _through_activation(dy, x, z, axis, activation, slope, residual, out_residual)
    dbeta = g.sum(axis=1, keepdims=True)  # (12)
    dgamma = (g * xhat).sum(axis=1, keepdims=True)  # (13)
    projected = g - dbeta / rows.shape[1] - xhat * (dgamma / rows.shape[1])  # (20)
    dx = _column(gamma, 1.0) * rstd * projected  # (21)
    return _unfold(dx, x, axis, out), dgamma[:, 0], dbeta[:, 0], *dresidual


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
    from_output: bool = False,
    out: Array | None = None,
    out_residual: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, ...]:
    """Return dx, dgamma and dbeta of `batch_norm_inference`; `mean` and `var` are constants."""
    rstd = 1 / np.sqrt(_column(var, 1.0) + eps)  # (5)
    rows = _fold(x, axis)
    xhat, z = _xhat(rows, _column(mean, 0.0), rstd, gamma, beta, activation, slope, from_output)
    g, dresidual = _through_activation(dy, x, z, axis, activation, slope, residual, out_residual)
    dbeta = g.sum(axis=1)  # (12)
    dgamma = (g * xhat).sum(axis=1)  # (13)
    dx = _column(gamma, 1.0) * rstd * g  # (23)
    return _unfold(dx, x, axis, out), dgamma, dbeta, *dresidual


@np.errstate(all="ignore")
def moments(x: ArrayLike, *, axis: int = 1, num_threads: int | None = None) -> Moments:
    """Return count, mean and M2 of each channel of `x`."""
    rows = _fold(x, axis)
    mean, _, m2 = _statistics(rows)
    return Moments(rows.shape[1], mean[:, 0], m2[:, 0])


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


def _xhat(
    rows: Array,
    mean: Array | float,
    rstd: Array,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    activation: str | None,
    slope: float,
    from_output: bool,
) -> tuple[Array, Array]:
    """Return xhat and z of rows of x; or of rows of y, where activation can be inverted."""
    if from_output:
        z = np.where(rows < 0, rows / slope, rows) if activation else rows
        return (z - _column(beta, 0.0)) / _column(gamma, 1.0), z
    xhat = (rows - mean) * rstd  # (2), (6)
    return xhat, _column(gamma, 1.0) * xhat + _column(beta, 0.0)  # (7)


def _through_activation(
    dy: ArrayLike,
    x: ArrayLike,
    z: Array,
    axis: int,
    activation: str | None,
    slope: float,
    residual: ArrayLike | None,
    out_residual: Array | None,
) -> tuple[Array, tuple[Array, ...]]:
    """Return the gradient with respect to z, and that of the residual if there is one."""
    if residual is not None:
        z = z + _fold(residual, axis)
    _, derivative = activated(z, activation, slope)
    g = np.where(derivative == 0, 0, _fold(dy, axis) * derivative)
    return g, () if residual is None else (_unfold(g, x, axis, out_residual),)


def _statistics(rows: Array) -> tuple[Array, Array, Array]:
    """Return mean (C, 1), deviations (C, M) and M2 (C, 1), by the corrected two-pass."""
    count = rows.shape[1]
    pivot = rows.sum(axis=1, keepdims=True) / count  # (1)
    pivot = np.clip(pivot, rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True))  # (31)
    e = rows - pivot  # (2)
    residual = e.sum(axis=1, keepdims=True) / count  # (30)
    e = e - residual  # (33)
    m2 = (e * e).sum(axis=1, keepdims=True)  # (3)
    mean = pivot + residual  # (32)
    return mean, e, m2


def _wide(values: ArrayLike) -> Array:
    """Return a copy in float64, or in long double where that is what came in."""
    array = np.asarray(values)
    return array.astype(np.promote_types(array.dtype, np.float64))


def _fold(x: ArrayLike, axis: int) -> Array:
    """Return `x` as wide rows, one for each channel: shape (C, M) with M = N * S."""
    moved = np.moveaxis(_wide(x), axis, 0)
    return moved.reshape(moved.shape[0], prod(moved.shape[1:]))


def _unfold(rows: Array, x: ArrayLike, axis: int, out: Array | None) -> Array:
    """Undo `_fold`, into `out` if there is one."""
    y = np.moveaxis(rows.reshape(np.moveaxis(np.asarray(x), axis, 0).shape), 0, axis)
    if out is None:
        return y
    out[...] = y
    return out


def _column(values: ArrayLike | None, default: float) -> Array | float:
    """Return one wide number a channel, shape (C, 1), or `default` where there are none."""
    return default if values is None else _wide(values)[:, np.newaxis]
