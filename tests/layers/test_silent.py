"""Values that would silently have no effect, or a wrong one, raise an error."""

import numpy as np
import pytest

import cybn

LAYERS = {
    "batch": lambda: cybn.BatchNorm(4),
    "instance": lambda: cybn.InstanceNorm1d(4, affine=True),
    "layer": lambda: cybn.LayerNorm(4),
    "rms": lambda: cybn.RMSNorm(4),
    "group": lambda: cybn.GroupNorm(2, 4),
}
FOREIGN = (
    "weight",
    "bias",
    "scale",
    "moving_mean",
    "moving_variance",
    "trainable",
    "requires_grad",
)
OTHERS = ("momentum", "activation", "renorm", "use_batch_statistics", "running_mean", "axis")


@pytest.mark.parametrize("kind", LAYERS)
def test_names_that_a_layer_has_not(kind):
    """Names of other libraries and of other kinds of layers cannot be assigned."""
    layer = LAYERS[kind]()
    for name in (*FOREIGN, *(n for n in OTHERS if kind in ("layer", "rms") and n != "eps")):
        with pytest.raises(AttributeError, match=f"{type(layer).__name__} has no {name}; "):
            setattr(layer, name, np.ones(4))
        assert not hasattr(layer, name)
        assert name not in dir(layer)
    layer.note = "what a program keeps with a layer is its own affair"
    assert layer.note


def test_bools_are_no_numbers():
    bn = cybn.BatchNorm(4)
    before = repr(bn)
    for name in ("eps", "momentum", "slope", "axis", "running_ddof", "virtual_batch_size"):
        with pytest.raises((TypeError, ValueError), match=f"{name} is True; it must be"):
            setattr(bn, name, True)
    with pytest.raises(TypeError, match="eps is True; it must be a number"):
        cybn.batch_norm(np.ones((4, 4)), eps=True)
    for make in (cybn.GroupNorm(2, 4), cybn.InstanceNorm1d(4)):
        with pytest.raises(TypeError, match="axis is True; it must be an int"):
            make.axis = True
    assert repr(bn) == before


def test_what_float32_cannot_hold_does_not_become_infinite():
    bn = cybn.BatchNorm(4)
    with pytest.raises(ValueError, match=r"gamma has the value 1e\+300, which float32 cannot hold"):
        bn.gamma = [1.0, 1e300, 1.0, 1.0]
    assert (bn.gamma == 1).all()
    bn.gamma = [np.inf] * 4


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_sample_that_changed_is_seen(kind, order, rng):
    """Some values of each of up to 64 samples are stored for the comparison."""
    shape = (48, 96, 4) if kind in ("layer", "rms") else (48, 4, 96)
    for sample in (0, 1, 17, 30, 47):
        layer = LAYERS[kind]()
        x = np.asarray(rng.standard_normal(shape, dtype=np.float32), order=order)
        layer(x)
        x[sample] += 1
        with pytest.raises(RuntimeError, match="x has changed since the last forward"):
            layer.backward(np.ones_like(x))


@pytest.mark.parametrize("shape", [(64, 4, 1000), (32, 4, 784), (16, 4, 64, 64), (48, 4, 96)])
def test_one_channel_that_changed_is_seen(shape, rng):
    """The stored values are in all channels, for any number and size of samples."""
    for channel in range(4):
        layer = cybn.BatchNorm(4)
        x = rng.standard_normal(shape, dtype=np.float32)
        layer(x)
        x[:, channel] = 0
        with pytest.raises(RuntimeError, match="x has changed since the last forward"):
            layer.backward(np.ones_like(x))
