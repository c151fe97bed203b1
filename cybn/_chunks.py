"""The pieces in which an array of any size is read, and their order.

A piece has all C channels. It has up to `FEW` values, so that a copy in float64 stays in cache, or
`ROWS` values per channel if that is more. If one index of the axis that is cut has more values, it
is a piece by itself. No piece has more than `MOST` values, unless C alone is larger. Pieces are cut
along the outermost axes in memory, but never along the channel axis. So a file with the channels
last is read from its first byte to its last. The pieces depend only on shape and strides, not on
the number of threads or the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Chunks", "Sliced", "is_sliced"]

FEW = 1 << 18  # 2 MiB in float64
ROWS = 32
MOST = 1 << 22  # 32 MiB in float64


class Chunks:
    """The index of each piece of an array, in order. It has a length, for progress bars.

    Parameters
    ----------
    shape, strides : tuple of int
        Shape and strides of an array that is not empty.
    axis : int
        The channel axis, counted from the front. It is never cut.
    """

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> None:
        outward = sorted(range(len(shape)), key=lambda i: (-abs(strides[i]), i))
        axes = [i for i in outward if i != axis]
        inside = prod(shape) // shape[axes[0]]  # values per index of the axis that is cut
        cut = 0
        while inside > MOST and cut + 1 < len(axes):
            cut += 1
            inside //= shape[axes[cut]]
        step = max(1, min(MOST, max(FEW, ROWS * shape[axis])) // inside)
        self._ndim = len(shape)
        self._axes = axes[: cut + 1]
        self.last = axes[cut]  # pieces mostly follow each other along this axis
        self._starts = [range(shape[i]) for i in axes[:cut]]
        self._starts.append(range(0, shape[axes[cut]], step))

    def __len__(self) -> int:
        """Return the number of pieces."""
        return prod(map(len, self._starts))

    def __iter__(self) -> Iterator[tuple[slice, ...]]:
        """Yield the index of each piece; the index of the outermost axis changes slowest."""
        for starts in product(*self._starts):
            index = [slice(None)] * self._ndim
            for axis, start, steps in zip(self._axes, starts, self._starts, strict=True):
                index[axis] = slice(start, start + steps.step)
            yield tuple(index)


def is_sliced(x: Any) -> bool:
    """Return whether this is an array that is read by slices, such as one of h5py, zarr or dask."""
    return (
        not isinstance(x, np.ndarray)
        and isinstance(getattr(x, "dtype", None), np.dtype)
        and isinstance(getattr(x, "shape", None), tuple)
        and hasattr(x, "__getitem__")
        and not any(hasattr(x, name) for name in ("__dlpack__", "__array_interface__"))
    )


class Sliced:
    """An array that is read by slices, with the shape and strides of an array in C order.

    If the array is stored in blocks, each read goes to the end of a block, and its values are kept
    until all are used. So a block is not unpacked again for each piece. At most `MOST` values are
    kept.

    Parameters
    ----------
    source : object
        It has ``shape`` and ``dtype`` and takes slices. If it is stored in blocks, it has
        ``chunks``, too.
    convert : callable
        Converts a slice to an array.
    """

    def __init__(self, source: Any, convert: Callable[[Any], NDArray[Any]]) -> None:
        self.shape = tuple(map(int, source.shape))
        self.ndim, self.size, self.dtype = len(self.shape), prod(self.shape), source.dtype
        self.strides = tuple(prod(self.shape[i + 1 :]) for i in range(self.ndim))
        self._source, self._convert = source, convert
        self._held: tuple[tuple[slice, ...], int, NDArray[Any]] | None = None

    def _block(self, axis: int) -> int:
        """Return the length of the blocks along an axis, or 1 if there are none."""
        try:
            sizes = self._source.chunks[axis]  # one size, or in dask a tuple of all
            return max(1, int(sizes if np.ndim(sizes) == 0 else sizes[0]))
        except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError):
            # Arrays without such blocks raise one of these, depending on their library.
            return 1

    def read(self, index: tuple[slice, ...], along: int) -> NDArray[Any]:
        """Return the values of one piece; the next piece mostly follows along the axis `along`."""
        index = tuple(slice(*part.indices(n)) for part, n in zip(index, self.shape, strict=True))
        others = index[:along] + index[along + 1 :]
        start, stop = index[along].start, index[along].stop
        if (
            self._held is None
            or self._held[0] != others
            or not (self._held[1] <= start and stop <= self._held[1] + self._held[2].shape[along])
        ):
            block, row = self._block(along), prod(p.stop - p.start for p in others)
            end = min(-(-stop // block) * block, max(stop, start + MOST // row), self.shape[along])
            read = (*index[:along], slice(start, end), *index[along + 1 :])
            self._held = others, start, self._convert(self._source[read])
        _, first, rows = self._held
        return rows[(*[slice(None)] * along, slice(start - first, stop - first))]
