# cython: cdivision=True
# Loops along a row that has one mean and variance, with a gamma and beta for each column.
#
#   pass           reads            writes     bytes an element (float32), gamma and beta in L1
#   turned_sums    x                -          4
#   turned_dots    dy, x            -          8
#   weighted_dots  dy, x            -          8
#   row_scale      x                y          8
#   row_unscale    dy, x            dx         12
#
# The mean comes as hi + lo, both of type T: subtracted one after the other, the first exactly
# where it matters, so the error does not grow with |mean| / std (docs/math.md, 6.4).

from cybn._kernels.half cimport NATIVE, Storage
from cybn._kernels.runs cimport LANES, T, flush, lanes


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
    for j in range(LANES):
        sum_a[j] = 0
        sum_b[j] = 0
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
    for j in range(LANES):
        sum_a[j] = 0
        sum_b[j] = 0
    for i in range(n):
        weight = gamma[i]
        for j in range(LANES):
            dz = dy[i * LANES + j] * weight
            sum_a[j] += dz
            sum_b[j] += dz * (x[i * LANES + j] - shift[j])
    for j in range(LANES):
        a[j] = sum_a[j]
        b[j] = sum_b[j]


cdef inline void weighted_dots(
    const T* restrict dy,       # IN  (n,) of `storage`, n <= PIECE
    const T* restrict x,        # IN  (n,) of `storage`
    Storage storage,            # a constant
    const T* restrict gamma,    # IN  (n,)
    Py_ssize_t n,
    T shift,
    double* restrict acc,       # IO  (2, WIDE): sums of dz and dz * (x - shift), dz = dy * gamma
) noexcept nogil:
    cdef T a[LANES]
    cdef T b[LANES]
    cdef T rest_x[LANES]
    cdef T rest_dy[LANES]
    cdef T rest_gamma[LANES]
    cdef T dz
    cdef const T* at_x
    cdef const T* at_dy
    cdef const T* at_gamma
    cdef Py_ssize_t i, j
    for j in range(LANES):
        a[j] = 0
        b[j] = 0
    for i in range((n + LANES - 1) // LANES):
        at_x = lanes(x, storage, i * LANES, n, shift, rest_x)
        at_dy = lanes(dy, storage, i * LANES, n, 0, rest_dy)
        at_gamma = lanes(gamma, NATIVE, i * LANES, n, 0, rest_gamma)
        for j in range(LANES):
            dz = at_dy[j] * at_gamma[j]
            a[j] += dz
            b[j] += dz * (at_x[j] - shift)
    flush(a, b, acc)


cdef inline void row_scale(
    const T* restrict x,        # IN  (n,)
    const T* restrict gamma,    # IN  (n,)
    const T* restrict beta,     # IN  (n,)
    T* restrict y,              # OUT (n,)
    Py_ssize_t n,
    T hi,
    T lo,
    T r,
) noexcept nogil:
    """y = ((x - hi) - lo) * r * gamma + beta"""
    cdef Py_ssize_t j
    for j in range(n):
        y[j] = ((x[j] - hi) - lo) * r * gamma[j] + beta[j]


cdef inline void row_unscale(
    const T* restrict dy,       # IN  (n,)
    const T* restrict x,        # IN  (n,)
    const T* restrict gamma,    # IN  (n,)
    T* restrict dx,             # OUT (n,)
    Py_ssize_t n,
    T hi,
    T lo,
    T r,
    T c1,
    T c2,
    T* restrict a,              # IO  (n,) sums of dy * xhat
    T* restrict b,              # IO  (n,) sums of dy
) noexcept nogil:
    """dx = r * (dy * gamma - c1 - xhat * c2), with xhat = ((x - hi) - lo) * r"""
    cdef Py_ssize_t j
    cdef T xhat
    for j in range(n):
        xhat = ((x[j] - hi) - lo) * r
        a[j] += dy[j] * xhat
        b[j] += dy[j]
        dx[j] = ((dy[j] * gamma[j] - c1) - xhat * c2) * r
