# cython: language_level=3
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# Batch normalization in three steps over tiles: reduce, finish, apply.
#
# N = everything before the channel axis, C = channels, S = everything after it.
#
#   operation            reduce            finish             apply
#   statistics           sums of x         mean, m2           -
#   forward              sums of x         mean, m2           y  = (x - hi) * a + b
#   inference            -                 -                  y  = (x - hi) * a + b
#   backward             dots of dy, x     dbeta, dgamma      dx = dy * a + (x - hi) * k + b
#   inference_backward   dots of dy, x     dbeta, dgamma      dx = dy * a
#
# a. Bytes. float32 forward reads x, reads it again, writes y: 12 bytes an element from memory,
#    8 where the second look at x finds it in cache. Backward: 20 or 12. Inference: 8.
# b. Owned. A thread owns a block of channels and takes it through all three steps. One
#    parallel region, no barrier, and the second look comes from the core's own cache: the
#    block is sized so that it fits L2, and apply walks N backwards, over the lines touched last.
# c. Shared. With fewer channels than threads could own, or channels-last, each step is a
#    parallel loop over tiles of (chunk of N and S) x (block of channels).
# d. The same bits. A channel's sums are taken chunk by chunk and merged in chunk order. Chunks
#    depend on (N, C, S) alone. Blocks and schedules follow the machine: they move whole
#    channels about, never the order inside one.
# e. Pivot. Sums are centred on the mean of SAMPLES values spread over the channel. Where that
#    turns out too far from the mean, or squares left the range of T, finish sums that channel
#    again in float64 (docs/math.md, 6.2).
# f. hi + lo. The mean is split into hi, rounded to T, and the rest lo, which goes into b: the
#    error of y does not grow with |mean| / std.

from cython.parallel cimport prange
from libc.math cimport INFINITY, sqrt

from cybn._kernels.rows cimport (
    FLUSH, TILE, col_dots, col_scale, col_sums, col_unscale, gather, repeat, spread)
from cybn._kernels.runs cimport LANES, PIECE, RUN_MIN, T, WIDE, across, dots, scale, sums, unscale
from cybn._kernels.stream cimport stream, stream_end

cdef enum:
    SAMPLES = 8             # values whose mean is the pivot
    BLOCK = 32              # most channels of a block of runs
    GROUP = 16384           # elements that apply walks upwards, between its steps downwards
    # Columns up to which several channels-last rows are taken as one, where they are dense. As
    # that sets the order of sums, rows of up to half of SUM_ROW must be dense (_layout.NARROW).
    SUM_ROW = 64
    APPLY_ROW = 256
    VECTOR = 64             # channels whose coefficients are computed together
    SERIAL = 65536          # elements below which one thread is faster than two

cdef enum Reduce:
    NO_SUMS
    SUMS                    # of x and x * x
    DOTS                    # of dy and dy * x

cdef enum Apply:
    NO_WRITE
    SCALE                   # x to y
    SCALE_DY                # dy to dx, statistics fixed
    UNSCALE                 # dy and x to dx, through the statistics

cdef struct Vector:         # (C,) of either float type, or absent
    const void* data
    bint wide               # float64

cdef struct Job:
    Reduce reduce
    Apply apply
    Py_ssize_t N, C, S
    Py_ssize_t x_row, dy_row, y_row     # elements from one n to the next
    Vector mean, var        # var is m2 where count is the number of values
    Vector gamma, beta
    double count, eps
    double* sums            # (2 * chunks, C): of chunk k in rows 2k, 2k + 1; results in 0 and 1
    double* pivot           # (C,)
    Py_ssize_t chunk_rows, chunk_cols   # chunks of N, and of S
    Py_ssize_t apply_rows, apply_cols   # the same for apply, shared
    Py_ssize_t block, blocks            # channels a block, number of blocks
    int threads
    bint owned
    bint stream             # y goes past the caches

cdef struct Tile:           # channels c0..c1 of rows n0..n1, columns s0..s1
    Py_ssize_t c0, c1, n0, n1, s0, s1

SMALL = SERIAL

cdef Py_ssize_t l2_bytes = 512 << 10
cdef Py_ssize_t l3_bytes = 32 << 20


def set_caches(Py_ssize_t l2, Py_ssize_t l3):
    """Set the bytes of a core's L2 and of the last level. Speed depends on them, results do not."""
    global l2_bytes, l3_bytes
    l2_bytes = l2
    l3_bytes = l3


