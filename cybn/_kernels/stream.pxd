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
    #include <emmintrin.h>

    /* Copy from L1 to memory: head and tail of the range plainly, whole lines past the caches. */
    static inline void cybn_stream(void *to, const void *from, size_t bytes) {
        char *dst = (char *)to;
        const char *src = (const char *)from;
        size_t head = (size_t)(-(uintptr_t)dst & 63);
        if (head > bytes) head = bytes;
        memcpy(dst, src, head);
        dst += head; src += head; bytes -= head;
        for (; bytes >= 64; bytes -= 64, dst += 64, src += 64) {
            __m128i a = _mm_loadu_si128((const __m128i *)src);
            __m128i b = _mm_loadu_si128((const __m128i *)src + 1);
            __m128i c = _mm_loadu_si128((const __m128i *)src + 2);
            __m128i d = _mm_loadu_si128((const __m128i *)src + 3);
            _mm_stream_si128((__m128i *)dst, a);
            _mm_stream_si128((__m128i *)dst + 1, b);
            _mm_stream_si128((__m128i *)dst + 2, c);
            _mm_stream_si128((__m128i *)dst + 3, d);
        }
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
