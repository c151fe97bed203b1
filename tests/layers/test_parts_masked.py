"""Ghost batches and renormalization with a mask, weights or lengths."""

import numpy as np
import pytest

import cybn
from cybn._dispatch import Positions, cut

C = 3
MASK = np.array(
    [[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]], bool
)
CHOSEN = {
    "mask": {"mask": MASK},
    "lengths": {"lengths": [4, 2, 0, 1, 3, 4]},
    "weights": {"weights": MASK * np.linspace(0.5, 2, 24).reshape(6, 4)},
    "both": {"mask": MASK, "lengths": [4, 4, 4, 4, 2, 4]},
}
each_choice = pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)


@pytest.fixture
def data(rng):
    return rng.standard_normal((2, 6, C, 4)) * np.arange(1, C + 1)[:, None] + 2


def layer(rng, **options):
    bn = cybn.BatchNorm(C, dtype=float, **options)
    bn.gamma, bn.beta = rng.uniform(0.5, 2, C), rng.standard_normal(C)
    bn.running_mean, bn.running_var = rng.standard_normal(C), rng.uniform(0.5, 2, C)
    return bn


def shares_of(chosen):
    """Return the weight of each position."""
    shares = np.broadcast_to(np.asarray(chosen.get("weights", 1.0)), (6, 4)) * np.ones((6, 4))
    shares = shares * chosen.get("mask", True)
    if "lengths" in chosen:
        shares = shares * (np.arange(4) < np.reshape(chosen["lengths"], (6, 1)))
    return shares


def parts_of(shares, size):
    """Return the samples of each part, by the rule in the documentation."""
    parts, part = [], []
    for i in range(0, 6, size):
        part += range(i, min(i + size, 6))
        if np.count_nonzero(shares[part]) >= 2:
            parts.append(part)
            part = []
    if part:
        parts[-1] += part
    return parts


@each_choice
@pytest.mark.parametrize("size", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("masked", ["normalize", "zero"])
def test_each_part_is_a_masked_batch(chosen, size, masked, data, rng):
    x, dy = data
    bn = layer(rng, virtual_batch_size=size)
    shares = shares_of(chosen)
    start = bn.snapshot()
    # dy is 0 at masked positions, where dx of the layer and of the function may differ
    dy = dy * (shares != 0)[:, None]
    y, dx = bn(x, masked=masked, **chosen), bn.backward(dy)
    wanted_gamma, wanted_beta = 0, 0
    for part in parts_of(shares, size):
        k = {"weights": shares[part]}
        want, m = cybn.batch_norm(x[part], bn.gamma, bn.beta, masked=masked, **k)
        np.testing.assert_allclose(y[part], want, rtol=1e-12, atol=1e-12)
        want, dgamma, dbeta = cybn.batch_norm_backward(dy[part], x[part], m, bn.gamma, **k)
        np.testing.assert_allclose(dx[part], want, rtol=1e-9, atol=1e-9)
        wanted_gamma, wanted_beta = wanted_gamma + dgamma, wanted_beta + dbeta
    np.testing.assert_allclose(bn.grad_gamma, wanted_gamma, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(bn.grad_beta, wanted_beta, rtol=1e-9, atol=1e-9)
    whole = layer(rng)
    whole.restore(start)
    whole(x, **chosen)
    np.testing.assert_allclose(bn.running_mean, whole.running_mean, rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, whole.running_var, rtol=1e-12)


@each_choice
def test_renorm_without_room_is_plain(chosen, data, rng):
    x, dy = data
    plain = layer(rng)
    renorm = layer(rng, renorm=cybn.Renorm(1, 0))
    renorm.restore(plain.snapshot())
    for bn in (plain, renorm):
        bn.results = [bn(x, **chosen), bn.backward(dy), *bn.gradients(), bn.running_var]
    for got, want in zip(renorm.results, plain.results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@each_choice
def test_renorm_is_the_formula(chosen, data, rng):
    x, _ = data
    bn = layer(rng, renorm=cybn.Renorm(1.2, 0.3))
    m = cybn.moments(x, **chosen)
    std, running_std = np.sqrt(m.var() + bn.eps), np.sqrt(bn.running_var + bn.eps)
    r = np.clip(std / running_std, 1 / 1.2, 1.2)
    d = np.clip((m.mean - bn.running_mean) / running_std, -0.3, 0.3)
    mean, std, r, d, gamma, beta = (v[:, None] for v in (m.mean, std, r, d, bn.gamma, bn.beta))
    want = ((x - mean) / std * r + d) * gamma + beta
    np.testing.assert_allclose(bn(x, **chosen), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"virtual_batch_size": 2}, {"renorm": cybn.Renorm()}], ids=str)
def test_too_few_values_and_bad_masks_change_nothing(options, data, rng):
    x, _ = data
    bn, out = layer(rng, **options), np.full_like(x, 7.0)
    state = bn.state_dict()
    one = np.zeros((6, 4), bool)
    one[3, 1] = True
    for chosen, error, text in [
        ({"mask": one}, ValueError, "leave 1 of 24 values"),
        ({"weights": one * 5.0}, ValueError, "leave 1 of 24 values"),
        ({"lengths": [0] * 6}, ValueError, "leave 0 of 24 values"),
        ({"mask": one.astype(int)}, TypeError, "mask is int64"),
        ({"weights": one * -1.0}, ValueError, "weights"),
        ({"lengths": [9] * 6}, ValueError, "lengths"),
        ({"lengths": [4] * 6, "masked": "no"}, ValueError, "masked is 'no'"),
    ]:
        with pytest.raises(error, match=text):
            bn(x, out=out, **chosen)
    assert (out == 7).all()
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, state[name])


def test_an_all_true_mask_is_none(data, rng):
    x, _ = data
    one, two = (layer(np.random.default_rng(1), virtual_batch_size=2) for _ in range(2))
    np.testing.assert_array_equal(one(x), two(x, lengths=[4] * 6))


@pytest.mark.parametrize(
    ("count", "size", "parts"),
    [
        ([1, 1, 1, 1, 1], 1, [(0, 2), (2, 5)]),
        ([2, 0, 0, 2], 1, [(0, 1), (1, 4)]),
        ([0, 0, 0, 2], 1, [(0, 4)]),
        ([2, 2, 0, 1], 2, [(0, 4)]),
    ],
)
def test_parts_join_until_two_values_count(count, size, parts):
    shares = np.arange(2) < np.reshape(count, (-1, 1, 1))
    positions = Positions(shares, sum(count), sum(count))
    found = cut((len(count), 3, 2), 1, size, positions)
    assert [(i[0].start, i[0].stop) for i in found] == parts