# ---- reduce ------------------------------------------------------------------------------

cdef inline Py_ssize_t even_step(Py_ssize_t length) noexcept nogil:
    """Length of the pieces of a run: nearly equal, whole lanes, at most PIECE."""
    cdef Py_ssize_t pieces = (length + PIECE - 1) // PIECE
    return ((length + pieces - 1) // pieces + LANES - 1) // LANES * LANES


cdef void reduce_runs(
    const T* x,
    const T* dy,
    const Job* job,
    const Tile* t,
    const double* shift,
    double* out1,
    double* out2,
) noexcept nogil:
    cdef double acc[BLOCK * 2 * WIDE]
    cdef Py_ssize_t c, n, piece, m, i, length = t.s1 - t.s0
    cdef Py_ssize_t step = even_step(length)
    cdef Py_ssize_t pieces = (length + step - 1) // step
    cdef T p
    for i in range((t.c1 - t.c0) * 2 * WIDE):
        acc[i] = 0
    for n in range(t.n0, t.n1):
        for c in range(t.c0, t.c1):
            p = <T> shift[c]
            for piece in range(pieces):
                m = min(step, length - piece * step)
                i = c * job.S + t.s0 + piece * step
                if job.reduce == SUMS:
                    sums(x + n * job.x_row + i, m, p, acc + (c - t.c0) * 2 * WIDE)
                else:
                    dots(dy + n * job.dy_row + i, x + n * job.x_row + i, m, p,
                         acc + (c - t.c0) * 2 * WIDE)
    for c in range(t.c0, t.c1):
        out1[c] = across(acc + (c - t.c0) * 2 * WIDE)
        out2[c] = across(acc + (c - t.c0) * 2 * WIDE + WIDE)


cdef void reduce_rows(
    const T* x,
    const T* dy,
    const Job* job,
    const Tile* t,
    const double* shift,
    double* out1,
    double* out2,
) noexcept nogil:
    cdef T p[TILE]
    cdef T a[TILE]
    cdef T b[TILE]
    cdef Py_ssize_t c, i, m = t.c1 - t.c0, w = m * job.S, at = t.c0 * job.S
    cdef Py_ssize_t step = rows_in_sum(job), rows = (t.n1 - t.n0) // step
    cdef const T* from_x = x + t.n0 * job.x_row + at
    cdef const T* from_dy = dy + t.n0 * job.dy_row + at
    for c in range(m):
        a[c] = <T> shift[t.c0 + c]
        out1[t.c0 + c] = 0
        out2[t.c0 + c] = 0
    spread(a, m, job.S, p)
    repeat(p, w, step)
    for i in range(w * step):
        a[i] = 0
        b[i] = 0
    for i in range(rows // FLUSH):
        reduce_some(from_x, from_dy, job, i * FLUSH * step, FLUSH, step, w * step, p, a, b)
        gather(a, m, job.S, step, out1 + t.c0)
        gather(b, m, job.S, step, out2 + t.c0)
    i = rows - rows % FLUSH
    reduce_some(from_x, from_dy, job, i * step, rows % FLUSH, step, w * step, p, a, b)
    i = rows * step
    reduce_some(from_x, from_dy, job, i, 1, 1, w * (t.n1 - t.n0 - i), p, a, b)
    gather(a, m, job.S, step, out1 + t.c0)
    gather(b, m, job.S, step, out2 + t.c0)


cdef inline Py_ssize_t rows_in_sum(const Job* job) noexcept nogil:
    """Rows that are summed as one row: with few channels, channels-last, vectors stay full."""
    return SUM_ROW // job.C if job.S == 1 and 2 * job.C <= SUM_ROW else 1


cdef inline void reduce_some(
    const T* x, const T* dy, const Job* job,
    Py_ssize_t n, Py_ssize_t rows, Py_ssize_t step, Py_ssize_t w,
    const T* p, T* a, T* b,
) noexcept nogil:
    """Add rows n, n + step, ... to the column sums."""
    if job.reduce == SUMS:
        col_sums(x + n * job.x_row, step * job.x_row, rows, w, p, a, b)
    else:
        col_dots(dy + n * job.dy_row, step * job.dy_row, x + n * job.x_row, step * job.x_row,
                 rows, w, p, a, b)


cdef void reduce_tile(
    const T* x, const T* dy, const Job* job, const Tile* t, Py_ssize_t chunk
) noexcept nogil:
    cdef double* out1 = job.sums + 2 * chunk * job.C
    cdef double* shift = job.pivot if job.reduce == SUMS else <double*> job.mean.data
    if job.S >= RUN_MIN:
        reduce_runs(x, dy, job, t, shift, out1, out1 + job.C)
    else:
        reduce_rows(x, dy, job, t, shift, out1, out1 + job.C)


cdef void find_pivot(const T* x, const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Mean of SAMPLES values spread evenly over each channel, rounded to T."""
    cdef Py_ssize_t c, i, at, M = job.N * job.S
    for c in range(c0, c1):
        job.pivot[c] = 0
    for i in range(SAMPLES):
        at = (M // SAMPLES) * i + (M % SAMPLES) * i // SAMPLES
        at = (at // job.S) * job.x_row + at % job.S
        for c in range(c0, c1):
            job.pivot[c] += x[at + c * job.S] * (1.0 / SAMPLES)
    for c in range(c0, c1):
        job.pivot[c] = <T> job.pivot[c]


# ---- finish ------------------------------------------------------------------------------

cdef void sum_again(
    const T* x, const Job* job, Py_ssize_t c, double shift, double* s1, double* s2
) noexcept nogil:
    """Sums of x - shift and its square in float64, for the channels that need it."""
    cdef double a[WIDE]
    cdef double b[WIDE]
    cdef double d
    cdef Py_ssize_t n, s, j, full = job.S - job.S % WIDE
    cdef const T* run
    for j in range(WIDE):
        a[j] = 0
        b[j] = 0
    for n in range(job.N):
        run = x + n * job.x_row + c * job.S
        for s in range(full // WIDE):
            for j in range(WIDE):
                d = run[s * WIDE + j] - shift
                a[j] += d
                b[j] += d * d
        for j in range(job.S - full):
            d = run[full + j] - shift
            a[j] += d
            b[j] += d * d
    s1[0] = across(a)
    s2[0] = across(b)


cdef void finish_sums(const T* x, const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Turn the sums about the pivot into mean and m2."""
    cdef double* out1 = job.sums
    cdef double* out2 = job.sums + job.C
    cdef double M = <double> job.N * <double> job.S
    cdef double tiny = M * (1e-30 if T is float else 1e-290)
    cdef double s1, s2, shift, m2
    cdef Py_ssize_t c
    for c in range(c0, c1):
        s1 = out1[c]
        s2 = out2[c]
        shift = s1 / M
        m2 = s2 - s1 * shift
        if (s1 != 0 or s2 != 0) and not (tiny <= m2 < INFINITY and s1 * shift <= 4 * m2):
            sum_again(x, job, c, 0, &s1, &s2)
            job.pivot[c] = s1 / M
            sum_again(x, job, c, job.pivot[c], &s1, &s2)
            shift = s1 / M
            m2 = s2 - s1 * shift
            m2 = 0 if m2 < 0 else m2
        out1[c] = job.pivot[c] + shift
        out2[c] = m2


cdef void finish_dots(const Job* job, Py_ssize_t c0, Py_ssize_t c1, T like) noexcept nogil:
    """Turn the sums about hi into dbeta and dgamma."""
    cdef const double* mean = <const double*> job.mean.data
    cdef const double* var = <const double*> job.var.data
    cdef double* dbeta = job.sums
    cdef double* dgamma = job.sums + job.C
    cdef Py_ssize_t c
    for c in range(c0, c1):
        dgamma[c] = (dgamma[c] - (mean[c] - <T> mean[c]) * dbeta[c]) / sqrt(
            var[c] / job.count + job.eps)


cdef void finish_block(const T* x, const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    cdef Py_ssize_t k, c
    cdef double* part
    for k in range(1, job.chunk_rows * job.chunk_cols):
        part = job.sums + 2 * k * job.C
        for c in range(c0, c1):
            job.sums[c] += part[c]
            job.sums[job.C + c] += part[job.C + c]
    if job.reduce == SUMS:
        finish_sums(x, job, c0, c1)
    elif job.reduce == DOTS:
        finish_dots(job, c0, c1, x[0])


# ---- apply -------------------------------------------------------------------------------

cdef inline void load(
    Vector v, Py_ssize_t c, Py_ssize_t n, double absent, double* restrict out
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


cdef void scale_coefficients(
    const Job* job, Py_ssize_t c0, Py_ssize_t c1, T* hi, T* a, T* b
) noexcept nogil:
    """y = (x - mean) * gamma / sqrt(var + eps) + beta, as (x - hi) * a + b."""
    cdef double mean[VECTOR]
    cdef double r[VECTOR]
    cdef double beta[VECTOR]
    cdef double gamma[VECTOR]
    cdef Py_ssize_t c, i, n, v
    for v in range((c1 - c0 + VECTOR - 1) // VECTOR):
        c = c0 + v * VECTOR
        n = min(VECTOR, c1 - c)
        load(job.mean, c, n, 0, mean)
        load(job.var, c, n, 0, r)
        load(job.gamma, c, n, 1, gamma)
        load(job.beta, c, n, 0, beta)
        for i in range(n):
            r[i] = gamma[i] / sqrt(r[i] / job.count + job.eps)
            hi[c - c0 + i] = <T> mean[i]
            a[c - c0 + i] = <T> r[i]
            b[c - c0 + i] = <T> (beta[i] - r[i] * (mean[i] - <T> mean[i]))
    if job.apply == SCALE_DY:
        for i in range(c1 - c0):
            hi[i] = 0
            b[i] = 0


cdef void unscale_coefficients(
    const Job* job, Py_ssize_t c0, Py_ssize_t c1, T* hi, T* a, T* k, T* b
) noexcept nogil:
    """dx = r gamma (dy - dbeta / M - xhat dgamma / M), as dy * a + (x - hi) * k + b."""
    cdef double mean[VECTOR]
    cdef double r[VECTOR]
    cdef double gamma[VECTOR]
    cdef double M = <double> job.N * <double> job.S, g
    cdef Py_ssize_t c, i, n, v
    for v in range((c1 - c0 + VECTOR - 1) // VECTOR):
        c = c0 + v * VECTOR
        n = min(VECTOR, c1 - c)
        load(job.mean, c, n, 0, mean)
        load(job.var, c, n, 0, r)
        load(job.gamma, c, n, 1, gamma)
        for i in range(n):
            r[i] = 1 / sqrt(r[i] / job.count + job.eps)
            gamma[i] = gamma[i] * r[i]
            g = -gamma[i] * r[i] * job.sums[job.C + c + i] / M
            hi[c - c0 + i] = <T> mean[i]
            a[c - c0 + i] = <T> gamma[i]
            k[c - c0 + i] = <T> g
            b[c - c0 + i] = <T> (-gamma[i] * job.sums[c + i] / M - g * (mean[i] - <T> mean[i]))


cdef void apply_tile(
    const T* x, const T* dy, T* y, const Job* job, const Tile* t
) noexcept nogil:
    cdef T hi[TILE]
    cdef T a[TILE]
    cdef T k[TILE]
    cdef T b[TILE]
    cdef T narrow[TILE]
    cdef Py_ssize_t m = t.c1 - t.c0
    if job.apply == UNSCALE:
        unscale_coefficients(job, t.c0, t.c1, hi, a, k, b)
    else:
        scale_coefficients(job, t.c0, t.c1, hi, a, b)
    if job.S >= RUN_MIN:
        apply_runs(x, dy, y, job, t, hi, a, k, b)
    else:
        if job.S > 1:
            widen(hi, m, job.S, narrow)
            widen(a, m, job.S, narrow)
            widen(b, m, job.S, narrow)
            if job.apply == UNSCALE:
                widen(k, m, job.S, narrow)
        apply_rows(x, dy, y, job, t, hi, a, k, b)
    if job.stream:
        stream_end()


cdef inline void widen(T* v, Py_ssize_t m, Py_ssize_t s, T* scratch) noexcept nogil:
    """Spread the first m values of v over m * s columns, in place."""
    cdef Py_ssize_t c
    for c in range(m):
        scratch[c] = v[c]
    spread(scratch, m, s, v)


cdef void apply_runs(
    const T* x, const T* dy, T* y, const Job* job, const Tile* t,
    T* hi, T* a, T* k, T* b,
) noexcept nogil:
    cdef T buffer[PIECE]
    cdef T* to
    cdef Py_ssize_t n, c, i, s, m, at
    for n in range(t.n1 - 1, t.n0 - 1, -1):
        for c in range(t.c0, t.c1):
            i = c - t.c0
            s = t.s0
            while s < t.s1:
                at = c * job.S + s
                to = y + n * job.y_row + at
                m = PIECE
                if job.stream:  # the next piece starts on a line
                    m -= (<size_t> to & 63) // sizeof(T)
                m = min(m, t.s1 - s)
                if job.stream:
                    to = &buffer[0]
                if job.apply == SCALE:
                    scale(x + n * job.x_row + at, to, m, hi[i], a[i], b[i])
                elif job.apply == SCALE_DY:
                    scale(dy + n * job.dy_row + at, to, m, hi[i], a[i], b[i])
                else:
                    unscale(dy + n * job.dy_row + at, x + n * job.x_row + at, to, m,
                            hi[i], a[i], k[i], b[i])
                if job.stream:
                    stream(y + n * job.y_row + at, buffer, m * sizeof(T))
                s += m


cdef void apply_rows(
    const T* x, const T* dy, T* y, const Job* job, const Tile* t,
    T* hi, T* a, T* k, T* b,
) noexcept nogil:
    cdef T buffer[TILE]
    cdef T* to
    cdef Py_ssize_t g, n, m, w = (t.c1 - t.c0) * job.S, at = t.c0 * job.S
    cdef Py_ssize_t step = rows_at_once(job, w, t.n1 - t.n0)
    cdef Py_ssize_t group = max(1, GROUP // (w * step)) * step
    if step > 1:
        repeat(hi, w, step)
        repeat(a, w, step)
        repeat(b, w, step)
        if job.apply == UNSCALE:
            repeat(k, w, step)
    for g in range((t.n1 - t.n0 - 1) // group, -1, -1):
        n = t.n0 + g * group
        while n < min(t.n0 + (g + 1) * group, t.n1):
            m = w * min(step, t.n1 - n)
            to = &buffer[0] if job.stream else y + n * job.y_row + at
            if job.apply == SCALE:
                col_scale(x + n * job.x_row + at, to, m, hi, a, b)
            elif job.apply == SCALE_DY:
                col_scale(dy + n * job.dy_row + at, to, m, hi, a, b)
            else:
                col_unscale(dy + n * job.dy_row + at, x + n * job.x_row + at, to, m, hi, a, k, b)
            if job.stream:
                stream(y + n * job.y_row + at, buffer, m * sizeof(T))
            n += step


cdef inline Py_ssize_t rows_at_once(
    const Job* job, Py_ssize_t w, Py_ssize_t rows
) noexcept nogil:
    """Rows that can be taken as one: where each starts at the end of the one before."""
    if w != job.x_row or w != job.y_row or (job.apply != SCALE and w != job.dy_row):
        return 1
    return max(1, min(APPLY_ROW // w, rows))


# ---- who does what -----------------------------------------------------------------------

cdef inline Tile tile(
    const Job* job, Py_ssize_t block, Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t i
) noexcept nogil:
    """Tile i of rows x cols of a block of channels."""
    cdef Tile t
    cdef Py_ssize_t row = i // cols, col = i % cols
    t.c0 = block * job.block
    t.c1 = min(t.c0 + job.block, job.C)
    t.n0 = row * job.N // rows
    t.n1 = (row + 1) * job.N // rows
    t.s0 = col * job.S // cols
    t.s1 = (col + 1) * job.S // cols
    return t


cdef void own_block(
    const T* x, const T* dy, T* y, const Job* job, Py_ssize_t block
) noexcept nogil:
    """All three steps for one block of channels."""
    cdef Tile t
    cdef Py_ssize_t k
    t = tile(job, block, 1, 1, 0)
    if job.reduce != NO_SUMS:
        if job.reduce == SUMS:
            find_pivot(x, job, t.c0, t.c1)
        for k in range(job.chunk_rows * job.chunk_cols):
            t = tile(job, block, job.chunk_rows, job.chunk_cols, k)
            reduce_tile(x, dy, job, &t, k)
        finish_block(x, job, t.c0, t.c1)
    if job.apply != NO_WRITE:
        t = tile(job, block, 1, 1, 0)
        apply_tile(x, dy, y, job, &t)


cdef void share_reduce(
    const T* x, const T* dy, const Job* job, Py_ssize_t i
) noexcept nogil:
    cdef Tile t
    t = tile(job, i % job.blocks, job.chunk_rows, job.chunk_cols, i // job.blocks)
    reduce_tile(x, dy, job, &t, i // job.blocks)


cdef void share_pivot(const T* x, const Job* job, Py_ssize_t block) noexcept nogil:
    cdef Tile t
    t = tile(job, block, 1, 1, 0)
    find_pivot(x, job, t.c0, t.c1)


cdef void share_finish(const T* x, const Job* job, Py_ssize_t block) noexcept nogil:
    cdef Tile t
    t = tile(job, block, 1, 1, 0)
    finish_block(x, job, t.c0, t.c1)


cdef void share_apply(
    const T* x, const T* dy, T* y, const Job* job, Py_ssize_t i
) noexcept nogil:
    cdef Tile t
    t = tile(job, i % job.blocks, job.apply_rows, job.apply_cols, i // job.blocks)
    apply_tile(x, dy, y, job, &t)


cdef void plan(
    const T* x, const T* dy, T* y, Job* job, Py_ssize_t chunks, int threads
) noexcept nogil:
    """Cut the work into chunks, which decide the bits, and blocks, which do not."""
    cdef Py_ssize_t tensors = 2 if job.reduce == DOTS else 1
    cdef Py_ssize_t fit = 2 * l2_bytes // (job.N * job.S * sizeof(T) * tensors)
    cdef Py_ssize_t touched = (tensors + 1) * job.N * job.C * job.S * sizeof(T)
    job.stream = touched > l3_bytes and y != x and y != dy
    if job.N * job.C * job.S < SERIAL:
        threads = 1
    job.chunk_rows = min(job.N, chunks)
    job.chunk_cols = chunks // job.chunk_rows
    job.owned = chunks == 1 or (job.S > 1 and (threads == 1 or job.C >= 4 * threads))
    if job.S >= RUN_MIN:
        job.block = max(1, min(fit, BLOCK))
    elif job.owned:
        job.block = min(max(fit, 64 // job.S), TILE // job.S)
    else:
        job.block = TILE // job.S
    if job.owned:
        job.block = max(1, min(job.block, (job.C + threads - 1) // threads))
    if rows_in_sum(job) > 1:  # several rows as one: only whole rows will do
        job.block = job.C
    job.block = max(1, min(job.block, job.C))
    job.blocks = (job.C + job.block - 1) // job.block
    if job.S == 1:
        job.apply_rows = max(1, min(job.N // 64, 4 * threads))
        job.apply_cols = 1
    else:
        job.apply_rows = job.chunk_rows
        job.apply_cols = job.chunk_cols
    job.threads = threads


cdef void run(
    const T* x, const T* dy, T* y, Job* job, Py_ssize_t chunks, int threads
) noexcept nogil:
    cdef Py_ssize_t i, tasks
    cdef int nt
    plan(x, dy, y, job, chunks, threads)
    nt = job.threads
    if job.owned and nt == 1:
        for i in range(job.blocks):
            own_block(x, dy, y, job, i)
        return
    if job.owned:
        for i in prange(job.blocks, schedule="dynamic", num_threads=nt):
            own_block(x, dy, y, job, i)
        return
    if job.reduce == SUMS:
        for i in prange(job.blocks, schedule="static", num_threads=nt, use_threads_if=nt > 1):
            share_pivot(x, job, i)
    if job.reduce != NO_SUMS:
        tasks = job.blocks * job.chunk_rows * job.chunk_cols
        for i in prange(tasks, schedule="dynamic", num_threads=nt, use_threads_if=nt > 1):
            share_reduce(x, dy, job, i)
        for i in prange(job.blocks, schedule="static", num_threads=nt, use_threads_if=nt > 1):
            share_finish(x, job, i)
    if job.apply != NO_WRITE:
        tasks = job.blocks * job.apply_rows * job.apply_cols
        for i in prange(tasks, schedule="dynamic", num_threads=nt, use_threads_if=nt > 1):
            share_apply(x, dy, y, job, tasks - 1 - i)


# ---- entries -----------------------------------------------------------------------------

ctypedef fused P:           # the parameters' type
    float
    double


cdef inline Vector vector(const P* data) noexcept nogil:
    cdef Vector v
    v.data = data
    v.wide = P is double
    return v


cdef inline Vector optional(const P[::1] values):
    cdef Vector v
    if values is None:
        v.data = NULL
        v.wide = False
        return v
    return vector(&values[0])


cdef inline Job new_job(Reduce reduce, Apply apply, double eps) noexcept:
    cdef Job job
    job.reduce = reduce
    job.apply = apply
    job.x_row = job.dy_row = job.y_row = 0
    job.mean.data = job.var.data = job.gamma.data = job.beta.data = NULL
    job.mean.wide = job.var.wide = job.gamma.wide = job.beta.wide = True
    job.count = 1
    job.eps = eps
    job.sums = job.pivot = NULL
    return job


cdef inline Job job_on(const T[:, :, :] x, Reduce reduce, Apply apply, double eps):
    cdef Job job = new_job(reduce, apply, eps)
    job.N, job.C, job.S = x.shape[0], x.shape[1], x.shape[2]
    job.x_row = x.strides[0] // sizeof(T)
    return job


cdef inline void use_work(Job* job, double[:, ::1] work):
    job.sums = &work[0, 0]
    job.pivot = &work[work.shape[0] - 1, 0]


def statistics(
    const T[:, :, :] x,       # IN  (N, C, S)
    double[:, ::1] work,        # OUT (2 * chunks + 1, C): mean and m2 in rows 0 and 1
    int threads,
):
    cdef Job job = job_on(x, SUMS, NO_WRITE, 0)
    use_work(&job, work)
    with nogil:
        run(&x[0, 0, 0], <const T*> NULL, <T*> NULL, &job, work.shape[0] // 2, threads)


def forward(
    const T[:, :, :] x,       # IN  (N, C, S)
    T[:, :, :] y,             # OUT (N, C, S), may be x
    const P[::1] gamma,         # IN  (C,) or None
    const P[::1] beta,          # IN  (C,) or None
    double[:, ::1] work,        # OUT (2 * chunks + 1, C): mean and m2 in rows 0 and 1
    double eps,
    int threads,
):
    cdef Job job = job_on(x, SUMS, SCALE, eps)
    job.y_row = y.strides[0] // sizeof(T)
    job.gamma = optional(gamma)
    job.beta = optional(beta)
    job.count = <double> job.N * <double> job.S
    use_work(&job, work)
    job.mean.data = job.sums
    job.var.data = job.sums + job.C
    with nogil:
        run(&x[0, 0, 0], <const T*> NULL, &y[0, 0, 0], &job, work.shape[0] // 2, threads)


def inference(
    const T[:, :, :] x,       # IN  (N, C, S)
    T[:, :, :] y,             # OUT (N, C, S), may be x
    const P[::1] mean,          # IN  (C,)
    const P[::1] var,           # IN  (C,)
    const P[::1] gamma,         # IN  (C,) or None
    const P[::1] beta,          # IN  (C,) or None
    Py_ssize_t chunks,
    double eps,
    int threads,
):
    cdef Job job = job_on(x, NO_SUMS, SCALE, eps)
    job.y_row = y.strides[0] // sizeof(T)
    job.mean = vector(&mean[0])
    job.var = vector(&var[0])
    job.gamma = optional(gamma)
    job.beta = optional(beta)
    with nogil:
        run(&x[0, 0, 0], <const T*> NULL, &y[0, 0, 0], &job, chunks, threads)


def backward(
    const T[:, :, :] dy,      # IN  (N, C, S)
    const T[:, :, :] x,       # IN  (N, C, S)
    T[:, :, :] dx,            # OUT (N, C, S), may be dy or x
    const double[::1] mean,     # IN  (C,)
    const double[::1] var,      # IN  (C,) m2 where the statistics are those of x
    const P[::1] gamma,         # IN  (C,) or None
    double[:, ::1] work,        # OUT (2 * chunks + 1, C): dbeta and dgamma in rows 0 and 1
    double eps,
    bint through_statistics,
    int threads,
):
    cdef Job job = job_on(x, DOTS, UNSCALE if through_statistics else SCALE_DY, eps)
    job.dy_row = dy.strides[0] // sizeof(T)
    job.y_row = dx.strides[0] // sizeof(T)
    job.mean = vector(&mean[0])
    job.var = vector(&var[0])
    job.gamma = optional(gamma)
    if through_statistics:
        job.count = <double> job.N * <double> job.S
    use_work(&job, work)
    with nogil:
        run(&x[0, 0, 0], &dy[0, 0, 0], &dx[0, 0, 0], &job, work.shape[0] // 2, threads)


include "small.pxi"
