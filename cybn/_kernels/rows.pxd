# cython: cdivision=True
# The rows family: short S, and channels-last, where S = 1.
#
# A tile is m neighbouring channels over some rows n: in each row, w = m * S neighbouring values.
# Sums go down the columns; per-channel values are spread over the S columns of their channel.
# No sum across a vector a run, no tail a run, and vectors cross the borders of channels.
#
#   pass          reads          writes   bytes an element (float32)
#   col_sums      x              -        4
#   col_dots      dy, x          -        8
#   col_scale     x              y        8
#   col_unscale   dy, x          dx       12
#
# a. TILE. Three or four vectors of w values (shift and two sums; then hi, a, k, b) have to sit in
#    L1 beside the rows. 512 columns took 12 % more time than 1024, 2048 the same. Channels-last,
#    a row of up to BROAD float32 stays in one piece: split, it took 1.2 to 1.6 times as long.
# b. Four rows a sweep: the two sums are loaded and stored once for four rows. Eight gained
#    nothing, and rows whose stride is a multiple of 4096 bytes share one set of an 8-way L1.
#    Channels-last, those rows lie far apart: four long streams, which memory follows; from there
#    four neighbouring rows took 1.4 to 2.5 times as long.
# c. FLUSH. The column sums in T collect at most FLUSH rows, then go to float64.

from cybn._kernels.runs cimport T, WIDE, across, clamp, gate, unbounded

cdef enum:
    TILE = 1024     # columns of a tile
    BROAD = 2048    # the same, of plain float32 channels-last
    ROOM = 16       # values more that an array has, to begin on a line
    FLUSH = 32      # rows between two flushes to float64


cdef inline T* on_line(T* array) noexcept nogil:
    """Where the first cache line of an array begins that has ROOM to spare.

    gcc aligns arrays on the stack to 16 bytes; vectors of 32 that cross lines took 1.3 to 1.5
    times as long in cache.
    """
    return <T*> ((<size_t> array + 63) & ~(<size_t> 63))


cdef inline void col_sums(
    const T* restrict x,        # IN  (rows, w), rows `stride` apart
    Py_ssize_t stride,
    Py_ssize_t rows,
    Py_ssize_t w,
    const T* restrict shift,    # IN  (w,)
    T* restrict a,              # IO  (w,) sums of d = x - shift
    T* restrict b,              # IO  (w,) sums of d * d
) noexcept nogil:
    cdef Py_ssize_t n, j, four = rows - rows % 4
    for n in range(0, four, 4):
        col_sums4(x + n * stride, x + (n + 1) * stride, x + (n + 2) * stride,
                  x + (n + 3) * stride, w, shift, a, b)
    for n in range(four, rows):
        for j in range(w):
            a[j] += x[n * stride + j] - shift[j]
            b[j] += (x[n * stride + j] - shift[j]) * (x[n * stride + j] - shift[j])


cdef inline void col_sums4(
    const T* restrict x0,
    const T* restrict x1,
    const T* restrict x2,
    const T* restrict x3,
    Py_ssize_t w,
    const T* restrict shift,
    T* restrict a,
    T* restrict b,
) noexcept nogil:
    cdef Py_ssize_t j
    cdef T d0, d1, d2, d3
    for j in range(w):
        d0 = x0[j] - shift[j]
        d1 = x1[j] - shift[j]
        d2 = x2[j] - shift[j]
        d3 = x3[j] - shift[j]
        a[j] += (d0 + d1) + (d2 + d3)
        b[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)


cdef inline void col_dots(
    const T* restrict dy,       # IN  (rows, w), rows `dy_stride` apart
    Py_ssize_t dy_stride,
    const T* restrict x,        # IN  (rows, w), rows `stride` apart
    Py_ssize_t stride,
    Py_ssize_t rows,
    Py_ssize_t w,
    const T* restrict hi,       # IN  (w,)
    const T* restrict scale_a,  # IN  (w,) z = (x - hi) * scale_a + scale_b
    const T* restrict scale_b,  # IN  (w,)
    bint relu,                  # a constant: g = dy, or dy through the relu of z
    T* restrict a,              # IO  (w,) sums of g
    T* restrict b,              # IO  (w,) sums of g * (x - hi)
) noexcept nogil:
    cdef Py_ssize_t n, j, two = rows - rows % 2
    cdef T d, g
    for n in range(0, two, 2):
        col_dots2(dy + n * dy_stride, dy + (n + 1) * dy_stride,
                  x + n * stride, x + (n + 1) * stride, w, hi, scale_a, scale_b, relu, a, b)
    for n in range(two, rows):
        for j in range(w):
            d = x[n * stride + j] - hi[j]
            g = dy[n * dy_stride + j]
            g = gate(g, d * scale_a[j] + scale_b[j]) if relu else g
            a[j] += g
            b[j] += g * d


