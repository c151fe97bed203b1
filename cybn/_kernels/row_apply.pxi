# Apply: the coefficients of each row, and y or dx from them; of columns, dgamma and dbeta too.

cdef inline Row of_row(const Job* job, Py_ssize_t row, double r, T of_type) noexcept nogil:
    """The coefficients of a row, given its rstd; `of_type` only says which T."""
    cdef Row c
    cdef const double* total = job.sums + row * job.slots * 2
    c.hi = <T> job.mean[row]
    c.lo = job.mean[row] - c.hi
    c.r = r
    c.c1 = total[0] * job.share if job.backward and job.centred else 0
    c.c2 = total[1] * r * job.share if job.backward else 0
    return c


cdef inline void half_run(
    const Job* job, const uint16_t* dy, const uint16_t* x, uint16_t* y, Py_ssize_t m,
    float hi, float a, float k, float b,
) noexcept nogil:
    """apply_runs of half types, of one channel."""
    cdef Terms t
    t.hi, t.a, t.k, t.b = &hi, &a, &k, &b
    t.low, t.high = -INFINITY, INFINITY
    if job.storage == FLOAT16 and job.backward:
        strips(UNSCALE_RUN, FLOAT16, dy, x, y, m, &t)
    elif job.storage == FLOAT16:
        strips(SCALE_RUN, FLOAT16, dy, x, y, m, &t)
    elif job.backward:
        strips(UNSCALE_RUN, BFLOAT16, dy, x, y, m, &t)
    else:
        strips(SCALE_RUN, BFLOAT16, dy, x, y, m, &t)


cdef inline void half_columns(
    const Job* job, const uint16_t* dy, const uint16_t* x, uint16_t* y, Py_ssize_t m,
    const float* gamma, const float* beta, const Row* row, float* dgamma, float* dbeta,
) noexcept nogil:
    """apply_columns of half types, of one row."""
    cdef Terms t
    cdef float hi = <float> row.hi
    t.hi, t.a, t.b, t.dgamma, t.dbeta = &hi, gamma, beta, dgamma, dbeta
    t.lo, t.r, t.c1, t.c2 = <float> row.lo, <float> row.r, <float> row.c1, <float> row.c2
    if job.storage == FLOAT16 and job.backward:
        strips(UNSCALE_ROW, FLOAT16, dy, x, y, m, &t)
    elif job.storage == FLOAT16:
        strips(SCALE_ROW, FLOAT16, dy, x, y, m, &t)
    elif job.backward:
        strips(UNSCALE_ROW, BFLOAT16, dy, x, y, m, &t)
    else:
        strips(SCALE_ROW, BFLOAT16, dy, x, y, m, &t)


cdef inline Line of_channel(
    const Job* job, const Row* row, const T* gamma, const T* beta, Py_ssize_t c
) noexcept nogil:
    """The coefficients of a channel of a row."""
    cdef Line line
    cdef double a = gamma[c] * row.r, k = -row.r * row.r * row.c2, b
    if job.backward:
        b = -row.r * row.c1 - k * row.lo
    else:
        b = beta[c] - a * row.lo if row.lo != 0 else beta[c]
    line.a, line.k, line.b = a, k, b
    return line


