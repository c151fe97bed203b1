# cython: cdivision=True
# Activations: y = f(z) of the normalized value z, and the slope f'(z) that backward needs.
#
#   name         f(z)                         f'(z)
#   relu         0 if z < 0, else z           0 if z <= 0, else 1
#   relu6        the same, but 6 if z > 6     0 if z <= 0 or z >= 6, else 1
#   leaky_relu   slope * z if z < 0, else z   slope if z <= 0, else 1
#   hardswish    z * clamp(z + 3, 0, 6) / 6   0 if z <= -3, 1 if z >= 3, else (z + 1.5) / 3
#   sigmoid      s = 1 / (1 + exp(-z))        s * (1 - s)
#   tanh         t = tanh(z)                  1 - t * t
#   silu         z * s                        s * (1 + z * (1 - s))
#   gelu         z * P, P = erfc(-z / sqrt(2)) / 2      P + z * exp(-z * z / 2) / sqrt(2 pi)
#
# A new activation needs an entry in `Activation`, a line in `value_of` and in `slope_of`, a line in
# each of the two switches at the end, and its formulas.
#
# a. Special values. NaN stays NaN, and -0.0 stays -0.0 if f(0) = 0. relu, relu6 and leaky_relu have
#    slope 1 at NaN. At -inf and inf, results are those of IEEE arithmetic and of PyTorch: silu,
#    gelu and hardswish of -inf are -inf * 0 = NaN, and the slopes of silu and gelu are NaN at both.
#    If |z| is large but finite, each function is its limit, -0.0 or z, and its slope is 0 or 1.
# b. There are no branches, calls or tables, only additions, multiplications, divisions, comparisons
#    that select, and one shift of integers. They round alike in vectors of any width, so each level
#    has the same bits. libm's functions would need a call per value, and differ between machines.
# c. There is one division per value. With a = |z| and E = U * exp(-a), numerator and denominator
#    are multiplied by U = 2**40 (float64: 2**100): exp(-a) / (1 + exp(-a)) = E / (U + E). E is
#    never subnormal. The quotient may be subnormal, and is then rounded once.
# d. silu and gelu are z - h(a) if z > 0 and -h(a) otherwise, with h(a) = a * s(-a) or a * P(-a).
#    Their slopes are 1 - d(a) and d(a). Only a decaying function of a is ever computed, so the
#    negative tail keeps its relative accuracy.
# e. Errors of y are below 4 units in the last place for hardswish, sigmoid, tanh and silu, and
#    below 8 for gelu. Errors of slopes are below 8 units (gelu: 12). Near a zero of the slope, the
#    units are those of 0.1.

from libc.math cimport copysign, copysignf, fabs, fabsf
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from cybn._kernels.lanes cimport T

cdef enum Activation:
    IDENTITY
    RELU
    RELU6
    LEAKY_RELU
    HARDSWISH
    SIGMOID
    TANH
    SILU
    GELU


# ---- exp -------------------------------------------------------------------------------------


cdef inline T bounded(T z, T most) noexcept nogil:
    """Return |z|, but at most `most`; NaN stays NaN."""
    cdef T a = fabsf(z) if T is float else fabs(z)
    return most if a > most else a


cdef inline T far(T z) noexcept nogil:
    """Return a = |z|, limited so that a * exp(-a) can reach 0 and U * exp(-a) is not subnormal."""
    return bounded(z, <T> 110 if T is float else <T> 755)


cdef inline T power(T t) noexcept nogil:
    """Return 2**(n - bias) for t = n + 1.5 * 2**(mantissa bits): shift n into the exponent."""
    cdef T s
    cdef uint32_t u
    cdef uint64_t v
    if T is float:
        memcpy(&u, &t, sizeof(u))
        u = u << 23
        memcpy(&s, &u, sizeof(u))
    else:
        memcpy(&v, &t, sizeof(v))
        v = v << 52
        memcpy(&s, &v, sizeof(v))
    return s


