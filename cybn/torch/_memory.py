"""Memory for large results: page faults cost more than the normalization itself.

The C library gives large blocks back to the system when they are freed, so every step of a
training pays for every page again. Two things are done about it.

What forward returns lives until backward, and comes from `np.empty`, which asks for huge pages.
The C library keeps some of that memory, and PyTorch's own tensors are then put on it, huge pages
and all. Keeping it here for the next forward was slower: PyTorch then had to get fresh memory.

What backward returns dies at once, and goes to blocks that are kept here and used again by the
next result of about their size. Free blocks and those in use together never exceed the most that
was in use at once.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["empty_cache", "empty_like"]

LEAST = 1 << 20  # bytes of a block; smaller ones the C library keeps itself
ALIGNMENT = 64  # bytes, a cache line: what PyTorch gives its own tensors
STEPS = 8  # sizes of blocks per power of two, so at most an eighth is wasted


class Blocks:
    """Blocks of bytes that are lent to arrays, and come back when the array dies."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew; what was lent before does not come back."""
        self._free: dict[int, list[NDArray[np.uint8]]] = {}  # by size
        self._lent = self._kept = self._most = 0  # bytes
        self._lock = Lock()
        # An array may die anywhere, in _take too: what comes back waits here, without a lock.
        self._returned: deque[NDArray[np.uint8]] = deque()

    def array(self, like: NDArray[Any]) -> NDArray[Any]:
        """Return an uninitialized array with the shape, dtype and strides of a dense one."""
        with self._lock:
            block = self._take(_rounded(like.nbytes + ALIGNMENT))
        array = _on(block, like)
        weakref.finalize(array, self._returned.append, block).atexit = False
        return array

    def clear(self) -> None:
        """Give the free blocks back to the system."""
        with self._lock:
            self._collect()
            self._free.clear()
            self._kept = 0
            self._most = self._lent

    def _take(self, size: int) -> NDArray[np.uint8]:
        self._collect()
        lent = self._lent + size
        most = max(self._most, lent)
        if size in self._free:
            block = self._drop(size)
        else:
            while lent + self._kept > most:
                self._drop(next(iter(self._free)))  # of the sizes that came back, the oldest
            block = self._fresh(size)
        self._lent, self._most = lent, most  # not before: there may be no memory
        return block

    def _fresh(self, size: int) -> NDArray[np.uint8]:
        """Return a new block, at the cost of all free ones if there is no memory otherwise."""
        try:
            return np.empty(size, np.uint8)
        except MemoryError:
            self._free.clear()
            self._kept = 0
            return np.empty(size, np.uint8)

    def _drop(self, size: int) -> NDArray[np.uint8]:
        """Remove and return the free block of this size that came last."""
        blocks = self._free[size]
        block = blocks.pop()
        if not blocks:
            del self._free[size]
        self._kept -= size
        return block

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._lent -= block.size
            self._kept += block.size
            self._free.setdefault(block.size, []).append(block)


def _on(block: NDArray[np.uint8], like: NDArray[Any]) -> NDArray[Any]:
    """Return an aligned array on `block` with the shape, dtype and strides of a dense one."""
    start = -block.ctypes.data % ALIGNMENT
    return np.ndarray(like.shape, like.dtype, block, start, like.strides)


def _rounded(size: int) -> int:
    """Return the size of the blocks that serve `size` bytes."""
    step = 1 << max(0, size.bit_length() - STEPS.bit_length())
    return -(-size // step) * step


_blocks = Blocks()
if hasattr(os, "register_at_fork"):  # another thread may have held the lock
    os.register_at_fork(after_in_child=_blocks.forget)


def empty_like(x: Tensor, *, brief: bool) -> Tensor:
    """Return an uninitialized tensor that lies in memory as `x` does; `brief` if it dies soon."""
    if x.nbytes < LEAST or not (
        x.is_contiguous()
        or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    ):
        return torch.empty_like(x, requires_grad=False)
    like = x.detach().numpy()
    if brief:
        return torch.from_numpy(_blocks.array(like))
    return torch.from_numpy(_on(np.empty(like.nbytes + ALIGNMENT, np.uint8), like))


def empty_cache() -> None:
    """Give memory that is kept for the next gradients back to the system.

    Gradients of inputs, of 1 MiB and more, are written to memory that is used again once they are
    gone, because fresh memory costs page faults. What is kept, with what is in use, never exceeds
    the most that was in use at once.
    """
    _blocks.clear()
