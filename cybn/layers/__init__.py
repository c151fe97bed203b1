"""Layers: objects that remember gamma, beta, running statistics and mode."""

from ._layer import Layer
from ._parts import Renorm
from ._snapshots import Drift, Snapshot
from ._state import Keys
from .batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .instance_norm import InstanceNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .per_sample import GroupNorm, LayerNorm, RMSNorm

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Drift",
    "GroupNorm",
    "InstanceNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "Keys",
    "Layer",
    "LayerNorm",
    "RMSNorm",
    "Renorm",
    "Snapshot",
]
