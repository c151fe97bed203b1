"""Gradients of the other norms, by central differences in float64, of functions and layers."""

import copy

import numpy as np
import pytest
from bounds import ULP64
from family_cases import every_case, group, instance, layer, rms

import cybn
from cybn import reference

STEP = 1e-5

F64 = {"dtype": np.float64}
LAYERS = [
    (cybn.LayerNorm(5, **F64), (3, 4, 5)),
    (cybn.LayerNorm((4, 5), **F64), (3, 4, 5)),
    (cybn.LayerNorm(7, bias=False, eps=0.1, **F64), (2, 7)),
    (cybn.LayerNorm(5, elementwise_affine=False, **F64), (3, 5)),
    (cybn.RMSNorm(5, **F64), (3, 4, 5)),
    (cybn.RMSNorm((4, 5), eps=0.1, **F64), (3, 4, 5)),
    (cybn.RMSNorm(5, elementwise_affine=False, **F64), (3, 5)),
    (cybn.GroupNorm(2, 6, **F64), (3, 6, 5)),
    (cybn.GroupNorm(3, 6, axis=-1, **F64), (2, 3, 3, 6)),
    (cybn.GroupNorm(1, 4, affine=False, **F64), (3, 4)),
    (cybn.InstanceNorm1d(3, affine=True, **F64), (2, 3, 5)),
    (cybn.InstanceNorm1d(3, affine=True, **F64), (3, 5)),
    (cybn.InstanceNorm2d(3, **F64), (2, 3, 3, 2)),
    (cybn.InstanceNorm2d(3, axis=-1, affine=True, **F64), (2, 3, 2, 3)),
    (cybn.InstanceNorm3d(2, affine=True, track_running_stats=True, **F64), (2, 2, 2, 3, 2)),
    (cybn.InstanceNorm1d(3, affine=True, track_running_stats=True, **F64).eval(), (4, 3, 5)),
]


def differences(loss, array):
    """Return the central differences of `loss` for each element of `array`."""
    found = np.empty_like(array)
    for i in np.ndindex(array.shape):
        kept = array[i]
        array[i] = kept + STEP
        above = loss()
        array[i] = kept - STEP
        found[i] = (above - loss()) / (2 * STEP)
        array[i] = kept
    return found


@pytest.mark.row(11)
@pytest.mark.parametrize(
    ("norm", "shape"), LAYERS, ids=[f"{norm!r}-{shape}".replace(" ", "") for norm, shape in LAYERS]
)
def test_layers_by_central_differences(norm, shape, rng):
    norm, x, dy = copy.deepcopy(norm), rng.standard_normal(shape), rng.standard_normal(shape)
    for parameter in norm.parameters():
        parameter[...] = rng.uniform(0.5, 2, parameter.shape)
    if getattr(norm, "track_running_stats", False):
        norm.running_mean, norm.running_var = (
            rng.standard_normal(shape[1]),
            np.arange(1.0, 4)[: shape[1]],
        )
    norm(x)
    found = [norm.backward(dy), *norm.gradients()]
    for got, array in zip(found, [x, *norm.parameters()], strict=True):
        expected = differences(lambda: float((norm(x) * dy).sum()), array)
        assert np.allclose(got, expected, rtol=1e-3, atol=1e-5)


def f(case, weights, x, gamma, beta):
    y, _ = case.forward(x, gamma, beta)
    return float((y * weights).sum())


@pytest.mark.row(11)
@pytest.mark.parametrize(
    "case",
    [
        layer(3, 5),
        layer(2, 3, 4, axis=-2),
        rms(3, 5),
        group(2, 3, 4, 3),
        group(1, 2, 3, 3),
        group(2, 2, 3, 4, axis=-1),
        instance(2, 3, 4),
        instance(2, 3, 2, axis=-1),
        instance(1, 1, 520),
    ],
    ids=str,
)
def test_functions_by_central_differences(case, rng):
    x, dy, gamma, beta = case.data(rng, np.float64)
    got = case.everything(x, dy, gamma, beta)
    pairs = {"dx": x, "dgamma": gamma} | ({"dbeta": beta} if case.centred else {})
    for name, array in pairs.items():
        expected = differences(lambda: f(case, dy, x, gamma, beta), array)
        assert np.allclose(got[name], expected, rtol=1e-3, atol=1e-5), name


@pytest.mark.row(12)
@every_case
def test_the_input_gradient_has_no_mean_and_hardly_any_xhat(case, rng):
    """The sums over each row are those of equations (57) and (58)."""
    x, dy, gamma, beta = case.data(rng, np.float64)
    got = case.everything(x, dy, gamma, beta)
    dx, dz = case.rows(got["dx"]), case.rows(dy) * case.along(gamma)
    rows = case.rows(x)
    mean = rows.mean(2, keepdims=True) if case.centred else 0
    power = ((rows - mean) ** 2).mean(2, keepdims=True)
    eps = 1e-5 if case.centred else np.finfo(np.float64).eps
    r = 1 / np.sqrt(power + eps)
    xhat = (rows - mean) * r
    size = rows.shape[2] * ULP64 * 100 * r * (1 + np.abs(dz).mean(2, keepdims=True))
    if case.centred:
        assert (np.abs(dx.sum(2, keepdims=True)) <= size).all()
    exact = r * (dz * xhat).sum(2, keepdims=True) * eps / (power + eps)
    assert (np.abs((dx * xhat).sum(2, keepdims=True) - exact) <= size).all()


@every_case
def test_the_twin_agrees(case, rng):
    """The reference and the kernels agree in float64."""
    x, dy, gamma, beta = case.data(rng, np.float64)
    got, expected = (case.everything(x, dy, gamma, beta, module=m) for m in (cybn, reference))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape
        assert np.allclose(got[name], value, rtol=1e-9, atol=1e-9), name
