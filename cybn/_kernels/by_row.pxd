# cython: cdivision=True
# Loops along a row that has one mean and variance, with a gamma and beta for each value.
#
#   loop           reads            writes     bytes an element (float32), gamma and beta in L1
#   turned_sums    x                -          4
#   turned_dots    dy, x            -          8
#   row_dots       dy, x            -          8
#   row_scale      x                y          8
#   row_unscale    dy, x            dx        12
#
# The mean comes as hi + lo, both of type T: subtracted one after the other, the first exactly where
# it matters, so the error does not grow with |mean| / std (docs/math.md, 7.5).
#
# What does not fill a strip at the ends of a row is copied to one that is padded, and back.

from libc.string cimport memcpy

from cybn._kernels.lanes cimport (
    LANES, PLAIN, STRIP, T, WIDE, Way, clear, flush, item_of, read, write_strip)
from cybn._kernels.loops cimport (
    Ends, Seam, end_of_run, ends_of, lanes_of, put_head, put_rest)

cdef enum:
    HI_OF_ROW = 0           # where the constants of a row stand
    LO_OF_ROW = 1
    R_OF_ROW = 2            # one over the standard deviation
    C1_OF_ROW = 3           # mean of dz, dz = dy * gamma
    C2_OF_ROW = 4           # mean of dz * xhat
    ROW_TERMS = 5


# Rows of few values are turned first, so that lanes are rows and no sum goes across a vector.

cdef inline void turned_sums(
    const T* restrict x,        # IN  (n, LANES), n <= LANES
    Py_ssize_t n,
    const T* restrict shift,    # IN  (LANES,)
    T* restrict a,              # OUT (LANES,) sums of d = x - shift
    T* restrict b,              # OUT (LANES,) sums of d * d
) noexcept nogil:
    cdef T sum_a[LANES]
    cdef T sum_b[LANES]
    cdef T d
    cdef Py_ssize_t i, j
    clear(sum_a, LANES)
    clear(sum_b, LANES)
    for i in range(n):
        for j in range(LANES):
            d = x[i * LANES + j] - shift[j]
            sum_a[j] += d
            sum_b[j] += d * d
    for j in range(LANES):
        a[j] = sum_a[j]
        b[j] = sum_b[j]


cdef inline void turned_dots(
    const T* restrict dy,       # IN  (n, LANES), n <= LANES
    const T* restrict x,        # IN  (n, LANES)
    const T* restrict gamma,    # IN  (n,)
    Py_ssize_t n,
    const T* restrict shift,    # IN  (LANES,)
    T* restrict a,              # OUT (LANES,) sums of dz = dy * gamma
    T* restrict b,              # OUT (LANES,) sums of dz * (x - shift)
) noexcept nogil:
    cdef T sum_a[LANES]
    cdef T sum_b[LANES]
    cdef T dz, weight
    cdef Py_ssize_t i, j
    clear(sum_a, LANES)
    clear(sum_b, LANES)
    for i in range(n):
        weight = gamma[i]
        for j in range(LANES):
            dz = dy[i * LANES + j] * weight
            sum_a[j] += dz
            sum_b[j] += dz * (x[i * LANES + j] - shift[j])
    for j in range(LANES):
        a[j] = sum_a[j]
        b[j] = sum_b[j]


cdef inline void row_dots(
    Way way,                    # a constant
    const char* dy,             # IN  (n,)
    const char* x,              # IN  (n,)
    const T* gamma,             # IN  (n,)
    Py_ssize_t n,               # at most FLUSH strips
    T shift,
    double* acc,                # IO  (2, WIDE) sums of dz = dy * gamma, and of dz * (x - shift)
) noexcept nogil:
    cdef T a[LANES]
    cdef T b[LANES]
    cdef T end_x[LANES]
    cdef T end_dy[LANES]
    cdef T end_gamma[LANES]
    cdef T room[2 * LANES]
    cdef T dz
    cdef const T* at_x
    cdef const T* at_dy
    cdef Py_ssize_t lanes = lanes_of(shift), item = item_of(way, shift), i, j
    cdef Py_ssize_t full = n // lanes, rest = n - full * lanes
    clear(a, lanes)
    clear(b, lanes)
    for i in range(full + (rest > 0)):
        if i < full:
            at_x = read(way, x + i * lanes * item, lanes, room)
            at_dy = read(way, dy + i * lanes * item, lanes, room + LANES)
        else:
            end_of_run(way, x + i * lanes * item, rest, lanes, shift, end_x)
            end_of_run(way, dy + i * lanes * item, rest, lanes, <T> 0, end_dy)
            end_of_run(PLAIN, <const char*> (gamma + i * lanes), rest, lanes, <T> 0, end_gamma)
            at_x, at_dy, gamma = end_x, end_dy, &end_gamma[0] - i * lanes
        for j in range(lanes):
            dz = at_dy[j] * gamma[i * lanes + j]
            a[j] += dz
            b[j] += dz * (at_x[j] - shift)
    flush(a, acc)
    flush(b, acc + WIDE)


