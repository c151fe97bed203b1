"""The other norms on all kinds of shapes and layouts, and with bad arguments."""

from itertools import permutations

import numpy as np
import pytest
from bounds import worst
from cases import same_bits
from family_cases import (
    CASES,
    LAYOUTS,
    Case,
    backward_bound,
    every_case,
    every_dtype,
    forward_bound,
    group,
    instance,
    laid_out,
    layer,
    rms,
)

import cybn

# ---- shapes ------------------------------------------------------------------------------


def check(case, rng, dtype=np.float32):
    """Check that all results are within their bounds."""
    x, dy, gamma, beta = case.data(rng, dtype)
    got = case.everything(x, dy, gamma, beta)
    assert worst(case.rows(got["y"]), *forward_bound(case, x, gamma, beta)) <= 1, str(case)
    exact, bounds = backward_bound(case, dy, x, gamma)
    assert worst(case.rows(got["dx"]), exact[0], bounds[0]) <= 1, str(case)
    for i, name in enumerate(("dgamma", "dbeta")[: len(exact) - 1], 1):
        assert worst(got[name], exact[i], bounds[i] + 1e-300) <= 1, (str(case), name)


@pytest.mark.row(14)
@pytest.mark.parametrize("make", [layer, rms])
def test_every_size_of_row(make, rng, level):
    for d in range(1, 71):
        for n in (1, 3, 33):
            check(make(n, d), rng)


@pytest.mark.row(16)
@pytest.mark.parametrize("make", [layer, rms])
@pytest.mark.parametrize("d", [1023, 1024, 1025, 2048, 4095, 4096, 4097, 65535, 65536, 65537])
def test_around_each_threshold_of_rows(make, d, rng):
    check(make(9 if d < 9000 else 2, d), rng)


@pytest.mark.row(16)
@pytest.mark.parametrize("rows", [31, 32, 33, 63, 64, 65, 1023, 1024, 1025])
def test_around_each_threshold_of_blocks(rows, rng):
    check(layer(rows, 40), rng)


@pytest.mark.row(14)
def test_every_number_of_positions(rng):
    for s in range(1, 71):
        check(group(2, 3, 4, s), rng)
        check(group(6, 2, 6, s), rng)
        if s > 1:
            check(instance(2, 3, s), rng)


@pytest.mark.row(16)
@pytest.mark.parametrize("s", [341, 342, 511, 512, 513, 1023, 1024, 1025, 65535, 65536, 65537])
def test_around_each_threshold_of_positions(s, rng):
    check(group(2, 2, 6, s), rng)
    check(instance(1, 3, s), rng)


@pytest.mark.row(14)
def test_every_number_of_channels_last(rng):
    for c in range(1, 71):
        check(instance(2, 35, c, axis=-1), rng)
        check(group(c, 2, 3, 2 * c, axis=-1), rng)


