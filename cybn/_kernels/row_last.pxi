# Channels-last: the C channels of a position are neighbours, so sums go down columns, as in batch
# normalization, and a row is K columns of its sample. Reduce leaves its sums in `cuts` slots a
# channel, one a stretch of the positions, and finish takes them for those of runs.
#
# A sample is taken in blocks of up to TILE columns; with few channels, several positions are one
# row of the loops. Forward, the columns of a group share its pivot.

cdef inline Py_ssize_t in_sample(const Job* job, Py_ssize_t g, Py_ssize_t i) noexcept nogil:
    """Where in its sample value i of a row lies; channels-last, these go position by position."""
    if job.last:
        return i // job.K * job.G * job.K + g * job.K + i % job.K
    return g * job.D + i


cdef const T* stretch(
    const Job* job, const T* x, Py_ssize_t n, Py_ssize_t g, Py_ssize_t i, Py_ssize_t m, T* room
) noexcept nogil:
    """Values i..i + m of a row: where they lie, or in room."""
    cdef Py_ssize_t j
    if not job.last:
        return fetch(job, x, job.x_row, n, g * job.D + i, m, room)
    for j in range(m):
        room[j] = <T> value(job, x, n, in_sample(job, g, i + j))
    return room


cdef inline Py_ssize_t positions_in_sum(const Job* job) noexcept nogil:
    """Positions that are summed as one row of columns, so that vectors stay full."""
    cdef Py_ssize_t C = job.G * job.K
    return SUM_ROW // C if 2 * C <= SUM_ROW else 1


