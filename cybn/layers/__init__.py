"""Layers: objects that remember gamma, beta, running statistics and mode.

==================  ======================================================================
_layer.py           what all layers share: gamma, beta, mode, state
_settings.py        what the settings of a layer may be, checked whenever one is assigned
_per_sample.py      layers without running statistics: forward and backward
_tracking.py        layers with running statistics: how they are learned, read, set and saved
_passes.py          forward and backward of those
_running.py         the running statistics and how a batch moves them
_state.py           checking a state dict before anything is changed
_switches.py        what a layer learns, and which statistics it uses
_parts.py           ghost batches: a batch normalized in parts
_renorm.py          batch renormalization: Renorm and its correction
_trials.py          forwards without a trace
_safety.py          preview, snapshot, restore, drift
_drift.py           how far a batch lies from the running statistics
_conventions.py     how other libraries mean the same words
_explain.py         the formulas of a layer, with its numbers in
batch_norm.py       BatchNorm and its 1d, 2d and 3d forms
group_norm.py       GroupNorm
instance_norm.py    InstanceNorm in its 1d, 2d and 3d forms, on BatchNorm
layer_norm.py       LayerNorm and RMSNorm
==================  ======================================================================
"""

from ._drift import Drift
from ._renorm import Renorm
from .batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .group_norm import GroupNorm
from .instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .layer_norm import LayerNorm, RMSNorm

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Drift",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "Renorm",
]
