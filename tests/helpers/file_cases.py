"""Layers to be saved to a file, and the comparison of a layer with the one that was loaded."""

import numpy as np
from fold_cases import random_norm

import cybn

ENDINGS = ["npz", "safetensors"]
ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "a/b:0": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(10, dtype=np.int16)[::-2],
    "half": np.ones(3, np.float16),
    "count": np.array(7, np.int64),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3)),
    "big-endian": np.arange(3, dtype=">f8"),
    "file": np.ones(1),  # a name that np.savez cannot take
    "nan": np.array([np.nan, np.inf, -0.0]),
}


def layers(rng):
    """Return layers in which no setting has its default value."""
    second = random_norm(rng, 3, np.float64, affine=False)
    second.running_ddof, second.momentum, second.axis = 0, None, -1
    second.num_batches_tracked = 2**40
    return {
        "stem.bn": random_norm(rng, 5, np.float32),
        "é": second,
        "plain": cybn.BatchNorm1d(4, track_running_stats=False),
        "bare": cybn.BatchNorm3d(4, track_running_stats=False, affine=False, eps=0.1),
        "2d": cybn.BatchNorm2d(2, momentum=0.25),
        "renormed": cybn.BatchNorm(2, renorm=cybn.Renorm(2, 4), virtual_batch_size=4),
        "fused": cybn.BatchNorm(2, activation="leaky_relu", slope=0.2, nan_policy="skip"),
    }


def same(a, b):
    assert type(a) is type(b)
    assert repr(a) == repr(b)
    assert a.running_ddof == b.running_ddof
    assert a.dtype == b.dtype
    mine, other = a.state_dict(), b.state_dict()
    assert list(mine) == list(other)
    for key, value in mine.items():
        np.testing.assert_array_equal(value, other[key])
        assert value.dtype == other[key].dtype