cdef void apply_runs(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta,
    const Job* job, Py_ssize_t n, Py_ssize_t g, const Row* row, Py_ssize_t t,
) noexcept nogil:
    """y or dx of tile t of row n of group g, which may begin and end within a channel."""
    cdef T buffer[PIECE]
    cdef const T* at_x
    cdef const T* at_dy
    cdef T* to
    cdef Py_ssize_t at = g * job.D + t * job.tile, m, i, w
    cdef Py_ssize_t end = g * job.D + min(job.D, (t + 1) * job.tile)
    cdef Py_ssize_t c = at // job.S, left = (c + 1) * job.S - at
    cdef Line line
    while at < end:
        m = PIECE
        if job.stream:  # the next piece starts on a line
            m -= (<size_t> (<char*> y + n * job.y_row + at * job.item) & 63) // job.item
        m = min(m, end - at)
        at_x = place(job, x, job.x_row, n, at)
        at_dy = place(job, dy, job.dy_row, n, at)
        to = target(job, y, job.y_row, n, at, buffer)
        i = 0
        while i < m:
            w = min(left, m - i)
            line = of_channel(job, row, gamma, beta, c)
            if job.storage != NATIVE:
                half_run(job, <const uint16_t*> at_dy + i, <const uint16_t*> at_x + i,
                         <uint16_t*> to + i, w, <float> row.hi,
                         <float> line.a, <float> line.k, <float> line.b)
            elif job.backward:
                unscale(at_dy + i, at_x + i, to + i, w,
                        <T> row.hi, <T> line.a, <T> line.k, <T> line.b, 0, False)
            else:
                scale(at_x + i, to + i, w,
                      <T> row.hi, <T> line.a, <T> line.b, <T> (-INFINITY), <T> INFINITY)
            i += w
            left -= w
            if left == 0:
                left = job.S
                c += 1
        if job.buffered:
            deliver(job, buffer, y, job.y_row, n, at, m)
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
    cdef const T* at_x
    cdef const T* at_dy
    cdef T* to
    cdef const Row* row
    cdef Py_ssize_t n, j, at = s.g0 * job.D + t * job.tile
    cdef Py_ssize_t c = s.g0 * job.K + t * job.tile // job.S
    cdef Py_ssize_t m = min(job.tile, job.D - t * job.tile)
    cdef const T* scales = spread_tile(gamma, job, s.g0, t, room_gamma)
    cdef const T* shifts = NULL
    check(m <= TILE)
    if job.backward:
        for j in range(m):
            a[j] = 0
            b[j] = 0
    else:
        shifts = spread_tile(beta, job, s.g0, t, room_beta)
    for n in range(s.n0, s.n1):
        row = rows + n - s.n0
        at_x = place(job, x, job.x_row, n, at)
        at_dy = place(job, dy, job.dy_row, n, at)
        to = target(job, y, job.y_row, n, at, buffer)
        if job.storage != NATIVE:
            if T is float:
                half_columns(job, <const uint16_t*> at_dy, <const uint16_t*> at_x,
                             <uint16_t*> to, m, scales, shifts, row, a, b)
        elif job.backward:
            row_unscale(at_dy, at_x, scales, to, m,
                        <T> row.hi, <T> row.lo, <T> row.r, <T> row.c1, <T> row.c2, a, b)
        else:
            row_scale(at_x, scales, shifts, to, m, <T> row.hi, <T> row.lo, <T> row.r)
        if job.buffered:
            deliver(job, buffer, y, job.y_row, n, at, m)
    if job.backward:
        gather(a, m // job.S, job.S, 1, dgamma + c)
        gather(b, m // job.S, job.S, 1, dbeta + c)


cdef void apply(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta,
    const Job* job, const Span* s, double* parts, Py_ssize_t t0, Py_ssize_t t1,
) noexcept nogil:
    """y or dx of tiles t0..t1 of some rows, last tile first: reduce ended there."""
    cdef Py_ssize_t n
    check(s.n1 <= job.N and t1 <= job.tiles)
    if job.last:
        for n in range(s.n0, s.n1):
            apply_last(x, dy, y, gamma, beta, job, n, t0, t1)
    else:
        apply_rows(x, dy, y, gamma, beta, job, s, parts, t0, t1)
    if job.stream:
        stream_end()


cdef void apply_rows(
    const T* x, const T* dy, T* y, const T* gamma, const T* beta,
    const Job* job, const Span* s, double* parts, Py_ssize_t t0, Py_ssize_t t1,
) noexcept nogil:
    cdef Row rows[BLOCK]
    cdef double r[BLOCK]
    cdef Py_ssize_t n, g, t, i = 0
    check((s.n1 - s.n0) * (s.g1 - s.g0) <= BLOCK)
    for n in range(s.n0, s.n1):
        for g in range(s.g0, s.g1):
            r[i] = job.m2[n * job.G + g]
            i += 1
    for i in range((s.n1 - s.n0) * (s.g1 - s.g0)):  # by themselves: roots of vectors
        r[i] = 1 / sqrt(r[i] * job.share + job.eps)
    i = 0
    for n in range(s.n0, s.n1):
        for g in range(s.g0, s.g1):
            rows[i] = of_row(job, n * job.G + g, r[i], <T> 0)
            i += 1
    if job.runs:
        for g in range(s.g1 - 1, s.g0 - 1, -1):
            for t in range(t1 - 1, t0 - 1, -1):
                apply_runs(x, dy, y, gamma, beta, job, s.n0, g, &rows[g - s.g0], t)
    else:
        for t in range(t1 - 1, t0 - 1, -1):
            apply_columns(x, dy, y, gamma, beta, job, s, rows, t, parts, parts + job.G * job.K)
