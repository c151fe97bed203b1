# cython: language_level=3
# cython: cdivision=True
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
# Channels-last, the same values lie as x[n, s, c]: a row is then K columns of its sample, and the
# loops are those of batch normalization down columns (row_last.pxi).
#
#   pass             reads             writes      bytes an element (float32)
#   reduce, forward  x                 -           4
#   apply, forward   x                 y           8; 4 where x comes from cache
#   reduce, backward dy, x             -           8
#   apply, backward  dy, x             dx          12; 4 where dy and x come from cache
#
# a. Two forms. From S = RUNS or DOTS on, a channel's stretch is a run, with coefficients in
#    registers (runs.pxd). Shorter ones are columns: gamma and beta are vectors along the row, and
#    a tile of columns is taken through a block of rows, so that they are loaded and spread once.
# b. Blocks. The passes follow each other block by block, so the second look comes from L2. A block
#    of runs is neighbouring groups of one sample, which lie in one piece; a block of columns is
#    one group of several samples, which share gamma and beta.
# c. Slots. A row is summed in segments, each of which leaves its sums in a slot; they are added in
#    order. Backward and runs: a slot, or several, per channel, which give dgamma, dbeta and,
#    weighted with gamma, the two sums of the row.
# d. dgamma and dbeta are added up in float64 per chunk of N; those of columns in lanes of T first,
#    which collect the rows of one block. The caller adds the chunks in order.
#    Owned: a thread takes a chunk of N of some groups through all passes. Shared: with few and long
#    rows, each pass is a parallel loop over slots or tiles. Both do the same sums in the same
#    order: bits depend on the shape alone.
# e. Results go to a buffer in L1 first where they are to be streamed past the caches, or written
#    over an input: so the loops know that nothing overlaps, and stay vectors.
# f. Half types are storage: widened piece by piece as they are read, rounded once as they are
#    written (storage.pxi). All else is that of float32, gamma and beta too.

from cython.parallel cimport prange
from libc.math cimport INFINITY, sqrt
from libc.stdint cimport uint16_t
from libc.string cimport memcpy

from cybn._kernels.check cimport check
from cybn._kernels.columns cimport (
    row_scale, row_unscale, turned_dots, turned_sums, weighted_dots)
from cybn._kernels.half cimport BFLOAT16, FLOAT16, NATIVE, Storage, narrow, widen
from cybn._kernels.rows cimport (
    FLUSH, TILE, col_dots, col_scale, col_sums, col_unscale, gather, repeat, spread)
from cybn._kernels.runs cimport (
    LANES, PIECE, T, WIDE, across, dots_of, scale, sums_of, unscale, wide_sums)
from cybn._kernels.stream cimport stream, stream_end
from cybn._kernels.strips cimport (
    SCALE_ROW, SCALE_RUN, UNSCALE_ROW, UNSCALE_RUN, Terms, strips)

cdef enum:
    RUNS = 64               # shortest S for which runs beat columns, forward
    DOTS = 128              # the same, backward
    BLOCK = 32              # most rows of a block: LANES
    SHORT = 32              # values of a row up to which rows are turned: those of a lane
    FEWEST = 8              # rows of a block of long columns, if there are as many
    CHUNK = 32768           # values of a block of rows, and least of a chunk of N
    CHUNKS = 64             # most chunks of N, for about 1 KiB a channel
    SEGMENT = 65536         # values of a segment, about
    STRIP = 16384           # values of a run, or of several, that a thread takes at once
    SERIAL = 65536          # values below which one thread is faster than two
    SAMPLES = 8             # values whose mean is the pivot
    POSITIONS = 64          # channels-last, of a cut, at least
    SUM_ROW = 64            # channels-last, columns that several positions are summed as

