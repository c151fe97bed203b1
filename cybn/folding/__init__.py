"""Folding: batch normalization with fixed statistics into the layer beside it.

In eval mode batch normalization is ``y = x * scale + shift``, channel by channel, and a linear map
before or after it can take both over. Plain arrays in, plain arrays out:

>>> import numpy as np
>>> from cybn import BatchNorm2d, folding
>>> rng = np.random.default_rng(0)
>>> weight = rng.standard_normal((8, 2, 3, 3), dtype=np.float32)  # a convolution of 4 groups
>>> bn = BatchNorm2d(8)
>>> w, b = folding.fold_conv(weight, None, bn, groups=4)
>>> folding.measure(folding.fold_conv, weight, None, bn, groups=4).worst < 1
True

================  ==================================================================================
_layouts.py       the weight layouts by name, and the one form they are all seen in
_norms.py         what is folded, as one scale and shift
_folds.py         the five folds
_convolution.py   convolution in plain NumPy, which the measurement runs
_measure.py       the error of a fold, measured on random input
================  ==================================================================================

Into a *following* convolution, `fold_into_next_conv` folds where that does not pad: zero padding
comes after the shift, so at the border the folded layer would differ.
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
