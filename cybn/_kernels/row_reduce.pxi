# Reduce: sums of rows, segment by segment, and finish: what becomes of them.

cdef inline T find_pivot(
    const T* x, const Job* job, Py_ssize_t n, Py_ssize_t g
) noexcept nogil:
    """Mean of SAMPLES values spread evenly over a row, rounded to T; 0 where it is not centred.

    Added in a tree: the sum of eight equal values is then exact, and so is their mean.
    """
    cdef double v[SAMPLES]
    cdef Py_ssize_t i
    if not job.centred:
        return 0
    for i in range(SAMPLES):
        v[i] = value(job, x, n, in_sample(job, g, job.pivot[i]))
    return <T> (0.125 * (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))))


cdef void reduce_row(
    const T* x, const Job* job, Py_ssize_t n, Py_ssize_t g, T shift, Py_ssize_t i, double* out
) noexcept nogil:
    """Sums of segment i of a row."""
    cdef double acc[2 * WIDE]
    cdef const T* at
    cdef Py_ssize_t first = 0, last = ceiling(job.D, PIECE), k, j, m
    if job.cuts > 1:
        first, last = i * last // job.cuts, (i + 1) * last // job.cuts
    for j in range(2 * WIDE):
        acc[j] = 0
    for k in range(first, last):
        m = min(PIECE, job.D - k * PIECE)
        at = place(job, x, job.x_row, n, g * job.D + k * PIECE)
        if job.storage == NATIVE:
            sums_of(at, NATIVE, m, shift, acc)
        elif job.storage == FLOAT16:
            sums_of(at, FLOAT16, m, shift, acc)
        else:
            sums_of(at, BFLOAT16, m, shift, acc)
    out[0] = across(acc)
    out[1] = across(acc + WIDE)


