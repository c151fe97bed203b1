"""Rows: what layer, RMS, group and instance normalization share, from the checks to the kernel.

A row is D neighbouring values that share one mean and variance. A `Form` says how an array falls
into them; `forward`, `backward` and `gradients` fold it so, allocate, and call the kernel.

N = samples, G = groups of a sample, D = values of a group. C = channels, S = positions.
"""

from __future__ import annotations

from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _layout
from ._arguments import channel_axis, check_eps, destination, storage, tensor, whole
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
_F32, _F64 = np.dtype(np.float32), np.dtype(np.float64)

_COUNT: Any
_FORWARD: dict[str, Any]
_BACKWARD: dict[str, Any]

_Statistics = tuple[NDArray[np.float64], NDArray[np.float64]]  # mean and M2 of the rows


def _bind(module: ModuleType) -> None:
    """Call the kernels of `module` from now on; keys are storage."""
    global _COUNT, _FORWARD, _BACKWARD
    _COUNT = module.count
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

    @property
    def rows(self) -> int:
        return self.samples * self.groups


def layer_form(x: NDArray[Any], axis: int) -> Form:
    axis = whole("axis", axis)
    if x.ndim == 0:
        raise ValueError("x has shape (); it must have at least 1 axis")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"axis is {axis}; x has {x.ndim} axes, so it must be in {-x.ndim}..{x.ndim - 1}"
        )
    lead = axis + x.ndim if axis < 0 else axis
    shape = x.shape[lead:]
    return Form(lead, prod(x.shape[:lead]), 1, prod(shape), 1, shape, False)


def group_form(x: NDArray[Any], axis: int, num_groups: int) -> Form:
    if isinstance(num_groups, bool):
        raise TypeError(f"num_groups is {num_groups!r}; it must be an int")
    num_groups = whole("num_groups", num_groups)
    channels = x.shape[_sample_channel_axis(x, axis)]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}; it must divide the {channels} channels of x")
    positions = _positions(x, channels)
    count = channels // num_groups * positions
    if x.shape[0] == 1 and count == 1:
        raise ValueError(
            f"x has shape {x.shape}: one value a group has no variance, and would be normalized "
            "to beta whatever it is. Give larger groups, or more positions"
        )
    return Form(1, x.shape[0], num_groups, count, max(1, positions), (channels,), True)


def instance_form(x: NDArray[Any], axis: int) -> Form:
    channels = x.shape[_sample_channel_axis(x, axis)]
    positions = _positions(x, channels)
    if x.ndim < 3 or positions == 1:
        raise ValueError(
            f"x has shape {x.shape}: one position a channel has no variance, and would be "
            "normalized to beta whatever it is. Give more positions, such as (N, C, L) with L > 1"
        )
    return Form(1, x.shape[0], channels, positions, max(1, positions), (channels,), True)


def _sample_channel_axis(x: NDArray[Any], axis: int) -> int:
    axis = channel_axis(x, axis)
    if axis == 0:
        raise ValueError("axis is 0, which holds the samples; channels must lie on another axis")
    return axis


def _positions(x: NDArray[Any], channels: int) -> int:
    return int(x.size // max(1, x.shape[0] * channels))


def rms_eps(x: NDArray[Any], eps: float | None) -> float:
    if eps is None:
        return float(np.finfo(_computed(x)).eps)
    check_eps(eps)
    return eps


def _computed(x: NDArray[Any]) -> np.dtype[Any]:
    """Return the type that is computed in."""
    return _F64 if x.dtype == _F64 else _F32


def vectors_of(x: NDArray[Any], form: Form, **given: ArrayLike | None) -> list[NDArray[Any]]:
    """Return gamma and beta as vectors of the type that is computed in; 1 and 0 where None."""
    vectors = []
    dtype = _computed(x)
    for name, value in given.items():
        if value is None:
            default = np.ones if name == "gamma" else np.zeros
            vectors.append(default(prod(form.shape), dtype))
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
    with np.errstate(over="ignore"):
        return array.astype(dtype, order="C")


def _first(array: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return a view with the channels on axis 1."""
    return array if axis == 1 else np.moveaxis(array, axis, 1)


def normalize_channels(
    x: NDArray[Any],
    form: Form,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    axis: int,
    eps: float,
    out: NDArray[Any] | None,
    num_threads: int | None,
) -> tuple[NDArray[Any], Moments]:
    """Do what group and instance normalization share."""
    check_eps(eps)
    vectors = vectors_of(x, form, gamma=gamma, beta=beta)
    nt = thread_count(num_threads)
    y = destination(out, x, (x, *vectors))
    statistics = forward(_first(x, axis), _first(y, axis), form, vectors, eps, True, nt)
    return y, moments_of(form, statistics)


def forward(
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
    x, plan = _layout.fold_rows(x, form.lead, form.groups)
    target = _layout.like_empty(y, x, plan)
    segments, _ = _COUNT(*plan.shape, form.run)
    statistics = np.empty((2, form.rows))
    sums = np.empty(2 * form.rows * segments)
    e = storage(x.dtype)
    arrays = plan.view(x), plan.view(target), *vectors, statistics, sums
    _FORWARD[e](*arrays, form.run, eps, centred, _STORAGE[e], nt)
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
    nt = thread_count(num_threads)
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
    x, plan = _layout.fold_rows(x, form.lead, form.groups)
    target = _layout.like_empty(dx, x, plan)
    segments, chunks = _COUNT(*plan.shape, form.run)
    parts = np.empty((chunks, 2, gamma.size))
    e = storage(x.dtype)
    _BACKWARD[e](
        plan.view(_layout.like(dy, x, plan)),
        plan.view(x),
        plan.view(target),
        gamma,
        *(_layout.by_row(v, x, plan) for v in statistics),
        np.empty(2 * form.rows * segments),
        parts,
        form.run,
        eps,
        centred,
        _STORAGE[e],
        nt,
    )
    if target is not dx:
        np.copyto(dx, target)
    total: NDArray[np.float64] = parts[0] if chunks == 1 else parts.sum(axis=0)  # in order
    return total
