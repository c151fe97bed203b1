# cython: cdivision=True
# The four formulas of batch normalization, each written once: two here, two in writes.pxd.
#
#   loop      reads            writes    bytes an element (float32)
#   sums      x                -         4     a += d        b += d * d
#   dots      dy, x            -         8     a += g        b += g * d
#   scale     x, residual      y         8     y  = d * a + z + residual, clamped
#   unscale   dy, x            dx       12     dx = g * a + d * k + b
#
# d = x - hi. g is dy, or dy times the slope of a piecewise-linear activation at d * a + z.
#
# a. Coefficients. `step` is 0 for a run, whose values have one channel and so one hi, a, k, b, z,
#    and 1 for columns, which have one each. It is a constant, so both forms come from one loop.
# b. Rows. Column sums are loaded and stored once for many rows, four of which (sums) or two (dots)
#    are added at a time. A run is a table of one strip a row.
# c. Order. A lane of a run, and a column, collect at most FLUSH values before they go to float64:
#    rounding in float32 cannot build up over a long channel.
# d. Ends. The last strip of a row overlaps the one before. It is computed first, and what it adds
#    to that one is put in place at the end; so a loop needs no second copy for a shorter strip, and
#    reads nothing beyond a row. Rows shorter than a strip are copied to one.

from libc.string cimport memcpy

from cybn._kernels.lanes cimport (
    BFLOAT16, FLOAT16, LANES, LINE, PLAIN, STRIP, T, WIDE, Way, clear, flush, item_of, read)

cdef enum Bend:             # activations whose slope costs a comparison or two; of float32 alone
    STRAIGHT                # none
    RECTIFIED               # relu
    STEPS                   # two other slopes outside low..high: relu6, leaky_relu
    RAMP                    # hardswish

cdef enum:
    ROOM = 2176             # values between the arrays of coefficients: columns, and two lines

cdef enum:                  # where each kind of coefficient begins
    HI = 0                  # the mean rounded to T, or another shift near it
    A = ROOM                # gamma / sqrt(var + eps)
    Z = 2 * ROOM            # what d * a becomes z with
    K = 3 * ROOM            # dx: slope in x
    B = 4 * ROOM            # dx: constant
    COEFFICIENTS = 6 * ROOM + 64
    FIRST_TERMS = 3 * ROOM + 64     # HI, A and Z, which are all that sums need

cdef struct Lines:          # rows of memory that a loop goes through together
    const char* at[4]
    Py_ssize_t pitch        # bytes to the same rows of the next sweep


cdef inline T bent(
    Bend bend, T dy, T z,
    T low, T high,
    T below,                    # slope from low down
    T above,                    # slope from high up
) noexcept nogil:
    """dy times the slope at z; 0 where the slope is 0, whatever dy is."""
    cdef T s, one = 1
    if bend == RECTIFIED:
        return 0 if z <= 0 else dy
    s = one if bend == STEPS else (z + <T> 1.5) * <T> (1.0 / 3)
    s = below if z <= low else s
    s = above if z >= high else s
    return 0 if s == 0 else dy * s


cdef inline Py_ssize_t lanes_of(T of_type) noexcept nogil:
    """Values of a strip."""
    return STRIP // <Py_ssize_t> sizeof(T)


# ---- ends --------------------------------------------------------------------------------

cdef struct Ends:               # of a row: what does not fill whole strips that begin on a line
    Py_ssize_t head, strips, rest, lanes


cdef inline bint has_lines(Way way, Py_ssize_t w, T of_type) noexcept nogil:
    """Whether a row has a whole strip that begins on a line, wherever the row begins."""
    return (w - lanes_of(of_type)) * item_of(way, of_type) >= LINE


cdef inline Ends ends_of(
    Way way, const char* row, bint align, Py_ssize_t w, T of_type
) noexcept nogil:
    cdef Ends e
    cdef Py_ssize_t lanes = lanes_of(of_type)
    e.lanes = lanes
    e.head = <Py_ssize_t> (-<size_t> row & (LINE - 1)) // item_of(way, of_type) if align else 0
    if e.head + lanes > w:      # no whole strip begins on a line
        e.head = min(w, lanes)
    e.strips = (w - e.head) // lanes
    e.rest = w - e.head - e.strips * lanes
    return e


