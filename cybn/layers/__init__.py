"""Layers: objects that remember gamma, beta, running statistics and mode.

A layer is put together of parts, which it owns:

====================  ====================================================================
batch_norm.py         BatchNorm and its 1d, 2d and 3d forms: what they are made of
_passes.py            its forward and backward
instance_norm.py      InstanceNorm in its 1d, 2d and 3d forms
per_sample.py         LayerNorm, RMSNorm and GroupNorm
_layer.py             Layer, what all of them are: parameters, mode, state
_settings.py          attributes that are checked whenever one is assigned
_running.py           running statistics: how batches move them, how they are read and set
_sample_moments.py    those within samples, of an instance norm
_parts.py             ways to normalize: ghost batches, batch renormalization
_trials.py            preview: forwards without a trace
_snapshots.py         snapshot, restore, drift
_explain.py           a layer in words, and the conventions of other libraries
_state.py             checking a state before anything is changed
====================  ====================================================================
"""

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
