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

# What Python has to know of these numbers.
SMALL = SERIAL
NARROW = SUM_ROW // 2

cdef Py_ssize_t l2_bytes = 512 << 10
cdef Py_ssize_t l3_bytes = 32 << 20


def set_caches(Py_ssize_t l2, Py_ssize_t l3):
    """Set the bytes of a core's L2 and of the last level. Speed depends on them, results do not."""
    global l2_bytes, l3_bytes
    l2_bytes = l2
    l3_bytes = l3


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
include "running.pxi"
