"""Folds and the NumPy convolutions that test them, compared with PyTorch's convolutions."""

import numpy as np
import pytest
from fold_cases import MOST_EPS, random_cases, random_norm

import cybn
from cybn import folding
from cybn.folding._convolution import convolve, convolve_transposed
from cybn.folding._layouts import CONV, CONV_TRANSPOSE, LINEAR, seen

torch = pytest.importorskip("torch")

each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def input_of(case, rng):
    lengths = [(k - 1) * case.dilation + 1 + int(rng.integers(0, 5)) for k in case.weight.shape[2:]]
    return rng.standard_normal((2, case.inputs, *lengths)).astype(case.weight.dtype)


def run(case, x, weight, bias):
    """Return PyTorch's result of the linear map of a case, in the dtype of its arguments."""
    tensors = [None if a is None else torch.from_numpy(a) for a in (x, weight, bias)]
    if case.kind == "linear":
        return torch.nn.functional.linear(*tensors).numpy()
    kind = "conv_transpose" if case.transposed else "conv"
    function = getattr(torch.nn.functional, f"{kind}{case.kind[-2:]}")
    return function(*tensors, groups=case.groups, **case.geometry).numpy()


def oracle(case, x, weight):
    """Return the result in plain NumPy, in the dtype of `x`, without the bias."""
    weight = weight.astype(x.dtype)
    if case.kind == "linear":
        return convolve(x, seen(weight, LINEAR, "torch", 1))
    if case.transposed:
        kernel = seen(weight, CONV_TRANSPOSE, "torch", case.groups)
        return convolve_transposed(x, kernel, **case.geometry)
    return convolve(x, seen(weight, CONV, "torch", case.groups), **case.geometry)


def column(v, ndim):
    return v.reshape(-1, *(1,) * (ndim - 2))


@each_dtype
def test_random_layers_as_pytorch_runs_them(dtype, rng):
    """PyTorch runs the folded layers in float64, which shows the fold's own error, and in `dtype`.

    In `dtype`, PyTorch's sums add an error of at most eps / 2 of the absolute terms for each term.
    """
    alone = run_in_dtype = of_bound = apart = 0.0
    eps = np.finfo(dtype).eps
    for case in random_cases(dtype):
        x, bn = input_of(case, rng), case.bn
        w, b = case.fold(case.weight, case.bias, bn, **case.options)
        exact = oracle(case, x.astype(np.longdouble), case.weight)
        size = oracle(case, abs(x.astype(np.longdouble)), abs(case.weight))
        theirs = run(case, x.astype(float), case.weight.astype(float), None)
        apart = max(apart, worst(abs(theirs - exact), size, np.finfo(float).eps))
        scale, shift, mean = (column(np.longdouble(a), x.ndim) for a in exact_norm(bn))
        bias = 0 if case.bias is None else column(case.bias, x.ndim)
        y = (exact + bias - mean) * scale + shift
        size = (size + abs(bias) + abs(mean)) * abs(scale) + abs(shift)
        z = run(case, x, w, b)
        assert z.dtype == dtype
        own = worst(abs(z - y), size, eps)
        run_in_dtype = max(run_in_dtype, own)
        of_bound = max(of_bound, own / (MOST_EPS + case.weight.size / case.outputs / 2))
        z = run(case, *(a.astype(float) for a in (x, w, b)))
        alone = max(alone, worst(abs(z - y), size, eps))
    print(f"{np.dtype(dtype)}: folded, run by PyTorch in float64: {alone:.2f} eps")
    print(f"{np.dtype(dtype)}: folded, run by PyTorch in {np.dtype(dtype)}: {run_in_dtype:.2f} eps")
    print(f"plain NumPy in long double, PyTorch in float64: {apart:.2f} eps of float64 apart")
    assert apart <= MOST_EPS
    assert of_bound <= 1
    if dtype == np.float32:
        assert alone <= 1


def worst(error, size, eps):
    """Return the largest error in eps of `size`, which is 0 if an output only sees padding."""
    assert not error[size == 0].any()
    return float((error / np.where(size > 0, size, 1)).max()) / eps


