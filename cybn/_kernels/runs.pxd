# cython: cdivision=True
# The runs family: long stretches of one channel.
#
# A run is the S neighbouring values x[n, c, :]. Its channel is one, so shift and coefficients
# stay in registers. Used from S = RUN_MIN on, and for few rows (by_runs); the rest is rows.pxd's.
#
#   pass     reads        writes   bytes an element (float32)
#   sums     x            -        4
#   dots     dy, x        -        8
#   scale    x            y        8
#   unscale  dy, x        dx       12
#
# a. Lanes. A plain `s += x[i]` is one chain of additions, which no compiler may reorder. LANES
#    independent sums are LANES chains: the compiler makes vectors of them at any width, and the
#    result is the same bits at every instruction level, because the order is in the source.
#    What is left of a run is filled up to LANES with values that add nothing: an index into the
#    lanes that is no constant would push them from registers to memory.
# b. PIECE. Lanes of T collect at most PIECE / LANES = 32 values, then go to eight lanes of
#    float64: rounding in float32 cannot build up over a long channel, and the flush costs
#    about a twentieth of the piece. A piece of 4 KiB stays in L1.
# c. Values are centred on a shift close to the mean before they are summed or squared, so no
#    digits cancel later (docs/math.md, 6.2).

from libc.math cimport INFINITY
from libc.stdint cimport uint16_t

from cybn._kernels.half cimport NATIVE, Storage, widen

ctypedef fused T:
    float
    double

cdef enum:
    LANES = 32      # vectors of one sum in flight: 4 of AVX2, 8 of SSE2
    PIECE = 1024    # elements between two flushes to float64
    WIDE = 8        # lanes of the float64 sums
    RUN_MIN = 256   # shortest S for which sums of runs beat those of rows
    RUN_APPLY = 96  # the same for inference, whose bits are the same either way


cdef inline const T* lanes(
    const T* x,                 # IN  (n,) of `storage`
    Storage storage,            # a constant
    Py_ssize_t i,
    Py_ssize_t n,
    T fill,
    T* rest,                    # OUT (LANES,)
) noexcept nogil:
    """LANES values from x[i] on, in place or widened; what lies beyond the end is fill."""
    cdef Py_ssize_t j
    if i + LANES <= n:
        if storage == NATIVE:
            return x + i
        if T is float:
            widen(<const uint16_t*> x + i, rest, LANES, storage)
        return rest
    for j in range(LANES):
        rest[j] = fill
    if storage == NATIVE:
        for j in range(n - i):
            rest[j] = x[i + j]
    elif T is float:
        widen(<const uint16_t*> x + i, rest, n - i, storage)
    return rest


cdef inline void flush(
    const T* restrict a,        # IN  (LANES,)
    const T* restrict b,        # IN  (LANES,)
    double* restrict acc,       # IO  (2, WIDE)
) noexcept nogil:
    """Fold two sets of lanes into the float64 lanes."""
    cdef T folded[2 * WIDE]     # in two steps, which become vectors of T, and of float64
    cdef Py_ssize_t j
    for j in range(WIDE):
        folded[j] = (a[j] + a[j + 8]) + (a[j + 16] + a[j + 24])
        folded[WIDE + j] = (b[j] + b[j + 8]) + (b[j + 16] + b[j + 24])
    for j in range(2 * WIDE):
        acc[j] += folded[j]


cdef inline double across(const double* restrict acc) noexcept nogil:
    """Sum of WIDE float64 lanes."""
    return ((acc[0] + acc[4]) + (acc[1] + acc[5])) + ((acc[2] + acc[6]) + (acc[3] + acc[7]))


cdef inline void sums(
    const T* restrict x, Py_ssize_t n, T shift, double* restrict acc
) noexcept nogil:
    sums_of(x, NATIVE, n, shift, acc)


