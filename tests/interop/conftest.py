"""Fixtures: a layer and a PyTorch module to convert, and a file to save to."""

import numpy as np
import pytest
from file_cases import ENDINGS
from fold_cases import random_norm
from interop_cases import C
from peer_cases import trained


@pytest.fixture
def bn(rng):
    layer = random_norm(rng, C, np.float32)
    layer.num_batches_tracked = 7
    return layer


@pytest.fixture
def module(rng):
    return trained(rng)


@pytest.fixture(params=ENDINGS)
def path(request, tmp_path):
    if request.param == "safetensors":
        pytest.importorskip("safetensors")
    return tmp_path / f"state.{request.param}"
