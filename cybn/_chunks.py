"""In which pieces, and in which order, an array of any size is walked.

A piece has all C channels and about `FEW` values, so that a widened copy of it stays in cache; it
has at least `ROWS` values a channel where that is more, and never more than `MOST` values but where
C alone is. Pieces are cut across the outermost axes in memory but the channel axis, so that a file
with the channels inside is read from its first byte to its last. Shape and strides alone decide:
neither threads nor machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

__all__ = ["Chunks"]

FEW = 1 << 18  # 2 MiB in float64
ROWS = 32
MOST = 1 << 22  # 32 MiB in float64


class Chunks:
    """The index of each piece of an array, in order. Sized, so that a progress bar has a total.

    Parameters
    ----------
    shape, strides : tuple of int
        Of an array that is not empty.
    axis : int
        The channel axis, counted from the front. It is never cut.
    """

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> None:
        outward = sorted(range(len(shape)), key=lambda i: (-abs(strides[i]), i))
        axes = [i for i in outward if i != axis]
        inside = prod(shape) // shape[axes[0]]  # values behind one index of the axis that is cut
        cut = 0
        while inside > MOST and cut + 1 < len(axes):
            cut += 1
            inside //= shape[axes[cut]]
        step = max(1, min(MOST, max(FEW, ROWS * shape[axis])) // inside)
        self._ndim = len(shape)
        self._axes = axes[: cut + 1]
        self._starts = [range(shape[i]) for i in axes[:cut]]
        self._starts.append(range(0, shape[axes[cut]], step))

    def __len__(self) -> int:
        """Return the number of pieces."""
        return prod(map(len, self._starts))

    def __iter__(self) -> Iterator[tuple[slice, ...]]:
        """Yield the index of each piece; the outermost axis moves slowest."""
        for starts in product(*self._starts):
            index = [slice(None)] * self._ndim
            for axis, start, steps in zip(self._axes, starts, self._starts, strict=True):
                index[axis] = slice(start, start + steps.step)
            yield tuple(index)
