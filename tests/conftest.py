"""Fixtures that several test files share."""

import numpy as np
import pytest

from cybn import _runtime, functional

LEVELS = _runtime.usable_levels()


@pytest.fixture
def rng():
    return np.random.default_rng(20150211)  # the day the batch-normalization paper came out


@pytest.fixture(params=LEVELS)
def level(request):
    """Run the test once per instruction level that the build has and the CPU runs."""
    functional._bind(_runtime.kernels_at(request.param))
    yield request.param
    functional._bind(_runtime.kernels)
