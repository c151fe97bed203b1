"""Memory for large results, because page faults can cost more than the normalization itself.

The result of forward is needed until backward. PyTorch allocates it, and this module requests huge
pages for it, if the system supports that. Huge pages cause 200 times fewer page faults.

The gradients that backward returns are freed soon. Large gradients get storages that are kept here
and reused. A storage is free as soon as no tensor refers to it any longer.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from threading import Lock

import torch
from torch import Tensor

from .._memory import LEAST, rounded
from .._memory import blocks as _arrays

__all__ = ["empty", "empty_cache"]

_HUGE = 4 << 20  # bytes; huge pages are not requested for less
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


class Storages:
    """Storages for gradients. A storage is free if nothing but this list refers to it."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start with an empty list. Existing tensors keep their storages."""
        self._kept: list[tuple[int, torch.UntypedStorage]] = []  # the last used are at the end
        self._lock = Lock()

    def clear(self) -> None:
        """Release the free storages. The others are released when their tensors are freed."""
        with self._lock:
            self._kept = []

    def held(self) -> tuple[int, int]:
        """Return the bytes of storages in use and of free ones."""
        with self._lock:
            free = sum(size for size, storage in self._kept if _is_free(storage))
            return sum(size for size, _ in self._kept) - free, free

    def take(self, nbytes: int) -> torch.UntypedStorage:
        """Return a storage of at least `nbytes` bytes. If a kept one fits and is free, reuse it."""
        size = rounded(nbytes)
        with self._lock:
            found = None
            for i in range(len(self._kept) - 1, -1, -1):
                kept, storage = self._kept[i]
                if kept == size and storage.nbytes() == size and _is_free(storage):
                    found = self._kept.pop(i)[1]
                    break
            if found is None:
                self._make_room(_arrays.limit - size)
                found = torch.UntypedStorage(size)
                _ask_for_huge_pages(found.data_ptr(), size)
            if self._total() + size <= _arrays.limit:
                self._kept.append((size, found))
            return found

    def _total(self) -> int:
        return sum(size for size, _ in self._kept)

    def _make_room(self, most: int) -> None:
        """Drop the least recently used free storages until at most `most` bytes are kept."""
        over, kept = self._total() - most, []
        for size, storage in self._kept:
            if over > 0 and _is_free(storage):
                over -= size
            else:
                kept.append((size, storage))
        self._kept = kept


def _is_free(storage: torch.UntypedStorage) -> bool:
    return torch._C._storage_Use_Count(storage._cdata) == 1


storages = Storages()
if hasattr(os, "register_at_fork"):  # another thread may have held the lock
    os.register_at_fork(after_in_child=storages.forget)


def empty_cache() -> None:
    """Release the memory that is kept for later results.

    Gradients of 1 MiB and more are written to memory of earlier ones that have been freed, because
    new memory costs page faults. `cybn.set_cache_limit` limits how much is kept.

    Examples
    --------
    >>> import cybn.torch
    >>> cybn.torch.empty_cache()
    """
    storages.clear()
    _arrays.clear()


def empty(like: Tensor, memory_format: torch.memory_format, *, brief: bool) -> Tensor:
    """Return an uninitialized tensor of the shape and type of another.

    `brief` means that the tensor will be freed soon. Then its memory is kept for reuse.
    """
    nbytes = like.numel() * like.element_size()
    if not brief or nbytes < LEAST or nbytes > _arrays.limit:
        new = torch.empty_like(like, memory_format=memory_format, requires_grad=False)
        if nbytes >= _HUGE:
            _ask_for_huge_pages(new.data_ptr(), nbytes)
        return new
    strides = torch.empty_like(like, memory_format=memory_format, device="meta").stride()
    storage = storages.take(nbytes)
    return torch.empty(0, dtype=like.dtype).set_(storage, 0, like.shape, strides)


def _ask_for_huge_pages(address: int, nbytes: int) -> None:
    """Advise the system to use huge pages for some memory. It may ignore the advice."""
    if _madvise is not None:
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (address + nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            _madvise(start, length, _ADVICE)


def _find_madvise() -> ctypes._FuncPointer | None:
    if _ADVICE is None:
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


_madvise = _find_madvise()
