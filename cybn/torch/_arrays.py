"""NumPy arrays at the addresses of tensors.

``tensor.numpy()`` marks the storage of the tensor as one that can never be resized, which breaks
`resize_`, `out=` and sharded training. Arrays made here only have the address, so the storage is
not marked. Code that makes such an array must keep the tensor as long as it uses the array.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["DTYPES", "array", "vector"]

# NumPy's type for each type of tensor that the kernels read.
DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
}
try:
    import ml_dtypes
except ImportError:  # PyTorch computes bfloat16 then
    pass
else:
    DTYPES[torch.bfloat16] = np.dtype(ml_dtypes.bfloat16)

_START = 64
_SPACE = (ctypes.c_char * (2**62)).from_address(_START)  # all addresses; nothing is read here


def array(t: Tensor) -> NDArray[Any]:
    """Return an array at the address of a strided CPU tensor with at least one value."""
    dtype = DTYPES[t.dtype]
    strides = None
    if not t.is_contiguous():
        size = dtype.itemsize
        strides = tuple([step * size for step in t.stride()])
    # NumPy accepts any buffer, but its type stub does not know those of ctypes.
    return np.ndarray(t.shape, dtype, _SPACE, t.data_ptr() - _START, strides)  # type: ignore[arg-type]


def vector(t: Tensor | None) -> tuple[Any, Tensor | None]:
    """Return parameters or statistics as an array, and the tensor that owns its memory."""
    if t is None:
        return None, None
    if t.dtype is not torch.float32 and t.dtype is not torch.float64:
        t = t.detach().float()
    return array(t), t
