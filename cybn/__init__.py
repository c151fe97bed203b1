"""Compiled batch normalization for NumPy arrays on the CPU: training, inference and gradients.

>>> import numpy as np, cybn
>>> bn = cybn.BatchNorm2d(64)
>>> x = np.random.default_rng(0).standard_normal((8, 64, 14, 14), dtype=np.float32)
>>> y = bn(x)
>>> dx = bn.backward(np.ones_like(y))

Layers store gamma, beta and running statistics; functions have no state. Both use the same compiled
kernels, in float32 or float64. Results are bitwise identical for any number of threads.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._memory import empty_cache, set_cache_limit
from ._moments import Moments
from ._runtime import get_num_threads, set_num_threads, show_config, threads
from ._version import __version__
from .family import (
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from .functional import (
    batch_norm,
    batch_norm_backward,
    batch_norm_inference,
    batch_norm_inference_backward,
    moments,
)
from .layers import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Drift,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    Layer,
    LayerNorm,
    Renorm,
    RMSNorm,
)
from .population import population_statistics

if TYPE_CHECKING:
    from . import folding as folding
    from . import interop as interop

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
    "Layer",
    "LayerNorm",
    "Moments",
    "RMSNorm",
    "Renorm",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "empty_cache",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "moments",
    "population_statistics",
    "rms_norm",
    "rms_norm_backward",
    "set_cache_limit",
    "set_num_threads",
    "show_config",
    "threads",
]

_ON_FIRST_USE = ("folding", "interop")


def __getattr__(name: str) -> Any:
    """Import a submodule on first use if ``import cybn`` does not import it."""
    if name in _ON_FIRST_USE:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
