# cython: language_level=3
# cython: cdivision=True
# Batch normalization in three steps over tiles: reduce, finish, apply.
#
# N = everything before the channel axis, C = channels, S = everything after it.
#
#   operation            reduce            finish             apply
#   statistics           sums of x         mean, m2           -
#   forward              sums of x         mean, m2           y  = f((x - hi) * a + b + residual)
#   inference            -                 -                  y  = f((x - hi) * a + b + residual)
#   backward             dots of g, x      dbeta, dgamma      dx = g * a + (x - hi) * k + b
#   inference_backward   dots of g, x      dbeta, dgamma      dx = g * a
#
# f is the activation, z what it is given, and g = dy f'(z), with z computed again from x.
#
# a. Bytes. float32 forward reads x, reads it again, writes y: 12 bytes an element from memory,
#    8 where the second look at x finds it in cache. Backward: 20 or 12. Inference: 8. A residual
#    adds 4 forward; backward, reduce reads it and writes its gradient, which apply then reads in
#    place of dy: 28 or 20. Half types: half of all of that.
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
# f. Composition. Half types, activations and residuals are stages on pieces in L1 (stages.pxi);
#    no loop is written twice for any of them. Jobs with stages take narrower tiles of rows.
# g. hi + lo. The mean is split into hi, rounded to T, and the rest lo, which goes into b: the
#    error of y does not grow with |mean| / std.

from cython.parallel cimport prange
from libc.math cimport INFINITY, sqrt
from libc.stdint cimport uint16_t
from libc.string cimport memcpy, memset

from cybn._kernels.activate cimport (
    IDENTITY, LEAKY_RELU, RELU, RELU6, SIGMOID, SILU, TANH, Activation, activate, add, chain,
    invert)
from cybn._kernels.check cimport check
from cybn._kernels.half cimport BFLOAT16, FLOAT16, NATIVE, Storage, narrow, widen
from cybn._kernels.pairs cimport (
    col_dot_pairs, col_scale_pairs, col_sum_pairs, col_unscale_pairs, dot_pairs, scale_pairs,
    sum_pairs, unscale_pairs, unzip, zip_up)
from cybn._kernels.rows cimport (
    BROAD, FLUSH, ROOM, TILE, col_dots, col_dots2, col_dots2_add, col_dots_add, col_scale,
    col_scale2, col_scale_add, col_sums, col_sums4, col_unscale, col_unscale2, gather, on_line,
    repeat, spread)
from cybn._kernels.runs cimport (
    LANES, PIECE, RUN_APPLY, RUN_MIN, T, WIDE, across, add_lanes, dots, dots_add, dots_of, flush,
    scale, scale_add, sums, sums_of, unscale)
from cybn._kernels.stream cimport stream, stream_end
from cybn._kernels.strips cimport (
    SCALE_COLUMNS, SCALE_RUN, UNSCALE_COLUMNS, UNSCALE_RUN, Terms, col_dot_strips,
    col_sum_strips, strips)

