"""Mask, weights and lengths at the door: which values count, and how often."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._arguments import array as as_plain
from ._arguments import tensor

__all__ = ["Positions", "Selection", "choose", "select"]


class Selection(NamedTuple):
    """A mask and weights with the axes of x; of size 1 along those that they do not differ along.

    Either may be None, but not both.
    """

    mask: NDArray[np.bool_] | None
    weights: NDArray[np.float64] | None

    def at(self, index: tuple[slice, ...]) -> Selection:
        """Return the part that belongs to one piece of x."""
        return Selection(_cut(self.mask, index), _cut(self.weights, index))


def _cut(array: NDArray[Any] | None, index: tuple[slice, ...]) -> NDArray[Any] | None:
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
    chosen = None if mask is None else _mask(shape, mask)
    if lengths is not None:
        valid = _valid(shape, axis, lengths)
        chosen = valid if chosen is None else chosen & valid
    shares = None if weights is None else _weights(shape, weights)
    return None if chosen is None and shares is None else Selection(chosen, shares)


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
    if mask is None and weights is None and lengths is None:
        return None
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    mask = None if mask is None else _of_positions("mask", mask, shape, axis)
    weights = None if weights is None else _of_positions("weights", weights, shape, axis)
    found = select(one, axis, mask, weights, lengths)
    assert found is not None
    if found.weights is None:
        assert found.mask is not None
        shares = np.broadcast_to(found.mask, one)
        count = total = int(np.count_nonzero(shares))
        return None if count == shares.size else Positions(shares, count, total)
    valid = True if found.mask is None else found.mask
    shares = np.broadcast_to(np.where(valid, found.weights, 0.0), one)
    return Positions(shares, int(np.count_nonzero(shares)), float(shares.sum()))


def _of_positions(name: str, value: ArrayLike, shape: tuple[int, ...], axis: int) -> NDArray[Any]:
    """Return `value` with as many axes as x, of size 1 along the channel axis."""
    array = as_plain(name, value)
    rest = shape[:axis] + shape[axis + 1 :]
    lacks = array.ndim < len(shape)
    if not lacks and array.shape[axis : axis + 1] != (1,):
        raise ValueError(
            f"{name} has shape {array.shape}; it must be the same for all channels: broadcastable "
            f"to {rest}, the shape of x without its channel axis, or of size 1 on axis {axis}. "
            "Moments.update takes one for each channel"
        )
    own = array.shape if lacks else array.shape[:axis] + array.shape[axis + 1 :]
    try:
        fits = np.broadcast_shapes(own, rest) == rest
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} has shape {array.shape}; it must be broadcastable to {rest}, "
            "the shape of x without its channel axis"
        )
    if not lacks:
        return array
    return np.expand_dims(array.reshape((1,) * (len(rest) - array.ndim) + array.shape), axis)


def _spread(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return `array` with as many axes as x; ValueError where it cannot be broadcast to it."""
    try:
        fits = np.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} has shape {array.shape}; it must be broadcastable to the shape of x, {shape}"
        )
    return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)


def _mask(shape: tuple[int, ...], mask: ArrayLike) -> NDArray[np.bool_]:
    array = as_plain("mask", mask)
    if array.dtype != np.bool_:
        raise TypeError(
            f"mask is {array.dtype}; it must be bool, True where a value counts. "
            "Convert it: np.asarray(mask) > 0"
        )
    return _spread("mask", array, shape)


def _weights(shape: tuple[int, ...], weights: ArrayLike) -> NDArray[np.float64]:
    array = as_plain("weights", weights)
    if array.dtype.kind in "bui":
        array = array.astype(np.float64)
    wide = tensor("weights", array).astype(np.float64, copy=False)
    if not (np.isfinite(wide) & (wide >= 0)).all():
        wrong = wide[~(np.isfinite(wide) & (wide >= 0))][0]
        raise ValueError(f"weights has the value {wrong}; all must be finite and not negative")
    return _spread("weights", wide, shape)


def _valid(shape: tuple[int, ...], axis: int, lengths: ArrayLike) -> NDArray[np.bool_]:
    """Return the mask that `lengths` stands for."""
    others = [i for i in range(len(shape)) if i != axis]
    if len(others) < 2:
        raise ValueError(
            f"x has shape {shape}: lengths needs an axis beside the batch and the channels, "
            "such as L in (N, C, L)"
        )
    batch, along = others[:2]
    array = as_plain("lengths", lengths)
    if array.dtype.kind not in "ui":
        raise TypeError(f"lengths is {array.dtype}; it must be integers")
    if array.shape != (shape[batch],):
        raise ValueError(
            f"lengths has shape {array.shape}; it must have shape ({shape[batch]},), "
            "one for each sample"
        )
    if array.size and not 0 <= array.min() <= array.max() <= shape[along]:
        raise ValueError(
            f"lengths lie in {array.min()}..{array.max()}; "
            f"they must lie in 0..{shape[along]}, the size of axis {along}"
        )
    ends = array.reshape([-1 if i == batch else 1 for i in range(len(shape))])
    places = np.arange(shape[along]).reshape([-1 if i == along else 1 for i in range(len(shape))])
    return places < ends
