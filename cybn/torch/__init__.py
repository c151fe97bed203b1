"""The batch norms of PyTorch, computed by cybn: the same modules, numbers and state dicts.

>>> import torch, cybn.torch
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
>>> model = cybn.torch.convert(model, fuse=True)  # in place; revert(model) undoes it
>>> type(model[1]).__mro__[0].__name__, model(torch.randn(2, 3, 8, 8)).shape
('BatchNorm2d', torch.Size([2, 8, 6, 6]))

float32 and float64 tensors on the CPU, in either memory format, go to cybn's kernels through NumPy
views of the same memory. Everything else (half precision and so autocast, other devices,
`torch.compile`, `torch.export`, `torch.jit`, `torch.func`, forward-mode AD, empty batches) goes to
PyTorch's own implementation, and so do calls that PyTorch refuses. Second derivatives are refused.
"""

try:
    import torch
except ImportError as error:
    raise ImportError(
        "cybn.torch is for PyTorch, which is not installed. Install it: pip install 'cybn[torch]'"
    ) from error

from ._convert import convert, revert
from ._memory import empty_cache
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "convert", "empty_cache", "revert"]

del torch