cdef inline void col_dots2(
    const T* restrict dy0,
    const T* restrict dy1,
    const T* restrict x0,
    const T* restrict x1,
    Py_ssize_t w,
    const T* restrict hi,
    const T* restrict scale_a,
    const T* restrict scale_b,
    bint relu,
    T* restrict a,
    T* restrict b,
) noexcept nogil:
    cdef Py_ssize_t j
    cdef T d0, d1, g0, g1
    for j in range(w):
        d0 = x0[j] - hi[j]
        d1 = x1[j] - hi[j]
        g0 = gate(dy0[j], d0 * scale_a[j] + scale_b[j]) if relu else dy0[j]
        g1 = gate(dy1[j], d1 * scale_a[j] + scale_b[j]) if relu else dy1[j]
        a[j] += g0 + g1
        b[j] += g0 * d0 + g1 * d1


cdef inline void col_dots2_add(
    const T* restrict dy0,
    const T* restrict dy1,
    const T* restrict x0,
    const T* restrict x1,
    const T* restrict r0,
    const T* restrict r1,
    T* restrict g0,             # OUT (w,) dy through relu at (x - hi) * scale_a + scale_b + r
    T* restrict g1,
    Py_ssize_t w,
    const T* restrict hi,
    const T* restrict scale_a,
    const T* restrict scale_b,
    T* restrict a,
    T* restrict b,
) noexcept nogil:
    """col_dots2 after a residual and relu; g is its gradient."""
    cdef Py_ssize_t j
    cdef T d0, d1
    for j in range(w):
        d0 = x0[j] - hi[j]
        d1 = x1[j] - hi[j]
        g0[j] = gate(dy0[j], d0 * scale_a[j] + scale_b[j] + r0[j])
        g1[j] = gate(dy1[j], d1 * scale_a[j] + scale_b[j] + r1[j])
        a[j] += g0[j] + g1[j]
        b[j] += g0[j] * d0 + g1[j] * d1


cdef inline void col_dots_add(
    const T* restrict dy,
    const T* restrict x,
    const T* restrict r,
    T* restrict g,              # OUT (w,) dy through relu at (x - hi) * scale_a + scale_b + r
    Py_ssize_t w,
    const T* restrict hi,
    const T* restrict scale_a,
    const T* restrict scale_b,
    T* restrict a,
    T* restrict b,
) noexcept nogil:
    """col_dots of one row after a residual and relu; g is its gradient."""
    cdef Py_ssize_t j
    cdef T d
    for j in range(w):
        d = x[j] - hi[j]
        g[j] = gate(dy[j], d * scale_a[j] + scale_b[j] + r[j])
        a[j] += g[j]
        b[j] += g[j] * d


cdef inline void col_scale(
    const T* x,                 # IN  (w,)
    T* y,                       # OUT (w,), may be x
    Py_ssize_t w,
    const T* restrict hi,       # IN  (w,)
    const T* restrict a,        # IN  (w,)
    const T* restrict b,        # IN  (w,)
    T low,
    T high,
) noexcept nogil:
    """y = (x - hi) * a + b, clamped"""
    cdef Py_ssize_t j
    if unbounded(low, high):
        for j in range(w):
            y[j] = (x[j] - hi[j]) * a[j] + b[j]
    else:
        for j in range(w):
            y[j] = clamp((x[j] - hi[j]) * a[j] + b[j], low, high)


cdef inline void col_scale2(
    const T* restrict x0,
    const T* restrict x1,
    T* restrict y0,
    T* restrict y1,
    Py_ssize_t w,
    const T* restrict hi,
    const T* restrict a,
    const T* restrict b,
    T low,
    T high,
) noexcept nogil:
    """col_scale of two rows, where y is not x."""
    cdef Py_ssize_t j
    if unbounded(low, high):
        for j in range(w):
            y0[j] = (x0[j] - hi[j]) * a[j] + b[j]
            y1[j] = (x1[j] - hi[j]) * a[j] + b[j]
    else:
        for j in range(w):
            y0[j] = clamp((x0[j] - hi[j]) * a[j] + b[j], low, high)
            y1[j] = clamp((x1[j] - hi[j]) * a[j] + b[j], low, high)


