"""Rows: what layer, RMS, group and instance normalization share, from the checks to the kernel.

A row is D neighbouring values that share one mean and variance. A `Form` says how an array falls
into them; `forward`, `backward` and `gradients` fold it so, allocate, and call the kernel.

N = samples, G = groups of a sample, D = values of a group. C = channels, S = positions.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _layout
from ._arguments import channel_axis, check_eps, destination, integer, integer_from, storage, tensor
from ._runtime import row_kernels, thread_count
from .moments import Moments

# By storage, as in _arguments: the kernels' names of an element's type, and of what is computed in.
_TYPES = {
    "f": ("float", "float"),
    "d": ("double", "double"),
    "e": ("uint16_t", "float"),
    "E": ("uint16_t", "float"),
}
_STORAGE: dict[str, int] = {"f": 0, "d": 0} | row_kernels.STORAGE
_SERIAL: int = row_kernels.SMALL  # values below which one thread is used anyway
_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)
_EPS = {dtype: float(np.finfo(dtype).eps) for dtype in (_F32, _F64)}

_COUNT: Any
_SMALL: Any
_FORWARD: dict[str, Any]
_BACKWARD: dict[str, Any]

_Statistics = tuple[NDArray[np.float64], NDArray[np.float64]]  # mean and M2 of the rows


def _bind(module: ModuleType) -> None:
    """Call the kernels of `module` from now on; keys are storage."""
    global _COUNT, _SMALL, _FORWARD, _BACKWARD
    _COUNT, _SMALL = module.count, module.small
    _FORWARD = {e: module.forward[types] for e, types in _TYPES.items()}
    _BACKWARD = {e: module.backward[types] for e, types in _TYPES.items()}


_bind(row_kernels)


class Form(NamedTuple):
    """How an array with its channels on axis 1, or its normalized axes last, falls into rows."""

    lead: int  # axes that fold into N
    samples: int  # N
    groups: int  # G
    size: int  # D, values of a row
    run: int  # S, neighbours that share a gamma and beta
    shape: tuple[int, ...]  # of gamma and beta
    channels_first: bool  # whether the channel axis has to be moved to axis 1
    axis: int  # which one it was, if not 1
    values: int  # of gamma and beta

    @property
    def rows(self) -> int:
        return self.samples * self.groups


def layer_form(x: NDArray[Any], axis: int) -> Form:
    return _layer_form(x.shape, integer("axis", axis))


def group_form(x: NDArray[Any], axis: int, num_groups: int) -> Form:
    num_groups = integer_from("num_groups", num_groups)
    return _group_form(x.shape, _sample_channel_axis(x, axis), num_groups)


def instance_form(x: NDArray[Any], axis: int) -> Form:
    return _instance_form(x.shape, _sample_channel_axis(x, axis))


# Of the shape alone, so a small call need not work it out again.


@lru_cache(maxsize=1024)
def _layer_form(shape: tuple[int, ...], axis: int) -> Form:
    ndim = len(shape)
    if ndim == 0:
        raise ValueError("x has shape (); it must have at least 1 axis")
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis is {axis}; x has {ndim} axes, so it must be in {-ndim}..{ndim - 1}")
    lead = int(axis) + ndim if axis < 0 else int(axis)
    size = prod(shape[lead:])
    return Form(lead, prod(shape[:lead]), 1, size, 1, shape[lead:], False, 1, size)


@lru_cache(maxsize=1024)
def _group_form(shape: tuple[int, ...], axis: int, num_groups: int) -> Form:
    channels = shape[axis]
    if channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}; it must divide the {channels} channels of x")
    positions = _positions(shape, axis)
    count = channels // num_groups * positions
    if shape[0] == 1 and count == 1:
        raise ValueError(
            f"x has shape {shape}: one value a group has no variance, and would be normalized "
            "to beta whatever it is. Give larger groups, or more positions"
        )
    run = max(1, positions)
    return Form(1, shape[0], int(num_groups), count, run, (channels,), True, axis, channels)


@lru_cache(maxsize=1024)
def _instance_form(shape: tuple[int, ...], axis: int) -> Form:
    channels, positions = shape[axis], _positions(shape, axis)
    if len(shape) < 3 or positions == 1:
        raise ValueError(
            f"x has shape {shape}: one position a channel has no variance, and would be "
            "normalized to beta whatever it is. Give more positions, such as (N, C, L) with L > 1"
        )
    run = max(1, positions)
    return Form(1, shape[0], channels, positions, run, (channels,), True, axis, channels)


def _sample_channel_axis(x: NDArray[Any], axis: int) -> int:
    axis = channel_axis(x, axis)
    if axis == 0:
        raise ValueError("axis is 0, which holds the samples; channels must lie on another axis")
    return axis


def _positions(shape: tuple[int, ...], axis: int) -> int:
    return prod(shape) // max(1, shape[0] * shape[axis])


def threads_for(x: NDArray[Any], num_threads: int | None) -> int:
    """Return the threads for one call; a small one has one, and need not ask how many there are."""
    return 1 if num_threads is None and x.size < _SERIAL else thread_count(num_threads)


def rms_eps(x: NDArray[Any], eps: float | None) -> float:
    if eps is None:
        return _EPS[_computed(x)]
    check_eps(eps)
    return eps


def _computed(x: NDArray[Any]) -> np.dtype[Any]:
    """Return the type that is computed in."""
    return _F64 if x.dtype is _F64 else _F32


@lru_cache(maxsize=1024)
def _cuts(form: Form, backward: bool, last: bool) -> tuple[int, int]:
    """Return how many sums the kernel keeps a row, and in how many chunks it cuts N."""
    cuts: tuple[int, int] = _COUNT(form.samples, form.groups, form.size, form.run, backward, last)
    return cuts


def _fold(x: NDArray[Any], form: Form) -> tuple[NDArray[Any], _layout.Plan]:
    """Return `x`, with its channels on axis 1, or a copy of it, and how it falls into rows."""
    if form.channels_first:
        return _layout.fold_groups(x, form.groups, form.axis)
    return _layout.fold_rows(x, form.lead, form.groups)


def vectors_of(x: NDArray[Any], form: Form, **given: ArrayLike | None) -> list[NDArray[Any]]:
    """Return gamma and beta as vectors of the type that is computed in; 1 and 0 where None."""
    vectors = []
    dtype = _computed(x)
    for name, value in given.items():
        if value is None:
            default = np.ones if name == "gamma" else np.zeros
            vectors.append(default(form.values, dtype))
            continue
        if (
            type(value) is np.ndarray
            and value.dtype is dtype
            and value.shape == (form.values,) == form.shape
            and value.strides == (dtype.itemsize,)
            and value.flags.aligned
        ):
            vectors.append(value)
            continue
        array = tensor(name, value, half=False)
        if array.shape != form.shape:
            each = "channel" if form.channels_first else "element of the normalized axes"
            raise ValueError(
                f"{name} has shape {array.shape}; it must have shape {form.shape}, "
                f"one value a{'n' * (each[0] == 'e')} {each}"
            )
        vectors.append(_rounded(array, dtype).reshape(-1))
    return vectors


def _rounded(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return `array` in C order and of this float type; a value beyond float32 is inf."""
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    with np.errstate(all="ignore"):
        return array.astype(dtype, order="C")


