"""Memory for large results: page faults can cost more than the normalization itself.

The C library returns large blocks to the system when they are freed. So each page of a new block
causes a page fault: a forward of 100 MB took 18 ms on new memory and 9 ms on memory used before.
This module keeps the blocks of results that have been freed, for later results of a similar size.
"""

from __future__ import annotations

import os
from sys import getrefcount
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["empty_cache", "set_cache_limit"]

LEAST = 1 << 20  # bytes; the C library keeps smaller blocks itself
LIMIT = 512 << 20
ALIGNMENT = 64  # bytes, a cache line
STEPS = 8  # sizes of blocks per power of two, so at most an eighth is wasted


class Blocks:
    """Blocks of bytes that are the memory of arrays.

    An array and all its views, also views of views, refer to their block. If only the list here
    refers to a block, the block is free. So arrays need not be released explicitly.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit  # the most bytes of all blocks together, free or not
        self.forget()

    def forget(self) -> None:
        """Start with an empty list; arrays that exist keep their blocks."""
        self._blocks: list[NDArray[np.uint8]] = []  # the most recently used at the end
        self._lock = RLock()  # reentrant, as a signal's handler may call a layer, too
        self._busy = False  # whether the list is being changed

    def array(self, like: NDArray[Any]) -> NDArray[Any]:
        """Return an uninitialized array with the shape, dtype and strides of a dense array."""
        size = rounded(like.nbytes + ALIGNMENT)
        with self._lock:
            # If busy, this call is made by a signal handler or a finalizer during another call.
            if self._busy or size > self.limit:
                return on(np.empty(size, np.uint8), like)
            self._busy = True
            try:
                block = self._take(size)
            finally:
                self._busy = False
        return on(block, like)

    def clear(self) -> None:
        """Return the free blocks to the system now, and the others when their arrays are freed."""
        with self._lock:
            if not self._busy:
                self._blocks = []

    def held(self) -> tuple[int, int]:
        """Return the bytes of blocks in use and of free ones."""
        with self._lock:
            free = sum(self._blocks[i].size for i in self._free())
            return sum(block.size for block in self._blocks) - free, free

    def _free(self) -> list[int]:
        """Return the indices of free blocks."""
        blocks = self._blocks
        # Two references: the list's and the argument's.
        return [i for i in range(len(blocks)) if getrefcount(blocks[i]) == 2]

    def _take(self, size: int) -> NDArray[np.uint8]:
        for i in reversed(self._free()):
            if self._blocks[i].size == size:
                self._blocks.append(self._blocks.pop(i))
                return self._blocks[-1]
        self._drop_free(self.limit - size)
        try:
            block = np.empty(size, np.uint8)
        except MemoryError:
            self._drop_free(0)
            block = np.empty(size, np.uint8)
        if self._size() + size <= self.limit:
            self._blocks.append(block)
        return block

    def _size(self) -> int:
        return sum(block.size for block in self._blocks)

    def _drop_free(self, most: int) -> None:
        """Drop free blocks, least recently used first, until all take `most` bytes or fewer."""
        over = self._size() - most
        for i in self._free():
            if over <= 0:
                break
            over -= self._blocks[i].size
            self._blocks[i] = _NOTHING
        self._blocks = [block for block in self._blocks if block is not _NOTHING]


_NOTHING = np.empty(0, np.uint8)


def on(block: NDArray[np.uint8], like: NDArray[Any]) -> NDArray[Any]:
    """Return an aligned array in `block` with the shape, dtype and strides of a dense array."""
    start = -block.__array_interface__["data"][0] % ALIGNMENT
    strides = None if like.flags.c_contiguous else like.strides  # size-1 axes have any stride
    return np.ndarray(like.shape, like.dtype, block, start, strides)


def rounded(size: int) -> int:
    """Return the size of the block for `size` bytes of data."""
    step = 1 << max(0, size.bit_length() - STEPS.bit_length())
    return -(-size // step) * step


blocks = Blocks()
if hasattr(os, "register_at_fork"):  # another thread may hold the lock at the fork
    os.register_at_fork(after_in_child=blocks.forget)


def empty_like(x: NDArray[Any]) -> NDArray[Any]:
    """Return an uninitialized array with the shape, dtype and memory layout of `x`."""
    if x.nbytes < LEAST or not blocks.limit:
        return np.empty_like(x, subok=False)
    return blocks.array(x if x.flags.c_contiguous else np.empty_like(x, subok=False))


def empty_cache() -> None:
    """Release the memory that is kept for later results.

    If no `out` is given, results of 1 MiB and more are written to memory of earlier results that
    have been freed, because new memory costs page faults: up to half of a call's time.

    Examples
    --------
    >>> import cybn
    >>> cybn.empty_cache()
    """
    blocks.clear()


def set_cache_limit(limit: int) -> None:
    """Set how much memory is kept for later results; the rest is released at once.

    Parameters
    ----------
    limit : int
        The limit in bytes, 512 MiB by default. It includes results in use as well as freed ones.
        Results beyond it get new memory, which is released with them. With 0 nothing is kept.

    Raises
    ------
    TypeError, ValueError
        If `limit` is not an integer, or is negative.

    Examples
    --------
    >>> import cybn
    >>> cybn.set_cache_limit(0)  # keep nothing
    >>> cybn.set_cache_limit(512 << 20)  # the default
    """
    if not hasattr(limit, "__index__") or isinstance(limit, bool):
        raise TypeError(f"limit is {limit!r}; it must be an int, in bytes")
    if limit < 0:
        raise ValueError(f"limit is {limit}; it must be 0 or more bytes")
    blocks.limit = int(limit)
    blocks.clear()
