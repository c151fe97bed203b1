# Apply: the coefficients of each channel, and y or dx from them, over one tile.

cdef inline void load(
    Vector v, Py_ssize_t c, Py_ssize_t n, double absent, double* restrict out
) noexcept nogil:
    """Widen v[c:c + n] into out."""
    cdef Py_ssize_t i
    if v.data == NULL:
        for i in range(n):
            out[i] = absent
    elif v.wide:
        for i in range(n):
            out[i] = (<const double*> v.data)[c + i]
    else:
        for i in range(n):
            out[i] = (<const float*> v.data)[c + i]


cdef void scale_coefficients(
    const Job* job, Py_ssize_t c0, Py_ssize_t c1, T* hi, T* a, T* b
) noexcept nogil:
    """y = (x - mean) * gamma / sqrt(var + eps) + beta, as (x - hi) * a + b."""
    cdef double mean[VECTOR]
    cdef double r[VECTOR]
    cdef double beta[VECTOR]
    cdef double gamma[VECTOR]
    cdef Py_ssize_t c, i, n, v
    for v in range((c1 - c0 + VECTOR - 1) // VECTOR):
        c = c0 + v * VECTOR
        n = min(VECTOR, c1 - c)
        load(job.mean, c, n, 0, mean)
        load(job.var, c, n, 0, r)
        load(job.gamma, c, n, 1, gamma)
        load(job.beta, c, n, 0, beta)
        for i in range(n):
            r[i] = gamma[i] / sqrt(r[i] / job.count + job.eps)
            hi[c - c0 + i] = <T> mean[i]
            a[c - c0 + i] = <T> r[i]
            mean[i] -= <T> mean[i]  # what is left is lo; r may be infinite where eps is 0
            b[c - c0 + i] = <T> (beta[i] - r[i] * mean[i] if mean[i] != 0 else beta[i])
    if job.apply == SCALE_DY:
        for i in range(c1 - c0):
            hi[i] = 0
            b[i] = 0


cdef void unscale_coefficients(
    const Job* job, Py_ssize_t c0, Py_ssize_t c1, T* hi, T* a, T* k, T* b
) noexcept nogil:
    """dx = r gamma (dy - dbeta / M - xhat dgamma / M), as dy * a + (x - hi) * k + b."""
    cdef double mean[VECTOR]
    cdef double r[VECTOR]
    cdef double gamma[VECTOR]
    cdef double M = <double> job.N * <double> job.S, g
    cdef Py_ssize_t c, i, n, v
    for v in range((c1 - c0 + VECTOR - 1) // VECTOR):
        c = c0 + v * VECTOR
        n = min(VECTOR, c1 - c)
        load(job.mean, c, n, 0, mean)
        load(job.var, c, n, 0, r)
        load(job.gamma, c, n, 1, gamma)
        for i in range(n):
            r[i] = 1 / sqrt(r[i] / job.count + job.eps)
            gamma[i] = gamma[i] * r[i]
            g = -gamma[i] * r[i] * job.sums[job.C + c + i] / M
            hi[c - c0 + i] = <T> mean[i]
            a[c - c0 + i] = <T> gamma[i]
            k[c - c0 + i] = <T> g
            b[c - c0 + i] = <T> (-gamma[i] * job.sums[c + i] / M - g * (mean[i] - <T> mean[i]))


cdef void apply_tile(
    const T* x, const T* dy, T* y, const Job* job, const Tile* t
) noexcept nogil:
    cdef T hi[TILE]
    cdef T a[TILE]
    cdef T k[TILE]
    cdef T b[TILE]
    cdef Py_ssize_t m = t.c1 - t.c0
    # Rows have a coefficient a column. Computed at the end of its array, it is spread from there.
    cdef bint rows = job.S < RUN_MIN
    cdef Py_ssize_t end = m * job.S - m if rows else 0
    if job.apply == UNSCALE:
        unscale_coefficients(job, t.c0, t.c1, hi + end, a + end, k + end, b + end)
    else:
        scale_coefficients(job, t.c0, t.c1, hi + end, a + end, b + end)
    if rows:
        spread(hi + end, m, job.S, hi)
        spread(a + end, m, job.S, a)
        spread(b + end, m, job.S, b)
        if job.apply == UNSCALE:
            spread(k + end, m, job.S, k)
        apply_rows(x, dy, y, job, t, hi, a, k, b)
    else:
        apply_runs(x, dy, y, job, t, hi, a, k, b)
    if job.stream:
        stream_end()


cdef void apply_runs(
    const T* x, const T* dy, T* y, const Job* job, const Tile* t,
    T* hi, T* a, T* k, T* b,
) noexcept nogil:
    cdef T buffer[PIECE]
    cdef T* to
    cdef Py_ssize_t n, c, i, s, m, at
    for n in range(t.n1 - 1, t.n0 - 1, -1):
        for c in range(t.c0, t.c1):
            i = c - t.c0
            s = t.s0
            while s < t.s1:
                at = c * job.S + s
                to = y + n * job.y_row + at
                m = PIECE
                if job.stream:  # the next piece starts on a line
                    m -= (<size_t> to & 63) // sizeof(T)
                m = min(m, t.s1 - s)
                if job.stream:
                    to = &buffer[0]
                if job.apply == SCALE:
                    scale(x + n * job.x_row + at, to, m, hi[i], a[i], b[i])
                elif job.apply == SCALE_DY:
                    scale(dy + n * job.dy_row + at, to, m, hi[i], a[i], b[i])
                else:
                    unscale(dy + n * job.dy_row + at, x + n * job.x_row + at, to, m,
                            hi[i], a[i], k[i], b[i])
                if job.stream:
                    stream(y + n * job.y_row + at, buffer, m * sizeof(T))
                s += m


cdef void apply_rows(
    const T* x, const T* dy, T* y, const Job* job, const Tile* t,
    T* hi, T* a, T* k, T* b,
) noexcept nogil:
    cdef T buffer[TILE]
    cdef T* to
    cdef Py_ssize_t g, n, m, w = (t.c1 - t.c0) * job.S, at = t.c0 * job.S
    cdef Py_ssize_t step = rows_at_once(job, w, t.n1 - t.n0)
    cdef Py_ssize_t group = max(1, GROUP // (w * step)) * step
    if step > 1:
        repeat(hi, w, step)
        repeat(a, w, step)
        repeat(b, w, step)
        if job.apply == UNSCALE:
            repeat(k, w, step)
    for g in range((t.n1 - t.n0 - 1) // group, -1, -1):
        n = t.n0 + g * group
        while n < min(t.n0 + (g + 1) * group, t.n1):
            m = w * min(step, t.n1 - n)
            to = &buffer[0] if job.stream else y + n * job.y_row + at
            if job.apply == SCALE:
                col_scale(x + n * job.x_row + at, to, m, hi, a, b)
            elif job.apply == SCALE_DY:
                col_scale(dy + n * job.dy_row + at, to, m, hi, a, b)
            else:
                col_unscale(dy + n * job.dy_row + at, x + n * job.x_row + at, to, m, hi, a, k, b)
            if job.stream:
                stream(y + n * job.y_row + at, buffer, m * sizeof(T))
            n += step


cdef inline Py_ssize_t rows_at_once(
    const Job* job, Py_ssize_t w, Py_ssize_t rows
) noexcept nogil:
    """Rows that can be taken as one: where each starts at the end of the one before."""
    if w != job.x_row or w != job.y_row or (job.apply != SCALE and w != job.dy_row):
        return 1
    return max(1, min(APPLY_ROW // w, rows))