cdef enum:
    SAMPLES = 8             # values whose mean is the pivot
    BLOCK = 32              # most channels of a block of runs
    GROUP = 16384           # elements that apply walks upwards, between its steps downwards
    # Columns up to which several channels-last rows are taken as one, where they are dense. As
    # that sets the order of sums, rows of up to half of SUM_ROW must be dense (_layout.NARROW).
    SUM_ROW = 64
    APPLY_ROW = 256
    CHUNK = 65536           # values that one chunk of a channel has, about
    RUN_TO_ROWS = 32        # N below S / RUN_TO_ROWS is few rows
    MOST_CHUNKS = 64        # so partial sums take about 1 KiB a channel at most
    PART = 128              # channels that one thread finds the pivots of, or finishes, at a time
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
    Storage storage         # of x, dy, y, residual and dresidual
    Py_ssize_t item         # bytes of an element of those
    Activation activation
    double slope            # of leaky_relu
    double low, high        # what relu and relu6 clamp to; else infinite
    bint inverse            # x is y, which was written over it; mean is beta
    Py_ssize_t N, C, S
    Py_ssize_t x_row, dy_row, y_row     # bytes from one n to the next
    const void* residual
    Py_ssize_t residual_row
    void* dresidual
    Py_ssize_t dresidual_row
    Vector mean, var        # var is m2 where count is the number of values
    Vector gamma, beta
    double M                # values a channel, or the sum of their shares
    double count, eps       # count: what var is to be divided by
    const void* share       # (N, S) of T: how often each value counts; NULL: each once
    const Py_ssize_t* places    # (SAMPLES,) values that count, as n * S + s
    bint weighted           # shares are not just 0 and 1
    bint zeroed             # what does not count is 0 in y or dx
    double* sums            # (2 * chunks, C): of chunk k in rows 2k, 2k + 1; results in 0 and 1
    double* pivot           # (C,)
    Py_ssize_t chunk_rows, chunk_cols   # chunks of N, and of S
    Py_ssize_t apply_rows, apply_cols   # the same for apply, shared
    Py_ssize_t block, blocks            # channels a block, number of blocks
    int threads
    bint owned
    bint runs               # the loops of reduce are those of runs, not of rows
    bint apply_runs         # the same for apply
    bint gated              # the plain loops of backward go through relu
    bint added              # the plain loops of reduce add a residual and go through relu
    bint staged             # more than the plain loops is to be done
    bint paired_sums        # bfloat16 is widened and summed in one loop
    bint paired             # bfloat16 goes from x to y, or from dy and x to dx, in one loop
    bint strip_sums         # float16 likewise
    bint strips             # float16 likewise
    bint stream             # y goes past the caches
    bint buffered           # y is computed in L1 before it goes anywhere

cdef struct Tile:           # channels c0..c1 of rows n0..n1, columns s0..s1
    Py_ssize_t c0, c1, n0, n1, s0, s1

# What Python has to know of these numbers.
SMALL = SERIAL
NARROW = SUM_ROW // 2


