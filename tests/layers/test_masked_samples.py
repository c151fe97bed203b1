"""GroupNorm and InstanceNorm with a mask or lengths."""

import numpy as np
import pytest

import cybn

N, C, L = 3, 4, 8
LENGTHS = [8, 3, 5]
MASK = np.arange(L) < np.array(LENGTHS)[:, None]

each_masked = pytest.mark.parametrize("masked", ["normalize", "zero"])
each_choice = pytest.mark.parametrize(
    "choice", [{"lengths": LENGTHS}, {"mask": MASK}, {"mask": MASK, "lengths": [8, 8, 8]}], ids=str
)


def data(rng):
    return (rng.standard_normal((N, C, L)).astype(np.float32) + 1 for _ in range(2))


@each_masked
@each_choice
def test_group_norm_is_its_function(rng, choice, masked):
    x, dy = data(rng)
    gn = cybn.GroupNorm(2, C)
    gn.gamma, gn.beta = rng.standard_normal((2, C))
    options = {"num_groups": 2, "masked": masked, **choice}
    y, moments = cybn.group_norm(x, gn.gamma, gn.beta, **options)
    np.testing.assert_array_equal(gn(x, masked=masked, **choice), y)
    dx, dgamma, dbeta = cybn.group_norm_backward(dy, x, moments, gn.gamma, **options)
    np.testing.assert_array_equal(gn.backward(dy), dx)
    np.testing.assert_array_equal(gn.grad_gamma, dgamma)
    np.testing.assert_array_equal(gn.grad_beta, dbeta)


@each_masked
@each_choice
def test_instance_norm_is_its_function(rng, choice, masked):
    x, dy = data(rng)
    norm = cybn.InstanceNorm1d(C, affine=True)
    norm.gamma, norm.beta = rng.standard_normal((2, C))
    y, moments = cybn.instance_norm(x, norm.gamma, norm.beta, masked=masked, **choice)
    np.testing.assert_array_equal(norm(x, masked=masked, **choice), y)
    dx, dgamma, dbeta = cybn.instance_norm_backward(
        dy, x, moments, norm.gamma, masked=masked, **choice
    )
    np.testing.assert_array_equal(norm.backward(dy), dx)
    np.testing.assert_array_equal(norm.grad_gamma, dgamma)
    np.testing.assert_array_equal(norm.grad_beta, dbeta)


@pytest.mark.parametrize("masked", ["normalize", "zero"])
def test_one_sample(rng, masked):
    x, dy = data(rng)
    norm, batch = cybn.InstanceNorm1d(C), cybn.InstanceNorm1d(C)
    y = batch(x[1:2], lengths=[3], masked=masked)
    np.testing.assert_array_equal(norm(x[1], lengths=3, masked=masked), y[0])
    np.testing.assert_array_equal(norm(x[1], mask=MASK[1], masked=masked), y[0])
    np.testing.assert_array_equal(norm.backward(dy[1]), batch.backward(dy[1:2])[0])


@each_choice
@pytest.mark.parametrize("policy", ["propagate", "raise"])
def test_running_statistics_weigh_samples_by_their_size(rng, choice, policy):
    x, _ = data(rng)
    norm = cybn.InstanceNorm1d(C, track_running_stats=True, momentum=1)
    norm.nan_policy = policy
    norm(np.where(MASK[:, None], x, np.nan), out=np.empty_like(x), **choice)
    parts = [sample[:, :length] for sample, length in zip(x.astype(float), LENGTHS, strict=True)]
    mean = np.concatenate(parts, axis=1).mean(1)
    m2 = sum(((part - part.mean(1, keepdims=True)) ** 2).sum(1) for part in parts)
    np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(norm.running_var, m2 / (sum(LENGTHS) - N), rtol=1e-6)
    y = norm.eval()(x, masked="zero", **choice)
    exact = (x - mean[:, None]) / np.sqrt(norm.running_var[:, None] + norm.eps)
    np.testing.assert_allclose(y, np.where(MASK[:, None], exact, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: cybn.GroupNorm(4, C), lambda: cybn.InstanceNorm1d(C)])
def test_a_mask_of_another_shape_changes_nothing(rng, make):
    x, dy = data(rng)
    norm = make()
    expected = norm(x).copy()
    with pytest.raises(ValueError, match="lengths"):
        norm(x, lengths=[1, 2])
    with pytest.raises(ValueError, match="masked"):
        norm(x, lengths=LENGTHS, masked="nothing")
    assert norm.backward(dy).shape == x.shape  # for the forward before the error
    np.testing.assert_array_equal(norm(x), expected)
