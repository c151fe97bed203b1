# Apply: the coefficients of each row, and y or dx from them; of columns, dgamma and dbeta too.

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
            unscale(dy + at, x + at, to, m, <T> row.hi, <T> a, <T> k, <T> b, 0, False)
        else:
            scale(x + at, to, m, <T> row.hi, <T> a, <T> b, <T> (-INFINITY), <T> INFINITY)
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
    check(m <= TILE)
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
    check(s.n1 - s.n0 <= BLOCK and s.n1 <= job.N and t1 <= job.tiles)
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
