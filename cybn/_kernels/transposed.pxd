# cython: cdivision=True
# Loops over a block of rows so short that they are transposed: each lane is a row.
#
# A block is up to LANES rows of D values of one group. Transposed, it has the shape (D, LANES), and
# it stays in L1 for both passes. No sum of a row crosses a vector, and the statistics of the rows
# are computed in vectors, too. Lanes without a row contain zeros.
#
# The formulas are those of by_row.pxd and of statistics.pxd.

from libc.math cimport fabs, sqrt

from cybn._kernels.lanes cimport FLUSH, LANES, T, WIDE, across, clear, flush
from cybn._kernels.problem cimport SAMPLES
from cybn._kernels.statistics cimport beyond, sample_of, settled

cdef extern from * nogil:
    """
    #if defined(__SSE2__)
    #include <xmmintrin.h>
    #endif

    /* Transpose four by four values. Compilers do not make shuffles of plain loops. */
    static inline void cybn_transpose4(const float *v, ptrdiff_t pitch, float *out,
                                       ptrdiff_t out_pitch) {
    #if defined(__SSE2__)
        __m128 a = _mm_loadu_ps(v), b = _mm_loadu_ps(v + pitch);
        __m128 c = _mm_loadu_ps(v + 2 * pitch), d = _mm_loadu_ps(v + 3 * pitch);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps(out, a);
        _mm_storeu_ps(out + out_pitch, b);
        _mm_storeu_ps(out + 2 * out_pitch, c);
        _mm_storeu_ps(out + 3 * out_pitch, d);
    #else
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++)
                out[j * out_pitch + i] = v[i * pitch + j];
    #endif
    }
    """
    void transpose4 "cybn_transpose4"(
        const float* v, Py_ssize_t pitch, float* out, Py_ssize_t out_pitch)

cdef struct Block:              # statistics of each row of a block
    double mean[LANES]
    double m2[LANES]
    double s1[LANES]            # sums about the shift; backward, of dz = dy * gamma
    double s2[LANES]            # and of their squares; backward, of dz * (x - mean)
    Py_ssize_t unsettled[LANES]     # 1 if the row must be summed again
    Py_ssize_t left[LANES]      # 1 if the dispatch must compute the row

cdef enum:
    HI = 0                      # where the terms of the rows begin: (TERMS, LANES) of T
    LO = LANES
    R = 2 * LANES               # one over the standard deviation
    C1 = 3 * LANES              # mean of dz
    C2 = 4 * LANES              # mean of dz * xhat
    TERMS = 5


cdef inline void transpose(
    const T* restrict v,        # IN  (rows, columns), rows `pitch` values apart
    Py_ssize_t pitch,
    Py_ssize_t rows,
    Py_ssize_t columns,
    T* restrict out,            # OUT (columns, rows), columns `out_pitch` values apart
    Py_ssize_t out_pitch,
) noexcept nogil:
    """Transpose, four by four values at a time if T is float."""
    cdef Py_ssize_t i, j, tiles = 0, whole = 0
    if T is float:
        tiles, whole = columns // 4, rows - rows % 4
        for i in range(0, whole, 4):
            for j in range(tiles):
                transpose4(&v[i * pitch + 4 * j], pitch, &out[4 * j * out_pitch + i], out_pitch)
    for i in range(rows):
        for j in range(4 * tiles if i < whole else 0, columns):
            out[j * out_pitch + i] = v[i * pitch + j]


