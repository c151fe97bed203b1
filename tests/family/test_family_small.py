"""Small forwards of the other norms: into new memory, into a given array, and in place."""

import numpy as np
import pytest
from family_cases import group, instance, layer, rms

MEMBERS = [layer(1, 1), layer(5, 33), layer(3, 4, 70), rms(9, 7), rms(1, 1500)]
MEMBERS += [group(2, 3, 4), group(2, 4, 8, 4, 4), group(1, 2, 3, 65), instance(2, 3, 5)]
MEMBERS += [instance(1, 2, 200)]


@pytest.mark.row(24)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", MEMBERS, ids=str)
def test_the_family_gives_the_same_bits(case, dtype, rng, level):
    """Bits are equal in new memory, a given array and in place, with gamma and beta or not."""
    x, _, gamma, beta = case.data(rng, dtype, offset=2.0)
    for vectors in ((gamma, beta), (None, None), (gamma, None)):
        y, statistics = case.forward(x, *vectors)
        long, wanted = case.forward(x, *vectors, num_threads=1)
        assert y.tobytes() == long.tobytes()
        if case.centred:
            assert statistics == wanted
        else:
            assert statistics.tobytes() == wanted.tobytes()
        out = np.full_like(x, np.nan)
        assert case.forward(x, *vectors, out=out)[0] is out
        own = x.copy()
        assert case.forward(own, *vectors, out=own)[0] is own
        assert out.tobytes() == own.tobytes() == long.tobytes()
