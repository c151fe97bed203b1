# cython: cdivision=True
# Strips of lanes: the shape of every hot loop.
#
# A strip is 128 bytes of values of T: two cache lines, 32 float32 or 16 float64. Loops go strip by
# strip, and within a strip over a constant number of lanes. Compilers turn this into vectors of any
# width and keep intermediate values of a strip in registers. The bits are the same at every
# instruction level, because the source fixes the order of all operations.
#
# The type in memory may differ from the type of the computation. The way describes how a strip is
# read and written. It is a constant in every loop, so a loop is written once and compiled for each
# way.
#
#   way        x, dy, residual are           y, dx are
#   PLAIN      read in place                 written as they are
#   FLOAT16    widened as they are read      rounded as they are written
#   BFLOAT16   widened as they are read      rounded as they are written
#
# A strip that begins on a cache line can be written past the caches, as one or two whole lines.

from libc.stdint cimport uint16_t
from libc.string cimport memcpy

from cybn._kernels.half cimport F16C, narrow, narrow16, widen

ctypedef fused T:           # type of the computation
    float
    double

cdef enum:
    STRIP = 128             # bytes of T
    LANES = 32              # values of a strip, at most
    LINE = 64               # bytes of a cache line
    PIECE = 1024            # values of a run between two flushes to float64; of a piece in stages
    FLUSH = 32              # values that a lane collects between two flushes
    WIDE = 8                # lanes of the float64 sums of a run

cdef enum Way:
    PLAIN
    FLOAT16
    BFLOAT16

cdef extern from * nogil:
    """
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>
    #if defined(__SSE2__)
    #include <immintrin.h>
    #endif

    /* Write a cache line past the caches. A plain store first reads the line that it writes
       to. Writing whole lines like this avoids that read, and leaves x in the caches for the
       second time it is read. */
    static inline void cybn_stream_line(const void *from, void *to) {
    #if defined(__AVX512F__)
        _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512((const __m512i *)from));
    #elif defined(__AVX__)
        for (int i = 0; i < 2; i++)
            _mm256_stream_si256((__m256i *)to + i, _mm256_loadu_si256((const __m256i *)from + i));
    #elif defined(__SSE2__)
        for (int i = 0; i < 4; i++)
            _mm_stream_si128((__m128i *)to + i, _mm_loadu_si128((const __m128i *)from + i));
    #else
        memcpy(to, from, 64);
    #endif
    }

    /* Make such stores visible to other threads before later stores. */
    static inline void cybn_stream_end(void) {
    #if defined(__SSE2__)
        _mm_sfence();
    #endif
    }
    """
    void stream_line "cybn_stream_line"(const void* source, void* to)
    void stream_end "cybn_stream_end"()


cdef inline Py_ssize_t item_of(Way way, T of_type) noexcept nogil:
    """Return the bytes of a value in memory; `of_type` only selects T."""
    return <Py_ssize_t> sizeof(T) if way == PLAIN else 2


cdef inline const T* read(
    Way way,
    const char* x,          # IN  (m,) in memory
    Py_ssize_t m,
    T* room,                # OUT (m,) used if values are widened
) noexcept nogil:
    """Return the values as T: x itself, or room with the widened values."""
    if T is float and way >= FLOAT16:
        widen(<const uint16_t*> x, room, m, way == BFLOAT16)
        return room
    return <const T*> x


cdef inline void write(
    Way way,
    const T* v,             # IN  (m,)
    char* y,                # OUT (m,) in memory
    Py_ssize_t m,
) noexcept nogil:
    cdef Py_ssize_t j
    if T is float and way >= FLOAT16:
        narrow(v, <uint16_t*> y, m, way == BFLOAT16)
    else:
        for j in range(m):
            (<T*> y)[j] = v[j]


