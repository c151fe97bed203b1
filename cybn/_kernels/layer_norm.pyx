# cython: language_level=3
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# Layer, RMS, group and instance normalization: statistics of rows that lie in one piece.
#
# N = samples, G = groups of a sample, K = channels of a group, S = positions of a channel.
# A row is the D = K * S neighbouring values x[n, g, :], which share one mean and variance; its
# gamma and beta are those of channels g * K to (g + 1) * K, each for S neighbours.
#
#   member           G    K    S
#   layer, RMS       1    D    1
#   group            G    C/G  positions
#   instance         C    1    positions
#
#   pass             reads             writes      bytes an element (float32)
#   reduce, forward  x                 -           4
#   apply, forward   x                 y           8; 4 where x comes from cache
#   reduce, backward dy, x             -           8
#   apply, backward  dy, x             dx          12; 4 where dy and x come from cache
#
# a. Two forms. From S = RUN_MIN on, a channel's stretch is a run, with coefficients in registers
#    (runs.pxd). Shorter ones are columns: gamma and beta are vectors along the row, and a tile
#    of columns is taken through a block of rows, so that they are loaded and spread once a block.
# b. Segments. A row is summed in segments, and these are added in order. Forward and columns: a
#    mean per row. Backward and runs: dots per channel, which give dgamma, dbeta and, weighted
#    with gamma, the two sums of the row.
# c. Columns of dgamma and dbeta: lanes of T collect the rows of one block, at most BLOCK, then go
#    to the float64 sums of their chunk of N. The caller adds the chunks in order.
# d. Owned. A thread takes a chunk of N of one group through all passes, block by block: rows of
#    a block fit L2. Shared. With few and long rows, each pass is a parallel loop over segments
#    or tiles. Both do the same sums in the same order: bits depend on the shape alone.
# e. Results go to a buffer in L1 first where they are to be streamed past the caches, or written
#    over an input: so the loops know that nothing overlaps, and stay vectors.

from cython.parallel cimport prange
from libc.math cimport INFINITY, sqrt
from libc.string cimport memcpy

from cybn._kernels.columns cimport row_scale, row_unscale, weighted_dots
from cybn._kernels.rows cimport TILE, gather, spread
from cybn._kernels.runs cimport PIECE, RUN_MIN, T, WIDE, across, dots, scale, sums, unscale, wide_sums
from cybn._kernels.stream cimport stream, stream_end

cdef enum:
    BLOCK = 32              # most rows of a block
    FEWEST = 8              # rows of a block of long rows, if there are as many
    CHUNK = 32768           # values of a block of rows, and least of a chunk of N
    CHUNKS = 64             # most chunks of N, for about 1 KiB a channel
    SEGMENT = 65536         # values of a segment, about
    SERIAL = 65536          # values below which one thread is faster than two
    SAMPLES = 8             # values whose mean is the pivot

cdef struct Job:
    bint backward
    bint centred            # RMS normalization is not: its mean is 0 by definition
    bint runs
    bint owned
    bint stream             # y goes past the caches
    bint in_place           # y is x or dy
    Py_ssize_t N, G, K, S, D
    Py_ssize_t x_row, dy_row, y_row     # elements from one n to the next
    Py_ssize_t cuts         # segments of a run, or of a row of columns
    Py_ssize_t segments     # of a row
    Py_ssize_t tile         # columns of a tile: whole channels
    Py_ssize_t tiles        # of a row: what apply does at once. Runs: segments
    Py_ssize_t block        # rows of a block
    Py_ssize_t chunks       # of N
    int threads
    double eps
    const double* mean      # (N * G,)
    const double* m2        # (N * G,) sum of squares about the mean
    double* sums            # (N * G * segments, 2): of the row in its first segment, at the end
    double* parts           # (chunks, 2, G * K) sums for dgamma and dbeta

cdef struct Span:           # rows n0..n1 of group g
    Py_ssize_t n0, n1, g

cdef struct Row:            # what apply has to know of a row
    double hi, lo, r        # mean = hi + lo, and one over the standard deviation
    double c1, c2           # mean of dz, and of dz * xhat, where dz = dy * gamma

cdef Py_ssize_t l3_bytes = 32 << 20


