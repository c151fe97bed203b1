"""Fixtures that several test files share."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # OpenMP threads that wait must not occupy a core
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
from levels import LEVELS, bind

from cybn import _runtime

pytest_plugins = ["matrix"]


@pytest.fixture
def rng():
    return np.random.default_rng(20150211)  # the day the batch-normalization paper came out


@pytest.fixture(name="bind")
def switch():
    """Return a function that switches the instruction level until the test ends."""
    yield bind
    bind(_runtime.level)


@pytest.fixture(params=LEVELS)
def level(request):
    """Run the test once per instruction level that the build contains and the CPU supports."""
    bind(request.param)
    yield request.param
    bind(_runtime.level)
