"""Fixtures that several test files share."""

import os
from functools import lru_cache

if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait leave the cores to the other process
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest

from cybn import _rows, _runtime, functional

pytest_plugins = ["matrix"]

LEVELS = _runtime.usable_levels()


@pytest.fixture
def rng():
    return np.random.default_rng(20150211)  # the day the batch-normalization paper came out


kernels_at = lru_cache(_runtime.kernels_at)


def bind(level):
    """Call the kernels of one instruction level from now on."""
    functional._bind(kernels_at(level, "batch_norm"))
    _rows._bind(kernels_at(level, "layer_norm"))


@pytest.fixture(params=LEVELS)
def level(request):
    """Run the test once per instruction level that the build has and the CPU runs."""
    bind(request.param)
    yield request.param
    bind(_runtime.level)
