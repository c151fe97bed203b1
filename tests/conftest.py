"""Fixtures that several test files share."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait leave the cores to the other process
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
from levels import LEVELS, bind

from cybn import _runtime

pytest_plugins = ["matrix"]


@pytest.fixture
def rng():
    return np.random.default_rng(20150211)  # the day the batch-normalization paper came out


@pytest.fixture(params=LEVELS)
def level(request):
    """Run the test once per instruction level that the build has and the CPU runs."""
    bind(request.param)
    yield request.param
    bind(_runtime.level)
