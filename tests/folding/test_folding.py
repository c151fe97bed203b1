"""Folds are right to a few roundings for random layers in every layout, or raise an error.

They are compared with a convolution in plain NumPy and batch normalization by its definition, both
in a wider type. `test_folding_peers.py` compares that convolution with PyTorch's, and
`test_folding_layouts.py` compares each layout with its library.
"""

from collections import defaultdict

import numpy as np
import pytest
from fold_cases import CASES, KINDS, MOST_EPS, random_case, random_cases, random_norm

import cybn
from cybn import folding
from cybn.folding._convolution import convolve

each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@each_dtype
def test_random_layers(dtype):
    worst = defaultdict(float)
    for case in random_cases(dtype):
        name = f"{case.kind}, groups" if case.groups > 1 else case.kind
        worst[name] = max(worst[name], case.measure().worst)
    for name, eps in sorted(worst.items()):
        print(f"{np.dtype(dtype)} {name:22} {eps:.2f} eps")
    print(f"{np.dtype(dtype)} worst of {CASES}: {max(worst.values()):.2f} eps")
    assert len(worst) == 2 * len(KINDS) - 1
    assert max(worst.values()) <= (1 if dtype == np.float32 else MOST_EPS)


@each_dtype
def test_exact_powers_of_two(dtype):
    """Scales that are powers of two are folded without any rounding."""
    bn = cybn.BatchNorm(4, eps=1.0, dtype=dtype)
    bn.running_var, bn.running_mean = [3.0, 15.0, 63.0, 0.0], [1.0, -2.0, 4.0, 8.0]
    bn.gamma[:], bn.beta[:] = [2.0, 1.0, -4.0, 1.0], [0.5, 0.25, 0.0, -1.0]
    weight = np.arange(24, dtype=dtype).reshape(4, 2, 3)
    w, b = folding.fold_conv(weight, np.array([1, 2, 3, 4], dtype), bn, groups=2)
    scale = np.array([1, 0.25, -0.5, 1])
    np.testing.assert_array_equal(w, weight * scale[:, None, None])
    np.testing.assert_array_equal(b, [0.5, 1.25, 0.5, -5.0])
    assert w.dtype == b.dtype == dtype


def test_transposed_groups_by_hand():
    """Inputs 0, 1 feed outputs 0, 1; inputs 2, 3 feed outputs 2, 3: column 0 is output 0 or 2."""
    weight = np.ones((4, 2, 1), np.float32)
    scale, shift = np.array([1.0, 2.0, 3.0, 4.0]), np.zeros(4)
    w, _ = folding.fold_conv_transpose(weight, None, (scale, shift), groups=2)
    np.testing.assert_array_equal(w[..., 0], [[1, 2], [1, 2], [3, 4], [3, 4]])


def move(weight, layout, transposed=False):
    """Convert a weight without groups from PyTorch's layout to another one."""
    if layout in ("torch", "onnx"):
        return weight
    weight = weight.swapaxes(0, 1) if transposed else weight  # (out, in, *taps)
    ends = (-2, -1) if layout == "keras" and transposed else (-1, -2)
    return np.moveaxis(weight, (0, 1), ends)


@pytest.mark.parametrize("layout", ["torch", "onnx", "keras", "flax"])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_differ_by_a_transposition(kind, layout, rng):
    case = random_case(rng, KINDS.index(kind), np.float32)
    while case.groups > 1:
        case = random_case(rng, KINDS.index(kind), np.float32)
    w, b = case.fold(case.weight, case.bias, case.bn)
    moved = move(case.weight, layout, case.transposed)
    v, c = case.fold(moved, case.bias, case.bn, layout=layout)
    np.testing.assert_array_equal(v, move(w, layout, case.transposed))
    np.testing.assert_array_equal(c, b)
    assert folding.measure(case.fold, moved, case.bias, case.bn, layout=layout).worst <= 1


def test_depthwise_is_one_group_a_channel(rng):
    channels, multiplier = 5, 3
    bn = random_norm(rng, channels * multiplier, np.float32)
    depthwise = rng.standard_normal((3, 2, channels, multiplier), dtype=np.float32)
    plain = depthwise.transpose(2, 3, 0, 1).reshape(channels * multiplier, 1, 3, 2)
    w, b = folding.fold_conv(depthwise, None, bn, layout="keras-depthwise")
    v, c = folding.fold_conv(plain, None, bn, groups=channels)
    np.testing.assert_array_equal(w.transpose(2, 3, 0, 1).reshape(plain.shape), v)
    np.testing.assert_array_equal(b, c)
    options = {"layout": "keras-depthwise"}
    assert folding.measure(folding.fold_conv, depthwise, None, bn, **options).worst <= 1


