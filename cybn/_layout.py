"""Any rank, any axis, any strides -> (N, C, S). The only place that knows ranks.

Batch normalization treats all positions of a channel alike, so every axis but the channel axis
may be moved freely, as long as input and output move alike. Axes are ordered as they lie in
memory; those outside the channel axis fold into N, those inside it into S. So C-ordered
(N, C, H, W), channels-last memory behind any axis order, Fortran order, and channels-first batches
sliced along N or C are all read in place. What cannot be folded is copied first: a step inside S, a
negative or zero stride, gaps between channels-last rows of several axes or of up to NARROW
channels, and gaps in a single channel.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._runtime import kernels

# Channels up to which the kernels sum several channels-last rows as one.
NARROW: int = kernels.NARROW


class Plan(NamedTuple):
    """How an array folds to (N, C, S), or as `fold_rows` and `fold_groups` have it."""

    order: tuple[int, ...]  # axes as they lie in memory
    plain: bool  # order is 0, 1, 2, ...
    split: int  # how many axes of `order` fold into N
    shape: tuple[int, int, int]  # N, C, S
    chunks: int  # pieces in which a channel is summed

    def view(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return an array that fits this plan as (N, C, S), in place; half types as words."""
        nsc = (array if self.plain else array.transpose(self.order)).reshape(self.shape)
        return nsc.view(np.uint16) if nsc.itemsize == 2 else nsc

    @property
    def channels_inside(self) -> bool:
        """Whether `fold_groups` found the channels of a position side by side."""
        return self.order[-1] != len(self.order) - 1

    def rows(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return an array like one channel, with all its axes, as (N, S); a copy if need be."""
        n, _, s = self.shape
        return array.transpose(self.order).reshape(n, s)


def _dense(shape: tuple[int, ...], strides: tuple[int, ...], start: int) -> int | None:
    """Return the bytes spanned if axes lie densely, innermost last, around `start` bytes."""
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != start:
            return None
        start *= size
    return start


@lru_cache(maxsize=4096)
def _fits(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
    order: tuple[int, ...],
    split: int,
    rows: bool = False,
) -> bool:
    """Whether an array of these strides folds in place: `split` axes of `order` into N.

    Where `rows`, they are rows of the family, and gaps between narrow ones do no harm.
    """
    sizes = tuple(shape[i] for i in order)
    steps = tuple(strides[i] for i in order)
    row = _dense(sizes[split:], steps[split:], itemsize)
    if row is None:
        return False
    outer = [i for i in range(split) if sizes[i] != 1]
    if not outer:
        return True
    pitch = steps[outer[-1]]
    if not rows and prod(sizes[split + 1 :]) == 1 and row <= NARROW * itemsize and pitch != row:
        return False
    return (
        pitch >= row
        and pitch % itemsize == 0
        and _dense(sizes[:split], steps[:split], pitch) is not None
    )


@lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axis: int
) -> Plan | None:
    """Return how an array of these strides folds in place, or None where it does not."""
    order = tuple(sorted(range(len(shape)), key=lambda i: (-strides[i], i)))
    sizes = tuple(shape[i] for i in order)
    if shape[axis] == 1:  # one channel is one run
        split = 0
        n, s = 1, prod(shape)
    else:
        split = order.index(axis)
        n, s = prod(sizes[:split]), prod(sizes[split + 1 :])
    if not _fits(shape, strides, itemsize, order, split):
        return None
    nsc = (n, shape[axis], s)
    return Plan(order, order == tuple(range(len(order))), split, nsc, kernels.count_chunks(*nsc))


def fold(x: NDArray[Any], axis: int) -> tuple[NDArray[Any], Plan]:
    """Return `x`, or a copy of it where it cannot be folded in place, and its plan.

    `axis` is counted from the front, and `x` is not empty. The copy keeps the order of the axes
    in memory.
    """
    plan = _plan(x.shape, x.strides, x.itemsize, axis)
    if plan is None:
        x = x.copy(order="K")
        plan = _plan(x.shape, x.strides, x.itemsize, axis)
        if plan is None:  # a copy of axes with stride 0 may still be out of order
            x = np.ascontiguousarray(x)
            plan = _plan(x.shape, x.strides, x.itemsize, axis)
            assert plan is not None
    return x, plan


def fold_rows(x: NDArray[Any], lead: int, groups: int) -> tuple[NDArray[Any], Plan]:
    """Return `x`, or a C-ordered copy of it, and its plan as (N, groups, D).

    The first `lead` axes fold into N in the order in which they lie in memory; the others must be
    dense in C order to be read in place. `x` is not empty. The plan's chunks mean nothing here.
    """
    plan = _row_plan(x.shape, x.strides, x.itemsize, lead, groups)
    if plan is None:
        x = np.ascontiguousarray(x)
        plan = _row_plan(x.shape, x.strides, x.itemsize, lead, groups)
        assert plan is not None
    return x, plan


def fold_groups(x: NDArray[Any], groups: int, axis: int) -> tuple[NDArray[Any], Plan]:
    """Return `x`, whose channels are axis 1, or a copy, and its plan: (N, groups, D) or (N, S, C).

    Each sample must be dense to be read in place: channels before positions, in C order, or
    positions in any order before channels. `axis` is where the caller had the channels: the copy
    keeps the order of those axes in memory, if it is one of the two; else it is of the second kind
    where the channels were last, of the first where not. `x` is not empty.
    """
    plan = _group_plan(x, groups)
    if plan is None:
        x = np.moveaxis(np.moveaxis(x, 1, axis).copy(order="K"), axis, 1)
        plan = _group_plan(x, groups)
    if plan is not None:
        return x, plan
    if axis not in (-1, x.ndim - 1):
        return fold_rows(x, 1, groups)
    x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    return fold_groups(x, groups, axis)


def _group_plan(x: NDArray[Any], groups: int) -> Plan | None:
    """Return how `x` folds in place into rows of groups, or with its channels last, or None."""
    plan = _row_plan(x.shape, x.strides, x.itemsize, 1, groups)
    return plan or _last_plan(x.shape, x.strides, x.itemsize)


@lru_cache(maxsize=4096)
def _last_plan(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Plan | None:
    """Return how an array whose channels, axis 1, lie innermost folds in place, or None."""
    order = 0, *sorted(range(2, len(shape)), key=lambda i: (-strides[i], i)), 1
    if not _fits(shape, strides, itemsize, order, 1):
        return None
    return Plan(order, False, 1, (shape[0], prod(shape[2:]), shape[1]), 0)


@lru_cache(maxsize=4096)
def _row_plan(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, lead: int, groups: int
) -> Plan | None:
    """Return how an array of these strides folds into rows in place, or None."""
    outer = sorted(range(lead), key=lambda i: (-strides[i], i))
    order = (*outer, *range(lead, len(shape)))
    if not _fits(shape, strides, itemsize, order, lead, rows=True):
        return None
    nsc = prod(shape[:lead]), groups, prod(shape[lead:]) // groups
    return Plan(order, order == tuple(range(len(order))), lead, nsc, 0)


def by_row(values: NDArray[Any], x: NDArray[Any], plan: Plan) -> NDArray[Any]:
    """Return (N * G,) values, in the order of x's axes, in that of its rows in memory."""
    if plan.plain or plan.split == 1:
        return values
    order = *plan.order[: plan.split], plan.split
    return values.reshape(*x.shape[: plan.split], -1).transpose(order).reshape(-1)


def by_axis(values: NDArray[Any], x: NDArray[Any], plan: Plan) -> NDArray[Any]:
    """Return what `by_row` was given: values in the order of x's axes."""
    if plan.plain or plan.split == 1:
        return values
    outer = plan.order[: plan.split]
    order = *(outer.index(i) for i in range(plan.split)), plan.split
    return values.reshape(*(x.shape[i] for i in outer), -1).transpose(order).reshape(-1)


def fits(array: NDArray[Any], plan: Plan) -> bool:
    """Whether `array` folds in place the same way as the array that `plan` was made for."""
    return array.flags.aligned and _fits(
        array.shape, array.strides, array.itemsize, plan.order, plan.split
    )


def like_empty(out: NDArray[Any], x: NDArray[Any], plan: Plan) -> NDArray[Any]:
    """Return `out` where it lies in memory as `x` does, else a new array that does."""
    if isinstance(out, np.matrix):  # which has two axes for ever
        return np.empty_like(x)
    return out if fits(out, plan) else np.empty_like(x)


def like(array: NDArray[Any], x: NDArray[Any], plan: Plan) -> NDArray[Any]:
    """Return `array`, or a copy of it that lies in memory as `x` does."""
    if fits(array, plan):
        return array
    copy = np.empty_like(x, dtype=array.dtype)
    np.copyto(copy, array)
    return copy
