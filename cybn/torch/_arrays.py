"""Tensors as arrays over their addresses.

A NumPy view of a tensor marks its storage as one that can never be resized, which breaks `resize_`,
`out=` and sharded training. Arrays made here have an address and nothing else: code that makes one
holds the tensor for as long as the array is used, and the storage never hears of it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["DTYPES", "array", "vector"]

# NumPy's type of each type of tensor that the kernels read.
DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
}
try:
    import ml_dtypes
except ImportError:  # bfloat16 is PyTorch's then
    pass
else:
    DTYPES[torch.bfloat16] = np.dtype(ml_dtypes.bfloat16)

_START = 64
_SPACE = (ctypes.c_char * (2**62)).from_address(_START)  # every address; nothing is read here


def array(t: Tensor) -> NDArray[Any]:
    """Return the memory of a strided tensor on the CPU that holds at least one value."""
    dtype = DTYPES[t.dtype]
    strides = None
    if not t.is_contiguous():
        size = dtype.itemsize
        strides = tuple([step * size for step in t.stride()])
    # NumPy takes any buffer; its stub does not know those of ctypes.
    return np.ndarray(t.shape, dtype, _SPACE, t.data_ptr() - _START, strides)  # type: ignore[arg-type]


def vector(t: Tensor | None) -> tuple[Any, Tensor | None]:
    """Return parameters or statistics in a type that the kernels take, and what holds them."""
    if t is None:
        return None, None
    if t.dtype is not torch.float32 and t.dtype is not torch.float64:
        t = t.detach().float()
    return array(t), t
