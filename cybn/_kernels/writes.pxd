# cython: cdivision=True
# The two formulas that write: scale computes y from x, and unscale dx from dy and x (loops.pxd).
#
# Writes past the caches are quick for whole lines only. A line that is written in part must first
# be read from memory, and later writes wait for it. So if a row ends within a line, the line is
# kept until the next row has completed it, provided that this row begins there.

from libc.string cimport memcpy

from cybn._kernels.lanes cimport (
    BFLOAT16, FLOAT16, LANES, LINE, PLAIN, STRIP, T, Way, item_of, read, stream_line, write_strip)
from cybn._kernels.loops cimport (
    A, B, HI, K, Z, RAMP, RECTIFIED, STEPS, STRAIGHT, Bend, Ends, bent, ends_of, lanes_of)


cdef inline T clamp(T z, T low, T high) noexcept nogil:
    """Limit z to low..high; NaN and -0.0 do not change."""
    z = low if low > z else z
    return high if high < z else z


# ---- seams -------------------------------------------------------------------------------

cdef struct Seam:               # the line in which one row ends and the next begins
    char line[LINE]
    char* at                    # its address
    Py_ssize_t held             # bytes of it that are known but not yet written


cdef inline void hold_nothing(Seam* seam) noexcept nogil:
    seam.at, seam.held = seam.line, 0


cdef inline void let_go(Seam* seam) noexcept nogil:
    """Write the known part of a line that no other row completes."""
    memcpy(seam.at, seam.line, seam.held)
    seam.held = 0


cdef inline void put_head(Seam* seam, const char* head, Py_ssize_t bytes, char* y) noexcept nogil:
    """Write the values before the first whole line, together with the end of the row before."""
    if bytes and seam.held + bytes == LINE and seam.at + seam.held == y:
        memcpy(seam.line + seam.held, head, bytes)
        stream_line(seam.line, seam.at)
        seam.held = 0
    else:
        let_go(seam)
        memcpy(y, head, bytes)


cdef inline void put_rest(Seam* seam, const char* rest, Py_ssize_t bytes, char* y) noexcept nogil:
    """Write the values after the last whole strip; keep a line that they do not fill."""
    let_go(seam)
    if bytes >= LINE:
        stream_line(rest, y)
        rest, y, bytes = rest + LINE, y + LINE, bytes - LINE
    memcpy(seam.line, rest, bytes)
    seam.at, seam.held = y, bytes


# ---- scale -------------------------------------------------------------------------------

cdef inline void scale_strip(
    Way way, Py_ssize_t step, bint clamped, bint added, bint stream,
    const char* x,              # IN  (lanes,)
    const char* r,              # IN  (lanes,)
    char* y,                    # OUT (lanes,)
    const T* restrict co,       # IN  HI, A and Z of columns, or of one channel
    T low, T high,
) noexcept nogil:
    cdef T room[2 * LANES]
    cdef T v[LANES]
    cdef T z
    cdef const T* at_x = read(way, x, lanes_of(low), room)
    cdef const T* at_r = read(way, r, lanes_of(low), room + LANES) if added else at_x
    cdef Py_ssize_t j
    for j in range(lanes_of(low)):
        z = (at_x[j] - co[HI + j * step]) * co[A + j * step] + co[Z + j * step]
        if added:
            z = z + at_r[j]
        v[j] = clamp(z, low, high) if clamped else z
    write_strip(way, stream, v, y)


cdef inline void scale_row(
    Way way, Py_ssize_t step, bint clamped, bint added, bint stream, const char* x, const char* r,
    char* y, Py_ssize_t w, const T* co, T low, T high, Seam* seam,
) noexcept nogil:
    cdef char head[STRIP]
    cdef char rest[STRIP]
    cdef Ends e = ends_of(way, y, stream, w, low)
    cdef Py_ssize_t item = item_of(way, low), last = w - e.lanes, i, at
    if stream and e.head:       # without stream, head is 0, and compilers omit this
        scale_strip(way, step, clamped, added, False, x, r, head, co, low, high)
    if e.rest:
        scale_strip(way, step, clamped, added, False, x + last * item, r + last * item, rest,
                    co + last * step, low, high)
    if stream:
        put_head(seam, head, e.head * item, y)
    for i in range(e.strips):
        at = e.head + i * e.lanes
        scale_strip(way, step, clamped, added, stream, x + at * item, r + at * item, y + at * item,
                    co + at * step, low, high)
    at = w - e.rest
    if stream:
        put_rest(seam, rest + (e.lanes - e.rest) * item, e.rest * item, y + at * item)
    else:
        memcpy(y + at * item, rest + (e.lanes - e.rest) * item, e.rest * item)


