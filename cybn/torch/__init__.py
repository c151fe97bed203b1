"""PyTorch's normalization modules, computed by cybn, with the same interface and state dicts.

>>> import torch, cybn.torch
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
>>> model = cybn.torch.convert(model, fuse=True)  # in place; revert(model) undoes it
>>> type(model[1]).__mro__[0].__name__, model(torch.randn(2, 3, 8, 8)).shape
('BatchNorm2d', torch.Size([2, 8, 6, 6]))

cybn's kernels normalize tensors on the CPU in float32, float64 and half types and in both memory
formats, without copying them. PyTorch computes all other calls; `report` shows which, and why. In
graphs (`torch.compile`, `torch.export`) the kernels are operators in ``torch.ops.cybn``.
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
from .sync import SyncBatchNorm

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
    "SyncBatchNorm",
    "convert",
    "empty_cache",
    "report",
    "revert",
]

del torch