@each_dtype
@pytest.mark.parametrize("flatten", ["channels-first", "channels-last", None])
@pytest.mark.parametrize("layout", ["torch", "onnx", "onnx-matmul", "keras", "flax"])
def test_into_the_next_linear_layer(layout, flatten, dtype, rng):
    c, s, outputs = 6, 1 if flatten is None else 4, 9
    bn = random_norm(rng, c, dtype)
    x = rng.standard_normal((8, c, s)).astype(dtype)
    weight = rng.standard_normal((outputs, c * s)).astype(dtype)
    bias = rng.standard_normal(outputs).astype(dtype)
    if layout not in ("torch", "onnx"):
        weight = np.ascontiguousarray(weight.T)
    w, b = folding.fold_into_next_linear(weight, bias, bn, layout=layout, flatten=flatten)
    assert w.shape == weight.shape
    assert w.dtype == b.dtype == dtype

    def run(x, w, b):
        flat = (x.swapaxes(1, 2) if flatten == "channels-last" else x).reshape(len(x), -1)
        return flat @ (w.T if layout in ("torch", "onnx") else w) + b

    before, after = run(bn.eval()(x), weight, bias), run(x, w, b)
    scale, shift = (a[:, np.newaxis] for a in bn.scale_shift())
    size = run(abs(x * scale) + abs(shift), abs(weight), abs(bias))
    assert (abs(after - before) / size).max() <= c * s * np.finfo(dtype).eps
    report = folding.measure(
        folding.fold_into_next_linear, weight, bias, bn, layout=layout, flatten=flatten
    )
    assert report.worst <= MOST_EPS
    assert report.outputs == folding._measure.BATCH * outputs


def test_measure_finds_a_wrong_fold(rng):
    """Errors of a wrong axis or a forgotten bias are far larger than those of rounding."""
    bn = random_norm(rng, 4, np.float32)
    weight = rng.standard_normal((4, 2, 3), dtype=np.float32)
    scale, shift = bn.scale_shift()
    by_column = weight * np.tile(scale, 2).reshape(4, 2, 1), shift
    no_shift = folding.fold_conv_transpose(weight, None, bn, groups=2)[0], 0 * shift
    for wrong in (by_column, no_shift):
        report = folding.measure(
            folding.fold_conv_transpose, weight, None, bn, groups=2, folded=wrong
        )
        assert report.worst > 1000
    assert folding.measure(folding.fold_conv_transpose, weight, None, bn, groups=2).worst < 1


def test_the_report_is_a_sentence(rng):
    bn, weight = random_norm(rng, 4, np.float32), np.ones((4, 2), np.float32)
    report = folding.measure(folding.fold_linear, weight, None, bn)
    text = str(report)
    assert f"{report.worst:.2f} eps" in text
    assert f"{report.error:.2g}" in text
    assert "8 outputs, float32" in text
    assert report == folding.measure(folding.fold_linear, weight, None, bn)
    assert report != folding.measure(folding.fold_linear, weight, None, bn, seed=1)


def test_inputs_are_left_alone_and_results_are_new(rng):
    weight = rng.standard_normal((4, 2, 3), dtype=np.float32)
    bias, bn = np.ones(4, np.float32), random_norm(rng, 4, np.float32)
    weight.flags.writeable = bias.flags.writeable = False
    state = {name: value.tobytes() for name, value in bn.state_dict().items()}
    for fold in (folding.fold_conv, folding.fold_conv_transpose):
        w, b = fold(weight, bias, bn, groups=2)
        assert w.flags.writeable
        assert b.flags.writeable
        assert not np.shares_memory(w, weight)
    assert state == {name: value.tobytes() for name, value in bn.state_dict().items()}


@pytest.mark.parametrize("order", ["F", "strided", "big-endian"])
def test_any_memory(order, rng):
    weight = rng.standard_normal((6, 4, 3, 2))
    strange = {
        "F": np.asfortranarray(weight),
        "strided": np.repeat(weight, 2, 0)[::2],
        "big-endian": weight.astype(">f8"),
    }[order]
    bn = random_norm(rng, 6, np.float64)
    for (a, b), (c, d) in [
        (folding.fold_conv(x, None, bn, groups=3) for x in (weight, strange)),
    ]:
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)