cdef inline Py_ssize_t chunks_of(Py_ssize_t n, Py_ssize_t c, Py_ssize_t s) noexcept nogil:
    """In how many chunks a channel is summed: of the shape alone, as the bits depend on it.

    Channels-last (S = 1) is cut by rows for the sake of all C channels at once; else a channel is
    cut by rows of N, and where N has too few of those, along S as well.
    """
    cdef Py_ssize_t chunks, rows
    if s == 1:
        return max(1, min(MOST_CHUNKS, min(n * c // CHUNK, n // 64)))
    chunks = max(1, min(MOST_CHUNKS, n * s // CHUNK))
    rows = min(n, chunks)
    return rows * max(1, chunks // rows)


def count_chunks(Py_ssize_t n, Py_ssize_t c, Py_ssize_t s):
    """In how many chunks each channel of (n, c, s) is summed."""
    return chunks_of(n, c, s)


cdef Py_ssize_t l2_bytes = 512 << 10
cdef Py_ssize_t l3_bytes = 32 << 20


def set_caches(Py_ssize_t l2, Py_ssize_t l3):
    """Set the bytes of a core's L2 and of the last level. Speed depends on them, results do not."""
    global l2_bytes, l3_bytes
    l2_bytes = l2
    l3_bytes = l3


include "storage.pxi"
include "masks.pxi"
include "stages.pxi"
include "reduce.pxi"
include "apply.pxi"


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
    check(0 <= t.c0 < t.c1 <= job.C and t.n0 < t.n1 <= job.N and t.s0 < t.s1 <= job.S)
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


cdef void share_pivot(const T* x, const Job* job, Py_ssize_t part) noexcept nogil:
    find_pivot(x, job, part * PART, min((part + 1) * PART, job.C))


cdef void share_finish(const T* x, const Job* job, Py_ssize_t part) noexcept nogil:
    finish_block(x, job, part * PART, min((part + 1) * PART, job.C))


cdef void share_apply(
    const T* x, const T* dy, T* y, const Job* job, Py_ssize_t i
) noexcept nogil:
    cdef Tile t
    t = tile(job, i % job.blocks, job.apply_rows, job.apply_cols, i // job.blocks)
    apply_tile(x, dy, y, job, &t)


cdef inline bint by_runs(const Job* job) noexcept nogil:
    """Whether a channel's values are taken as runs, each by itself, or in rows with others.

    Rows want sums and coefficients a column: with few of them that costs more than it saves. Of
    the shape alone, as the bits depend on it.
    """
    return job.S >= RUN_MIN or job.N * RUN_TO_ROWS <= job.S


cdef inline Py_ssize_t even_block(Py_ssize_t C, Py_ssize_t most) noexcept nogil:
    """Channels a block, at most `most`, so that blocks are about equal and of whole lines."""
    cdef Py_ssize_t blocks = (C + most - 1) // most
    return min(most, ((C + blocks - 1) // blocks + 15) // 16 * 16)


cdef void plan(
    const T* x, const T* dy, T* y, Job* job, Py_ssize_t chunks, int threads
) noexcept nogil:
    """Cut the work into chunks, which decide the bits, and blocks, which do not."""
    cdef Py_ssize_t tensors = 2 if job.reduce == DOTS else 1
    cdef Py_ssize_t fit = 2 * l2_bytes // (job.N * job.S * job.item * tensors)
    cdef Py_ssize_t touched = (tensors + 1) * job.N * job.C * job.S * job.item
    cdef Py_ssize_t columns
    cdef bint plain, fused_sums, fused, one_loop
    job.stream = touched > l3_bytes and y != x and y != dy and y != job.residual
    job.stream = job.stream and job.storage == NATIVE
    job.buffered = job.stream or job.storage != NATIVE
    job.gated = job.apply == UNSCALE and job.activation == RELU and job.residual == NULL
    job.gated = job.gated and job.share == NULL
    job.added = job.residual != NULL and job.activation == RELU and job.reduce == DOTS
    job.added = job.added and job.share == NULL and job.storage == NATIVE
    job.staged = job.storage != NATIVE or job.activation >= LEAKY_RELU or job.share != NULL
    job.buffered |= y == job.residual and job.staged
    if job.reduce == DOTS and not job.gated and not job.added:
        job.staged |= job.residual != NULL or job.activation != IDENTITY
    if job.storage != NATIVE:
        job.gated = False
    fused_sums = job.storage != NATIVE and job.share == NULL and job.reduce != NO_SUMS
    fused = job.storage != NATIVE and job.residual == NULL and job.activation < LEAKY_RELU
    fused = fused and not job.zeroed and job.apply != SCALE_DY
    if job.reduce == DOTS:
        plain = job.residual == NULL and job.activation == IDENTITY and job.share == NULL
        fused_sums = fused_sums and plain
        fused = fused and plain
    one_loop = fused and (fused_sums or job.reduce == NO_SUMS)
    job.paired_sums = fused_sums and job.storage == BFLOAT16
    job.paired = fused and job.storage == BFLOAT16
    job.strip_sums = fused_sums and job.storage == FLOAT16
    job.strips = fused and job.storage == FLOAT16
    columns = TILE // 2 if job.staged and not one_loop else TILE
    if job.S == 1 and not job.staged and job.item == 4 and chunks >= 4 * threads:
        columns = BROAD
    if job.N * job.C * job.S < SERIAL:
        threads = 1
    job.chunk_rows = min(job.N, chunks)
    job.chunk_cols = chunks // job.chunk_rows
    job.owned = chunks == 1 or (job.S > 1 and (threads == 1 or job.C >= 4 * threads))
    job.runs = by_runs(job)
    job.apply_runs = job.runs or (
        job.reduce == NO_SUMS and job.S >= RUN_APPLY and job.share == NULL)
    if job.apply_runs:
        job.block = max(1, min(fit, BLOCK))
    elif job.owned:
        job.block = min(max(fit, 64 // job.S), columns // job.S)
    else:
        job.block = columns // job.S
    if job.S == 1 and job.C > job.block:  # blocks of about one size, of whole cache lines
        job.block = even_block(job.C, job.block)
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
    check(job.chunk_rows * job.chunk_cols == chunks)  # as there is room for
    check(job.block <= BLOCK if job.apply_runs else job.block * job.S <= BROAD)


cdef void run(
    const T* x, const T* dy, T* y, Job* job, Py_ssize_t chunks, int threads
) noexcept nogil:
    cdef Py_ssize_t i, tasks, parts = (job.C + PART - 1) // PART
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
        for i in prange(parts, schedule="static", num_threads=nt, use_threads_if=nt > 1):
            share_pivot(x, job, i)
    if job.reduce != NO_SUMS:
        tasks = job.blocks * job.chunk_rows * job.chunk_cols
        for i in prange(tasks, schedule="dynamic", num_threads=nt, use_threads_if=nt > 1):
            share_reduce(x, dy, job, i)
        for i in prange(parts, schedule="static", num_threads=nt, use_threads_if=nt > 1):
            share_finish(x, job, i)
    if job.apply != NO_WRITE:
        tasks = job.blocks * job.apply_rows * job.apply_cols
        for i in prange(tasks, schedule="dynamic", num_threads=nt, use_threads_if=nt > 1):
            share_apply(x, dy, y, job, tasks - 1 - i)


# ---- entries -----------------------------------------------------------------------------

ctypedef fused E:           # an element in storage: float32, float64, or a half type
    float
    double
    uint16_t

ctypedef fused P:           # the parameters' type
    float
    double

# The numbers of what Python names; absent names are 0.
ACTIVATIONS = {
    "relu": RELU, "relu6": RELU6, "leaky_relu": LEAKY_RELU, "sigmoid": SIGMOID, "tanh": TANH,
    "silu": SILU}
STORAGE = {"e": FLOAT16, "E": BFLOAT16}     # by dtype.char


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
    memset(&job, 0, sizeof(job))
    job.reduce = reduce
    job.apply = apply
    job.mean.wide = job.var.wide = job.gamma.wide = job.beta.wide = True
    job.count = 1
    job.eps = eps
    set_activation(&job, IDENTITY, 0)
    return job


cdef inline void set_activation(Job* job, int activation, double slope) noexcept:
    job.activation = <Activation> activation
    job.slope = slope
    job.low = 0 if activation == RELU or activation == RELU6 else -INFINITY
    job.high = 6 if activation == RELU6 else INFINITY


cdef inline Job job_on(
    const E[:, :, :] x, Storage storage, Reduce reduce, Apply apply, double eps
):
    cdef Job job = new_job(reduce, apply, eps)
    job.storage = storage
    job.item = sizeof(E)
    job.N, job.C, job.S = x.shape[0], x.shape[1], x.shape[2]
    job.x_row = x.strides[0]
    job.M = <double> job.N * <double> job.S
    return job


cdef inline void use_work(Job* job, double[:, ::1] work):
    job.sums = &work[0, 0]
    job.pivot = &work[work.shape[0] - 1, 0]


cdef inline void set_share(
    Job* job, const unsigned char[::1] share, const Py_ssize_t[::1] places, double total,
    bint weighted, bint zeroed,
):
    if share is not None:
        job.share = &share[0]
        job.places = &places[0]
        job.M = total
        job.weighted = weighted
        job.zeroed = zeroed


cdef inline void start(
    const E* x, const E* dy, E* y, Job* job, Py_ssize_t chunks, int threads
) noexcept nogil:
    """Run in float64 for float64, in float32 for all that is narrower.

    Where there is no dy, x stands in for it: the loops move along both before they know.
    """
    if E is double:
        run(x, dy, y, job, chunks, threads)
    else:
        run(<const float*> x, <const float*> dy, <float*> y, job, chunks, threads)


def statistics(
    const E[:, :, :] x,         # IN  (N, C, S)
    double[:, ::1] work,        # OUT (2 * chunks + 1, C): mean and m2 in rows 0 and 1
    const unsigned char[::1] share,     # IN  bytes of (N, S) of T, or None
    const Py_ssize_t[::1] places,       # IN  (SAMPLES,) where share is not None
    double total,                       # the sum of the shares
    bint weighted,
    bint zeroed,
    Storage storage,
    int threads,
):
    cdef Job job = job_on(x, storage, SUMS, NO_WRITE, 0)
    use_work(&job, work)
    set_share(&job, share, places, total, weighted, zeroed)
    with nogil:
        start(&x[0, 0, 0], &x[0, 0, 0], <E*> NULL, &job, work.shape[0] // 2, threads)


def forward(
    const E[:, :, :] x,         # IN  (N, C, S)
    E[:, :, :] y,               # OUT (N, C, S), may be x
    const E[:, :, :] residual,  # IN  (N, C, S) or None, may be y
    const P[::1] gamma,         # IN  (C,) or None
    const P[::1] beta,          # IN  (C,) or None
    double[:, ::1] work,        # OUT (2 * chunks + 1, C): mean and m2 in rows 0 and 1
    double eps,
    int activation,
    double slope,
    const unsigned char[::1] share,     # IN  bytes of (N, S) of T, or None
    const Py_ssize_t[::1] places,       # IN  (SAMPLES,) where share is not None
    double total,                       # the sum of the shares
    bint weighted,
    bint zeroed,
    Storage storage,
    int threads,
):
    cdef Job job = job_on(x, storage, SUMS, SCALE, eps)
    job.y_row = y.strides[0]
    job.gamma = optional(gamma)
    job.beta = optional(beta)
    set_share(&job, share, places, total, weighted, zeroed)
    job.count = job.M
    use_work(&job, work)
    job.mean.data = job.sums
    job.var.data = job.sums + job.C
    set_activation(&job, activation, slope)
    set_residual(&job, residual)
    with nogil:
        start(&x[0, 0, 0], &x[0, 0, 0], &y[0, 0, 0], &job, work.shape[0] // 2, threads)


cdef inline void set_residual(Job* job, const E[:, :, :] residual):
    if residual is not None:
        job.residual = &residual[0, 0, 0]
        job.residual_row = residual.strides[0]


def inference(
    const E[:, :, :] x,         # IN  (N, C, S)
    E[:, :, :] y,               # OUT (N, C, S), may be x
    const E[:, :, :] residual,  # IN  (N, C, S) or None, may be y
    const P[::1] mean,          # IN  (C,)
    const P[::1] var,           # IN  (C,)
    const P[::1] gamma,         # IN  (C,) or None
    const P[::1] beta,          # IN  (C,) or None
    Py_ssize_t chunks,
    double eps,
    int activation,
    double slope,
    const unsigned char[::1] share,     # IN  bytes of (N, S) of T, or None
    const Py_ssize_t[::1] places,       # IN  (SAMPLES,) where share is not None
    double total,                       # the sum of the shares
    bint weighted,
    bint zeroed,
    Storage storage,
    int threads,
):
    cdef Job job = job_on(x, storage, NO_SUMS, SCALE, eps)
    job.y_row = y.strides[0]
    job.mean = vector(&mean[0])
    job.var = vector(&var[0])
    job.gamma = optional(gamma)
    job.beta = optional(beta)
    set_activation(&job, activation, slope)
    set_residual(&job, residual)
    set_share(&job, share, places, total, weighted, zeroed)
    with nogil:
        start(&x[0, 0, 0], &x[0, 0, 0], &y[0, 0, 0], &job, chunks, threads)


def backward(
    const E[:, :, :] dy,        # IN  (N, C, S)
    const E[:, :, :] x,         # IN  (N, C, S); y where inverse
    E[:, :, :] dx,              # OUT (N, C, S), may be dy or x
    const E[:, :, :] residual,  # IN  (N, C, S) or None
    E[:, :, :] dresidual,       # OUT (N, C, S), None where residual is
    const double[::1] mean,     # IN  (C,); beta where inverse
    const double[::1] var,      # IN  (C,) m2 where the statistics are those of x
    const P[::1] gamma,         # IN  (C,) or None
    const P[::1] beta,          # IN  (C,) or None
    double[:, ::1] work,        # OUT (2 * chunks + 1, C): dbeta and dgamma in rows 0 and 1
    double eps,
    bint through_statistics,
    bint inverse,
    int activation,
    double slope,
    const unsigned char[::1] share,     # IN  bytes of (N, S) of T, or None
    const Py_ssize_t[::1] places,       # IN  (SAMPLES,) where share is not None
    double total,                       # the sum of the shares
    bint weighted,
    bint zeroed,
    Storage storage,
    int threads,
):
    cdef Job job = job_on(x, storage, DOTS, UNSCALE if through_statistics else SCALE_DY, eps)
    job.dy_row = dy.strides[0]
    job.y_row = dx.strides[0]
    job.mean = vector(&mean[0])
    job.var = vector(&var[0])
    job.gamma = optional(gamma)
    job.beta = optional(beta)
    set_share(&job, share, places, total, weighted, zeroed)
    if through_statistics:
        job.count = job.M
    use_work(&job, work)
    job.inverse = inverse
    set_activation(&job, activation, slope)
    set_residual(&job, residual)
    if dresidual is not None:
        job.dresidual = &dresidual[0, 0, 0]
        job.dresidual_row = dresidual.strides[0]
    with nogil:
        start(&x[0, 0, 0], &dy[0, 0, 0], &dx[0, 0, 0], &job, work.shape[0] // 2, threads)


include "plain.pxi"
include "running.pxi"
