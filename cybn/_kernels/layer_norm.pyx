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
# f. Half types are storage: widened piece by piece as they are read, rounded once as they are
#    written (storage.pxi). All else is that of float32, gamma and beta too.

from cython.parallel cimport prange
from libc.math cimport INFINITY, sqrt
from libc.stdint cimport uint16_t
from libc.string cimport memcpy

from cybn._kernels.check cimport check
from cybn._kernels.columns cimport row_scale, row_unscale, weighted_dots
from cybn._kernels.half cimport BFLOAT16, FLOAT16, NATIVE, Storage, narrow, widen
from cybn._kernels.rows cimport TILE, gather, spread
from cybn._kernels.runs cimport (
    PIECE, RUN_MIN, T, WIDE, across, dots, scale, sums, unscale, wide_sums)
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
    bint buffered           # y is computed in L1 before it goes anywhere
    Storage storage         # of x, dy and y
    Py_ssize_t item         # bytes of an element of those
    Py_ssize_t N, G, K, S, D
    Py_ssize_t x_row, dy_row, y_row     # bytes from one n to the next
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


def count(Py_ssize_t N, Py_ssize_t G, Py_ssize_t D, Py_ssize_t S):
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


include "storage.pxi"
include "row_reduce.pxi"
include "row_apply.pxi"


# ---- who does what -----------------------------------------------------------------------

cdef inline Span chunk_of(const Job* job, Py_ssize_t chunk, Py_ssize_t g) noexcept nogil:
    cdef Span s
    s.n0 = chunk * job.N // job.chunks
    s.n1 = (chunk + 1) * job.N // job.chunks
    s.g = g
    return s


cdef void clear(
    const Job* job, Py_ssize_t chunk, Py_ssize_t g, Py_ssize_t t0, Py_ssize_t t1
) noexcept nogil:
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
    cdef Py_ssize_t touched = (3 if job.backward else 2) * values * job.item
    cdef bint in_place = y == x or y == dy
    job.stream = not in_place and touched > l3_bytes
    job.buffered = job.stream or in_place or job.storage != NATIVE
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
    const E[:, :, :] x,         # IN  (N, G, D), the last two axes dense
    E[:, :, :] y,               # OUT (N, G, D), likewise; may be x
    const P[::1] gamma,         # IN  (C,)
    const P[::1] beta,          # IN  (C,)
    double[:, ::1] statistics,  # OUT (2, N * G): mean and m2
    double[::1] scratch,        # OUT (N * G * segments * 2,)
    Py_ssize_t S,
    double eps,
    bint centred,
    Storage storage,
    int threads,
):
    cdef Job job = new_job(x.shape[0], x.shape[1], x.shape[2], S)
    job.backward = False
    job.centred = centred
    job.eps = eps
    set_storage(&job, x, storage)
    job.y_row, job.dy_row = y.strides[0], 0
    job.mean, job.m2, job.sums = &statistics[0, 0], &statistics[1, 0], &scratch[0]
    job.parts = NULL
    with nogil:
        start(&x[0, 0, 0], &x[0, 0, 0], &y[0, 0, 0], &gamma[0], &beta[0], &job, threads)


def backward(
    const E[:, :, :] dy,        # IN  (N, G, D), the last two axes dense
    const E[:, :, :] x,         # IN  (N, G, D), likewise
    E[:, :, :] dx,              # OUT (N, G, D), likewise; may be dy or x
    const P[::1] gamma,         # IN  (C,)
    const double[::1] mean,     # IN  (N * G,)
    const double[::1] m2,       # IN  (N * G,)
    double[::1] scratch,        # OUT (N * G * segments * 2,)
    double[:, :, ::1] parts,    # OUT (chunks, 2, C): to be added up, dgamma and dbeta
    Py_ssize_t S,
    double eps,
    bint centred,
    Storage storage,
    int threads,
):
    cdef Job job = new_job(x.shape[0], x.shape[1], x.shape[2], S)
    job.backward = True
    job.centred = centred
    job.eps = eps
    set_storage(&job, x, storage)
    job.dy_row, job.y_row = dy.strides[0], dx.strides[0]
    job.mean, job.m2, job.sums, job.parts = &mean[0], &m2[0], &scratch[0], &parts[0, 0, 0]
    with nogil:
        start(&x[0, 0, 0], &dy[0, 0, 0], &dx[0, 0, 0], &gamma[0], <const P*> NULL, &job, threads)
