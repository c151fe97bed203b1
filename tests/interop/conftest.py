"""A layer to convert."""

import numpy as np
import pytest
from fold_cases import random_norm
from interop_cases import C


@pytest.fixture
def bn(rng):
    layer = random_norm(rng, C, np.float32)
    layer.num_batches_tracked = 7
    return layer
