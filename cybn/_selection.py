"""Mask, weights and lengths at the door: which values count, and how often."""

from __future__ import annotations

from math import isfinite
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._arguments import array, tensor

__all__ = ["SCALE_THEM", "Positions", "Selection", "choose", "select", "shares_of"]


SCALE_THEM = "scale them all, which changes no result but the count"


class Selection(NamedTuple):
    """What selects values, as it was given, with the axes of x or of size 1 along them.

    Nothing is converted, and weights are not looked at, before `at` is asked for a part: what was
    given may be larger than memory.
    """

    mask: NDArray[np.bool_] | None
    weights: NDArray[Any] | None  # of a type that float64 can be made of
    ends: NDArray[Any] | None  # of each sample
    places: NDArray[np.intp] | None  # 0, 1, 2, ... along the axis that has an end

    def at(
        self, index: tuple[slice, ...]
    ) -> tuple[NDArray[np.bool_] | None, NDArray[np.float64] | None]:
        """Return mask and weights of one piece of x, not both None; ValueError for bad weights."""
        mask = _cut(self.mask, index)
        if self.ends is not None:
            valid = np.asarray(_cut(self.places, index) < _cut(self.ends, index))
            mask = valid if mask is None else mask & valid
        weights = _cut(self.weights, index)
        return mask, None if weights is None else _finite(weights)


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
    """Check what selects the values of an array of this shape; None where all of them count."""
    if mask is None and weights is None and lengths is None:
        return None
    chosen = None if mask is None else _spread("mask", _mask(mask), shape, axis)
    shares = None if weights is None else _spread("weights", _weights(weights), shape, axis)
    ends, places = (None, None) if lengths is None else _ends(shape, axis, lengths)
    return Selection(chosen, shares, ends, places)


class Positions(NamedTuple):
    """Which positions count, and how often, where that is the same in every channel."""

    shares: NDArray[Any]  # bool, or float64 where weighted; as x, but 1 along the channel axis
    number: int  # how many positions count
    total: int | float  # the sum of the shares


def choose(
    shape: tuple[int, ...],
    axis: int,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    lengths: ArrayLike | None,
) -> Positions | None:
    """Check what selects positions of all channels alike; None where all of them count once."""
    found = select(shape, axis, mask, weights, lengths)
    if found is None:
        return None
    for name, given in (("mask", found.mask), ("weights", found.weights)):
        if given is not None and given.shape[axis] != 1:
            raise ValueError(
                f"{name} has shape {given.shape}; it must be the same for all channels: "
                f"{_fitting(shape, axis)}, and of size 1 on axis {axis}. "
                "Moments.update takes one for each channel"
            )
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    valid, often = found.at((slice(None),) * len(shape))
    if often is None:
        shares = np.broadcast_to(np.asarray(valid), one)
        count = total = int(np.count_nonzero(shares))
        return None if count == shares.size else Positions(shares, count, total)
    shares = np.broadcast_to(np.where(True if valid is None else valid, often, 0.0), one)
    with np.errstate(all="ignore"):
        sum_of = float(shares.sum())
    if not isfinite(sum_of):
        raise ValueError(f"weights sum to {sum_of}; {SCALE_THEM}")
    return Positions(shares, int(np.count_nonzero(shares)), sum_of)


def shares_of(
    positions: Positions, order: tuple[int, ...], n: int, s: int, dtype: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[np.intp], float, bool]:
    """Return what the kernels have to know of the positions that count.

    How often each does, (N, S) of `dtype`, for axes that lie in memory in this order; the places of
    eight that count; the sum; whether they are weights.
    """
    given = positions.shares.transpose(order).reshape(n, s)
    with np.errstate(all="ignore"):
        shares: NDArray[Any] = np.array(given, dtype, order="C")
    weighted = given.dtype != np.bool_
    if weighted and not np.array_equal((shares > 0) & np.isfinite(shares), given > 0):
        raise ValueError(
            f"weights lie in {given[given > 0].min()}..{given.max()}, which {shares.dtype} cannot "
            f"hold; {SCALE_THEM}"
        )
    found = np.flatnonzero(shares)
    if not found.size:  # then there are no statistics to take
        found = np.zeros(1, np.intp)
    eighths = np.arange(8) * found.size // 8 + found.size // 16
    return shares, found[eighths], float(shares.sum(dtype=np.float64)), weighted


def _fitting(shape: tuple[int, ...], axis: int) -> str:
    """Return what the shape of a mask must be, in words."""
    rest = shape[:axis] + shape[axis + 1 :]
    return (
        f"broadcastable to {rest}, the shape of x without its channel axis, or with as many axes "
        f"as x to its shape, {shape}"
    )


def _spread(name: str, given: NDArray[Any], shape: tuple[int, ...], axis: int) -> NDArray[Any]:
    """Return `given` with as many axes as x; ValueError where it cannot be broadcast to it.

    One that has fewer is for all channels alike, whatever the sizes happen to be.
    """
    lacks = given.ndim < len(shape)
    to = shape[:axis] + shape[axis + 1 :] if lacks else shape
    try:
        fits = np.broadcast_shapes(given.shape, to) == to
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} has shape {given.shape}; it must be {_fitting(shape, axis)}")
    if not lacks:
        return given
    return np.expand_dims(given.reshape((1,) * (len(to) - given.ndim) + given.shape), axis)


def _mask(mask: ArrayLike) -> NDArray[np.bool_]:
    given = array("mask", mask)
    if given.dtype != np.bool_:
        raise TypeError(
            f"mask is {given.dtype}; it must be bool, True where a value counts. "
            "Convert it: np.asarray(mask) > 0"
        )
    return given


def _weights(weights: ArrayLike) -> NDArray[Any]:
    """Return weights as they are, of a type that float64 can be made of."""
    given = array("weights", weights)
    if given.dtype.kind not in "bui":
        tensor("weights", np.empty(0, given.dtype))
    return given


def _finite(weights: NDArray[Any]) -> NDArray[np.float64]:
    """Return weights as float64; ValueError where one is negative or not finite."""
    wide = weights.astype(np.float64, copy=False)
    good = np.isfinite(wide) & (wide >= 0)
    if not good.all():
        raise ValueError(
            f"weights has the value {wide[~good][0]}; all must be finite and not negative"
        )
    return wide


def _ends(
    shape: tuple[int, ...], axis: int, lengths: ArrayLike
) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Return where each sample ends, and the places along the axis that it ends along."""
    others = [i for i in range(len(shape)) if i != axis]
    if len(others) < 2:
        raise ValueError(
            f"x has shape {shape}: lengths needs an axis beside the batch and the channels, "
            "such as L in (N, C, L)"
        )
    batch, along = others[:2]
    given = array("lengths", lengths)
    if given.dtype.kind not in "ui":
        raise TypeError(f"lengths is {given.dtype}; it must be integers")
    if given.shape != (shape[batch],):
        raise ValueError(
            f"lengths has shape {given.shape}; it must have shape ({shape[batch]},), "
            "one for each sample"
        )
    if given.size and not 0 <= given.min() <= given.max() <= shape[along]:
        raise ValueError(
            f"lengths lie in {given.min()}..{given.max()}; "
            f"they must lie in 0..{shape[along]}, the size of axis {along}"
        )
    ends = given.reshape([-1 if i == batch else 1 for i in range(len(shape))])
    places = np.arange(shape[along]).reshape([-1 if i == along else 1 for i in range(len(shape))])
    return ends, places
