"""The norms of PyTorch, computed by cybn: the same modules, numbers and state dicts.

>>> import torch, cybn.torch
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
>>> model = cybn.torch.convert(model, fuse=True)  # in place; revert(model) undoes it
>>> type(model[1]).__mro__[0].__name__, model(torch.randn(2, 3, 8, 8)).shape
('BatchNorm2d', torch.Size([2, 8, 6, 6]))

Tensors on the CPU, float32, float64 and half types, in either memory format, go to cybn's kernels
by their addresses. What the kernels do not take goes to PyTorch; `report` says what, and why. In
graphs (`torch.compile`, `torch.export`) the kernels are operators, ``torch.ops.cybn``.
"""

try:
    import torch
except ImportError as error:
    raise ImportError(
        "cybn.torch is for PyTorch, which is not installed. Install it: pip install 'cybn[torch]'"
    ) from error

from ._convert import convert, revert
from ._memory import empty_cache
from ._report import report
from .modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "convert",
    "empty_cache",
    "report",
    "revert",
]

del torch
