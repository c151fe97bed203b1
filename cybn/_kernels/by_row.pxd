# cython: cdivision=True
# Loops along a row that has one mean and variance, with a gamma and beta for each value.
#
#   loop           reads            writes     bytes per element (float32); gamma, beta are in L1
#   row_dots       dy, x            -          8
#   row_scale      x                y          8
#   row_unscale    dy, x            dx        12
#
# The mean is given as hi + lo, both of type T, which are subtracted one after the other. The first
# subtraction is exact if x is within a factor of two of hi, so the error does not grow with
# |mean| / std (docs/math.md, 7.5).
#
# The same loops handle the values at the ends of a row that do not fill a strip.

from cybn._kernels.lanes cimport (
    LANES, PLAIN, STRIP, T, WIDE, Way, clear, flush, item_of, read, write, write_strip)
from cybn._kernels.loops cimport Ends, end_of_run, ends_of, lanes_of
from cybn._kernels.writes cimport Seam, put_head, put_rest

cdef enum:
    HI_OF_ROW = 0           # indices of the constants of a row
    LO_OF_ROW = 1
    R_OF_ROW = 2            # one over the standard deviation
    C1_OF_ROW = 3           # mean of dz = dy * gamma
    C2_OF_ROW = 4           # mean of dz * xhat
    ROW_TERMS = 5


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


cdef inline void put_some(
    Way way, bint stream, bint first, Seam* seam, const T* v, Py_ssize_t m, char* y
) noexcept nogil:
    """Write the m values of a row that come before or after its whole strips."""
    cdef char end[STRIP]
    if not stream:
        write(way, v, y, m)
        return
    write(way, v, end, m)
    if first:
        put_head(seam, end, m * item_of(way, v[0]), y)
    else:
        put_rest(seam, end, m * item_of(way, v[0]), y)


cdef inline void scale_values(
    const T* x,                 # IN  (m,)
    const T* gamma,             # IN  (m,)
    const T* beta,              # IN  (m,)
    T* v,                       # OUT (m,)
    Py_ssize_t m,
    const T* row,               # IN  (ROW_TERMS,)
) noexcept nogil:
    cdef T hi = row[HI_OF_ROW], lo = row[LO_OF_ROW], r = row[R_OF_ROW]
    cdef Py_ssize_t j
    for j in range(m):
        v[j] = ((x[j] - hi) - lo) * r * gamma[j] + beta[j]


cdef inline void row_scale(
    Way way,                    # a constant
    bint stream,                # write past the caches; only if has_lines
    const char* x,              # IN  (n,)
    const T* gamma,             # IN  (n,)
    const T* beta,              # IN  (n,)
    char* y,                    # OUT (n,), may be x
    Py_ssize_t n,
    const T* row,               # IN  (ROW_TERMS,)
    Seam* seam,                 # IO  used if `stream`
) noexcept nogil:
    """Compute y = ((x - hi) - lo) * r * gamma + beta."""
    cdef T v[LANES]
    cdef T room[LANES]
    cdef Ends e = ends_of(way, y, stream, n, row[0])
    cdef Py_ssize_t item = item_of(way, row[0]), i, at, m
    for i in range(-1, e.strips + 1):
        at = 0 if i < 0 else e.head + i * e.lanes
        if 0 <= i < e.strips:
            scale_values(read(way, x + at * item, lanes_of(row[0]), room), gamma + at, beta + at, v,
                         lanes_of(row[0]), row)
            write_strip(way, stream, v, y + at * item)
            continue
        m = e.head if i < 0 else e.rest
        if m > 0:
            scale_values(read(way, x + at * item, m, room), gamma + at, beta + at, v, m, row)
            put_some(way, stream, i < 0, seam, v, m, y + at * item)


cdef inline void unscale_values(
    const T* dy,                # IN  (m,)
    const T* x,                 # IN  (m,)
    const T* gamma,             # IN  (m,)
    T* restrict v,              # OUT (m,)
    Py_ssize_t m,
    const T* row,               # IN  (ROW_TERMS,)
    T* restrict a,              # IO  (m,) sums of dy * xhat
    T* restrict b,              # IO  (m,) sums of dy
) noexcept nogil:
    cdef T hi = row[HI_OF_ROW], lo = row[LO_OF_ROW], r = row[R_OF_ROW]
    cdef T c1 = row[C1_OF_ROW], c2 = row[C2_OF_ROW], xhat
    cdef Py_ssize_t j
    for j in range(m):
        xhat = ((x[j] - hi) - lo) * r
        a[j] += dy[j] * xhat
        b[j] += dy[j]
        v[j] = ((dy[j] * gamma[j] - c1) - xhat * c2) * r


cdef inline void row_unscale(
    Way way,                    # a constant
    bint stream,                # write past the caches; only if has_lines
    const char* dy,             # IN  (n,)
    const char* x,              # IN  (n,)
    const T* gamma,             # IN  (n,)
    char* dx,                   # OUT (n,), may be dy or x
    Py_ssize_t n,
    const T* row,               # IN  (ROW_TERMS,)
    T* a,                       # IO  (n,) sums of dy * xhat
    T* b,                       # IO  (n,) sums of dy
    Seam* seam,                 # IO  used if `stream`
) noexcept nogil:
    """Compute dx = r * (dy * gamma - c1 - xhat * c2), with xhat = ((x - hi) - lo) * r."""
    cdef T v[LANES]
    cdef T room[2 * LANES]
    cdef const T* at_x
    cdef const T* at_dy
    cdef Ends e = ends_of(way, dx, stream, n, row[0])
    cdef Py_ssize_t item = item_of(way, row[0]), i, at, m
    for i in range(-1, e.strips + 1):
        at = 0 if i < 0 else e.head + i * e.lanes
        m = e.head if i < 0 else (e.lanes if i < e.strips else e.rest)
        if m == 0:
            continue
        at_x = read(way, x + at * item, m, room)
        at_dy = read(way, dy + at * item, m, room + LANES)
        if 0 <= i < e.strips:
            unscale_values(at_dy, at_x, gamma + at, v, lanes_of(row[0]), row, a + at, b + at)
            write_strip(way, stream, v, dx + at * item)
        else:
            unscale_values(at_dy, at_x, gamma + at, v, m, row, a + at, b + at)
            put_some(way, stream, i < 0, seam, v, m, dx + at * item)