cdef void reduce_run(
    const T* x, const T* dy, const Job* job, Py_ssize_t n, Py_ssize_t g,
    T shift, Py_ssize_t i, double* out,
) noexcept nogil:
    """Dots of segment i of a row of runs: nearly equal parts of a channel, in whole pieces."""
    cdef double acc[2 * WIDE]
    cdef const T* at_x
    cdef const T* at_dy
    cdef Py_ssize_t at = g * job.D + i * job.S, end = at + job.S, j, m
    if job.cuts > 1:
        m = ceiling(ceiling(job.S, job.cuts), PIECE) * PIECE
        end = g * job.D + (i // job.cuts + 1) * job.S
        at = end - job.S + i % job.cuts * m
        end = min(at + m, end)
    for j in range(2 * WIDE):
        acc[j] = 0
    while at < end:
        m = min(PIECE, end - at)
        at_x = place(job, x, job.x_row, n, at)
        at_dy = place(job, dy, job.dy_row, n, at)
        if job.storage == NATIVE:
            dots_of(at_dy, at_x, NATIVE, m, shift, 0, 0, False, acc)
        elif job.storage == FLOAT16:
            dots_of(at_dy, at_x, FLOAT16, m, shift, 0, 0, False, acc)
        else:
            dots_of(at_dy, at_x, BFLOAT16, m, shift, 0, 0, False, acc)
        at += m
    out[0] = across(acc)
    out[1] = across(acc + WIDE)


cdef void reduce_columns(
    const T* x, const T* dy, const T* gamma, const Job* job, const Span* s,
    const T* shift, Py_ssize_t i,
) noexcept nogil:
    """Dots of segment i of some rows, which share their gamma."""
    cdef double acc[BLOCK * 2 * WIDE]
    cdef T room[TILE]
    cdef const T* weight
    cdef const T* at_x
    cdef const T* at_dy
    cdef Py_ssize_t n, t, j, m, at
    cdef double* out
    for j in range((s.n1 - s.n0) * 2 * WIDE):
        acc[j] = 0
    for t in range(i * job.tiles // job.cuts, (i + 1) * job.tiles // job.cuts):
        m = min(job.tile, job.D - t * job.tile)
        weight = spread_tile(gamma, job, s.g0, t, room)
        at = s.g0 * job.D + t * job.tile
        for n in range(s.n0, s.n1):
            j = n - s.n0
            at_x = place(job, x, job.x_row, n, at)
            at_dy = place(job, dy, job.dy_row, n, at)
            out = acc + j * 2 * WIDE
            if job.storage == NATIVE:
                weighted_dots(at_dy, at_x, NATIVE, weight, m, shift[j], out)
            elif job.storage == FLOAT16:
                weighted_dots(at_dy, at_x, FLOAT16, weight, m, shift[j], out)
            else:
                weighted_dots(at_dy, at_x, BFLOAT16, weight, m, shift[j], out)
    for n in range(s.n0, s.n1):
        out = job.sums + ((n * job.G + s.g0) * job.slots + i) * 2
        out[0] = across(acc + (n - s.n0) * 2 * WIDE)
        out[1] = across(acc + (n - s.n0) * 2 * WIDE + WIDE)


cdef inline const T* spread_tile(
    const T* v, const Job* job, Py_ssize_t g, Py_ssize_t t, T* room
) noexcept nogil:
    """The values of tile t, one a column: in place where that is one a channel, else in room."""
    cdef Py_ssize_t at = t * job.tile
    if job.S == 1:
        return v + g * job.D + at
    spread(v + g * job.K + at // job.S, min(job.tile, job.D - at) // job.S, job.S, room)
    return room


cdef void reduce(
    const T* x, const T* dy, const T* gamma, const Job* job, const Span* s,
    Py_ssize_t k0, Py_ssize_t k1,
) noexcept nogil:
    """Fill slots k0..k1 of each row. Forward, sums are about a pivot, which is left in mean."""
    cdef T shift[BLOCK]
    cdef Py_ssize_t n, g, k, row
    cdef double* out
    check(s.n1 - s.n0 <= BLOCK and s.n1 <= job.N and k1 <= job.shared)
    if job.last:
        for n in range(s.n0, s.n1):
            reduce_last(x, dy, job, n, k0, k1)
        return
    if job.turned:
        for g in range(s.g0, s.g1):
            reduce_turned(x, dy, gamma, job, s, g)
        return
    for n in range(s.n0, s.n1):
        for g in range(s.g0, s.g1):
            row = n * job.G + g
            out = job.sums + row * job.slots * 2
            if not job.backward:
                shift[0] = find_pivot(x, job, n, g)
                if k0 == 0:
                    (<double*> job.mean)[row] = shift[0]
                for k in range(k0, k1):
                    reduce_row(x, job, n, g, shift[0], k, out + 2 * k)
            elif job.runs:
                for k in range(k0, k1):
                    reduce_run(x, dy, job, n, g, <T> job.mean[row], k, out + 2 * k)
            else:
                shift[n - s.n0] = <T> job.mean[row]
    if job.backward and not job.runs:
        for k in range(k0, k1):
            reduce_columns(x, dy, gamma, job, s, shift, k)


cdef void sum_again(
    const T* x, const Job* job, Py_ssize_t n, Py_ssize_t g, double shift, double* s1, double* s2
) noexcept nogil:
    """Sums of x - shift and its square in float64, for the rows that need it."""
    cdef double acc[2 * WIDE]
    cdef T of_x[PIECE]
    cdef Py_ssize_t i, j, m
    for j in range(2 * WIDE):
        acc[j] = 0
    for i in range((job.D + PIECE - 1) // PIECE):
        m = min(PIECE, job.D - i * PIECE)
        wide_sums(stretch(job, x, n, g, i * PIECE, m, of_x), m, shift, acc)
    s1[0] = across(acc)
    s2[0] = across(acc + WIDE)


cdef void finish_forward(
    const T* x, const Job* job, Py_ssize_t n, Py_ssize_t g
) noexcept nogil:
    """Turn the sums about the pivot into mean and m2 (docs/math.md, 6.2)."""
    cdef double tiny = job.D * (1e-30 if T is float else 1e-290)
    cdef Py_ssize_t row = n * job.G + g, i
    cdef double pivot = job.mean[row], s1 = 0, s2 = 0, shift, m2
    cdef const double* part = job.sums + row * job.slots * 2
    for i in range(job.slots):
        s1 += part[2 * i]
        s2 += part[2 * i + 1]
    if not job.centred:
        s1 = 0
    shift = s1 / job.D
    m2 = s2 - s1 * shift
    if (s1 != 0 or s2 != 0) and not (tiny <= m2 < INFINITY and s1 * shift <= 4 * m2):
        if job.centred:
            sum_again(x, job, n, g, 0, &s1, &s2)
            pivot = s1 / job.D
        sum_again(x, job, n, g, pivot, &s1, &s2)
        shift = s1 / job.D if job.centred else 0
        m2 = s2 - s1 * shift
        m2 = 0 if m2 < 0 else m2
    (<double*> job.mean)[row] = pivot + shift
    (<double*> job.m2)[row] = m2


cdef inline double rstd(const Job* job, Py_ssize_t row) noexcept nogil:
    return 1 / sqrt(job.m2[row] * job.share + job.eps)


cdef void finish_backward(
    const T* gamma, const Job* job, Py_ssize_t n, Py_ssize_t g, double* dgamma
) noexcept nogil:
    """Add the slots up: to the sums of the row; of runs, to those of each channel before."""
    cdef Py_ssize_t row = n * job.G + g, C = job.G * job.K, c, i
    cdef double mean = job.mean[row], r = rstd(job, row) if job.runs else 0
    cdef double lo = mean - <T> mean
    cdef double* part = job.sums + row * job.slots * 2
    cdef double s1, s2, total1 = 0, total2 = 0
    for c in range(g * job.K, g * job.K + (job.K if job.runs else 1)):
        s1 = s2 = 0
        for i in range(job.cuts):
            s1 += part[2 * i]
            s2 += part[2 * i + 1]
        part += 2 * job.cuts
        s2 -= lo * s1
        if job.runs:
            dgamma[c] += s2 * r
            dgamma[C + c] += s1
            s1 *= gamma[c]
            s2 *= gamma[c]
        total1 += s1
        total2 += s2
    part = job.sums + row * job.slots * 2
    part[0] = total1
    part[1] = total2


cdef void finish(
    const T* x, const T* gamma, const Job* job, const Span* s, double* parts
) noexcept nogil:
    cdef Py_ssize_t n, g
    for n in range(s.n0, s.n1):
        for g in range(s.g0, s.g1):
            if job.backward:
                finish_backward(gamma, job, n, g, parts)
            else:
                finish_forward(x, job, n, g)
