"""A module, a batch and comparisons, for tests against other libraries."""

import importlib

import numpy as np
import pytest

C = 6
AGREE = 2e-6


def trained(rng):
    """Return a PyTorch batch norm after some batches; no setting is the default of any library."""
    torch = pytest.importorskip("torch")
    module = torch.nn.BatchNorm2d(C, eps=2e-4, momentum=0.3)
    with torch.no_grad():
        module.weight.uniform_(0.5, 1.5)
        module.bias.uniform_(-1, 1)
    for _ in range(3):
        module(torch.from_numpy(batch(rng)))
    return module.eval()


def batch(rng):
    """Return a batch with channels of several sizes, some far from zero; outputs are about 1."""
    size, middle = (np.linspace(*ends, C).reshape(C, 1, 1) for ends in ((0.5, 2), (-1, 1)))
    x = rng.standard_normal((4, C, 5, 5)) * size + middle
    return x.astype(np.float32)


def numpy_of(value):
    """Return the result of a Keras layer as a NumPy array, for any backend."""
    return importlib.import_module("keras").ops.convert_to_numpy(value)


def same(a, b):
    for key, value in a.items():
        other = b[key]
        value, other = (
            np.asarray(v.detach() if hasattr(v, "detach") else v) for v in (value, other)
        )
        np.testing.assert_array_equal(value, other)
        assert value.dtype == other.dtype
