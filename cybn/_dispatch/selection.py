"""Mask, weights and lengths for code that divides an array, such as statistics in pieces."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._arguments import finite_sum, finite_weights
from .shares import checked, require_alike

__all__ = ["Positions", "Selection", "choose", "cut", "select"]


class Selection(NamedTuple):
    """Mask, weights and lengths; along each axis they have the size of x, or 1.

    Nothing is converted, and weights are not read, before `at` is called for a part, because the
    arrays may be larger than memory.
    """

    mask: NDArray[np.bool_] | None
    weights: NDArray[Any] | None  # of a type that can be converted to float64
    ends: NDArray[np.intp] | None  # the end of each sample
    places: NDArray[np.intp] | None  # 0, 1, 2, ... along the axis that `ends` refers to

    def at(
        self, index: tuple[slice, ...]
    ) -> tuple[NDArray[np.bool_] | None, NDArray[np.float64] | None]:
        """Return mask and weights of one piece of x, not both None.

        Raise ValueError if weights are negative or not finite.
        """
        mask, weights, ends, places = (_cut(array, index) for array in self)
        if ends is not None:
            valid = np.asarray(places < ends)
            mask = valid if mask is None else mask & valid
        return mask, None if weights is None else finite_weights(weights)


def _cut(array: NDArray[Any] | None, index: tuple[slice, ...]) -> Any:
    if array is None:
        return None
    sizes = zip(array.shape, index, strict=True)
    return array[tuple(slice(None) if size == 1 else piece for size, piece in sizes)]


def select(
    shape: tuple[int, ...],
    axis: int,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    lengths: ArrayLike | None,
) -> Selection | None:
    """Check mask, weights and lengths for an array of this shape; return None if all are None."""
    if mask is None and weights is None and lengths is None:
        return None
    return Selection(*checked(shape, axis, mask, weights, lengths))


class Positions(NamedTuple):
    """The weight of each position, the same in every channel."""

    shares: NDArray[Any]  # bool, or float64 with weights; shape of x, but 1 for the channel axis
    number: int  # how many positions have a weight above 0
    total: int | float  # the sum of the shares

    def at(self, index: tuple[slice, ...], masked: str) -> tuple[Any, Any, None, str]:
        """Return mask, weights, None for lengths, and `masked`, for a call with a part of x."""
        part = self.shares[index]
        return (part, None, None, masked) if part.dtype == np.bool_ else (None, part, None, masked)


def choose(
    shape: tuple[int, ...],
    axis: int,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    lengths: ArrayLike | None,
) -> Positions | None:
    """Return the weights of positions; None if there are no weights and nothing is masked."""
    found = select(shape, axis, mask, weights, lengths)
    if found is None:
        return None
    require_alike(found.mask, found.weights, shape, axis)
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    valid, often = found.at((slice(None),) * len(shape))
    if often is None:
        shares = np.broadcast_to(np.asarray(valid), one)
        count = int(np.count_nonzero(shares))
        return None if count == shares.size else Positions(shares, count, count)
    shares = np.broadcast_to(np.where(True if valid is None else valid, often, 0.0), one)
    with np.errstate(all="ignore"):
        total = finite_sum(float(shares.sum()))
    return Positions(shares, int(np.count_nonzero(shares)), total)


def cut(
    shape: tuple[int, ...], axis: int, size: int | None, positions: Positions | None = None
) -> list[tuple[slice, ...]]:
    """Return the index of each part of a batch: `size` samples each, and the rest in the last one.

    A part with fewer than two unmasked values per channel has no variance. It is joined with the
    next part, or, if it is the last, with the part before. Samples lie along the first axis that is
    not the channel axis.
    """
    batch = 1 if axis == 0 else 0
    samples = shape[batch]
    if size is None or size >= samples:
        return [(slice(None),) * len(shape)]
    each = prod(shape) // (shape[axis] * samples)  # values of one channel in one sample
    if size * each < 2:
        raise ValueError(
            f"virtual_batch_size is {size} and x has shape {shape}: one value a channel has no "
            "variance. Give virtual batches of at least 2"
        )
    if positions is None:
        count = np.full(samples, each)
    else:
        shares = np.moveaxis(positions.shares, batch, 0)
        count = np.count_nonzero(shares.reshape(samples, -1), axis=1)
    starts = [0]
    for end in range(size, samples, size):
        if count[starts[-1] : end].sum() >= 2:
            starts.append(end)
    if len(starts) > 1 and count[starts[-1] :].sum() < 2:
        starts.pop()
    ends = [*starts[1:], samples]
    before = (slice(None),) * batch
    return [(*before, slice(start, end)) for start, end in zip(starts, ends, strict=True)]