cdef inline void find_pivots(
    const T* restrict x,        # IN  (D, LANES)
    Py_ssize_t D,
    T* restrict shift,          # OUT (LANES,)
) noexcept nogil:
    """Find the pivot of each row: the mean of its samples, which are added in a tree.

    If that overflows, the sums are not finite, and the row is summed again.
    """
    cdef double v[SAMPLES * LANES]
    cdef Py_ssize_t i, j, step = 1
    for i in range(SAMPLES):
        for j in range(LANES):
            v[i * LANES + j] = x[sample_of(i, D) * LANES + j]
    while step < SAMPLES:
        for i in range(SAMPLES // (2 * step)):
            for j in range(LANES):
                v[2 * i * step * LANES + j] += v[(2 * i + 1) * step * LANES + j]
        step *= 2
    for j in range(LANES):
        shift[j] = <T> (0.125 * v[j])


cdef inline void transposed_sums(
    const T* restrict x,        # IN  (D, LANES)
    Py_ssize_t D,
    const T* restrict shift,    # IN  (LANES,)
    Block* block,               # OUT s1, s2: sums of d = x - shift and of d * d
) noexcept nogil:
    """Sum in T for at most FLUSH values, so that the error does not grow with D."""
    cdef T a[LANES]
    cdef T b[LANES]
    cdef T d
    cdef Py_ssize_t i, j, at = 0
    clear(&block.s1[0], LANES)
    clear(&block.s2[0], LANES)
    while at < D:
        clear(a, LANES)
        clear(b, LANES)
        for i in range(at, min(at + FLUSH, D)):
            for j in range(LANES):
                d = x[i * LANES + j] - shift[j]
                a[j] += d
                b[j] += d * d
        for j in range(LANES):
            block.s1[j] += a[j]
            block.s2[j] += b[j]
        at += FLUSH


cdef inline void transposed_dots(
    const T* restrict dy,       # IN  (D, LANES)
    const T* restrict x,        # IN  (D, LANES)
    const T* restrict gamma,    # IN  (D,)
    Py_ssize_t D,
    Block* block,               # IN  mean; OUT s1, s2
) noexcept nogil:
    """Sum dz = dy * gamma and dz * (x - mean)."""
    cdef T shift[LANES]
    cdef T a[LANES]
    cdef T b[LANES]
    cdef T dz, weight
    cdef double lo
    cdef Py_ssize_t i, j
    clear(a, LANES)
    clear(b, LANES)
    for j in range(LANES):
        shift[j] = <T> block.mean[j]
    for i in range(D):
        weight = gamma[i]
        for j in range(LANES):
            dz = dy[i * LANES + j] * weight
            a[j] += dz
            b[j] += dz * (x[i * LANES + j] - shift[j])
    for j in range(LANES):
        lo = block.mean[j] - shift[j]
        block.s1[j] = a[j]
        block.s2[j] = b[j] - lo * block.s1[j]


cdef inline void transposed_moments(
    const T* restrict shift,    # IN  (LANES,)
    Py_ssize_t D,
    bint centred,
    Block* block,               # IN  s1, s2; OUT mean, m2, unsettled
) noexcept nogil:
    """Turn the sums about the shifts into mean and m2 (docs/math.md, 6.2)."""
    cdef double s1, s2
    cdef Py_ssize_t j
    for j in range(LANES):
        s1, s2 = block.s1[j] if centred else 0, block.s2[j]
        block.mean[j] = shift[j] + s1 / D
        block.m2[j] = s2 - s1 * (s1 / D)
        block.unsettled[j] = settled(s1, s2, D, shift[0]) ^ 1


cdef inline void transposed_terms(
    Py_ssize_t D,
    double eps,
    bint centred,
    bint backward,
    Block* block,               # IN  mean, m2, backward s1, s2; OUT left
    T* restrict terms,          # OUT (TERMS, LANES)
) noexcept nogil:
    """Compute what the second pass needs for each row."""
    cdef double v, r, mean, size, s1, s2
    cdef T hi
    cdef Py_ssize_t j
    for j in range(LANES):
        mean, s1, s2 = block.mean[j], block.s1[j], block.s2[j]
        v = block.m2[j] / D + eps
        r = 1 / sqrt(v)
        size = fabs(s1) + fabs(s2 * r * r / D) if backward else 0
        block.left[j] = beyond(mean, v, backward, size, <T> 0)
        hi = <T> mean
        terms[HI + j] = hi
        terms[LO + j] = <T> (mean - hi)
        terms[R + j] = <T> r
        terms[C1 + j] = <T> (s1 / D) if backward and centred else 0
        terms[C2 + j] = <T> (s2 * r / D) if backward else 0


cdef inline void transposed_scale(
    T* restrict x,              # IO  (D, LANES) x, then y
    const T* gamma,             # IN  (D,)
    const T* beta,              # IN  (D,)
    Py_ssize_t D,
    const T* restrict terms,    # IN  (TERMS, LANES)
) noexcept nogil:
    """Compute y = ((x - hi) - lo) * r * gamma + beta."""
    cdef T weight, add
    cdef Py_ssize_t i, j
    for i in range(D):
        weight, add = gamma[i], beta[i]
        for j in range(LANES):
            x[i * LANES + j] = (
                ((x[i * LANES + j] - terms[HI + j]) - terms[LO + j]) * terms[R + j] * weight + add)


cdef inline void add_lanes(const T* v, double* wide) noexcept nogil:
    """Add LANES values to float64 lanes."""
    flush(v, wide)
    if T is double:             # a strip has half as many
        flush(v + LANES // 2, wide)


cdef inline void transposed_unscale(
    T* restrict dy,             # IO  (D, LANES) dy, then dx
    const T* restrict x,        # IN  (D, LANES)
    const T* gamma,             # IN  (D,)
    Py_ssize_t D,
    Py_ssize_t S,               # values of a channel
    const T* restrict terms,    # IN  (TERMS, LANES)
    double* dgamma,             # IO  (D / S,) sums of dy * xhat
    double* dbeta,              # IO  (D / S,) sums of dy
) noexcept nogil:
    """Compute dx = r * (dy * gamma - c1 - xhat * c2), with xhat = ((x - hi) - lo) * r."""
    cdef T a[LANES]
    cdef T given, xhat, weight
    cdef double sums[2 * WIDE]
    cdef Py_ssize_t i, j
    for i in range(D):
        weight = gamma[i]
        clear(sums, 2 * WIDE)
        add_lanes(dy + i * LANES, sums + WIDE)
        for j in range(LANES):
            given = dy[i * LANES + j]
            xhat = ((x[i * LANES + j] - terms[HI + j]) - terms[LO + j]) * terms[R + j]
            a[j] = given * xhat
            dy[i * LANES + j] = (
                ((given * weight - terms[C1 + j]) - xhat * terms[C2 + j]) * terms[R + j])
        add_lanes(a, sums)
        dgamma[i // S] += across(sums)
        dbeta[i // S] += across(sums + WIDE)
