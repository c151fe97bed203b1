# cython: language_level=3
# cython: cdivision=True
# Layer, RMS, group and instance normalization: statistics of rows.
#
# N = samples, G = groups of a sample, K = channels of a group, S = positions of a channel.
# A row is the D = K * S values of one group in one sample. They share a mean and a variance. Their
# gamma and beta are those of channels g * K to (g + 1) * K.
#
#   norm             G    K    S
#   layer, RMS       1    D    1
#   group            G    C/G  positions
#   instance         C    1    positions
#
#   loops        when                                     gamma and beta
#   TRANSPOSED   short rows, transposed in the L1 cache   one per value
#   ALONG        S below ROW_RUNS (backward: ROW_DOTS)    one per value
#   RUNS         longer S                                 one per run
#   DOWN         channels-last                            one per column, as in batch normalization
#
# a. Blocks. All passes over a block end before the next block begins, so the second read comes from
#    L2. A block of runs consists of neighbouring groups of one sample. Other blocks are several
#    samples of one group, which share gamma and beta.
# b. Slots. A row is summed in segments. The sums of each segment are stored in a slot, and slots
#    are added in order. Runs in a backward pass, and channels-last rows, have slots for each
#    channel. Backward, these give dgamma, dbeta and, weighted with gamma, the two sums of the row.
# c. Chunks. dgamma and dbeta are summed in float64 for each chunk of N, and the dispatch adds the
#    chunks in order. Owned: a thread does all passes for a chunk of N and some groups. Shared: with
#    few long rows, each pass is a parallel loop. Both ways add in the same order, so the bits
#    depend on the shape alone.

from cpython.pycapsule cimport PyCapsule_New
from cython.parallel cimport prange
from libc.math cimport INFINITY, fabs, sqrt
from libc.string cimport memcpy, memset

from cybn._kernels.by_row cimport (
    C1_OF_ROW, C2_OF_ROW, HI_OF_ROW, LO_OF_ROW, R_OF_ROW, ROW_TERMS, row_dots, row_scale,
    row_unscale)
from cybn._kernels.check cimport check
from cybn._kernels.lanes cimport (
    BFLOAT16, FLOAT16, FLUSH, LANES, PIECE, PLAIN, STRIP, T, WIDE, Way, across, clear,
    gather, on_line, read, spread, stream_end, write)
from cybn._kernels.loops cimport (
    A, B, COEFFICIENTS, HI, K, ROOM, STRAIGHT, Z, Lines, dot_columns, dot_run, has_lines, lanes_of,
    sum_columns, sum_run)
from cybn._kernels.problem cimport FLOAT64, SAMPLES, SERIAL, SUM_ROW, Caches, Rows, ceiling, way_of
from cybn._kernels.row_problem cimport (
    ALONG, DOWN, ROW_BLOCK, ROW_CHUNK, RUNS, SHORT, SHORT_DOTS, STRETCH_OF_RUNS, TILE, TRANSPOSED,
    Kernels, RowProblem, RowTiling, row_tiling)
from cybn._kernels.statistics cimport (
    Wide, add_wide, beyond, pivot_of, sample_of, settle, settled, wide_sums)
from cybn._kernels.transposed cimport (
    TERMS, Block, find_pivots, transpose, transposed_dots, transposed_moments, transposed_scale,
    transposed_sums, transposed_terms, transposed_unscale)
from cybn._kernels.waiting cimport begun, ended
from cybn._kernels.writes cimport Seam, hold_nothing, let_go, scale, unscale

cdef struct Job:
    const RowProblem* p
    RowTiling t
    Way way
    bint stream             # results are written past the caches

cdef struct Span:           # rows of samples n0..n1 and groups g0..g1
    Py_ssize_t n0, n1, g0, g1

cdef struct Row:            # what the second pass needs for a row
    bint left               # out of range of T: the dispatch computes this row
    double hi, lo, r        # mean = hi + lo, and one over the standard deviation
    double c1, c2           # means of dz = dy * gamma, and of dz * xhat

cdef Caches caches
caches.l2, caches.l3 = 512 << 10, 32 << 20


cdef inline char* place(
    const Rows* rows, const Job* job, Py_ssize_t n, Py_ssize_t i
) noexcept nogil:
    """Return the address of value i of sample n."""
    return rows.at + n * rows.pitch + i * job.p.item


cdef inline Py_ssize_t in_sample(const Job* job, Py_ssize_t g, Py_ssize_t i) noexcept nogil:
    """Return the index in its sample of value i of a row.

    The values of a channels-last row are ordered by position, then by channel.
    """
    cdef const RowProblem* p = job.p
    if p.last:
        return i // p.K * p.G * p.K + g * p.K + i % p.K
    return g * p.D + i


cdef inline T value(const Job* job, Py_ssize_t n, Py_ssize_t i, T of_type) noexcept nogil:
    """Return value i of sample n of x."""
    cdef T room[1]
    return read(job.way, place(&job.p.x, job, n, i), 1, room)[0]


cdef inline T find_pivot(const Job* job, Py_ssize_t n, Py_ssize_t g, T of_type) noexcept nogil:
    """Return the pivot that a row is summed about; 0 if the row is not centred (RMS)."""
    cdef double v[SAMPLES]
    cdef Py_ssize_t i
    if not job.p.centred:
        return 0
    for i in range(SAMPLES):
        v[i] = value(job, n, in_sample(job, g, sample_of(i, job.p.D)), of_type)
    return pivot_of(v, of_type)


