# cython: language_level=3
# cython: cdivision=True
# cython: binding=False
# Mask, weights and lengths, and the weight of each position that follows from them, its share.
#
# `checked` checks them, for all calls and for statistics of data larger than memory. `take_shares`
# converts them to the array that kernels read, with one share per position.

from libc.math cimport INFINITY
from libc.string cimport memset

from cybn._dispatch.arguments cimport Call, X, look, new_vector, shape_of
from cybn._dispatch.arrays cimport MOST_AXES, PyArray_DATA, PyArrayObject, View
from cybn._kernels.problem cimport FLOAT64, NO_SUMS, SAMPLES, SCALE, Problem

import numpy as np
from numpy import ndarray

from .. import _arguments


def checked(tuple shape, axis, mask, weights, lengths):
    """Check mask, weights and lengths for an array of this shape; return a `Selection`'s fields.

    Each field is None, or has the size of x or 1 along each axis.
    """
    ends = places = None
    if mask is not None:
        if type(mask) is not ndarray:
            mask = _arguments.array("mask", mask)
        if mask.dtype.kind != "b":
            raise TypeError(
                f"mask is {mask.dtype}; it must be bool, True where a value counts. "
                "Convert it: np.asarray(mask) > 0")
        mask = spread("mask", mask, shape, axis)
    if weights is not None:
        weights = _arguments.array("weights", weights)
        if weights.dtype.kind not in "bui":
            _arguments.tensor("weights", np.empty(0, weights.dtype))       # raises if not floats
        weights = spread("weights", weights, shape, axis)
    if lengths is not None:
        ends, places = ends_of(shape, axis, lengths)
    return mask, weights, ends, places


# ---- checks ------------------------------------------------------------------------------

cdef str fitting(tuple shape, Py_ssize_t axis):
    """Return a text that states which shape a mask must have."""
    rest = shape[:axis] + shape[axis + 1:]
    return (
        f"broadcastable to {rest}, the shape of x without its channel axis, or with as many axes "
        f"as x to its shape, {shape}")


cdef object spread(str name, object given, tuple shape, Py_ssize_t axis):
    """Return `given` with as many axes as x. Raise ValueError if it cannot be broadcast to x.

    An array with fewer axes applies to all channels, whatever its sizes are.
    """
    cdef tuple sizes = given.shape
    cdef Py_ssize_t i, lack = len(shape) - len(sizes)
    if lack > 0:
        sizes = (1,) * (lack - 1) + sizes
        sizes = sizes[:axis] + (1,) + sizes[axis:]
    if len(sizes) != len(shape) or not all([
            sizes[i] == 1 or sizes[i] == shape[i] for i in range(len(shape))]):
        raise ValueError(f"{name} has shape {given.shape}; it must be {fitting(shape, axis)}")
    return given.reshape(sizes) if lack > 0 else given


def require_alike(mask, weights, tuple shape, Py_ssize_t axis):
    """Raise ValueError if mask or weights differ between channels."""
    for name, given in (("mask", mask), ("weights", weights)):
        if given is not None and given.shape[axis] != 1:
            raise ValueError(
                f"{name} has shape {given.shape}; it must be the same for all channels: "
                f"{fitting(shape, axis)}, and of size 1 on axis {axis}. "
                "Moments.update takes one for each channel")


cdef tuple ends_of(tuple shape, Py_ssize_t axis, object lengths):
    """Return where each sample ends, and the indices along the axis of these ends."""
    others = [i for i in range(len(shape)) if i != axis]
    if len(others) < 2:
        raise ValueError(
            f"x has shape {shape}: lengths needs an axis beside the batch and the channels, "
            "such as L in (N, C, L)")
    batch, along = others[:2]
    given = _arguments.array("lengths", lengths)
    if given.dtype.kind not in "ui":
        raise TypeError(f"lengths is {given.dtype}; it must be integers")
    if given.shape != (shape[batch],):
        raise ValueError(
            f"lengths has shape {given.shape}; it must have shape ({shape[batch]},), "
            "one for each sample")
    if given.size and not 0 <= given.min() <= given.max() <= shape[along]:
        raise ValueError(
            f"lengths lie in {given.min()}..{given.max()}; "
            f"they must lie in 0..{shape[along]}, the size of axis {along}")
    sizes = [1] * len(shape)
    sizes[batch] = -1
    ends = given.astype(np.intp).reshape(sizes)
    sizes[batch], sizes[along] = 1, -1
    return ends, np.arange(shape[along]).reshape(sizes)


# ---- shares ------------------------------------------------------------------------------

cdef struct Reader:         # a mask, weights or ends, at the positions of x
    const char* data        # NULL if it is not given
    Py_ssize_t strides[MOST_AXES]       # along the axes of positions; 0 if it is broadcast

cdef struct Scan:
    Reader mask, weights, ends
    int axes                # number of axes of positions, which are in the order of memory
    Py_ssize_t sizes[MOST_AXES]
    int along               # the axis that `ends` refers to
    Py_ssize_t counted      # positions with a weight above 0
    double total, left      # the sum of the weights, and its rounding error
    double low, high        # the smallest and the largest weight above 0
    bint bad                # a weight is negative or not finite

ctypedef fused T:
    float
    double


