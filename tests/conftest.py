"""Fixtures that several test files share."""

import os
from zlib import crc32

if "PYTEST_XDIST_WORKER" in os.environ:  # OpenMP threads that wait must not occupy a core
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
from levels import LEVELS, bind

from cybn import _runtime

pytest_plugins = ["matrix"]


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items):
    """Divide the cases of tests with the mark `divided` among the levels; the others are slow."""
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if "level" in values and item.get_closest_marker("divided"):
            case = item.nodeid.replace(values["level"], "")
            if values["level"] != LEVELS[crc32(case.encode()) % len(LEVELS)]:
                item.add_marker(pytest.mark.slow)


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