cdef void load_shifts(
    const T* x, const Job* job, Py_ssize_t n, Py_ssize_t c0, Py_ssize_t m, bint keep, T* hi
) noexcept nogil:
    """What columns c0.. are summed about: mean, or forward the pivot, kept as mean where asked."""
    cdef Py_ssize_t c, row
    cdef T shift = 0
    for c in range(c0, c0 + m):
        row = n * job.G + c // job.K
        if c == c0 or c % job.K == 0:
            shift = <T> job.mean[row] if job.backward else find_pivot(x, job, n, c // job.K)
            if keep and not job.backward:
                (<double*> job.mean)[row] = shift
        hi[c - c0] = shift


cdef const T* fetch_rows(
    const Job* job, const T* base, Py_ssize_t pitch,
    Py_ssize_t n, Py_ssize_t i, Py_ssize_t apart, Py_ssize_t rows, Py_ssize_t w, T* scratch,
) noexcept nogil:
    """Rows of w columns, `apart` values apart, from value i of sample n on: fetched one by one."""
    cdef Py_ssize_t r
    if job.storage == NATIVE:
        return fetch(job, base, pitch, n, i, w, scratch)
    for r in range(rows):
        fetch(job, base, pitch, n, i + r * apart, w, scratch + r * w)
    return scratch


cdef void add_positions(
    const T* x, const T* dy, const Job* job, Py_ssize_t n, Py_ssize_t i,
    Py_ssize_t apart, Py_ssize_t rows, Py_ssize_t w, const T* hi, T* a, T* b,
) noexcept nogil:
    """Add rows of w columns to the column sums: half types 4 or 2 at a time, in the same order."""
    cdef T of_x[4 * TILE]
    cdef T of_dy[2 * TILE]
    cdef const T* at_x
    cdef const T* at_dy
    cdef Py_ssize_t r = 0, many = 2 if job.backward else 4, stride = w
    if job.storage == NATIVE:
        many, stride = rows, apart
    while r < rows:
        many = min(many, rows - r)
        at_x = fetch_rows(job, x, job.x_row, n, i + r * apart, apart, many, w, of_x)
        if job.backward:
            at_dy = fetch_rows(job, dy, job.dy_row, n, i + r * apart, apart, many, w, of_dy)
            col_dots(at_dy, stride, at_x, stride, many, w, hi, hi, hi, False, a, b)
        else:
            col_sums(at_x, stride, many, w, hi, a, b)
        r += many


cdef void reduce_channels(
    const T* x, const T* dy, const Job* job, Py_ssize_t n, Py_ssize_t c0, Py_ssize_t m,
    Py_ssize_t k, const T* hi,
) noexcept nogil:
    """Sums of m channels over cut k of the positions."""
    cdef T a[TILE]
    cdef T b[TILE]
    cdef double sum_a[TILE]
    cdef double sum_b[TILE]
    cdef Py_ssize_t C = job.G * job.K, step = positions_in_sum(job), rows, c
    cdef Py_ssize_t s = k * job.S // job.cuts, end = (k + 1) * job.S // job.cuts
    cdef double* out = job.sums + ((n * C + c0) * job.cuts + k) * 2
    for c in range(m * step):
        a[c] = 0
        b[c] = 0
    for c in range(m):
        sum_a[c] = 0
        sum_b[c] = 0
    while s < end:
        rows = min(FLUSH, (end - s) // step)
        if rows > 0:
            add_positions(x, dy, job, n, s * C + c0, step * C, rows, m * step, hi, a, b)
        else:  # what is left is less than a row
            rows = 1
            add_positions(x, dy, job, n, s * C + c0, 0, 1, m * (end - s), hi, a, b)
        gather(a, m, 1, step, sum_a)
        gather(b, m, 1, step, sum_b)
        s += rows * step
    for c in range(m):
        out[c * job.cuts * 2] = sum_a[c]
        out[c * job.cuts * 2 + 1] = sum_b[c]


cdef void reduce_last(
    const T* x, const T* dy, const Job* job, Py_ssize_t n, Py_ssize_t k0, Py_ssize_t k1
) noexcept nogil:
    """Fill slots k0..k1 of each channel of a sample."""
    cdef T hi[TILE]
    cdef Py_ssize_t C = job.G * job.K, blocks = ceiling(C, TILE), i, k, c, m
    for i in range(blocks):
        c = i * TILE
        m = min(TILE, C - c)
        load_shifts(x, job, n, c, m, k0 == 0, hi)
        repeat(hi, m, positions_in_sum(job))
        for k in range(k0, k1):
            reduce_channels(x, dy, job, n, c, m, k, hi)


cdef void apply_channels(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta, const Job* job,
    Py_ssize_t n, Py_ssize_t c0, Py_ssize_t m, Py_ssize_t s0, Py_ssize_t s1,
) noexcept nogil:
    """y or dx of m channels of positions s0..s1: down in strips, up in each of them."""
    cdef T hi[TILE]
    cdef T a[TILE]
    cdef T k[TILE]
    cdef T b[TILE]
    cdef T buffer[TILE]
    cdef T of_x[TILE]
    cdef T of_dy[TILE]
    cdef const T* at_x
    cdef T* to
    cdef Line line
    cdef Row row
    cdef bint computed = job.buffered or job.storage != NATIVE
    cdef Py_ssize_t C = job.G * job.K, c, g, i, s, w, at
    cdef Py_ssize_t step = max(1, min(TILE // C, (s1 - s0) // 32))
    cdef Py_ssize_t strip = ceiling(STRIP, m * step) * step
    for c in range(c0, c0 + m):
        if c == c0 or c % job.K == 0:
            g = n * job.G + c // job.K
            row = of_row(job, g, rstd(job, g), <T> 0)
        line = of_channel(job, &row, gamma, beta, c)
        hi[c - c0] = <T> row.hi
        a[c - c0] = <T> line.a
        k[c - c0] = <T> line.k
        b[c - c0] = <T> line.b
    repeat(hi, m, step)
    repeat(a, m, step)
    repeat(b, m, step)
    if job.backward:
        repeat(k, m, step)
    for i in range(ceiling(s1 - s0, strip) - 1, -1, -1):
        s = s0 + i * strip
        while s < min(s0 + (i + 1) * strip, s1):
            w = m * min(step, s1 - s)
            at = s * C + c0
            at_x = fetch(job, x, job.x_row, n, at, w, of_x)
            to = target(job, y, job.y_row, n, at, buffer)
            if computed:
                to = &buffer[0]
            if job.backward:
                col_unscale(fetch(job, dy, job.dy_row, n, at, w, of_dy), at_x, to, w,
                            hi, a, k, b, k, False)
            else:
                col_scale(at_x, to, w, hi, a, b, <T> (-INFINITY), <T> INFINITY)
            if computed:
                deliver(job, buffer, y, job.y_row, n, at, w)
            s += step


cdef void apply_last(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta, const Job* job,
    Py_ssize_t n, Py_ssize_t t0, Py_ssize_t t1,
) noexcept nogil:
    """y or dx of tiles t0..t1 of a sample."""
    cdef Py_ssize_t C = job.G * job.K, blocks = ceiling(C, TILE), i
    for i in range(blocks):
        apply_channels(x, dy, y, gamma, beta, job, n, i * TILE, min(TILE, C - i * TILE),
                       t0 * job.tile, min(t1 * job.tile, job.S))
