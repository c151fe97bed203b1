"""Keras: its conventions, and its batch renormalization with running standard deviations."""

import os

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")
torch = pytest.importorskip("torch")

import cybn  # noqa: E402

if keras.backend.backend() != "torch":
    pytest.skip("Keras uses another backend", allow_module_level=True)


@pytest.mark.parametrize("seed", range(50))
def test_renorm_parity(seed):
    """y, dx, dgamma, dbeta and the running mean agree to 2**-17 of their largest value.

    Keras computes in float32 even if the layer is float64, and computes the variance as the mean of
    squares minus the square of the mean. test_statistics_small_batches.py compares the same
    formula with long double, within the bounds of the kernels. Keras keeps a moving standard
    deviation, while cybn takes the root of the running variance, so both are set to the same
    value before the step. After it the means can be compared, the standard deviations cannot.
    """
    rng = np.random.default_rng(seed)
    c = int(rng.integers(1, 7))
    spatial = rng.integers(1, 6, rng.integers(0, 4)).tolist()
    axis = int(rng.choice([1, -1]))
    shape = [int(rng.integers(2, 9)), c, *spatial] if axis == 1 else [8, *spatial, c]
    eps, momentum = 10.0 ** rng.uniform(-6, -2), rng.uniform(0.01, 0.9)
    r_max, d_max = rng.uniform(1, 3), rng.uniform(0, 3)
    x = rng.standard_normal(shape) * rng.uniform(0.3, 3) + rng.uniform(-3, 3)
    dy = rng.standard_normal(shape)
    gamma, beta, mean = rng.standard_normal((3, c))
    std = rng.uniform(0.5, 2, c)

    theirs = keras.layers.BatchNormalization(
        axis=axis,
        momentum=1 - momentum,
        epsilon=eps,
        renorm=True,
        renorm_clipping={"rmin": 1 / r_max, "rmax": r_max, "dmax": d_max},
        dtype="float64",
    )
    theirs.build(x.shape)
    start = {"gamma": gamma, "beta": beta, "renorm_mean": mean, "moving_mean": mean}
    for name, value in (start | {"renorm_stddev": std}).items():
        getattr(theirs, name).assign(value)
    tx = torch.tensor(x, requires_grad=True)
    ty = theirs(tx, training=True)
    ty.backward(torch.tensor(dy))

    bn = cybn.BatchNorm(
        c,
        axis=axis,
        eps=eps,
        momentum=momentum,
        running_ddof=0,
        dtype=np.float64,
        renorm=cybn.Renorm(r_max, d_max),
    )
    bn.gamma[:], bn.beta[:], bn.running_mean, bn.running_var = gamma, beta, mean, std**2 - eps
    y = bn(x)
    for got, want in [
        (y, ty),
        (bn.backward(dy), tx.grad),
        (bn.grad_gamma, theirs.gamma.value.grad),
        (bn.grad_beta, theirs.beta.value.grad),
        (bn.running_mean, theirs.moving_mean.value),
    ]:
        want = want.detach().cpu().numpy()
        assert np.abs(got - want).max() <= 2**-17 * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("options", [{}, {"momentum": 0.7}], ids=str)
def test_like(options, rng):
    batches = rng.standard_normal((3, 6, 4)).astype(np.float32) * 2 + 1
    theirs = keras.layers.BatchNormalization(axis=1, **options)
    bn = cybn.BatchNorm.like("keras", 4, **options)
    for x in batches:
        want, got = theirs(x, training=True), bn(x)
    moving = [theirs.moving_mean.value, theirs.moving_variance.value]
    for a, b in zip([got, bn.running_mean, bn.running_var], [want, *moving], strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=4e-6, atol=4e-6)