def test_a_pair_does_what_the_layer_does(rng):
    bn = random_norm(rng, 6, np.float64)
    weight = rng.standard_normal((6, 4))
    for mine, other in zip(
        folding.fold_linear(weight, None, bn),
        folding.fold_linear(weight, None, bn.scale_shift()),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, other)
    assert folding.measure(folding.fold_linear, weight, None, bn.scale_shift()).worst <= 1


# ---- scale_shift ---------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("affine", [True, False])
def test_scale_shift(affine, dtype, rng):
    bn = random_norm(rng, 7, dtype, affine)
    x = rng.standard_normal((64, 7)).astype(dtype)
    wide = [np.longdouble(a) for a in (bn.running_mean, bn.running_var)]
    gamma, beta = (bn.gamma, bn.beta) if affine else (np.ones(7), np.zeros(7))
    exact = gamma / np.sqrt(wide[1] + np.longdouble(bn.eps))
    for given in (None, np.float32, np.float64):
        scale, shift = bn.scale_shift(given)
        assert scale.dtype == shift.dtype == (given or dtype)
        eps = np.finfo(scale.dtype).eps
        assert (abs(scale - exact) <= 2 * eps * abs(exact)).all()
        size = abs(beta) + abs(wide[0] * exact)
        assert (abs(shift - (beta - wide[0] * exact)) <= 3 * eps * size).all()
    y, size = bn.eval()(x), abs(x * exact) + abs(wide[0] * exact) + abs(beta)
    assert (abs(x * scale + shift - y) <= 4 * np.finfo(dtype).eps * size).all()


def test_scale_shift_is_new_and_leaves_the_layer_alone(rng):
    bn = random_norm(rng, 3, np.float32)
    before = {name: value.tobytes() for name, value in bn.state_dict().items()}
    for array in bn.scale_shift():
        array[:] = 9
    assert before == {name: value.tobytes() for name, value in bn.state_dict().items()}


def test_scale_shift_needs_running_statistics():
    with pytest.raises(ValueError, match="track_running_stats is False"):
        cybn.BatchNorm(3, track_running_stats=False).scale_shift()
    with pytest.raises(TypeError, match="dtype is float16; it must be float32 or float64"):
        cybn.BatchNorm(3).scale_shift(np.float16)


# ---- bad input -----------------------------------------------------------------------------

W = np.ones((4, 2, 3), np.float32)
BN = cybn.BatchNorm(4)
BAD = {
    "weight int": ((W.astype(int), None, BN), {}, TypeError, "weight is int64"),
    "activation": (
        (W, None, cybn.BatchNorm(4, activation="relu")),
        {},
        ValueError,
        r"activation 'relu', which would be lost.*bn\.scale_shift",
    ),
    "weight masked": ((np.ma.array(W), None, BN), {}, TypeError, "weight is a masked array"),
    "weight of a linear layer": ((W[..., 0], None, BN), {}, ValueError, "at least 3"),
    "weight empty": ((W[:, :0], None, BN), {}, ValueError, "must not be empty"),
    "bias too long": ((W, np.ones(5), BN), {}, ValueError, r"bias has shape \(5,\).*\(4,\)"),
    "bias a scalar": ((W, 1.0, BN), {}, ValueError, r"bias has shape \(\)"),
    "channels": ((W, None, cybn.BatchNorm(5)), {}, ValueError, "bn has 5 channels.*4 outputs"),
    "no statistics": (
        (W, None, cybn.BatchNorm(4, track_running_stats=False)),
        {},
        ValueError,
        "track_running_stats",
    ),
    "bn an array": ((W, None, np.ones(4)), {}, TypeError, r"bn is of type ndarray.*\(scale, shift"),
    "bn a list of two": ((W, None, [1, 2]), {}, TypeError, "bn is of type list"),
    "shift too short": ((W, None, (np.ones(4), np.ones(3))), {}, ValueError, r"shift has shape"),
    "scale not flat": ((W, None, (np.ones((4, 1)), np.ones(4))), {}, ValueError, "scale has shape"),
    "layout": ((W, None, BN), {"layout": "tf"}, ValueError, "layout is 'tf'.*torch, onnx, keras"),
    "groups do not divide": ((W, None, BN), {"groups": 3}, ValueError, "groups=3 does not divide"),
    "groups 0": ((W, None, BN), {"groups": 0}, ValueError, "groups is 0; it must be at least 1"),
    "groups float": ((W, None, BN), {"groups": 2.0}, TypeError, "groups is 2.0"),
    "weight NaN": ((W * np.nan, None, BN), {}, ValueError, "folded weight.*not finite"),
    "bias infinite": ((W, np.full(4, np.inf), BN), {}, ValueError, "folded bias.*not finite"),
    "too large": (
        (W * np.float32(1e30), None, (np.full(4, 1e30), np.ones(4))),
        {},
        ValueError,
        "not finite in float32",
    ),
}


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(args, options, error, message):
    for call in (folding.fold_conv, lambda *a, **k: folding.measure(folding.fold_conv, *a, **k)):
        with pytest.raises(error, match=message):
            call(*args, **options)


