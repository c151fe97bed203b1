"""Group and instance normalization with a mask or lengths."""

import ml_dtypes
import numpy as np
import pytest
from bounds import ULP32, ULP64, column, wide, worst

import cybn
from cybn import reference

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype("f4"), np.dtype("f8"), np.dtype("f2"), BFLOAT16]
MEMBERS = {"group": {"num_groups": 2}, "instance": {}}
N, C, L = 3, 6, 10
LENGTHS = np.array([10, 4, 7])

each_member = pytest.mark.parametrize("member", MEMBERS)
each_masked = pytest.mark.parametrize("masked", ["normalize", "zero"])
each_axis = pytest.mark.parametrize("axis", [1, 2])


def forward(module, member, x, gamma=None, beta=None, **options):
    return getattr(module, f"{member}_norm")(x, gamma, beta, **MEMBERS[member], **options)


def backward(module, member, dy, x, moments, gamma=None, **options):
    function = getattr(module, f"{member}_norm_backward")
    return function(dy, x, moments, gamma, **MEMBERS[member], **options)


def case(rng, dtype=np.float32, axis=1, offset=1.0):
    shape = (N, C, L) if axis == 1 else (N, L, C)
    x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    wide = np.float64 if dtype == np.float64 else np.float32
    gamma, beta = (rng.standard_normal(C).astype(wide) + 1 for _ in range(2))
    return (x + np.asarray(offset, dtype)).astype(dtype), dy, gamma, beta


def assert_near(ours, exact, tolerance):
    error = np.abs(ours.astype(np.float64) - exact).max()
    assert error <= tolerance * (np.abs(exact).max() + 1), error


