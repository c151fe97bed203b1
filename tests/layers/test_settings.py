"""Settings that are assigned to an existing layer are checked as in the constructor."""

import copy
import pickle

import numpy as np
import pytest
from layer_cases import snapshot

import cybn

LAYERS = [cybn.BatchNorm(3), cybn.BatchNorm2d(3, axis=-1, momentum=None)]
BAD = [
    ("eps", -1e-9, ValueError, "eps is -1e-09; it must be finite and not negative"),
    ("eps", np.nan, ValueError, "eps is nan"),
    ("eps", "small", TypeError, "eps is 'small'; it must be a number"),
    ("momentum", 1.5, ValueError, r"momentum is 1.5; it must be in \[0, 1\]"),
    ("momentum", np.nan, ValueError, "momentum is nan"),
    ("axis", 1.0, TypeError, "axis is 1.0; it must be an int"),
    ("running_ddof", 2, ValueError, "running_ddof is 2; it must be 0"),
    ("nan_policy", "ignore", ValueError, "nan_policy is 'ignore'; it must be one of propagate"),
    ("activation", "softplus", ValueError, "activation is 'softplus'; it must be None or one of"),
    ("slope", np.inf, ValueError, "slope is inf; it must be finite"),
    ("virtual_batch_size", 0, ValueError, "virtual_batch_size is 0; it must be at least 1"),
    ("virtual_batch_size", 2.0, TypeError, "virtual_batch_size is 2.0; it must be an int, or None"),
    ("renorm", (3, 5), TypeError, "renorm is .*; it must be a Renorm"),
    ("num_features", 4, AttributeError, "num_features is 3, and fixed when a layer is made"),
    ("affine", False, AttributeError, "affine is .*, and fixed when a layer is made"),
    ("dtype", float, AttributeError, "dtype"),
]


@pytest.mark.row(31)
@pytest.mark.parametrize("bn", LAYERS, ids=repr)
@pytest.mark.parametrize(("name", "value", "error", "message"), BAD)
def test_a_bad_setting_changes_nothing(name, value, error, message, bn):
    before, was = snapshot(bn), getattr(bn, name)
    with pytest.raises(error, match=message):
        setattr(bn, name, value)
    assert getattr(bn, name) == was
    assert snapshot(bn) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("activation", "relu"), ("virtual_batch_size", 2), ("renorm", cybn.Renorm())],
)
def test_an_instance_norm_has_none_of_these(name, value, rng):
    """Only a batch norm has these settings."""
    x = rng.standard_normal((6, 3, 5))
    norm = cybn.InstanceNorm1d(3, track_running_stats=True, dtype=float)
    want = norm(x)
    with pytest.raises(ValueError, match=f"{name} is .*; it must be None"):
        setattr(norm, name, value)
    setattr(norm, name, None)
    np.testing.assert_array_equal(norm(x), want)
    with pytest.raises(ValueError, match=r"momentum is 2\.0"):
        norm.momentum = 2


def test_a_good_one_holds(rng):
    x = rng.standard_normal((6, 5, 3))
    bn = cybn.BatchNorm(3)
    bn.axis, bn.eps, bn.momentum, bn.running_ddof = -1, 0.5, None, 0
    bn.activation, bn.nan_policy = "relu", "skip"
    made = cybn.BatchNorm(
        3, axis=-1, eps=0.5, momentum=None, running_ddof=0, activation="relu", nan_policy="skip"
    )
    for twin in (bn, copy.copy(bn), copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        assert repr(twin) == repr(made)
        np.testing.assert_array_equal(twin(x), made(x))
        np.testing.assert_array_equal(twin.backward(x), made.backward(x))


def test_settings_are_held_as_plain_types():
    bn = cybn.BatchNorm(np.int64(3), axis=np.int8(1), eps=np.float32(0.5), momentum=np.float64(1))
    assert [type(v) for v in (bn.num_features, bn.axis, bn.eps, bn.momentum)] == [
        *(int, int, float, float)
    ]


def test_renorm_needs_running_statistics(rng):
    x = rng.standard_normal((6, 3))
    bn = cybn.BatchNorm(3, track_running_stats=False)
    bn.renorm = cybn.Renorm()
    with pytest.raises(ValueError, match="renorm needs running statistics"):
        bn(x, out=x)
    bn.renorm = None
    assert np.isfinite(bn(x)).all()


def test_dir_names_what_a_layer_has():
    names = set(dir(cybn.BatchNorm(3)))
    assert {"axis", "momentum", "running_mean", "renorm"} <= names
    assert not {"weight", "num_groups", "requires_grad"} & names
