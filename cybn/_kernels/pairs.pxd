# cython: cdivision=True
# bfloat16 two at a time: widen, compute and narrow in one loop.
#
# Two neighbours are one 32-bit word. Its upper half is the second number as a float32 once the
# lower half is cleared; the lower half is the first one once it is shifted up. Results are put
# together in the same way, so nothing moves across the vector, and neither widened nor narrowed
# values go through L1: 0.2 ns a value where three stages take 0.4. What differs by column comes
# apart likewise: that of even columns first, that of odd ones from `half` on. Sums are those of
# runs.pxd and rows.pxd, in the same order, to the bit.

from libc.stdint cimport uint16_t, uint32_t
from libc.string cimport memcpy

from cybn._kernels.half cimport number, rounded
from cybn._kernels.runs cimport LANES, clamp, flush, unbounded


cdef inline uint32_t pair(const uint16_t* h) noexcept nogil:
    cdef uint32_t w
    memcpy(&w, h, sizeof(w))
    return w


cdef inline void put_pair(uint16_t* h, float first, float second) noexcept nogil:
    cdef uint32_t w = rounded(first) >> 16 | (rounded(second) & 0xFFFF0000U)
    memcpy(h, &w, sizeof(w))


cdef inline float first(uint32_t w) noexcept nogil:
    return number(w << 16)


cdef inline float second(uint32_t w) noexcept nogil:
    return number(w & 0xFFFF0000U)


