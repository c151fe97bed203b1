# cython: cdivision=True
# The four formulas of batch normalization, each written once: two here, two in writes.pxd.
#
#   loop      reads            writes    bytes per element (float32)
#   sums      x                -         4     a += d        b += d * d
#   dots      dy, x            -         8     a += g        b += g * d
#   scale     x, residual      y         8     y  = d * a + z + residual, clamped
#   unscale   dy, x            dx       12     dx = g * a + d * k + b
#
# d = x - hi. g is dy, or dy times the slope of a piecewise-linear activation at d * a + z.
#
# a. Coefficients. `step` is 0 for a run, whose values are of one channel and share hi, a, k, b and
#    z. It is 1 for columns, each of which has its own. It is a constant, so both forms come from
#    one loop.
# b. Rows. Column sums are loaded and stored once for many rows, four of which (sums) or two (dots)
#    are added at a time. A run is treated as a table with one strip per row.
# c. Order. A lane of a run, or a column, collects at most FLUSH values, and is then added to
#    float64. So rounding errors of float32 cannot build up over a long channel.
# d. Ends. The last strip of a row overlaps the strip before it. It is computed first, and those of
#    its values that no other strip has are stored at the end. So a loop needs no second copy for
#    a shorter strip, and reads nothing beyond a row. Rows shorter than a strip are copied to a
#    buffer of one strip.

from libc.string cimport memcpy

from cybn._kernels.lanes cimport (
    BFLOAT16, FLOAT16, LANES, LINE, PLAIN, STRIP, T, WIDE, Way, clear, flush, item_of, read)

cdef enum Bend:             # activations whose slope costs a comparison or two; float32 only
    STRAIGHT                # no such activation
    RECTIFIED               # relu
    STEPS                   # two other slopes outside low..high: relu6, leaky_relu
    RAMP                    # hardswish

cdef enum:
    ROOM = 2176             # values from one array of coefficients to the next: columns and space

cdef enum:                  # where each kind of coefficient begins
    HI = 0                  # the mean rounded to T, or another shift near it
    A = ROOM                # gamma / sqrt(var + eps)
    Z = 2 * ROOM            # constant that is added to d * a
    K = 3 * ROOM            # factor of d in dx
    B = 4 * ROOM            # constant in dx
    COEFFICIENTS = 6 * ROOM + 64
    FIRST_TERMS = 3 * ROOM + 64     # HI, A and Z: all that sums and dots need

cdef struct Lines:          # rows in memory that a loop reads together
    const char* at[4]
    Py_ssize_t pitch        # bytes from a row to its counterpart in the next sweep


cdef inline T bent(
    Bend bend, T dy, T z,
    T low, T high,
    T below,                    # slope at low and below
    T above,                    # slope at high and above
) noexcept nogil:
    """Return dy times the slope at z; 0 if the slope is 0, even if dy is not finite."""
    cdef T s, one = 1
    if bend == RECTIFIED:
        return 0 if z <= 0 else dy
    s = one if bend == STEPS else (z + <T> 1.5) * <T> (1.0 / 3)
    s = below if z <= low else s
    s = above if z >= high else s
    return 0 if s == 0 else dy * s


cdef inline Py_ssize_t lanes_of(T of_type) noexcept nogil:
    """Return the number of values of a strip."""
    return STRIP // <Py_ssize_t> sizeof(T)


# ---- ends --------------------------------------------------------------------------------

cdef struct Ends:               # values of a row before, in and after strips that begin on a line
    Py_ssize_t head, strips, rest, lanes


cdef inline bint has_lines(Way way, Py_ssize_t w, T of_type) noexcept nogil:
    """Return whether a row has a whole strip that begins on a line, wherever the row begins."""
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
    """Copy the first and the last strip of a row, if the row has a head and a rest."""
    if e.head:
        memcpy(ends, v, STRIP)
    if e.rest:
        memcpy(ends + e.lanes, v + w - e.lanes, STRIP)


cdef inline void give_ends(Ends e, const T* ends, Py_ssize_t w, T* v) noexcept nogil:
    """Copy the values of head and rest, which are in no whole strip, back to the row."""
    memcpy(v, ends, e.head * sizeof(T))
    memcpy(v + w - e.rest, ends + 2 * e.lanes - e.rest, e.rest * sizeof(T))


# ---- sums --------------------------------------------------------------------------------

cdef inline void sum_strip(
    Way way, Py_ssize_t step,
    const Lines* x,             # IN  (sweeps, 4, lanes), from byte `start` on
    Py_ssize_t start,
    Py_ssize_t sweeps,
    const T* hi,                # IN  (lanes,), or one value
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
    Way way,                    # a constant
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
    """Copy the last n values of a run, pad them to `whole` with `fill`, and return the new way."""
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
    const T* co,                # IN  HI, and A and Z with a bend, of columns or of one channel
    const T* kink,              # IN  (4,) low, high, and the slopes beyond them
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
    if bend != STRAIGHT:        # otherwise kink may have fewer values
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
    """Call dot_strip for a run, with way and bend as constants."""
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
