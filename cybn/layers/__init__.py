"""Layers: objects that remember gamma, beta, running statistics and mode.

==================  ======================================================================
_layer.py           what layers without running statistics share
_running.py         the running statistics and how a batch moves them
_state.py           checking a state dict before anything is changed
batch_norm.py       BatchNorm and its 1d, 2d and 3d forms
group_norm.py       GroupNorm
instance_norm.py    InstanceNorm in its 1d, 2d and 3d forms, on BatchNorm
layer_norm.py       LayerNorm and RMSNorm
==================  ======================================================================
"""

from .batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .group_norm import GroupNorm
from .instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .layer_norm import LayerNorm, RMSNorm

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
]
