# cython: language_level=3
# cython: cdivision=True
# Batch normalization in three steps over tiles: reduce, finish, apply.
#
# N = everything before the channel axis, C = channels, S = everything after it.
#
#   operation            reduce            finish             apply
#   statistics           sums of x         mean, m2           -
#   forward              sums of x         mean, m2           y  = f((x - hi) * a + z + residual)
#   inference            -                 -                  y  = f((x - hi) * a + z + residual)
#   backward             dots of g, x      dbeta, dgamma      dx = g * a + (x - hi) * k + b
#   inference_backward   dots of g, x      dbeta, dgamma      dx = g * a
#
# f is the activation, and g = dy f'(u), where u is the argument of f.
#
# a. Bytes. A float32 forward reads x, reads it again, and writes y: 12 bytes per element, or 8 if
#    the second read of x comes from cache. Backward takes 20 or 12 bytes, and inference 8. Half
#    types take half of that.
# b. Owned. A thread does all three steps for a block of channels, in one parallel region without a
#    barrier. Apply goes through N backwards, as the lines used last are still in the caches.
# c. Shared. With few channels per thread, or channels-last, each step is a parallel loop over tiles
#    of (chunk of N and S) x (block of channels), all in one region.
# d. The same bits. A channel's sums are taken chunk by chunk and merged in chunk order. Chunks
#    depend on (N, C, S) alone. Blocks and schedules depend on the machine, but never change the
#    order inside a channel.
# e. hi + lo. The mean is split into hi, rounded to T, and the rest lo, which goes into z. So the
#    error of y does not grow with |mean| / std (docs/math.md, 6.4).

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport parallel, prange
from libc.math cimport INFINITY, fabs, sqrt
from libc.string cimport memcpy, memset

from cybn._kernels.activation cimport HARDSWISH, IDENTITY, LEAKY_RELU, RELU6
from cybn._kernels.check cimport check
from cybn._kernels.lanes cimport (
    BFLOAT16, FLOAT16, FLUSH, LANES, PLAIN, STRIP, T, WIDE, Way, across, clear,
    gather, on_line, spread, stream_end)
from cybn._kernels.loops cimport (
    A, B, COEFFICIENTS, FIRST_TERMS, HI, K, RAMP, RECTIFIED, ROOM, STEPS, STRAIGHT, Z, Bend, Lines,
    dot_columns, dot_run, has_lines, lanes_of, sum_columns, sum_run)
from cybn._kernels.problem cimport (
    APPLY_ROW, BLOCK, BY_RUN, DOTS, FLOAT64, IN_PLACE, KEPT, NO_SUMS, NO_WRITE, SAMPLES, SCALE,
    SCALE_DY, STAGED, STAGED_COLUMNS, STAGED_PIECES, SUMS, UNSCALE, Caches, Problem, Route, Rows,
    Tiling, Vector, ceiling, route_of, tiling_of)
from cybn._kernels.row_problem cimport Kernels
from cybn._kernels.stages cimport (
    Piece, apply_piece, counted, fetch, gradients, inputs, place, shares, weigh)
from cybn._kernels.statistics cimport (
    Wide, add_wide, beyond, is_finite, mark, pivot_of, sample_of, settle, settled,
    wide_sums)
from cybn._kernels.tasks cimport Tasks, deal, next_task
from cybn._kernels.waiting cimport begun, ended
from cybn._kernels.writes cimport Seam, hold_nothing, let_go, scale, unscale

cdef enum:
    PART = 128              # channels of one task that finds pivots or finishes sums
    VECTOR = 64             # channels whose coefficients are computed together
    GROUP = 16384           # elements that apply writes in ascending order; groups descend

cdef struct Tile:           # channels c0..c1 of rows n0..n1, positions s0..s1
    Py_ssize_t c0, c1, n0, n1, s0, s1

cdef struct Job:
    const Problem* p
    Tiling t
    Route r

cdef Caches caches
caches.l2, caches.l3 = 512 << 10, 32 << 20


cdef inline Tile tile_of(
    const Job* job, Py_ssize_t block, Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t i
) noexcept nogil:
    """Return tile i of the rows x cols tiles of a block of channels."""
    cdef Tile t
    cdef Py_ssize_t row = i // cols, col = i % cols
    t.c0 = block * job.t.block
    t.c1 = min(t.c0 + job.t.block, job.p.C)
    t.n0 = row * job.p.N // rows
    t.n1 = (row + 1) * job.p.N // rows
    t.s0 = col * job.p.S // cols
    t.s1 = (col + 1) * job.p.S // cols
    check(0 <= t.c0 < t.c1 <= job.p.C and t.n0 < t.n1 <= job.p.N and t.s0 < t.s1 <= job.p.S)
    return t


# ---- coefficients: one value per channel -------------------------------------------------

cdef void load(
    const Vector* v, Py_ssize_t c, Py_ssize_t n, double absent, double* restrict out
) noexcept nogil:
    """Widen v[c:c + n] into out."""
    cdef Py_ssize_t i
    if v.data == NULL:
        for i in range(n):
            out[i] = absent
    elif v.wide:
        for i in range(n):
            out[i] = (<const double*> v.data)[c + i]
    else:
        for i in range(n):
            out[i] = (<const float*> v.data)[c + i]


