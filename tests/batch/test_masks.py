"""Masks, weights and lengths in batch normalization: functions and layers."""

import numpy as np
import pytest
from bounds import ULP32, ULP64
from cases import AXES, DTYPES, lay, same_bits
from mask_cases import FAMILIES, KINDS, batch, gathered, selection

import cybn
from cybn import reference

pytestmark = pytest.mark.divided

ACTIVATIONS = [None, "relu", "leaky_relu", "silu"]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_family = pytest.mark.parametrize("nsc", FAMILIES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def ulp(dtype):
    return ULP32 if dtype == np.float32 else ULP64


def repeated(array, shares):
    """Return each selected value 4 * weight times; weights are multiples of 1/4."""
    return np.repeat(gathered(array, shares), (4 * shares[shares > 0]).astype(int), axis=0)


# ---- equal to the selected values -------------------------------------------------------------


@every_dtype
@every_kind
@every_family
def test_statistics_are_those_of_the_gathered_values(rng, nsc, kind, dtype, level):
    x, *_ = batch(rng, nsc, dtype)
    chosen, shares = selection(rng, nsc, kind)
    finite = cybn.moments(x, **chosen)
    x[np.broadcast_to((shares == 0)[:, np.newaxis], nsc)] = np.nan
    m = cybn.moments(x, **chosen)
    assert m == finite  # sums with a NaN are computed again, which would hide it
    assert m.count == shares.sum()
    assert isinstance(m.count, float) == ("weights" in chosen)
    rows = repeated(x, shares).astype(np.longdouble)
    np.testing.assert_allclose(m.mean, rows.mean(0).astype(float), rtol=ulp(dtype))
    np.testing.assert_allclose(m.var(), rows.var(0).astype(float), rtol=ulp(dtype))
    assert cybn.batch_norm(x, **chosen)[1] == m


@every_dtype
@pytest.mark.parametrize("kind", ["mask", "lengths"])
@every_family
def test_forward_and_backward_are_those_of_the_gathered_values(rng, nsc, kind, dtype, level):
    x, dy, _, gamma, beta = batch(rng, nsc, dtype)
    chosen, shares = selection(rng, nsc, kind)
    out = np.broadcast_to((shares == 0)[:, np.newaxis], nsc)
    x[out] = dy[out] = np.nan
    y, m = cybn.batch_norm(x, gamma, beta, masked="zero", **chosen)
    dx, dgamma, dbeta = cybn.batch_norm_backward(dy, x, m, gamma, masked="zero", **chosen)
    rows, above = gathered(x, shares), gathered(dy, shares)
    y2, m2 = cybn.batch_norm(rows, gamma, beta)
    dx2, dgamma2, dbeta2 = cybn.batch_norm_backward(above, rows, m2, gamma)
    assert m.count == m2.count
    assert not y[out].any()
    assert not dx[out].any()
    near = {"rtol": 8 * ulp(dtype), "atol": 8 * ulp(dtype)}
    np.testing.assert_allclose(gathered(y, shares), y2, **near)
    np.testing.assert_allclose(gathered(dx, shares), dx2, **near)
    long = {"rtol": 8 * ulp(dtype), "atol": 8 * ulp(dtype) * np.sqrt(m.count)}
    np.testing.assert_allclose(dgamma, dgamma2, **long)
    np.testing.assert_allclose(dbeta, dbeta2, **long)


@pytest.mark.parametrize("axis", AXES)
def test_weights_are_repeated_values(rng, axis):
    """Integer weights repeat values; the gradient of a value is the sum over its copies."""
    nsc = (9, 6, 7)
    x, dy, _, gamma, beta = batch(rng, nsc, np.float64)
    chosen, shares = selection(rng, nsc, "weights")
    chosen["weights"], shares = 4 * shares, 4 * shares
    each = shares[shares > 0].astype(int)
    rows = np.repeat(gathered(x, shares), each, axis=0)
    above = np.repeat(gathered(dy, shares) / each[:, np.newaxis], each, axis=0)
    y2, m2 = cybn.batch_norm(rows, gamma, beta)
    dx2, dgamma2, dbeta2 = cybn.batch_norm_backward(above, rows, m2, gamma)
    firsts = np.cumsum(each) - each
    x, dy = lay(x, axis), lay(dy, axis)
    y, m = cybn.batch_norm(x, gamma, beta, axis=axis, **chosen)
    dx, dgamma, dbeta = cybn.batch_norm_backward(
        dy, x, m, gamma, axis=axis, masked="zero", **chosen
    )
    y, dx = np.moveaxis(y, axis, 1), np.moveaxis(dx, axis, 1)
    near = {"rtol": 1e-12, "atol": 1e-12}
    assert m.count == m2.count
    np.testing.assert_allclose(m.var(1), m2.var(1), **near)
    np.testing.assert_allclose(gathered(y, shares), y2[firsts], **near)
    np.testing.assert_allclose(gathered(dx, shares), np.add.reduceat(dx2, firsts), **near)
    np.testing.assert_allclose(dgamma, dgamma2, **near)
    np.testing.assert_allclose(dbeta, dbeta2, **near)


@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("masked", ["normalize", "zero"])
@every_kind
@pytest.mark.parametrize("nsc", FAMILIES[:-1], ids=str)
def test_all_agree_with_the_reference(rng, nsc, kind, masked, activation, dtype):
    x, dy, residual, gamma, beta = batch(rng, nsc, dtype)
    chosen, shares = selection(rng, nsc, kind)
    if masked == "zero":  # masked values must not be read
        for array in (x, dy, residual):
            array[np.broadcast_to((shares == 0)[:, np.newaxis], nsc)] = np.nan
    near = {"rtol": 64 * ulp(dtype), "atol": 64 * ulp(dtype) * np.sqrt(max(16, shares.sum()))}
    for r in (None, residual):
        options = {"activation": activation, "residual": r, **chosen}
        y, m = cybn.batch_norm(x, gamma, beta, masked=masked, **options)
        exact, m2 = reference.batch_norm(x, gamma, beta, masked=masked, **options)
        np.testing.assert_allclose(y, exact, **near)
        fixed = m.mean, m.var()
        y = cybn.batch_norm_inference(x, *fixed, gamma, beta, masked=masked, **options)
        np.testing.assert_allclose(y, exact, **near)
        options |= {"beta": beta, "masked": masked}
        got = cybn.batch_norm_backward(dy, x, m, gamma, **options)
        exact = reference.batch_norm_backward(dy, x, m2, gamma, **options)
        assert len(got) == len(exact) == (3 if r is None else 4)
        for ours, theirs in zip(got, exact, strict=True):
            np.testing.assert_allclose(ours, theirs, **near)
        got = cybn.batch_norm_inference_backward(dy, x, *fixed, gamma, **options)
        exact = reference.batch_norm_inference_backward(dy, x, *fixed, gamma, **options)
        for ours, theirs in zip(got, exact, strict=True):
            np.testing.assert_allclose(ours, theirs, **near)


# ---- gradients --------------------------------------------------------------------------------


@pytest.mark.row(11)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("masked", ["normalize", "zero"])
@pytest.mark.parametrize("axis", AXES)
@every_kind
@pytest.mark.parametrize("nsc", [(4, 3, 5), (3, 2, 2)], ids=str)
def test_central_differences(rng, nsc, kind, axis, masked, activation):
    x, dy, residual, gamma, beta = batch(rng, nsc, np.float64)
    x, dy, residual = (lay(v, axis) for v in (x, dy, residual))
    chosen, _ = selection(rng, nsc, kind)
    options = {"axis": axis, "activation": activation, "residual": residual, **chosen}
    options["masked"] = masked

    def loss():
        return np.vdot(cybn.batch_norm(x, gamma, beta, **options)[0], dy)

    _, m = cybn.batch_norm(x, gamma, beta, **options)
    dx, dgamma, dbeta, dr = cybn.batch_norm_backward(dy, x, m, gamma, beta=beta, **options)
    step = 2.0**-17
    pairs = ((x, dx), (gamma, dgamma), (beta, dbeta), (residual, dr))
    for values, gradient in pairs:
        for i in np.ndindex(values.shape):
            kept = values[i]
            values[i] = kept + step
            above = loss()
            values[i] = kept - step
            numeric = (above - loss()) / (2 * step)
            values[i] = kept
            assert abs(gradient[i] - numeric) <= 1e-8 * (1 + abs(numeric))


# ---- equal bits -------------------------------------------------------------------------------


@every_dtype
@every_family
def test_an_all_true_mask_is_no_mask(rng, nsc, dtype):
    x, dy, _, gamma, beta = batch(rng, nsc, dtype)
    n, _, s = nsc
    y, m = cybn.batch_norm(x, gamma, beta)
    dx = cybn.batch_norm_backward(dy, x, m, gamma)
    for chosen in ({"mask": np.ones((n, s), bool)}, {"mask": True}, {"lengths": np.full(n, s)}):
        y2, m2 = cybn.batch_norm(x, gamma, beta, masked="zero", **chosen)
        assert same_bits(y, y2)
        assert m == m2
        assert isinstance(m2.count, int)
        for a, b in zip(dx, cybn.batch_norm_backward(dy, x, m2, gamma, **chosen), strict=True):
            assert same_bits(a, b)


@pytest.mark.row(23)
@every_kind
@pytest.mark.parametrize("nsc", [(64, 8, 200), (33000, 5, 1), (2, 2, 70000)], ids=str)
def test_the_same_bits_on_any_number_of_threads(rng, nsc, kind):
    x, dy, _, gamma, beta = batch(rng, nsc, np.float32)
    chosen, _ = selection(rng, nsc, kind)
    results = []
    for threads in (1, 2, 3):
        options = {"num_threads": threads, **chosen}
        y, m = cybn.batch_norm(x, gamma, beta, masked="zero", **options)
        results.append([y, m.mean, m.m2, *cybn.batch_norm_backward(dy, x, m, gamma, **options)])
    for result in results[1:]:
        assert all(map(same_bits, results[0], result))


@pytest.mark.parametrize("axis", [*AXES, pytest.param(0, id="channels-outermost")])
def test_shapes_of_a_mask(rng, axis):
    """A mask may have the channel axis or not, and any shape that broadcasts."""
    x = np.moveaxis(rng.standard_normal((4, 3, 5, 6)), 1, axis)
    mask = rng.random((4, 5, 6)) < 0.5
    y, m = cybn.batch_norm(x, axis=axis, mask=mask, masked="zero")
    y2, m2 = cybn.batch_norm(x, axis=axis, mask=np.expand_dims(mask, axis), masked="zero")
    assert same_bits(y, y2)
    assert m == m2
    assert (np.moveaxis(y, axis, 0)[:, ~mask] == 0).all()
    few = cybn.moments(x, axis=axis, mask=mask[0, 0])
    every = cybn.moments(x, axis=axis, mask=np.broadcast_to(mask[0, 0], mask.shape))
    assert few == every
    fortran = np.asfortranarray(x)
    y3, _ = cybn.batch_norm(fortran, axis=axis, mask=mask, masked="zero")
    np.testing.assert_allclose(y3, y, rtol=0, atol=1e-12)


@every_kind
@pytest.mark.parametrize("nsc", [(9, 6, 7), (40, 33, 1), (3, 2, 600)], ids=str)
def test_out_may_be_an_input(rng, nsc, kind):
    x, dy, residual, gamma, beta = batch(rng, nsc, np.float32)
    chosen, _ = selection(rng, nsc, kind)
    for masked in ("zero", "normalize"):
        options = {"masked": masked, "residual": residual, **chosen}
        y, m = cybn.batch_norm(x, gamma, beta, **options)
        for i in range(2):
            copies = [x.copy(), residual.copy()]
            options["residual"] = copies[1]
            again, _ = cybn.batch_norm(copies[0], gamma, beta, out=copies[i], **options)
            assert same_bits(y, again)
    dx, *_ = cybn.batch_norm_backward(dy, x, m, gamma, **chosen)
    for i in range(2):
        copies = [dy.copy(), x.copy()]
        assert same_bits(
            dx, cybn.batch_norm_backward(*copies, m, gamma, out=copies[i], **chosen)[0]
        )


@every_kind
@pytest.mark.parametrize("nsc", [(9, 6, 7), (40, 33, 1), (3, 2, 600)], ids=str)
def test_half_types_are_float32_inside(rng, nsc, kind):
    x, dy, _, gamma, beta = batch(rng, nsc, np.float16)
    gamma, beta = gamma.astype(np.float32), beta.astype(np.float32)
    chosen, _ = selection(rng, nsc, kind)
    options = {"activation": "silu", **chosen}
    y, m = cybn.batch_norm(x, gamma, beta, masked="zero", **options)
    wide = x.astype(np.float32), dy.astype(np.float32)
    y2, m2 = cybn.batch_norm(wide[0], gamma, beta, masked="zero", **options)
    assert same_bits(y, y2.astype(np.float16))
    assert m == m2
    dx, *_ = cybn.batch_norm_backward(dy, x, m, gamma, beta=beta, **options)
    dx2, *_ = cybn.batch_norm_backward(wide[1], wide[0], m, gamma, beta=beta, **options)
    assert same_bits(dx, dx2.astype(np.float16))


@pytest.mark.row(4)
def test_a_far_mean_is_summed_again_without_what_is_masked_out(rng):
    """Eight equal values are a bad pivot; the second sums must leave out masked values, too."""
    for nsc in [(2, 1, 3000), (3000, 40, 1), (30, 4, 100)]:
        x = 1e6 + rng.standard_normal(nsc)
        mask = rng.random((nsc[0], nsc[2])) < 0.5
        found = np.flatnonzero(mask)
        at = found[np.arange(8) * found.size // 8 + found.size // 16]
        np.moveaxis(x, 1, -1).reshape(-1, nsc[1])[at] = 0.0
        x = np.where(mask[:, np.newaxis], x, np.nan)
        np.moveaxis(x, 1, -1)[np.unravel_index(at, mask.shape)] = 0.0
        m = cybn.moments(x, mask=mask)
        rows = gathered(x, mask).astype(np.longdouble)
        np.testing.assert_allclose(m.mean, rows.mean(0).astype(float), rtol=1e-14)
        np.testing.assert_allclose(m.var(), rows.var(0).astype(float), rtol=1e-12)
        weights = np.where(mask, rng.integers(1, 4, mask.shape), 0)
        m = cybn.moments(x, weights=weights)
        rows = np.repeat(rows, weights[mask], axis=0)
        np.testing.assert_allclose(m.mean, rows.mean(0).astype(float), rtol=1e-14)
        np.testing.assert_allclose(m.var(), rows.var(0).astype(float), rtol=1e-12)


# ---- layers -----------------------------------------------------------------------------------


@every_kind
def test_layer_in_training(rng, kind):
    nsc = (9, 6, 7)
    x, dy, residual, gamma, beta = batch(rng, nsc, np.float32)
    chosen, _ = selection(rng, nsc, kind)
    bn = cybn.BatchNorm1d(6, activation="relu")
    bn.gamma[...], bn.beta[...] = gamma, beta
    options = {"activation": "relu", "residual": residual}
    y = bn(x, residual=residual, masked="zero", **chosen)
    expected, m = cybn.batch_norm(x, gamma, beta, masked="zero", **options, **chosen)
    assert same_bits(y, expected)
    np.testing.assert_allclose(bn.running_mean, 0.1 * m.mean, rtol=1e-6)
    np.testing.assert_allclose(bn.running_var, 0.9 + 0.1 * m.var(1), rtol=1e-6)
    got = bn.backward(dy)
    dx, dgamma, dbeta, dr = cybn.batch_norm_backward(
        dy, x, m, gamma, beta=beta, masked="zero", **options, **chosen
    )
    for a, b in zip((*got, bn.grad_gamma, bn.grad_beta), (dx, dr, dgamma, dbeta), strict=True):
        assert same_bits(a, b)


@every_kind
def test_layer_in_eval(rng, kind):
    nsc = (9, 6, 7)
    x, dy, *_ = batch(rng, nsc, np.float32)
    chosen, shares = selection(rng, nsc, kind)
    bn = cybn.BatchNorm(6)
    bn(x)
    bn.eval()
    plain = bn(x)
    assert same_bits(bn(x, **chosen), plain)
    y = bn(x, masked="zero", **chosen)
    counts = np.broadcast_to((shares > 0)[:, np.newaxis], nsc)
    np.testing.assert_array_equal(y, np.where(counts, plain, 0))
    got, grads = bn.backward(dy), [v.copy() for v in bn.gradients()]
    bn(x)
    expected = bn.backward(np.where(counts, dy, 0))
    np.testing.assert_array_equal(got, np.where(counts, expected, 0))
    for a, b in zip(grads, bn.gradients(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@every_kind
def test_layer_that_writes_over_its_input(rng, kind):
    nsc = (9, 6, 7)
    x, dy, *_ = batch(rng, nsc, np.float64)
    chosen, _ = selection(rng, nsc, kind)
    over = x.copy()
    kept, inplace = cybn.BatchNorm(6, dtype=np.float64), cybn.BatchNorm(6, dtype=np.float64)
    y = kept(x, masked="zero", **chosen)
    assert same_bits(inplace(over, out=over, masked="zero", **chosen), y)
    np.testing.assert_allclose(inplace.backward(dy), kept.backward(dy), rtol=1e-10, atol=1e-10)


def test_frozen_statistics_learn_from_what_counts(rng):
    x = rng.standard_normal((8, 3, 5))
    mask = rng.random((8, 5)) < 0.5
    x[np.broadcast_to(~mask[:, np.newaxis], x.shape)] = np.nan
    bn = cybn.BatchNorm(3, momentum=1.0, nan_policy="raise")
    bn.use_batch_statistics = False
    y = bn(x, mask=mask, masked="zero", out=np.empty_like(x))
    assert np.isfinite(y).all()
    np.testing.assert_allclose(bn.running_mean, gathered(x, mask).mean(0), rtol=1e-5)


# ---- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "error", "words"),
    [
        ({"mask": np.ones((4, 5))}, TypeError, "mask is float64"),
        ({"mask": np.ones((4, 6), bool)}, ValueError, r"broadcastable to \(4, 5\)"),
        ({"mask": np.ones((4, 3, 5), bool)}, ValueError, "same for all channels"),
        ({"mask": np.ones((1, 4, 1, 5), bool)}, ValueError, r"broadcastable to \(4, 5\)"),
        ({"weights": -np.ones((4, 5))}, ValueError, "not negative"),
        ({"weights": np.full((4, 5), np.nan)}, ValueError, "finite"),
        ({"weights": np.full((4, 5), 1e-60)}, ValueError, "[Ss]cale the"),
        ({"weights": np.full((4, 5), 1e60)}, ValueError, "scale them"),
        ({"lengths": [1, 2, 3]}, ValueError, r"shape \(4,\)"),
        ({"lengths": [1, 2, 3, 6]}, ValueError, "0..5"),
        ({"lengths": [1.0, 2.0, 3.0, 4.0]}, TypeError, "integers"),
        ({"lengths": [1, 0, 0, 0]}, ValueError, "leave 1 of 20 values"),
        ({"mask": False}, ValueError, "leave 0 of 20 values"),
        ({"mask": True, "masked": "none"}, ValueError, "masked is 'none'"),
        ({"masked": "none"}, ValueError, "masked is 'none'"),
    ],
)
def test_errors_change_nothing(chosen, error, words):
    x = np.ones((4, 3, 5), np.float32)
    out = np.full_like(x, 7)
    with pytest.raises(error, match=words):
        cybn.batch_norm(x, out=out, **chosen)
    bn = cybn.BatchNorm(3)
    with pytest.raises(error, match=words):
        bn(x, out=out, **chosen)
    assert bn.num_batches_tracked == 0
    assert (out == 7).all()


def test_backward_wants_the_same_mask(rng):
    x = rng.standard_normal((4, 3, 5))
    _, m = cybn.batch_norm(x, lengths=[5, 4, 3, 2])
    with pytest.raises(ValueError, match="the same mask"):
        cybn.batch_norm_backward(x, x, m)


def test_weights_too_small_for_the_unbiased_variance(rng):
    x, out = rng.standard_normal((4, 3, 5)), np.zeros((4, 3, 5))
    bn = cybn.BatchNorm(3)
    with pytest.raises(ValueError, match=r"weights sum to 0\.5"):
        bn(x, weights=np.full((4, 5), 0.025), out=out)
    assert bn.num_batches_tracked == 0
    assert not out.any()
    biased = cybn.BatchNorm(3, running_ddof=0)
    biased(x, weights=np.full((4, 5), 0.025))
    np.testing.assert_allclose(biased.running_mean, 0.1 * x.mean((0, 2)), rtol=1e-5)


def test_nothing_counts_in_eval(rng):
    x = rng.standard_normal((4, 3, 5))
    bn = cybn.BatchNorm(3).eval()
    assert not bn(x, mask=False, masked="zero").any()
    assert not bn.backward(x).any()
    assert not bn.grad_gamma.any()
