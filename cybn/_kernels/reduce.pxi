# Reduce: sums over one tile, and finish: what becomes of the sums of all chunks.

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
    """Mean of SAMPLES values spread evenly over each channel, rounded to T.

    Added in a tree: the sum of eight equal values is then exact, and so is their mean.
    """
    cdef Py_ssize_t v[SAMPLES]
    cdef Py_ssize_t c, i, at, M = job.N * job.S
    cdef const T* at_c
    for i in range(SAMPLES):
        at = (M // SAMPLES) * i + (M % SAMPLES) * i // SAMPLES + M // (2 * SAMPLES)
        v[i] = (at // job.S) * job.x_row + at % job.S
    for c in range(c0, c1):
        at_c = x + c * job.S
        job.pivot[c] = <T> (0.125 * (
            ((<double> at_c[v[0]] + at_c[v[1]]) + (<double> at_c[v[2]] + at_c[v[3]]))
            + ((<double> at_c[v[4]] + at_c[v[5]]) + (<double> at_c[v[6]] + at_c[v[7]]))))


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


cdef void finish_dots(const Job* job, Py_ssize_t c0, Py_ssize_t c1, T of_type) noexcept nogil:
    """Turn the sums about hi into dbeta and dgamma; `of_type` only says which T."""
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
        finish_dots(job, c0, c1, <T> 0)