cdef inline void sum_pairs(
    const uint16_t* restrict x,     # IN  (n,), n <= PIECE
    Py_ssize_t n,
    float shift,
    double* restrict acc,           # IO  (2, WIDE): sums of d and of d * d, d = x - shift
) noexcept nogil:
    cdef float a[LANES]
    cdef float b[LANES]
    cdef float even[LANES]          # sums of d, then of d * d
    cdef float odd[LANES]
    cdef float d
    cdef uint32_t w
    cdef Py_ssize_t i, j, half = LANES // 2, full = n - n % LANES
    for j in range(LANES):
        even[j] = 0
        odd[j] = 0
    for i in range(full // LANES):
        for j in range(half):
            w = pair(x + i * LANES + 2 * j)
            d = first(w) - shift
            even[j] += d
            even[half + j] += d * d
            d = second(w) - shift
            odd[j] += d
            odd[half + j] += d * d
    for j in range(half):
        a[2 * j] = even[j]
        a[2 * j + 1] = odd[j]
        b[2 * j] = even[half + j]
        b[2 * j + 1] = odd[half + j]
    for j in range(n - full):
        d = first(x[full + j]) - shift
        a[j] += d
        b[j] += d * d
    flush(a, b, acc)


cdef inline void col_sum_pairs(
    const uint16_t* restrict x,     # IN  (rows, w), rows `stride` apart
    Py_ssize_t stride,
    Py_ssize_t rows,
    Py_ssize_t w,
    Py_ssize_t half,
    const float* restrict shift,    # IN  (2 * half,) of even, then of odd columns, like a and b
    float* restrict a,              # IO  (2 * half,) sums of d = x - shift
    float* restrict b,              # IO  (2 * half,) sums of d * d
) noexcept nogil:
    cdef Py_ssize_t n, i, four = rows - rows % 4
    cdef float d
    for n in range(0, four, 4):
        col_sum_pairs4(x + n * stride, x + (n + 1) * stride, x + (n + 2) * stride,
                       x + (n + 3) * stride, w, half, shift, a, b)
    for n in range(four, rows):
        for i in range((w + 1) // 2):
            d = first(x[n * stride + 2 * i]) - shift[i]
            a[i] += d
            b[i] += d * d
        for i in range(half, half + w // 2):
            d = first(x[n * stride + 2 * (i - half) + 1]) - shift[i]
            a[i] += d
            b[i] += d * d


cdef inline void col_sum_pairs4(
    const uint16_t* restrict x0,
    const uint16_t* restrict x1,
    const uint16_t* restrict x2,
    const uint16_t* restrict x3,
    Py_ssize_t w,
    Py_ssize_t half,
    const float* restrict shift,
    float* restrict a,
    float* restrict b,
) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint32_t w0, w1, w2, w3
    for i in range(w // 2):
        w0 = pair(x0 + 2 * i)
        w1 = pair(x1 + 2 * i)
        w2 = pair(x2 + 2 * i)
        w3 = pair(x3 + 2 * i)
        add4(first(w0), first(w1), first(w2), first(w3), shift + i, a + i, b + i)
        add4(second(w0), second(w1), second(w2), second(w3), shift + half + i, a + half + i,
             b + half + i)
    if w % 2:
        i = w // 2
        add4(first(x0[w - 1]), first(x1[w - 1]), first(x2[w - 1]), first(x3[w - 1]),
             shift + i, a + i, b + i)


cdef inline void add4(
    float x0, float x1, float x2, float x3, const float* shift, float* a, float* b
) noexcept nogil:
    cdef float d0 = x0 - shift[0], d1 = x1 - shift[0], d2 = x2 - shift[0], d3 = x3 - shift[0]
    a[0] += (d0 + d1) + (d2 + d3)
    b[0] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)


cdef inline void dot_pairs(
    const uint16_t* restrict dy,    # IN  (n,), n <= PIECE
    const uint16_t* restrict x,     # IN  (n,)
    Py_ssize_t n,
    float hi,
    double* restrict acc,           # IO  (2, WIDE): sums of dy and of dy * (x - hi)
) noexcept nogil:
    cdef float a[LANES]
    cdef float b[LANES]
    cdef float even[LANES]          # sums of dy, then of dy * (x - hi)
    cdef float odd[LANES]
    cdef uint32_t w, g
    cdef Py_ssize_t i, j, half = LANES // 2, full = n - n % LANES
    for j in range(LANES):
        even[j] = 0
        odd[j] = 0
    for i in range(full // LANES):
        for j in range(half):
            w = pair(x + i * LANES + 2 * j)
            g = pair(dy + i * LANES + 2 * j)
            even[j] += first(g)
            even[half + j] += first(g) * (first(w) - hi)
            odd[j] += second(g)
            odd[half + j] += second(g) * (second(w) - hi)
    for j in range(half):
        a[2 * j] = even[j]
        a[2 * j + 1] = odd[j]
        b[2 * j] = even[half + j]
        b[2 * j + 1] = odd[half + j]
    for j in range(n - full):
        a[j] += first(dy[full + j])
        b[j] += first(dy[full + j]) * (first(x[full + j]) - hi)
    flush(a, b, acc)


cdef inline void col_dot_pairs(
    const uint16_t* restrict dy,    # IN  (rows, w), rows `dy_stride` apart
    Py_ssize_t dy_stride,
    const uint16_t* restrict x,     # IN  (rows, w), rows `stride` apart
    Py_ssize_t stride,
    Py_ssize_t rows,
    Py_ssize_t w,
    Py_ssize_t half,
    const float* restrict hi,       # IN  (2 * half,) of even, then of odd columns, like a and b
    float* restrict a,              # IO  (2 * half,) sums of dy
    float* restrict b,              # IO  (2 * half,) sums of dy * (x - hi)
) noexcept nogil:
    cdef Py_ssize_t n, i, two = rows - rows % 2
    for n in range(0, two, 2):
        col_dot_pairs2(dy + n * dy_stride, dy + (n + 1) * dy_stride,
                       x + n * stride, x + (n + 1) * stride, w, half, hi, a, b)
    if rows % 2:
        dy += two * dy_stride
        x += two * stride
        for i in range((w + 1) // 2):
            a[i] += first(dy[2 * i])
            b[i] += first(dy[2 * i]) * (first(x[2 * i]) - hi[i])
        for i in range(w // 2):
            a[half + i] += first(dy[2 * i + 1])
            b[half + i] += first(dy[2 * i + 1]) * (first(x[2 * i + 1]) - hi[half + i])


cdef inline void col_dot_pairs2(
    const uint16_t* restrict dy0,
    const uint16_t* restrict dy1,
    const uint16_t* restrict x0,
    const uint16_t* restrict x1,
    Py_ssize_t w,
    Py_ssize_t half,
    const float* restrict hi,
    float* restrict a,
    float* restrict b,
) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint32_t w0, w1, g0, g1
    for i in range(w // 2):
        w0 = pair(x0 + 2 * i)
        w1 = pair(x1 + 2 * i)
        g0 = pair(dy0 + 2 * i)
        g1 = pair(dy1 + 2 * i)
        dot2(first(g0), first(g1), first(w0), first(w1), hi + i, a + i, b + i)
        dot2(second(g0), second(g1), second(w0), second(w1), hi + half + i, a + half + i,
             b + half + i)
    if w % 2:
        i = w // 2
        dot2(first(dy0[w - 1]), first(dy1[w - 1]), first(x0[w - 1]), first(x1[w - 1]),
             hi + i, a + i, b + i)


cdef inline void dot2(
    float g0, float g1, float x0, float x1, const float* hi, float* a, float* b
) noexcept nogil:
    a[0] += g0 + g1
    b[0] += g0 * (x0 - hi[0]) + g1 * (x1 - hi[0])


cdef inline void scale_pairs(
    const uint16_t* restrict x,     # IN  (n,)
    uint16_t* restrict y,           # OUT (n,)
    Py_ssize_t n,
    float hi,
    float a,
    float b,
    float low,
    float high,
) noexcept nogil:
    """y = (x - hi) * a + b, clamped"""
    cdef Py_ssize_t i
    cdef uint32_t w
    if unbounded(low, high):
        for i in range(n // 2):
            w = pair(x + 2 * i)
            put_pair(y + 2 * i, (first(w) - hi) * a + b, (second(w) - hi) * a + b)
    else:
        for i in range(n // 2):
            w = pair(x + 2 * i)
            put_pair(y + 2 * i, clamp((first(w) - hi) * a + b, low, high),
                     clamp((second(w) - hi) * a + b, low, high))
    if n % 2:
        w = x[n - 1]
        y[n - 1] = rounded(clamp((first(w) - hi) * a + b, low, high)) >> 16


cdef inline void col_scale_pairs(
    const uint16_t* restrict x,     # IN  (n,)
    uint16_t* restrict y,           # OUT (n,)
    Py_ssize_t n,
    Py_ssize_t half,
    const float* restrict hi,       # IN  (2 * half,) of even, then of odd columns
    const float* restrict a,        # IN  (2 * half,)
    const float* restrict b,        # IN  (2 * half,)
    float low,
    float high,
) noexcept nogil:
    """y = (x - hi) * a + b, clamped"""
    cdef Py_ssize_t i
    cdef uint32_t w
    if unbounded(low, high):
        for i in range(n // 2):
            w = pair(x + 2 * i)
            put_pair(y + 2 * i, (first(w) - hi[i]) * a[i] + b[i],
                     (second(w) - hi[half + i]) * a[half + i] + b[half + i])
    else:
        for i in range(n // 2):
            w = pair(x + 2 * i)
            put_pair(y + 2 * i, clamp((first(w) - hi[i]) * a[i] + b[i], low, high),
                     clamp((second(w) - hi[half + i]) * a[half + i] + b[half + i], low, high))
    i = n // 2
    if n % 2:
        w = x[n - 1]
        y[n - 1] = rounded(clamp((first(w) - hi[i]) * a[i] + b[i], low, high)) >> 16


cdef inline void unscale_pairs(
    const uint16_t* restrict dy,    # IN  (n,)
    const uint16_t* restrict x,     # IN  (n,)
    uint16_t* restrict dx,          # OUT (n,)
    Py_ssize_t n,
    float hi,
    float a,
    float k,
    float b,
) noexcept nogil:
    """dx = dy * a + (x - hi) * k + b"""
    cdef Py_ssize_t i
    cdef uint32_t w, g
    for i in range(n // 2):
        w = pair(x + 2 * i)
        g = pair(dy + 2 * i)
        put_pair(dx + 2 * i, first(g) * a + (first(w) - hi) * k + b,
                 second(g) * a + (second(w) - hi) * k + b)
    if n % 2:
        w = x[n - 1]
        dx[n - 1] = rounded(first(dy[n - 1]) * a + (first(w) - hi) * k + b) >> 16


cdef inline void col_unscale_pairs(
    const uint16_t* restrict dy,    # IN  (n,)
    const uint16_t* restrict x,     # IN  (n,)
    uint16_t* restrict dx,          # OUT (n,)
    Py_ssize_t n,
    Py_ssize_t half,
    const float* restrict hi,       # IN  (2 * half,) of even, then of odd columns
    const float* restrict a,        # IN  (2 * half,)
    const float* restrict k,        # IN  (2 * half,)
    const float* restrict b,        # IN  (2 * half,)
) noexcept nogil:
    """dx = dy * a + (x - hi) * k + b"""
    cdef Py_ssize_t i, j
    cdef uint32_t w, g
    for i in range(n // 2):
        j = half + i
        w = pair(x + 2 * i)
        g = pair(dy + 2 * i)
        put_pair(dx + 2 * i, first(g) * a[i] + (first(w) - hi[i]) * k[i] + b[i],
                 second(g) * a[j] + (second(w) - hi[j]) * k[j] + b[j])
    i = n // 2
    if n % 2:
        w = x[n - 1]
        dx[n - 1] = rounded(first(dy[n - 1]) * a[i] + (first(w) - hi[i]) * k[i] + b[i]) >> 16


cdef inline void unzip(
    float* v, Py_ssize_t n, Py_ssize_t half, float* restrict scratch
) noexcept nogil:
    """Bring the even ones of n values to the front, and the odd ones to v[half:]."""
    cdef Py_ssize_t i
    memcpy(scratch, v, n * sizeof(float))
    for i in range(n // 2):
        v[i] = scratch[2 * i]
        v[half + i] = scratch[2 * i + 1]
    if n % 2:
        v[n // 2] = scratch[n - 1]


cdef inline void zip_up(
    float* v, Py_ssize_t n, Py_ssize_t half, float* restrict scratch
) noexcept nogil:
    """Undo unzip."""
    cdef Py_ssize_t i
    memcpy(scratch, v, 2 * half * sizeof(float))
    for i in range(n // 2):
        v[2 * i] = scratch[i]
        v[2 * i + 1] = scratch[half + i]
    if n % 2:
        v[n - 1] = scratch[n // 2]