def test_layouts_that_have_no_groups():
    with pytest.raises(ValueError, match="no groups"):
        folding.fold_conv_transpose(W, None, cybn.BatchNorm(4), layout="keras", groups=2)
    with pytest.raises(ValueError, match="leave groups out"):
        folding.fold_conv(W, None, cybn.BatchNorm(6), layout="keras-depthwise", groups=4)
    with pytest.raises(ValueError, match="it must have 2 axes"):
        folding.fold_linear(W, None, BN)
    with pytest.raises(ValueError, match="layout is 'onnx-matmul'"):
        folding.fold_conv(W, None, BN, layout="onnx-matmul")


def test_next_linear_refuses_what_is_not_exact():
    weight = np.ones((5, 12), np.float32)
    with pytest.raises(ValueError, match="set flatten= to the order"):
        folding.fold_into_next_linear(weight, None, BN)
    with pytest.raises(ValueError, match="flatten is 'rows'"):
        folding.fold_into_next_linear(weight, None, BN, flatten="rows")
    with pytest.raises(ValueError, match="bn has 5 channels; the weight has 12 inputs"):
        folding.fold_into_next_linear(weight, None, cybn.BatchNorm(5), flatten="channels-first")
    with pytest.raises(ValueError, match=r"activation 'relu', which would.*come between"):
        folding.fold_into_next_linear(weight[:, :4], None, cybn.BatchNorm(4, activation="relu"))


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("padding", [1, 2, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_measure_leaves_outputs_after_padding(stride, padding, taps, rng):
    for fold in (folding.fold_conv, folding.fold_conv_transpose):
        weight = rng.standard_normal((4, 4, taps), dtype=np.float32)
        report = folding.measure(fold, weight, None, BN, stride=stride, padding=padding)
        assert report.outputs > 0
        assert 0 < report.worst < 1


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_measure_checks_steps(name):
    least = 0 if name == "padding" else 1
    for fold in (folding.fold_conv, folding.fold_conv_transpose):
        with pytest.raises(ValueError, match=f"{name} is {least - 1}; it must be at least {least}"):
            folding.measure(fold, W, None, BN, **{name: least - 1})
        with pytest.raises(TypeError, match=f"{name} is 1.5; it must be an int"):
            folding.measure(fold, W, None, BN, **{name: 1.5})


def test_measure_checks_what_it_is_given():
    with pytest.raises(TypeError, match="one of the five folds"):
        folding.measure(np.add, W, None, BN)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 2\); it must have shape"):
        folding.measure(folding.fold_conv, W, None, BN, folded=(W[..., 0], np.ones(4)))
    with pytest.raises(ValueError, match="bias has shape"):
        folding.measure(folding.fold_conv, W, None, BN, folded=(W, np.ones(3)))


# ---- switches, types, and the next convolution ---------------------------------------------


def test_a_layer_that_uses_the_batch_is_not_folded(rng):
    """Folding and measuring raise an error, because its inference has no fixed scale and shift."""
    bn = random_norm(rng, 4, np.float32)
    bn.use_batch_statistics = True
    for call in (folding.fold_conv, lambda *a: folding.measure(folding.fold_conv, *a)):
        with pytest.raises(ValueError, match="use_batch_statistics is True"):
            call(W, None, bn)
    for value in (None, False):
        bn.use_batch_statistics = value
        w, b = folding.fold_conv(W, None, bn.eval())
        assert folding.measure(folding.fold_conv, W, None, bn, folded=(w, b)).worst < 1


def test_the_way_out_for_an_activation(rng):
    bn = random_norm(rng, 4, np.float64)
    pair = folding.fold_conv(W, None, bn)
    bn.activation = "relu"
    for mine, other in zip(
        folding.fold_conv(W, None, bn.scale_shift(np.float64)), pair, strict=True
    ):
        np.testing.assert_array_equal(mine, other)


HALF = ["float16", "bfloat16"]


def half_type(name):
    return np.dtype(getattr(pytest.importorskip("ml_dtypes"), name) if name != "float16" else name)


@pytest.mark.parametrize("name", HALF)
def test_half_types_are_rounded_once(name, rng):
    dtype, bn = half_type(name), random_norm(rng, 4, np.float64)
    bn.running_mean = rng.standard_normal(4)
    weight, bias = (rng.standard_normal(s).astype(dtype) for s in ((4, 6, 3, 3), 4))
    w, b = folding.fold_conv(weight, bias, bn)
    assert w.dtype == b.dtype == dtype
    exact = weight.astype("f8") * bn.scale_shift()[0].reshape(-1, 1, 1, 1)
    step = (
        np.spacing(abs(w)).astype("f8")
        if name == "float16"
        else abs(exact - w.astype("f8")).max() * 0 + np.exp2(np.floor(np.log2(abs(exact))) - 7)
    )
    assert (abs(w.astype("f8") - exact) <= step * 0.5).all()
    for fold in (folding.fold_conv, folding.fold_into_next_linear):
        args = (weight, bias) if fold is folding.fold_conv else (weight[:, :4, 0, 0], bias)
        assert 0 < folding.measure(fold, *args, bn).worst < 1
    with pytest.raises(ValueError, match=f"not finite in {name}"):
        folding.fold_conv(weight, bias, (np.full(4, 1e39), np.ones(4)))
    half_pair = tuple(np.asarray(a, dtype) for a in bn.scale_shift())
    wide_pair = tuple(np.asarray(a, "f4") for a in half_pair)
    np.testing.assert_array_equal(
        folding.fold_conv(weight, bias, half_pair)[0], folding.fold_conv(weight, bias, wide_pair)[0]
    )


def test_double_rounding_is_avoided():
    """The product is just above the middle of two bfloat16 values; float32 would round it down."""
    dtype = half_type("bfloat16")
    scale = np.array([1 + 2.0**-8 + 2.0**-40])
    w, _ = folding.fold_linear(np.ones((1, 1), dtype), None, (scale, np.zeros(1)))
    assert float(w[0, 0]) == 1 + 2.0**-7


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", ["torch", "keras"])
@each_dtype
def test_into_the_next_convolution(dtype, layout, groups, rng):
    bn = random_norm(rng, 8, dtype)
    weight = rng.standard_normal((12, 8 // groups, 3, 2)).astype(dtype)
    weight = weight if layout == "torch" else weight.transpose(2, 3, 1, 0)
    for bias in (None, rng.standard_normal(12).astype(dtype)):
        for stride, dilation in ((1, 1), (2, 1), (1, 3)):
            report = folding.measure(
                folding.fold_into_next_conv,
                weight,
                bias,
                bn,
                layout=layout,
                groups=groups,
                stride=stride,
                dilation=dilation,
            )
            assert 0 < report.worst < 4


@pytest.mark.parametrize("padding", [1, (0, 1), "same", "SAME", [(0, 0), (1, 1)]])
def test_the_next_convolution_must_not_pad(padding, rng):
    bn, weight = random_norm(rng, 2, np.float32), np.ones((4, 2, 3, 3), np.float32)
    with pytest.raises(ValueError, match=r"pads zeros after bn has shifted.*-shift / scale"):
        folding.fold_into_next_conv(weight, None, bn, padding=padding)
    scale, shift = bn.scale_shift()
    unshifted = folding.fold_into_next_conv(weight, None, (scale, 0 * shift), padding=padding)
    np.testing.assert_array_equal(unshifted[1], np.zeros(4))
    for valid in (0, (0, 0), "valid", "VALID"):
        w, _ = folding.fold_into_next_conv(weight, None, bn, padding=valid)
        np.testing.assert_array_equal(w, unshifted[0])
    with pytest.raises(ValueError, match="bn has 2 channels; the weight has 4 inputs"):
        folding.fold_into_next_conv(np.ones((4, 4, 1), "f4"), None, bn, padding=0)


def test_padding_before_the_norm_is_the_way_out(rng):
    """The solution that the error advises: bn turns padding of -shift / scale into zeros."""
    bn, weight = random_norm(rng, 3, np.float64).eval(), rng.standard_normal((2, 3, 3))
    scale, shift = bn.scale_shift()
    x = rng.standard_normal((2, 3, 5))
    w, b = folding.fold_into_next_conv(weight, None, bn, padding=0)
    kernels = (np.moveaxis(k[np.newaxis], 1, 2) for k in (weight, w))
    before, after = kernels
    edge = np.broadcast_to((-shift / scale).reshape(1, 3, 1), (2, 3, 1))
    z = convolve(np.concatenate([edge, x, edge], 2), after) + b.reshape(-1, 1)
    np.testing.assert_allclose(z, convolve(bn(x), before, padding=1), rtol=1e-9, atol=1e-9)