cdef inline void load_xhat_scale(
    const Problem* p, Py_ssize_t c, Py_ssize_t n, double* restrict r
) noexcept nogil:
    """Load the factor of x - mean that gives xhat; if y was written over x, that of z - beta."""
    cdef Py_ssize_t i
    if p.inverse:
        load(&p.gamma, c, n, 1, r)
        for i in range(n):
            r[i] = 1 / r[i]
    else:
        load(&p.var, c, n, 0, r)
        for i in range(n):
            r[i] = 1 / sqrt(r[i] / p.count + p.eps)


cdef inline bint scale_terms(
    const Problem* p, Py_ssize_t c, Py_ssize_t n,
    T* restrict co,             # OUT HI, A and Z of channels c..c + n
) noexcept nogil:
    """Compute the terms of (x - hi) * a + z = (x - mean) * gamma / sqrt(var + eps) + beta.

    Return whether one of the channels is out of range of T.
    """
    cdef double mean[VECTOR]
    cdef double r[VECTOR]
    cdef double beta[VECTOR]
    cdef double gamma[VECTOR]
    cdef double v[VECTOR]
    cdef Py_ssize_t left = 0
    cdef Py_ssize_t i
    load(&p.mean, c, n, 0, mean)
    load(&p.var, c, n, 0, r)
    load(&p.gamma, c, n, 1, gamma)
    load(&p.beta, c, n, 0, beta)
    for i in range(n):
        mean[i] = 0 if r[i] == INFINITY else mean[i]    # so x - mean is finite, and y is beta
        v[i] = r[i] / p.count + p.eps
        r[i] = gamma[i] / sqrt(v[i])
    for i in range(n):
        left |= beyond(mean[i], v[i], False, fabs(r[i]) + fabs(beta[i]), <T> 0)
    for i in range(n):
        co[HI + i] = <T> mean[i]
        co[A + i] = <T> r[i]
        mean[i] -= <T> mean[i]  # this is lo; r may be infinite if eps is 0
        co[Z + i] = <T> (beta[i] - r[i] * mean[i] if mean[i] != 0 else beta[i])
    return left != 0


cdef inline bint unscale_terms(
    const Problem* p, Py_ssize_t c, Py_ssize_t n,
    T* restrict co,             # OUT HI, A, K and B of channels c..c + n
) noexcept nogil:
    """Compute the terms of g * a + (x - hi) * k + b = r gamma (g - dbeta / M - xhat dgamma / M).

    Return whether one of the channels is out of range of T.
    """
    cdef double mean[VECTOR]
    cdef double r[VECTOR]
    cdef double gamma[VECTOR]
    cdef double xhat[VECTOR]
    cdef double v[VECTOR]
    cdef double size[VECTOR]
    cdef double slope, base
    cdef Py_ssize_t left = 0
    cdef Py_ssize_t i
    load(&p.mean, c, n, 0, mean)
    load(&p.var, c, n, 0, r)
    load(&p.gamma, c, n, 1, gamma)
    load_xhat_scale(p, c, n, xhat)
    for i in range(n):
        mean[i] = 0 if r[i] == INFINITY else mean[i]
        v[i] = r[i] / p.count + p.eps
        r[i] = gamma[i] / sqrt(v[i])
        slope = -r[i] * xhat[i] * p.sums[p.C + c + i] / p.M
        base = -r[i] * p.sums[c + i] / p.M - slope * (mean[i] - <T> mean[i])
        size[i] = fabs(slope) + fabs(base) + fabs(r[i]) + fabs(p.sums[c + i])
        co[HI + i] = <T> mean[i]
        co[A + i] = <T> r[i]
        co[K + i] = <T> slope
        co[B + i] = <T> base
    for i in range(n):
        left |= beyond(mean[i], v[i], True, size[i], <T> 0)
    return left != 0


cdef bint coefficients(
    const Job* job, bint first, Py_ssize_t c0, Py_ssize_t m, T* co
) noexcept nogil:
    """Compute the coefficients of channels c0..c0 + m for the first pass, or for the second.

    The first pass sums, and the second writes. Return whether one of the channels is out of range
    of T; always False if `left` of the problem is NULL.
    """
    cdef const Problem* p = job.p
    cdef const double* shift = p.sums + 2 * p.chunks * p.C
    cdef Py_ssize_t v, n, i
    cdef bint left = False
    for v in range(ceiling(m, VECTOR)):
        n = min(VECTOR, m - v * VECTOR)
        if first and p.reduce == SUMS:
            for i in range(n):
                co[HI + i] = <T> shift[c0 + i]
        else:
            if not first and p.apply == UNSCALE:
                left |= unscale_terms(p, c0, n, co)
            if first or p.apply != UNSCALE or p.activation != IDENTITY:
                left |= scale_terms(p, c0, n, co)
            if not first and p.apply == SCALE_DY:   # scale computes dx as (dy - 0) * a + 0
                for i in range(n):
                    left |= not (is_finite(p.sums[c0 + i]) & is_finite(p.sums[p.C + c0 + i]))
                    co[K + HI + i] = 0
                    co[K + A + i] = co[A + i]
                    co[K + Z + i] = 0
        co += n
        c0 += n
    return left and p.left != NULL


