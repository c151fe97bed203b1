"""Values assigned to a layer are converted and checked, or refused; copies share no memory."""

import copy
import itertools
import pickle
import re

import numpy as np
import pytest
from layer_cases import KINDS, snapshot, trained

import cybn

ARRAYS = ("gamma", "beta", "grad_gamma", "grad_beta")
every_kind = pytest.mark.parametrize("name", KINDS)


def test_a_list_trains(rng):
    x = rng.standard_normal((8, 3)).astype(np.float32)
    bn = cybn.BatchNorm(3)
    held = bn.parameters()
    bn.gamma = [1.0, 2.0, 3.0]
    bn(x)
    bn.backward(x)
    for p, g in zip(bn.parameters(), bn.gradients(), strict=True):
        p -= 0.1 * g
    assert bn.gamma is held[0]
    assert bn.gamma.dtype == np.float32
    assert not np.allclose(bn.gamma, [1, 2, 3])


@every_kind
def test_arrays_are_copied_into(name, rng):
    layer = KINDS[name].make()
    for array in ARRAYS:
        own = getattr(layer, array)
        if own is None:
            setattr(layer, array, None)
            with pytest.raises(AttributeError, match=f"{array} cannot be set: .* made without"):
                setattr(layer, array, np.ones(6))
            continue
        given = rng.standard_normal(own.shape)
        setattr(layer, array, given)
        assert getattr(layer, array) is own
        np.testing.assert_array_equal(own, given.astype(np.float32))
        setattr(layer, array, own[::-1])  # a view of the layer's own memory
        np.testing.assert_array_equal(own, given[::-1].astype(np.float32))
        before = snapshot(layer)
        for bad, text in [
            (np.ones(7), "it must have shape"),
            (1.0, "it must have shape"),
            (np.ones(own.shape, int), "it must be a float array"),
            (None, "it must be a float array"),
            (np.full(own.shape, "a"), "it must be a float array"),
        ]:
            with pytest.raises(ValueError, match=f"{array} (is|has) .*{text}"):
                setattr(layer, array, bad)
        with pytest.raises(TypeError, match="masked array"):
            setattr(layer, array, np.ma.masked_array(given))
        with pytest.raises(AttributeError):
            delattr(layer, array)
        assert snapshot(layer) == before


def test_in_place_operations():
    bn = cybn.BatchNorm(3)
    gamma = bn.gamma
    bn.gamma *= 2
    bn.gamma[1] += 1
    assert bn.gamma is gamma
    assert gamma.tolist() == [2, 3, 2]


@every_kind
def test_flags(name):
    layer = KINDS[name].make()
    switches = ("update_statistics", "train_affine", "track_running_stats", "training")
    for flag in [f for f in switches if hasattr(layer, f)]:
        usual, before = getattr(layer, flag), snapshot(layer)
        for bad in ("no", None, 2, 0.5, [], np.ones(2)):
            with pytest.raises(TypeError, match=f"{flag} is .*; it must be True or False"):
                setattr(layer, flag, bad)
        assert snapshot(layer) == before
        for good in (1, 0, np.True_, np.False_, usual):
            setattr(layer, flag, good)
            assert getattr(layer, flag) is bool(good)
    if hasattr(layer, "use_batch_statistics"):
        with pytest.raises(TypeError, match=r"use_batch_statistics is 'no'; .* or None"):
            layer.use_batch_statistics = "no"
    with pytest.raises(TypeError, match="training is 'yes'"):
        layer.train("yes")


@pytest.mark.parametrize(
    "make",
    [
        lambda: cybn.BatchNorm(3, affine="no"),
        lambda: cybn.BatchNorm(3, track_running_stats="no"),
        lambda: cybn.InstanceNorm1d(3, affine="no"),
        lambda: cybn.GroupNorm(1, 3, affine="no"),
        lambda: cybn.LayerNorm(3, elementwise_affine="no"),
        lambda: cybn.LayerNorm(3, bias="no"),
        lambda: cybn.RMSNorm(3, elementwise_affine="no"),
    ],
)
def test_flags_of_the_constructor(make):
    with pytest.raises(TypeError, match="is 'no'; it must be True or False"):
        make()


@pytest.mark.parametrize(
    ("make", "fixed", "free"),
    [
        (lambda: cybn.GroupNorm(2, 4), {"num_groups": 4, "num_channels": 8}, {"eps": -1.0}),
        (lambda: cybn.LayerNorm(4), {"normalized_shape": 5, "elementwise_affine": 0}, {"eps": 0}),
        (lambda: cybn.RMSNorm(4), {"normalized_shape": 5}, {"eps": -1}),
        (lambda: cybn.InstanceNorm1d(4), {"num_features": 5, "affine": True}, {"eps": -1}),
    ],
)
def test_settings_of_the_family(make, fixed, free):
    layer = make()
    before = repr(layer)
    for name, value in fixed.items():
        with pytest.raises(AttributeError, match=f"{name} is .*, and fixed when a layer is made"):
            setattr(layer, name, value)
    for name, value in free.items():
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            setattr(layer, name, value)
    assert repr(layer) == before
    layer.eps = 0.5
    assert "eps=0.5" in repr(layer)


