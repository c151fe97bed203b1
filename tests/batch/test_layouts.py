"""Any strides, alignment and overlap give the right result in the layout of x, or an error."""

from itertools import permutations, product

import numpy as np
import pytest
from bounds import forward_bound
from cases import DTYPES, backward_bound, lay, normal_case, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import cybn
from cybn import _arguments, _dispatch

pytestmark = pytest.mark.divided

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def parameters(rng, channels, dtype=np.float64):
    return rng.uniform(0.5, 2, channels).astype(dtype), rng.standard_normal(channels).astype(dtype)


def within(got, exact, bound):
    return (np.abs(got - exact) <= bound).all()


def check(x, dy, axis=1, right=None):
    """Check all functions on x and dy in their given layout against exact values.

    Return the exact values and the bounds, to be given as `right` with the same values of x and dy.
    """
    gamma, beta = parameters(np.random.default_rng(6), x.shape[axis], x.dtype)
    if right is None:
        right = forward_bound(x, gamma, beta, axis), backward_bound(dy, x, gamma, axis)
    (y_exact, y_bound), (exact, bound) = right
    before = x.tobytes(), dy.tobytes()
    for threads in (1, 3):
        k = {"axis": axis, "num_threads": threads}
        y, m = cybn.batch_norm(x, gamma, beta, **k)
        assert within(y, y_exact, y_bound)
        assert cybn.moments(x, **k) == m
        z = cybn.batch_norm_inference(x, m.mean, m.var(), gamma, beta, **k)
        assert within(z, y_exact, y_bound)
        got = cybn.batch_norm_backward(dy, x, m, gamma, **k)
        for a, b, allowed in zip(got, exact, bound, strict=True):
            assert within(a, b, allowed)
        like = np.empty_like(x)
        for result in (y, z, got[0]):
            assert result.dtype == x.dtype
            assert result.strides == like.strides
    assert before == (x.tobytes(), dy.tobytes())
    return right


# ---- strides -----------------------------------------------------------------------------

VIEWS = {
    "C order": lambda a: a,
    "sliced along N": lambda a: a[1:-1],
    "every second of N": lambda a: a[::2],
    "sliced along C": lambda a: a[:, 1:-2],
    "every second of C": lambda a: a[:, ::2],
    "sliced along H": lambda a: a[:, :, 1:4],
    "sliced along W": lambda a: a[..., 2:],
    "every second of W": lambda a: a[..., ::2],
    "one of W": lambda a: a[..., 3:4],
    "one of N": lambda a: a[2:3],
    "one of C": lambda a: a[:, 2:3],
    "sliced everywhere": lambda a: a[1:, 1:-1, 1:-1, 1:-1],
    "N reversed": lambda a: a[::-1],
    "C reversed": lambda a: a[:, ::-1],
    "all reversed": lambda a: a[::-1, ::-1, ::-1, ::-1],
    "W reversed, every third": lambda a: a[..., ::-3],
    "transposed": lambda a: a.transpose(0, 3, 2, 1),
    "channels-last behind": lambda a: a.transpose(0, 3, 1, 2),
    "all axes transposed": lambda a: a.T,
    "Fortran": np.asfortranarray,
    "Fortran sliced": lambda a: np.asfortranarray(a)[1:-1, 1:, ::2],
}
IN_PLACE = {
    "C order",
    "sliced along N",
    "every second of N",
    "sliced along C",
    "one of N",
    "channels-last behind",
    "all axes transposed",
    "Fortran",
    "transposed",
}