cdef inline void col_scale_add(
    const T* x,
    const T* r,
    T* y,
    Py_ssize_t w,
    const T* restrict hi,
    const T* restrict a,
    const T* restrict b,
    T low,
    T high,
) noexcept nogil:
    """y = (x - hi) * a + b + r, clamped; y may be x or r"""
    cdef Py_ssize_t j
    for j in range(w):
        y[j] = clamp((x[j] - hi[j]) * a[j] + b[j] + r[j], low, high)


cdef inline void col_unscale(
    const T* dy,                # IN  (w,)
    const T* x,                 # IN  (w,)
    T* dx,                      # OUT (w,), may be dy or x
    Py_ssize_t w,
    const T* restrict hi,       # IN  (w,)
    const T* restrict a,        # IN  (w,)
    const T* restrict k,        # IN  (w,)
    const T* restrict b,        # IN  (w,)
    const T* restrict scale_b,  # IN  (w,)
    bint relu,                  # a constant: g = dy, or dy through relu at (x - hi) * a + scale_b
) noexcept nogil:
    """dx = g * a + (x - hi) * k + b"""
    cdef Py_ssize_t j
    cdef T d, g
    for j in range(w):
        d = x[j] - hi[j]
        g = gate(dy[j], d * a[j] + scale_b[j]) if relu else dy[j]
        dx[j] = g * a[j] + d * k[j] + b[j]


cdef inline void col_unscale2(
    const T* restrict dy0,
    const T* restrict dy1,
    const T* restrict x0,
    const T* restrict x1,
    T* restrict dx0,
    T* restrict dx1,
    Py_ssize_t w,
    const T* restrict hi,
    const T* restrict a,
    const T* restrict k,
    const T* restrict b,
    const T* restrict scale_b,
    bint relu,
) noexcept nogil:
    """col_unscale of two rows, where dx is neither dy nor x."""
    cdef Py_ssize_t j
    cdef T d0, d1, g0, g1
    for j in range(w):
        d0 = x0[j] - hi[j]
        d1 = x1[j] - hi[j]
        g0 = gate(dy0[j], d0 * a[j] + scale_b[j]) if relu else dy0[j]
        g1 = gate(dy1[j], d1 * a[j] + scale_b[j]) if relu else dy1[j]
        dx0[j] = g0 * a[j] + d0 * k[j] + b[j]
        dx1[j] = g1 * a[j] + d1 * k[j] + b[j]


cdef inline void spread(
    const T* v,                 # IN  (m,) may be the last m values of out
    Py_ssize_t m,
    Py_ssize_t s,
    T* out,                     # OUT (m * s,) each value s times
) noexcept nogil:
    cdef Py_ssize_t c, j
    cdef T value
    if s == 1 and v == out:
        return
    for c in range(m):
        value = v[c]
        for j in range(s):
            out[c * s + j] = value


cdef inline void repeat(
    T* v,                       # IO  (times * w,), the first w filled
    Py_ssize_t w,
    Py_ssize_t times,
) noexcept nogil:
    """Repeat the first w values of v."""
    cdef Py_ssize_t j
    for j in range(w, times * w):
        v[j] = v[j - w]


cdef inline double total(const T* restrict v, Py_ssize_t n) noexcept nogil:
    """Sum of n values in float64 lanes."""
    cdef double acc[WIDE]
    cdef Py_ssize_t i, j, full = n - n % WIDE
    for j in range(WIDE):
        acc[j] = 0
    for i in range(full // WIDE):
        for j in range(WIDE):
            acc[j] += v[i * WIDE + j]
    for j in range(n - full):
        acc[j] += v[full + j]
    return across(acc)


cdef inline void gather(
    T* restrict v,              # IO  (rows, m * s) column sums; zeroed
    Py_ssize_t m,
    Py_ssize_t s,
    Py_ssize_t rows,            # 1 unless s is 1
    double* restrict out,       # IO  (m,) sums of the channels
) noexcept nogil:
    """Add the columns of each channel to its float64 sum."""
    cdef double part[BROAD]
    cdef Py_ssize_t c, i
    if s == 1 and rows == 1:
        for c in range(m):
            out[c] += v[c]
            v[c] = 0
        return
    if s == 1:
        # The rows by themselves first: beside one huge value each would be rounded off.
        for c in range(m):
            part[c] = v[c]
        for i in range(1, rows):
            for c in range(m):
                part[c] += v[i * m + c]
        for c in range(m):
            out[c] += part[c]
    else:
        for c in range(m):
            out[c] += total(v + c * s, s)
    for c in range(rows * m * s):
        v[c] = 0
