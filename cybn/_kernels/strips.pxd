# cython: cdivision=True
# Half types LANES values at a time: widened, computed on by the loops of float32, and narrowed.
#
# A strip is so short that its loops unroll, and what one hands to the next stays in registers:
# half the time of stages on pieces of 1024 values. Sums do the same by lanes() of runs.pxd.
# `loop` and `storage` are constants in every call, so that each has code of its own.

from libc.stdint cimport uint16_t
from libc.string cimport memcpy, memset

from cybn._kernels.columns cimport row_scale, row_unscale
from cybn._kernels.half cimport Storage, narrow, widen
from cybn._kernels.rows cimport col_dots2, col_dots, col_scale, col_sums, col_sums4, col_unscale
from cybn._kernels.runs cimport LANES, scale, unscale

cdef enum Loop:         # of runs, columns and rows
    SCALE_RUN
    SCALE_COLUMNS
    SCALE_ROW
    UNSCALE_RUN
    UNSCALE_COLUMNS
    UNSCALE_ROW

cdef struct Terms:      # what goes into a loop besides dy and x
    const float* hi     # one number; one a column for columns
    const float* a      # likewise; gamma of rows
    const float* k
    const float* b      # likewise; beta of rows
    float low, high
    float lo, r, c1, c2         # rows
    float* dgamma               # rows: sums, as in columns.pxd
    float* dbeta


cdef inline void strip(
    Loop loop, Storage storage, const uint16_t* dy, const uint16_t* x, uint16_t* y,
    Py_ssize_t i, Py_ssize_t n, const Terms* t,
) noexcept nogil:
    """Values i..i + n, at most LANES."""
    cdef float of_x[LANES]
    cdef float of_dy[LANES]
    cdef float of_y[LANES]
    widen(x + i, of_x, n, storage)
    if loop >= UNSCALE_RUN:
        widen(dy + i, of_dy, n, storage)
    if loop == SCALE_RUN:
        scale(of_x, of_y, n, t.hi[0], t.a[0], t.b[0], t.low, t.high)
    elif loop == SCALE_COLUMNS:
        col_scale(of_x, of_y, n, t.hi + i, t.a + i, t.b + i, t.low, t.high)
    elif loop == SCALE_ROW:
        row_scale(of_x, t.a + i, t.b + i, of_y, n, t.hi[0], t.lo, t.r)
    elif loop == UNSCALE_RUN:
        unscale(of_dy, of_x, of_y, n, t.hi[0], t.a[0], t.k[0], t.b[0], 0, False)
    elif loop == UNSCALE_COLUMNS:
        col_unscale(of_dy, of_x, of_y, n, t.hi + i, t.a + i, t.k + i, t.b + i, t.k + i, False)
    else:
        row_unscale(of_dy, of_x, t.a + i, of_y, n, t.hi[0], t.lo, t.r, t.c1, t.c2,
                    t.dgamma + i, t.dbeta + i)
    narrow(of_y, y + i, n, storage)