cdef inline void take_ends(Ends e, const T* v, Py_ssize_t w, T* ends) noexcept nogil:
    """The first strip of a row and its last, where the row has more than whole strips."""
    if e.head:
        memcpy(ends, v, STRIP)
    if e.rest:
        memcpy(ends + e.lanes, v + w - e.lanes, STRIP)


cdef inline void give_ends(Ends e, const T* ends, Py_ssize_t w, T* v) noexcept nogil:
    """Put back what of them no whole strip has."""
    memcpy(v, ends, e.head * sizeof(T))
    memcpy(v + w - e.rest, ends + 2 * e.lanes - e.rest, e.rest * sizeof(T))


# ---- sums --------------------------------------------------------------------------------

cdef inline void sum_strip(
    Way way, Py_ssize_t step,
    const Lines* x,             # IN  (sweeps, 4, lanes), from byte `start` on
    Py_ssize_t start,
    Py_ssize_t sweeps,
    const T* hi,                # IN  (lanes,), or one
    T* restrict a,              # IO  (lanes,)
    T* restrict b,              # IO  (lanes,)
) noexcept nogil:
    cdef T va[LANES]
    cdef T vb[LANES]
    cdef T room[4 * LANES]
    cdef T d0, d1, d2, d3
    cdef const T* x0
    cdef const T* x1
    cdef const T* x2
    cdef const T* x3
    cdef Py_ssize_t _, j, lanes = lanes_of(a[0])
    for j in range(lanes):
        va[j] = a[j]
        vb[j] = b[j]
    for _ in range(sweeps):
        x0 = read(way, x.at[0] + start, lanes, room)
        x1 = read(way, x.at[1] + start, lanes, room + LANES)
        x2 = read(way, x.at[2] + start, lanes, room + 2 * LANES)
        x3 = read(way, x.at[3] + start, lanes, room + 3 * LANES)
        for j in range(lanes):
            d0 = x0[j] - hi[j * step]
            d1 = x1[j] - hi[j * step]
            d2 = x2[j] - hi[j * step]
            d3 = x3[j] - hi[j * step]
            va[j] += (d0 + d1) + (d2 + d3)
            vb[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
        start += x.pitch
    for j in range(lanes):
        a[j] = va[j]
        b[j] = vb[j]


cdef inline void sum_columns(
    Way way,                    # a constant; STREAM is PLAIN here
    const Lines* x,             # IN  (sweeps, 4, w)
    Py_ssize_t sweeps,
    Py_ssize_t w,               # at least a strip
    const T* hi,                # IN  (w,)
    T* a,                       # IO  (w,) sums of d = x - hi
    T* b,                       # IO  (w,) sums of d * d
) noexcept nogil:
    cdef T ends_a[2 * LANES]
    cdef T ends_b[2 * LANES]
    cdef Ends e = ends_of(way, x.at[0], way == PLAIN, w, a[0])
    cdef Py_ssize_t item = item_of(way, a[0]), i, at
    take_ends(e, a, w, ends_a)
    take_ends(e, b, w, ends_b)
    for i in range(2):
        at = 0 if i == 0 else w - e.lanes
        if e.head if i == 0 else e.rest:
            sum_strip(way, 1, x, at * item, sweeps, hi + at, ends_a + i * e.lanes,
                      ends_b + i * e.lanes)
    for i in range(e.strips):
        at = e.head + i * e.lanes
        sum_strip(way, 1, x, at * item, sweeps, hi + at, a + at, b + at)
    give_ends(e, ends_a, w, a)
    give_ends(e, ends_b, w, b)


cdef inline Way end_of_run(
    Way way, const char* x, Py_ssize_t n, Py_ssize_t whole, T fill, T* room
) noexcept nogil:
    """Copy the last n values of a run to a whole number of values, the others fill; say how."""
    cdef T widened[LANES]
    cdef const T* at
    cdef Py_ssize_t i, j, m
    for i in range(0, (n + LANES - 1) // LANES):
        m = min(LANES, n - i * LANES)
        at = read(way, x + i * LANES * item_of(way, fill), m, widened)
        for j in range(m):
            room[i * LANES + j] = at[j]
    for j in range(n, whole):
        room[j] = fill
    return PLAIN


cdef inline void sum_run(
    Way way,
    const char* x,              # IN  (n,)
    Py_ssize_t n,
    T hi,
    double* acc,                # IO  (2, WIDE) sums of d = x - hi, and of d * d
) noexcept nogil:
    cdef T a[LANES]
    cdef T b[LANES]
    cdef T end[4 * LANES]
    cdef Lines lines
    cdef Py_ssize_t sweep = 4 * lanes_of(hi), most = 8 * sweep, left = most, m, k, strip
    clear(a, lanes_of(hi))
    clear(b, lanes_of(hi))
    while n > 0:
        m = min(n // sweep * sweep, left)
        if m == 0:
            way = end_of_run(way, x, n, sweep, hi, end)
            x = <const char*> &end[0]
            m = n = sweep
        strip = sweep // 4 * item_of(way, hi)
        for k in range(4):
            lines.at[k] = x + k * strip
        lines.pitch = 4 * strip
        if T is float and way == FLOAT16:
            sum_strip(FLOAT16, 0, &lines, 0, m // sweep, &hi, a, b)
        elif T is float and way == BFLOAT16:
            sum_strip(BFLOAT16, 0, &lines, 0, m // sweep, &hi, a, b)
        else:
            sum_strip(PLAIN, 0, &lines, 0, m // sweep, &hi, a, b)
        x += m // sweep * 4 * strip
        n -= m
        left -= m
        if left <= 0 and n > 0:
            flush(a, acc)
            flush(b, acc + WIDE)
            clear(a, lanes_of(hi))
            clear(b, lanes_of(hi))
            left = most
    flush(a, acc)
    flush(b, acc + WIDE)


# ---- dots --------------------------------------------------------------------------------

cdef inline void dot_strip(
    Way way, Py_ssize_t step, Bend bend,
    const Lines* dy,            # IN  (sweeps, 2, lanes), from byte `start` on
    const Lines* x,             # IN  (sweeps, 2, lanes)
    Py_ssize_t start,
    Py_ssize_t sweeps,
    const T* co,                # IN  HI and, with a bend, A and Z of columns, or of one
    const T* kink,              # IN  (4,) low, high, and the slopes beyond
    T* restrict a,              # IO  (lanes,)
    T* restrict b,              # IO  (lanes,)
) noexcept nogil:
    cdef T va[LANES]
    cdef T vb[LANES]
    cdef T room[4 * LANES]
    cdef T d0, d1, g0, g1
    cdef T low = 0, high = 0, below = 0, above = 0
    cdef const T* x0
    cdef const T* x1
    cdef const T* dy0
    cdef const T* dy1
    cdef Py_ssize_t i, j, lanes = lanes_of(a[0])
    if bend != STRAIGHT:        # else there may be no kinks
        low, high, below, above = kink[0], kink[1], kink[2], kink[3]
    for j in range(lanes):
        va[j] = a[j]
        vb[j] = b[j]
    for i in range(sweeps):
        dy0 = read(way, dy.at[0] + start + i * dy.pitch, lanes, room)
        dy1 = read(way, dy.at[1] + start + i * dy.pitch, lanes, room + LANES)
        x0 = read(way, x.at[0] + start + i * x.pitch, lanes, room + 2 * LANES)
        x1 = read(way, x.at[1] + start + i * x.pitch, lanes, room + 3 * LANES)
        for j in range(lanes):
            d0 = x0[j] - co[HI + j * step]
            d1 = x1[j] - co[HI + j * step]
            g0 = dy0[j]
            if bend != STRAIGHT:
                g0 = bent(bend, g0, d0 * co[A + j * step] + co[Z + j * step], low, high, below,
                          above)
            g1 = dy1[j]
            if bend != STRAIGHT:
                g1 = bent(bend, g1, d1 * co[A + j * step] + co[Z + j * step], low, high, below,
                          above)
            va[j] += g0 + g1
            vb[j] += g0 * d0 + g1 * d1
    for j in range(lanes):
        a[j] = va[j]
        b[j] = vb[j]


cdef inline void dot_columns(
    Way way,                    # a constant
    Bend bend,                  # a constant
    const Lines* dy,            # IN  (sweeps, 2, w)
    const Lines* x,             # IN  (sweeps, 2, w)
    Py_ssize_t sweeps,
    Py_ssize_t w,               # at least a strip
    const T* co,                # IN  HI, A and Z of w columns
    const T* kink,              # IN  (4,)
    T* a,                       # IO  (w,) sums of g
    T* b,                       # IO  (w,) sums of g * (x - hi)
) noexcept nogil:
    cdef T ends_a[2 * LANES]
    cdef T ends_b[2 * LANES]
    cdef Ends e = ends_of(way, x.at[0], way == PLAIN, w, a[0])
    cdef Py_ssize_t item = item_of(way, a[0]), i, at
    take_ends(e, a, w, ends_a)
    take_ends(e, b, w, ends_b)
    for i in range(2):
        at = 0 if i == 0 else w - e.lanes
        if e.head if i == 0 else e.rest:
            dot_strip(way, 1, bend, dy, x, at * item, sweeps, co + at, kink, ends_a + i * e.lanes,
                      ends_b + i * e.lanes)
    for i in range(e.strips):
        at = e.head + i * e.lanes
        dot_strip(way, 1, bend, dy, x, at * item, sweeps, co + at, kink, a + at, b + at)
    give_ends(e, ends_a, w, a)
    give_ends(e, ends_b, w, b)


cdef inline void dot_table(
    Way way, Bend bend, const Lines* dy, const Lines* x, Py_ssize_t sweeps, const T* co,
    const T* kink, T* a, T* b,
) noexcept nogil:
    """dot_strip of a run, with what is to be done as constants."""
    if T is float and way == FLOAT16:
        dot_strip(FLOAT16, 0, STRAIGHT, dy, x, 0, sweeps, co, kink, a, b)
    elif T is float and way == BFLOAT16:
        dot_strip(BFLOAT16, 0, STRAIGHT, dy, x, 0, sweeps, co, kink, a, b)
    elif T is float and bend == RECTIFIED:
        dot_strip(PLAIN, 0, RECTIFIED, dy, x, 0, sweeps, co, kink, a, b)
    elif T is float and bend == STEPS:
        dot_strip(PLAIN, 0, STEPS, dy, x, 0, sweeps, co, kink, a, b)
    elif T is float and bend == RAMP:
        dot_strip(PLAIN, 0, RAMP, dy, x, 0, sweeps, co, kink, a, b)
    else:
        dot_strip(PLAIN, 0, STRAIGHT, dy, x, 0, sweeps, co, kink, a, b)


cdef inline void dot_run(
    Way way,
    Bend bend,                  # STRAIGHT for half types
    const char* dy,             # IN  (n,)
    const char* x,              # IN  (n,)
    Py_ssize_t n,
    const T* co,                # IN  HI, A and Z of one channel
    const T* kink,              # IN  (4,)
    double* acc,                # IO  (2, WIDE) sums of g, and of g * (x - hi)
) noexcept nogil:
    cdef T a[LANES]
    cdef T b[LANES]
    cdef T end_x[2 * LANES]
    cdef T end_dy[2 * LANES]
    cdef Lines of_x
    cdef Lines of_dy
    cdef Py_ssize_t sweep = 2 * lanes_of(co[0]), most = 16 * sweep, left = most, m, k, strip
    clear(a, lanes_of(co[0]))
    clear(b, lanes_of(co[0]))
    while n > 0:
        m = min(n // sweep * sweep, left)
        if m == 0:
            end_of_run(way, dy, n, sweep, <T> 0, end_dy)
            way = end_of_run(way, x, n, sweep, co[HI], end_x)
            x, dy = <const char*> &end_x[0], <const char*> &end_dy[0]
            m = n = sweep
        strip = sweep // 2 * item_of(way, co[0])
        for k in range(2):
            of_x.at[k] = x + k * strip
            of_dy.at[k] = dy + k * strip
        of_x.pitch = of_dy.pitch = 2 * strip
        dot_table(way, bend, &of_dy, &of_x, m // sweep, co, kink, a, b)
        x += m // sweep * 2 * strip
        dy += m // sweep * 2 * strip
        n -= m
        left -= m
        if left <= 0 and n > 0:
            flush(a, acc)
            flush(b, acc + WIDE)
            clear(a, lanes_of(co[0]))
            clear(b, lanes_of(co[0]))
            left = most
    flush(a, acc)
    flush(b, acc + WIDE)