# ---- reduce ------------------------------------------------------------------------------

cdef void add_run(
    const Job* job, const char* dy, const char* x, Py_ssize_t n, T shift, double* out
) noexcept nogil:
    """Compute the sums of n values about a shift; in a backward pass, their dots."""
    cdef double acc[2 * WIDE]
    clear(acc, 2 * WIDE)
    if job.p.backward:
        dot_run(job.way, STRAIGHT, dy, x, n, &shift, &shift, acc)
    else:
        sum_run(job.way, x, n, shift, acc)
    out[0] = across(acc)
    out[1] = across(acc + WIDE)


cdef void reduce_row(
    const Job* job, Py_ssize_t n, Py_ssize_t g, T shift, Py_ssize_t i, double* out
) noexcept nogil:
    """Sum segment i of a row.

    Forward, a segment consists of whole pieces (PIECE values). Backward, it is one of several
    nearly equal parts of a channel.
    """
    cdef const RowProblem* p = job.p
    cdef Py_ssize_t pieces = ceiling(p.D, PIECE), at = 0, end = p.D, m
    if p.backward:
        m = ceiling(ceiling(p.S, job.t.cuts), PIECE) * PIECE
        at = i // job.t.cuts * p.S + i % job.t.cuts * m
        end = min(at + m, (i // job.t.cuts + 1) * p.S)
    elif job.t.cuts > 1:
        at = i * pieces // job.t.cuts * PIECE
        end = min(p.D, (i + 1) * pieces // job.t.cuts * PIECE)
    at += g * p.D
    end += g * p.D
    add_run(job, place(&p.dy, job, n, at), place(&p.x, job, n, at), max(0, end - at), shift, out)


cdef inline const T* spread_tile(
    const Job* job, const T* v, Py_ssize_t g, Py_ssize_t t, T* room
) noexcept nogil:
    """Return gamma or beta of tile t, one per column: without a copy if S is 1, else in room."""
    cdef const RowProblem* p = job.p
    cdef Py_ssize_t at = t * job.t.tile, m = min(job.t.tile, p.D - at) // p.S
    if p.S == 1:
        return v + g * p.D + at
    memcpy(room + m * p.S - m, v + g * p.K + at // p.S, m * sizeof(T))
    spread(room, m, p.S, 1)
    return room


cdef void reduce_along(
    const Job* job, const Span* s, const T* shift, Py_ssize_t i
) noexcept nogil:
    """Compute the dots of segment i of some rows that share gamma."""
    cdef double acc[ROW_BLOCK * 2 * WIDE]
    cdef T room[TILE]
    cdef const RowProblem* p = job.p
    cdef const T* gamma
    cdef const char* x
    cdef const char* dy
    cdef Py_ssize_t n, t, m, at, rows = s.n1 - s.n0
    cdef double* out
    clear(acc, rows * 2 * WIDE)
    for t in range(i * job.t.tiles // job.t.cuts, (i + 1) * job.t.tiles // job.t.cuts):
        m = min(job.t.tile, p.D - t * job.t.tile)
        gamma = spread_tile(job, <const T*> p.gamma, s.g0, t, room)
        at = s.g0 * p.D + t * job.t.tile
        for n in range(rows):
            x, dy = place(&p.x, job, s.n0 + n, at), place(&p.dy, job, s.n0 + n, at)
            if T is float and job.way == FLOAT16:
                row_dots(FLOAT16, dy, x, gamma, m, shift[n], acc + n * 2 * WIDE)
            elif T is float and job.way == BFLOAT16:
                row_dots(BFLOAT16, dy, x, gamma, m, shift[n], acc + n * 2 * WIDE)
            else:
                row_dots(PLAIN, dy, x, gamma, m, shift[n], acc + n * 2 * WIDE)
    for n in range(rows):
        out = p.sums + (((s.n0 + n) * p.G + s.g0) * job.t.slots + i) * 2
        out[0] = across(acc + n * 2 * WIDE)
        out[1] = across(acc + n * 2 * WIDE + WIDE)


cdef void reduce(
    const Job* job, const Span* s, Py_ssize_t k0, Py_ssize_t k1, T of_type
) noexcept nogil:
    """Fill slots k0..k1 of each row. Forward, sums are about a pivot, which is stored in mean."""
    cdef const RowProblem* p = job.p
    cdef T shift[ROW_BLOCK]
    cdef Py_ssize_t n, g, k, row
    if job.t.loops == DOWN:
        for n in range(s.n0, s.n1):
            reduce_down(job, n, k0, k1, of_type)
        return
    for n in range(s.n0, s.n1):
        for g in range(s.g0, s.g1):
            row = n * p.G + g
            if not p.backward:
                shift[0] = find_pivot(job, n, g, of_type)
                if k0 == 0:
                    p.mean[row] = shift[0]
            else:
                shift[n - s.n0 if job.t.loops == ALONG else 0] = <T> p.mean[row]
            if not p.backward or job.t.loops == RUNS:
                for k in range(k0, k1):
                    reduce_row(job, n, g, shift[0], k, p.sums + (row * job.t.slots + k) * 2)
    if p.backward and job.t.loops == ALONG:
        for k in range(k0, k1):
            reduce_along(job, s, shift, k)


# ---- reduce, channels-last: down the columns of a sample ---------------------------------

cdef inline Py_ssize_t positions_as_one(const Job* job) noexcept nogil:
    """Return how many positions are summed as one row of columns, to keep vectors full."""
    cdef Py_ssize_t C = job.p.G * job.p.K
    return SUM_ROW // C if 2 * C <= SUM_ROW else 1


cdef void load_shifts(
    const Job* job, Py_ssize_t n, Py_ssize_t c0, Py_ssize_t m, bint keep, T* hi
) noexcept nogil:
    """Load the shift of columns c0..c0 + m: the mean, or in a forward pass the pivot.

    If `keep`, the pivot is also stored in mean.
    """
    cdef const RowProblem* p = job.p
    cdef Py_ssize_t c, row
    cdef T shift = 0
    for c in range(c0, c0 + m):
        row = n * p.G + c // p.K
        if c == c0 or c % p.K == 0:
            shift = <T> p.mean[row] if p.backward else find_pivot(job, n, c // p.K, shift)
            if keep and not p.backward:
                p.mean[row] = shift
        hi[c - c0] = shift


cdef void add_lines(
    const Job* job, Way way, const Lines* dy, const Lines* x, Py_ssize_t sweeps, Py_ssize_t w,
    const T* co, T* a, T* b,
) noexcept nogil:
    """Add rows to the sums of their columns."""
    if job.p.backward:
        if T is float and way == FLOAT16:
            dot_columns(FLOAT16, STRAIGHT, dy, x, sweeps, w, co, co, a, b)
        elif T is float and way == BFLOAT16:
            dot_columns(BFLOAT16, STRAIGHT, dy, x, sweeps, w, co, co, a, b)
        else:
            dot_columns(PLAIN, STRAIGHT, dy, x, sweeps, w, co, co, a, b)
    elif T is float and way == FLOAT16:
        sum_columns(FLOAT16, x, sweeps, w, co, a, b)
    elif T is float and way == BFLOAT16:
        sum_columns(BFLOAT16, x, sweeps, w, co, a, b)
    else:
        sum_columns(PLAIN, x, sweeps, w, co, a, b)


cdef void add_positions(
    const Job* job, Py_ssize_t n, Py_ssize_t i, Py_ssize_t pitch, Py_ssize_t rows, Py_ssize_t w,
    const T* co, T* a, T* b,
) noexcept nogil:
    """Add rows of w columns to a and b. They begin at value i of sample n, `pitch` values apart.

    Rows that do not fill a sweep, and rows shorter than a strip, are copied first. The padding of
    a copy adds nothing to the sums.
    """
    cdef T copies[4 * TILE]
    cdef T of_dy[2 * TILE]
    cdef const RowProblem* p = job.p
    cdef Lines x
    cdef Lines dy
    cdef Py_ssize_t together = 2 if p.backward else 4, full = max(w, lanes_of(co[0])), k, j
    cdef Py_ssize_t sweeps = rows // together if full == w else 0, r = sweeps * together
    cdef const T* at
    cdef T room[TILE]
    for k in range(together):
        x.at[k] = place(&p.x, job, n, i + k * pitch)
        dy.at[k] = place(&p.dy, job, n, i + k * pitch) if p.backward else NULL
    x.pitch = dy.pitch = together * pitch * p.item
    if sweeps:
        add_lines(job, job.way, &dy, &x, sweeps, w, co, a, b)
    while r < rows:
        for k in range(together):
            memcpy(&copies[k * TILE], co, full * sizeof(T))
            if p.backward:
                clear(&of_dy[k * TILE], full)
                dy.at[k] = <const char*> &of_dy[k * TILE]
            x.at[k] = <const char*> &copies[k * TILE]
            if r + k >= rows:
                continue
            j = i + (r + k) * pitch
            at = read(job.way, place(&p.x, job, n, j), w, room)
            memcpy(&copies[k * TILE], at, w * sizeof(T))
            if p.backward:
                at = read(job.way, place(&p.dy, job, n, j), w, room)
                memcpy(&of_dy[k * TILE], at, w * sizeof(T))
        add_lines(job, PLAIN, &dy, &x, 1, full, co, a, b)
        r += together


cdef void reduce_channels(
    const Job* job, Py_ssize_t n, Py_ssize_t c0, Py_ssize_t m, Py_ssize_t k, const T* co
) noexcept nogil:
    """Sum m channels over cut k of the positions."""
    cdef T a[TILE]
    cdef T b[TILE]
    cdef double sum_a[TILE]
    cdef double sum_b[TILE]
    cdef const RowProblem* p = job.p
    cdef Py_ssize_t C = p.G * p.K, step = positions_as_one(job), rows, c
    cdef Py_ssize_t s = k * p.S // job.t.cuts, end = (k + 1) * p.S // job.t.cuts
    cdef double* out = p.sums + ((n * C + c0) * job.t.cuts + k) * 2
    clear(a, max(m * step, LANES))
    clear(b, max(m * step, LANES))
    clear(sum_a, m)
    clear(sum_b, m)
    while s < end:
        rows = min(FLUSH, (end - s) // step)
        if rows > 0:
            add_positions(job, n, s * C + c0, step * C, rows, m * step, co, a, b)
        else:                   # fewer positions than a row has
            rows = 1
            add_positions(job, n, s * C + c0, 0, 1, m * (end - s), co, a, b)
        gather(a, m, 1, step, sum_a)
        gather(b, m, 1, step, sum_b)
        s += rows * step
    for c in range(m):
        out[c * job.t.cuts * 2] = sum_a[c]
        out[c * job.t.cuts * 2 + 1] = sum_b[c]


cdef void reduce_down(
    const Job* job, Py_ssize_t n, Py_ssize_t k0, Py_ssize_t k1, T of_type
) noexcept nogil:
    """Fill slots k0..k1 of each channel of a sample."""
    cdef T co[TILE + LANES]     # HI: sums need nothing else
    cdef Py_ssize_t C = job.p.G * job.p.K, i, k, m
    for i in range(ceiling(C, TILE)):
        m = min(TILE, C - i * TILE)
        load_shifts(job, n, i * TILE, m, k0 == 0, co)
        spread(co, m, 1, positions_as_one(job))
        clear(co + m * positions_as_one(job), LANES)
        for k in range(k0, k1):
            reduce_channels(job, n, i * TILE, m, k, co)


# ---- finish ------------------------------------------------------------------------------

cdef struct Place:              # a row whose values are to be summed again
    const Job* job
    Py_ssize_t n, g


cdef void look(
    const Place* row, double shift, double down, T of_type, double* sums
) noexcept nogil:
    """Compute the sums of a row in float64."""
    cdef Wide wide
    cdef T room[PIECE]
    cdef const Job* job = row.job
    cdef const T* x
    cdef Py_ssize_t i, j, m
    memset(&wide, 0, sizeof(wide))
    for i in range(ceiling(job.p.D, PIECE)):
        m = min(PIECE, job.p.D - i * PIECE)
        if job.p.last:
            for j in range(m):
                room[j] = value(job, row.n, in_sample(job, row.g, i * PIECE + j), of_type)
            x = room
        else:
            x = read(job.way, place(&job.p.x, job, row.n, row.g * job.p.D + i * PIECE), m, room)
        add_wide(x, <const T*> NULL, m, shift, down, &wide)
    wide_sums(&wide, sums)


cdef void look_float(const void* row, double shift, double down, double* sums) noexcept nogil:
    look(<const Place*> row, shift, down, <float> 0, sums)


cdef void look_double(const void* row, double shift, double down, double* sums) noexcept nogil:
    look(<const Place*> row, shift, down, <double> 0, sums)


cdef void finish_forward(const Job* job, Py_ssize_t n, Py_ssize_t g, T of_type) noexcept nogil:
    """Turn the sums about the pivot into mean and m2 (docs/math.md, 6.2)."""
    cdef const RowProblem* p = job.p
    cdef Py_ssize_t row = n * p.G + g, i
    cdef double s1 = 0, s2 = 0
    cdef const double* part = p.sums + row * job.t.slots * 2
    cdef Place at
    for i in range(job.t.slots):
        s1 += part[2 * i]
        s2 += part[2 * i + 1]
    s1 = s1 if p.centred else 0
    if settled(s1, s2, p.D, of_type):
        p.mean[row] += s1 / p.D
        p.m2[row] = s2 - s1 * (s1 / p.D)
    else:
        at.job, at.n, at.g = job, n, g
        settle(look_float if T is float else look_double, &at, p.D, p.centred, &p.mean[row],
               &p.m2[row])
    p.left[row] = beyond(p.mean[row], p.m2[row] / p.D + p.eps, False, 0, of_type)


cdef inline double rstd(const Job* job, Py_ssize_t row) noexcept nogil:
    return 1 / sqrt(job.p.m2[row] / job.p.D + job.p.eps)


cdef inline bint left_to_dispatch(
    const Job* job, Py_ssize_t row, double total1, double total2, T of_type
) noexcept nogil:
    """Return whether a row with these sums is out of range of T in a backward pass."""
    cdef const RowProblem* p = job.p
    cdef double v = p.m2[row] / p.D + p.eps, r = rstd(job, row)
    return beyond(
        p.mean[row], v, True, fabs(total1) + fabs(total2 * r * r / p.D), of_type)


cdef void finish_backward(
    const Job* job, Py_ssize_t n, Py_ssize_t g, double* dgamma, T of_type
) noexcept nogil:
    """Add the slots of a row to its two sums.

    Slots of runs and of channels-last rows are first added for each channel, which gives dgamma
    and dbeta.
    """
    cdef const RowProblem* p = job.p
    cdef const T* gamma = <const T*> p.gamma
    cdef bint by_channel = job.t.loops == RUNS or job.t.loops == DOWN
    cdef Py_ssize_t row = n * p.G + g, C = p.G * p.K, c, i
    cdef double mean = p.mean[row], r = rstd(job, row) if by_channel else 0
    cdef double lo = mean - <T> mean
    cdef double* first = p.sums + row * job.t.slots * 2
    cdef double* part = first
    cdef double s1, s2, total1 = 0, total2 = 0
    for c in range(g * p.K, g * p.K + (p.K if by_channel else 1)):
        s1 = s2 = 0
        for i in range(job.t.cuts):
            s1 += part[2 * i]
            s2 += part[2 * i + 1]
        s2 -= lo * s1
        part[0], part[1] = s1, s2
        part += 2 * job.t.cuts
        total1 += s1 * gamma[c] if by_channel else s1
        total2 += s2 * gamma[c] if by_channel else s2
    p.left[row] = left_to_dispatch(job, row, total1, total2, of_type)
    if by_channel and not p.left[row]:
        part = first
        for c in range(g * p.K, (g + 1) * p.K):
            dgamma[c] += part[1] * r if r != 0 else 0
            dgamma[C + c] += part[0]
            part += 2 * job.t.cuts
    first[0] = total1
    first[1] = total2


cdef void finish(const Job* job, const Span* s, double* parts, T of_type) noexcept nogil:
    cdef Py_ssize_t n, g
    for n in range(s.n0, s.n1):
        for g in range(s.g0, s.g1):
            if job.p.backward:
                finish_backward(job, n, g, parts, of_type)
            else:
                finish_forward(job, n, g, of_type)


# ---- apply -------------------------------------------------------------------------------

cdef inline Row of_row(const Job* job, Py_ssize_t row, T of_type) noexcept nogil:
    """Return what the second pass needs for a row."""
    cdef const RowProblem* p = job.p
    cdef const double* total = p.sums + row * job.t.slots * 2
    cdef Row c
    c.left = p.left[row]
    c.r = rstd(job, row)
    c.hi = <T> p.mean[row] if c.r != 0 else 0   # if m2 is infinite, y is beta
    c.lo = p.mean[row] - c.hi if c.r != 0 else 0
    c.c1 = total[0] / p.D if p.backward and p.centred else 0
    c.c2 = total[1] * c.r / p.D if p.backward and c.r != 0 else 0
    return c


cdef inline void of_channel(
    const Job* job, const Row* row, Py_ssize_t c,
    T* co,                      # OUT HI, A, Z, K and B of a channel
) noexcept nogil:
    """Compute the constants of (x - hi) * a + z, or of dy * a + (x - hi) * k + b."""
    cdef double a = (<const T*> job.p.gamma)[c] * row.r, k = -row.r * row.r * row.c2, beta
    co[HI] = <T> row.hi
    co[A] = <T> a
    if job.p.backward:
        co[K] = <T> k
        co[B] = <T> (-row.r * row.c1 - k * row.lo)
    else:
        beta = (<const T*> job.p.beta)[c]
        co[Z] = <T> (beta - a * row.lo if row.lo != 0 else beta)


cdef inline void apply_line(
    const Job* job, Py_ssize_t step, Py_ssize_t n, Py_ssize_t i, Py_ssize_t w, const T* co,
    Seam* seam,
) noexcept nogil:
    """Write y or dx of values i..i + w of sample n."""
    cdef const RowProblem* p = job.p
    cdef char rooms[3][STRIP]
    cdef const char* x = place(&p.x, job, n, i)
    cdef const char* dy = place(&p.dy, job, n, i) if p.backward else x
    cdef char* y = place(&p.y, job, n, i)
    cdef Py_ssize_t most = max(w, lanes_of(co[0])), bytes = w * p.item
    cdef bint stream = job.stream and has_lines(job.way, w, co[0])
    if w < most:                # shorter than a strip: use copies
        memcpy(rooms[0], x, bytes)
        memcpy(rooms[1], dy, bytes)
        x, dy, y = rooms[0], rooms[1], rooms[2]
    if p.backward:
        unscale(job.way, stream, step, STRAIGHT, dy, x, y, most, co, co, seam)
    else:
        scale(job.way, stream, step, x, NULL, y, most, co, False, <T> (-INFINITY), <T> INFINITY,
              seam)
    if w < most:
        memcpy(place(&p.y, job, n, i), y, bytes)


cdef void apply_runs(
    const Job* job, Py_ssize_t n, Py_ssize_t g, const Row* row, Py_ssize_t t, T of_type
) noexcept nogil:
    """Write y or dx of tile t of group g of sample n. A tile may begin or end within a channel."""
    cdef T co[COEFFICIENTS]
    cdef const RowProblem* p = job.p
    cdef Py_ssize_t at = g * p.D + t * job.t.tile, w
    cdef Py_ssize_t end = g * p.D + min(p.D, (t + 1) * job.t.tile)
    cdef Seam seam
    hold_nothing(&seam)
    while at < end:
        w = min(p.S - at % p.S, end - at)
        of_channel(job, row, at // p.S, co)
        apply_line(job, 0, n, at, w, co, &seam)
        at += w
    let_go(&seam)


cdef void apply_along(
    const Job* job, const Span* s, const Row* rows, Py_ssize_t t, double* dgamma, double* dbeta,
    T of_type,
) noexcept nogil:
    """Write y, or dx and the sums for dgamma and dbeta, of tile t of some rows."""
    cdef T room[2 * TILE]
    cdef T sums[2 * TILE + 4 * LANES]
    cdef T terms[ROW_TERMS]
    cdef const RowProblem* p = job.p
    cdef Py_ssize_t at = s.g0 * p.D + t * job.t.tile, m = min(job.t.tile, p.D - t * job.t.tile), n
    cdef Py_ssize_t c = s.g0 * p.K + t * job.t.tile // p.S
    cdef const T* gamma = spread_tile(job, <const T*> p.gamma, s.g0, t, room)
    cdef const T* beta = NULL
    cdef T* a = on_line(sums, NULL)
    cdef T* b = a + TILE
    cdef const char* x
    cdef const char* dy
    cdef char* y
    cdef bint stream = job.stream and has_lines(job.way, m, of_type)
    cdef Seam seam
    hold_nothing(&seam)
    if p.backward:
        clear(a, m)
        clear(b, m)
    else:
        beta = spread_tile(job, <const T*> p.beta, s.g0, t, room + TILE)
    for n in range(s.n0, s.n1):
        if rows[n - s.n0].left:
            continue
        terms[HI_OF_ROW], terms[LO_OF_ROW] = <T> rows[n - s.n0].hi, <T> rows[n - s.n0].lo
        terms[R_OF_ROW] = <T> rows[n - s.n0].r
        terms[C1_OF_ROW], terms[C2_OF_ROW] = <T> rows[n - s.n0].c1, <T> rows[n - s.n0].c2
        x, y = place(&p.x, job, n, at), place(&p.y, job, n, at)
        if not p.backward:
            if T is float and job.way == FLOAT16:
                row_scale(FLOAT16, stream, x, gamma, beta, y, m, terms, &seam)
            elif T is float and job.way == BFLOAT16:
                row_scale(BFLOAT16, stream, x, gamma, beta, y, m, terms, &seam)
            else:
                row_scale(PLAIN, stream, x, gamma, beta, y, m, terms, &seam)
            continue
        dy = place(&p.dy, job, n, at)
        if T is float and job.way == FLOAT16:
            row_unscale(FLOAT16, stream, dy, x, gamma, y, m, terms, a, b, &seam)
        elif T is float and job.way == BFLOAT16:
            row_unscale(BFLOAT16, stream, dy, x, gamma, y, m, terms, a, b, &seam)
        else:
            row_unscale(PLAIN, stream, dy, x, gamma, y, m, terms, a, b, &seam)
    let_go(&seam)
    if p.backward:
        gather(a, m // p.S, p.S, 1, dgamma + c)
        gather(b, m // p.S, p.S, 1, dbeta + c)


cdef void apply_channels(
    const Job* job, Py_ssize_t n, Py_ssize_t c0, Py_ssize_t m, Py_ssize_t s0, Py_ssize_t s1,
    T of_type,
) noexcept nogil:
    """Write y or dx of m channels at positions s0..s1.

    The last stretch of positions comes first. The order within a stretch is ascending.
    """
    cdef T co[COEFFICIENTS]
    cdef const RowProblem* p = job.p
    cdef Py_ssize_t C = p.G * p.K, c, i, s, slot
    cdef Py_ssize_t step = max(1, min(TILE // C, (s1 - s0) // 32)) if m == C else 1, end
    cdef Py_ssize_t stretch = ceiling(STRETCH_OF_RUNS, m * step) * step
    cdef Row row
    cdef Seam seam
    hold_nothing(&seam)
    for c in range(c0, c0 + m):
        if c == c0 or c % p.K == 0:
            row = of_row(job, n * p.G + c // p.K, <T> 0)
        of_channel(job, &row, c, co + c - c0)
    for slot in range(5):
        spread(co + slot * ROOM, m, 1, step)
    for i in range(ceiling(s1 - s0, stretch) - 1, -1, -1):
        s = s0 + i * stretch
        end = min(s + stretch, s1)
        while s < end:
            apply_line(job, 1, n, s * C + c0, m * min(step, end - s), co, &seam)
            s += step
    let_go(&seam)


cdef inline Py_ssize_t kept(
    const Job* job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t most
) noexcept nogil:
    """Return how many channels of sample n, from c on, are in rows that loops can write.

    The count ends at the first other row, and at `most`.
    """
    cdef const RowProblem* p = job.p
    cdef Py_ssize_t g = c // p.K
    while g * p.K < c + most and not p.left[n * p.G + g]:
        g += 1
    return max(0, min(most, g * p.K - c))


cdef void apply(
    const Job* job, const Span* s, double* parts, Py_ssize_t t0, Py_ssize_t t1, T of_type
) noexcept nogil:
    """Write y or dx of tiles t0..t1 of some rows, beginning with the last, where reduce ended."""
    cdef const RowProblem* p = job.p
    cdef Row rows[ROW_BLOCK]
    cdef Py_ssize_t n, g, t, i, m, C = p.G * p.K
    if job.t.loops == DOWN:
        for n in range(s.n0, s.n1):
            i = 0
            while i < C:
                m = kept(job, n, i, min(TILE, C - i))
                if m > 0:
                    apply_channels(job, n, i, m, t0 * job.t.tile, min(t1 * job.t.tile, p.S),
                                   of_type)
                i += m if m > 0 else p.K - i % p.K
    else:
        i = 0
        for n in range(s.n0, s.n1):
            for g in range(s.g0, s.g1):
                rows[i] = of_row(job, n * p.G + g, of_type)
                i += 1
        for g in range(s.g1 - 1, s.g0 - 1, -1):
            for t in range(t1 - 1, t0 - 1, -1):
                if job.t.loops != RUNS:
                    apply_along(job, s, rows, t, parts, parts + C, of_type)
                elif not rows[g - s.g0].left:
                    apply_runs(job, s.n0, g, &rows[g - s.g0], t, of_type)
    if job.stream:
        stream_end()


# ---- both passes over short rows ---------------------------------------------------------

cdef void read_transposed(const Job* job, const Rows* rows, const Span* s, T* out) noexcept nogil:
    """Transpose the rows of a span of one group to (D, LANES)."""
    cdef T room[4 * SHORT]
    cdef Py_ssize_t D = job.p.D, n = s.n1 - s.n0, i, j
    cdef const char* at = place(rows, job, s.n0, s.g0 * D)
    if n < LANES:
        clear(out, D * LANES)
    if T is float and job.way != PLAIN:
        for i in range(0, n, 4):
            for j in range(min(4, n - i)):
                read(job.way, at + (i + j) * rows.pitch, D, room + j * D)
            transpose(room, D, min(4, n - i), D, out + i, LANES)
    else:
        check(rows.pitch % job.p.item == 0)
        transpose(<const T*> at, rows.pitch // job.p.item, n, D, out, LANES)


cdef void write_transposed(
    const Job* job, const Span* s, const Block* block, const T* v
) noexcept nogil:
    """Write the rows of a transposed span, except those that the dispatch computes."""
    cdef T room[4 * SHORT]
    cdef Py_ssize_t D = job.p.D, n = s.n1 - s.n0, left = 0, i, j
    cdef char* at = place(&job.p.y, job, s.n0, s.g0 * D)
    for i in range(n):
        left |= block.left[i]
    if job.way == PLAIN and not left:
        transpose(v, LANES, D, n, <T*> at, job.p.y.pitch // job.p.item)
        return
    for i in range(0, n, 4):
        transpose(v + i, LANES, D, min(4, n - i), room, D)
        for j in range(min(4, n - i)):
            if not block.left[i + j]:
                write(job.way, room + j * D, at + (i + j) * job.p.y.pitch, D)


cdef void transposed_forward(const Job* job, const Span* s, T of_type) noexcept nogil:
    """Normalize the rows of a span of one group."""
    cdef T x[SHORT * LANES]
    cdef T room[2 * SHORT]
    cdef T shift[LANES]
    cdef T terms[TERMS * LANES]
    cdef const T* gamma
    cdef const T* beta
    cdef const RowProblem* p = job.p
    cdef Py_ssize_t i, row
    cdef Block block
    cdef Place at
    read_transposed(job, &p.x, s, x)
    clear(shift, LANES)
    if p.centred:
        find_pivots(x, p.D, shift)
    transposed_sums(x, p.D, shift, &block)
    transposed_moments(shift, p.D, p.centred, &block)
    for i in range(s.n1 - s.n0):
        if block.unsettled[i]:
            at.job, at.n, at.g = job, s.n0 + i, s.g0
            block.mean[i] = shift[i]
            settle(look_float if T is float else look_double, &at, p.D, p.centred, &block.mean[i],
                   &block.m2[i])
    transposed_terms(p.D, p.eps, p.centred, False, &block, terms)
    for i in range(s.n1 - s.n0):
        row = (s.n0 + i) * p.G + s.g0
        p.mean[row], p.m2[row], p.left[row] = block.mean[i], block.m2[i], block.left[i]
    gamma = spread_tile(job, <const T*> p.gamma, s.g0, 0, room)
    beta = spread_tile(job, <const T*> p.beta, s.g0, 0, room + SHORT)
    transposed_scale(x, gamma, beta, p.D, terms)
    write_transposed(job, s, &block, x)


cdef void transposed_backward(
    const Job* job, const Span* s, double* parts, T of_type
) noexcept nogil:
    """Compute the gradients of the rows of a span of one group."""
    cdef T x[SHORT_DOTS * LANES]
    cdef T dy[SHORT_DOTS * LANES]
    cdef T room[SHORT_DOTS]
    cdef T terms[TERMS * LANES]
    cdef const RowProblem* p = job.p
    cdef const T* gamma = spread_tile(job, <const T*> p.gamma, s.g0, 0, room)
    cdef double* dgamma = parts + s.g0 * p.K
    cdef Py_ssize_t i, j, row
    cdef Block block
    read_transposed(job, &p.x, s, x)
    read_transposed(job, &p.dy, s, dy)
    for i in range(LANES):
        row = (s.n0 + min(i, s.n1 - s.n0 - 1)) * p.G + s.g0
        block.mean[i], block.m2[i] = p.mean[row], p.m2[row]
    transposed_dots(dy, x, gamma, p.D, &block)
    transposed_terms(p.D, p.eps, p.centred, True, &block, terms)
    for i in range(s.n1 - s.n0):
        p.left[(s.n0 + i) * p.G + s.g0] = block.left[i]
        if block.left[i]:       # adds nothing to dgamma and dbeta
            for j in range(p.D):
                x[j * LANES + i] = dy[j * LANES + i] = 0
            for j in range(TERMS):
                terms[j * LANES + i] = 0
    transposed_unscale(dy, x, gamma, p.D, p.S, terms, dgamma, dgamma + p.G * p.K)
    write_transposed(job, s, &block, dy)


# ---- threads -----------------------------------------------------------------------------

cdef inline Span span_of(const Job* job, Py_ssize_t i) noexcept nogil:
    """Return span i: a chunk of N for some groups."""
    cdef Py_ssize_t chunk = i // job.t.spans
    cdef Span s
    s.n0 = chunk * job.p.N // job.t.chunks
    s.n1 = (chunk + 1) * job.p.N // job.t.chunks
    s.g0 = i % job.t.spans * job.t.groups
    s.g1 = min(s.g0 + job.t.groups, job.p.G)
    return s


cdef inline double* parts_of(const Job* job, Py_ssize_t i) noexcept nogil:
    """Return the sums for dgamma of the chunk of span i, (C,). Those for dbeta follow them."""
    return job.p.parts + i // job.t.spans * 2 * job.p.G * job.p.K


cdef void clear_parts(const Job* job, const Span* s, double* parts) noexcept nogil:
    """Zero the sums for dgamma and dbeta of some groups."""
    cdef Py_ssize_t first = s.g0 * job.p.K, m = (s.g1 - s.g0) * job.p.K
    if job.p.backward:
        clear(parts + first, m)
        clear(parts + job.p.G * job.p.K + first, m)


cdef void own(const Job* job, Py_ssize_t i, T of_type) noexcept nogil:
    """Do all passes over a span, block by block."""
    cdef Span all = span_of(job, i), s = all
    cdef double* parts = parts_of(job, i)
    cdef double since = begun(job.p.watch)
    clear_parts(job, &s, parts)
    while s.n0 < all.n1:
        s.n1 = min(s.n0 + job.t.samples, all.n1)
        if job.t.loops == TRANSPOSED and job.p.backward:
            transposed_backward(job, &s, parts, of_type)
        elif job.t.loops == TRANSPOSED:
            transposed_forward(job, &s, of_type)
        else:
            reduce(job, &s, 0, job.t.shared, of_type)
            finish(job, &s, parts, of_type)
            apply(job, &s, parts, 0, job.t.tiles, of_type)
        s.n0 = s.n1
    ended(job.p.watch, since)


cdef void share_reduce(const Job* job, Py_ssize_t parts, Py_ssize_t i, T of_type) noexcept nogil:
    """Compute part i of the sums of all rows."""
    cdef Py_ssize_t row = i // parts, k = i % parts, groups = job.p.G // job.t.apart
    cdef double since = begun(job.p.watch)
    cdef Span s
    s.n0, s.g0 = row // job.t.apart, row % job.t.apart * groups
    s.n1, s.g1 = s.n0 + 1, s.g0 + groups
    reduce(job, &s, k * job.t.shared // parts, (k + 1) * job.t.shared // parts, of_type)
    ended(job.p.watch, since)


cdef void share_finish(const Job* job, Py_ssize_t i, T of_type) noexcept nogil:
    cdef Span s = span_of(job, i)
    cdef double since = begun(job.p.watch)
    clear_parts(job, &s, parts_of(job, i))
    finish(job, &s, parts_of(job, i), of_type)
    ended(job.p.watch, since)


cdef void share_apply(const Job* job, Py_ssize_t i, T of_type) noexcept nogil:
    """Write one tile of all rows of a span."""
    cdef Py_ssize_t t = i % job.t.tiles
    cdef Span all = span_of(job, i // job.t.tiles), s = all
    cdef double since = begun(job.p.watch)
    while s.n0 < all.n1:
        s.n1 = min(s.n0 + job.t.samples, all.n1)
        apply(job, &s, parts_of(job, i // job.t.tiles), t, t + 1, of_type)
        s.n0 = s.n1
    ended(job.p.watch, since)


cdef inline bint streamed(const RowProblem* p) noexcept nogil:
    """Return whether results are written past the caches.

    They are not if y is an input or if all arrays fit the caches.
    """
    cdef Py_ssize_t touched = (3 if p.backward else 2) * p.N * p.G * p.D * p.item
    return p.y.at != p.x.at and p.y.at != p.dy.at and touched > min(caches.l3, 2 * caches.l2)


cdef void run(const RowProblem* p, T of_type) noexcept nogil:
    cdef Job job
    cdef Py_ssize_t i, tasks, grain, size, parts, values = p.N * p.G * p.D
    cdef int nt = p.threads if values >= SERIAL else 1
    job.p = p
    job.t = row_tiling(p)
    job.way = way_of(p.storage)
    job.stream = streamed(p)
    tasks = job.t.chunks * job.t.spans
    grain = max(1, SERIAL // 4 * tasks // values)
    size = p.G // job.t.apart * p.D     # of a row; of a sample if channels-last
    parts = min(job.t.shared, ceiling(size, STRETCH_OF_RUNS))
    if nt == 1:
        for i in range(tasks):
            own(&job, i, of_type)
        return
    if tasks >= 4 * nt or size <= ROW_CHUNK:
        for i in prange(tasks, schedule="dynamic", chunksize=grain, num_threads=nt):
            own(&job, i, of_type)
        return
    for i in prange(p.N * job.t.apart * parts, schedule="dynamic", num_threads=nt):
        share_reduce(&job, parts, i, of_type)
    for i in prange(tasks, schedule="static", num_threads=nt):
        share_finish(&job, i, of_type)
    for i in prange(tasks * job.t.tiles, schedule="dynamic", num_threads=nt):
        share_apply(&job, tasks * job.t.tiles - 1 - i, of_type)


# ---- what the dispatch calls -------------------------------------------------------------

cdef void run_problem(const RowProblem* p) noexcept nogil:
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
kernels.rows = run_problem
KERNELS = PyCapsule_New(&kernels, "cybn.kernels", NULL)
