# Masks: which values count, and how often.
#
# A value (n, s) of every channel counts share[n, s] times: 0 or 1 where there is a mask, else its
# weight. What counts 0 times is replaced where it is read, so a NaN there goes nowhere:
#
#   step                what does not count is    so that
#   SUMS, runs          the shift                 it adds exactly 0; rows of S = 1 are left out
#   DOTS                0 in x, and 0 in g        it adds exactly 0, and dresidual is 0
#   apply, zeroed       0 in y or dx
#
# With weights, SUMS are dots of w * (x - shift) and x, and dx is unscale_weighted.

cdef inline T pick(T share, T value, T other) noexcept nogil:
    """Value where it counts, else the other."""
    return other if share == 0 else value


cdef inline void choose(
    const T* v,                 # IN  (n,)
    const T* w,                 # IN  (n,) shares
    T* to,                      # OUT (n,), may be v
    Py_ssize_t n,
    T other,
) noexcept nogil:
    """What counts of v; the other where it does not."""
    cdef Py_ssize_t j
    for j in range(n):
        to[j] = pick(w[j], v[j], other)


cdef inline void col_choose(
    const T* v, const T* w, T* to, Py_ssize_t n, const T* other
) noexcept nogil:
    """What counts of v; elsewhere the other of its column."""
    cdef Py_ssize_t j
    for j in range(n):
        to[j] = pick(w[j], v[j], other[j])


cdef inline void masked_sums(
    const T* restrict x,        # IN  (n,), n <= PIECE
    const T* restrict w,        # IN  (n,) shares
    Py_ssize_t n,
    T shift,
    double* restrict acc,       # IO  (2, WIDE): sums of d and of d * d, d = x - shift or 0
) noexcept nogil:
    """The sums of runs.pxd, of what counts."""
    cdef T a[LANES]
    cdef T b[LANES]
    cdef T d
    cdef Py_ssize_t i, j, full = n - n % LANES
    for j in range(LANES):
        a[j] = 0
        b[j] = 0
    for i in range(full // LANES):
        for j in range(LANES):
            d = pick(w[i * LANES + j], x[i * LANES + j] - shift, 0)
            a[j] += d
            b[j] += d * d
    for j in range(n - full):
        d = pick(w[full + j], x[full + j] - shift, 0)
        a[j] += d
        b[j] += d * d
    flush(a, b, acc)


cdef inline void weigh(
    const T* x, const T* w, T* g, Py_ssize_t n, T shift
) noexcept nogil:
    """g = w * (x - shift)"""
    cdef Py_ssize_t j
    for j in range(n):
        g[j] = w[j] * (x[j] - shift)


cdef inline void col_weigh(
    const T* x, const T* w, T* g, Py_ssize_t n, const T* shift
) noexcept nogil:
    """g = w * (x - shift)"""
    cdef Py_ssize_t j
    for j in range(n):
        g[j] = w[j] * (x[j] - shift[j])


cdef inline void unscale_weighted(
    const T* dy, const T* x, const T* w, T* dx, Py_ssize_t n, T hi, T a, T k, T b
) noexcept nogil:
    """dx = dy * a + w * ((x - hi) * k + b)"""
    cdef Py_ssize_t j
    for j in range(n):
        dx[j] = dy[j] * a + w[j] * ((x[j] - hi) * k + b)


cdef inline void col_unscale_weighted(
    const T* dy, const T* x, const T* w, T* dx, Py_ssize_t n,
    const T* hi, const T* a, const T* k, const T* b,
) noexcept nogil:
    """dx = dy * a + w * ((x - hi) * k + b)"""
    cdef Py_ssize_t j
    for j in range(n):
        dx[j] = dy[j] * a[j] + w[j] * ((x[j] - hi[j]) * k[j] + b[j])


cdef const T* shares(
    const Job* job, const T* of_type, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m, T* scratch
) noexcept nogil:
    """Shares of values i..i + m of row n, or of whole rows from n on; `of_type` only says which T.

    A run's lie in order; those of rows are spread as the values are.
    """
    cdef const T* row = <const T*> job.share + n * job.S
    cdef Py_ssize_t j, k, end, at = 0
    if job.runs:
        return row + i % job.S
    if job.S == 1:
        for k in range((m + job.C - 1) // job.C):
            end = min(m, at + job.C)
            for j in range(at, end):
                scratch[j] = row[k]
            at = end
        return scratch
    for k in range(m // job.S):
        memcpy(scratch + k * job.S, row + k // job.C * job.S, job.S * sizeof(T))
    return scratch


cdef inline void blank(
    const Job* job, T* v, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m
) noexcept nogil:
    """Put 0 where values i..i + m of row n do not count."""
    cdef T of_w[TILE]
    choose(v, shares(job, v, n, i, m, of_w), v, m, 0)


cdef void masked_piece(
    const T* x, const Job* job, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m, T hi, double* acc
) noexcept nogil:
    """Add what counts of values i..i + m of row n, all of one channel."""
    cdef T of_x[PIECE]
    cdef T of_g[PIECE]
    cdef const T* w = shares(job, x, n, i, m, of_g)
    cdef const T* at_x = fetch_x(job, x, n, i, m, of_x)
    if not job.weighted:
        masked_sums(at_x, w, m, hi, acc)
    else:
        choose(at_x, w, of_x, m, hi)
        weigh(of_x, w, of_g, m, hi)
        dots(of_g, of_x, m, hi, 0, 0, False, acc)


cdef void masked_rows(
    const T* x, const Job* job,
    Py_ssize_t n, Py_ssize_t rows, Py_ssize_t step, Py_ssize_t i, Py_ssize_t w,
    const T* hi, T* a, T* b,
) noexcept nogil:
    """Add what counts of values i..i + w of rows n, n + step, ... to the column sums."""
    cdef T of_x[4 * TILE]
    cdef T of_w[TILE]
    cdef T of_g[TILE]
    cdef const T* at[4]
    cdef const T* share
    cdef Py_ssize_t r, j, k, found = 0
    cdef bint whole = job.S == 1 and w <= job.C and not job.weighted
    if w == 0:
        return
    for k in range(rows):
        r = n + k * step
        if whole and (<const T*> job.share)[r] == 0:
            continue
        at[found] = fetch_x(job, x, r, i, w, of_x + found * w)
        if not whole:
            share = shares(job, x, r, i, w, of_w)
            col_choose(at[found], share, of_x + found * w, w, hi)
            at[found] = of_x + found * w
        if job.weighted:
            col_weigh(at[0], share, of_g, w, hi)
            col_dots(of_g, 0, at[0], 0, 1, w, hi, hi, hi, False, a, b)
            continue
        found += 1
        if found == 4:
            col_sums4(at[0], at[1], at[2], at[3], w, hi, a, b)
            found = 0
    for j in range(found):
        col_sums(at[j], 0, 1, w, hi, a, b)
