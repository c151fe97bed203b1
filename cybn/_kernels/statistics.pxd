# cython: cdivision=True
# Mean and M2 of a channel, or of a row: the pivot, the rule that trusts it, and summing again.
#
# Sums are centred on a pivot: the mean of SAMPLES values spread over what is summed, rounded to T.
# Where that lies more than two standard deviations from the mean, or squares left the range of T,
# the values are summed again in float64 (docs/math.md, 6.2). Both kernels do it here.

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
    void mark "cybn_mark"(char* at)     # set to 1, which several threads may do

cdef enum:
    STRETCH = 1024          # values between two additions of lanes to totals

# Adds the sums of d = x - shift and of d * d, both times a power of two, to those of `whose`
# values.
ctypedef void (*Look)(const void* whose, double shift, double down, double* sums) noexcept nogil


cdef inline Py_ssize_t sample_of(Py_ssize_t i, Py_ssize_t M) noexcept nogil:
    """Which of M values is sample i: they lie evenly, half a step from the ends."""
    return (M // SAMPLES) * i + (M % SAMPLES) * i // SAMPLES + M // (2 * SAMPLES)


cdef inline double tree(const double* v, double weight) noexcept nogil:
    return (
        ((weight * v[0] + weight * v[1]) + (weight * v[2] + weight * v[3]))
        + ((weight * v[4] + weight * v[5]) + (weight * v[6] + weight * v[7])))


cdef inline T pivot_of(
    const double* v,            # IN  (SAMPLES,)
    T of_type,                  # only says which T
) noexcept nogil:
    """Mean of the samples, rounded to T.

    Added in a tree: the sum of eight equal values is then exact, and so is their mean.
    """
    cdef double mean = 0.125 * tree(v, 1)
    if not -INFINITY < mean < INFINITY:
        mean = tree(v, 0.125)   # the sum may be beyond float64, the mean is not
    return <T> mean


cdef struct Wide:               # sums in float64 throughout
    double lanes[2 * WIDE]      # of d and of d * d, since the last STRETCH values
    double total[2 * WIDE]
    Py_ssize_t taken


cdef inline void add_wide(
    const T* x,                 # IN  (n,)
    const T* share,             # IN  (n,) how often a value counts, or NULL
    Py_ssize_t n,
    double shift,
    double down,                # a power of two
    Wide* wide,                 # IO
) noexcept nogil:
    """Add d = (x - shift) * down, and its square. Values of weight 0 are ignored.

    After one huge value a lane would round off every small one that follows, all in the same
    direction: so lanes are short.
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
    """Add the lanes to the totals, and begin anew."""
    cdef Py_ssize_t j
    for j in range(2 * WIDE):
        wide.total[j] += wide.lanes[j]
        wide.lanes[j] = 0


cdef inline void wide_sums(Wide* wide, double* sums) noexcept nogil:
    """The two sums."""
    rest_of(wide)
    sums[0] = across(wide.total)
    sums[1] = across(wide.total + WIDE)


cdef inline bint settled(double s1, double s2, double M, T of_type) noexcept nogil:
    """Whether sums about the pivot tell mean and m2: the pivot is near, the squares in range."""
    cdef double least = M * (1e-30 if T is float else 1e-290)
    cdef double m2 = s2 - s1 * (s1 / M)
    return s1 == 0 and s2 == 0 or (least <= m2 < INFINITY and s1 * (s1 / M) <= 4 * m2)


cdef inline bint is_finite(double v) noexcept nogil:
    return -INFINITY < v < INFINITY


cdef inline Py_ssize_t beyond(
    double mean, double v, bint backward, double size, T of_type
) noexcept nogil:
    """Whether the loops of T cannot write a channel or row, though it has a mean and a variance.

    v is var + eps, and size the sum of the sizes of coefficients, or of what they are made of: a
    product of theirs with a value, or a part of it, may be out of range where the result is not.
    NaN and infinity in x are no reason: their results are what they are. Integers are as wide as a
    double, so that a loop over channels is vectorized.
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
    bint centred,               # else the mean is 0 by definition, and m2 the sum of squares
    double* mean,               # IO  the pivot; OUT the mean
    double* m2,                 # OUT
) noexcept nogil:
    """Mean and m2 by two more looks in float64: one for the mean, one for the squares about it."""
    cdef double sums[2]
    cdef double down = 1
    if centred:
        look(whose, 0, 1, sums)
        if not is_finite(sums[0]):
            down = 2.0 ** -600  # the sum may be beyond float64, the mean is not
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
    m2[0] = sums[1]             # infinite where it is beyond float64
    if is_finite(sums[1]):
        m2[0] = max(0, sums[1] - sums[0] * (sums[0] / M))
    mean[0] += sums[0] / M