cdef inline int slots_of(const Problem* p, bint first) noexcept nogil:
    """Return which coefficients a pass reads, one bit each: HI, A, Z, K, B, and a sixth array."""
    if first and (p.reduce == SUMS or p.activation == IDENTITY):
        return 0b1
    if first or p.apply == SCALE:
        return 0b111
    if p.apply == UNSCALE:
        return 0b11011 if p.activation == IDENTITY else 0b11111
    return 0b111111


cdef bint columns_of(
    const Job* job, bint first, Py_ssize_t c0, Py_ssize_t m, Py_ssize_t times, T* co
) noexcept nogil:
    """Compute the coefficients of m * S columns, repeated `times` times.

    They are computed at the end of each array and spread from there. Return as `coefficients`.
    """
    cdef Py_ssize_t slot, end = m * job.p.S - m
    cdef int wanted = slots_of(job.p, first)
    cdef bint left = coefficients(job, first, c0, m, co + end)
    for slot in range(6):
        if wanted >> slot & 1:
            spread(co + slot * ROOM, m, job.p.S, times)
    return left


cdef void kinks(const Problem* p, T* kink) noexcept nogil:
    """Set kink to the two points where an activation bends, and its slopes beyond them."""
    kink[0] = -3 if p.activation == HARDSWISH else 0
    kink[1] = 3 if p.activation == HARDSWISH else (6 if p.activation == RELU6 else INFINITY)
    kink[2] = <T> p.slope if p.activation == LEAKY_RELU else 0
    kink[3] = 0 if p.activation == RELU6 else 1


# ---- reduce ------------------------------------------------------------------------------

cdef Piece pieces(
    const Job* job, bint first, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m, const T* co,
    Py_ssize_t step, T* room,
) noexcept nogil:
    """Return values i..i + m of row n for a loop of gradients; compiled once for all callers."""
    return inputs(job.p, &job.r, first, n, i, m, co, step, room)


cdef Piece first_piece(
    const Job* job, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m, const T* co, Py_ssize_t step, T* room
) noexcept nogil:
    """Return values i..i + m of row n for the loops of the first pass, by stages."""
    cdef const Problem* p = job.p
    cdef Piece piece
    cdef const T* w
    if p.reduce == DOTS:
        return pieces(job, True, n, i, m, co, step, room)
    w = shares(p, step == 0, n, i, m, room + 2 * STAGED)
    counted(fetch(&p.x, p, job.r.way, n, i, m, room), w, co + HI, step, room, m)
    if p.weighted:
        weigh(room, w, co + HI, step, room + STAGED, m)
    piece.x, piece.g, piece.w = room, room + STAGED, w
    return piece


cdef void reduce_by_run(
    const Job* job, const Tile* t, T of_type, double* out1, double* out2
) noexcept nogil:
    """Sum channels c0..c1 run by run, to eight float64 lanes per channel."""
    cdef T co[FIRST_TERMS]
    cdef T room[6 * STAGED]
    cdef T kink[4]
    cdef double acc[BLOCK * 2 * WIDE]
    cdef const Problem* p = job.p
    cdef Py_ssize_t c, n, i, j, m, length = t.s1 - t.s0
    cdef bint sums = p.reduce == SUMS and not p.weighted
    cdef bint staged = job.r.reduce_from == STAGED_PIECES, kept = job.r.reduce_from == KEPT
    cdef Py_ssize_t most = STAGED if staged or kept else length
    cdef Way way = PLAIN if staged else job.r.way
    cdef Bend bend = STRAIGHT if staged else job.r.bend
    cdef const char* x
    cdef const char* dy
    cdef Piece piece
    check(t.c1 - t.c0 <= BLOCK)
    clear(acc, (t.c1 - t.c0) * 2 * WIDE)
    coefficients(job, True, t.c0, t.c1 - t.c0, co)
    kinks(p, kink)
    for n in range(t.n0, t.n1):
        for c in range(t.c1 - t.c0):
            for j in range(ceiling(length, most)):
                i = (t.c0 + c) * p.S + t.s0 + j * most
                m = min(most, length - j * most)
                if staged:
                    piece = first_piece(job, n, i, m, co + c, 0, room)
                    x, dy = <const char*> piece.x, <const char*> piece.g
                else:
                    x, dy = place(&p.x, p, n, i), place(&p.dy, p, n, i)
                if kept:
                    first_piece(job, n, i, m, co + c, 0, room)
                    dy = place(gradients(p, &job.r), p, n, i)
                if sums:
                    sum_run(way, x, m, co[c], acc + c * 2 * WIDE)
                else:
                    dot_run(way, bend, dy, x, m, co + c, kink, acc + c * 2 * WIDE)
    for c in range(t.c1 - t.c0):
        out1[t.c0 + c] = across(acc + c * 2 * WIDE)
        out2[t.c0 + c] = across(acc + c * 2 * WIDE + WIDE)