cdef inline void strips(
    Loop loop,
    Storage storage,
    const uint16_t* dy,         # IN  (n,) where loop needs it
    const uint16_t* x,          # IN  (n,)
    uint16_t* y,                # OUT (n,), may be dy or x
    Py_ssize_t n,
    const Terms* t,
) noexcept nogil:
    cdef Py_ssize_t i, full = n - n % LANES
    for i in range(full // LANES):
        strip(loop, storage, dy, x, y, i * LANES, LANES, t)
    if full < n and (loop == SCALE_RUN or loop == UNSCALE_RUN):
        last_strip(loop, storage, dy + full, x + full, y + full, n - full, t)
    elif full < n:
        strip(loop, storage, dy, x, y, full, n - full, t)


cdef inline void last_strip(
    Loop loop, Storage storage, const uint16_t* dy, const uint16_t* x, uint16_t* y,
    Py_ssize_t n, const Terms* t,
) noexcept nogil:
    """A strip of n values, filled up to LANES: short runs are mostly ends."""
    cdef uint16_t of_dy[LANES]
    cdef uint16_t of_x[LANES]
    cdef uint16_t of_y[LANES]
    memset(of_x, 0, sizeof(of_x))
    memset(of_dy, 0, sizeof(of_dy))
    memcpy(of_x, x, n * sizeof(uint16_t))
    if loop == UNSCALE_RUN:
        memcpy(of_dy, dy, n * sizeof(uint16_t))
    strip(loop, storage, of_dy, of_x, of_y, 0, LANES, t)
    memcpy(y, of_y, n * sizeof(uint16_t))


cdef inline void col_sum_strips(
    Storage storage,
    const uint16_t* x,              # IN  (rows, w), rows `stride` apart
    Py_ssize_t stride,
    Py_ssize_t rows,
    Py_ssize_t w,
    const float* restrict shift,    # IN  (w,)
    float* restrict a,              # IO  (w,) sums of d = x - shift
    float* restrict b,              # IO  (w,) sums of d * d
) noexcept nogil:
    """col_sums: four rows at once, then one by one."""
    cdef float v[4 * LANES]
    cdef Py_ssize_t n = 0, s, full = w // LANES, many
    while n < rows:
        many = 4 if rows - n >= 4 else 1
        for s in range(full if many == 4 else 0):
            widen_rows(storage, x + s * LANES, stride, 4, LANES, v)
            col_sums4(v, v + LANES, v + 2 * LANES, v + 3 * LANES, LANES,
                      shift + s * LANES, a + s * LANES, b + s * LANES)
        for s in range(full if many == 4 else 0, (w + LANES - 1) // LANES):
            widen_rows(storage, x + s * LANES, stride, many, min(LANES, w - s * LANES), v)
            col_sums(v, LANES, many, min(LANES, w - s * LANES), shift + s * LANES,
                     a + s * LANES, b + s * LANES)
        x += many * stride
        n += many


cdef inline void widen_rows(
    Storage storage, const uint16_t* x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t w, float* v
) noexcept nogil:
    cdef Py_ssize_t n
    for n in range(rows):
        widen(x + n * stride, v + n * LANES, w, storage)


cdef inline void col_dot_strips(
    Storage storage,
    const uint16_t* dy,             # IN  (rows, w), rows `dy_stride` apart
    Py_ssize_t dy_stride,
    const uint16_t* x,              # IN  (rows, w), rows `stride` apart
    Py_ssize_t stride,
    Py_ssize_t rows,
    Py_ssize_t w,
    const float* restrict hi,       # IN  (w,)
    float* restrict a,              # IO  (w,) sums of dy
    float* restrict b,              # IO  (w,) sums of dy * (x - hi)
) noexcept nogil:
    """col_dots: two rows at once, then the last."""
    cdef float v[2 * LANES]
    cdef float g[2 * LANES]
    cdef const float* h
    cdef Py_ssize_t n = 0, s, full = w // LANES, many, m
    while n < rows:
        many = 2 if rows - n >= 2 else 1
        for s in range(full if many == 2 else 0):
            h = hi + s * LANES
            widen_rows(storage, x + s * LANES, stride, 2, LANES, v)
            widen_rows(storage, dy + s * LANES, dy_stride, 2, LANES, g)
            col_dots2(g, g + LANES, v, v + LANES, LANES, h, h, h, False,
                      a + s * LANES, b + s * LANES)
        for s in range(full if many == 2 else 0, (w + LANES - 1) // LANES):
            h = hi + s * LANES
            m = min(LANES, w - s * LANES)
            widen_rows(storage, x + s * LANES, stride, many, m, v)
            widen_rows(storage, dy + s * LANES, dy_stride, many, m, g)
            col_dots(g, LANES, v, LANES, many, m, h, h, h, False, a + s * LANES, b + s * LANES)
        x += many * stride
        dy += many * dy_stride
        n += many
