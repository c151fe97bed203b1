"""The instruction levels that the build contains and the CPU supports, and how to call one."""

from contextlib import contextmanager
from functools import lru_cache

from cybn import _dispatch, _runtime

LEVELS = _runtime.usable_levels()

kernels_at = lru_cache(_runtime.kernels_at)


def bind(level):
    """Make cybn call the kernels of one instruction level from now on."""
    _dispatch.use(kernels_at(level, "batch_norm").KERNELS, kernels_at(level, "layer_norm").KERNELS)


@contextmanager
def caches(level, sizes):
    """Let the kernels of a level assume caches of these sizes, or the machine's sizes for None."""
    kernels = [kernels_at(level, name) for name in ("batch_norm", "layer_norm")]
    own = [_runtime._cache_bytes(index) for index in (2, 3)]
    try:
        for kernel in kernels:
            kernel.set_caches(*(sizes or own))
        yield
    finally:
        for kernel in kernels:
            kernel.set_caches(*own)
