"""Layers: objects that remember gamma, beta, running statistics and mode.

==================  ======================================================================
_running.py         the running statistics and how a batch moves them
_state.py           checking a state dict before anything is changed
batch_norm.py       BatchNorm and its 1d, 2d and 3d forms
==================  ======================================================================
"""

from .batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
