"""float16 and bfloat16 arrays: float32 arithmetic, rounded once at the end."""

import numpy as np
import pytest
from cases import FAMILIES, lay, same_bits

import cybn
from cybn import _runtime

ml_dtypes = pytest.importorskip("ml_dtypes")
HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def words(array):
    return array.view(np.uint16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_word_is_widened_and_narrowed_right(dtype, level):
    """Scale 1 and shift -0.0 keep all of the 65,536 words; only a NaN may become quiet."""
    x = np.arange(2**16, dtype=np.uint16).view(dtype)[None, None]
    y = cybn.batch_norm_inference(x, np.zeros(1), np.ones(1), None, -np.zeros(1), eps=0)
    with np.errstate(invalid="ignore"):
        nan = np.isnan(x.astype(np.float32))
    assert (np.isnan(y.astype(np.float32)) == nan).all()
    assert (words(y)[~nan] == words(x)[~nan]).all()


def test_one_nan_at_every_level(level):
    """Every float16 NaN becomes the quiet one with the same sign."""
    x = np.arange(2**16, dtype=np.uint16).view(np.float16)
    x = x[np.isnan(x)][None, None]
    gamma = np.ones(1, np.float32)
    y = cybn.batch_norm_inference(x, np.zeros(1), np.ones(1), gamma, eps=0)
    assert (words(y) == (words(x) & 0x8000 | 0x7E00)).all()
    residual = np.zeros_like(x)  # another path of the kernel
    y = cybn.batch_norm_inference(x, np.zeros(1), np.ones(1), gamma, residual=residual, eps=0)
    assert (words(y) == (words(x) & 0x8000 | 0x7E00)).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_to_nearest_even(rng, dtype, level):
    """Products of two half values contain every kind of tie, subnormals and overflow."""
    x = rng.integers(0, 2**16, 200_000).astype(np.uint16).view(dtype)[None, None]
    with np.errstate(invalid="ignore"):  # signalling NaNs warn on some CPUs
        x = x[np.isfinite(x.astype(np.float32))][None, None]
    for factor in (0.75, 1.5, 2.0**-9, 1.0009765625, 2.0**9, 3.0):
        y = cybn.batch_norm_inference(x, np.zeros(1), np.ones(1), [factor], eps=0)
        with np.errstate(over="ignore"):
            wanted = (x.astype(np.float32) * np.float32(factor)).astype(dtype)
        # -0.0 + 0 is 0.0, so zeros are compared without their sign
        assert (words(y) == words(wanted))[wanted != 0].all()
        assert (y[wanted == 0] == 0).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", FAMILIES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_equals_float32_rounded(rng, dtype, axis, shape, activation):
    """All operations give the bits of float32 on the converted values, rounded once."""
    c = shape[1]
    x, dy, r = (lay(3 * rng.standard_normal(shape) + 1, axis).astype(dtype) for _ in range(3))
    gamma, beta = rng.standard_normal((2, c)).astype(np.float32)
    wide = [a.astype(np.float32) for a in (x, dy, r)]
    act = {"axis": axis, "activation": activation}
    for i, residual in enumerate((None, r)):
        y, m = cybn.batch_norm(x, gamma, beta, residual=residual, **act)
        y32, m32 = cybn.batch_norm(wide[0], gamma, beta, residual=[None, wide[2]][i], **act)
        assert m == m32
        assert y.dtype == dtype
        assert same_bits(y, y32.astype(dtype))
        got = cybn.batch_norm_backward(
            dy, x, m, gamma, beta=beta, residual=residual, num_threads=2, **act
        )
        wanted = cybn.batch_norm_backward(
            wide[1], wide[0], m, gamma, beta=beta, residual=[None, wide[2]][i], **act
        )
        if residual is None:
            assert same_bits(got[0], wanted[0].astype(dtype))
        else:  # dx is computed from dresidual, which is rounded to the half type
            assert same_bits(got[3], wanted[3].astype(dtype))
            eps = float(ml_dtypes.finfo(dtype).eps)
            size = np.abs(wanted[0]).max()
            assert (np.abs(got[0].astype(np.float32) - wanted[0]) <= 2 * eps * size).all()
        assert same_bits(got[1], wanted[1])
        assert same_bits(got[2], wanted[2])
        assert got[1].dtype == np.float32


@pytest.mark.row(17, 23)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("s", [*range(1, 36), 511, 512, 513, 1023, 1025, 1057])
def test_odd_sizes(rng, dtype, s, level):
    """Results are right for every rest after pairs of vectors, in place and unaligned."""
    for n, c in ((1, 1), (2, 5), (37, 3), (71, 2), (6, 33)):
        if n * s == 1:
            continue
        x = np.empty(n * c * s + 1, dtype)[1:].reshape(n, c, s)
        x[...] = 2 * rng.standard_normal(x.shape) - 1
        gamma, beta = rng.standard_normal((2, c)).astype(np.float32)
        wide, m32 = cybn.batch_norm(x.astype(np.float32), gamma, beta, activation="relu")
        y, m = cybn.batch_norm(x, gamma, beta, activation="relu")
        assert m == m32
        assert same_bits(y, wide.astype(dtype))
        dy = rng.standard_normal(x.shape).astype(dtype)
        back = cybn.batch_norm_backward(dy, x, m, gamma)
        wide_back = cybn.batch_norm_backward(dy.astype(np.float32), x.astype(np.float32), m, gamma)
        assert same_bits(back[0], wide_back[0].astype(dtype))
        assert same_bits(back[1], wide_back[1])
        assert same_bits(back[2], wide_back[2])
        cybn.batch_norm_backward(dy, x, m, gamma, out=dy)
        assert same_bits(dy, back[0])
        cybn.batch_norm_inference(x, m.mean, m.var(), gamma, beta, activation="relu6", out=x)
        assert same_bits(x, np.minimum(wide, 6).astype(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", FAMILIES[:3], ids=str)
def test_relu6_comes_after_the_residual(rng, dtype, axis, shape):
    """Both limits apply to the sum, not to the value before the residual is added."""
    x, r = (lay(4 * rng.standard_normal(shape) + 2, axis).astype(dtype) for _ in range(2))
    gamma = np.full(shape[1], 4, np.float32)
    act = {"axis": axis, "activation": "relu6"}
    y, _ = cybn.batch_norm(x, gamma, residual=r, **act)
    x, r = x.astype(np.float32), r.astype(np.float32)
    z, _ = cybn.batch_norm(x, gamma, axis=axis)
    assert ((z < 6) & (z + r > 6)).any()
    assert same_bits(y, np.clip(z + r, 0, 6).astype(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_layouts_and_threads(rng, dtype):
    x = rng.standard_normal((6, 10, 12, 14)).astype(dtype)
    y, m = cybn.batch_norm(x)
    for other in (x.transpose(0, 3, 2, 1).copy().transpose(0, 3, 2, 1), np.asfortranarray(x)):
        z, n = cybn.batch_norm(other, num_threads=3)
        assert z.strides == other.strides
        np.testing.assert_allclose(n.mean, m.mean, rtol=0, atol=1e-7)
        assert (np.abs(z.astype("f") - y.astype("f")) <= 0.02).all()
    sliced = np.zeros((6, 10, 12, 28), dtype)
    sliced[..., ::2] = x
    assert same_bits(cybn.batch_norm(sliced[..., ::2])[0], y)
    assert same_bits(cybn.batch_norm(x, out=np.asfortranarray(x))[0].copy("C"), y)
    big = rng.standard_normal((32, 64, 56, 56), dtype=np.float32).astype(dtype)
    one = cybn.batch_norm(big, num_threads=1)
    two = cybn.batch_norm(big, num_threads=2)
    assert same_bits(one[0], two[0])
    assert one[1] == two[1]


@pytest.fixture
def set_l3(level):
    """Return a function that sets the assumed size of L3 for both kernels until the test ends."""
    kernels = "batch_norm", "layer_norm"
    modules = [_runtime.kernels_at(level, kernel) for kernel in kernels]
    yield lambda size: [module.set_caches(2**18, size) for module in modules]
    for kernel in kernels:
        _runtime.kernels_at(level, kernel)  # sets the sizes of this machine


@pytest.mark.row(23)
@pytest.mark.parametrize("dtype", [*HALVES, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("s", [1, 2, 7, 33, 127, 515, 1071])
def test_streamed(rng, dtype, s, set_l3):
    """Tails of all sizes, also of float32, are streamed to memory not aligned to a line."""
    calls = [
        lambda x, gamma, out: cybn.batch_norm(x, gamma, out=out)[0],
        lambda x, gamma, out: cybn.batch_norm(x, gamma, activation="silu", out=out)[0],
        lambda x, gamma, out: cybn.group_norm(x, gamma, num_groups=1, out=out)[0],
    ]
    x = rng.standard_normal((3, 5, s)).astype(dtype)
    gamma = rng.standard_normal(5).astype(np.float32)
    for call in calls:
        set_l3(2**40)
        y = call(x, gamma, None)
        set_l3(0)
        for off in (0, 1, 5):
            room = np.full(x.size + 40, 7, dtype)
            out = room[off:][: x.size].reshape(x.shape)
            assert same_bits(call(x, gamma, out), y)
            assert (room[:off] == 7).all()
            assert (room[off + x.size :] == 7).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_overflow_is_infinite(dtype):
    x = np.array([[1.0], [-1.0]]).astype(dtype)
    y, _ = cybn.batch_norm(x, [3e38])
    assert np.array_equal(y.astype(np.float32).ravel(), [np.inf, -np.inf]) or dtype != np.float16
    y, _ = cybn.batch_norm(x, [70000.0])
    expected = [np.inf, -np.inf] if dtype == np.float16 else [70144.0, -70144.0]
    assert np.array_equal(y.astype(np.float32).ravel(), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_layer(rng, dtype):
    x = rng.standard_normal((8, 4, 5, 5)).astype(dtype)
    bn, wide = cybn.BatchNorm2d(4, activation="relu"), cybn.BatchNorm2d(4, activation="relu")
    y = bn(x)
    assert same_bits(y, wide(x.astype(np.float32)).astype(dtype))
    assert same_bits(bn.running_mean, wide.running_mean)
    dx = bn.backward(y)
    assert dx.dtype == dtype
    assert bn.grad_gamma.dtype == np.float32
    bn.eval()
    assert bn(x).dtype == dtype


def test_the_other_half_type_is_refused(rng):
    """Both types have words of 16 bits, so only the dtype distinguishes them."""
    for one, other in (HALVES, HALVES[::-1]):
        x, wrong = (rng.standard_normal((4, 3, 5)).astype(dtype) for dtype in (one, other))
        _, m = cybn.batch_norm(x)
        for name, call in {
            "residual": lambda x=x, wrong=wrong: cybn.batch_norm(x, residual=wrong),
            "out": lambda x=x, wrong=wrong: cybn.batch_norm(x, out=wrong),
            "dy": lambda x=x, wrong=wrong, m=m: cybn.batch_norm_backward(wrong, x, m),
        }.items():
            with pytest.raises(ValueError, match=f"^{name} is {other}; it must have the dtype"):
                call()


def test_parameters_are_no_half_types():
    x = np.ones((3, 2), np.float16)
    with pytest.raises(TypeError, match="gamma is float16; it must be float32 or float64"):
        cybn.batch_norm(x, np.ones(2, np.float16))
    with pytest.raises(ValueError, match="out is float32; it must have the dtype of x, float16"):
        cybn.batch_norm(x, out=np.ones((3, 2), np.float32))
