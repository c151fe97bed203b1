"""Folding batch normalization with fixed statistics into the layer before or after it.

In eval mode batch normalization computes ``y = x * scale + shift`` for each channel, and a linear
map before or after it can include both. The functions take and return plain arrays:

>>> import numpy as np
>>> from cybn import BatchNorm2d, folding
>>> rng = np.random.default_rng(0)
>>> weight = rng.standard_normal((8, 2, 3, 3), dtype=np.float32)  # a convolution of 4 groups
>>> bn = BatchNorm2d(8)
>>> w, b = folding.fold_conv(weight, None, bn, groups=4)
>>> folding.measure(folding.fold_conv, weight, None, bn, groups=4).worst < 1
True

================  ==================================================================================
_layouts.py       the weight layouts by name, and their views in one common layout
_norms.py         the scale and shift of a layer, a module or a pair of arrays
_folds.py         the five folds
_convolution.py   convolution in plain NumPy, which the measurement runs
_measure.py       the error of a fold, measured on random input
================  ==================================================================================

`fold_into_next_conv` folds into the convolution *after* a batch norm, if the convolution does not
pad. The zeros of padding come after the shift, so the folded layer would differ at the border.
"""

from ._folds import (
    fold_conv,
    fold_conv_transpose,
    fold_into_next_conv,
    fold_into_next_linear,
    fold_linear,
)
from ._measure import Report, measure

__all__ = [
    "Report",
    "fold_conv",
    "fold_conv_transpose",
    "fold_into_next_conv",
    "fold_into_next_linear",
    "fold_linear",
    "measure",
]