cdef inline void put_end(
    bint stream, bint first, Seam* seam, const char* end, Py_ssize_t bytes, char* y
) noexcept nogil:
    """Write what a row has before its whole strips, or after them."""
    if not stream:
        memcpy(y, end, bytes)
    elif first:
        put_head(seam, end, bytes, y)
    else:
        put_rest(seam, end, bytes, y)


cdef inline void row_scale(
    Way way,                    # a constant
    bint stream,                # past the caches; only where has_lines
    const char* x,              # IN  (n,)
    const T* gamma,             # IN  (n,)
    const T* beta,              # IN  (n,)
    char* y,                    # OUT (n,), may be x
    Py_ssize_t n,
    const T* row,               # IN  (ROW_TERMS,)
    Seam* seam,                 # IO  where `stream`
) noexcept nogil:
    """y = ((x - hi) - lo) * r * gamma + beta"""
    cdef T v[LANES]
    cdef T room[LANES]
    cdef T ends[2 * LANES]
    cdef char at_end[2 * STRIP]
    cdef const T* at_x
    cdef const T* g
    cdef const T* b
    cdef T hi = row[HI_OF_ROW], lo = row[LO_OF_ROW], r = row[R_OF_ROW]
    cdef Ends e = ends_of(way, y, stream, n, hi)
    cdef Py_ssize_t lanes = lanes_of(hi), item = item_of(way, hi), i, j, at, m
    for i in range(-1, e.strips + 1):
        at = 0 if i < 0 else e.head + i * lanes
        m = e.head if i < 0 else (lanes if i < e.strips else e.rest)
        if m == 0:
            continue
        g, b = gamma + at, beta + at
        if m < lanes:
            memcpy(at_end, x + at * item, m * item)
            memcpy(ends, g, m * sizeof(T))
            memcpy(&ends[LANES], b, m * sizeof(T))
            at_x, g, b = read(way, at_end, lanes, room), &ends[0], &ends[LANES]
        else:
            at_x = read(way, x + at * item, lanes, room)
        for j in range(lanes):
            v[j] = ((at_x[j] - hi) - lo) * r * g[j] + b[j]
        write_strip(way, stream and 0 <= i < e.strips, v,
                    y + at * item if m == lanes else at_end + STRIP)
        if m < lanes:
            put_end(stream, i < 0, seam, at_end + STRIP, m * item, y + at * item)


cdef inline void row_unscale(
    Way way,                    # a constant
    bint stream,                # past the caches; only where has_lines
    const char* dy,             # IN  (n,)
    const char* x,              # IN  (n,)
    const T* gamma,             # IN  (n,)
    char* dx,                   # OUT (n,), may be dy or x
    Py_ssize_t n,
    const T* row,               # IN  (ROW_TERMS,)
    T* a,                       # IO  (n,) sums of dy * xhat
    T* b,                       # IO  (n,) sums of dy
    Seam* seam,                 # IO  where `stream`
) noexcept nogil:
    """dx = r * (dy * gamma - c1 - xhat * c2), with xhat = ((x - hi) - lo) * r"""
    cdef T v[LANES]
    cdef T room[2 * LANES]
    cdef T ends[3 * LANES]
    cdef char at_end[3 * STRIP]
    cdef const T* at_x
    cdef const T* at_dy
    cdef const T* g
    cdef T* to_a
    cdef T* to_b
    cdef T xhat
    cdef T hi = row[HI_OF_ROW], lo = row[LO_OF_ROW], r = row[R_OF_ROW]
    cdef T c1 = row[C1_OF_ROW], c2 = row[C2_OF_ROW]
    cdef Ends e = ends_of(way, dx, stream, n, hi)
    cdef Py_ssize_t lanes = lanes_of(hi), item = item_of(way, hi), i, j, at, m
    for i in range(-1, e.strips + 1):
        at = 0 if i < 0 else e.head + i * lanes
        m = e.head if i < 0 else (lanes if i < e.strips else e.rest)
        if m == 0:
            continue
        g, to_a, to_b = gamma + at, a + at, b + at
        if m < lanes:
            memcpy(at_end, x + at * item, m * item)
            memcpy(at_end + STRIP, dy + at * item, m * item)
            memcpy(ends, g, m * sizeof(T))
            memcpy(&ends[LANES], to_a, m * sizeof(T))
            memcpy(&ends[2 * LANES], to_b, m * sizeof(T))
            at_x = read(way, at_end, lanes, room)
            at_dy = read(way, at_end + STRIP, lanes, room + LANES)
            g, to_a, to_b = &ends[0], &ends[LANES], &ends[2 * LANES]
        else:
            at_x = read(way, x + at * item, lanes, room)
            at_dy = read(way, dy + at * item, lanes, room + LANES)
        for j in range(lanes):
            xhat = ((at_x[j] - hi) - lo) * r
            to_a[j] += at_dy[j] * xhat
            to_b[j] += at_dy[j]
            v[j] = ((at_dy[j] * g[j] - c1) - xhat * c2) * r
        write_strip(way, stream and 0 <= i < e.strips, v,
                    dx + at * item if m == lanes else at_end + 2 * STRIP)
        if m < lanes:
            put_end(stream, i < 0, seam, at_end + 2 * STRIP, m * item, dx + at * item)
            memcpy(a + at, to_a, m * sizeof(T))
            memcpy(b + at, to_b, m * sizeof(T))
