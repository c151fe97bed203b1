# cython: cdivision=True
# The description of a call: what is computed, how the work is divided, and which loops are used.
#
# Problem   the facts: where arrays are, their sizes and types, the activation, the residual, the
#           weights. The dispatch fills it in, and kernels never change it.
# Tiling    how the work is divided. Chunks are the parts in which sums are taken. They affect how
#           results are rounded, so they depend on (N, C, S) alone. Blocks are the parts that
#           threads take, and affect only the speed.
# Route     which loops and stages are used, and where results go. One function of Problem and
#           Tiling computes each field; the first condition that matches decides. Loops read the
#           route, never the facts that it was made of.
#
# N = everything before the channel axis, C = channels, S = everything after it.

from libc.math cimport INFINITY

from cybn._kernels.activation cimport (
    HARDSWISH, IDENTITY, LEAKY_RELU, RELU, RELU6, Activation)
from cybn._kernels.lanes cimport BFLOAT16, FLOAT16, PLAIN, Way
from cybn._kernels.loops cimport RAMP, RECTIFIED, STEPS, STRAIGHT, Bend
from cybn._kernels.waiting cimport Watch

cdef enum:
    SAMPLES = 8             # values whose mean is the pivot

cdef enum Storage:          # type of x, y, dy, dx and residuals in memory
    FLOAT32
    FLOAT64
    HALF                    # float16
    BRAIN                   # bfloat16

cdef enum Reduce:
    NO_SUMS
    SUMS                    # of x and x * x
    DOTS                    # of g and g * x

cdef enum Apply:
    NO_WRITE
    SCALE                   # x to y
    SCALE_DY                # dy to dx, with fixed statistics
    UNSCALE                 # dy and x to dx, through the statistics

cdef struct Vector:         # (C,) float32 or float64, or absent
    const void* data
    bint wide               # float64

cdef struct Rows:           # (N, C, S) in memory: N rows of C * S neighbours; at is NULL if absent
    char* at
    Py_ssize_t pitch        # bytes from one row to the next

cdef struct Problem:
    Reduce reduce
    Apply apply
    Storage storage
    Py_ssize_t item         # bytes of a value in memory
    Py_ssize_t N, C, S
    Rows x, dy              # IN; if `inverse`, x contains y
    Rows y                  # OUT: y or dx
    Rows residual           # IN
    Rows dresidual          # OUT: its gradient
    Vector mean, var, gamma, beta   # if the statistics are those of x, var is m2
    double M                # number of unmasked values of a channel, or the sum of their weights
    double count            # what var is divided by: M, or 1
    double eps
    bint inverse            # forward wrote y over x: x contains y, and mean contains beta
    Activation activation
    double slope            # of leaky_relu
    const void* share       # (N, S) of T: the weight of each position; NULL if all are 1
    Py_ssize_t places[SAMPLES]  # unmasked positions whose values give the pivot, n * S + s
    bint weighted           # some shares are neither 0 nor 1
    bint zeroed             # for masked values, y is 0 and dy is ignored
    double* sums            # OUT (2 * chunks + 1, C): first the two results, last the pivots
    char* left              # OUT (C,) set to 1 for a channel that loops cannot write; or NULL
    Py_ssize_t chunks       # of each channel, from chunks_of
    int threads
    Watch* watch            # OUT; NULL if time is not measured

# ---- tiling ------------------------------------------------------------------------------

cdef enum:
    RUN_MIN = 256           # shortest S that is summed as runs for any N
    RUN_APPLY = 96          # shortest S that inference writes as runs; the bits do not change
    RUN_TO_ROWS = 32        # if N is at most S / RUN_TO_ROWS, a shorter S is summed as runs, too
    BLOCK = 64              # maximum number of channels in a block of runs
    COLUMNS = 1568          # maximum number of columns in a block, channels-first
    BROAD = 2048            # the same, channels-last: a row should stay in one piece
    STAGED_COLUMNS = 512    # the same with stages
    STAGED = 1024           # values of a piece for stages; equal to PIECE
    SUM_ROW = 64            # maximum number of columns when several rows are summed as one
    APPLY_ROW = 1024        # the same when they are written
    CHUNK = 65536           # values of a channel in one chunk, about
    MOST_CHUNKS = 64        # with more, partial sums would take more than about 1 KiB per channel
    SERIAL = 65536          # with fewer elements, one thread is faster than two
    MODEST = 1 << 20        # with more elements, more than two tiles per thread cost no time

