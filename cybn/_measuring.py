"""Statistics of an array of any size, which is read and measured in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _dispatch
from ._arguments import array, tensor
from ._chunks import Chunks, Sliced, is_sliced
from ._counts import Count
from ._dispatch import Selection, select

__all__ = ["Progress", "float_array", "measured", "selected"]

Progress = Callable[[Iterable[Any]], Iterable[Any]]  # such as tqdm.tqdm
Vector = NDArray[np.float64]
Statistics = tuple[Count, Vector, Vector, Vector | None]  # count, mean, m2, and std if m2 overflows


def float_array(x: Any) -> Any:
    """Return `x` as an array without reading its values; raise TypeError for a wrong dtype."""
    if is_sliced(x):
        given: Any = Sliced(x, lambda piece: array("x", piece))
    else:
        given = x if type(x) is np.ndarray or isinstance(x, np.memmap) else array("x", x)
    try:
        if isinstance(given, Sliced):
            tensor("x", np.empty(0, given.dtype))
        else:
            tensor("x", given[..., :0] if given.ndim else given)
    except TypeError as error:
        raise TypeError(
            f"{error}. If the result does not fit in memory, convert piece by piece: "
            "m = m.update(piece.astype(np.float32))"
        ) from None
    return given


class _Apart:
    """A mask or weights that are read by slices (h5py, zarr), with the axes of x."""

    def __init__(self, name: str, source: Any, shape: tuple[int, ...], axis: int) -> None:
        self._source = Sliced(source, lambda piece: array(name, piece))
        others = [i for i in range(len(shape)) if self._source.ndim == len(shape) or i != axis]
        self._axes = others[len(others) - self._source.ndim :]  # the axes of x that it has
        self.shape, self.dtype = shape, self._source.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> NDArray[Any]:
        own = tuple(index[axis] for axis in self._axes)
        cut = [i for i, part in enumerate(own) if part != slice(None)]
        part = self._source.read(own, cut[0] if cut else 0)
        sizes = iter(part.shape)
        return part.reshape([next(sizes) if i in self._axes else 1 for i in range(len(self.shape))])


def selected(
    shape: tuple[int, ...], axis: int, mask: Any, weights: Any, lengths: Any
) -> Selection | None:
    """Do what `select` does; masks and weights of files are read later, piece by piece."""
    given = {"mask": mask, "weights": weights}
    files = {name: source for name, source in given.items() if is_sliced(source)}
    for name, source in files.items():  # arrays without memory, for the checks
        given[name] = np.broadcast_to(np.zeros((), source.dtype), source.shape)
    selection = select(shape, axis, given["mask"], given["weights"], lengths)
    if selection is None or not files:
        return selection
    parts: dict[str, Any] = {
        name: _Apart(name, source, getattr(selection, name).shape, axis)
        for name, source in files.items()
    }
    return selection._replace(**parts)


def measured(
    data: Any, axis: int, selection: Selection | None, threads: int, progress: Progress | None
) -> Iterator[Statistics]:
    """Yield the statistics, in float64, of each piece of a result of `float_array`."""
    pieces = Chunks(data.shape, data.strides, axis)
    for index in pieces if progress is None else progress(pieces):
        part = data.read(index, pieces.last) if isinstance(data, Sliced) else data[index]
        piece = tensor("x", part).astype(np.float64, copy=False)
        yield _measure(piece, axis, index, selection, threads)


def _measure(
    piece: NDArray[Any],
    axis: int,
    index: tuple[slice, ...],
    selection: Selection | None,
    threads: int,
) -> Statistics:
    """Return the statistics of the used values of a piece; mean and M2 are 0 if there are none."""
    if selection is None:
        return _statistics(piece, axis, None, None, threads)
    mask, weights = selection.at(index)
    channels = piece.shape[axis]
    if channels == 1 or all(v is None or v.shape[axis] == 1 for v in (mask, weights)):
        return _measure_selected(piece, axis, mask, weights, threads)
    found = []
    for c in range(channels):
        one = tuple(slice(c, c + 1) if i == axis else slice(None) for i in range(piece.ndim))
        valid = mask if mask is None or mask.shape[axis] == 1 else mask[one]
        often = weights if weights is None or weights.shape[axis] == 1 else weights[one]
        found.append(_measure_selected(piece[one], axis, valid, often, threads))
    counts, means, squares, stds = zip(*found, strict=True)
    kind = np.int64 if weights is None else np.float64
    m2, std = np.concatenate(squares), None
    if np.isinf(m2).any():
        std = np.concatenate([np.full(1, np.nan) if one is None else one for one in stds])
        std = np.where(np.isinf(m2), std, np.sqrt(m2 / np.maximum(counts, 1)))
    return np.array(counts, kind), np.concatenate(means), m2, std


def _measure_selected(
    piece: NDArray[Any],
    axis: int,
    mask: NDArray[np.bool_] | None,
    weights: NDArray[np.float64] | None,
    threads: int,
) -> Statistics:
    """Return count, mean and M2 of a piece whose mask and weights are the same in all channels."""
    counts = mask if weights is None else weights > 0 if mask is None else mask & (weights > 0)
    if not np.any(counts):
        none = np.zeros(piece.shape[axis])
        return 0 if weights is None else 0.0, none, none.copy(), None
    return _statistics(piece, axis, mask, weights, threads)


def _statistics(
    piece: NDArray[Any], axis: int, mask: Any, weights: Any, threads: int
) -> Statistics:
    found = _dispatch.statistics(piece, axis, (mask, weights, None, "normalize"), threads)
    return found.count, found.mean, found.m2, found.std() if np.isinf(found.m2).any() else None
