# cython: cdivision=True
# Activations: what apply does to z, the normalized value, and what backward does to dy.
#
#   name         y                       dy is multiplied by
#   relu         0 where z < 0, else z   0 where z <= 0, else 1
#   relu6        and 6 where z > 6       0 where z <= 0 or z >= 6, else 1
#   leaky_relu   slope * z where z < 0   slope where z <= 0, else 1
#   sigmoid      s = 1 / (1 + exp(-z))   s * (1 - s)
#   tanh         t = tanh(z)             1 - t * t
#   silu         z * s                   s * (1 + z * (1 - s))
#
# A NaN passes through all of them, -0.0 through the piecewise-linear ones; a gradient that is
# multiplied by 0 in relu and relu6 is 0 even where dy is NaN or infinite.
#
# a. Stages over runs that lie in L1: one loop an activation, none a layout. Only relu and relu6
#    are merged into the loops that compute z (`low` and `high` in runs.pxd and rows.pxd).
# b. exp is ours: additions, multiplications and one shift into the exponent, in vectors of any
#    width, to the same bits at every level. libm's would be a call an element, and may differ
#    between machines. |error| stays below 4 ulp of y, 8 of the slope (tests/test_activations.py).

from libc.math cimport copysign, copysignf, fabs, fabsf
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from cybn._kernels.runs cimport T, clamp

cdef enum Activation:
    IDENTITY
    RELU
    RELU6
    LEAKY_RELU
    SIGMOID
    TANH
    SILU


cdef inline T minus_abs(T z) noexcept nogil:
    return -fabsf(z) if T is float else -fabs(z)


cdef inline T power(T t) noexcept nogil:
    """2**(k + 64) in float32, 2**(k + 512) in float64, of t = k + 1.5 * 2**(mantissa bits)."""
    cdef T s
    cdef uint32_t u
    cdef uint64_t v
    if T is float:
        memcpy(&u, &t, sizeof(u))
        u = (u << 23) + ((127 + 64) << 23)
        memcpy(&s, &u, sizeof(u))
    else:
        memcpy(&v, &t, sizeof(v))
        v = (v << 52) + (<uint64_t> (1023 + 512) << 52)
        memcpy(&s, &v, sizeof(v))
    return s


cdef inline T reduced(T x, T* s, T* unit) noexcept nogil:
    """expm1(r) of x = k log(2) + r for x <= 0, and s, unit with s * unit = 2**k.

    Taylor's series, |r| <= 0.35: the first term left out is below 2e-8 (float32: 4e-18 in
    float64) of the result.
    """
    cdef T t, k, r, p
    if T is float:
        x = -120 if x < -120 else x         # below, exp is 0 in any case
        t = x * <T> 1.4426950408889634 + <T> 1.2582912e7
        k = t - <T> 1.2582912e7
        r = (x - k * <T> 0.693359375) + k * <T> 2.12194440e-4
        unit[0] = <T> 5.421010862427522e-20     # 2**-64: subnormal results round once
        p = (<T> (1.0 / 720) + r * <T> (1.0 / 5040))
    else:
        x = -780 if x < -780 else x
        t = x * <T> 1.4426950408889634 + <T> 6.755399441055744e15
        k = t - <T> 6.755399441055744e15
        r = (x - k * <T> 0.6931471803691238) - k * <T> 1.9082149292705877e-10
        unit[0] = <T> 7.458340731200207e-155    # 2**-512
        p = (<T> (1.0 / 479001600) + r * <T> (1.0 / 6227020800.0))
        p = <T> (1.0 / 3628800) + r * (<T> (1.0 / 39916800) + r * p)
        p = <T> (1.0 / 40320) + r * (<T> (1.0 / 362880) + r * p)
        p = <T> (1.0 / 720) + r * (<T> (1.0 / 5040) + r * p)
    s[0] = power(t)
    p = <T> (1.0 / 24) + r * (<T> (1.0 / 120) + r * p)
    p = <T> (1.0 / 2) + r * (<T> (1.0 / 6) + r * p)
    return r + r * r * p


cdef inline T exp_of(T x) noexcept nogil:
    """exp(x) for x <= 0."""
    cdef T s, unit, q = reduced(x, &s, &unit)
    return (s + s * q) * unit


