"""Allocate arrays between protected pages, so that access past either end kills the process.

Within `fenced("end")` every array that NumPy allocates ends where a page begins that must not be
touched; within `fenced("start")` each array starts where such a page ends. This includes the arrays
that cybn allocates. NumPy asks the memory handler of the current context (its NEP 49) for all.
"""

import ctypes
import mmap
from collections import defaultdict
from contextlib import contextmanager

import numpy as np

PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_room = {}  # data address of each live array -> (address of its first page, number of pages)
_spare = defaultdict(list)  # number of pages -> addresses of free areas of that size


def _pages(count):
    """Return the address of `count` pages between two protected pages."""
    if _spare[count]:
        return _spare[count].pop()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = _libc.mmap(None, (count + 2) * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    last = base + (count + 1) * PAGE
    if _libc.mprotect(base, PAGE, 0) or _libc.mprotect(last, PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return base + PAGE


def _at_end(_, size):
    count = -(-size // PAGE) or 1
    first = _pages(count)
    data = first + count * PAGE - size
    _room[data] = first, count
    return data


def _at_start(_, size):
    count = -(-size // PAGE) or 1
    first = _pages(count)
    _room[first] = first, count
    return first


def _free(_, data, size):
    first, count = _room.pop(data)
    _spare[count].append(first)


def _cleared(allocate):
    def calloc(_, number, size):
        data = allocate(None, number * size)
        ctypes.memset(data, 0, number * size)
        return data

    return calloc


def _moved(allocate):
    def realloc(_, data, size):
        first, count = _room[data]
        new = allocate(None, size)
        ctypes.memmove(new, data, min(size, first + count * PAGE - data))
        _free(None, data, 0)
        return new

    return realloc


# ---- NumPy's handler ---------------------------------------------------------------------

_SIZE, _POINTER = ctypes.c_size_t, ctypes.c_void_p
_MALLOC = ctypes.PYFUNCTYPE(_POINTER, _POINTER, _SIZE)
_CALLOC = ctypes.PYFUNCTYPE(_POINTER, _POINTER, _SIZE, _SIZE)
_REALLOC = ctypes.PYFUNCTYPE(_POINTER, _POINTER, _POINTER, _SIZE)
_FREE = ctypes.PYFUNCTYPE(None, _POINTER, _POINTER, _SIZE)


class _Handler(ctypes.Structure):
    """PyDataMem_Handler."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("context", _POINTER),
        ("malloc", _MALLOC),
        ("calloc", _CALLOC),
        ("realloc", _REALLOC),
        ("free", _FREE),
    )


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = _POINTER, [ctypes.py_object, ctypes.c_char_p]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [_POINTER, ctypes.c_char_p, _POINTER]

_umath = (np._core if hasattr(np, "_core") else np.core)._multiarray_umath
_api = ctypes.cast(_capsule_pointer(_umath._ARRAY_API, None), ctypes.POINTER(_POINTER))
_set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(_api[304])


def _handler(name, allocate):
    functions = allocate, _cleared(allocate), _moved(allocate), _free
    types = _MALLOC, _CALLOC, _REALLOC, _FREE
    return _Handler(name, 1, None, *(t(f) for t, f in zip(types, functions, strict=True)))


_NAME = b"mem_handler"  # a capsule holds the address of its name
_handlers = {"end": _handler(b"fence at end", _at_end), "start": _handler(b"fence", _at_start)}
_capsules = {
    side: _new_capsule(ctypes.addressof(handler), _NAME, None)
    for side, handler in _handlers.items()
}
for thing in (_NAME, _handlers, _capsules):  # the last array may outlive all modules
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
SIDES = tuple(_capsules)


@contextmanager
def fenced(side):
    """Put all arrays that are allocated in this block next to a protected page."""
    before = _set_handler(_capsules[side])
    try:
        yield
    finally:
        _set_handler(before)


def rows_apart(array):
    """Return an equal array with a gap before each index of axis 0 but the first."""
    wide = np.full((2 * len(array) - 1, *array.shape[1:]), np.nan, array.dtype)
    view = wide[::2]
    view[...] = array
    return view