cdef inline T reduced(T x, T rest, T* s, T* unit) noexcept nogil:
    """Return expm1(r) for x - rest = k log(2) + r and x <= 0; set s to U * 2**k, and unit to U.

    In Cody and Waite's reduction, log(2) is split in two parts, and k times the first is exact
    (float32 as in Cephes, float64 as in fdlibm). expm1(r) is r + r * r * p(r). p has the least
    error relative to exp for |r| <= 0.35: 3.1e-9, or 3.6e-18 in float64. It was computed by Remez's
    exchange in 60 digits.
    """
    cdef T t, k, r, p, magic
    if T is float:
        unit[0] = <T> 1099511627776.0               # 2**40
        magic = <T> (12582912.0 + 127 + 40)
        t = x * <T> 1.4426950408889634 + magic      # the sum rounds to an integer
        k = t - magic
        r = (x - k * <T> 0.693359375) + k * <T> 2.12194440e-4 - rest
        p = <T> 0.00836871482346480342 + r * <T> 0.00138146015003073443
        p = <T> 0.166665206493776381 + r * (<T> 0.0416683878712776771 + r * p)
        p = <T> 0.499999934489023583 + r * p
    else:
        unit[0] = <T> 1.2676506002282294e30         # 2**100
        magic = <T> (6755399441055744.0 + 1023 + 100)
        t = x * <T> 1.4426950408889634 + magic
        k = t - magic
        r = (x - k * <T> 0.6931471803691238) - k * <T> 1.9082149292705877e-10 - rest
        p = <T> 2.76302452941947e-07 + r * <T> 2.500006472164742e-08
        p = <T> 2.48014931070319e-05 + r * (<T> 2.75575863494965e-06 + r * p)
        p = <T> 0.00138888889436230961 + r * (<T> 0.000198412695066181211 + r * p)
        p = <T> 0.0416666666665301819 + r * (<T> 0.00833333333349444038 + r * p)
        p = <T> 0.500000000000001062 + r * (<T> 0.166666666666664126 + r * p)
    s[0] = power(t)
    return r + r * r * p


cdef inline T exp_of(T x, T rest, T* unit) noexcept nogil:
    """Return U * exp(x - rest) for x <= 0, and set unit to U."""
    cdef T s, q = reduced(x, rest, &s, unit)
    return s + s * q


# ---- the formulas ----------------------------------------------------------------------------


cdef inline T relu6_of(T z) noexcept nogil:
    return 6 if z > 6 else (0 if z < 0 else z)


cdef inline T relu6_slope(T z) noexcept nogil:
    return 0 if z <= 0 else (0 if z >= 6 else 1)


cdef inline T hardswish_of(T z) noexcept nogil:
    """Return z * (c / 6) with c = clamp(z + 3, 0, 6); z * c could overflow."""
    cdef T c = z + <T> 3        # a bare 3 would make the sum a float64
    c = 0 if c < 0 else (6 if c > 6 else c)
    return z * (c * <T> (1.0 / 6))


cdef inline T hardswish_slope(T z) noexcept nogil:
    cdef T s = (z + <T> 1.5) * <T> (1.0 / 3)
    return 0 if z <= -3 else (1 if z >= 3 else s)


cdef inline T sigmoid_of(T z) noexcept nogil:
    cdef T u, e = exp_of(-far(z), 0, &u)
    return (u if z >= 0 else e) / (u + e)


cdef inline T sigmoid_slope(T z) noexcept nogil:
    cdef T u, e = exp_of(-far(z), 0, &u)
    return e * u / ((u + e) * (u + e))


cdef inline T tanh_of(T z) noexcept nogil:
    """Return -m / (2 + m) with m = expm1(-2 |z|), with the sign of z."""
    cdef T s, u, q = reduced(-far(z + z), 0, &s, &u), m = s * q + (s - u)
    m = m / (u + u + m)
    return copysignf(m, z) if T is float else copysign(m, z)