cdef inline void write_strip(
    Way way,
    bint stream,            # write past the caches; y begins on a line
    const T* v,             # IN  (lanes,)
    char* y,                # OUT (lanes,) in memory
) noexcept nogil:
    cdef uint16_t half[LANES]
    if not stream:
        write(way, v, y, STRIP // <Py_ssize_t> sizeof(T))
    elif T is float and way >= FLOAT16:
        if F16C:
            narrow16(v, <uint16_t*> y, way == BFLOAT16, True)
            narrow16(v + 16, <uint16_t*> y + 16, way == BFLOAT16, True)
        else:
            narrow(v, half, LANES, way == BFLOAT16)
            stream_line(half, y)
    else:
        stream_line(v, y)
        stream_line(v + LINE // <Py_ssize_t> sizeof(T), y + LINE)


cdef inline T* on_line(T* room, const char* beside) noexcept nogil:
    """Return where to begin in room, so that its lines begin at the same indices as `beside`'s.

    This takes less than two lines of room. Vectors that cross lines cost twice as much in L1, and
    vectors of 64 bytes cross them most often.
    """
    cdef size_t start = (<size_t> room + LINE - 1) & ~<size_t> (LINE - 1)
    return <T*> (start + (<size_t> beside & (LINE - 1)) // sizeof(T) * sizeof(T))


cdef inline void clear(T* v, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n):
        v[j] = 0


# ---- from lanes of T to sums in float64 --------------------------------------------------

cdef inline void flush(
    const T* restrict lanes,        # IN  (STRIP bytes,)
    double* restrict wide,          # IO  (WIDE,)
) noexcept nogil:
    """Add the lanes of a run to float64 lanes, in two steps that compilers vectorize."""
    cdef T folded[WIDE]
    cdef Py_ssize_t j
    for j in range(WIDE):
        if T is float:
            folded[j] = (lanes[j] + lanes[j + 8]) + (lanes[j + 16] + lanes[j + 24])
        else:
            folded[j] = lanes[j] + lanes[j + 8]
    for j in range(WIDE):
        wide[j] += folded[j]


cdef inline double across(const double* wide) noexcept nogil:
    """Return the sum of WIDE float64 lanes."""
    return ((wide[0] + wide[4]) + (wide[1] + wide[5])) + ((wide[2] + wide[6]) + (wide[3] + wide[7]))


cdef inline double total(const T* restrict v, Py_ssize_t n) noexcept nogil:
    """Return the sum of n values in float64."""
    cdef double wide[WIDE]
    cdef Py_ssize_t i, j, full = n // WIDE
    for j in range(WIDE):
        wide[j] = 0
    for i in range(full):
        for j in range(WIDE):
            wide[j] += v[i * WIDE + j]
    for j in range(n - full * WIDE):
        wide[j] += v[full * WIDE + j]
    return across(wide)


cdef inline void gather(
    T* restrict v,              # IO  (rows, m, s) sums of columns; set to 0 afterwards
    Py_ssize_t m,
    Py_ssize_t s,
    Py_ssize_t rows,            # 1 unless s is 1
    double* restrict out,       # IO  (m,) sums of channels
) noexcept nogil:
    """Add the columns of each channel to its float64 sum."""
    cdef Py_ssize_t c, i
    cdef double sum_of
    if s > 1:
        for c in range(m):
            out[c] += total(v + c * s, s)
    elif rows == 1:
        for c in range(m):
            out[c] += v[c]
    else:
        # Add the rows to each other first: next to a huge value in out, each would be rounded off.
        for c in range(m):
            sum_of = v[c]
            for i in range(1, rows):
                sum_of += v[i * m + c]
            out[c] += sum_of
    clear(v, rows * m * s)


# ---- from one value per channel to one value per column ----------------------------------

cdef inline void spread(
    T* v,                       # IO  (times, m, s); given: values m * s - m to m * s
    Py_ssize_t m,
    Py_ssize_t s,
    Py_ssize_t times,
) noexcept nogil:
    """Give each of m values to s columns, and repeat the row."""
    cdef Py_ssize_t c, j, k, strips = (s + WIDE - 1) // WIDE
    cdef T value
    if s > 1:
        for c in range(m):
            value = v[m * s - m + c]
            if c * s + strips * WIDE <= m * s - m + c:      # the next columns overwrite the excess
                for j in range(strips):
                    for k in range(WIDE):
                        v[c * s + j * WIDE + k] = value
            else:
                for j in range(s):
                    v[c * s + j] = value
    for j in range(m * s, times * m * s):
        v[j] = v[j - m * s]