cdef inline void scale(
    Way way,
    bint stream,                # write past the caches; only if has_lines
    Py_ssize_t step,            # a constant
    const char* x,              # IN  (w,), of at least a strip
    const char* r,              # IN  (w,) residual, or NULL
    char* y,                    # OUT (w,), may be x or r
    Py_ssize_t w,
    const T* co,                # IN  HI, A and Z
    bint clamped,
    T low,                      # infinite if nothing is clamped
    T high,
    Seam* seam,                 # IO  used if `stream`; call let_go at the end
) noexcept nogil:
    """Compute y = (x - hi) * a + z + residual, clamped to low..high."""
    if r != NULL:
        if T is float and way == FLOAT16:
            scale_row(FLOAT16, step, True, True, stream, x, r, y, w, co, low, high, seam)
        elif T is float and way == BFLOAT16:
            scale_row(BFLOAT16, step, True, True, stream, x, r, y, w, co, low, high, seam)
        else:
            scale_row(PLAIN, step, True, True, stream, x, r, y, w, co, low, high, seam)
    elif T is float and way == FLOAT16:
        scale_row(FLOAT16, step, True, False, stream, x, x, y, w, co, low, high, seam)
    elif T is float and way == BFLOAT16:
        scale_row(BFLOAT16, step, True, False, stream, x, x, y, w, co, low, high, seam)
    elif clamped:
        scale_row(PLAIN, step, True, False, stream, x, x, y, w, co, low, high, seam)
    else:
        scale_row(PLAIN, step, False, False, stream, x, x, y, w, co, low, high, seam)


# ---- unscale -----------------------------------------------------------------------------

cdef inline void unscale_strip(
    Way way, Py_ssize_t step, Bend bend, bint stream,
    const char* dy,             # IN  (lanes,)
    const char* x,              # IN  (lanes,)
    char* dx,                   # OUT (lanes,)
    const T* restrict co,       # IN  HI, A, K, B and Z of columns, or of one channel
    const T* restrict kink,     # IN  (4,)
) noexcept nogil:
    cdef T room[2 * LANES]
    cdef T v[LANES]
    cdef T d, g
    cdef T low = 0, high = 0, below = 0, above = 0
    cdef const T* at_x = read(way, x, lanes_of(co[0]), room)
    cdef const T* at_dy = read(way, dy, lanes_of(co[0]), room + LANES)
    cdef Py_ssize_t j
    if bend != STRAIGHT:
        low, high, below, above = kink[0], kink[1], kink[2], kink[3]
    for j in range(lanes_of(co[0])):
        d = at_x[j] - co[HI + j * step]
        g = at_dy[j]
        if bend != STRAIGHT:
            g = bent(bend, g, d * co[A + j * step] + co[Z + j * step], low, high, below, above)
        v[j] = g * co[A + j * step] + d * co[K + j * step] + co[B + j * step]
    write_strip(way, stream, v, dx)


cdef inline void unscale_row(
    Way way, Py_ssize_t step, Bend bend, bint stream, const char* dy, const char* x, char* dx,
    Py_ssize_t w, const T* co, const T* kink, Seam* seam,
) noexcept nogil:
    cdef char head[STRIP]
    cdef char rest[STRIP]
    cdef Ends e = ends_of(way, dx, stream, w, co[0])
    cdef Py_ssize_t item = item_of(way, co[0]), last = w - e.lanes, i, at
    if stream and e.head:       # without stream, head is 0, and compilers omit this
        unscale_strip(way, step, bend, False, dy, x, head, co, kink)
    if e.rest:
        unscale_strip(way, step, bend, False, dy + last * item, x + last * item, rest,
                      co + last * step, kink)
    if stream:
        put_head(seam, head, e.head * item, dx)
    for i in range(e.strips):
        at = e.head + i * e.lanes
        unscale_strip(way, step, bend, stream, dy + at * item, x + at * item, dx + at * item,
                      co + at * step, kink)
    at = w - e.rest
    if stream:
        put_rest(seam, rest + (e.lanes - e.rest) * item, e.rest * item, dx + at * item)
    else:
        memcpy(dx + at * item, rest + (e.lanes - e.rest) * item, e.rest * item)


cdef inline void unscale(
    Way way,
    bint stream,                # write past the caches; only if has_lines
    Py_ssize_t step,            # a constant
    Bend bend,                  # STRAIGHT for half types
    const char* dy,             # IN  (w,), of at least a strip
    const char* x,              # IN  (w,)
    char* dx,                   # OUT (w,), may be dy or x
    Py_ssize_t w,
    const T* co,                # IN  HI, A, K, B and Z
    const T* kink,              # IN  (4,)
    Seam* seam,                 # IO  used if `stream`; call let_go at the end
) noexcept nogil:
    """Compute dx = g * a + (x - hi) * k + b."""
    if T is float and way == FLOAT16:
        unscale_row(FLOAT16, step, STRAIGHT, stream, dy, x, dx, w, co, kink, seam)
    elif T is float and way == BFLOAT16:
        unscale_row(BFLOAT16, step, STRAIGHT, stream, dy, x, dx, w, co, kink, seam)
    elif T is float and bend == RECTIFIED:
        unscale_row(PLAIN, step, RECTIFIED, stream, dy, x, dx, w, co, kink, seam)
    elif T is float and bend == STEPS:
        unscale_row(PLAIN, step, STEPS, stream, dy, x, dx, w, co, kink, seam)
    elif T is float and bend == RAMP:
        unscale_row(PLAIN, step, RAMP, stream, dy, x, dx, w, co, kink, seam)
    else:
        unscale_row(PLAIN, step, STRAIGHT, stream, dy, x, dx, w, co, kink, seam)