@pytest.mark.row(17)
@every_dtype
@pytest.mark.parametrize("shape", [(6, 5, 7, 8), (5, 6, 26, 25)], ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_views(rng, name, shape, dtype, level):
    """The base of each view is NaN everywhere outside the view."""
    view = VIEWS[name]
    base = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    seen = np.isin(base, view(base))
    x, dy = (np.where(seen, rng.standard_normal(shape).astype(dtype), np.nan) for _ in range(2))
    x, dy = view(x.astype(dtype)), view(dy.astype(dtype))
    right = check(x, dy)
    gamma, beta = parameters(rng, x.shape[1], dtype)
    copy = x.copy(order="K")
    y, m = cybn.batch_norm(x, gamma, beta)
    again, m_again = cybn.batch_norm(copy, gamma, beta)
    # A copy with the layout of x gives equal bits.
    if np.empty_like(x).strides == copy.strides:
        assert same_bits(y, again)
        assert m == m_again
    check(x, dy.copy(), right=right)
    check(x.copy(), dy, right=right)


@pytest.mark.row(8)
@every_dtype
@pytest.mark.parametrize("name", VIEWS)
def test_nan_outside_the_view_has_no_effect(rng, name, dtype, level):
    def among_nan(array):
        view = VIEWS[name](np.full(array.shape, np.nan, dtype))
        view[...] = VIEWS[name](array)
        return view

    for shape in ((6, 5, 7, 8), (5, 6, 26, 25)):
        x, dy = rng.standard_normal((2, *shape)).astype(dtype)
        gamma, beta = parameters(rng, VIEWS[name](x).shape[1], dtype)
        results = []
        for given_x, given_dy in (
            (VIEWS[name](x), VIEWS[name](dy)),
            (among_nan(x), among_nan(dy)),
        ):
            k = {"activation": "silu", "residual": given_dy}
            y, m = cybn.batch_norm(given_x, gamma, beta, **k)
            z = cybn.batch_norm_inference(given_x, beta, gamma, gamma, beta, **k)
            gradients = cybn.batch_norm_backward(given_dy, given_x, m, gamma, beta=beta, **k)
            results.append([y, z, m.mean, m.m2, *gradients])
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.row(17)
@pytest.mark.parametrize("name", VIEWS)
def test_read_in_place(name):
    x = VIEWS[name](np.ones((6, 5, 7, 8), np.float32))
    *shape, in_place = _dispatch.layout(x, 1)
    assert in_place == (name in IN_PLACE)
    assert shape[1] == x.shape[1]
    assert np.prod(shape) == x.size


@pytest.mark.row(17)
@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_every_order_of_axes_is_read_and_written_in_place(rng, order):
    """Dense memory is used without a copy for any order of axes and any channel axis."""
    x = rng.standard_normal((3, 4, 5, 6)).astype(np.float32).transpose(order)
    for axis in range(-4, 4):
        assert _dispatch.layout(x, axis)[3]
        assert _dispatch.layout(np.empty_like(x), axis) == _dispatch.layout(x, axis)
    check(x, x[::-1], axis=2)


@pytest.mark.row(17)
@every_dtype
@pytest.mark.parametrize("channels", [5, 20, 33])
def test_gaps_between_channels_last_rows(rng, channels, dtype, level):
    """Memory between two rows, of the last or of any outer axis, is not read.

    The gap contains NaN or 1000. A sum with a NaN is computed again, rightly, so only 1000
    would show in the results.
    """
    room = np.empty((2, 5, 6, 7, channels + 1), dtype)
    parts = np.s_[..., :-1], np.s_[:, :, :-1, :], np.s_[1:-1, :, :, 1:], np.s_[::2, 1:]
    for part, between in product(parts, [np.nan, 1000]):
        room[...] = between
        x, dy = room[0][part], room[1][part]
        x[...], dy[...] = rng.standard_normal((2, *x.shape))
        check(x, dy, axis=-1)
        out = np.full_like(room[0], np.nan)[part]
        cybn.batch_norm(x, axis=-1, out=out)
        assert same_bits(out, cybn.batch_norm(x, axis=-1)[0])
        check(x[:, 0], dy[:, 0].copy(), axis=-1)
        check(x[0, 0].copy(), dy[0, 0], axis=-1)


@every_dtype
def test_broadcast(rng, dtype):
    row = rng.standard_normal((1, 5, 1, 7)).astype(dtype)
    column = rng.standard_normal((4, 5, 3, 1)).astype(dtype)
    for x in (
        np.broadcast_to(row, (4, 5, 3, 7)),
        np.broadcast_to(column, (4, 5, 3, 7)),
        np.broadcast_to(row[:, :1], (4, 5, 3, 7)),
    ):
        check(x, rng.standard_normal(x.shape).astype(dtype))
        check(rng.standard_normal(x.shape).astype(dtype), x)
    ones = np.broadcast_to(dtype(1), (4, 5, 3, 7))  # the gradient of a sum
    check(rng.standard_normal(ones.shape).astype(dtype), ones)


def test_axis_counts_from_either_end(rng):
    x = rng.standard_normal((3, 4, 5, 6)).astype(np.float32)
    for axis in range(4):
        y, m = cybn.batch_norm(x, axis=axis)
        again, m_again = cybn.batch_norm(x, axis=axis - 4)
        assert same_bits(y, again)
        assert m == m_again
        assert len(m) == x.shape[axis]


# ---- property tests ----------------------------------------------------------------------


@st.composite
def strided(draw):
    """Draw a shape, dtype, axis and two arrays: slices of transposed bases, filled with NaN."""
    ndim = draw(st.integers(2, 5))
    shape = draw(st.lists(st.integers(1, 6), min_size=ndim, max_size=ndim))
    dtype = draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def array():
        order = draw(st.permutations(range(ndim)))
        steps = draw(st.lists(st.sampled_from([-2, -1, 1, 1, 2, 3]), min_size=ndim, max_size=ndim))
        margins = draw(st.lists(st.integers(0, 2), min_size=ndim, max_size=ndim))
        sizes = [abs(k) * n + m for n, k, m in zip(shape, steps, margins, strict=True)]
        base = np.full([sizes[i] for i in order], np.nan, dtype).transpose(np.argsort(order))
        starts = [m if k > 0 else None for k, m in zip(steps, margins, strict=True)]
        view = base[tuple(slice(m, None, k) for m, k in zip(starts, steps, strict=True))]
        view = view[tuple(slice(n) for n in shape)]
        view[...] = rng.standard_normal(shape)
        return view

    return array(), array(), draw(st.integers(-ndim, ndim - 1))


@pytest.mark.row(17)
@settings(max_examples=200, deadline=None)
@given(strided())
def test_any_shape_strides_axis_and_dtype(drawn):
    x, dy, axis = drawn
    if x.size // x.shape[axis] > 1:
        check(x, dy, axis)
        gamma, beta = parameters(np.random.default_rng(7), x.shape[axis])
        y, m = cybn.batch_norm(x, gamma, beta, axis=axis)
        dx, *_ = cybn.batch_norm_backward(dy, x, m, gamma, axis=axis)
        room = np.full_like(dy, np.nan)  # in most cases another layout
        assert cybn.batch_norm(x, gamma, beta, axis=axis, out=room)[0] is room
        assert (room == y).all()
        assert cybn.batch_norm_backward(dy, x, m, gamma, axis=axis, out=dy)[0] is dy
        assert (dy == dx).all()
        assert cybn.batch_norm(x, gamma, beta, axis=axis, out=x)[0] is x
        assert (x == y).all()


@pytest.mark.row(17)
@every_dtype
@pytest.mark.parametrize("strides", [(0, 1, 1), (7, 1, 3), (-4, 1, 1), (10**6, 1, 5)], ids=str)
def test_strides_of_axes_of_size_one_do_not_matter(rng, strides, dtype):
    """They may have any value, and the result is still written to the right place."""
    x = rng.standard_normal((1, 6, 1)).astype(dtype)
    gamma, beta = parameters(rng, 6)
    odd = np.lib.stride_tricks.as_strided(x.copy(), x.shape, [s * x.itemsize for s in strides])
    y = cybn.batch_norm_inference(x, beta, gamma, gamma, beta)
    assert same_bits(cybn.batch_norm_inference(odd, beta, gamma, gamma, beta), y)
    assert (cybn.batch_norm_inference(odd, beta, gamma, gamma, beta, out=odd) == y).all()
    assert (odd == y).all()


# ---- alignment ---------------------------------------------------------------------------


@pytest.mark.row(18)
@every_dtype
@pytest.mark.parametrize("off", [0, 1, 2, 4, 8, 63])
def test_bytes_off_a_cache_line(rng, off, dtype, level):
    for shape in ((3, 5, 7), (3, 5, 1071), (70, 33, 1)):
        x, dy, gamma, beta = normal_case(rng, shape, dtype)

        def moved(array):
            room = np.empty(array.nbytes + 128, np.uint8)
            start = -room.ctypes.data % 64 + off
            view = np.ndarray(array.shape, array.dtype, room, start)
            view[...] = array
            assert (view.ctypes.data - off) % 64 == 0
            return view

        y, m = cybn.batch_norm(x, gamma, beta)
        results = cybn.batch_norm_backward(dy, x, m, gamma)
        out = moved(np.zeros_like(x))
        got, moments = cybn.batch_norm(moved(x), moved(gamma), moved(beta), out=out)
        assert got is out
        assert same_bits(out, y)
        assert moments == m
        got = cybn.batch_norm_backward(moved(dy), moved(x), m, moved(gamma), out=out)
        assert got[0] is out
        assert all(same_bits(a, b) for a, b in zip(got, results, strict=True))
        x = moved(x)
        assert cybn.batch_norm(x, gamma, beta, out=x)[0] is x
        assert same_bits(x, y)


# ---- read-only ---------------------------------------------------------------------------


@pytest.mark.row(19)
@every_dtype
def test_read_only_input_is_accepted_and_refused_as_out(rng, dtype, tmp_path):
    x, dy, gamma, beta = normal_case(rng, (4, 5, 7), dtype)
    y, m = cybn.batch_norm(x, gamma, beta)
    results = cybn.batch_norm_backward(dy, x, m, gamma)
    x.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", dtype, "r", shape=x.shape)
    for array in (x, dy, gamma, beta):
        array.setflags(write=False)
    for given_x in (x, mapped):
        got, moments = cybn.batch_norm(given_x, gamma, beta)
        assert type(got) is np.ndarray
        assert same_bits(got, y)
        assert moments == m
        got = cybn.batch_norm_backward(dy, given_x, m, gamma)
        assert all(same_bits(a, b) for a, b in zip(got, results, strict=True))
        with pytest.raises(ValueError, match="out is read-only"):
            cybn.batch_norm(given_x, gamma, beta, out=given_x)
        with pytest.raises(ValueError, match="out is read-only"):
            cybn.batch_norm_inference(given_x, beta, gamma, out=given_x)
        with pytest.raises(ValueError, match="out is read-only"):
            cybn.batch_norm_backward(dy, given_x, m, gamma, out=given_x)
        with pytest.raises(ValueError, match="out is read-only"):
            cybn.batch_norm_inference_backward(dy, given_x, beta, gamma, out=given_x)


# ---- out ---------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("shape", [(3, 5, 7), (70, 33, 1), (3, 5, 600), (3, 2, 45000)], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_out(rng, shape, axis, dtype, level):
    """A new array, an array with another layout, x, and dy as out all get equal bits."""
    x, dy, gamma, beta = normal_case(rng, shape, dtype)
    x, dy = lay(x, axis), lay(dy, axis)
    mean, var = beta, gamma
    k = {"axis": axis}
    m = cybn.moments(x, **k)
    calls = {
        "forward": lambda x, dy, out: cybn.batch_norm(x, gamma, beta, **k, out=out),
        "inference": lambda x, dy, out: (
            cybn.batch_norm_inference(x, mean, var, gamma, beta, **k, out=out),
        ),
        "backward": lambda x, dy, out: cybn.batch_norm_backward(dy, x, m, gamma, **k, out=out),
        "inference backward": lambda x, dy, out: cybn.batch_norm_inference_backward(
            dy, x, mean, var, gamma, **k, out=out
        ),
    }
    wide = np.full((shape[0], shape[1] + 2, shape[2]), np.nan, dtype)
    for name, call in calls.items():
        right = call(x, dy, None)[0]
        rooms = [np.empty_like(x), np.asfortranarray(np.zeros_like(x))]
        rooms.append(lay(np.full(shape, np.nan, dtype).swapaxes(1, 2), 1).swapaxes(1, 2))
        for out in (room for room in rooms if room.shape == x.shape):
            assert call(x, dy, out)[0] is out
            assert same_bits(out, right), name
        if axis == 1:
            out = wide[:, 1:-1]
            assert call(x, dy, out)[0] is out
            assert same_bits(out, right), name
            assert np.isnan(wide[:, [0, -1]]).all()
        own_x, own_dy = x.copy(), dy.copy()
        assert call(own_x, own_dy, own_x)[0] is own_x
        assert same_bits(own_x, right), name
        if "backward" in name:
            own_x = x.copy()
            assert call(own_x, own_dy, own_dy)[0] is own_dy
            assert same_bits(own_dy, right), name
            assert same_bits(own_x, x)


def test_parameters_with_a_step(rng):
    """A vector that is strided or reversed gives the same results as a contiguous one."""
    x = rng.standard_normal((4, 6, 5)).astype(np.float32)
    for dtype in DTYPES:
        given = rng.uniform(0.5, 2, (6, 4)).astype(dtype)
        copies = given.T.copy()
        y, m = cybn.batch_norm(x, given[:, 0], given[::-1, 1])
        z, _ = cybn.batch_norm(x, copies[0], copies[1, ::-1].copy())
        assert same_bits(y, z)
        y = cybn.batch_norm_inference(x, *given.T)
        assert same_bits(y, cybn.batch_norm_inference(x, *copies))
        got = cybn.batch_norm_backward(x, x, m, given[:, 0])
        for a, b in zip(got, cybn.batch_norm_backward(x, x, m, copies[0]), strict=True):
            assert same_bits(a, b)


def test_out_that_overlaps_parameters(rng):
    x = rng.standard_normal((4, 6)).astype(np.float32)
    room = np.ones((5, 6), np.float32)
    with pytest.raises(ValueError, match="overlaps"):
        cybn.batch_norm(x, room[1], out=room[:4])
    cybn.batch_norm(x, room[4], out=room[:4])


def test_out_that_is_the_input_transposed(rng):
    """The memory and shape are equal but not the order: y would overwrite values not yet read."""
    x = rng.standard_normal((6, 6, 6)).astype(np.float32)
    before = x.copy()
    for out in (x.T, x.swapaxes(0, 1), x.swapaxes(1, 2), x[::-1]):
        with pytest.raises(ValueError, match="out overlaps an input in part"):
            cybn.batch_norm(x, out=out)
        with pytest.raises(ValueError, match="out overlaps an input in part"):
            cybn.layer_norm(x, out=out)
    assert same_bits(x, before)


def test_too_tangled_to_compare_is_refused(rng, monkeypatch):
    """If it takes too long to find out whether two views overlap, cybn assumes that they do."""
    monkeypatch.setattr(_arguments, "MOST_WORK", 1)
    room = rng.standard_normal(400)
    shape, strides = (4, 3, 5), (51 * 8, 38 * 8, 31 * 8)
    x, out = (np.lib.stride_tricks.as_strided(room[start:], shape, strides) for start in (0, 8))
    assert not np.shares_memory(x, out)
    before = room.copy()
    with pytest.raises(ValueError, match="overlaps"):
        cybn.batch_norm(x, out=out)
    assert same_bits(room, before)


def test_overlap_with_what_is_copied_first(rng):
    """Inputs that are copied before the call must not be overwritten either."""
    room = np.zeros(2464, np.uint8)
    x = np.frombuffer(room.data, np.float32, 600, 1).reshape(4, 3, 50)
    out = np.frombuffer(room.data, np.float32, 600, 20).reshape(4, 3, 50)
    x[...] = rng.standard_normal(x.shape)
    steps = np.ones(600, np.float32)
    gamma, over_gamma, fine = steps[::7][:3], steps.reshape(4, 3, 50), np.ones((4, 3, 50), "f4")
    m, before = cybn.moments(fine + x), x.copy()
    for call in (
        lambda: cybn.batch_norm(x, out=out),
        lambda: cybn.batch_norm_inference(x, np.ones(3), np.ones(3), out=out),
        lambda: cybn.batch_norm_backward(x, fine, m, out=out),
        lambda: cybn.batch_norm_backward(
            x, fine, m, residual=fine, activation="relu", out_residual=out
        ),
        lambda: cybn.layer_norm(x, out=out),
        lambda: cybn.group_norm(x, num_groups=1, out=out),
        lambda: cybn.batch_norm(fine, gamma, out=over_gamma),
    ):
        with pytest.raises(ValueError, match="overlaps an input"):
            call()
    assert same_bits(x.copy(), before)
    assert (steps == 1).all()
