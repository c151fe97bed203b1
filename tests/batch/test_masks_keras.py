"""Masks give the same results as in Keras, on its NumPy backend: training, masks of (N, L).

Keras differs in three ways, which have tests of their own:

- It divides by the sum of the mask plus 1e-7, so mean and variance are smaller by 1e-7 / count.
- If at most one value is selected, it normalizes with a variance of 0. cybn raises an error.
- Its mask has exactly one axis fewer than x, so the channels must be on the last axis.

Keras normalizes masked positions, which is cybn's default.
"""

import os

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "numpy")
keras = pytest.importorskip("keras")

# E402: these imports follow the choice of Keras' backend.
import cybn  # noqa: E402  (after importorskip)

if keras.backend.backend() != "numpy":
    pytest.skip("Keras uses another backend", allow_module_level=True)

TOLERANCE = 2.0**-17  # Keras computes its sums in float32


@pytest.mark.parametrize("seed", range(50))
def test_parity(seed):
    """y and the running statistics agree for random shapes, gamma, beta and masks."""
    rng = np.random.default_rng(seed)
    n, length, c = (int(size) for size in rng.integers(2, 9, 3))
    x = rng.standard_normal((n, length, c)) * rng.uniform(0.3, 3) + rng.uniform(-3, 3)
    x = x.astype(np.float32)
    gamma, beta = rng.standard_normal((2, c)).astype(np.float32)
    mask = rng.random((n, length)) < rng.uniform(0.3, 1)
    mask.flat[:3] = True
    eps, momentum = 10.0 ** rng.uniform(-4, -2), rng.uniform(0.1, 0.9)
    theirs = keras.layers.BatchNormalization(epsilon=eps, momentum=momentum)
    theirs.build(x.shape)
    theirs.gamma.assign(gamma)
    theirs.beta.assign(beta)
    ours = cybn.BatchNorm.like("keras", c, axis=-1, eps=eps, momentum=momentum)
    ours.gamma[...], ours.beta[...] = gamma, beta
    expected = np.asarray(theirs(x, training=True, mask=mask))
    near = {"rtol": TOLERANCE, "atol": TOLERANCE * np.abs(expected).max()}
    np.testing.assert_allclose(ours(x, mask=mask), expected, **near)
    near["atol"] = TOLERANCE * np.abs(x).max() ** 2
    np.testing.assert_allclose(ours.running_mean, np.asarray(theirs.moving_mean), **near)
    np.testing.assert_allclose(ours.running_var, np.asarray(theirs.moving_variance), **near)


def test_where_they_differ(rng):
    x = 1 + rng.random((4, 5, 3)).astype(np.float32)
    mask = np.zeros((4, 5), bool)
    for counts in range(2):
        mask.flat[:counts] = True
        theirs = keras.layers.BatchNormalization(center=False)
        y = np.asarray(theirs(x, training=True, mask=mask))
        mean = x[0, 0] if counts else 0.0
        np.testing.assert_allclose(y, (x - mean) / np.sqrt(1e-3), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=f"leave {counts} of 20"):
            cybn.BatchNorm(3, axis=-1)(x, mask=mask)
    with pytest.raises(ValueError, match="one dimension less"):
        theirs(x, training=True, mask=mask[..., np.newaxis])