cdef void add_lines(
    const Job* job, Way way, Bend bend,
    const Lines* dy,            # IN  (sweeps, 2, w); ignored by sums
    const Lines* x,             # IN  (sweeps, 4 or 2, w)
    Py_ssize_t sweeps,
    Py_ssize_t w,
    const T* co, const T* kink,
    T* a,                       # IO  (w,) sums
    T* b,                       # IO  (w,)
) noexcept nogil:
    """Add rows to the sums of their columns, with way and bend as constants."""
    if sums_alone(job.p):
        if T is float and way == FLOAT16:
            sum_columns(FLOAT16, x, sweeps, w, co, a, b)
        elif T is float and way == BFLOAT16:
            sum_columns(BFLOAT16, x, sweeps, w, co, a, b)
        else:
            sum_columns(PLAIN, x, sweeps, w, co, a, b)
    elif T is float and way == FLOAT16:
        dot_columns(FLOAT16, STRAIGHT, dy, x, sweeps, w, co, kink, a, b)
    elif T is float and way == BFLOAT16:
        dot_columns(BFLOAT16, STRAIGHT, dy, x, sweeps, w, co, kink, a, b)
    elif T is float and bend == RECTIFIED:
        dot_columns(PLAIN, RECTIFIED, dy, x, sweeps, w, co, kink, a, b)
    elif T is float and bend == STEPS:
        dot_columns(PLAIN, STEPS, dy, x, sweeps, w, co, kink, a, b)
    elif T is float and bend == RAMP:
        dot_columns(PLAIN, RAMP, dy, x, sweeps, w, co, kink, a, b)
    else:
        dot_columns(PLAIN, STRAIGHT, dy, x, sweeps, w, co, kink, a, b)


cdef inline bint sums_alone(const Problem* p) noexcept nogil:
    """Return whether reduce needs only sums; with weights it needs dots of w * (x - hi) and x."""
    return p.reduce == SUMS and not p.weighted


cdef void add_staged(
    const Job* job,
    Py_ssize_t n,               # the first row
    Py_ssize_t rows,            # at most those of a sweep; missing rows add nothing
    Py_ssize_t apart,           # distance from one to the next, in rows
    Py_ssize_t i,               # the first column
    Py_ssize_t w,
    const T* co, const T* kink, T* a, T* b,
    T* room,                    # OUT (6, STAGED) for stages; (4, STAGED_COLUMNS) each for x and g
) noexcept nogil:
    """Add the rows of a sweep that is not read in place: first fill each row, then add them."""
    cdef const Problem* p = job.p
    cdef Piece piece
    cdef T* of_x
    cdef T* of_g
    cdef Lines x
    cdef Lines g
    cdef Py_ssize_t k, together = 4 if sums_alone(p) else 2, most = max(w, lanes_of(co[0]))
    x.pitch = g.pitch = 0
    for k in range(together):
        of_x = room + 6 * STAGED + k * STAGED_COLUMNS
        of_g = of_x + 4 * STAGED_COLUMNS
        x.at[k], g.at[k] = <const char*> of_x, <const char*> of_g
        memcpy(of_x, co + HI, most * sizeof(T))     # a missing row then adds nothing
        clear(of_g, most)
        if k >= rows:
            continue
        if job.r.reduce_from != IN_PLACE:
            piece = first_piece(job, n + k * apart, i, w, co, 1, room)
        else:
            piece.x = fetch(&p.x, p, job.r.way, n + k * apart, i, w, room)
            piece.g = piece.x
            if p.reduce == DOTS:
                piece.g = fetch(&p.dy, p, job.r.way, n + k * apart, i, w, room + STAGED)
        memcpy(of_x, piece.x, w * sizeof(T))
        memcpy(of_g, piece.g, w * sizeof(T))
    add_lines(job, PLAIN, STRAIGHT if job.r.reduce_from != IN_PLACE else job.r.bend, &g, &x, 1,
              most, co, kink, a, b)


cdef void keep_rows(
    const Job* job, Py_ssize_t n, Py_ssize_t rows, Py_ssize_t apart, Py_ssize_t ahead,
    Py_ssize_t sweeps, Py_ssize_t i, Py_ssize_t w, const T* co, T* room,
) noexcept nogil:
    """Store the gradient before the activation of some rows."""
    cdef Py_ssize_t s, k, j
    for s in range(sweeps):
        for k in range(rows):
            for j in range(ceiling(w, STAGED)):
                first_piece(job, n + s * ahead + k * apart, i + j * STAGED,
                            min(STAGED, w - j * STAGED), co + j * STAGED, 1, room)


