"""Values near the largest of float64: sums, squares and products may overflow, results do not.

A mean is right whenever it is in range itself, and a constant gives beta. A variance that is too
large for float64 is infinite. y and gradients are then right all the same (`test_beyond.py`).
"""

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest

import cybn
from cybn import reference

pytestmark = [pytest.mark.row(6), pytest.mark.divided]

BIG = 1e308
VALUES = {
    "constant": np.full(48, BIG),
    "the largest": np.full(48, np.finfo(float).max),
    "both signs": np.where(np.arange(48) % 2, BIG, -BIG),
    "more of one sign": np.where(np.arange(48) % 4, 1.7e308, -1.7e308),
    "close together": BIG * (1 + 1e-10 * np.arange(48)),
    "far apart": BIG * (1 + 1e-3 * np.arange(48)),
    "some": np.where(np.arange(48) % 5, 0, BIG),
    "squares alone": 1e200 * (np.arange(48) - 20),
    "M2 alone": np.where(np.arange(48) % 2, 1.2e154, -1.2e154),
    "in range": np.where(np.arange(48) % 2, 1e150, -1e150),
}


def exact(values):
    """Return mean and M2 of values; M2 is infinite if it is too large for float64."""
    fractions = [Fraction(float(v)) for v in values]
    mean = sum(fractions) / len(fractions)
    m2 = sum((v - mean) ** 2 for v in fractions)
    try:
        return float(mean), float(m2)
    except OverflowError:
        return float(mean), np.inf


def check(moments, values, close=4):
    mean, m2 = exact(values)
    small = exact(values * 2.0**-600)[1] / len(values)
    std = np.sqrt(small) * 2.0**600
    np.testing.assert_allclose(moments.std(), std, rtol=1e-12 + rounding(moments))
    scale = np.abs(values).max()
    assert np.abs(moments.mean / scale - mean / scale).max() <= close * 2.0**-52
    np.testing.assert_allclose(moments.var(), m2 / len(values), rtol=1e-12)


def rounding(moments):
    """Return the error of y from rounding the mean, which grows with mean / std."""
    std = moments.std()
    return 2.0**-48 * (1 + np.max(np.abs(moments.mean) / np.where(std > 1, std, np.inf)))


def arrays(values):
    """Yield arrays that have the values in each channel, and the channel axis: runs and columns."""
    yield np.stack([values] * 3, axis=1), 1
    yield np.stack([values] * 3, axis=1), -1
    yield np.tile(values.reshape(6, 1, 8), (1, 3, 1)), 1
    yield np.ascontiguousarray(np.broadcast_to(values, (2, 3, 7, 48))), 1
    yield np.ascontiguousarray(np.broadcast_to(values[:, None], (4, 48, 40))), -1


@pytest.mark.parametrize("name", VALUES)
def test_batch_norm(name, level):
    values, beta = VALUES[name], np.array([0.5, -2.0, 3.0])
    for x, axis in list(arrays(values))[:4]:
        y, m = cybn.batch_norm(x, None, beta, axis=axis)
        want, of_reference = reference.batch_norm(x, None, beta, axis=axis)
        for moments in (m, of_reference, cybn.moments(x, axis=axis)):
            check(moments, values)
        if m.m2[0] == 0:
            assert (np.moveaxis(y, axis, -1) == beta).all()
        np.testing.assert_allclose(y, want, rtol=1e-12, atol=rounding(m))
        if m.m2[0] == np.inf:
            assert (
                abs((y - beta.reshape(-1 if axis == -1 else (-1, *[1] * (y.ndim - 2)))).std() - 1)
                < 1e-12
            )


@pytest.mark.parametrize("name", VALUES)
def test_moments_in_parts(name):
    """Updates and merges of parts of all sizes, also with weights and masks."""
    values = VALUES[name]
    for size in (1, 2, 7, 24, 48):
        parts = [values[i : i + size, None] for i in range(0, 48, size)]
        merged = sum(cybn.Moments.empty(1).update(part) for part in parts)
        check(merged, values, 4 * len(parts))
        for same in (
            cybn.Moments.from_state_dict(merged.state_dict()),
            pickle.loads(pickle.dumps(merged)),
            copy.deepcopy(merged),
        ):
            assert same == merged
            check(same, values, 4 * len(parts))
    bn = cybn.BatchNorm(1, dtype=float)
    check(cybn.population_statistics(bn, values.reshape(4, 12, 1))[bn], values, 16)
    twice = np.concatenate([values, values[:24]])
    weights = np.where(np.arange(48) < 24, 2.0, 1.0)
    check(cybn.Moments.empty(1).update(values[:, None], weights=weights), twice)
    check(cybn.moments(values[:, None], weights=weights), twice)
    mask = np.arange(48) < 24
    check(cybn.Moments.empty(1).update(values[:, None], mask=mask), values[:24])


