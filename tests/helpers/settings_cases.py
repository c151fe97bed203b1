"""Input shapes for every kind of layer, and valid and invalid values of its attributes."""

from typing import get_args

import numpy as np

import cybn
from cybn._words import Activation

C = 4
SHAPES = {
    "BatchNorm": [(5, C), (4, C, 3), (3, C, 2, 2)],
    "BatchNorm1d": [(6, C), (4, C, 3)],
    "BatchNorm2d": [(3, C, 2, 3)],
    "BatchNorm3d": [(3, C, 2, 2, 2)],
    "InstanceNorm1d": [(3, C, 5)],
    "InstanceNorm2d": [(3, C, 2, 3)],
    "InstanceNorm3d": [(2, C, 2, 2, 2)],
    "GroupNorm": [(3, C, 3), (2, C)],
    "LayerNorm": [(3, 2, C), (2, C)],
    "RMSNorm": [(3, 2, C), (2, C)],
}
GOOD = {
    "eps": (1e-5, 0.5, np.float32(0.25), 1),
    "momentum": (0.1, None, 0, 1, 0.7),
    "running_ddof": (0, 1),
    "nan_policy": ("propagate", "raise", "skip"),
    "activation": (None, None, *get_args(Activation)),
    "slope": (0.01, 0.3, 1.5),
    "virtual_batch_size": (None, 1, 2, 3, 50),
    "renorm": (None, cybn.Renorm(1, 0), cybn.Renorm(1.5, 0.5)),
    "track_running_stats": (True, False, 1),
    "update_statistics": (True, False, np.True_),
    "use_batch_statistics": (None, True, False, 0),
    "train_affine": (True, False),
    "training": (True, False, 1, 0),
}
BAD = {
    "eps": (-1.0, np.nan, np.inf, "1", None, [1]),
    "momentum": (-0.1, 1.5, "0.1", np.nan),
    "running_ddof": (2, -1, None, "1"),
    "nan_policy": ("ignore", None, 0),
    "activation": ("swish", 1, "RELU", b"relu"),
    "slope": (np.nan, np.inf, "0.1", None),
    "virtual_batch_size": (0, -1, 2.5, True, "2"),
    "renorm": ((3, 5), 3, "3"),
    "axis": (1.0, None, "1"),
    "track_running_stats": ("no", None, 2, []),
    "update_statistics": ("no", None, 0.5),
    "use_batch_statistics": ("no", 2, []),
    "train_affine": ("no", None, 3),
    "training": ("no", None, 2),
    "num_features": (4, 5),
    "num_channels": (4, 8),
    "num_groups": (1, 2),
    "normalized_shape": (4, (2, 4)),
    "affine": (True, False),
    "elementwise_affine": (True, False),
    "dtype": (float, np.float32),
    "running_mean": (np.ones(C + 1), np.full(C, np.nan), "a", np.ones(C, int), None),
    "running_var": (np.full(C, -1.0), np.ones((1, C)), np.full(C, np.inf)),
    "num_batches_tracked": (-1, 1.5, "3", 2**63, True),
}
