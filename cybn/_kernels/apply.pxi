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
    """z = (x - mean) * gamma / sqrt(var + eps) + beta, as (x - hi) * a + b."""
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


cdef void load_xhat_scale(
    const Job* job, Py_ssize_t c, Py_ssize_t n, double* restrict r
) noexcept nogil:
    """What x - mean is multiplied by to give xhat; z - beta, where x was written over."""
    cdef Py_ssize_t i
    if job.inverse:
        load(job.gamma, c, n, 1, r)
        for i in range(n):
            r[i] = 1 / r[i]
    else:
        load(job.var, c, n, 0, r)
        for i in range(n):
            r[i] = 1 / sqrt(r[i] / job.count + job.eps)


cdef void unscale_coefficients(
    const Job* job, Py_ssize_t c0, Py_ssize_t c1, T* hi, T* a, T* k, T* b
) noexcept nogil:
    """dx = r gamma (g - dbeta / M - xhat dgamma / M), as g * a + (x - hi) * k + b."""
    cdef double mean[VECTOR]
    cdef double r[VECTOR]
    cdef double gamma[VECTOR]
    cdef double xhat[VECTOR]
    cdef double M = job.M, slope
    cdef Py_ssize_t c, i, n, v
    for v in range((c1 - c0 + VECTOR - 1) // VECTOR):
        c = c0 + v * VECTOR
        n = min(VECTOR, c1 - c)
        load(job.mean, c, n, 0, mean)
        load(job.var, c, n, 0, r)
        load(job.gamma, c, n, 1, gamma)
        load_xhat_scale(job, c, n, xhat)
        for i in range(n):
            r[i] = gamma[i] / sqrt(r[i] / job.count + job.eps)
            slope = -r[i] * xhat[i] * job.sums[job.C + c + i] / M
            hi[c - c0 + i] = <T> mean[i]
            a[c - c0 + i] = <T> r[i]
            k[c - c0 + i] = <T> slope
            b[c - c0 + i] = <T> (-r[i] * job.sums[c + i] / M - slope * (mean[i] - <T> mean[i]))


cdef void coefficients(
    const Job* job, Py_ssize_t c0, Py_ssize_t c1, T* hi, T* a, T* k, T* b, T* z
) noexcept nogil:
    """All that apply may need of channels c0..c1; z is b of the forward, hi and a are the same."""
    cdef Py_ssize_t i
    if job.apply == UNSCALE:
        unscale_coefficients(job, c0, c1, hi, a, k, b)
    if job.apply != UNSCALE or job.activation != IDENTITY:
        scale_coefficients(job, c0, c1, hi, a, z)
    if job.apply == SCALE_DY:
        for i in range(c1 - c0):
            k[i] = 0


cdef void apply_tile(
    const T* x, const T* dy, T* y, const Job* job, const Tile* t
) noexcept nogil:
    cdef T hi_array[BROAD + ROOM]
    cdef T* hi = on_line(&hi_array[0])
    cdef T a_array[BROAD + ROOM]
    cdef T* a = on_line(&a_array[0])
    cdef T k_array[BROAD + ROOM]
    cdef T* k = on_line(&k_array[0])
    cdef T b_array[BROAD + ROOM]
    cdef T* b = on_line(&b_array[0])
    cdef T z_array[BROAD + ROOM]
    cdef T* z = on_line(&z_array[0])
    cdef Job kept
    cdef Py_ssize_t m = t.c1 - t.c0
    # Rows have a coefficient a column. Computed at the end of its array, it is spread from there.
    cdef bint rows = not job.apply_runs
    cdef Py_ssize_t end = m * job.S - m if rows else 0
    coefficients(job, t.c0, t.c1, hi + end, a + end, k + end, b + end, z + end)
    if job.dresidual != NULL:  # reduce has done the activation, and kept the result
        dy = <const T*> job.dresidual
        kept = job[0]
        kept.activation = IDENTITY
        kept.dresidual = NULL
        kept.staged = job.storage != NATIVE or job.share != NULL
        kept.gated = False
        kept.buffered = job.stream or job.storage != NATIVE
        kept.dy_row = job.dresidual_row
        job = &kept
    if rows:
        spread(hi + end, m, job.S, hi)
        spread(a + end, m, job.S, a)
        if job.apply != SCALE:
            spread(k + end, m, job.S, k)
        if job.apply == UNSCALE:
            spread(b + end, m, job.S, b)
        if job.apply == SCALE or job.activation != IDENTITY:
            spread(z + end, m, job.S, z)
        apply_rows(x, dy, y, job, t, hi, a, k, b, z)
    else:
        apply_runs(x, dy, y, job, t, hi, a, k, b, z)
    if job.stream:
        stream_end()


cdef void apply_runs(
    const T* x, const T* dy, T* y, const Job* job, const Tile* t,
    const T* hi, const T* a, const T* k, const T* b, const T* z,
) noexcept nogil:
    cdef Py_ssize_t n, c, i, s, m, at
    for n in range(t.n1 - 1, t.n0 - 1, -1):
        for c in range(t.c0, t.c1):
            i = c - t.c0
            s = t.s0
            while s < t.s1:
                at = c * job.S + s
                m = PIECE
                if job.stream:  # the next piece starts on a line
                    m -= (<size_t> (<char*> y + n * job.y_row + at * job.item) & 63) // job.item
                m = min(m, t.s1 - s)
                if job.strips:
                    apply_strips(x, dy, y, job, n, at, m, hi + i, a + i, k + i, b + i, z + i)
                elif job.paired:
                    apply_pairs(x, dy, y, job, n, at, m, hi + i, a + i, k + i, b + i, z + i, 0)
                elif job.staged:
                    apply_piece(x, dy, y, job, n, at, m, hi[i], a[i], k[i], b[i], z[i])
                else:
                    apply_plain_piece(x, dy, y, job, n, at, m, hi[i], a[i], k[i], b[i], z[i])
                s += m


cdef inline void apply_plain_piece(
    const T* x, const T* dy, T* y, const Job* job, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m,
    T hi, T a, T k, T b, T z,
) noexcept nogil:
    """apply_piece without stages, whose calls would take 5 % of it in cache."""
    cdef T buffer[PIECE]
    cdef T* to = target(job, y, job.y_row, n, i, buffer)
    check(n < job.N and m <= TILE)
    x += n * (job.x_row // sizeof(T)) + i
    dy += n * (job.dy_row // sizeof(T)) + i
    if job.apply == SCALE and job.residual != NULL:
        scale_add(x, residual_at(job, y, n, i), to, m, hi, a, z, <T> job.low, <T> job.high)
    elif job.apply == SCALE:
        scale(x, to, m, hi, a, z, <T> job.low, <T> job.high)
    elif job.apply == SCALE_DY:
        scale(dy, to, m, 0, a, 0, <T> (-INFINITY), <T> INFINITY)
    elif job.gated:
        unscale(dy, x, to, m, hi, a, k, b, z, True)
    else:
        unscale(dy, x, to, m, hi, a, k, b, 0, False)
    if job.stream:
        stream(<char*> y + n * job.y_row + i * sizeof(T), buffer, m * sizeof(T))


cdef void apply_piece(
    const T* x, const T* dy, T* y, const Job* job, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m,
    T hi, T a, T k, T b, T z,
) noexcept nogil:
    """Values i..i + m of row n, all of one channel."""
    cdef T buffer[PIECE]
    cdef T of_x[PIECE]
    cdef T of_g[PIECE]
    cdef T of_w[PIECE]
    cdef T* to = target(job, y, job.y_row, n, i, buffer)
    cdef const T* at_x = x
    cdef const T* g
    if job.apply == SCALE:
        at_x = fetch(job, x, job.x_row, n, i, m, of_x)
        if job.residual != NULL:
            scale(at_x, to, m, hi, a, z, <T> (-INFINITY), <T> INFINITY)
        else:
            scale(at_x, to, m, hi, a, z, <T> job.low, <T> job.high)
        epilogue(job, to, n, i, m)
    else:
        if job.apply == UNSCALE or job.activation != IDENTITY:
            at_x = fetch_x(job, x, n, i, m, of_x)
        g = run_gradient(at_x, dy, job, n, i, m, hi, a, z, of_g)
        if job.apply == UNSCALE and job.weighted:
            unscale_weighted(g, at_x, shares(job, g, n, i, m, of_w), to, m, hi, a, k, b)
        elif job.apply == UNSCALE:
            unscale(g, at_x, to, m, hi, a, k, b, 0, False)
        else:
            scale(g, to, m, 0, a, 0, <T> (-INFINITY), <T> INFINITY)
    if job.zeroed:
        blank(job, to, n, i, m)
    if job.buffered:
        deliver(job, buffer, y, job.y_row, n, i, m)


cdef void apply_rows(
    const T* x, const T* dy, T* y, const Job* job, const Tile* t,
    T* hi, T* a, T* k, T* b, T* z,
) noexcept nogil:
    cdef Py_ssize_t g, n, m, s, end, apart, w = (t.c1 - t.c0) * job.S
    cdef Py_ssize_t step = rows_at_once(job, w, t.n1 - t.n0)
    cdef Py_ssize_t group = max(1, GROUP // (w * step)) * step
    cdef Py_ssize_t half = (w * step + 1) // 2
    cdef T scratch[TILE]
    cdef bint pairs = job.S == 1 and y != x and y != dy and job.residual == NULL
    pairs = pairs and not job.staged and job.apply != SCALE_DY
    if step > 1:
        repeat(hi, w, step)
        repeat(a, w, step)
        repeat(k, w, step)
        repeat(b, w, step)
        repeat(z, w, step)
    if T is float and job.paired:
        unzip(hi, w * step, half, scratch)
        unzip(a, w * step, half, scratch)
        if job.apply == SCALE:
            unzip(z, w * step, half, scratch)
        else:
            unzip(k, w * step, half, scratch)
            unzip(b, w * step, half, scratch)
    for g in range((t.n1 - t.n0 - 1) // group, -1, -1):
        n = t.n0 + g * group
        end = min(n + group, t.n1)
        if job.stream and pairs and w > TILE:
            while n + 2 <= end:
                s = 0
                while s < w:
                    apply_two_rows(x, dy, y, job, n, n + 1, t.c0 + s, min(TILE // 2, w - s),
                                   hi + s, a + s, k + s, b + s, z + s)
                    s += TILE // 2
                n += 2
        elif pairs and not job.stream:
            apart = (end - n) // (2 * step) * step
            while n < t.n0 + g * group + apart:
                apply_two_rows(x, dy, y, job, n, n + apart, t.c0, w * step, hi, a, k, b, z)
                n += step
            n += apart
        while n < end:
            m = w * min(step, t.n1 - n)
            if job.strips:
                apply_strips(x, dy, y, job, n, t.c0 * job.S, m, hi, a, k, b, z)
            elif job.paired:
                apply_pairs(x, dy, y, job, n, t.c0 * job.S, m, hi, a, k, b, z, half)
            elif job.staged:
                apply_row(x, dy, y, job, n, t.c0 * job.S, m, hi, a, k, b, z)
            else:
                apply_plain_row(x, dy, y, job, n, t.c0 * job.S, m, hi, a, k, b, z)
            n += step


cdef void apply_pairs(
    const T* x, const T* dy, T* y, const Job* job, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m,
    const T* hi, const T* a, const T* k, const T* b, const T* z, Py_ssize_t half,
) noexcept nogil:
    """Values i..i + m of row n, of one channel where half is 0; fetch to deliver in one loop."""
    cdef uint16_t buffer[TILE]
    cdef bint in_place = <const void*> x == y or <const void*> dy == y
    cdef const uint16_t* at_x = half_at(x, job.x_row, n, i)
    cdef uint16_t* to = <uint16_t*> half_at(y, job.y_row, n, i)
    cdef uint16_t* target = to
    if in_place:
        target = &buffer[0]
    if T is float:
        if job.apply == SCALE and half == 0:
            scale_pairs(at_x, target, m, hi[0], a[0], z[0], <T> job.low, <T> job.high)
        elif job.apply == SCALE:
            col_scale_pairs(at_x, target, m, half, hi, a, z, <T> job.low, <T> job.high)
        elif half == 0:
            unscale_pairs(half_at(dy, job.dy_row, n, i), at_x, target, m, hi[0], a[0], k[0], b[0])
        else:
            col_unscale_pairs(half_at(dy, job.dy_row, n, i), at_x, target, m, half, hi, a, k, b)
    if in_place:
        memcpy(to, buffer, m * sizeof(uint16_t))


cdef void apply_strips(
    const T* x, const T* dy, T* y, const Job* job, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m,
    const T* hi, const T* a, const T* k, const T* b, const T* z,
) noexcept nogil:
    """apply_pairs of float16."""
    cdef const uint16_t* at_x = half_at(x, job.x_row, n, i)
    cdef const uint16_t* at_dy = half_at(dy, job.dy_row, n, i)
    cdef uint16_t* to = <uint16_t*> half_at(y, job.y_row, n, i)
    cdef bint run = job.apply_runs
    cdef Terms terms
    if T is float:
        terms.hi, terms.a, terms.k, terms.b = hi, a, k, b
        if job.apply == SCALE:
            terms.b = z
        terms.low, terms.high = job.low, job.high
        if job.apply == SCALE and run:
            strips(SCALE_RUN, FLOAT16, at_x, at_x, to, m, &terms)
        elif job.apply == SCALE:
            strips(SCALE_COLUMNS, FLOAT16, at_x, at_x, to, m, &terms)
        elif run:
            strips(UNSCALE_RUN, FLOAT16, at_dy, at_x, to, m, &terms)
        else:
            strips(UNSCALE_COLUMNS, FLOAT16, at_dy, at_x, to, m, &terms)


cdef inline void apply_plain_row(
    const T* x, const T* dy, T* y, const Job* job, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m,
    const T* hi, const T* a, const T* k, const T* b, const T* z,
) noexcept nogil:
    """apply_row without stages, whose calls would take 5 % of it in cache."""
    cdef T array[BROAD + ROOM]
    cdef T* buffer = on_line(&array[0])
    cdef T* to = target(job, y, job.y_row, n, i, buffer)
    check(n < job.N and m <= BROAD)
    x += n * (job.x_row // sizeof(T)) + i
    dy += n * (job.dy_row // sizeof(T)) + i
    if job.apply == SCALE and job.residual != NULL:
        col_scale_add(x, residual_at(job, y, n, i), to, m, hi, a, z, <T> job.low, <T> job.high)
    elif job.apply == SCALE:
        col_scale(x, to, m, hi, a, z, <T> job.low, <T> job.high)
    elif job.apply == SCALE_DY:
        col_scale(dy, to, m, k, a, k, <T> (-INFINITY), <T> INFINITY)
    elif job.gated:
        col_unscale(dy, x, to, m, hi, a, k, b, z, True)
    else:
        col_unscale(dy, x, to, m, hi, a, k, b, k, False)
    if job.stream:
        stream(<char*> y + n * job.y_row + i * sizeof(T), buffer, m * sizeof(T))


cdef inline void apply_two_rows(
    const T* x, const T* dy, T* y, const Job* job,
    Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t i, Py_ssize_t m,
    const T* hi, const T* a, const T* k, const T* b, const T* z,
) noexcept nogil:
    """apply_plain_row of rows n0 and n1 at once: their coefficients are loaded once for both."""
    cdef T array[TILE + ROOM]
    cdef T* buffer = on_line(&array[0])
    cdef T* y0 = target(job, y, job.y_row, n0, i, buffer)
    cdef T* y1 = target(job, y, job.y_row, n1, i, buffer + TILE // 2)
    cdef const T* x0 = x + n0 * (job.x_row // sizeof(T)) + i
    cdef const T* x1 = x + n1 * (job.x_row // sizeof(T)) + i
    cdef const T* dy0 = dy + n0 * (job.dy_row // sizeof(T)) + i
    cdef const T* dy1 = dy + n1 * (job.dy_row // sizeof(T)) + i
    check(n0 < n1 < job.N and m <= (TILE // 2 if job.buffered else BROAD))
    if job.apply == SCALE:
        col_scale2(x0, x1, y0, y1, m, hi, a, z, <T> job.low, <T> job.high)
    elif job.gated:
        col_unscale2(dy0, dy1, x0, x1, y0, y1, m, hi, a, k, b, z, True)
    else:
        col_unscale2(dy0, dy1, x0, x1, y0, y1, m, hi, a, k, b, k, False)
    if job.stream:
        deliver(job, y0, y, job.y_row, n0, i, m)
        deliver(job, y1, y, job.y_row, n1, i, m)


cdef void apply_row(
    const T* x, const T* dy, T* y, const Job* job, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m,
    const T* hi, const T* a, const T* k, const T* b, const T* z,
) noexcept nogil:
    """Values i..i + m of row n, a coefficient each."""
    cdef T buffer[TILE]
    cdef T of_x[TILE]
    cdef T of_g[TILE]
    cdef T of_w[TILE]
    cdef T* to = target(job, y, job.y_row, n, i, buffer)
    cdef const T* at_x = x
    cdef const T* g
    if job.apply == SCALE:
        at_x = fetch(job, x, job.x_row, n, i, m, of_x)
        if job.residual != NULL:
            col_scale(at_x, to, m, hi, a, z, <T> (-INFINITY), <T> INFINITY)
        else:
            col_scale(at_x, to, m, hi, a, z, <T> job.low, <T> job.high)
        epilogue(job, to, n, i, m)
    else:
        if job.apply == UNSCALE or job.activation != IDENTITY:
            at_x = fetch_x(job, x, n, i, m, of_x)
        g = row_gradient(at_x, dy, job, n, i, m, hi, a, z, of_g)
        if job.apply == UNSCALE and job.weighted:
            col_unscale_weighted(g, at_x, shares(job, g, n, i, m, of_w), to, m, hi, a, k, b)
        elif job.apply == UNSCALE:
            col_unscale(g, at_x, to, m, hi, a, k, b, k, False)
        else:
            col_scale(g, to, m, k, a, k, <T> (-INFINITY), <T> INFINITY)
    if job.zeroed:
        blank(job, to, n, i, m)
    if job.buffered:
        deliver(job, buffer, y, job.y_row, n, i, m)


cdef inline Py_ssize_t rows_at_once(
    const Job* job, Py_ssize_t w, Py_ssize_t rows
) noexcept nogil:
    """Rows that can be taken as one: where each starts at the end of the one before."""
    cdef Py_ssize_t row = w * job.item
    if (row != job.x_row or row != job.y_row or (job.apply != SCALE and row != job.dy_row)
            or (job.residual != NULL and row != job.residual_row)):
        return 1
    return max(1, min(APPLY_ROW // w, rows))