def exact_norm(bn):
    """Return scale, beta and mean of a layer in long double, computed from its attributes."""
    rstd = 1 / np.sqrt(np.longdouble(bn.running_var) + np.longdouble(bn.eps))
    if bn.gamma is None:
        return rstd, np.zeros_like(rstd), bn.running_mean
    return rstd * bn.gamma, bn.beta, bn.running_mean


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_grouped_transposed_convolution(dims, groups, rng):
    """PyTorch's modules agree before and after, for each split of 6 x 12 channels.

    Unless groups is 1, PyTorch's own fusion raises an error or gives a weight of another shape.
    """
    kind = getattr(torch.nn, f"ConvTranspose{dims}d")
    conv = kind(6, 12, 3, stride=2, padding=1, output_padding=1, groups=groups)
    norm = getattr(torch.nn, f"BatchNorm{dims}d")(12).eval()
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean):
            value.normal_()
        norm.running_var.uniform_(0.2, 4)
    bn = cybn.BatchNorm(12, eps=norm.eps)
    bn.gamma[:], bn.beta[:] = norm.weight.detach(), norm.bias.detach()
    bn.running_mean, bn.running_var = norm.running_mean, norm.running_var
    weight, bias = conv.weight.detach(), conv.bias.detach()
    w, b = folding.fold_conv_transpose(weight, bias, bn, groups=groups)
    x = torch.from_numpy(rng.standard_normal((2, 6, *(5,) * dims), dtype=np.float32))
    with torch.no_grad():
        before = norm(conv(x))
        conv.weight[:], conv.bias[:] = torch.from_numpy(w), torch.from_numpy(b)
        after = conv(x)
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())


def test_tensors_of_pytorch_are_read(rng):
    """Tensors that require gradients are read as if detached."""
    bn = random_norm(rng, 4, np.float32)
    weight, bias = (rng.standard_normal(s, dtype=np.float32) for s in ((4, 2, 3), 4))
    tensors = [torch.from_numpy(a).requires_grad_() for a in (weight, bias)]
    for fold in (folding.fold_conv, folding.measure):
        first = () if fold is folding.fold_conv else (folding.fold_conv,)
        for mine, theirs in zip(
            fold(*first, weight, bias, bn), fold(*first, *tensors, bn), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)
    scale, shift = (torch.from_numpy(a).requires_grad_() for a in bn.scale_shift(np.float32))
    pair = folding.fold_conv(weight, bias, (scale, shift))
    np.testing.assert_array_equal(
        pair[0], folding.fold_conv(weight, bias, bn.scale_shift(np.float32))[0]
    )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("ours", [False, True])
def test_modules_of_pytorch_are_folded(ours, affine, rng):
    import cybn.torch

    conv = torch.nn.Conv2d(3, 4, 3)
    norm = torch.nn.BatchNorm2d(4, eps=1e-3, affine=affine)
    model = torch.nn.Sequential(conv, norm)
    for _ in range(3):
        model(torch.randn(8, 3, 6, 6) + 1)
    if affine:
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    if ours:
        cybn.torch.convert(model)
    model.eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        before = model(x)
        w, b = folding.fold_conv(conv.weight, conv.bias, norm)
        conv.weight[:], conv.bias[:] = torch.from_numpy(w), torch.from_numpy(b)
        after = conv(x)
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())
    assert folding.measure(folding.fold_conv, w, b, norm).worst < 1
    half = folding.fold_conv(conv.weight.bfloat16(), conv.bias.bfloat16(), norm.bfloat16())
    assert [a.dtype for a in half] == [np.float32, np.float32]


def test_modules_that_are_not_folded():
    weight = torch.ones(4, 2, 3, 3)
    with pytest.raises(ValueError, match="no running statistics"):
        folding.fold_conv(weight, None, torch.nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(TypeError, match="bn is of type Conv2d"):
        folding.fold_conv(weight, None, torch.nn.Conv2d(2, 4, 3))


def test_into_the_next_convolution_as_pytorch_runs_it():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 6, 3, groups=2))
    for _ in range(3):
        model(torch.randn(8, 4, 6, 6) * 2 + 1)
    norm, conv = model.eval()
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        before = model(x)
        w, b = folding.fold_into_next_conv(
            conv.weight, conv.bias, norm, padding=conv.padding, groups=2
        )
        conv.weight[:], conv.bias[:] = torch.from_numpy(w), torch.from_numpy(b)
        assert float((conv(x) - before).abs().max()) <= 1e-5 * float(before.abs().max())
