# cython: cdivision=True
# Half types in storage: float16 and bfloat16 as 16-bit words, widened to float32 and back.
#
# Widening is exact. Narrowing rounds to nearest, ties to even; beyond the largest finite value
# it gives an infinity, subnormals are kept, a NaN becomes the quiet NaN. All of it is integer
# arithmetic and selects on whole vectors, so it needs no instruction that only some CPUs have,
# and gives the same bits on all of them. Levels that have F16C convert eight of float16 at once,
# to the same bits: these instructions too keep subnormals and round to nearest even, whatever
# MXCSR says, and a NaN of theirs is replaced.

from libc.stdint cimport uint16_t, uint32_t
from libc.string cimport memcpy

cdef extern from * nogil:
    """
    #include <stddef.h>
    #include <stdint.h>

    #if defined(__F16C__)
    #include <immintrin.h>

    static inline void cybn_widen8(const uint16_t *h, float *f) {
        _mm256_storeu_ps(f, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h)));
    }

    static inline void cybn_narrow8(const float *f, uint16_t *h) {
        const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
        __m256 v = _mm256_loadu_ps(f), nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
        v = _mm256_blendv_ps(v, _mm256_or_ps(quiet, _mm256_and_ps(v, _mm256_set1_ps(-0.0f))), nan);
        _mm_storeu_si128((__m128i *)h, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    #define CYBN_EIGHTS(n) ((n) & ~(ptrdiff_t)7)
    #else
    static inline void cybn_widen8(const uint16_t *h, float *f) { (void)h; (void)f; }
    static inline void cybn_narrow8(const float *f, uint16_t *h) { (void)h; (void)f; }
    #define CYBN_EIGHTS(n) ((ptrdiff_t)0 & (n))
    #endif
    """
    void widen8 "cybn_widen8"(const uint16_t* h, float* f)
    void narrow8 "cybn_narrow8"(const float* f, uint16_t* h)
    Py_ssize_t eights "CYBN_EIGHTS"(Py_ssize_t n)   # how many of n go eight at once


cdef enum Storage:
    NATIVE              # float or double: nothing to convert
    FLOAT16             # 1 sign, 5 exponent, 10 mantissa bits
    BFLOAT16            # the upper half of a float32


cdef inline uint32_t bits(float f) noexcept nogil:
    cdef uint32_t u
    memcpy(&u, &f, sizeof(u))
    return u


cdef inline float number(uint32_t u) noexcept nogil:
    cdef float f
    memcpy(&f, &u, sizeof(f))
    return f


cdef inline float from_float16(uint16_t h) noexcept nogil:
    """Move the fields up; 2**112 corrects the exponent's bias, subnormals included."""
    cdef uint32_t sign = h & 0x8000, rest = h & 0x7FFF
    cdef uint32_t u = bits(number(rest << 13) * number(0x77800000))
    u |= 0x7F800000 if rest >= 0x7C00 else 0
    return number(u | sign << 16)


cdef inline uint16_t to_float16(float f) noexcept nogil:
    cdef uint32_t sign = bits(f) & 0x80000000U
    cdef uint32_t u = bits(f) ^ sign
    # Below 2**-14: adding 0.5 puts the last bit kept at the last bit of the sum, rounded.
    cdef uint32_t low = bits(number(u) + 0.5) - 0x3F000000
    cdef uint32_t mid = (u - 0x38000000 + 0xFFF + (u >> 13 & 1)) >> 13
    cdef uint32_t high = 0x7E00 if u > 0x7F800000 else 0x7C00
    u = low if u < 0x38800000 else (mid if u < 0x47800000 else high)
    return <uint16_t> (u | sign >> 16)


cdef inline uint32_t rounded(float f) noexcept nogil:
    """The bits of f rounded to bfloat16, in the upper half."""
    cdef uint32_t u = bits(f)
    u += 0x7FFF + (u >> 16 & 1)
    return 0x7FC00000 if f != f else u


cdef inline void widen(
    const uint16_t* restrict h,     # IN  (n,)
    float* restrict f,              # OUT (n,)
    Py_ssize_t n,
    Storage storage,
) noexcept nogil:
    cdef Py_ssize_t i
    if storage == FLOAT16:
        for i in range(eights(n) // 8):
            widen8(h + 8 * i, f + 8 * i)
        for i in range(eights(n), n):
            f[i] = from_float16(h[i])
    else:
        for i in range(n):
            f[i] = number(<uint32_t> h[i] << 16)


cdef inline void narrow(
    const float* restrict f,        # IN  (n,)
    uint16_t* restrict h,           # OUT (n,)
    Py_ssize_t n,
    Storage storage,
) noexcept nogil:
    cdef Py_ssize_t i
    if storage == FLOAT16:
        for i in range(eights(n) // 8):
            narrow8(f + 8 * i, h + 8 * i)
        for i in range(eights(n), n):
            h[i] = to_float16(f[i])
    else:
        for i in range(n):
            h[i] = <uint16_t> (rounded(f[i]) >> 16)
