"""The forms of a state dict, and the comparison of two layers."""

import numpy as np

C = 5  # channels
FORMS = ("cybn", "torch", "keras", "keras-h5", "flax", "nnx", "onnx")


def vectors(bn):
    return [bn.gamma, bn.beta, bn.running_mean, bn.running_var]


def same(a, b):
    for mine, other in zip(vectors(a), vectors(b), strict=True):
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype == other.dtype
