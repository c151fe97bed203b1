# cython: cdivision=True
# The description of a call of layer, RMS, group or instance normalization: the facts, and how the
# work is divided. problem.pxd has that of batch normalization.

from cybn._kernels.problem cimport FLOAT64, MOST_CHUNKS, Problem, Rows, Storage, ceiling
from cybn._kernels.waiting cimport Watch

cdef struct RowProblem:     # N samples of G groups; the D = K * S values of a group share a mean
    bint backward
    bint centred            # False for RMS normalization, whose mean is 0 by definition
    bint last               # channels-last: x is (N, S, C) in memory, else (N, G, K, S)
    Storage storage
    Py_ssize_t item
    Py_ssize_t N, G, K, S, D
    Rows x, dy              # IN
    Rows y                  # OUT: y or dx
    const void* gamma       # IN (G * K,) of T
    const void* beta        # IN (G * K,) of T; ignored in a backward pass
    double eps
    double* mean            # OUT (N * G,), backward IN
    double* m2              # OUT (N * G,) sum of squares about the mean, backward IN
    double* sums            # OUT (N * G * slots, 2)
    double* parts           # OUT (chunks, 2, G * K): dgamma, dbeta, to be added in order
    char* left              # OUT (N * G,) 1 if loops skip a row, also in the sums of dgamma, dbeta
    int threads
    Watch* watch            # OUT; NULL if time is not measured

cdef enum RowLoops:
    TRANSPOSED              # short rows, which are transposed: each lane is a row
    ALONG                   # gamma and beta change along the row
    RUNS                    # each channel of a row is a run
    DOWN                    # channels-last: columns of a sample

cdef enum:
    ROW_RUNS = 64           # shortest S for which runs beat a gamma for each value, forward
    ROW_DOTS = 128          # the same, backward
    ROW_BLOCK = 32          # maximum number of rows in a block: the lanes of transposed rows
    SHORT = 96              # maximum length of a transposed row; half of it for float64
    SHORT_DOTS = 32         # the same, in a backward pass or with several groups
    FEWEST = 8              # fewest rows of a block, even of long rows
    ROW_CHUNK = 32768       # values of a block of rows; a chunk of N has at least as many
    SEGMENT = 65536         # values of a segment, about
    STRETCH_OF_RUNS = 16384     # values of a run, or of several, that a thread takes at once
    POSITIONS = 64          # fewest positions of a cut, channels-last
    TILE = 1024             # maximum number of columns in a tile

cdef struct RowTiling:      # depends on the shape alone, because the bits depend on it
    RowLoops loops
    Py_ssize_t slots        # pairs of sums of a row
    Py_ssize_t cuts         # slots of a channel (channels-last, and backward runs), or of a row
    Py_ssize_t apart        # rows of a sample that are summed separately: G, or 1 channels-last
    Py_ssize_t shared       # steps in which they are summed: slots, or cuts channels-last
    Py_ssize_t tile         # values of a row (channels-last: positions) that are written at once
    Py_ssize_t tiles        # tiles of a row
    Py_ssize_t samples, groups  # samples and groups of a block
    Py_ssize_t chunks       # chunks of N
    Py_ssize_t spans        # blocks of groups of G


cdef inline bint transposes(const RowProblem* p) noexcept nogil:
    """Return whether rows are short enough to be transposed.

    The answer is the same for any N, because the bits of a sample do not depend on the batch. Lanes
    are samples, so with several groups and few samples most lanes are empty.
    """
    if p.backward or p.G > 1:
        return p.D <= SHORT_DOTS
    return p.D <= (SHORT // 2 if p.storage == FLOAT64 else SHORT)


cdef inline RowTiling row_tiling(const RowProblem* p) noexcept nogil:
    """Divide rows into slots, tiles, blocks and chunks."""
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
        t.loops = TRANSPOSED if transposes(p) else ALONG
        t.tile = TILE // p.S * p.S
        t.samples = max(FEWEST, min(ROW_BLOCK, ROW_CHUNK // p.D))
        values = p.N * p.D
    t.chunks = max(1, min(MOST_CHUNKS, min(p.N, values // ROW_CHUNK)))
    t.spans = ceiling(p.G, t.groups)
    t.tiles = ceiling(p.S if p.last else p.D, t.tile)
    t.shared = t.cuts if p.last else t.slots
    return t


# ---- what the dispatch calls -------------------------------------------------------------

cdef struct Kernels:        # the kernels of one instruction level
    void (*batch_norm)(const Problem* p) noexcept nogil
    void (*rows)(const RowProblem* p) noexcept nogil
