# cython: cdivision=True
# What is asked for, how it is cut, and which way it goes.
#
# Problem   facts: where arrays lie, their sizes and types, the activation, what there is beside x.
#           Built by the dispatch, never changed by a kernel.
# Tiling    in which chunks sums are taken, which decide the bits and depend on (N, C, S) alone; and
#           in which blocks work goes to threads, which decide the speed and nothing else.
# Route     which loops, which stages, where results go. A handful of enums, each computed by one
#           function of Problem and Tiling in which the first match wins. Loops look at the route,
#           never at the facts that it was made of.
#
# N = everything before the channel axis, C = channels, S = everything after it.

from libc.math cimport INFINITY
from libc.stddef cimport size_t

from cybn._kernels.activation cimport (
    HARDSWISH, IDENTITY, LEAKY_RELU, RELU, RELU6, Activation)
from cybn._kernels.lanes cimport BFLOAT16, FLOAT16, LINE, PLAIN, Way
from cybn._kernels.loops cimport RAMP, RECTIFIED, STEPS, STRAIGHT, Bend
from cybn._kernels.waiting cimport Watch

cdef enum:
    SAMPLES = 8             # values whose mean is the pivot

cdef enum Storage:          # what x, y, dy, dx and residuals are in memory
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
    SCALE_DY                # dy to dx, statistics fixed
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
    Rows x, dy              # IN; x is y where inverse
    Rows y                  # OUT: y or dx
    Rows residual           # IN
    Rows dresidual          # OUT: its gradient
    Vector mean, var, gamma, beta   # var is m2 where the statistics are those of x
    double M                # values of a channel that count, or the sum of their weights
    double count            # what var is divided by: M, or 1
    double eps
    bint inverse            # x is what forward wrote over it; mean is beta
    Activation activation
    double slope            # of leaky_relu
    const void* share       # (N, S) of T: how often a position counts; NULL: once
    Py_ssize_t places[SAMPLES]  # of positions that count, n * S + s
    bint weighted           # shares are other than 0 and 1
    bint zeroed             # masked values: y is 0, dy is ignored
    double* sums            # OUT (2 * chunks + 1, C): two results, and at the end the pivots
    char* left              # OUT (C,) 1 where loops cannot write a channel, else as it was; or NULL
    Py_ssize_t chunks       # of each channel: count_chunks
    int threads
    Watch* watch            # OUT; NULL where nobody asks

# ---- tiling ------------------------------------------------------------------------------

cdef enum:
    RUN_MIN = 256           # shortest S whose sums are those of runs
    RUN_APPLY = 96          # the same for inference, whose bits are the same either way
    RUN_TO_ROWS = 32        # N below S / RUN_TO_ROWS is few rows
    BLOCK = 64              # most channels of a block of runs
    COLUMNS = 1568          # most columns of a block, channels-first
    BROAD = 2048            # the same, channels-last: a row stays in one piece
    STAGED_COLUMNS = 512    # the same, where stages are run on it
    STAGED = 1024           # values of a piece that stages are run on: PIECE
    SUM_ROW = 64            # columns that several rows of few channels are summed as
    APPLY_ROW = 1024        # the same, to be written
    CHUNK = 65536           # values that one chunk of a channel has, about
    MOST_CHUNKS = 64        # so partial sums take about 1 KiB a channel at most
    SERIAL = 65536          # elements below which one thread is faster than two
    MODEST = 1 << 20        # up to which more than two tiles a thread cost more than they level out

cdef struct Tiling:
    Py_ssize_t chunk_rows, chunk_cols   # chunks of a channel: of N, and of S
    Py_ssize_t sum_rows     # rows that are summed as one
    Py_ssize_t block, blocks            # channels a block, number of blocks
    Py_ssize_t apply_rows, apply_cols   # tiles of a block in the second pass, where shared
    Py_ssize_t touched      # bytes of all tensors
    bint owned              # a thread takes a block through all steps; else steps are shared
    int threads