cdef inline T expm1_of(T x) noexcept nogil:
    """exp(x) - 1 for x <= 0."""
    cdef T s, unit, q = reduced(x, &s, &unit), one = 1  # a literal would be a float64
    s = s * unit
    return s * q + (s - one)


cdef inline T sigmoid_of(T z) noexcept nogil:
    cdef T e = exp_of(minus_abs(z)), one = 1
    return (one if z >= 0 else e) / (one + e)


cdef inline T sigmoid_slope(T z) noexcept nogil:
    cdef T e = exp_of(minus_abs(z)), one = 1
    return e / ((one + e) * (one + e))


cdef inline T tanh_of(T z) noexcept nogil:
    cdef T m = minus_abs(z), two = 2
    m = expm1_of(m + m)
    m = m / (two + m)
    return copysignf(m, z) if T is float else copysign(m, z)


cdef inline T tanh_slope(T z) noexcept nogil:
    cdef T e = minus_abs(z), one = 1, four = 4
    e = exp_of(e + e)
    return four * e / ((one + e) * (one + e))


cdef inline T silu_of(T z) noexcept nogil:
    """z * s; where s is subnormal, z comes in before s is rounded to that."""
    cdef T scale, unit, q = reduced(minus_abs(z), &scale, &unit), one = 1
    cdef T e = scale + scale * q
    return (z if z >= 0 else z * e * unit) / (one + e * unit)


cdef inline T silu_slope(T z) noexcept nogil:
    """s * (1 + z * (1 - s)) with one division."""
    cdef T e = exp_of(minus_abs(z)), one = 1
    cdef T r = one / (one + e)
    cdef T s = r if z >= 0 else e * r
    cdef T rest = e * r if z >= 0 else r    # 1 - s
    return s * (one + z * rest)


cdef inline void add(T* z, const T* r, Py_ssize_t n, T low, T high) noexcept nogil:
    """z += r, clamped."""
    cdef Py_ssize_t i
    for i in range(n):
        z[i] = clamp(z[i] + r[i], low, high)


cdef inline void activate(T* z, Py_ssize_t n, Activation activation, T slope) noexcept nogil:
    """What clamping did not do already: y from z, in place."""
    cdef Py_ssize_t i
    if activation == LEAKY_RELU:
        for i in range(n):
            z[i] = slope * z[i] if z[i] < 0 else z[i]
    elif activation == SIGMOID:
        for i in range(n):
            z[i] = sigmoid_of(z[i])
    elif activation == TANH:
        for i in range(n):
            z[i] = tanh_of(z[i])
    elif activation == SILU:
        for i in range(n):
            z[i] = silu_of(z[i])


cdef inline void chain(
    const T* dy,                # IN  (n,)
    const T* z,                 # IN  (n,)
    T* g,                       # OUT (n,) dy times the slope at z; may be dy or z
    Py_ssize_t n,
    Activation activation,
    T slope,
) noexcept nogil:
    cdef Py_ssize_t i
    if activation == RELU:
        for i in range(n):
            g[i] = 0 if z[i] <= 0 else dy[i]
    elif activation == RELU6:
        for i in range(n):
            g[i] = 0 if z[i] <= 0 else (0 if z[i] >= 6 else dy[i])
    elif activation == LEAKY_RELU:
        for i in range(n):
            g[i] = slope * dy[i] if z[i] <= 0 else dy[i]
    elif activation == SIGMOID:
        for i in range(n):
            g[i] = dy[i] * sigmoid_slope(z[i])
    elif activation == TANH:
        for i in range(n):
            g[i] = dy[i] * tanh_slope(z[i])
    elif activation == SILU:
        for i in range(n):
            g[i] = dy[i] * silu_slope(z[i])
    else:
        for i in range(n):
            g[i] = dy[i]


cdef inline void invert(const T* y, T* z, Py_ssize_t n, T slope) noexcept nogil:
    """z from y = leaky_relu(z); z may be y."""
    cdef Py_ssize_t i
    for i in range(n):
        z[i] = y[i] / slope if y[i] < 0 else y[i]