cdef void add_rows(
    const Job* job,
    Py_ssize_t n,               # the first row
    Py_ssize_t rows,            # of each sweep: four for sums, two for dots, or fewer at the end
    Py_ssize_t apart,           # distance between rows of a sweep, in rows
    Py_ssize_t ahead,           # distance between sweeps, in rows
    Py_ssize_t sweeps,
    Py_ssize_t i,               # the first column
    Py_ssize_t w,
    const T* co, const T* kink, T* a, T* b, T* room,
) noexcept nogil:
    """Add some rows to the sums of columns i..i + w."""
    cdef const Problem* p = job.p
    cdef const Rows* g = gradients(p, &job.r) if job.r.reduce_from == KEPT else &p.dy
    cdef Lines x
    cdef Lines dy
    cdef Py_ssize_t s, k, j
    cdef bint whole = rows == (4 if sums_alone(p) else 2) and w >= lanes_of(co[0])
    if not whole or job.r.reduce_from == STAGED_PIECES:     # add_staged also keeps gradients
        for s in range(sweeps):
            for k in range(ceiling(w, STAGED_COLUMNS)):
                j = k * STAGED_COLUMNS
                add_staged(job, n + s * ahead, rows, apart, i + j,
                           min(STAGED_COLUMNS, w - j), co + j, kink, a + j, b + j, room)
        return
    if job.r.reduce_from == KEPT:
        keep_rows(job, n, rows, apart, ahead, sweeps, i, w, co, room)
    x.pitch, dy.pitch = ahead * p.x.pitch, ahead * g.pitch
    for k in range(rows):
        x.at[k] = place(&p.x, p, n + k * apart, i)
        dy.at[k] = place(g, p, n + k * apart, i)
    add_lines(job, job.r.way, job.r.bend, &dy, &x, sweeps, w, co, kink, a, b)