# ---- copies ------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies_share_nothing(how, name, rng):
    kind = KINDS[name]
    layer = trained(kind, rng)
    before, twin = snapshot(layer), how(layer)
    assert snapshot(twin) == before
    kind.forward(twin, kind.data(rng)[0])
    twin.backward(kind.data(rng)[0])
    for array in twin.parameters() + twin.gradients():
        array += 1
    twin.eval()
    if hasattr(twin, "freeze"):
        twin.freeze()
    assert snapshot(layer) == before


# ---- changes between forward and backward ------------------------------------------------


def parameters_that_matter(layer):
    names = ["gamma"] if layer.gamma is not None else []
    return names + ["beta"] * (getattr(layer, "activation", None) is not None)


@every_kind
def test_backward_sees_what_has_changed(name, rng):
    kind = KINDS[name]
    for what in ["x", *parameters_that_matter(kind.make())]:
        layer = trained(kind, rng)
        x, dy = kind.data(rng, 2)
        kind.forward(layer, x)
        array = x if what == "x" else getattr(layer, what)
        kept = array.copy()
        array *= 2
        array += 1
        before = snapshot(layer)
        with pytest.raises(RuntimeError, match=f"^{what} has changed since the last forward"):
            layer.backward(dy)
        assert snapshot(layer) == before
        array[...] = kept
        layer.backward(dy)  # the old values are back


def test_both_are_named(rng):
    x = rng.standard_normal((4, 3))
    bn = cybn.BatchNorm(3)
    bn(x)
    x *= 2
    bn.gamma *= 2
    with pytest.raises(RuntimeError, match=r"^x and gamma have changed since"):
        bn.backward(x)


def test_nan_is_no_change(rng):
    x = np.full((4, 3), np.nan, np.float32)
    bn = cybn.BatchNorm(3)
    bn.gamma[0] = np.nan
    bn(x)
    assert np.isnan(bn.backward(x)).all()


def test_a_large_input_and_a_residual(rng):
    x, r = rng.standard_normal((2, 30, 3, 40, 40)).astype(np.float32)
    bn = cybn.BatchNorm(3, activation="relu")
    for array in (x, r):
        bn(x, residual=r)
        array *= 2
        with pytest.raises(RuntimeError, match="has changed since"):
            bn.backward(x)
    bn.activation = None
    bn(x, residual=r)
    r *= 2  # the gradients do not depend on it
    bn.beta += 1
    bn.backward(x)


def test_backward_is_that_of_the_settings_of_its_forward(rng):
    x, dy = rng.standard_normal((2, 4, 4, 4))
    for first, then in itertools.permutations(
        [
            {"axis": 1, "eps": 1e-5, "activation": None, "slope": 0.01},
            {"axis": -1, "eps": 0.5, "activation": "leaky_relu", "slope": 0.2},
            {"axis": 0, "eps": 0.1, "activation": "tanh", "slope": 0.3},
        ],
        2,
    ):
        bn, same = (cybn.BatchNorm(4, dtype=float, **first) for _ in range(2))
        bn(x), same(x)
        for name, value in then.items():
            setattr(bn, name, value)
        np.testing.assert_array_equal(bn.backward(dy), same.backward(dy))
    gn, same = cybn.GroupNorm(2, 4), cybn.GroupNorm(2, 4)
    gn(x), same(x)
    gn.eps = 0.5
    np.testing.assert_array_equal(gn.backward(dy), same.backward(dy))


def test_a_mask_may_be_used_again(rng):
    x, dy = rng.standard_normal((2, 4, 3, 5))
    lengths = np.array([5, 4, 3, 2])
    bn, same = cybn.BatchNorm(3), cybn.BatchNorm(3)
    bn(x, lengths=lengths), same(x, lengths=lengths.copy())
    lengths[:] = 1
    np.testing.assert_array_equal(bn.backward(dy), same.backward(dy))


# ---- reading the state -------------------------------------------------------------------


@pytest.mark.parametrize("make", [cybn.BatchNorm, cybn.InstanceNorm1d])
def test_scale_and_shift_know_every_switch(make, rng, capsys):
    x = rng.standard_normal((6, 3, 5))
    for use, training in itertools.product([None, True, False], [True, False]):
        layer = make(3, affine=True, track_running_stats=True, dtype=float).train(training)
        layer(x)
        layer.use_batch_statistics = use
        if use:
            with pytest.raises(ValueError, match=r"use_batch_statistics is True: .* each batch"):
                layer.scale_shift()
        else:
            scale, shift = layer.scale_shift()
            want = x * scale[:, None] + shift[:, None]
            np.testing.assert_allclose(layer.eval()(x), want, rtol=1e-12, atol=1e-12)
        layer.train(training).explain()
        by = (
            "training so far"
            if use is False or (use is None and not training)
            else "(the batch|each)"
        )
        assert re.search(by, capsys.readouterr().out)


