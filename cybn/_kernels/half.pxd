# cython: cdivision=True
# Half types in storage: float16 and bfloat16 as 16-bit words, widened to float32 and back.
#
# Widening is exact. Narrowing rounds to nearest, ties to even. Values that are too large become
# infinite, subnormals are kept, and a NaN becomes the quiet NaN. All of this is integer arithmetic
# and selection on whole vectors, so it needs no instruction that only some CPUs have, and gives
# the same bits on all of them. Levels that have AVX2 and F16C convert sixteen values at once, to
# the same bits: F16C also keeps subnormals and rounds to nearest even, whatever MXCSR is, and the
# code below keeps only the sign of a NaN.

from libc.stdint cimport uint16_t, uint32_t
from libc.string cimport memcpy

cdef extern from * nogil:
    """
    #include <stddef.h>
    #include <stdint.h>

    #if defined(__F16C__) && defined(__AVX2__)
    #include <immintrin.h>
    #define CYBN_SIXTEENS(n) ((n) / 16)
    #define CYBN_F16C 1

    static inline float cybn_widen1(uint16_t h) { return _cvtsh_ss(h); }

    static inline uint16_t cybn_narrow1(float f) {
        uint16_t h = (uint16_t)_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
        return (h & 0x7FFF) > 0x7C00 ? h & 0xFE00 : h;
    }

    /* Reduce each NaN among sixteen float16 to its sign and the quiet bit. */
    static inline __m256i cybn_quiet16(__m256i w) {
        __m256i rest = _mm256_and_si256(w, _mm256_set1_epi16(0x7FFF));
        __m256i nan = _mm256_cmpgt_epi16(rest, _mm256_set1_epi16(0x7C00));
        return _mm256_andnot_si256(_mm256_and_si256(nan, _mm256_set1_epi16(0x01FF)), w);
    }

    #if defined(__AVX512F__)
    /* Vectors are as wide as those of the loops, as a load of what two stores wrote has to wait. */
    static inline void cybn_widen16(const uint16_t *h, float *f, int brain) {
        __m256i w = _mm256_loadu_si256((const __m256i *)h);
        __m512i u = _mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16);
        _mm512_storeu_ps(f, brain ? _mm512_castsi512_ps(u) : _mm512_cvtph_ps(w));
    }

    static inline void cybn_narrow16(const float *f, uint16_t *h, int brain, int stream) {
        __m512 v = _mm512_loadu_ps(f);
        __m512i u = _mm512_castps_si512(v);
        __m512i even = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        __m256i w;
        if (brain) {                                    /* as in rounded() below */
            u = _mm512_add_epi32(u, _mm512_add_epi32(even, _mm512_set1_epi32(0x7FFF)));
            u = _mm512_mask_mov_epi32(u, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                      _mm512_set1_epi32(0x7FC00000));
            w = _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16));
        } else {
            w = cybn_quiet16(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
        }
        if (stream)
            _mm256_stream_si256((__m256i *)h, w);
        else
            _mm256_storeu_si256((__m256i *)h, w);
    }
    #else
    static inline __m256 cybn_widen8(__m128i h, int brain) {
        if (brain)
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
        return _mm256_cvtph_ps(h);
    }

    static inline void cybn_widen16(const uint16_t *h, float *f, int brain) {
        _mm256_storeu_ps(f, cybn_widen8(_mm_loadu_si128((const __m128i *)h), brain));
        _mm256_storeu_ps(f + 8, cybn_widen8(_mm_loadu_si128((const __m128i *)h + 1), brain));
    }

    /* The upper halves are bfloat16, as in rounded() below. */
    static inline __m256i cybn_rounded8(__m256 f) {
        __m256i u = _mm256_castps_si256(f);
        __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
        u = _mm256_add_epi32(u, _mm256_add_epi32(even, _mm256_set1_epi32(0x7FFF)));
        return _mm256_blendv_epi8(u, _mm256_set1_epi32(0x7FC00000), nan);
    }

    static inline void cybn_narrow16(const float *f, uint16_t *h, int brain, int stream) {
        __m256 f0 = _mm256_loadu_ps(f), f1 = _mm256_loadu_ps(f + 8);
        __m256i w;
        if (brain) {
            w = _mm256_packs_epi32(_mm256_srai_epi32(cybn_rounded8(f0), 16),
                                   _mm256_srai_epi32(cybn_rounded8(f1), 16));
            w = _mm256_permute4x64_epi64(w, 0xD8);      /* packing works on halves of 128 bits */
        } else {
            w = _mm256_castsi128_si256(_mm256_cvtps_ph(f0, _MM_FROUND_TO_NEAREST_INT));
            w = _mm256_inserti128_si256(w, _mm256_cvtps_ph(f1, _MM_FROUND_TO_NEAREST_INT), 1);
            w = cybn_quiet16(w);
        }
        if (stream)
            _mm256_stream_si256((__m256i *)h, w);
        else
            _mm256_storeu_si256((__m256i *)h, w);
    }
    #endif
    #else
    #define CYBN_SIXTEENS(n) ((ptrdiff_t)0 * (n))
    #define CYBN_F16C 0
    static inline float cybn_widen1(uint16_t h) { return h; }
    static inline uint16_t cybn_narrow1(float f) { return (uint16_t)f; }
    static inline void cybn_widen16(const uint16_t *h, float *f, int b) {
        (void)h; (void)f; (void)b;
    }
    static inline void cybn_narrow16(const float *f, uint16_t *h, int b, int s) {
        (void)h; (void)f; (void)b; (void)s;
    }
    #endif
    """
    bint F16C "CYBN_F16C"
    float widen1 "cybn_widen1"(uint16_t h)
    uint16_t narrow1 "cybn_narrow1"(float f)
    void widen16 "cybn_widen16"(const uint16_t* h, float* f, bint brain)
    void narrow16 "cybn_narrow16"(const float* f, uint16_t* h, bint brain, bint stream)
    Py_ssize_t sixteens "CYBN_SIXTEENS"(Py_ssize_t n)   # groups of 16 to convert at once