cdef inline T tanh_slope(T z) noexcept nogil:
    """Return 4 * s * (1 - s), where s is the sigmoid of 2 z."""
    cdef T u, e = exp_of(-far(z + z), 0, &u)
    return <T> 4 * u * e / ((u + e) * (u + e))


cdef inline T mirrored(T z, T h) noexcept nogil:
    """Return z - h if z > 0, else -h; NaN at -inf, because 0 * z is NaN there."""
    return (z if z > 0 else <T> 0 * z) - h


cdef inline T mirrored_slope(T z, T d) noexcept nogil:
    """Return 1 - d if z > 0, else d; NaN at -inf and inf."""
    return (<T> 1 - d if z > 0 else d) + <T> 0 * z


cdef inline T silu_of(T z) noexcept nogil:
    cdef T u, a = far(z), e = exp_of(-a, 0, &u)
    return mirrored(z, a * e / (u + e))


cdef inline T silu_slope(T z) noexcept nogil:
    """Return the slope, with d = exp(-a) * (1 + exp(-a) - a) / (1 + exp(-a))**2."""
    cdef T u, a = far(z), e = exp_of(-a, 0, &u), one = u + e
    return mirrored_slope(z, e * (one - a * u) / (one * one))


cdef inline T tail(T a, T* over, T* under) noexcept nogil:
    """Return U * exp(-a * a / 2); set over and under: P(-a) * exp(a * a / 2) = over / under * U.

    This holds for a <= 39. over / under is the rational function of least relative error: 6e-9 for
    a <= 14.625, or in float64 5e-17 for a <= 38.75. It was computed by Remez's exchange in 60
    digits from mpmath's erfc. All its coefficients are positive, so nothing cancels; the first is
    1/2. a * a / 2 is computed as 2 * b * b plus a rest. b is a / 2, rounded to a grid so coarse
    that the product is exact.
    """
    cdef T u, n, d, e, half = <T> 0.5 * a
    cdef T grid = <T> 24576 if T is float else <T> 3221225472.0    # 1.5 * 2**14, 1.5 * 2**31
    cdef T b = (half + grid) - grid
    cdef T twice = b + b
    e = exp_of(-twice * b, (half - b) * (a + twice), &u)
    if T is float:
        n = <T> 0.183422582 + a * (<T> 0.0406964518 + a * <T> 0.0041257032)
        n = <T> 0.5 + a * (<T> 0.43854778 + a * n)
        d = <T> 0.469965496 + a * (<T> 0.102017238 + a * <T> 0.0103414867)
        d = <T> 1.67498055 + a * (<T> 1.20328143 + a * d)
    else:
        n = <T> 3.7194969540599604e-5 + a * <T> 1.383070865794388e-6
        n = <T> 0.0040847926957707787 + a * (<T> 0.00048976457801506264 + a * n)
        n = <T> 0.097629484702990335 + a * (<T> 0.023601110014490706 + a * n)
        n = <T> 0.59382774787555698 + a * (<T> 0.28917676330775957 + a * n)
        n = <T> 0.5 + a * (<T> 0.77472288436397779 + a * n)
        d = <T> 9.3233962322328888e-5 + a * <T> 3.4668445380291395e-6
        d = <T> 0.010332290818205151 + a * (<T> 0.0012311245839059182 + a * d)
        d = <T> 0.25477340390590074 + a * (<T> 0.060379934155512784 + a * d)
        d = <T> 1.7136764853824876 + a * (<T> 0.78159745994783149 + a * d)
        d = <T> 2.3473303295308109 + a * (<T> 2.5605541247883695 + a * d)
    over[0] = n
    under[0] = u + u * (a * d)
    return e


cdef inline T gelu_of(T z) noexcept nogil:
    cdef T n, d, a = bounded(z, <T> 14.625 if T is float else <T> 38.75), e = tail(a, &n, &d)
    return mirrored(z, a * e * n / d)