def set_caches(Py_ssize_t l2, Py_ssize_t l3):
    """Set the bytes of the last level of cache. Speed depends on it, results do not."""
    global l3_bytes
    l3_bytes = l3


def scratch(Py_ssize_t N, Py_ssize_t G, Py_ssize_t D, Py_ssize_t S):
    """Return how many segments a row has, and in how many chunks N is cut."""
    cdef Job job = new_job(N, G, D, S)
    return job.segments, job.chunks


cdef Job new_job(Py_ssize_t N, Py_ssize_t G, Py_ssize_t D, Py_ssize_t S) noexcept nogil:
    """Cut the rows; of the shape alone, as the bits depend on it."""
    cdef Job job
    job.N, job.G, job.K, job.S, job.D = N, G, D // S, S, D
    job.runs = S >= RUN_MIN
    if job.runs:
        job.tile = S
        job.cuts = (S + SEGMENT - 1) // SEGMENT
        job.segments = job.tiles = job.K * job.cuts
        job.block = 1
        job.chunks = N
    else:
        job.tile = TILE // S * S
        job.tiles = (D + job.tile - 1) // job.tile
        job.cuts = job.segments = (D + SEGMENT - 1) // SEGMENT
        job.block = max(FEWEST, min(BLOCK, CHUNK // D))
        job.chunks = max(1, min(CHUNKS, min(N, N * D // CHUNK)))
    return job


# ---- reduce ------------------------------------------------------------------------------

cdef inline T find_pivot(const T* x, const Job* job) noexcept nogil:
    """Mean of SAMPLES values spread evenly over a row, rounded to T; 0 where it is not centred.

    Added in a tree: the sum of eight equal values is then exact, and so is their mean.
    """
    cdef double v[SAMPLES]
    cdef Py_ssize_t i, D = job.D
    if not job.centred:
        return 0
    for i in range(SAMPLES):
        v[i] = x[(D // SAMPLES) * i + (D % SAMPLES) * i // SAMPLES + D // (2 * SAMPLES)]
    return <T> (0.125 * (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))))


cdef void reduce_run(
    const T* x, const T* dy, const Job* job, T shift, Py_ssize_t i, double* out
) noexcept nogil:
    """Sums of segment i of a row of runs."""
    cdef double acc[2 * WIDE]
    cdef Py_ssize_t at, end, j
    segment_of_run(job, i, &at, &end)
    for j in range(2 * WIDE):
        acc[j] = 0
    while at < end:
        if job.backward:
            dots(dy + at, x + at, min(PIECE, end - at), shift, acc)
        else:
            sums(x + at, min(PIECE, end - at), shift, acc)
        at += PIECE
    out[0] = across(acc)
    out[1] = across(acc + WIDE)


cdef inline void segment_of_run(
    const Job* job, Py_ssize_t i, Py_ssize_t* start, Py_ssize_t* end
) noexcept nogil:
    """Where segment i lies in its row: nearly equal parts of a run, in whole pieces."""
    cdef Py_ssize_t run = i // job.cuts * job.S
    cdef Py_ssize_t length = (job.S + job.cuts - 1) // job.cuts
    length = (length + PIECE - 1) // PIECE * PIECE
    start[0] = run + i % job.cuts * length
    end[0] = min(start[0] + length, run + job.S)


cdef void reduce_columns(
    const T* x, const T* dy, const T* gamma, const Job* job, const Span* s,
    const T* shift, Py_ssize_t i,
) noexcept nogil:
    """Sums of segment i of some rows, which share their gamma."""
    cdef double acc[BLOCK * 2 * WIDE]
    cdef T room[TILE]
    cdef const T* weight = room
    cdef Py_ssize_t n, t, j, m, at
    cdef double* out
    for j in range((s.n1 - s.n0) * 2 * WIDE):
        acc[j] = 0
    for t in range(i * job.tiles // job.cuts, (i + 1) * job.tiles // job.cuts):
        at = t * job.tile
        m = min(job.tile, job.D - at)
        if job.backward:
            weight = spread_tile(gamma, job, s.g, t, room)
        at += s.g * job.D
        for n in range(s.n0, s.n1):
            j = n - s.n0
            if job.backward:
                weighted_dots(dy + n * job.dy_row + at, x + n * job.x_row + at, weight, m,
                              shift[j], acc + j * 2 * WIDE)
            else:
                sums(x + n * job.x_row + at, m, shift[j], acc + j * 2 * WIDE)
    for n in range(s.n0, s.n1):
        out = job.sums + ((n * job.G + s.g) * job.segments + i) * 2
        out[0] = across(acc + (n - s.n0) * 2 * WIDE)
        out[1] = across(acc + (n - s.n0) * 2 * WIDE + WIDE)


cdef inline const T* spread_tile(
    const T* v, const Job* job, Py_ssize_t g, Py_ssize_t t, T* room
) noexcept nogil:
    """The values of tile t, one a column: in place where that is one a channel, else in room."""
    cdef Py_ssize_t at = t * job.tile
    if job.S == 1:
        return v + g * job.D + at
    spread(v + g * job.K + at // job.S, min(job.tile, job.D - at) // job.S, job.S, room)
    return room


cdef void reduce(
    const T* x, const T* dy, const T* gamma, const Job* job, const Span* s, Py_ssize_t i
) noexcept nogil:
    """Sums of segment i of each row."""
    cdef T shift[BLOCK]
    cdef Py_ssize_t n, row
    for n in range(s.n0, s.n1):
        if job.backward:
            shift[n - s.n0] = <T> job.mean[n * job.G + s.g]
        else:
            shift[n - s.n0] = find_pivot(x + n * job.x_row + s.g * job.D, job)
    if job.runs:
        for n in range(s.n0, s.n1):
            row = s.g * job.D
            reduce_run(x + n * job.x_row + row, dy + n * job.dy_row + row, job, shift[n - s.n0], i,
                       job.sums + ((n * job.G + s.g) * job.segments + i) * 2)
    else:
        reduce_columns(x, dy, gamma, job, s, shift, i)


# ---- finish ------------------------------------------------------------------------------

cdef void sum_again(
    const T* x, Py_ssize_t D, double shift, double* s1, double* s2
) noexcept nogil:
    """Sums of x - shift and its square in float64, for the rows that need it."""
    cdef double acc[2 * WIDE]
    cdef Py_ssize_t j
    for j in range(2 * WIDE):
        acc[j] = 0
    wide_sums(x, D, shift, acc)
    s1[0] = across(acc)
    s2[0] = across(acc + WIDE)


cdef void finish_forward(const T* x, const Job* job, Py_ssize_t row) noexcept nogil:
    """Turn the sums about the pivot into mean and m2 (docs/math.md, 6.2)."""
    cdef double tiny = job.D * (1e-30 if T is float else 1e-290)
    cdef double pivot = find_pivot(x, job), s1 = 0, s2 = 0, shift, m2
    cdef const double* part = job.sums + row * job.segments * 2
    cdef Py_ssize_t i
    for i in range(job.segments):
        s1 += part[2 * i]
        s2 += part[2 * i + 1]
    if not job.centred:
        s1 = 0
    shift = s1 / job.D
    m2 = s2 - s1 * shift
    if (s1 != 0 or s2 != 0) and not (tiny <= m2 < INFINITY and s1 * shift <= 4 * m2):
        if job.centred:
            sum_again(x, job.D, 0, &s1, &s2)
            pivot = s1 / job.D
        sum_again(x, job.D, pivot, &s1, &s2)
        shift = s1 / job.D if job.centred else 0
        m2 = s2 - s1 * shift
        m2 = 0 if m2 < 0 else m2
    (<double*> job.mean)[row] = pivot + shift
    (<double*> job.m2)[row] = m2


cdef inline double rstd(const Job* job, Py_ssize_t row) noexcept nogil:
    return 1 / sqrt(job.m2[row] / job.D + job.eps)


cdef void finish_backward(const T* gamma, const Job* job, Py_ssize_t n, Py_ssize_t g) noexcept nogil:
    """Add the segments up: to the sums of the row; of runs, to those of each channel before."""
    cdef Py_ssize_t row = n * job.G + g, C = job.G * job.K, c, i
    cdef double mean = job.mean[row], r = rstd(job, row)
    cdef double lo = mean - <T> mean
    cdef double* part = job.sums + row * job.segments * 2
    cdef double* dgamma = job.parts + n * 2 * C + g * job.K
    cdef double* dbeta = dgamma + C
    cdef double s1, s2, total1 = 0, total2 = 0
    for c in range(job.segments // job.cuts):
        s1 = s2 = 0
        for i in range(c * job.cuts, (c + 1) * job.cuts):
            s1 += part[2 * i]
            s2 += part[2 * i + 1]
        s2 = (s2 - lo * s1) * r
        if job.runs:
            dgamma[c] = s2
            dbeta[c] = s1
            s1 *= gamma[g * job.K + c]
            s2 *= gamma[g * job.K + c]
        total1 += s1
        total2 += s2
    part[0] = total1
    part[1] = total2


cdef void finish(const T* x, const T* gamma, const Job* job, const Span* s) noexcept nogil:
    cdef Py_ssize_t n
    for n in range(s.n0, s.n1):
        if job.backward:
            finish_backward(gamma, job, n, s.g)
        else:
            finish_forward(x + n * job.x_row + s.g * job.D, job, n * job.G + s.g)


# ---- apply -------------------------------------------------------------------------------

cdef inline Row of_row(const Job* job, Py_ssize_t row, T of_type) noexcept nogil:
    """The coefficients of a row; `of_type` only says which T."""
    cdef Row c
    cdef const double* total = job.sums + row * job.segments * 2
    c.hi = <T> job.mean[row]
    c.lo = job.mean[row] - c.hi
    c.r = rstd(job, row)
    c.c1 = total[0] / job.D if job.backward and job.centred else 0
    c.c2 = total[1] / job.D if job.backward else 0
    return c


cdef inline void put(T* y, const T* buffer, Py_ssize_t n, const Job* job) noexcept nogil:
    """Bring results from the buffer to where they go."""
    if job.stream:
        stream(y, buffer, n * sizeof(T))
    else:
        memcpy(y, buffer, n * sizeof(T))


cdef void apply_run(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta,
    const Job* job, const Span* s, const Row* row, Py_ssize_t i,
) noexcept nogil:
    """y or dx of segment i of a row of runs."""
    cdef T buffer[PIECE]
    cdef T* to
    cdef Py_ssize_t at, end, m, channel = s.g * job.K + i // job.cuts
    cdef double a = gamma[channel] * row.r, k = -row.r * row.r * row.c2, b
    if job.backward:
        b = -row.r * row.c1 - k * row.lo
    else:
        b = beta[channel] - a * row.lo if row.lo != 0 else beta[channel]
    segment_of_run(job, i, &at, &end)
    while at < end:
        m = PIECE
        if job.stream:  # the next piece starts on a line
            m -= (<size_t> (y + at) & 63) // sizeof(T)
        m = min(m, end - at)
        to = &buffer[0] if job.stream or job.in_place else y + at
        if job.backward:
            unscale(dy + at, x + at, to, m, <T> row.hi, <T> a, <T> k, <T> b)
        else:
            scale(x + at, to, m, <T> row.hi, <T> a, <T> b)
        if to == &buffer[0]:
            put(y + at, buffer, m, job)
        at += m


cdef void apply_columns(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta,
    const Job* job, const Span* s, const Row* rows, Py_ssize_t t, double* dgamma, double* dbeta,
) noexcept nogil:
    """y, or dx and the sums for dgamma and dbeta, of tile t of some rows."""
    cdef T room_gamma[TILE]
    cdef T room_beta[TILE]
    cdef T a[TILE]
    cdef T b[TILE]
    cdef T buffer[TILE]
    cdef T* to
    cdef const Row* row
    cdef Py_ssize_t n, j, at = s.g * job.D + t * job.tile, c = t * job.tile // job.S
    cdef Py_ssize_t m = min(job.tile, job.D - t * job.tile)
    cdef const T* scales = spread_tile(gamma, job, s.g, t, room_gamma)
    cdef const T* shifts = NULL
    if job.backward:
        for j in range(m):
            a[j] = 0
            b[j] = 0
    else:
        shifts = spread_tile(beta, job, s.g, t, room_beta)
    for n in range(s.n0, s.n1):
        row = rows + n - s.n0
        to = &buffer[0] if job.stream or job.in_place else y + n * job.y_row + at
        if job.backward:
            row_unscale(dy + n * job.dy_row + at, x + n * job.x_row + at, scales, to, m,
                        <T> row.hi, <T> row.lo, <T> row.r, <T> row.c1, <T> row.c2, a, b)
        else:
            row_scale(x + n * job.x_row + at, scales, shifts, to, m,
                      <T> row.hi, <T> row.lo, <T> row.r)
        if to == &buffer[0]:
            put(y + n * job.y_row + at, buffer, m, job)
    if job.backward:
        gather(a, m // job.S, job.S, 1, dgamma + c)
        gather(b, m // job.S, job.S, 1, dbeta + c)


cdef void apply(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta,
    const Job* job, const Span* s, Py_ssize_t chunk, Py_ssize_t t0, Py_ssize_t t1,
) noexcept nogil:
    """y or dx of tiles t0..t1 of some rows of a chunk, last tile first: reduce ended there."""
    cdef Row rows[BLOCK]
    cdef Py_ssize_t n, t, at = s.n0 * job.y_row + s.g * job.D
    cdef double* dgamma = job.parts + chunk * 2 * job.G * job.K + s.g * job.K
    for n in range(s.n0, s.n1):
        rows[n - s.n0] = of_row(job, n * job.G + s.g, <T> 0)
    for t in range(t1 - 1, t0 - 1, -1):
        if job.runs:
            apply_run(x + s.n0 * job.x_row + s.g * job.D, dy + s.n0 * job.dy_row + s.g * job.D,
                      y + at, gamma, beta, job, s, rows, t)
        else:
            apply_columns(x, dy, y, gamma, beta, job, s, rows, t, dgamma,
                          dgamma + job.G * job.K)
    if job.stream:
        stream_end()


# ---- who does what -----------------------------------------------------------------------

cdef inline Span chunk_of(const Job* job, Py_ssize_t chunk, Py_ssize_t g) noexcept nogil:
    cdef Span s
    s.n0 = chunk * job.N // job.chunks
    s.n1 = (chunk + 1) * job.N // job.chunks
    s.g = g
    return s


cdef void clear(const Job* job, Py_ssize_t chunk, Py_ssize_t g, Py_ssize_t t0, Py_ssize_t t1) noexcept nogil:
    """Zero the sums of a chunk for dgamma and dbeta that its columns are added to."""
    cdef Py_ssize_t C = job.G * job.K, c
    cdef double* part = job.parts + chunk * 2 * C + g * job.K
    if job.backward and not job.runs:
        for c in range(t0 * job.tile // job.S, min(job.K, t1 * job.tile // job.S)):
            part[c] = 0
            part[C + c] = 0


cdef void own(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta, const Job* job, Py_ssize_t i
) noexcept nogil:
    """All passes over a chunk of one group, block by block."""
    cdef Py_ssize_t chunk = i // job.G, k
    cdef Span all = chunk_of(job, chunk, i % job.G), s = all
    clear(job, chunk, s.g, 0, job.tiles)
    while s.n0 < all.n1:
        s.n1 = min(s.n0 + job.block, all.n1)
        for k in range(job.segments):
            reduce(x, dy, gamma, job, &s, k)
        finish(x, gamma, job, &s)
        apply(x, dy, y, gamma, beta, job, &s, chunk, 0, job.tiles)
        s.n0 = s.n1


cdef void share_reduce(
    const T* x, const T* dy, const T* gamma, const Job* job, Py_ssize_t i
) noexcept nogil:
    cdef Span s
    s.n0 = i // (job.G * job.segments)
    s.n1 = s.n0 + 1
    s.g = i // job.segments % job.G
    reduce(x, dy, gamma, job, &s, i % job.segments)


cdef void share_finish(const T* x, const T* gamma, const Job* job, Py_ssize_t row) noexcept nogil:
    cdef Span s
    s.n0, s.n1, s.g = row // job.G, row // job.G + 1, row % job.G
    finish(x, gamma, job, &s)


cdef void share_apply(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta, const Job* job, Py_ssize_t i
) noexcept nogil:
    cdef Py_ssize_t t = i % job.tiles, chunk = i // job.tiles // job.G
    cdef Span all = chunk_of(job, chunk, i // job.tiles % job.G), s = all
    clear(job, chunk, s.g, t, t + 1)
    while s.n0 < all.n1:
        s.n1 = min(s.n0 + job.block, all.n1)
        apply(x, dy, y, gamma, beta, job, &s, chunk, t, t + 1)
        s.n0 = s.n1


cdef void run(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta, Job* job, int threads
) noexcept nogil:
    cdef Py_ssize_t i, tasks = job.chunks * job.G
    cdef Py_ssize_t values = job.N * job.G * job.D
    cdef Py_ssize_t grain = max(1, SERIAL // 4 * tasks // values)
    cdef int nt = threads if values >= SERIAL else 1
    job.in_place = y == x or y == dy
    job.stream = (
        not job.in_place and (3 if job.backward else 2) * values * sizeof(T) > l3_bytes)
    job.owned = nt == 1 or tasks >= 4 * nt or job.D <= CHUNK
    if job.owned:
        for i in prange(tasks, schedule="dynamic", chunksize=grain, num_threads=nt,
                        use_threads_if=nt > 1):
            own(x, dy, y, gamma, beta, job, i)
        return
    for i in prange(job.N * job.G * job.segments, schedule="dynamic", num_threads=nt):
        share_reduce(x, dy, gamma, job, i)
    for i in prange(job.N * job.G, schedule="static", num_threads=nt):
        share_finish(x, gamma, job, i)
    tasks = tasks * job.tiles
    for i in prange(tasks, schedule="dynamic", num_threads=nt):
        share_apply(x, dy, y, gamma, beta, job, tasks - 1 - i)


# ---- entries -----------------------------------------------------------------------------

def forward(
    const T[:, :, :] x,         # IN  (N, G, D), the last two axes dense
    T[:, :, :] y,               # OUT (N, G, D), likewise; may be x
    const T[::1] gamma,         # IN  (C,)
    const T[::1] beta,          # IN  (C,)
    double[:, ::1] statistics,  # OUT (2, N * G): mean and m2
    double[::1] sums,           # OUT (N * G * segments * 2,)
    Py_ssize_t S,
    double eps,
    bint centred,
    int threads,
):
    cdef Job job = new_job(x.shape[0], x.shape[1], x.shape[2], S)
    job.backward = False
    job.centred = centred
    job.eps = eps
    job.x_row, job.y_row, job.dy_row = x.strides[0] // sizeof(T), y.strides[0] // sizeof(T), 0
    job.mean, job.m2, job.sums = &statistics[0, 0], &statistics[1, 0], &sums[0]
    job.parts = NULL
    with nogil:
        run(&x[0, 0, 0], <const T*> NULL, &y[0, 0, 0], &gamma[0], &beta[0], &job, threads)


def backward(
    const T[:, :, :] dy,        # IN  (N, G, D), the last two axes dense
    const T[:, :, :] x,         # IN  (N, G, D), likewise
    T[:, :, :] dx,              # OUT (N, G, D), likewise; may be dy or x
    const T[::1] gamma,         # IN  (C,)
    const double[::1] mean,     # IN  (N * G,)
    const double[::1] m2,       # IN  (N * G,)
    double[::1] sums,           # OUT (N * G * segments * 2,)
    double[:, :, ::1] parts,    # OUT (chunks, 2, C): to be added up, dgamma and dbeta
    Py_ssize_t S,
    double eps,
    bint centred,
    int threads,
):
    cdef Job job = new_job(x.shape[0], x.shape[1], x.shape[2], S)
    job.backward = True
    job.centred = centred
    job.eps = eps
    job.x_row, job.dy_row = x.strides[0] // sizeof(T), dy.strides[0] // sizeof(T)
    job.y_row = dx.strides[0] // sizeof(T)
    job.mean, job.m2, job.sums, job.parts = &mean[0], &m2[0], &sums[0], &parts[0, 0, 0]
    with nogil:
        run(&x[0, 0, 0], &dy[0, 0, 0], &dx[0, 0, 0], &gamma[0], <const T*> NULL, &job, threads)