cdef int take_shares(Call* c, Problem* p, tuple selected) except -1:
    """Store the share of each position in the problem; NULL if no kernel needs shares."""
    cdef Scan s
    mask, weights, lengths, masked = selected
    if masked != "normalize" and masked != "zero":
        raise ValueError(f"masked is {masked!r}; it must be 'normalize' or 'zero'")
    if mask is None and weights is None and lengths is None:
        return 0
    shape = shape_of(&c.at[X].view)
    mask, weights, ends, _places = checked(shape, c.axis, mask, weights, lengths)
    require_alike(mask, weights, shape, c.axis)
    if c.at[X].view.size == 0:
        return 0
    wide = None if weights is None else weights.astype(np.float64, copy=False)
    prepare(c, &s, mask, wide, ends)
    shares = new_vector(p.N * p.S, p.storage == FLOAT64)
    p.share = PyArray_DATA(<const PyArrayObject*> shares)
    if p.storage == FLOAT64:
        scan(&s, <double*> p.share)
    else:
        scan(&s, <float*> p.share)
    if s.bad:
        _arguments.finite_weights(weights)
    c.counted, c.total = s.counted, _arguments.finite_sum(s.total + s.left)
    if (weights is None and s.counted == p.N * p.S) or (
            p.apply == SCALE and p.reduce == NO_SUMS and masked == "normalize"):
        p.share = NULL
        return 0
    if p.storage != FLOAT64 and not (<float> s.low > 0 and <float> s.high < INFINITY):
        raise ValueError(
            f"weights lie in {s.low}..{s.high}, which {shares.dtype} cannot hold; "
            f"{_arguments.SCALE_THEM}")
    p.weighted, p.zeroed = weights is not None, masked == "zero"
    p.M = shares.sum(dtype=np.float64) if p.weighted else s.counted
    if p.storage == FLOAT64:
        find_places(p, <double*> p.share, s.counted)
    else:
        find_places(p, <float*> p.share, s.counted)
    (<list> c.held).append(shares)
    return 0


cdef int prepare(
    const Call* c, Scan* s, object mask, object weights, object ends
) except -1:
    """Fill in how the scan reads mask, weights and ends, along the axes of positions."""
    cdef int k, axis
    memset(s, 0, sizeof(Scan))
    s.low = INFINITY
    for k in range(c.at[X].view.ndim):
        axis = c.fold.order[k]
        if axis != c.axis:
            if axis == (1 if c.axis > 1 else 2):
                s.along = s.axes
            s.sizes[s.axes] = c.at[X].view.shape[axis]
            read(&s.mask, mask, axis, s.axes)
            read(&s.weights, weights, axis, s.axes)
            read(&s.ends, ends, axis, s.axes)
            s.axes += 1
    return 0


cdef int read(Reader* r, object array, int axis, int k) except -1:
    """Store the address of an array, and its stride along one axis of x."""
    cdef View v
    if array is not None:
        look(array, &v)
        r.data = v.data
        r.strides[k] = v.strides[axis] if v.shape[axis] > 1 else 0
    return 0


cdef void scan(Scan* s, T* shares) noexcept:
    """Write the share of each position, in the order of memory."""
    cdef Py_ssize_t at[MOST_AXES]
    cdef Py_ssize_t i, from_mask, from_weights, from_ends, place
    cdef int k, last = s.axes - 1
    cdef double value
    cdef bint counts
    memset(at, 0, sizeof(at))
    while True:
        from_mask = from_weights = from_ends = 0
        for k in range(last):
            from_mask += at[k] * s.mask.strides[k]
            from_weights += at[k] * s.weights.strides[k]
            from_ends += at[k] * s.ends.strides[k]
        for i in range(s.sizes[last]):
            value, counts = 1, True
            if s.weights.data != NULL:
                value = (<const double*> (
                    s.weights.data + from_weights + i * s.weights.strides[last]))[0]
                s.bad |= not 0 <= value < INFINITY
            if s.mask.data != NULL:
                counts = s.mask.data[from_mask + i * s.mask.strides[last]] != 0
            if s.ends.data != NULL:
                place = i if s.along == last else at[s.along]
                counts &= place < (<const Py_ssize_t*> (
                    s.ends.data + from_ends + i * s.ends.strides[last]))[0]
            if counts and value > 0:
                add(s, value)
            else:
                value = 0
            shares[i] = <T> value
        shares += s.sizes[last]
        k = last - 1
        while k >= 0 and at[k] + 1 == s.sizes[k]:
            at[k] = 0
            k -= 1
        if k < 0:
            return
        at[k] += 1


cdef inline void add(Scan* s, double value) noexcept:
    """Add a position with a weight above 0; keep the rounding error of the sum (Kahan)."""
    cdef double rough = s.total + (value + s.left)
    s.left = (value + s.left) - (rough - s.total) if rough < INFINITY else 0
    s.total = rough
    s.counted += 1
    s.low, s.high = min(s.low, value), max(s.high, value)


cdef void find_places(Problem* p, const T* shares, Py_ssize_t counted) noexcept:
    """Choose positions with a share above 0, evenly spread; position 0 if there are none."""
    cdef Py_ssize_t i = 0, found = -1
    cdef int k
    for k in range(SAMPLES):
        p.places[k] = 0
        while counted and found < k * counted // SAMPLES + counted // (2 * SAMPLES):
            found += shares[i] > 0
            i += 1
        if counted:
            p.places[k] = i - 1