cdef void reduce_by_column(
    const Job* job, const Tile* t, T of_type, double* out1, double* out2
) noexcept nogil:
    """Sum channels c0..c1 down columns, and add the sums to float64 every FLUSH rows.

    Channels-last, the rows of a sweep are far apart in memory, because a few long streams are read
    faster than neighbouring rows. If there are few channels, several rows are summed as one.
    """
    cdef T array[FIRST_TERMS]
    cdef T sums_a[ROOM + 64]
    cdef T sums_b[ROOM + 64]
    cdef T room[6 * STAGED + 8 * STAGED_COLUMNS]
    cdef T kink[4]
    cdef const Problem* p = job.p
    cdef Py_ssize_t m = t.c1 - t.c0, step = job.t.sum_rows, w = m * p.S * step, i = t.c0 * p.S
    cdef Py_ssize_t rows = (t.n1 - t.n0) // step, left = t.n1 - t.n0 - rows * step, done = 0, k
    cdef Py_ssize_t together = 4 if sums_alone(p) else 2
    cdef Py_ssize_t sweeps = rows // together
    cdef Py_ssize_t apart = sweeps if p.S == 1 else 1, ahead = 1 if p.S == 1 else together
    cdef const char* beside = place(&p.x, p, t.n0, i)
    cdef T* co = on_line(&array[0], beside)
    cdef T* a = on_line(&sums_a[0], beside)
    cdef T* b = on_line(&sums_b[0], beside)
    columns_of(job, True, t.c0, m, step, co)
    kinks(p, kink)
    clear(a, max(w, LANES))
    clear(b, max(w, LANES))
    clear(out1 + t.c0, m)
    clear(out2 + t.c0, m)
    while done < sweeps:
        k = min(FLUSH // together, sweeps - done)
        add_rows(job, t.n0 + done * ahead * step, together, apart * step, ahead * step, k, i, w, co,
                 kink, a, b, room)
        done += k
        if done % (FLUSH // together) == 0 and (done * together < rows or left):
            gather(a, m, p.S, step, out1 + t.c0)
            gather(b, m, p.S, step, out2 + t.c0)
    done *= together
    if done < rows:
        add_rows(job, t.n0 + done * step, rows - done, step, 0, 1, i, w, co, kink, a, b, room)
    if left:
        add_rows(job, t.n0 + rows * step, 1, 0, 0, 1, i, w // step * left, co, kink, a, b, room)
    gather(a, m, p.S, step, out1 + t.c0)
    gather(b, m, p.S, step, out2 + t.c0)


cdef void reduce_tile(const Job* job, const Tile* t, Py_ssize_t chunk, T of_type) noexcept nogil:
    """Compute the sums of one chunk of a block."""
    cdef double* out = job.p.sums + 2 * chunk * job.p.C
    if job.r.reduce_by == BY_RUN:
        reduce_by_run(job, t, of_type, out, out + job.p.C)
    else:
        reduce_by_column(job, t, of_type, out, out + job.p.C)


cdef void find_pivots(const Job* job, Py_ssize_t c0, Py_ssize_t c1, T of_type) noexcept nogil:
    """Set each pivot to the mean of eight values of its channel.

    Channels-last, neighbours are read together.
    """
    cdef const Problem* p = job.p
    cdef double* pivot = p.sums + 2 * p.chunks * p.C
    cdef double v[VECTOR * SAMPLES]
    cdef T room[VECTOR]
    cdef const T* x
    cdef Py_ssize_t k, c, m, i, j, at
    cdef Py_ssize_t n[SAMPLES]
    cdef Py_ssize_t s[SAMPLES]
    for i in range(SAMPLES):
        at = sample_of(i, p.N * p.S) if p.share == NULL else p.places[i]
        n[i], s[i] = at // p.S, at % p.S
    if p.S > 1:
        for c in range(c0, c1):
            for i in range(SAMPLES):
                v[i] = fetch(&p.x, p, job.r.way, n[i], c * p.S + s[i], 1, room)[0]
            pivot[c] = pivot_of(v, of_type)
        return
    for k in range(ceiling(c1 - c0, VECTOR)):
        c = c0 + k * VECTOR
        m = min(VECTOR, c1 - c)
        for i in range(SAMPLES):
            x = fetch(&p.x, p, job.r.way, n[i], c, m, room)
            for j in range(m):
                v[j * SAMPLES + i] = x[j]
        for j in range(m):
            pivot[c + j] = pivot_of(v + j * SAMPLES, of_type)


# ---- finish ------------------------------------------------------------------------------

cdef struct Channel:            # a channel whose values are to be summed again
    const Job* job
    Py_ssize_t c


cdef void look(
    const Channel* channel, double shift, double down, T of_type, double* sums
) noexcept nogil:
    """Compute the sums of a channel in float64."""
    cdef const Job* job = channel.job
    cdef const Problem* p = job.p
    cdef Wide wide
    cdef T room[STAGED]
    cdef const T* x
    cdef const T* share = NULL
    cdef Py_ssize_t n, s, m
    memset(&wide, 0, sizeof(wide))
    for n in range(p.N):
        for s in range(ceiling(p.S, STAGED)):
            m = min(STAGED, p.S - s * STAGED)
            x = fetch(&p.x, p, job.r.way, n, channel.c * p.S + s * STAGED, m, room)
            if p.share != NULL:
                share = <const T*> p.share + n * p.S + s * STAGED
            add_wide(x, share, m, shift, down, &wide)
    wide_sums(&wide, sums)


cdef void look_float(
    const void* channel, double shift, double down, double* sums
) noexcept nogil:
    look(<const Channel*> channel, shift, down, <float> 0, sums)


cdef void look_double(
    const void* channel, double shift, double down, double* sums
) noexcept nogil:
    look(<const Channel*> channel, shift, down, <double> 0, sums)


cdef void finish_sums(const Job* job, Py_ssize_t c0, Py_ssize_t c1, T of_type) noexcept nogil:
    """Turn the sums about the pivot into mean and m2."""
    cdef const Problem* p = job.p
    cdef double* out1 = p.sums
    cdef double* out2 = p.sums + p.C
    cdef double* pivot = p.sums + 2 * p.chunks * p.C
    cdef Channel channel
    cdef double s1, s2
    cdef Py_ssize_t c
    channel.job = job
    for c in range(c0, c1):
        s1, s2 = out1[c], out2[c]
        if settled(s1, s2, p.M, of_type):
            out1[c] = pivot[c] + s1 / p.M
            out2[c] = s2 - s1 * (s1 / p.M)
        else:
            channel.c = c
            settle(look_float if T is float else look_double, &channel, p.M, True, &pivot[c], &s2)
            out1[c] = pivot[c]
            out2[c] = s2


cdef void finish_dots(const Job* job, Py_ssize_t c0, Py_ssize_t c1, T of_type) noexcept nogil:
    """Turn the sums about hi into dbeta and dgamma."""
    cdef const Problem* p = job.p
    cdef double* dbeta = p.sums
    cdef double* dgamma = p.sums + p.C
    cdef double r[VECTOR]
    cdef double mean[VECTOR]
    cdef Py_ssize_t c, i, n, v
    for v in range(ceiling(c1 - c0, VECTOR)):
        c = c0 + v * VECTOR
        n = min(VECTOR, c1 - c)
        load_xhat_scale(p, c, n, r)
        load(&p.mean, c, n, 0, mean)
        for i in range(n):
            if r[i] != 0:       # else dgamma is 0, even if a sum is infinite
                r[i] *= (dgamma[c + i] - (mean[i] - <T> mean[i]) * dbeta[c + i])
            dgamma[c + i] = r[i]


cdef void finish(const Job* job, Py_ssize_t c0, Py_ssize_t c1, T of_type) noexcept nogil:
    """Merge the chunks of channels c0..c1 in order, and compute their statistics or gradients."""
    cdef const Problem* p = job.p
    cdef Py_ssize_t k, c
    cdef double* part
    for k in range(1, p.chunks):
        part = p.sums + 2 * k * p.C
        for c in range(c0, c1):
            p.sums[c] += part[c]
            p.sums[p.C + c] += part[p.C + c]
    if p.reduce == SUMS:
        finish_sums(job, c0, c1, of_type)
    else:
        finish_dots(job, c0, c1, of_type)


# ---- apply -------------------------------------------------------------------------------

cdef inline const char* padded(const char* row, Py_ssize_t bytes, char* room) noexcept nogil:
    """Copy a row that is shorter than a strip to a room as large as a strip."""
    memcpy(room, row, bytes)
    return room


cdef inline void apply_row(
    const Job* job, Py_ssize_t step, Py_ssize_t n, Py_ssize_t i, Py_ssize_t w, const T* co,
    const T* kink, Seam* seam,
) noexcept nogil:
    """Write y or dx of values i..i + w of row n, without stages."""
    cdef const Problem* p = job.p
    cdef char rooms[4][STRIP]
    cdef char* y = place(&p.y, p, n, i)
    cdef const char* x = place(&p.x, p, n, i)
    cdef const char* g = place(gradients(p, &job.r), p, n, i)
    cdef const char* r = NULL
    cdef Py_ssize_t bytes = w * p.item, most = max(w, lanes_of(co[0]))
    cdef bint stream = job.r.stream and has_lines(job.r.way, w, co[0])
    if p.apply == SCALE_DY:     # scale computes dx from dy
        x, co = g, co + K
    if p.apply == SCALE and p.residual.at != NULL:
        r = place(&p.residual, p, n, i)
    if w < most:
        x = padded(x, bytes, rooms[0])
        g = padded(g, bytes, rooms[1]) if p.apply == UNSCALE else x
        r = padded(r, bytes, rooms[2]) if r != NULL else NULL
        y = rooms[3]
    if p.apply == UNSCALE:
        unscale(job.r.way, stream, step, job.r.bend, g, x, y, most, co, kink, seam)
    else:
        scale(job.r.way, stream, step, x, r, y, most, co, job.r.clamped and p.apply == SCALE,
              <T> job.r.low, <T> job.r.high, seam)
    if w < most:
        memcpy(place(&p.y, p, n, i), y, bytes)


cdef void write_piece(
    const Job* job, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m, const T* co, Py_ssize_t step, T* room
) noexcept nogil:
    """Write y or dx of values i..i + m of row n, by stages; compiled once for runs and columns."""
    cdef Piece piece
    if job.p.apply != SCALE:
        piece = pieces(job, False, n, i, m, co, step, room)
    apply_piece(job.p, &job.r, n, i, m, co, step, &piece, room)


cdef bint apply_by_run(const Job* job, const Tile* t, T of_type) noexcept nogil:
    """Write y or dx of channels c0..c1 run by run, from the last row to the first.

    If one of the channels is out of range of T, return False and write nothing.
    """
    cdef T co[COEFFICIENTS]
    cdef T room[6 * STAGED]
    cdef T kink[4]
    cdef Seam seam
    cdef Py_ssize_t n, c, i, j, length = t.s1 - t.s0
    hold_nothing(&seam)
    if coefficients(job, False, t.c0, t.c1 - t.c0, co):
        return False
    kinks(job.p, kink)
    for n in range(t.n1 - 1, t.n0 - 1, -1):
        for c in range(t.c1 - t.c0):
            i = (t.c0 + c) * job.p.S + t.s0
            if job.r.apply_from == STAGED_PIECES:
                for j in range(ceiling(length, STAGED)):
                    write_piece(job, n, i + j * STAGED, min(STAGED, length - j * STAGED), co + c,
                                0, room)
            else:
                apply_row(job, 0, n, i, length, co + c, kink, &seam)
    let_go(&seam)
    return True


cdef inline Py_ssize_t rows_as_one(const Job* job, Py_ssize_t w, Py_ssize_t rows) noexcept nogil:
    """Return how many rows to write as one: several if each begins where the row before ends."""
    cdef const Problem* p = job.p
    cdef Py_ssize_t row = w * p.item
    if row != p.x.pitch or row != p.y.pitch or (p.dy.at != NULL and row != p.dy.pitch):
        return 1
    if p.residual.at != NULL and row != p.residual.pitch:
        return 1
    if p.dresidual.at != NULL and row != p.dresidual.pitch:
        return 1
    return max(1, min(APPLY_ROW // w, rows))


cdef bint apply_by_column(const Job* job, const Tile* t, T of_type) noexcept nogil:
    """Write y or dx of channels c0..c1 row by row.

    The last group of rows comes first; rows within a group are in ascending order. If one of the
    channels is out of range of T, return False and write nothing.
    """
    cdef T array[COEFFICIENTS]
    cdef T room[6 * STAGED]
    cdef T kink[4]
    cdef Py_ssize_t m = t.c1 - t.c0, w = m * job.p.S, i = t.c0 * job.p.S, g, n, end
    cdef Py_ssize_t step = rows_as_one(job, w, t.n1 - t.n0)
    cdef Py_ssize_t group = max(1, GROUP // (w * step)) * step
    cdef bint staged = job.r.apply_from == STAGED_PIECES
    cdef T* co = on_line(&array[0], place(&job.p.y, job.p, t.n0, i))
    cdef Seam seam
    hold_nothing(&seam)
    if columns_of(job, False, t.c0, m, step, co):
        return False
    kinks(job.p, kink)
    for g in range((t.n1 - t.n0 - 1) // group, -1, -1):
        n = t.n0 + g * group
        end = min(n + group, t.n1)
        while n < end:
            if staged:
                write_piece(job, n, i, w * min(step, end - n), co, 1, room)
            else:
                apply_row(job, 1, n, i, w * min(step, end - n), co, kink, &seam)
            n += step
    let_go(&seam)
    return True


cdef bint apply_part(const Job* job, const Tile* t, T of_type) noexcept nogil:
    if job.r.apply_by == BY_RUN:
        return apply_by_run(job, t, of_type)
    return apply_by_column(job, t, of_type)


cdef void apply_tile(const Job* job, const Tile* t, T of_type) noexcept nogil:
    """Write y or dx of a tile, many channels at once, and mark channels out of range of T."""
    cdef Tile part = t[0]
    while part.c0 < t.c1:
        part.c1 = t.c1
        while part.c1 > part.c0 and not apply_part(job, &part, of_type):
            part.c1 -= (part.c1 - part.c0 + 1) // 2
        if part.c1 == part.c0:
            mark(&job.p.left[part.c0])
            part.c1 += 1
        part.c0 = part.c1
    if job.r.stream:
        stream_end()


# ---- threads -----------------------------------------------------------------------------

cdef enum Loop:
    FIND_PIVOTS             # a task is a part of the channels
    REDUCE                  # a task is a chunk of a block
    FINISH                  # a task is a part of the channels
    APPLY                   # a task is a tile of a block
    ALL_STEPS               # a task is a block


cdef Py_ssize_t count_tasks(const Job* job, Loop loop) noexcept nogil:
    """Return how many tasks a loop has; 0 if the problem does not need the loop."""
    if loop == ALL_STEPS:
        return job.t.blocks
    if loop == APPLY:
        return job.t.blocks * job.t.apply_rows * job.t.apply_cols if job.p.apply != NO_WRITE else 0
    if job.p.reduce == NO_SUMS or (loop == FIND_PIVOTS and job.p.reduce != SUMS):
        return 0
    return job.t.blocks * job.p.chunks if loop == REDUCE else ceiling(job.p.C, PART)


cdef void own_block(const Job* job, Py_ssize_t block, T of_type) noexcept nogil:
    """Do all steps for one block of channels."""
    cdef Tile t = tile_of(job, block, 1, 1, 0)
    cdef Py_ssize_t k
    if job.p.reduce != NO_SUMS:
        if job.p.reduce == SUMS:
            find_pivots(job, t.c0, t.c1, of_type)
        for k in range(job.p.chunks):
            t = tile_of(job, block, job.t.chunk_rows, job.t.chunk_cols, k)
            reduce_tile(job, &t, k, of_type)
        finish(job, t.c0, t.c1, of_type)
    if job.p.apply != NO_WRITE:
        t = tile_of(job, block, 1, 1, 0)
        apply_tile(job, &t, of_type)


cdef void do_task(const Job* job, Loop loop, Py_ssize_t i, T of_type) noexcept nogil:
    cdef Py_ssize_t blocks = job.t.blocks, c0 = i * PART, c1 = min(c0 + PART, job.p.C)
    cdef Tile t
    if loop == ALL_STEPS:
        own_block(job, i, of_type)
    elif loop == FIND_PIVOTS:
        find_pivots(job, c0, c1, of_type)
    elif loop == FINISH:
        finish(job, c0, c1, of_type)
    elif loop == REDUCE:
        t = tile_of(job, i % blocks, job.t.chunk_rows, job.t.chunk_cols, i // blocks)
        reduce_tile(job, &t, i // blocks, of_type)
    else:
        t = tile_of(job, i % blocks, job.t.apply_rows, job.t.apply_cols, i // blocks)
        apply_tile(job, &t, of_type)


cdef void work(
    const Job* job, Loop loop,
    Tasks* tasks,               # IO  (loops,)
    Py_ssize_t thread, T of_type,
) noexcept nogil:
    """Do the tasks of a loop that fall to one thread."""
    cdef Tasks* mine = tasks + <int> loop
    cdef Py_ssize_t emptied = 0, i = next_task(mine, thread, &emptied)
    cdef double since
    while i >= 0:
        since = begun(job.p.watch)
        do_task(job, loop, i, of_type)
        ended(job.p.watch, since)
        i = next_task(mine, thread, &emptied)


cdef void run(const Problem* p, T of_type) noexcept nogil:
    """Do all steps: threads own blocks, or share each loop and wait for it to end."""
    cdef Job job
    cdef Tasks tasks[5]
    cdef int k, t, nt
    job.p = p
    job.t = tiling_of(p, &caches)
    job.r = route_of(p, &job.t, &caches)
    check(job.t.chunk_rows * job.t.chunk_cols == p.chunks)
    nt = job.t.threads
    for k in range(<int> ALL_STEPS + 1):
        deal(&tasks[k], count_tasks(&job, <Loop> k), nt, k == APPLY)
    if nt == 1 and job.t.owned:
        work(&job, ALL_STEPS, tasks, 0, of_type)
    elif job.t.owned:
        for t in prange(nt, schedule="static", num_threads=nt):
            work(&job, ALL_STEPS, tasks, t, of_type)
    else:
        with parallel(num_threads=nt, use_threads_if=nt > 1):
            for t in prange(nt, schedule="static"):
                work(&job, FIND_PIVOTS, tasks, t, of_type)
            for t in prange(nt, schedule="static"):
                work(&job, REDUCE, tasks, t, of_type)
            for t in prange(nt, schedule="static"):
                work(&job, FINISH, tasks, t, of_type)
            for t in prange(nt, schedule="static"):
                work(&job, APPLY, tasks, t, of_type)


# ---- what the dispatch calls -------------------------------------------------------------

cdef void run_problem(const Problem* p) noexcept nogil:
    """Compute float64 arrays in float64, and all other types in float32."""
    if p.storage == FLOAT64:
        run(p, <double> 0)
    else:
        run(p, <float> 0)


def set_caches(Py_ssize_t l2, Py_ssize_t l3):
    """Set the sizes in bytes of a core's L2 cache and of the last level.

    They affect the speed, never the results.
    """
    caches.l2, caches.l3 = l2, l3


cdef Kernels kernels
kernels.batch_norm = run_problem
KERNELS = PyCapsule_New(&kernels, "cybn.kernels", NULL)
