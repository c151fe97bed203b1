"""Channels and rows that the loops of a kernel cannot write.

The sum of the squares of values of 1e200 is too large for float64, but the values divided by their
standard deviation are not. Kernels mark such a channel or row and leave it out, also if a sum of
gradients is too large for their type (`beyond` in `_kernels/statistics.pxd`). This module computes
it in float64, from values that are multiplied by a power of two, which is exact.

d = sqrt(var + eps) is the divisor of the normalization; 2**e is the power of two just above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import batch_norm
from .forms import Form

__all__ = [
    "Channels",
    "Rows",
    "backward",
    "backward_rows",
    "deviations",
    "exponent",
    "forward",
    "forward_rows",
    "in_range",
]

Array = NDArray[Any]

_PIECE = 1 << 21  # values of rows that are copied at once
_MOST, _LEAST = 2.0**500, 2.0**-500  # limits of a variance whose sums float64 can represent


class Channels(NamedTuple):
    """A call of batch normalization, and the channels that the kernel has left out."""

    x: Array  # as the kernel has read it
    dy: Array | None
    residual: Array | None
    y: Array  # the array for the result, y or dx
    dresidual: Array | None
    axis: int
    where: NDArray[np.intp]  # the channels
    mean: Array  # of these channels only, in float64, as var, gamma and beta
    var: Array  # the variance, or M2 if `count` is not 1
    gamma: Array
    beta: Array
    count: Any
    measured: bool  # whether mean and M2 are those of x
    settings: tuple[int, float, str | None, float]
    selected: tuple[Any, ...]
    from_output: bool
    threads: int | None
    std: Array | None = None  # standard deviations, if x contains y


@np.errstate(all="ignore")
def forward(call: Channels) -> Array:
    """Write y of the channels that were left out, and return their standard deviations."""
    std = np.empty(call.where.size)
    for own, index in _pieces(call):
        at = _scaled(call, own, _wide(call.x, index))
        std[own] = at.std
        settings = call.axis, 0.0, *call.settings[2:]
        call.y[index] = batch_norm.inference(
            at.x, at.mean, at.var, np.ldexp(call.gamma[own], at.rest), call.beta[own],
            _wide(call.residual, index), settings, call.selected, None, call.threads, True,
        )  # fmt: skip
    return std


@np.errstate(all="ignore")
def backward(call: Channels) -> tuple[Array, Array]:
    """Write dx and the gradient of the residual, and return dgamma and dbeta, in float64."""
    sums = np.zeros((2, call.where.size))
    for own, index in _pieces(call):
        assert call.dy is not None
        given = (call.x, call.dy)
        if not (call.measured or all(np.isfinite(a[index]).all() for a in given)):
            _backward_as_is(call, own, index, sums)
            continue
        dy, at = _wide(call.dy, index), _scaled(call, own, _wide(call.x, index))
        up = exponent(_largest(call, np.abs(dy)))
        through = SimpleNamespace(count=call.count, mean=at.mean, m2=at.var * call.count)
        statistics = through if call.measured else (at.mean, at.var)
        settings = call.axis, 5e-324 if call.measured else 0.0, *call.settings[2:]
        dx, dgamma, dbeta, *rest = batch_norm.backward(
            np.ldexp(dy, -_column(up, call)), at.x, statistics, np.ldexp(call.gamma[own], at.rest),
            call.beta[own], _wide(call.residual, index), settings, call.selected, call.from_output,
            None, None, call.threads, None, True,
        )  # fmt: skip
        call.y[index] = np.ldexp(dx, _column(up - at.e - at.rest, call))
        sums[:, own] = np.ldexp(dgamma, up + at.rest), np.ldexp(dbeta, up)
        if call.dresidual is not None:
            call.dresidual[index] = np.ldexp(rest[0], _column(up, call))
    return sums[0], sums[1]


def _backward_as_is(call: Channels, own: slice, index: tuple[Any, ...], sums: Array) -> None:
    """Write the gradients of one channel without scaling, because a value is not finite."""
    dx, dgamma, dbeta, *rest = batch_norm.backward(
        np.asarray(call.dy)[index], call.x[index], (call.mean[own], call.var[own]),
        call.gamma[own], call.beta[own],
        None if call.residual is None else call.residual[index], call.settings, call.selected,
        call.from_output, None, None, call.threads, None, True,
    )  # fmt: skip
    call.y[index] = dx
    sums[:, own] = dgamma, dbeta
    if call.dresidual is not None:
        call.dresidual[index] = rest[0]


@np.errstate(all="ignore")
def in_range(
    x: Array, axis: int, moments: Any, eps: float, selected: tuple[Any, ...], threads: int | None
) -> tuple[Array, Array, Array, NDArray[np.intc]] | None:
    """Return x / 2**e in float64, its mean, its var + eps, and e; None if x is in range.

    If e is negative, the mean has been subtracted first. Mean, var and e have one value per
    channel.
    """
    var = moments.m2 / moments.count + eps
    if not (_unsure(var) & np.isfinite(moments.mean)).any():
        return None
    zeros = np.zeros_like(var)
    call = Channels(
        x, None, None, x, None, axis, np.arange(var.size), moments.mean, moments.m2, zeros, zeros,
        moments.count, True, (axis, eps, None, 0.0), selected, False, threads,
    )  # fmt: skip
    at = _scaled(call, slice(None), x.astype(np.float64))
    return at.x, at.mean, at.var, at.e


@np.errstate(all="ignore")
def deviations(
    x: Array, axis: int, moments: Any, selected: tuple[Any, ...], threads: int | None
) -> Array:
    """Return the standard deviation of each channel, also of those whose M2 is infinite."""
    std: Array = np.sqrt(moments.m2 / moments.count)
    for c in np.flatnonzero(np.isinf(moments.m2) & np.isfinite(moments.mean)):
        part = np.ldexp(np.take(x, [c], axis), -600)
        found = batch_norm.statistics(part, axis, selected, threads)
        std[c] = np.ldexp(np.sqrt(found.m2 / found.count), 600)[0]
    return std


def _pieces(call: Channels) -> Iterator[tuple[slice, tuple[Any, ...]]]:
    """Yield the channels one by one, because their bits must not depend on other channels."""
    for i in range(call.where.size):
        own = slice(i, i + 1)
        yield own, (*[slice(None)] * call.axis, call.where[own])


def _wide(array: Array | None, index: tuple[Any, ...]) -> Any:
    return None if array is None else array[index].astype(np.float64)


def _column(values: Array, call: Channels) -> Array:
    return values.reshape([-1 if i == call.axis else 1 for i in range(call.x.ndim)])


def exponent(values: Array) -> NDArray[np.intc]:
    """Return e with 2**(e - 1) <= value < 2**e, or 0 if the value is 0 or not finite."""
    exponents: NDArray[np.intc] = np.where(np.isfinite(values), np.frexp(values)[1], 0)
    return exponents


class _Scaled(NamedTuple):
    """Channels in range: values divided by 2**(e + rest), and their statistics."""

    x: Array
    mean: Array  # of these values; 0 if the mean was subtracted first
    var: Array  # var + eps of x / 2**e
    e: NDArray[np.intc]
    rest: NDArray[np.intc]  # gamma is multiplied by 2**rest
    std: Array  # of x before scaling


def _scaled(call: Channels, own: slice, x: Array) -> _Scaled:
    """Return some channels scaled into range; their values are not scaled if x contains y."""
    mean, eps = call.mean[own], call.settings[1]
    var = call.var[own] / call.count
    d, std, shift = np.sqrt(var + eps), np.sqrt(var), _shift(var + eps)
    again = np.flatnonzero(_unsure(var + eps)) if call.measured and not call.from_output else ()
    if len(again):
        near = _column(np.where(shift > 0, mean, 0), call)
        some = np.ldexp(np.take(x - near, again, call.axis), _column(shift[again], call))
        found = batch_norm.statistics(some, call.axis, call.selected, call.threads)
        var = found.m2 / found.count
        std[again] = np.ldexp(np.sqrt(var), -shift[again])
        var += np.ldexp(eps, 2 * shift[again])
        d[again] = np.ldexp(np.sqrt(var), -shift[again])
    if call.std is not None:
        d = np.where(np.isinf(d), call.std[own], d)
    e = exponent(d)
    rest = np.zeros_like(e)
    if not call.from_output:  # otherwise mean is beta
        spread = _largest(call, np.where(np.isfinite(x), np.abs(x - _column(mean, call)), 0))
        near = np.where((e < 0) & np.isfinite(spread), mean, 0)  # x may be far larger than x - mean
        if not call.measured:  # otherwise x - mean is never that much larger than d
            rest = np.where(np.isinf(spread), 2, exponent(spread) - 1000) - e
            rest = np.maximum(rest, 0)
        x = np.ldexp(x - _column(near, call), -_column(e + rest, call))
        mean = np.ldexp(mean - near, -e - rest)
    return _Scaled(x, mean, np.ldexp(d, -e) ** 2, e, rest, std)


def _largest(call: Channels, values: Array) -> Array:
    largest: Array = values.max(tuple(i for i in range(values.ndim) if i != call.axis))
    return largest


def _shift(v: Array) -> NDArray[np.intc]:
    """Return the exponent of a power of two that brings values of variance v into range."""
    shift: NDArray[np.intc] = np.where(v > _MOST, -600, np.where(v < _LEAST, 600, 0))
    return shift


def _unsure(v: Array) -> NDArray[np.bool_]:
    """Return whether squares may be out of range of float64, or of float32."""
    return (v > _MOST) | (v < 2.0**-60)


class Rows(NamedTuple):
    """A call for rows, and the rows that the kernel has left out."""

    form: Form
    where: NDArray[np.intp]  # in the order of the axes of x
    x: Array  # as the kernel has read it
    dy: Array | None
    y: Array  # y, or dx
    mean: Array  # of all rows, in the order of the axes
    m2: Array
    gamma: Array
    beta: Array | None
    eps: float
    centred: bool


@np.errstate(all="ignore")
def forward_rows(call: Rows) -> Array:
    """Write y of the rows that were left out, and return the standard deviations of all rows."""
    std: Array = np.sqrt(call.m2 / call.form.size)
    for rows, index in _row_pieces(call):
        xhat, d, shift = _xhat(call, rows, index)
        std[rows] = np.ldexp(np.sqrt(d * d - np.ldexp(call.eps, 2 * shift)), -shift)[:, 0]
        y = xhat * _along(call.gamma, call.form, rows) + _along(call.beta, call.form, rows)
        _write(call, call.y, index, y)
    return std


@np.errstate(all="ignore")
def backward_rows(call: Rows) -> tuple[Array, Array]:
    """Write dx, and return what the rows add to dgamma and dbeta, in float64, (G * K,) each."""
    form = call.form
    dgamma, dbeta = np.zeros((2, form.groups, form.size // form.run))
    for rows, index in _row_pieces(call):
        xhat, d, shift = _xhat(call, rows, index)
        dy = _read(call, call.dy, index)
        up = int(exponent(np.abs(dy).max()))
        dy = np.ldexp(dy, -up)
        dz = dy * _along(call.gamma, form, rows)
        c1 = dz.mean(1, keepdims=True) if call.centred else 0.0
        dz -= c1 + xhat * (dz * xhat).mean(1, keepdims=True)
        _write(call, call.y, index, np.ldexp(dz / d, shift + up))
        for into, values in ((dgamma, dy * xhat), (dbeta, dy)):
            sums = np.ldexp(values.reshape(len(rows), -1, form.run).sum(2), up)
            np.add.at(into, rows % form.groups, sums)
    return dgamma.ravel(), dbeta.ravel()


def _row_pieces(call: Rows) -> Iterator[tuple[NDArray[np.intp], tuple[Any, ...]]]:
    """Yield some of the rows, and their index in arrays like x whose channels are on axis 1."""
    form, each = call.form, max(1, _PIECE // call.form.size)
    for start in range(0, call.where.size, each):
        rows = call.where[start : start + each]
        if form.lead == 0:
            yield rows, (None,)  # x is a single row
        elif form.axis == 0:
            yield rows, np.unravel_index(rows, call.x.shape[: form.lead])
        else:
            n, g = np.divmod(rows, form.groups)
            channels = form.values // form.groups
            yield rows, (n[:, None], channels * g[:, None] + np.arange(channels))


def _first(call: Rows, array: Array) -> Array:
    return np.moveaxis(array, call.form.axis, 1) if call.form.axis else array


def _read(call: Rows, array: Any, index: tuple[Any, ...]) -> Array:
    rows: Array = _first(call, array)[index].astype(np.float64)
    return rows.reshape(-1, call.form.size)


def _write(call: Rows, array: Array, index: tuple[Any, ...], values: Array) -> None:
    into = _first(call, array)
    into[index] = values.reshape(into[index].shape)


def _along(values: Array | None, form: Form, rows: NDArray[np.intp]) -> Any:
    """Return gamma or beta of each value of some rows, in float64."""
    if values is None:
        return 0.0
    wide = values.astype(np.float64).reshape(form.groups, -1)
    return np.repeat(wide, form.run, 1)[rows % form.groups]


def _xhat(
    call: Rows, rows: NDArray[np.intp], index: tuple[Any, ...]
) -> tuple[Array, Array, NDArray[np.intc]]:
    """Return xhat, and d and s, where d / 2**s is the divisor."""
    size = call.form.size
    v = call.m2[rows, None] / size + call.eps
    shift = _shift(v)
    down = np.minimum(shift, 0)  # scale down before subtracting, up afterwards: x may be large
    e = np.ldexp(_read(call, call.x, index), down) - np.ldexp(call.mean[rows, None], down)
    e = np.ldexp(e, shift - down)
    if call.dy is None or _unsure(v).any():
        rest = e.mean(1, keepdims=True) if call.centred else 0.0
        v = ((e - rest) ** 2).mean(1, keepdims=True) + np.ldexp(call.eps, 2 * shift)
    d = np.sqrt(v)
    return e / d, d, shift