@pytest.mark.parametrize("name", VALUES)
def test_rows(name, level):
    """Layer and group norm with each kind of loop: short rows, long ones, runs, channels-last."""
    values = VALUES[name]
    rows = {
        "turned": (values[:30], np.tile(values[:30], (5, 1)), cybn.layer_norm, {}),
        "along": (values, np.tile(values, (5, 1)), cybn.layer_norm, {}),
        "long": (np.tile(values, 9), np.tile(values, (5, 9)), cybn.layer_norm, {}),
        "runs": (
            np.tile(values, 16),
            np.tile(values, (2, 4, 8)),
            cybn.group_norm,
            {"num_groups": 2},
        ),
        "last": (
            np.repeat(values, 2),
            np.tile(values[:, None], (2, 1, 4)),
            cybn.group_norm,
            {"num_groups": 2, "axis": -1},
        ),
        "instance": (np.tile(values, 3), np.tile(values, (2, 4, 3)), cybn.instance_norm, {}),
    }
    for kind, (row, x, function, options) in rows.items():
        y, m = function(x, **options)
        want, of_reference = getattr(reference, function.__name__)(x, **options)
        check(m, row, 16)
        check(of_reference, row, 16)
        np.testing.assert_allclose(y, want, rtol=1e-12, atol=rounding(m), err_msg=kind)
        assert np.isfinite(y).all(), kind


@pytest.mark.parametrize("name", VALUES)
def test_backward_has_no_nan(name, level, rng):
    """Gradients are finite even if the variance is infinite."""
    values = VALUES[name]
    for x, axis in list(arrays(values))[:4]:
        _, m = cybn.batch_norm(x, axis=axis)
        dy = rng.standard_normal(x.shape)
        dx, dgamma, dbeta = cybn.batch_norm_backward(dy, x, m, axis=axis)
        want = reference.batch_norm_backward(dy, x, m, axis=axis)
        assert np.isfinite(dx).all()
        assert np.isfinite(dgamma).all()
        np.testing.assert_allclose(dx, want[0], rtol=1e-9, atol=1e-12 * np.abs(want[0]).max())
        np.testing.assert_allclose(dgamma, want[1], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(dbeta, want[2], rtol=1e-9, atol=1e-12)
    _, m = cybn.layer_norm(values.reshape(1, -1))
    dx, dgamma, _ = cybn.layer_norm_backward(dy.ravel()[None, :48], values.reshape(1, -1), m)
    assert np.isfinite(dx).all()
    assert np.isfinite(dgamma).all()


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("kind", ["plain", "ghost", "instance"])
def test_layers(name, kind):
    values = VALUES[name]
    options = {"dtype": float, "momentum": 1.0, "running_ddof": 0}
    if kind == "instance":
        bn = cybn.InstanceNorm1d(3, track_running_stats=True, affine=True, **options)
        x = np.ascontiguousarray(np.broadcast_to(values, (2, 3, 48)))
    else:
        bn = cybn.BatchNorm1d(3, virtual_batch_size=16 if kind == "ghost" else None, **options)
        x = np.tile(values.reshape(48, 1), (1, 3))
    y = bn(x)
    assert np.isfinite(y).all()
    mean, m2 = exact(values)
    assert (np.abs(bn.running_mean / BIG - mean / BIG) <= 32 * 2.0**-52).all()
    assert ((bn.running_var == np.inf) == (m2 == np.inf)).all()


def test_float32_has_none_of_it(level):
    """float32 is summed in float64, where the squares of all float32 values are in range."""
    for values in (np.full(48, 3e38), np.where(np.arange(48) % 2, 3e38, -3e38)):
        x = np.tile(values.astype(np.float32)[:, None], (1, 3))
        y, m = cybn.batch_norm(x)
        want, of_reference = reference.batch_norm(x)
        np.testing.assert_allclose(y, want, rtol=1e-6)
        np.testing.assert_allclose(m.m2, of_reference.m2, rtol=1e-12)