def bounds(member, x, dy, gamma, beta, options):
    """Return y, dx, dgamma and dbeta in long double, each with its bound, as in `family_cases`.

    With masked="normalize" the dy of masked values counts, with an xhat that may be large. So dx
    may be far larger than dy if few values of a row are selected. A half type is rounded once
    more.
    """
    axis, kind = options["axis"], x.dtype
    x, dy, gamma, beta = wide(x, dy, gamma, beta)
    y, m = forward(reference, member, x, gamma, beta, **options)
    exact = y, *backward(reference, member, dy, x, m, gamma, **options)
    keep = options["mask"] & (np.arange(L) < LENGTHS[:, None])
    keep = keep[:, None] if axis == 1 else keep[:, :, None]
    dy = np.where(keep | (options["masked"] == "normalize"), np.abs(dy), 0)
    groups = len(m) // N
    split = (N, groups, C // groups, L) if axis == 1 else (N, L, groups, C // groups)
    rows = (2, 3) if axis == 1 else (1, 3)

    def mean(values):  # the sum of each row divided by its selected values
        total = values.reshape(split).sum(rows, keepdims=True)
        number = (keep * np.ones_like(x)).reshape(split).sum(rows, keepdims=True)
        return np.broadcast_to(total / number, split).reshape(x.shape)

    def sum_of(values):  # the sum over samples and positions
        return values.sum((0, 3 - axis))

    centre = mean(x * keep)
    std = np.sqrt(mean((x - centre) ** 2 * keep) + 1e-5)
    offset = np.abs(centre) / std if kind == np.float64 else 0
    xhat, scale = np.abs(x - centre) / std, column(np.abs(gamma), 3, axis)
    size, dz = xhat + 1 + offset, dy * scale
    limits = (
        scale * (xhat + 1 + offset) + column(np.abs(beta), 3, axis),
        (dz + keep * (mean(dz * np.ones_like(x)) + size * mean(dz * size))) / std,
        sum_of(dy * size),
        sum_of(dy),
    )
    ulp, half = ULP64 if kind == np.float64 else ULP32, {BFLOAT16: 2.0**-8}.get(kind, 2.0**-11)
    wider = half if kind.itemsize == 2 else 0
    return [
        (v, ulp * limit + (wider * np.abs(v) + 2.0**-25 * (wider > 0) if i < 2 else 0))
        for i, (v, limit) in enumerate(zip(exact, limits, strict=True))
    ], m


@each_member
@each_masked
@each_axis
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beside_the_reference(rng, member, masked, axis, dtype, level):
    x, dy, gamma, beta = case(rng, dtype, axis)
    mask = rng.random((N, L)) < 0.7
    options = {"axis": axis, "mask": mask, "lengths": LENGTHS, "masked": masked}
    y, m = forward(cybn, member, x, gamma, beta, **options)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    found = y, *backward(cybn, member, dy, x, m, gamma, **options)
    exact, em = bounds(member, x, dy, gamma, beta, options)
    for ours, (theirs, bound) in zip(found, exact, strict=True):
        assert worst(ours.astype(np.longdouble), theirs, bound + (bound == 0)) <= 1
    assert np.array_equal(m.count, em.count)
    assert m.count.dtype == np.int64
    ulp = ULP64 if dtype == np.float64 else ULP32
    assert (np.abs(m.mean - em.mean) <= ulp * (np.abs(em.mean) + em.std())).all()
    assert (np.abs(m.m2 - em.m2) <= ulp * em.m2).all()
    assert found[1].dtype == x.dtype
    assert found[2].dtype == found[3].dtype == gamma.dtype


@each_member
@each_masked
def test_backward_is_the_derivative_of_forward(rng, member, masked):
    x, dy, gamma, beta = case(rng, np.float64)
    options = {"lengths": LENGTHS, "masked": masked}

    def loss(x, gamma, beta):
        return (forward(cybn, member, x, gamma, beta, **options)[0] * dy).sum()

    _, m = forward(cybn, member, x, gamma, beta, **options)
    found = backward(cybn, member, dy, x, m, gamma, **options)
    for place, gradient in enumerate(found):
        for index in ((0, 1, 2), (1, 2, 3), (1, 2, 9)) if place == 0 else ((0,), (C - 1,)):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [x.copy(), gamma.copy(), beta.copy()]
                moved[place][index] += step
                sides.append(loss(*moved))
            assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(gradient[index], abs=1e-6)


@each_member
@each_axis
def test_what_does_not_count_does_not_matter(rng, member, axis):
    """A sample gives the results that it has without its padding, in which NaN is ignored."""
    x, dy, gamma, beta = case(rng, np.float32, axis)
    lengths = np.array([5, 5, 5])
    cut = (slice(None), slice(None), slice(5)) if axis == 1 else (slice(None), slice(5))
    short, moments = forward(cybn, member, x[cut], gamma, beta, axis=axis)
    shorter = backward(cybn, member, dy[cut], x[cut], moments, gamma, axis=axis)
    spoilt, dspoilt = (np.full_like(x, np.nan) for _ in range(2))
    spoilt[cut], dspoilt[cut] = x[cut], dy[cut]
    options = {"axis": axis, "lengths": lengths, "masked": "zero"}
    y, m = forward(cybn, member, spoilt, gamma, beta, **options)
    dx, dgamma, dbeta = backward(cybn, member, dspoilt, spoilt, m, gamma, **options)
    assert_near(y[cut], short, 8 * ULP32)
    for ours, theirs in zip((dx[cut], dgamma, dbeta), shorter, strict=True):
        assert_near(ours, theirs, 32 * ULP32)
    outside = np.ones(x.shape, bool)
    outside[cut] = False
    assert not y[outside].any()
    assert not dx[outside].any()
    normal, _ = forward(cybn, member, spoilt, gamma, beta, **options | {"masked": "normalize"})
    assert np.array_equal(normal[cut], y[cut])
    assert np.isnan(normal[outside]).all()


@each_member
def test_a_mask_that_leaves_nothing_out_is_no_mask(rng, member):
    x, dy, gamma, beta = case(rng)
    plain, m = forward(cybn, member, x, gamma, beta)
    options = {"mask": np.ones((N, L), bool), "lengths": [L] * N, "masked": "zero"}
    y, same = forward(cybn, member, x, gamma, beta, **options)
    assert y.tobytes() == plain.tobytes()
    assert same == m
    assert isinstance(same.count, int)
    for a, b in zip(
        backward(cybn, member, dy, x, m, gamma),
        backward(cybn, member, dy, x, m, gamma, **options),
        strict=True,
    ):
        assert a.tobytes() == b.tobytes()


@each_member
@each_masked
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_in_place(rng, member, masked, dtype):
    x, dy, gamma, beta = case(rng, dtype)
    options = {"lengths": LENGTHS, "masked": masked}
    y, m = forward(cybn, member, x, gamma, beta, **options)
    dx, *_ = backward(cybn, member, dy, x, m, gamma, **options)
    own = x.copy()
    assert forward(cybn, member, own, gamma, beta, out=own, **options)[0] is own
    assert own.tobytes() == y.tobytes()
    for which in (0, 1):
        given = [dy.copy(), x.copy()]
        assert (
            backward(cybn, member, *given, m, gamma, out=given[which], **options)[0]
            is (given[which])
        )
        assert given[which].tobytes() == dx.tobytes()


@each_member
def test_the_same_bits_on_any_number_of_threads(rng, member):
    x = rng.standard_normal((3, 8, 40000)).astype(np.float32)
    options = {"lengths": [40000, 1000, 30000]}
    one, three = (
        (y, m, *backward(cybn, member, x, x, m, num_threads=threads, **options))
        for threads in (1, 3)
        for y, m in [forward(cybn, member, x, num_threads=threads, **options)]
    )
    assert one[1] == three[1]
    assert all(np.array_equal(a, b) for a, b in zip(one[2:], three[2:], strict=True))
    assert one[0].tobytes() == three[0].tobytes()


def test_group_norm_of_images_and_of_two_axes(rng):
    x = rng.standard_normal((2, 4, 5, 6)).astype(np.float32)
    mask = rng.random((2, 5, 6)) < 0.5
    for axis in (1, 3):
        batch = np.moveaxis(x, 1, axis)
        y, _ = cybn.group_norm(batch, num_groups=2, axis=axis, mask=mask)
        exact, _ = reference.group_norm(batch, num_groups=2, axis=axis, mask=mask)
        assert_near(y, exact, 64 * ULP32)
    flat = x[:, :, 0, 0]
    with pytest.raises(ValueError, match="mask or lengths leave 0 of 2 values a group in sample 1"):
        cybn.group_norm(flat, num_groups=2, mask=np.array([True, False]))


@each_member
@pytest.mark.parametrize(
    ("chosen", "error", "words"),
    [
        ({"lengths": [10, 0, 7]}, ValueError, r"leave 0 of (10|30) values a \w+ in sample 1"),
        ({"lengths": [10, 11, 7]}, ValueError, r"lengths lie in 7\.\.11"),
        ({"lengths": [1.0, 2.0, 3.0]}, TypeError, "lengths is float64"),
        ({"mask": np.ones((N, L))}, TypeError, "mask is float64; it must be bool"),
        ({"mask": np.ones((L, N), bool)}, ValueError, "mask has shape"),
        ({"mask": np.ones((N, C, L), bool)}, ValueError, "the same for all channels"),
        ({"lengths": LENGTHS, "masked": "none"}, ValueError, "masked is 'none'"),
        ({"masked": "none"}, ValueError, "masked is 'none'"),
        ({"lengths": LENGTHS, "gamma": np.ones(C + 1)}, ValueError, "gamma has shape"),
        ({"lengths": LENGTHS, "eps": 0.0}, ValueError, "eps is 0.0"),
        ({"lengths": LENGTHS, "num_threads": 0}, ValueError, "num_threads is 0"),
    ],
)
def test_errors_change_nothing(rng, member, chosen, error, words):
    x, dy, *_ = case(rng)
    out = np.full_like(x, 7)
    with pytest.raises(error, match=words):
        forward(cybn, member, x, out=out, **chosen)
    moments = forward(cybn, member, x, lengths=LENGTHS)[1]
    with pytest.raises(error, match=words):
        backward(cybn, member, dy, x, moments, out=out, **chosen)
    assert (out == 7).all()


def test_one_position_is_enough_for_several_channels(rng):
    x, *_ = case(rng)
    lengths = [10, 1, 7]
    y, m = cybn.group_norm(x, num_groups=2, lengths=lengths)
    assert m.count.tolist() == [30, 30, 3, 3, 21, 21]
    assert_near(y, reference.group_norm(x, num_groups=2, lengths=lengths)[0], 64 * ULP32)
    with pytest.raises(ValueError, match="leave 1 of 10 values a channel in sample 1"):
        cybn.instance_norm(x, lengths=lengths)


@each_member
def test_moments_of_another_mask_are_refused(rng, member):
    x, dy, *_ = case(rng)
    _, m = forward(cybn, member, x, lengths=LENGTHS)
    with pytest.raises(ValueError, match="Give the Moments that the forward returned for this x"):
        backward(cybn, member, dy, x, m, lengths=[10, 4, 8])
    with pytest.raises(ValueError, match="Give the Moments that the forward returned for this x"):
        backward(cybn, member, dy, x, m)
    out = x[:, ::-1]
    with pytest.raises(ValueError, match="out overlaps an input in part"):
        forward(cybn, member, x, lengths=LENGTHS, out=out)
