# cython: cdivision=True
# Mean and M2 of a channel or of a row: the pivot, the test of the pivot, and summing again.
#
# Sums are centred on a pivot: the mean of SAMPLES values that are spread over the channel or row,
# rounded to T. If it is more than two standard deviations from the mean, or squares leave the range
# of T, the values are summed again in float64 (docs/math.md, 6.2). Both kernels use this file.

from libc.math cimport INFINITY, fabs

from cybn._kernels.lanes cimport T, WIDE, across
from cybn._kernels.problem cimport SAMPLES

cdef extern from * nogil:
    """
    #if defined(_MSC_VER) && !defined(__clang__)
    static __inline void cybn_mark(char *at) { *(volatile char *) at = 1; }
    #else
    static inline void cybn_mark(char *at) { __atomic_store_n(at, 1, __ATOMIC_RELAXED); }
    #endif
    """
    void mark "cybn_mark"(char* at)     # set to 1; several threads may do so at once

cdef enum:
    STRETCH = 1024          # values between two additions of lanes to totals

# Computes the sums of d = (x - shift) * down and of d * d over the values of `whose`. `down` is a
# power of two.
ctypedef void (*Look)(const void* whose, double shift, double down, double* sums) noexcept nogil


cdef inline Py_ssize_t sample_of(Py_ssize_t i, Py_ssize_t M) noexcept nogil:
    """Return the index of sample i of M values.

    Samples are evenly spaced, and half a step from the ends.
    """
    return (M // SAMPLES) * i + (M % SAMPLES) * i // SAMPLES + M // (2 * SAMPLES)


cdef inline double tree(const double* v, double weight) noexcept nogil:
    return (
        ((weight * v[0] + weight * v[1]) + (weight * v[2] + weight * v[3]))
        + ((weight * v[4] + weight * v[5]) + (weight * v[6] + weight * v[7])))


cdef inline T pivot_of(
    const double* v,            # IN  (SAMPLES,)
    T of_type,                  # only selects T
) noexcept nogil:
    """Return the mean of the samples, rounded to T.

    They are added in a tree, so the sum of eight equal values is exact, and so is their mean.
    """
    cdef double mean = 0.125 * tree(v, 1)
    if not -INFINITY < mean < INFINITY:
        mean = tree(v, 0.125)   # the sum may overflow, the mean does not
    return <T> mean


cdef struct Wide:               # sums in float64 throughout
    double lanes[2 * WIDE]      # of d and of d * d, since the last STRETCH values
    double total[2 * WIDE]
    Py_ssize_t taken


cdef inline void add_wide(
    const T* x,                 # IN  (n,)
    const T* share,             # IN  (n,) weights, or NULL if all are 1
    Py_ssize_t n,
    double shift,
    double down,                # a power of two
    Wide* wide,                 # IO
) noexcept nogil:
    """Add d = (x - shift) * down, and its square. Values of weight 0 are ignored.

    Lanes are short, because after one huge value a lane would round off every small value that
    follows, all in the same direction.
    """
    cdef double d, w
    cdef Py_ssize_t i, j
    for i in range(n):
        j = wide.taken % WIDE
        w = 1 if share == NULL else share[i]
        d = x[i] * down - shift * down if w != 0 else 0
        wide.lanes[j] += w * d
        wide.lanes[WIDE + j] += w * d * d
        wide.taken += 1
        if wide.taken % STRETCH == 0:
            rest_of(wide)


cdef inline void rest_of(Wide* wide) noexcept nogil:
    """Add the lanes to the totals, and set them to 0."""
    cdef Py_ssize_t j
    for j in range(2 * WIDE):
        wide.total[j] += wide.lanes[j]
        wide.lanes[j] = 0


cdef inline void wide_sums(Wide* wide, double* sums) noexcept nogil:
    """Return the two sums in `sums`."""
    rest_of(wide)
    sums[0] = across(wide.total)
    sums[1] = across(wide.total + WIDE)


cdef inline Py_ssize_t settled(double s1, double s2, double M, T of_type) noexcept nogil:
    """Return whether mean and m2 follow from these sums about the pivot.

    The pivot must be near the mean, and the squares must be in range. The integers are as wide as
    a double, so that a loop over rows is vectorized.
    """
    cdef double least = M * (1e-30 if T is float else 1e-290)
    cdef double part = s1 * (s1 / M), m2 = s2 - part
    cdef Py_ssize_t none = (<Py_ssize_t> (s1 == 0)) & (<Py_ssize_t> (s2 == 0))
    return none | (
        (<Py_ssize_t> (m2 >= least)) & (<Py_ssize_t> (m2 < INFINITY))
        & (<Py_ssize_t> (part <= 4 * m2)))


cdef inline bint is_finite(double v) noexcept nogil:
    return -INFINITY < v < INFINITY


cdef inline Py_ssize_t beyond(
    double mean, double v, bint backward, double size, T of_type
) noexcept nogil:
    """Return whether the loops of T cannot write a channel or row that has a mean and a variance.

    v is var + eps. size is the sum of the magnitudes of the coefficients, or of their parts: the
    product of a coefficient and a value may be out of range although the result is not. The answer
    is False if x has NaN or infinity, as the loops compute such results. The integers are as wide
    as a double, so that a loop over channels is vectorized.
    """
    cdef double high = (1e24 if T is float else 1e240) * (1 if backward else 1e12)
    cdef double low = 1e-30 if T is float else 1e-240
    cdef double far = 1e30 if T is float else 1e288
    cdef double most = 1e36 if T is float else 1e300
    cdef Py_ssize_t fits = (
        (<Py_ssize_t> (v <= high)) & ((<Py_ssize_t> (v <= 0)) | (<Py_ssize_t> (v >= low)))
        & (<Py_ssize_t> (fabs(mean) <= far)) & (<Py_ssize_t> (size <= most)))
    return (fits ^ 1) & (<Py_ssize_t> (v == v)) & (<Py_ssize_t> (fabs(mean) < INFINITY))


cdef inline void settle(
    Look look,
    const void* whose,
    double M,
    bint centred,               # if not, the mean is 0 by definition, and m2 the sum of squares
    double* mean,               # IO  the pivot; OUT the mean
    double* m2,                 # OUT
) noexcept nogil:
    """Compute mean and m2 in float64: read x again for the mean, and again for the squares."""
    cdef double sums[2]
    cdef double down = 1
    if centred:
        look(whose, 0, 1, sums)
        if not is_finite(sums[0]):
            down = 2.0 ** -600  # the sum may overflow, the mean does not
            look(whose, 0, down, sums)
        mean[0] = sums[0] / M / down
    look(whose, mean[0], 1, sums)
    if centred and not is_finite(sums[0]) and is_finite(mean[0]):
        look(whose, mean[0], down, sums)
        sums[0] = sums[0] / down
        sums[1] = sums[1] / down / down
    if not centred:
        m2[0] = sums[1]
        return
    m2[0] = sums[1]             # infinite if it is too large for float64
    if is_finite(sums[1]):
        m2[0] = max(0, sums[1] - sums[0] * (sums[0] / M))
    mean[0] += sums[0] / M