cdef inline T gelu_slope(T z) noexcept nogil:
    """Return the slope, with d = exp(-a * a / 2) * (over / under - a / sqrt(2 pi))."""
    cdef T n, d, a = bounded(z, <T> 14.625 if T is float else <T> 38.75), e = tail(a, &n, &d)
    cdef T c = <T> 3.6283589033831293e-13 if T is float else <T> 3.147099684484089e-31
    return mirrored_slope(z, e * (n - a * c * d) / d)


# ---- one value, and the two loops -------------------------------------------------------------


cdef inline T value_of(Activation f, T z, T slope) noexcept nogil:
    """Return f(z). f is a constant once this is inlined."""
    if f == RELU: return 0 if z < 0 else z
    if f == RELU6: return relu6_of(z)
    if f == LEAKY_RELU: return slope * z if z < 0 else z
    if f == HARDSWISH: return hardswish_of(z)
    if f == SIGMOID: return sigmoid_of(z)
    if f == TANH: return tanh_of(z)
    if f == SILU: return silu_of(z)
    if f == GELU: return gelu_of(z)
    return z


cdef inline T slope_of(Activation f, T z, T slope) noexcept nogil:
    """Return f'(z)."""
    if f == RELU: return 0 if z <= 0 else 1
    if f == RELU6: return relu6_slope(z)
    if f == LEAKY_RELU: return slope if z <= 0 else 1
    if f == HARDSWISH: return hardswish_slope(z)
    if f == SIGMOID: return sigmoid_slope(z)
    if f == TANH: return tanh_slope(z)
    if f == SILU: return silu_slope(z)
    if f == GELU: return gelu_slope(z)
    return 1


cdef inline void values(T* restrict z, Py_ssize_t n, Activation f, T slope) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        z[i] = value_of(f, z[i], slope)


cdef inline void slopes(
    const T* restrict dy, const T* restrict z, T* restrict g, Py_ssize_t n, Activation f, T slope
) noexcept nogil:
    cdef Py_ssize_t i
    cdef T s
    for i in range(n):
        s = slope_of(f, z[i], slope)
        if f == RELU or f == RELU6 or f == HARDSWISH:
            g[i] = 0 if s == 0 else dy[i] * s
        else:
            g[i] = dy[i] * s


cdef inline void activate(
    T* restrict z,              # IN  (n,), OUT f(z)
    Py_ssize_t n,
    Activation f,
    T slope,                    # of leaky_relu
) noexcept nogil:
    if f == RELU: values(z, n, RELU, slope)
    elif f == RELU6: values(z, n, RELU6, slope)
    elif f == LEAKY_RELU: values(z, n, LEAKY_RELU, slope)
    elif f == HARDSWISH: values(z, n, HARDSWISH, slope)
    elif f == SIGMOID: values(z, n, SIGMOID, slope)
    elif f == TANH: values(z, n, TANH, slope)
    elif f == SILU: values(z, n, SILU, slope)
    elif f == GELU: values(z, n, GELU, slope)


cdef inline void through(
    const T* restrict dy,       # IN  (n,)
    const T* restrict z,        # IN  (n,)
    T* restrict g,              # OUT (n,) dy * f'(z)
    Py_ssize_t n,
    Activation f,               # not IDENTITY
    T slope,
) noexcept nogil:
    if f == RELU: slopes(dy, z, g, n, RELU, slope)
    elif f == RELU6: slopes(dy, z, g, n, RELU6, slope)
    elif f == LEAKY_RELU: slopes(dy, z, g, n, LEAKY_RELU, slope)
    elif f == HARDSWISH: slopes(dy, z, g, n, HARDSWISH, slope)
    elif f == SIGMOID: slopes(dy, z, g, n, SIGMOID, slope)
    elif f == TANH: slopes(dy, z, g, n, TANH, slope)
    elif f == SILU: slopes(dy, z, g, n, SILU, slope)
    elif f == GELU: slopes(dy, z, g, n, GELU, slope)