@pytest.mark.row(16)
@pytest.mark.parametrize("channels", [1, 3, 31, 32, 33, 64, 1023, 1024, 1025, 2049])
def test_around_each_threshold_of_positions_channels_last(channels, rng):
    step = max(1, 64 // channels)
    for s in (32 * step - 1, 32 * step, 32 * step + 1):
        check(group(1, 1, s, channels, axis=-1), rng)
        check(instance(1, s, channels, axis=-1), rng)


@pytest.mark.row(16)
@pytest.mark.parametrize(("s", "channels"), [(128, 1024), (1024, 128)])
def test_around_each_cut_of_positions(s, channels, rng):
    """A sample of at least 128 positions and 131072 values is cut in two."""
    for off in (-1, 0, 1):
        check(group(4, 1, s + off, channels, axis=-1), rng)


@pytest.mark.row(16)
@pytest.mark.parametrize("s", [2, 3, 7, 63, 64, 65, 127, 128, 129])
def test_columns_of_many_channels(s, rng):
    """Rows of several tiles whose columns are spread over channels, up to where runs begin."""
    tile = 1024 // s * s
    for channels in (tile // s, tile // s + 1, 2 * tile // s + 3):
        check(group(2, 5, 2 * channels, s), rng)


@pytest.mark.row(15)
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("rest", [(), (1,), (7, 7), (2, 3, 4), (23, 23)], ids=str)
def test_every_grouping(groups, rest, rng):
    check(group(groups, 3, 12, *rest), rng)


def test_normalized_over_several_axes_or_all(rng):
    for axis in (-3, -2, -1, 0, 1, 2):
        check(layer(4, 5, 6, axis=axis), rng)
        check(rms(4, 5, 6, axis=axis), rng)
    check(layer(11, axis=0), rng)


@every_dtype
@pytest.mark.parametrize(
    "case",
    [
        layer(0, 7),
        layer(3, 0),
        rms(0, 7),
        rms(2, 0),
        group(2, 0, 4, 5),
        group(2, 3, 4, 0),
        instance(0, 3, 5),
        instance(2, 3, 0),
    ],
    ids=str,
)
def test_empty(case, dtype):
    x = np.empty(case.shape, dtype)
    y, statistics = case.forward(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    rows = case.rows(x)
    assert np.size(statistics if case.member == "rms" else statistics.mean) == (
        rows.shape[0] * rows.shape[1]
    )
    dx, *sums = case.backward(x, x, statistics)
    assert dx.shape == x.shape
    for v in sums:
        assert v.shape == case.parameter_shape
        assert v.dtype == dtype
        assert (v == 0).all()


@every_dtype
@every_case
def test_without_gamma_and_beta(case, dtype, rng):
    x, dy, gamma, beta = case.data(rng, dtype)
    got = case.everything(x, dy, None, None)
    assert not {
        name
        for name, value in case.everything(x, dy, gamma * 0 + 1, beta * 0).items()
        if not same_bits(value, got[name])
    }


@every_case
def test_parameters_of_the_other_type(case, rng):
    """Gradients have the dtype of gamma, all other results that of x."""
    x, dy, gamma, beta = case.data(rng, np.float32)
    got = case.everything(x, dy, gamma.astype(np.float64), beta.astype(np.float64))
    first = case.everything(x, dy, gamma, beta)
    for name in ("y", "dx"):
        assert same_bits(got[name], first[name])
    for name in {"dgamma", "dbeta"} & got.keys():
        assert got[name].dtype == np.float64
        assert same_bits(got[name].astype(np.float32), first[name])
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    got = case.everything(x, dy, gamma, beta)
    first = case.everything(x, dy, gamma.astype(np.float64), beta.astype(np.float64))
    assert same_bits(got["y"], first["y"])
    assert got["dgamma"].dtype == np.float32


# ---- layouts -----------------------------------------------------------------------------


@pytest.mark.row(17)
@every_dtype
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case, dtype, rng):
    x, dy, gamma, beta = case.data(rng, dtype)
    first = case.everything(x, dy, gamma, beta)
    for (name, strange), (_, other) in zip(laid_out(x), laid_out(dy), strict=True):
        for pair in ((strange, dy), (x, other), (strange, other)):
            got = case.everything(*pair, gamma, beta)
            for key in ("y", "mean", "m2", "mean_square", "dx"):
                if key in got:
                    assert same_bits(np.ascontiguousarray(got[key]), first[key]), (name, key)
            for key in {"dgamma", "dbeta"} & got.keys():  # rows may be added in another order
                assert np.allclose(got[key], first[key], rtol=1e-5, atol=1e-5), (name, key)


@pytest.mark.row(17)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_out_of_any_layout(case, rng):
    x, dy, gamma, beta = case.data(rng, np.float32)
    first = case.everything(x, dy, gamma, beta)
    _, statistics = case.forward(x)
    for name, out in laid_out(x):
        if not out.flags.writeable or not out.dtype.isnative:
            continue
        out[...] = np.nan
        assert case.forward(x, gamma, beta, out=out)[0] is out
        assert same_bits(np.ascontiguousarray(out), first["y"]), name
        out[...] = np.nan
        assert case.backward(dy, x, statistics, gamma, out=out)[0] is out
        assert same_bits(np.ascontiguousarray(out), first["dx"]), name


@pytest.mark.row(17)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_the_output_lies_as_the_input(case, rng):
    x, dy, *_ = case.data(rng, np.float32)
    for order in (np.arange(x.ndim), np.roll(np.arange(x.ndim), 1)):
        moved = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
        y, statistics = case.forward(moved)
        assert y.strides == moved.strides
        assert case.backward(dy, moved, statistics)[0].strides == moved.strides


@pytest.mark.row(17)
@every_dtype
@pytest.mark.parametrize(
    "case", [group(2, 5, 6, 4, 3), instance(5, 6, 4, 150), instance(2, 3, 4, 5, 6)], ids=str
)
def test_channels_last_memory_is_not_copied(case, dtype, rng, monkeypatch):
    """Samples are read without a copy for any order of positions; results agree in any layout."""
    data = case.data(rng, dtype)
    first, copy = case.everything(*data), np.ascontiguousarray

    def of_small(a, *given):
        assert a.size < data[0].size
        return copy(a, *given)

    monkeypatch.setattr(np, "ascontiguousarray", of_small)
    last = Case(case.member, (*case.shape[:1], *case.shape[2:], case.shape[1]), -1, case.groups)
    inner = range(2, len(case.shape))
    results = {}
    for order in ((0, *inner, 1), (0, *reversed(inner), 1)):
        back = np.argsort(order)
        x, dy = (a.transpose(order).copy().transpose(back) for a in data[:2])
        got = case.everything(x, dy, *data[2:])
        assert got["y"].strides == got["dx"].strides == x.strides
        for name, value in first.items():
            assert np.allclose(got[name], value, rtol=1e-5, atol=1e-5), name
        results[order[1]] = got
    x, dy = (np.moveaxis(a, 1, -1).copy() for a in data[:2])
    got = last.everything(x, dy, *data[2:])
    for name, value in results[2].items():
        wanted = np.moveaxis(value, 1, -1) if value.ndim > 1 else value
        assert same_bits(got[name].ravel(), wanted.ravel()), name


@pytest.mark.row(17)
def test_channels_last_samples_with_gaps(rng):
    """Batches sliced along N are read in place and those sliced along C copied; bits are equal."""
    case = group(2, 3, 5, 7, 6, axis=-1)
    x, dy, *parameters = case.data(rng, np.float32)
    first = case.everything(x, dy, *parameters)
    for axis in (0, 3):
        room = np.full((2, *(n * (1 + (i == axis)) for i, n in enumerate(x.shape))), np.nan)
        pair = room.astype(np.float32)[(slice(None),) * (axis + 1) + (slice(None, None, 2),)]
        pair[...] = x, dy
        got = case.everything(*pair, *parameters)
        assert all(same_bits(got[name].ravel(), first[name].ravel()) for name in first)


def test_dense_samples_in_any_order_are_not_copied(rng, monkeypatch):
    """A transposed batch of sequences is read in place."""
    x = rng.standard_normal((7, 5, 33)).astype(np.float32).swapaxes(0, 1)
    y, m = cybn.layer_norm(x)
    monkeypatch.setattr(np, "ascontiguousarray", None)
    z, k = cybn.layer_norm(x)
    assert same_bits(y, z)
    assert m == k
    assert np.allclose(m.mean, x.reshape(35, 33).mean(1), atol=1e-6)


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_samples_in_any_order(order, rng):
    """Statistics are in the order of the axes of the samples, whatever their order in memory."""
    x, dy = rng.standard_normal((2, 2, 3, 4, 20)).astype(np.float32)
    gamma = rng.standard_normal(20).astype(np.float32)
    y, m = cybn.layer_norm(x, gamma)
    dx, *_ = cybn.layer_norm_backward(dy, x, m, gamma)
    back = np.argsort(order)
    moved = np.ascontiguousarray(x.transpose(*order, 3)).transpose(*back, 3)
    got, k = cybn.layer_norm(moved, gamma)
    assert k == m
    assert same_bits(np.ascontiguousarray(got), y)
    got, *_ = cybn.layer_norm_backward(dy, moved, k, gamma)
    assert same_bits(np.ascontiguousarray(got), dx)


@pytest.mark.row(19)
@every_case
def test_read_only_inputs_are_left_alone(case, rng):
    arrays = case.data(rng, np.float32)
    before = [a.tobytes() for a in arrays]
    for a in arrays:
        a.setflags(write=False)
    case.everything(*arrays)
    assert [a.tobytes() for a in arrays] == before


# ---- invalid input -----------------------------------------------------------------------


X = np.zeros((4, 6, 5), np.float32)
BAD = {
    "layer gamma": (lambda: cybn.layer_norm(X, np.ones(6)), ValueError, "gamma has shape"),
    "layer beta": (lambda: cybn.layer_norm(X, None, np.ones((6, 5))), ValueError, "beta has"),
    "layer axis": (lambda: cybn.layer_norm(X, axis=3), ValueError, "axis is 3"),
    "layer axis type": (lambda: cybn.layer_norm(X, axis=1.5), TypeError, "axis is 1.5"),
    "layer scalar": (lambda: cybn.layer_norm(np.float32(1)), ValueError, "at least 1 axis"),
    "layer eps": (lambda: cybn.layer_norm(X, eps=0), ValueError, "eps is 0"),
    "layer int": (lambda: cybn.layer_norm(X.astype(int)), TypeError, "x is int64"),
    "layer half": (lambda: cybn.layer_norm(X.astype(complex)), TypeError, "x is complex"),
    "layer masked": (lambda: cybn.layer_norm(np.ma.array(X)), TypeError, "masked array"),
    "threads": (lambda: cybn.layer_norm(X, num_threads=0), ValueError, "num_threads is 0"),
    "rms gamma": (lambda: cybn.rms_norm(X, np.ones(6)), ValueError, "gamma has shape"),
    "rms eps": (lambda: cybn.rms_norm(X, eps=-1.0), ValueError, "eps is -1"),
    "rms squares": (
        lambda: cybn.rms_norm_backward(X, X, np.ones(3)),
        ValueError,
        "mean_square has shape",
    ),
    "no groups": (lambda: cybn.group_norm(X, num_groups=4), ValueError, "num_groups is 4"),
    "zero groups": (lambda: cybn.group_norm(X, num_groups=0), ValueError, "num_groups is 0"),
    "group type": (lambda: cybn.group_norm(X, num_groups=2.0), TypeError, "num_groups is 2.0"),
    "group axis": (lambda: cybn.group_norm(X, num_groups=2, axis=0), ValueError, "axis is 0"),
    "group rank": (lambda: cybn.group_norm(X[0, 0], num_groups=1), ValueError, "at least 2"),
    "group gamma": (
        lambda: cybn.group_norm(X, np.ones(5), num_groups=2),
        ValueError,
        "one value a channel",
    ),
    "one value a group": (
        lambda: cybn.group_norm(X[:1, :, 0], num_groups=6),
        ValueError,
        "no variance",
    ),
    "one position": (lambda: cybn.instance_norm(X[:, :, :1]), ValueError, "no variance"),
    "no position": (lambda: cybn.instance_norm(X[:, :, 0]), ValueError, "no variance"),
    "moments type": (
        lambda: cybn.layer_norm_backward(X, X, (0, 1)),
        TypeError,
        "must be the Moments",
    ),
    "moments of another shape": (
        lambda: cybn.layer_norm_backward(X, X, cybn.moments(X)),
        ValueError,
        "24 of 5",
    ),
    "dy shape": (
        lambda: cybn.instance_norm_backward(X[:2], X, cybn.instance_norm(X)[1]),
        ValueError,
        "dy has shape",
    ),
    "dy type": (
        lambda: cybn.rms_norm_backward(X.astype(float), X, cybn.rms_norm(X)[1]),
        ValueError,
        "dy is float64",
    ),
    "out shape": (lambda: cybn.layer_norm(X, out=X[:2].copy()), ValueError, "out has shape"),
    "out overlaps": (
        lambda: cybn.layer_norm(np.zeros(60, np.float32)[:48], out=np.zeros(48, np.float32)[::2]),
        ValueError,
        "out has shape",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    call, error, text = BAD[name]
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_out_that_overlaps_in_part_is_refused(case, rng):
    x, dy, gamma, beta = case.data(rng, np.float32)
    room = np.zeros(x.size + 1, np.float32)
    room[:-1] = x.ravel()
    given, out = room[:-1].reshape(x.shape), room[1:].reshape(x.shape)
    before = room.copy()
    with pytest.raises(ValueError, match="overlaps"):
        case.forward(given, gamma, beta, out=out)
    _, statistics = case.forward(x)
    for pair in ((given, x), (dy, given)):
        with pytest.raises(ValueError, match="overlaps"):
            case.backward(*pair, statistics, gamma, out=out)
    assert (room == before).all()


def test_every_case_is_distinct():
    assert len({str(case) for case in CASES}) == len(CASES)
    assert all(isinstance(case, Case) for case in CASES)