cdef struct Job:
    bint backward
    bint centred            # RMS normalization is not: its mean is 0 by definition
    bint last               # channels-last; slots are those of runs
    bint runs
    bint turned             # columns of so few values that lanes are rows
    bint stream             # y goes past the caches
    bint buffered           # y is computed in L1 before it goes anywhere
    Storage storage         # of x, dy and y
    Py_ssize_t item         # bytes of an element of those
    Py_ssize_t N, G, K, S, D
    Py_ssize_t x_row, dy_row, y_row     # bytes from one n to the next
    Py_ssize_t slots        # sums of a row
    Py_ssize_t cuts         # slots of a channel of runs, backward; else of a row
    Py_ssize_t apart        # rows of a sample that are summed each by itself: G; 1 channels-last
    Py_ssize_t shared       # steps in which they are: slots; cuts channels-last
    Py_ssize_t tile         # values of a row that apply takes at once, whole channels of columns;
    # positions channels-last
    Py_ssize_t tiles        # of a row
    Py_ssize_t samples, groups  # of a block
    Py_ssize_t pivot[SAMPLES]   # places in a row of the values whose mean is the pivot
    Py_ssize_t chunks       # of N
    Py_ssize_t spans        # of G: blocks of groups
    int threads
    double eps
    double share            # of a value in the mean of a row
    const double* mean      # (N * G,)
    const double* m2        # (N * G,) sum of squares about the mean
    double* sums            # (N * G * slots, 2): of the row in its first slot, at the end
    double* parts           # (chunks, 2, G * K) sums for dgamma and dbeta

cdef struct Span:           # rows of samples n0..n1 and groups g0..g1
    Py_ssize_t n0, n1, g0, g1

cdef struct Row:            # what apply has to know of a row
    double hi, lo, r        # mean = hi + lo, and one over the standard deviation
    double c1, c2           # mean of dz, and of dz * xhat, where dz = dy * gamma

cdef struct Line:           # of a channel: (x - hi) * a + b, or dy * a + (x - hi) * k + b
    double a, k, b

# What Python has to know of these numbers.
SMALL = SERIAL

cdef Py_ssize_t l3_bytes = 32 << 20


def set_caches(Py_ssize_t l2, Py_ssize_t l3):
    """Set the bytes of the last level of cache. Speed depends on it, results do not."""
    global l3_bytes
    l3_bytes = l3


def count(
    Py_ssize_t N, Py_ssize_t G, Py_ssize_t D, Py_ssize_t S, bint backward, bint last
):
    """Return how many slots a row has, and in how many chunks N is cut."""
    cdef Job job = new_job(N, G, D, S, backward, last)
    return job.slots, job.chunks