cdef struct Tiling:
    Py_ssize_t chunk_rows, chunk_cols   # chunks of a channel along N, and along S
    Py_ssize_t sum_rows     # rows that are summed as one
    Py_ssize_t block, blocks            # channels per block, number of blocks
    Py_ssize_t apply_rows, apply_cols   # tiles of a block along N and S, if apply is shared
    Py_ssize_t touched      # bytes of all tensors
    bint owned              # a thread does all steps for a block; otherwise steps are shared
    int threads

cdef struct Caches:
    Py_ssize_t l2, l3       # bytes; speed depends on them, results do not


cdef inline Py_ssize_t ceiling(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t chunks_of(Py_ssize_t N, Py_ssize_t C, Py_ssize_t S) noexcept nogil:
    """Return in how many chunks a channel is summed.

    It depends on the shape alone, because the bits depend on it. Channels-last arrays (S = 1) are
    divided by rows, with all C channels together. Otherwise a channel is divided by rows of N, and
    along S as well if there are too few rows.
    """
    cdef Py_ssize_t chunks, rows
    if S == 1:
        return max(1, min(MOST_CHUNKS, min(N * C // CHUNK, N // 64)))
    chunks = max(1, min(MOST_CHUNKS, N * S // CHUNK))
    rows = min(N, chunks)
    return rows * max(1, chunks // rows)


cdef inline bint sums_by_run(const Problem* p) noexcept nogil:
    """Return whether a channel is summed as runs, not down columns; it depends on the shape alone.

    Each column needs sums and coefficients of its own. With few rows this costs more than it saves.
    """
    return p.S >= RUN_MIN or p.N * RUN_TO_ROWS <= p.S


cdef inline Py_ssize_t even(Py_ssize_t whole, Py_ssize_t most, Py_ssize_t unit) noexcept nogil:
    """Return a length up to `most` that divides the whole into about equal parts of whole units."""
    return min(most, ceiling(ceiling(whole, ceiling(whole, most)), unit) * unit)


# ---- route -------------------------------------------------------------------------------

cdef enum Loops:
    BY_RUN                  # one set of coefficients for a run of S values
    BY_COLUMN               # one set for each of several neighbouring columns

cdef enum Source:
    IN_PLACE                # loops read the arrays themselves
    KEPT                    # the same, but a stage first stores the gradient for the second pass
    STAGED_PIECES           # stages fill a piece in L1, and loops read the piece

cdef enum Gradient:         # where the second pass finds the gradient before the activation
    GIVEN                   # it is dy
    AGAIN                   # computed again from dy and x
    IN_DRESIDUAL            # the first pass stored it in dresidual, which equals it
    IN_DX                   # the first pass stored it in dx

cdef struct Route:
    Loops reduce_by, apply_by
    Way way
    bint stream             # results are written past the caches
    Source reduce_from, apply_from
    Bend bend               # of the activation, if loops of gradients apply its slope themselves
    Gradient gradient
    bint clamped            # the loop `scale` clamps to low..high
    double low, high


cdef inline Bend bend_of(const Problem* p) noexcept nogil:
    if p.activation == RELU:
        return RECTIFIED
    if p.activation == RELU6 or p.activation == LEAKY_RELU:
        return STEPS
    if p.activation == HARDSWISH:
        return RAMP
    return STRAIGHT


cdef inline bint smooth(const Problem* p) noexcept nogil:
    """Return whether the slope of the activation costs more than a comparison."""
    return p.activation != IDENTITY and bend_of(p) == STRAIGHT


cdef inline Gradient gradient_of(const Problem* p) noexcept nogil:
    if p.reduce != DOTS or (p.activation == IDENTITY and p.dresidual.at == NULL):
        return GIVEN
    if p.dresidual.at != NULL:
        return IN_DRESIDUAL
    if smooth(p) and p.y.at != p.x.at and p.storage <= FLOAT64:
        return IN_DX
    return AGAIN


cdef inline Py_ssize_t block_of(
    const Problem* p, const Tiling* t, const Caches* caches
) noexcept nogil:
    """Return the number of channels in a block: many, but every thread gets several blocks."""
    cdef Py_ssize_t tensors = 2 if p.reduce == DOTS else 1
    cdef bint staged = reduce_from(p) == STAGED_PIECES or apply_from(p) == STAGED_PIECES
    cdef Py_ssize_t run = p.S * p.item, columns = STAGED_COLUMNS if staged else COLUMNS
    cdef Py_ssize_t block, held, least = ceiling(p.C, 4 * t.threads)
    if p.S == 1:
        if not staged:
            columns = BROAD if p.item == 4 and t.chunk_rows >= 4 * t.threads else 1024
        return p.C if t.sum_rows > 1 else even(p.C, min(columns, p.C), 16)
    if sums_by_run(p) or (p.reduce == NO_SUMS and p.S >= RUN_APPLY and p.share == NULL):
        held = (4 if caches.l3 <= NEAR else 1) * caches.l2
        block = max(1, min(BLOCK, min(PIECE_BYTES // run, held // (run * p.N * tensors))))
    else:
        block = max(1, columns // p.S)
    if t.owned:
        block = max(1, min(block, least))
    return even(p.C, min(block, p.C), 1)


cdef enum:
    PIECE_BYTES = 200 << 10     # maximum number of bytes of a row in one block
    # A last-level cache of up to NEAR bytes is shared by few cores and fast, so blocks may be
    # larger than L2. A larger cache is slow: on such a machine a forward of (32, 256, 56, 56) took
    # 11.4 ms with blocks larger than L2, and 9.3 ms with blocks that fit it.
    NEAR = 64 << 20


cdef inline Tiling tiling_of(const Problem* p, const Caches* caches) noexcept nogil:
    """Divide the work into chunks and blocks."""
    cdef Tiling t
    cdef Py_ssize_t tensors = 2 if p.reduce == DOTS else 1
    t.threads = 1 if p.N * p.C * p.S < SERIAL else p.threads
    t.chunk_rows = min(p.N, p.chunks)
    t.chunk_cols = p.chunks // t.chunk_rows
    t.touched = (tensors + 1) * p.N * p.C * p.S * p.item
    t.owned = p.chunks == 1 or (p.S > 1 and (t.threads == 1 or p.C >= 4 * t.threads))
    t.sum_rows = SUM_ROW // p.C if p.S == 1 and 2 * p.C <= SUM_ROW else 1
    t.block = block_of(p, &t, caches)
    t.blocks = ceiling(p.C, t.block)
    t.apply_rows = t.chunk_rows
    t.apply_cols = t.chunk_cols
    if p.S == 1:
        t.apply_rows = max(1, min(p.N // 64, (2 if p.N * p.C <= MODEST else 4) * t.threads))
    return t


cdef inline Way way_of(Storage storage) noexcept nogil:
    if storage == HALF:
        return FLOAT16
    return BFLOAT16 if storage == BRAIN else PLAIN


cdef inline bint streamed(const Problem* p, const Tiling* t, const Caches* caches) noexcept nogil:
    """Return whether results are written past the caches, so that x stays in the last level."""
    if p.y.at == p.x.at or p.y.at == p.dy.at or p.y.at == p.residual.at:
        return False        # y is an input, whose lines are cached already
    if gradient_of(p) == IN_DX:
        return False
    return t.touched > min(caches.l3, 2 * caches.l2)


cdef inline Source reduce_from(const Problem* p) noexcept nogil:
    if p.share != NULL:
        return STAGED_PIECES
    if p.reduce != DOTS or p.activation == IDENTITY and p.dresidual.at == NULL:
        return IN_PLACE
    if p.inverse or p.storage > FLOAT64:
        return STAGED_PIECES
    if gradient_of(p) != AGAIN:
        return KEPT
    return STAGED_PIECES if smooth(p) or p.storage != FLOAT32 else IN_PLACE


cdef inline Source apply_from(const Problem* p) noexcept nogil:
    if p.apply == SCALE:
        if p.zeroed or not (p.activation <= RELU6):
            return STAGED_PIECES
        return IN_PLACE
    if p.share != NULL or p.apply == SCALE_DY and p.activation != IDENTITY:
        return STAGED_PIECES
    if p.inverse and p.activation != IDENTITY:
        return STAGED_PIECES
    if gradient_of(p) == AGAIN and (smooth(p) or p.storage != FLOAT32):
        return STAGED_PIECES
    return IN_PLACE


cdef inline Route route_of(const Problem* p, const Tiling* t, const Caches* caches) noexcept nogil:
    """Choose the loops and stages of a problem."""
    cdef Route r
    r.reduce_by = BY_RUN if sums_by_run(p) else BY_COLUMN
    r.apply_by = r.reduce_by
    if p.reduce == NO_SUMS and p.S >= RUN_APPLY and p.share == NULL:
        r.apply_by = BY_RUN
    r.way = way_of(p.storage)
    r.stream = streamed(p, t, caches)
    r.reduce_from = reduce_from(p)
    r.apply_from = apply_from(p)
    r.gradient = gradient_of(p)
    r.bend = bend_of(p) if r.gradient == AGAIN else STRAIGHT
    r.clamped = p.activation == RELU or p.activation == RELU6
    r.low = 0 if r.clamped else -INFINITY
    r.high = 6 if p.activation == RELU6 else INFINITY
    return r
