"""Count, mean and M2 of each channel of one array, as plain numbers and vectors.

Here `Moments` meets the kernels. `measure` takes all values; `measure_selected` those that a mask
and weights select, for now in NumPy: a kernel may take its place without anyone noticing.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _layout
from ._arguments import storage
from ._runtime import kernels
from ._selection import Positions

__all__ = ["bind", "measure", "measure_selected", "shared", "work"]

Count = int | float | NDArray[Any]  # an array of (C,) where a selection differs by channel
Statistics = tuple[Count, NDArray[np.float64], NDArray[np.float64]]  # count, mean, m2

_KERNELS: dict[str, Any]


def bind(module: ModuleType) -> None:
    """Call the kernels of `module` from now on; keys are those of `_arguments.storage`."""
    global _KERNELS
    kernel, half = module.statistics, module.statistics["uint16_t"]
    _KERNELS = {"f": kernel["float"], "d": kernel["double"], "e": half, "E": half}


bind(kernels)


def work(plan: _layout.Plan) -> NDArray[np.float64]:
    """Return room for the sums of each chunk, two results and the pivot of each channel."""
    return np.empty((2 * plan.chunks + 1, plan.shape[1]))


def shared(
    positions: Positions | None, x: NDArray[Any], plan: _layout.Plan, zeroed: bool = False
) -> tuple[Any, ...]:
    """Return what the kernels have to know of the positions of `x` that count.

    Shares in their type, as bytes of (N, S); the places of eight of them; their sum; whether they
    are weights; whether what does not count becomes 0.
    """
    if positions is None:
        return None, None, 0.0, False, False
    given = plan.rows(positions.shares)
    with np.errstate(all="ignore"):
        shares: NDArray[Any] = np.array(
            given, np.float64 if x.itemsize == 8 else np.float32, order="C"
        )
    weighted = given.dtype != np.bool_
    if weighted and not np.array_equal((shares > 0) & np.isfinite(shares), given > 0):
        raise ValueError(
            f"weights lie in {given[given > 0].min()}..{given.max()}, which {shares.dtype} cannot "
            "hold; scale them all, which changes no result but the count"
        )
    found = np.flatnonzero(shares)
    if not found.size:  # then there are no statistics to take
        found = np.zeros(1, np.intp)
    eighths = np.arange(8) * found.size // 8 + found.size // 16
    total = shares.sum(dtype=np.float64)
    return shares.view(np.uint8).reshape(-1), found[eighths], total, weighted, zeroed


def measure(
    x: NDArray[Any], axis: int, threads: int, positions: Positions | None = None
) -> tuple[Any, NDArray[np.float64], NDArray[np.float64]]:
    """Return count, mean and M2; `x` came in by the door and is not empty, `axis` not negative."""
    x, plan = _layout.fold(x, axis)
    sums = work(plan)
    e = storage(x.dtype)
    chosen = shared(positions, x, plan)
    _KERNELS[e](plan.view(x), sums, *chosen, kernels.STORAGE.get(e, 0), threads)
    if plan.chunks > 1:
        sums = sums[:2].copy()
    count = x.size // x.shape[axis] if positions is None else positions.total
    return count, sums[0], sums[1]


@np.errstate(all="ignore")
def measure_selected(
    x: NDArray[Any],
    axis: int,
    mask: NDArray[np.bool_] | None,
    weights: NDArray[np.float64] | None,
    threads: int,
) -> Statistics:
    """Return count, mean and M2 of the values of `x` that are selected.

    Parameters
    ----------
    x : ndarray of float32 or float64
    axis : int
        The channel axis, not negative.
    mask : ndarray of bool or None
        True where a value counts. With the axes of `x`; of size 1 along any that it does not
        differ along.
    weights : ndarray of float64 or None
        How often each value counts, not negative; axes as those of `mask`. A value of weight 0
        is not looked at, and may be NaN.
    threads : int
        For the kernel.

    Returns
    -------
    count : int, float or ndarray of shape (C,)
        How many values, or with weights the sum of those; one for each channel where the
        selection has the size of `x` along `axis`. Mean and M2 are 0 where it is 0.
    mean, m2 : ndarray of float64, shape (C,)
    """
    channels = x.shape[axis]
    if weights is not None:
        chosen = weights > 0 if mask is None else mask & (weights > 0)
    else:
        assert mask is not None
        chosen = mask
    by_channel = chosen.shape[axis] == channels > 1
    if weights is None and not by_channel:
        return _measure_columns(_columns(x, chosen, axis), threads)
    rows = np.moveaxis(x, axis, 0)
    chosen = np.broadcast_to(np.moveaxis(chosen, axis, 0), rows.shape)
    if weights is None:
        each = [
            _measure_columns(values[valid][:, np.newaxis], threads)
            for values, valid in zip(rows, chosen, strict=True)
        ]
        counts, means, squares = zip(*each, strict=True)
        return np.array(counts, np.int64), np.concatenate(means), np.concatenate(squares)
    shares = np.broadcast_to(np.moveaxis(weights, axis, 0), rows.shape)
    count, mean, m2 = _weigh(
        np.where(chosen, rows, 0.0).reshape(channels, -1),
        np.where(chosen, shares, 0.0).reshape(channels, -1),
    )
    return count if by_channel else float(count[0]), mean, m2


def _columns(x: NDArray[Any], chosen: NDArray[np.bool_], axis: int) -> NDArray[Any]:
    """Return the chosen positions of all channels, gathered in order: (K, C)."""
    last = np.moveaxis(x, axis, -1)
    at = np.broadcast_to(np.moveaxis(chosen, axis, -1)[..., 0], last.shape[:-1])
    gathered: NDArray[Any] = last[at]
    return gathered


def _measure_columns(
    columns: NDArray[Any], threads: int
) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    if not columns.size:
        return 0, np.zeros(columns.shape[1]), np.zeros(columns.shape[1])
    return measure(columns, 1, threads)


def _weigh(
    x: NDArray[Any], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the count, mean and M2 of rows of `x`, by the corrected two-pass of docs/math.md."""
    count = weights.sum(axis=1)
    divisor = np.where(count > 0, count, 1.0)
    pivot = (weights * x).sum(axis=1) / divisor
    e = x - pivot[:, np.newaxis]
    residual = (weights * e).sum(axis=1) / divisor
    e -= residual[:, np.newaxis]
    return count, pivot + residual, (weights * e * e).sum(axis=1)