cdef struct Caches:
    Py_ssize_t l2, l3       # bytes; speed depends on them, results do not


cdef inline Py_ssize_t ceiling(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t chunks_of(Py_ssize_t N, Py_ssize_t C, Py_ssize_t S) noexcept nogil:
    """In how many chunks a channel is summed: of the shape alone, as the bits depend on it.

    Channels-last (S = 1) is cut by rows for the sake of all C channels at once; else a channel is
    cut by rows of N, and where N has too few of those, along S as well.
    """
    cdef Py_ssize_t chunks, rows
    if S == 1:
        return max(1, min(MOST_CHUNKS, min(N * C // CHUNK, N // 64)))
    chunks = max(1, min(MOST_CHUNKS, N * S // CHUNK))
    rows = min(N, chunks)
    return rows * max(1, chunks // rows)


cdef inline bint sums_by_run(const Problem* p) noexcept nogil:
    """Whether a channel's values are summed as runs, or down columns: of the shape alone.

    Columns want sums and coefficients each: with few rows that costs more than it saves.
    """
    return p.S >= RUN_MIN or p.N * RUN_TO_ROWS <= p.S


cdef inline Py_ssize_t even(Py_ssize_t whole, Py_ssize_t most, Py_ssize_t unit) noexcept nogil:
    """A length of at most `most` that cuts the whole in about equal parts, in whole units."""
    return min(most, ceiling(ceiling(whole, ceiling(whole, most)), unit) * unit)


# ---- route -------------------------------------------------------------------------------

cdef enum Loops:
    BY_RUN                  # one set of coefficients for a run of S values
    BY_COLUMN               # one for each of some neighbouring columns

cdef enum Source:
    IN_PLACE                # loops read memory
    KEPT                    # the same, and the gradient where a stage left it for the second pass
    STAGED_PIECES           # stages fill a piece in L1, which loops read

cdef enum Gradient:         # where the gradient before the activation is, in the second pass
    GIVEN                   # it is dy
    AGAIN                   # computed once more from dy and x
    IN_DRESIDUAL            # where the first pass left it, as it is the residual's
    IN_DX                   # where the first pass left it

cdef struct Route:
    Loops reduce_by, apply_by
    Way way
    bint stream             # results go past the caches
    Source reduce_from, apply_from
    Bend bend               # of the activation, where loops of gradients go through it themselves
    Gradient gradient
    bint clamped            # loops of scale clamp to low..high
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
    """Whether the slope of the activation costs more than a comparison."""
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
    """Channels of a block: long pieces, of which every thread gets several."""
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
    PIECE_BYTES = 200 << 10     # of a row that a block has at most
    # A last level of up to so many bytes is shared by few cores and quick: a block may be larger
    # than L2. A larger one is far: 256x56x56 forward took 11.4 ms there, 9.3 in blocks that fit L2.
    NEAR = 64 << 20


cdef inline Tiling tiling_of(const Problem* p, const Caches* caches) noexcept nogil:
    """Cut the work into chunks and blocks."""
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
    """Whether results go past the caches, so that x stays in the last level for the second look."""
    if p.y.at == p.x.at or p.y.at == p.dy.at or p.y.at == p.residual.at:
        return False        # in place: these lines are in the caches already
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
    """Which way a problem goes."""
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


# ---- rows: layer, RMS, group and instance normalization -----------------------------------

cdef struct RowProblem:     # N samples of G groups of D = K * S values that share a mean
    bint backward
    bint centred            # RMS normalization is not: its mean is 0 by definition
    bint last               # channels-last: x is (N, S, C) in memory, else (N, G, K, S)
    Storage storage
    Py_ssize_t item
    Py_ssize_t N, G, K, S, D
    Rows x, dy              # IN
    Rows y                  # OUT: y or dx
    const void* gamma       # IN (G * K,) of T
    const void* beta        # IN (G * K,) of T; not looked at backward
    double eps
    double* mean            # OUT (N * G,), backward IN
    double* m2              # OUT (N * G,) sum of squares about the mean, backward IN
    double* sums            # OUT (N * G * slots, 2)
    double* parts           # OUT (chunks, 2, G * K): dgamma, dbeta, to be added in order
    char* left              # OUT (N * G,) whether loops cannot write a row: it is in no sum
    int threads
    Watch* watch            # OUT; NULL where nobody asks

cdef enum RowLoops:
    TURNED                  # rows so short that lanes are rows
    ALONG                   # gamma and beta change along the row
    RUNS                    # each channel of a row is a run
    DOWN                    # channels-last: columns of a sample

cdef enum:
    ROW_RUNS = 64           # shortest S for which runs beat a gamma for each value, forward
    ROW_DOTS = 128          # the same, backward
    ROW_BLOCK = 32          # most rows of a block: the lanes of turned rows
    SHORT = 32              # values of a row up to which rows are turned
    FEWEST = 8              # rows of a block of long rows, if there are as many
    ROW_CHUNK = 32768       # values of a block of rows, and least of a chunk of N
    SEGMENT = 65536         # values of a segment, about
    STRETCH_OF_RUNS = 16384     # values of a run, or of several, that a thread takes at once
    POSITIONS = 64          # channels-last, of a cut, at least
    TILE = 1024             # columns of a tile

cdef struct RowTiling:      # all but `threads` of the shape alone, as the bits depend on it
    RowLoops loops
    Py_ssize_t slots        # sums of a row
    Py_ssize_t cuts         # slots of a channel of runs, backward; else of a row
    Py_ssize_t apart        # rows of a sample that are summed each by itself: G; 1 channels-last
    Py_ssize_t shared       # steps in which they are: slots; cuts channels-last
    Py_ssize_t tile         # values of a row that are written at once; channels-last positions
    Py_ssize_t tiles        # of a row
    Py_ssize_t samples, groups  # of a block
    Py_ssize_t chunks       # of N
    Py_ssize_t spans        # of G: blocks of groups


cdef inline RowTiling row_tiling(const RowProblem* p) noexcept nogil:
    """How rows are cut."""
    cdef RowTiling t
    cdef Py_ssize_t values = p.N * p.G * p.D
    t.samples = t.groups = 1
    t.slots = t.cuts = ceiling(p.D, SEGMENT)
    t.apart = p.G
    if p.last:
        t.loops = DOWN
        t.tile = max(POSITIONS, SEGMENT // (p.G * p.K))
        t.groups = p.G
        t.cuts = max(1, min(MOST_CHUNKS, min(p.S // POSITIONS, p.G * p.D // SEGMENT)))
        t.slots = p.K * t.cuts
        t.apart = 1
    elif p.S >= (ROW_DOTS if p.backward else ROW_RUNS):
        t.loops = RUNS
        t.tile = STRETCH_OF_RUNS
        t.groups = max(1, min(ROW_BLOCK, ROW_CHUNK // p.D))
        if p.backward:
            t.cuts = ceiling(p.S, SEGMENT)
            t.slots = p.K * t.cuts
    else:
        t.loops = TURNED if p.D <= SHORT else ALONG
        t.tile = TILE // p.S * p.S
        t.samples = max(FEWEST, min(ROW_BLOCK, ROW_CHUNK // p.D))
        values = p.N * p.D
    t.chunks = max(1, min(MOST_CHUNKS, min(p.N, values // ROW_CHUNK)))
    t.spans = ceiling(p.G, t.groups)
    t.tiles = ceiling(p.S if p.last else p.D, t.tile)
    t.shared = t.cuts if p.last else t.slots
    return t


# ---- what the dispatch calls -------------------------------------------------------------

cdef struct Kernels:        # of one instruction level
    void (*batch_norm)(const Problem* p) noexcept nogil
    void (*rows)(const RowProblem* p) noexcept nogil