def test_repr_shows_the_switches():
    bn = cybn.BatchNorm(3)
    plain = repr(bn)
    assert repr(bn.freeze()) == (
        f"{plain} with update_statistics=False, use_batch_statistics=False, train_affine=False"
    )
    bn.unfreeze().use_batch_statistics = True
    assert repr(bn) == f"{plain} with use_batch_statistics=True"
    assert repr(bn.unfreeze()) == plain


def test_eps_of_0_and_a_variance_just_below_0(rng):
    """Other libraries may produce such values; inference accepts both."""
    x = rng.standard_normal((6, 3))
    bn = cybn.BatchNorm(3, eps=0, dtype=float).eval()
    bn.running_var = [1.0, 2.0, 3.0]
    want = x / np.sqrt([1, 2, 3])
    np.testing.assert_allclose(bn(x), want, rtol=1e-12)
    with pytest.raises(ValueError, match="eps is 0"):
        bn.train()(x)
    with pytest.raises(ValueError, match=r"running_var is -1e-09 in channel 0"):
        bn.running_var = [-1e-9, 1, 1]
    bn = cybn.BatchNorm(3, dtype=float).eval()
    bn.load_state_dict(bn.state_dict() | {"running_var": [-1e-9, 0.0, 1.0]})
    want = x / np.sqrt([1e-5 - 1e-9, 1e-5, 1 + 1e-5])
    np.testing.assert_allclose(bn(x), want, rtol=1e-12)
    assert np.isfinite(bn.scale_shift()).all()
    assert np.isfinite(bn.train()(x)).all()
    assert (bn.running_var > 0).all()
    for options in ({"renorm": cybn.Renorm()}, {"virtual_batch_size": 2}):
        with pytest.raises(ValueError, match="eps is 0"):
            cybn.BatchNorm(3, eps=0, **options)(x)


# ---- states of other libraries -----------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "library"),
    [
        (("weight", "bias", "running_mean", "running_var", "num_batches_tracked"), "torch"),
        (("bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"), "torch"),
        (("gamma:0", "beta:0", "moving_mean:0", "moving_variance:0"), "keras"),
        (("scale", "bias", "mean", "var"), "flax"),
        (("batch_stats", "params"), "flax"),
    ],
)
def test_a_hint_where_keys_are_those_of_another_library(keys, library):
    with pytest.raises(ValueError, match=rf"cybn\.interop\.from_{library}\(state, prefix\)"):
        cybn.BatchNorm(3).load_state_dict(dict.fromkeys(keys, np.ones(3)))


@pytest.mark.parametrize("prefix", ["net.bn1.", "net/bn1/"])
@every_kind
def test_a_hint_where_keys_have_a_prefix(name, prefix):
    layer = KINDS[name].make()
    state = {prefix + key: value for key, value in layer.state_dict().items()}
    if not state:
        return
    with pytest.raises(ValueError, match="takes the prefix off") as error:
        layer.load_state_dict(state)
    advice = str(error.value).partition("within a model: ")[2].removesuffix(" takes the prefix off")
    layer.load_state_dict(eval(advice, {"state": state}))


@every_kind
def test_not_strict(name, rng):
    layer = KINDS[name].make()
    state = layer.state_dict()
    given = {k: v for i, (k, v) in enumerate(state.items()) if i % 2} | {"more": 1}
    given = {k: v + 1 for k, v in given.items()}
    keys = layer.load_state_dict(given, strict=False)
    assert keys.unexpected_keys == ["more"]
    assert keys.missing_keys == sorted(set(state) - set(given))
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, given.get(key, state[key]))
    assert layer.load_state_dict(state) == ([], [])
    with pytest.raises(ValueError, match=r"gamma has shape|unexpected"):
        layer.load_state_dict({"gamma": np.ones(9)}, strict=layer.gamma is None)


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (cybn.BatchNorm2d(5), (2, 7, 8, 5), -1),
        (cybn.BatchNorm1d(5), (2, 7, 5), -1),
        (cybn.BatchNorm2d(5, axis=-1), (2, 5, 7, 8), 1),
        (cybn.InstanceNorm2d(5), (2, 7, 8, 5), -1),
        (cybn.GroupNorm(1, 5), (2, 7, 8, 5), -1),
    ],
)
def test_a_hint_where_the_channels_come_elsewhere(layer, shape, axis):
    with pytest.raises(ValueError, match=rf"make the layer with axis={axis}$"):
        layer(np.zeros(shape, np.float32))


def test_a_subclass_with_a_forward_of_its_own_is_called_by_it():
    class Doubled(cybn.BatchNorm):
        def forward(self, x, **options):
            return 2 * super().forward(x, **options)

    x = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(Doubled(2)(x), 2 * cybn.BatchNorm(2)(x))
