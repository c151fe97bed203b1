"""The instruction levels that the build has and the CPU runs, and how a test calls one of them."""

from functools import lru_cache

from cybn import _dispatch, _runtime

LEVELS = _runtime.usable_levels()

kernels_at = lru_cache(_runtime.kernels_at)


def bind(level):
    """Call the kernels of one instruction level from now on."""
    _dispatch.use(kernels_at(level, "batch_norm").KERNELS, kernels_at(level, "layer_norm").KERNELS)