cdef inline uint32_t bits(float f) noexcept nogil:
    cdef uint32_t u
    memcpy(&u, &f, sizeof(u))
    return u


cdef inline float number(uint32_t u) noexcept nogil:
    cdef float f
    memcpy(&f, &u, sizeof(f))
    return f


cdef inline float from_float16(uint16_t h) noexcept nogil:
    """Shift the fields up; 2**112 corrects the bias of the exponent, also for subnormals."""
    cdef uint32_t sign = h & 0x8000, rest = h & 0x7FFF
    cdef uint32_t u = bits(number(rest << 13) * number(0x77800000))
    u |= 0x7F800000 if rest >= 0x7C00 else 0
    return widen1(h) if F16C else number(u | sign << 16)


cdef inline uint16_t to_float16(float f) noexcept nogil:
    cdef uint32_t sign = bits(f) & 0x80000000U
    cdef uint32_t u = bits(f) ^ sign
    # Below 2**-14: after adding 0.5, the last bit of the sum is the last bit to keep, rounded.
    cdef uint32_t low = bits(number(u) + 0.5) - 0x3F000000
    cdef uint32_t mid = (u - 0x38000000 + 0xFFF + (u >> 13 & 1)) >> 13
    cdef uint32_t high = 0x7E00 if u > 0x7F800000 else 0x7C00
    u = low if u < 0x38800000 else (mid if u < 0x47800000 else high)
    return narrow1(f) if F16C else <uint16_t> (u | sign >> 16)


cdef inline uint32_t rounded(float f) noexcept nogil:
    """Return the bits of f rounded to bfloat16, in the upper half of the word."""
    cdef uint32_t u = bits(f)
    u += 0x7FFF + (u >> 16 & 1)
    return 0x7FC00000 if f != f else u


cdef inline void widen(
    const uint16_t* restrict h,     # IN  (n,)
    float* restrict f,              # OUT (n,)
    Py_ssize_t n,
    bint brain,
) noexcept nogil:
    cdef Py_ssize_t i, done = 16 * sixteens(n)
    for i in range(done // 16):
        widen16(h + 16 * i, f + 16 * i, brain)
    if not brain:
        for i in range(done, n):
            f[i] = from_float16(h[i])
    else:
        for i in range(done, n):
            f[i] = number(<uint32_t> h[i] << 16)


cdef inline void narrow(
    const float* restrict f,        # IN  (n,)
    uint16_t* restrict h,           # OUT (n,)
    Py_ssize_t n,
    bint brain,
) noexcept nogil:
    cdef Py_ssize_t i, done = 16 * sixteens(n)
    for i in range(done // 16):
        narrow16(f + 16 * i, h + 16 * i, brain, False)
    if not brain:
        for i in range(done, n):
            h[i] = to_float16(f[i])
    else:
        for i in range(done, n):
            h[i] = <uint16_t> (rounded(f[i]) >> 16)
