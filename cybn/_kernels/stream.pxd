# cython: cdivision=True
# Stores that go past the caches, for outputs that no cache could keep.
#
# A plain store first reads the line it writes to. Writing whole lines with non-temporal stores
# saves that read: 12 to 16 bytes an element become 8 to 12, and x is not pushed out of the last
# level cache by y. Only whole lines gain: a line written in part costs more than a plain store.

cdef extern from * nogil:
    """
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>

    #if defined(__SSE2__)
    #include <immintrin.h>

    static inline void cybn_stream_line(void *to, const void *from) {
    #if defined(__AVX__)
        __m256i a = _mm256_loadu_si256((const __m256i *)from);
        __m256i b = _mm256_loadu_si256((const __m256i *)from + 1);
        _mm256_stream_si256((__m256i *)to, a);
        _mm256_stream_si256((__m256i *)to + 1, b);
    #else
        __m128i a = _mm_loadu_si128((const __m128i *)from);
        __m128i b = _mm_loadu_si128((const __m128i *)from + 1);
        __m128i c = _mm_loadu_si128((const __m128i *)from + 2);
        __m128i d = _mm_loadu_si128((const __m128i *)from + 3);
        _mm_stream_si128((__m128i *)to, a);
        _mm_stream_si128((__m128i *)to + 1, b);
        _mm_stream_si128((__m128i *)to + 2, c);
        _mm_stream_si128((__m128i *)to + 3, d);
    #endif
    }

    /* Copy from L1 to memory: head and tail of the range plainly, whole lines past the caches. */
    static inline void cybn_stream(void *to, const void *from, size_t bytes) {
        char *dst = (char *)to;
        const char *src = (const char *)from;
        size_t head = (size_t)(-(uintptr_t)dst & 63);
        if (head > bytes) head = bytes;
        memcpy(dst, src, head);
        dst += head; src += head; bytes -= head;
        for (; bytes >= 64; bytes -= 64, dst += 64, src += 64)
            cybn_stream_line(dst, src);
        memcpy(dst, src, bytes);
    }

    /* Make streamed stores visible to other threads before whatever comes next. */
    static inline void cybn_stream_end(void) { _mm_sfence(); }
    #else
    static inline void cybn_stream(void *to, const void *from, size_t n) { memcpy(to, from, n); }
    static inline void cybn_stream_end(void) {}
    #endif
    """
    void stream "cybn_stream"(void* to, const void* source, size_t bytes)
    void stream_end "cybn_stream_end"()