cdef inline void sums_of(
    const T* restrict x,        # IN  (n,) of `storage`, n <= PIECE
    Storage storage,            # a constant
    Py_ssize_t n,
    T shift,
    double* restrict acc,       # IO  (2, WIDE): sums of d and of d * d, d = x - shift
) noexcept nogil:
    cdef T a[LANES]
    cdef T b[LANES]
    cdef T rest[LANES]
    cdef T d
    cdef const T* at
    cdef Py_ssize_t i, j
    for j in range(LANES):
        a[j] = 0
        b[j] = 0
    for i in range((n + LANES - 1) // LANES):
        at = lanes(x, storage, i * LANES, n, shift, rest)
        for j in range(LANES):
            d = at[j] - shift
            a[j] += d
            b[j] += d * d
    flush(a, b, acc)


cdef inline T gate(T dy, T z) noexcept nogil:
    """dy through relu: 0 where z is not above 0."""
    return 0 if z <= 0 else dy


cdef inline void add_lanes(double* restrict lanes, double* restrict total) noexcept nogil:
    """Add (2, WIDE) lanes to totals, and begin anew."""
    cdef Py_ssize_t j
    for j in range(2 * WIDE):
        total[j] += lanes[j]
        lanes[j] = 0


cdef inline void wide_sums(
    const T* restrict x,        # IN  (n,)
    Py_ssize_t n,
    double shift,
    double* restrict acc,       # IO  (2, WIDE): sums of d and of d * d, d = x - shift
) noexcept nogil:
    """The sums in float64 throughout, for what squares of T cannot hold."""
    cdef double lanes[2 * WIDE]
    cdef double d
    cdef Py_ssize_t i, j, full = n - n % WIDE
    for j in range(2 * WIDE):
        lanes[j] = 0
    for i in range(full // WIDE):
        for j in range(WIDE):
            d = x[i * WIDE + j] - shift
            lanes[j] += d
            lanes[WIDE + j] += d * d
    for j in range(n - full):
        d = x[full + j] - shift
        lanes[j] += d
        lanes[WIDE + j] += d * d
    add_lanes(lanes, acc)


cdef inline void dots(
    const T* restrict dy, const T* restrict x, Py_ssize_t n, T hi, T scale_a, T scale_b,
    bint relu, double* restrict acc,
) noexcept nogil:
    dots_of(dy, x, NATIVE, n, hi, scale_a, scale_b, relu, acc)


cdef inline void dots_of(
    const T* restrict dy,       # IN  (n,) of `storage`, n <= PIECE
    const T* restrict x,        # IN  (n,) of `storage`
    Storage storage,            # a constant
    Py_ssize_t n,
    T hi,
    T scale_a,                  # z = (x - hi) * scale_a + scale_b
    T scale_b,
    bint relu,                  # a constant: g = dy, or dy through the relu of z
    double* restrict acc,       # IO  (2, WIDE): sums of g and of g * (x - hi)
) noexcept nogil:
    cdef T a[LANES]
    cdef T b[LANES]
    cdef T rest_x[LANES]
    cdef T rest_dy[LANES]
    cdef T d, g
    cdef const T* at_x
    cdef const T* at_dy
    cdef Py_ssize_t i, j
    for j in range(LANES):
        a[j] = 0
        b[j] = 0
    for i in range((n + LANES - 1) // LANES):
        at_x = lanes(x, storage, i * LANES, n, hi, rest_x)
        at_dy = lanes(dy, storage, i * LANES, n, 0, rest_dy)
        for j in range(LANES):
            d = at_x[j] - hi
            g = at_dy[j]
            g = gate(g, d * scale_a + scale_b) if relu else g
            a[j] += g
            b[j] += g * d
    flush(a, b, acc)


cdef inline void dots_add(
    const T* restrict dy,       # IN  (n,), n <= PIECE
    const T* restrict x,        # IN  (n,)
    const T* restrict r,        # IN  (n,)
    T* restrict g,              # OUT (n,) dy through relu at (x - hi) * scale_a + scale_b + r
    Py_ssize_t n,
    T hi,
    T scale_a,
    T scale_b,
    double* restrict acc,       # IO  (2, WIDE): sums of g and of g * (x - hi)
) noexcept nogil:
    """dots after a residual and relu; g is its gradient."""
    cdef T a[LANES]
    cdef T b[LANES]
    cdef T d, v
    cdef Py_ssize_t i, j, full = n - n % LANES
    for j in range(LANES):
        a[j] = 0
        b[j] = 0
    for i in range(full // LANES):
        for j in range(LANES):
            d = x[i * LANES + j] - hi
            v = gate(dy[i * LANES + j], d * scale_a + scale_b + r[i * LANES + j])
            g[i * LANES + j] = v
            a[j] += v
            b[j] += v * d
    for j in range(n - full):
        d = x[full + j] - hi
        g[full + j] = gate(dy[full + j], d * scale_a + scale_b + r[full + j])
        a[j] += g[full + j]
        b[j] += g[full + j] * d
    flush(a, b, acc)


cdef inline T clamp(T z, T low, T high) noexcept nogil:
    """z within low..high; NaN and -0.0 stay what they are."""
    z = low if low > z else z
    return high if high < z else z


cdef inline bint unbounded(T low, T high) noexcept nogil:
    """Whether clamp would change nothing: plain loops without it are 2 to 6 % faster in cache."""
    return low == -INFINITY and high == INFINITY


cdef inline void scale(
    const T* x,                 # IN  (n,)
    T* y,                       # OUT (n,), may be x or r
    Py_ssize_t n,
    T hi,
    T a,
    T b,
    T low,                      # relu and relu6 cost nothing here; infinite where there is none
    T high,
) noexcept nogil:
    """y = (x - hi) * a + b, clamped"""
    cdef Py_ssize_t i
    if unbounded(low, high):
        for i in range(n):
            y[i] = (x[i] - hi) * a + b
    else:
        for i in range(n):
            y[i] = clamp((x[i] - hi) * a + b, low, high)


cdef inline void scale_add(
    const T* x, const T* r, T* y, Py_ssize_t n, T hi, T a, T b, T low, T high
) noexcept nogil:
    """y = (x - hi) * a + b + r, clamped; y may be x or r"""
    cdef Py_ssize_t i
    for i in range(n):
        y[i] = clamp((x[i] - hi) * a + b + r[i], low, high)


cdef inline void unscale(
    const T* dy,                # IN  (n,)
    const T* x,                 # IN  (n,)
    T* dx,                      # OUT (n,), may be dy or x
    Py_ssize_t n,
    T hi,
    T a,
    T k,
    T b,
    T scale_b,
    bint relu,                  # a constant: g = dy, or dy through relu at (x - hi) * a + scale_b
) noexcept nogil:
    """dx = g * a + (x - hi) * k + b"""
    cdef Py_ssize_t i
    cdef T d, g
    for i in range(n):
        d = x[i] - hi
        g = gate(dy[i], d * a + scale_b) if relu else dy[i]
        dx[i] = g * a + d * k + b