def _first(array: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return a view with the channels on axis 1."""
    return array if axis == 1 else np.moveaxis(array, axis, 1)


def normalize(
    x: NDArray[Any],
    form: Form,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    axis: int,
    eps: float,
    centred: bool,
    out: NDArray[Any] | None,
    num_threads: int | None,
) -> tuple[NDArray[Any], _Statistics]:
    """Return y, and mean and M2 of the rows, each (N * G,); `axis` is that of the channels."""
    if num_threads is None and x.size < _SERIAL and (axis == 1 or not form.channels_first):
        small = _small(x, form, gamma, beta, eps, centred, out)
        if small is not None:
            return small
    check_eps(eps)
    vectors = vectors_of(x, form, gamma=gamma, beta=beta)
    nt = threads_for(x, num_threads)
    y = destination(out, x, (x, *vectors))
    first, target = (_first(a, axis) if form.channels_first else a for a in (x, y))
    return y, _forward(first, target, form, vectors, eps, centred, nt)


def _small(
    x: NDArray[Any],
    form: Form,
    gamma: Any,
    beta: Any,
    eps: Any,
    centred: bool,
    out: Any,
) -> tuple[NDArray[Any], _Statistics] | None:
    """Do a plain small call in one compiled step; None where it is not one."""
    if type(eps) is not float or len(form.shape) != 1:
        return None
    rows = form.samples * form.groups
    y = np.empty_like(x) if out is None else out
    gamma = np.ones(form.values, x.dtype) if gamma is None else gamma
    beta = np.zeros(form.values, x.dtype) if beta is None else beta
    work = np.empty((4, rows))
    cut = form.samples, form.groups, form.size, form.run
    if not _SMALL(x, y, gamma, beta, work, *cut, eps, centred):
        return None
    return y, (work[0], work[1])


def _forward(
    x: NDArray[Any],
    y: NDArray[Any],
    form: Form,
    vectors: list[NDArray[Any]],
    eps: float,
    centred: bool,
    nt: int,
) -> _Statistics:
    """Fill y and return mean and M2 of the rows, each (N * G,)."""
    if x.size == 0:
        return np.zeros(form.rows), np.zeros(form.rows)
    x, plan = _fold(x, form)
    last = plan.channels_inside
    target = _layout.like_empty(y, x, plan)
    slots, _ = _cuts(form, False, last)
    statistics = np.empty((2, form.rows))
    sums = np.empty(2 * form.rows * slots)
    e = storage(x.dtype)
    arrays = plan.view(x), plan.view(target), *vectors, statistics, sums
    _FORWARD[e](*arrays, form.groups, form.run, last, eps, centred, _STORAGE[e], nt)
    if target is not y:
        np.copyto(y, target)
    mean, m2 = statistics
    return _layout.by_axis(mean, x, plan), _layout.by_axis(m2, x, plan)


def moments_of(form: Form, statistics: _Statistics) -> Moments:
    """Return the moments of the rows."""
    return Moments._adopt(form.size, *statistics)


def backward(
    dy: NDArray[Any],
    x: NDArray[Any],
    form: Form,
    moments: Moments,
    gamma: ArrayLike | None,
    axis: int,
    eps: float,
    out: NDArray[Any] | None,
    num_threads: int | None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Check the statistics of what has a mean, and return dx, dgamma and dbeta."""
    check_eps(eps)
    if not isinstance(moments, Moments):
        raise TypeError(
            f"moments is of type {type(moments).__name__}; it must be the Moments that the "
            "forward returned for x"
        )
    if (len(moments), moments.count) != (form.rows, form.size):
        raise ValueError(
            f"moments has {len(moments)} rows of {moments.count} values; x has {form.rows} of "
            f"{form.size}. Give the Moments that the forward returned for this x"
        )
    statistics = moments.mean, moments.m2
    channels = axis if form.channels_first else None
    return gradients(dy, x, form, statistics, gamma, channels, eps, True, out, num_threads)


def gradients(
    dy: NDArray[Any],
    x: NDArray[Any],
    form: Form,
    statistics: _Statistics,
    gamma: ArrayLike | None,
    axis: int | None,
    eps: float,
    centred: bool,
    out: NDArray[Any] | None,
    num_threads: int | None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return dx, dgamma and dbeta; `axis` is that of the channels, where there is one."""
    dtype = _computed(x) if gamma is None else tensor("gamma", gamma, half=False).dtype
    (scale,) = vectors_of(x, form, gamma=gamma)
    nt = threads_for(x, num_threads)
    dx = destination(out, x, (x, dy, scale, *statistics))
    if x.size == 0:
        return dx, np.zeros(form.shape, dtype), np.zeros(form.shape, dtype)
    target = dx
    if axis is not None:
        dy, x, target = (_first(array, axis) for array in (dy, x, dx))
    sums = _run_backward(dy, x, target, form, statistics, scale, eps, centred, nt)
    dgamma, dbeta = _rounded(sums, dtype).reshape(2, *form.shape)
    return dx, dgamma, dbeta


def _run_backward(
    dy: NDArray[Any],
    x: NDArray[Any],
    dx: NDArray[Any],
    form: Form,
    statistics: _Statistics,
    gamma: NDArray[Any],
    eps: float,
    centred: bool,
    nt: int,
) -> NDArray[np.float64]:
    """Fill dx and return dgamma and dbeta, (2, C)."""
    x, plan = _fold(x, form)
    last = plan.channels_inside
    target = _layout.like_empty(dx, x, plan)
    slots, chunks = _cuts(form, True, last)
    parts = np.empty((chunks, 2, gamma.size))
    e = storage(x.dtype)
    _BACKWARD[e](
        plan.view(_layout.like(dy, x, plan)),
        plan.view(x),
        plan.view(target),
        gamma,
        *(_layout.by_row(v, x, plan) for v in statistics),
        np.empty(2 * form.rows * slots),
        parts,
        form.groups,
        form.run,
        last,
        eps,
        centred,
        _STORAGE[e],
        nt,
    )
    if target is not dx:
        np.copyto(dx, target)
    total: NDArray[np.float64] = parts[0] if chunks == 1 else parts.sum(axis=0)  # in order
    return total