cdef inline Py_ssize_t ceiling(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef Job new_job(
    Py_ssize_t N, Py_ssize_t G, Py_ssize_t D, Py_ssize_t S, bint backward, bint last
) noexcept nogil:
    """Cut the rows; of the shape alone, as the bits depend on it."""
    cdef Job job
    cdef Py_ssize_t i
    job.backward = backward
    job.N, job.G, job.K, job.S, job.D = N, G, D // S, S, D
    job.last = last
    job.runs = last or S >= (DOTS if backward else RUNS)
    job.turned = not job.runs and D <= SHORT
    job.share = 1.0 / D
    job.samples = job.groups = 1
    if last:
        job.tile = max(POSITIONS, SEGMENT // (G * job.K))
        job.groups = G
        job.chunks = N * G * D // CHUNK
    elif job.runs:
        job.tile = STRIP
        job.groups = max(1, min(BLOCK, CHUNK // D))
        job.chunks = N * G * D // CHUNK
    else:
        job.tile = TILE // S * S
        job.samples = max(FEWEST, min(BLOCK, CHUNK // D))
        job.chunks = N * D // CHUNK
    job.chunks = max(1, min(CHUNKS, min(N, job.chunks)))
    job.spans = ceiling(G, job.groups)
    job.tiles = ceiling(S if last else D, job.tile)
    job.cuts = job.slots = ceiling(D, SEGMENT)
    if last:
        job.cuts = max(1, min(CHUNKS, min(S // POSITIONS, G * D // SEGMENT)))
        job.slots = job.K * job.cuts
    elif job.runs and backward:
        job.cuts = ceiling(S, SEGMENT)
        job.slots = job.K * job.cuts
    job.apart = 1 if last else G
    job.shared = job.cuts if last else job.slots
    for i in range(SAMPLES):
        job.pivot[i] = (D // SAMPLES) * i + (D % SAMPLES) * i // SAMPLES + D // (2 * SAMPLES)
    return job


include "storage.pxi"
include "row_reduce.pxi"
include "row_turned.pxi"
include "row_apply.pxi"
include "row_last.pxi"


# ---- who does what -----------------------------------------------------------------------

cdef inline Span span_of(const Job* job, Py_ssize_t i) noexcept nogil:
    """Span i: a chunk of N of some groups."""
    cdef Py_ssize_t chunk = i // job.spans
    cdef Span s
    s.n0 = chunk * job.N // job.chunks
    s.n1 = (chunk + 1) * job.N // job.chunks
    s.g0 = i % job.spans * job.groups
    s.g1 = min(s.g0 + job.groups, job.G)
    return s


cdef inline double* parts_of(const Job* job, Py_ssize_t i) noexcept nogil:
    """Sums for dgamma of the chunk of span i, (C,); those for dbeta follow."""
    return job.parts + i // job.spans * 2 * job.G * job.K


cdef void clear(const Job* job, const Span* s, double* parts) noexcept nogil:
    """Zero the sums for dgamma and dbeta of some groups."""
    cdef Py_ssize_t c, C = job.G * job.K
    if job.backward:
        for c in range(s.g0 * job.K, s.g1 * job.K):
            parts[c] = 0
            parts[C + c] = 0


cdef void own(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta, const Job* job, Py_ssize_t i
) noexcept nogil:
    """All passes over a span, block by block."""
    cdef Span all = span_of(job, i), s = all
    cdef double* parts = parts_of(job, i)
    clear(job, &s, parts)
    while s.n0 < all.n1:
        s.n1 = min(s.n0 + job.samples, all.n1)
        reduce(x, dy, gamma, job, &s, 0, job.shared)
        finish(x, gamma, job, &s, parts)
        apply(x, dy, y, gamma, beta, job, &s, parts, 0, job.tiles)
        s.n0 = s.n1


cdef void share_reduce(
    const T* x, const T* dy, const T* gamma, const Job* job, Py_ssize_t shares, Py_ssize_t i
) noexcept nogil:
    """Share i of the sums of all rows."""
    cdef Py_ssize_t row = i // shares, k = i % shares, groups = job.G // job.apart
    cdef Span s
    s.n0, s.g0 = row // job.apart, row % job.apart * groups
    s.n1, s.g1 = s.n0 + 1, s.g0 + groups
    reduce(x, dy, gamma, job, &s, k * job.shared // shares, (k + 1) * job.shared // shares)


cdef void share_finish(const T* x, const T* gamma, const Job* job, Py_ssize_t i) noexcept nogil:
    cdef Span s = span_of(job, i)
    clear(job, &s, parts_of(job, i))
    finish(x, gamma, job, &s, parts_of(job, i))


cdef void share_apply(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta, const Job* job, Py_ssize_t i
) noexcept nogil:
    """One tile of all rows of a span."""
    cdef Py_ssize_t t = i % job.tiles
    cdef Span all = span_of(job, i // job.tiles), s = all
    while s.n0 < all.n1:
        s.n1 = min(s.n0 + job.samples, all.n1)
        apply(x, dy, y, gamma, beta, job, &s, parts_of(job, i // job.tiles), t, t + 1)
        s.n0 = s.n1


cdef void run(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta, Job* job, int threads
) noexcept nogil:
    cdef Py_ssize_t i, tasks = job.chunks * job.spans
    cdef Py_ssize_t values = job.N * job.G * job.D
    cdef Py_ssize_t touched = (3 if job.backward else 2) * values * job.item
    cdef Py_ssize_t grain = max(1, SERIAL // 4 * tasks // values)
    cdef Py_ssize_t size = job.G // job.apart * job.D   # of what is summed by itself
    cdef Py_ssize_t shares = min(job.shared, ceiling(size, STRIP))
    cdef int nt = threads if values >= SERIAL else 1
    cdef bint in_place = y == x or y == dy
    job.stream = not in_place and touched > l3_bytes and job.storage == NATIVE
    job.buffered = job.stream or in_place and job.storage == NATIVE
    if nt == 1:
        for i in range(tasks):
            own(x, dy, y, gamma, beta, job, i)
        return
    if tasks >= 4 * nt or size <= CHUNK:
        for i in prange(tasks, schedule="dynamic", chunksize=grain, num_threads=nt):
            own(x, dy, y, gamma, beta, job, i)
        return
    for i in prange(job.N * job.apart * shares, schedule="dynamic", num_threads=nt):
        share_reduce(x, dy, gamma, job, shares, i)
    for i in prange(tasks, schedule="static", num_threads=nt):
        share_finish(x, gamma, job, i)
    for i in prange(tasks * job.tiles, schedule="dynamic", num_threads=nt):
        share_apply(x, dy, y, gamma, beta, job, tasks * job.tiles - 1 - i)


# ---- entries -----------------------------------------------------------------------------

ctypedef fused E:           # an element in storage: float32, float64, or a half type
    float
    double
    uint16_t

ctypedef fused P:           # what is computed in: float64 for float64, float32 for the others
    float
    double

STORAGE = {"e": FLOAT16, "E": BFLOAT16}     # by dtype.char


cdef inline void set_storage(Job* job, const E[:, :, :] x, Storage storage):
    job.storage = storage
    job.item = sizeof(E)
    job.x_row = x.strides[0]


cdef inline void start(
    const E* x, const E* dy, E* y, const P* gamma, const P* beta, Job* job, int threads
) noexcept nogil:
    """Run in the type of gamma and beta, which E decides."""
    if E is double:
        run(x, dy, y, <const double*> gamma, <const double*> beta, job, threads)
    else:
        run(<const float*> x, <const float*> dy, <float*> y,
            <const float*> gamma, <const float*> beta, job, threads)


def forward(
    const E[:, :, :] x,         # IN  (N, G, D) or (N, S, C), the last two axes dense
    E[:, :, :] y,               # OUT (N, G, D), likewise; may be x
    const P[::1] gamma,         # IN  (C,)
    const P[::1] beta,          # IN  (C,)
    double[:, ::1] statistics,  # OUT (2, N * G): mean and m2
    double[::1] scratch,        # OUT (N * G * slots * 2,)
    Py_ssize_t G,
    Py_ssize_t S,
    bint last,                  # channels-last
    double eps,
    bint centred,
    Storage storage,
    int threads,
):
    cdef Job job = new_job(x.shape[0], G, x.shape[1] * x.shape[2] // G, S, False, last)
    job.centred = centred
    job.eps = eps
    set_storage(&job, x, storage)
    job.y_row, job.dy_row = y.strides[0], 0
    job.mean, job.m2, job.sums = &statistics[0, 0], &statistics[1, 0], &scratch[0]
    job.parts = NULL
    with nogil:
        start(&x[0, 0, 0], &x[0, 0, 0], &y[0, 0, 0], &gamma[0], &beta[0], &job, threads)


def backward(
    const E[:, :, :] dy,        # IN  (N, G, D) or (N, S, C), the last two axes dense
    const E[:, :, :] x,         # IN  (N, G, D), likewise
    E[:, :, :] dx,              # OUT (N, G, D), likewise; may be dy or x
    const P[::1] gamma,         # IN  (C,)
    const double[::1] mean,     # IN  (N * G,)
    const double[::1] m2,       # IN  (N * G,)
    double[::1] scratch,        # OUT (N * G * slots * 2,)
    double[:, :, ::1] parts,    # OUT (chunks, 2, C): to be added up, dgamma and dbeta
    Py_ssize_t G,
    Py_ssize_t S,
    bint last,                  # channels-last
    double eps,
    bint centred,
    Storage storage,
    int threads,
):
    cdef Job job = new_job(x.shape[0], G, x.shape[1] * x.shape[2] // G, S, True, last)
    job.centred = centred
    job.eps = eps
    set_storage(&job, x, storage)
    job.dy_row, job.y_row = dy.strides[0], dx.strides[0]
    job.mean, job.m2, job.sums, job.parts = &mean[0], &m2[0], &scratch[0], &parts[0, 0, 0]
    with nogil:
        start(&x[0, 0, 0], &dy[0, 0, 0], &dx[0, 0, 0], &gamma[0], <const P*> NULL, &job, threads)


include "row_small.pxi"
