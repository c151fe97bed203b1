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
    cdef T hi[BLOCK]
    cdef T a[BLOCK]
    cdef T b[BLOCK]
    cdef Py_ssize_t x_row = job.x_row // sizeof(T), dy_row = job.dy_row // sizeof(T)
    cdef Py_ssize_t c, n, piece, m, i, length = t.s1 - t.s0
    cdef Py_ssize_t step = even_step(length)
    cdef Py_ssize_t pieces = (length + step - 1) // step
    for i in range((t.c1 - t.c0) * 2 * WIDE):
        acc[i] = 0
    if job.reduce == DOTS and job.activation != IDENTITY:
        scale_coefficients(job, t.c0, t.c1, hi, a, b)
    for c in range(t.c1 - t.c0):
        hi[c] = <T> shift[t.c0 + c]
    for n in range(t.n0, t.n1):
        for c in range(t.c1 - t.c0):
            for piece in range(pieces):
                m = min(step, length - piece * step)
                i = (t.c0 + c) * job.S + t.s0 + piece * step
                if job.share != NULL and job.reduce == SUMS:
                    masked_piece(x, job, n, i, m, hi[c], acc + c * 2 * WIDE)
                elif job.staged:
                    staged_piece(x, dy, job, n, i, m, hi[c], a[c], b[c], acc + c * 2 * WIDE)
                elif job.reduce == SUMS:
                    sums(x + n * x_row + i, m, hi[c], acc + c * 2 * WIDE)
                elif job.added:
                    dots_add(dy + n * dy_row + i, x + n * x_row + i, residual_at(job, x, n, i),
                             room(job, n, i, <T*> NULL), m, hi[c], a[c], b[c], acc + c * 2 * WIDE)
                elif job.gated:
                    dots(dy + n * dy_row + i, x + n * x_row + i, m, hi[c], a[c], b[c], True,
                         acc + c * 2 * WIDE)
                else:
                    dots(dy + n * dy_row + i, x + n * x_row + i, m, hi[c], 0, 0, False,
                         acc + c * 2 * WIDE)
    for c in range(t.c1 - t.c0):
        out1[t.c0 + c] = across(acc + c * 2 * WIDE)
        out2[t.c0 + c] = across(acc + c * 2 * WIDE + WIDE)


cdef void staged_piece(
    const T* x, const T* dy, const Job* job,
    Py_ssize_t n, Py_ssize_t i, Py_ssize_t m,
    T hi, T a, T b, double* acc,
) noexcept nogil:
    """Add values i..i + m of row n, all of one channel."""
    cdef T of_x[PIECE]
    cdef T of_g[PIECE]
    cdef const T* at_x
    if job.strip_sums:
        at_x = place(job, x, job.x_row, n, i)
        if job.reduce == SUMS:
            sums_of(at_x, FLOAT16, m, hi, acc)
        else:
            dots_of(place(job, dy, job.dy_row, n, i), at_x, FLOAT16, m, hi, 0, 0, False, acc)
        return
    if T is float and job.paired_sums:
        if job.reduce == SUMS:
            sum_pairs(half_at(x, job.x_row, n, i), m, hi, acc)
        else:
            dot_pairs(half_at(dy, job.dy_row, n, i), half_at(x, job.x_row, n, i), m, hi, acc)
        return
    at_x = fetch_x(job, x, n, i, m, of_x)
    if job.reduce == SUMS:
        sums(at_x, m, hi, acc)
    else:
        dots(run_gradient(at_x, dy, job, n, i, m, hi, a, b, of_g), at_x, m, hi, 0, 0,
             False, acc)


cdef inline const T* run_gradient(
    const T* at_x, const T* dy, const Job* job, Py_ssize_t n, Py_ssize_t i, Py_ssize_t m,
    T hi, T a, T b, T* buffer,
) noexcept nogil:
    """Gradient with respect to z of values i..i + m of row n, all of one channel."""
    cdef T of_z[PIECE]
    cdef const T* z = of_z
    cdef const T* g
    if job.inverse:
        z = at_x
    elif job.activation != IDENTITY:
        scale(at_x, of_z, m, hi, a, b, <T> (-INFINITY), <T> INFINITY)
        if job.residual != NULL:
            add_residual(job, of_z, n, i, m, <T> (-INFINITY), <T> INFINITY)
    buffer = room(job, n, i, buffer)
    g = gradient(job, dy, z, n, i, m, buffer)
    if job.share != NULL:
        choose(g, shares(job, g, n, i, m, of_z), buffer, m, 0)
        g = buffer
    keep(job, g, n, i, m)
    return g


cdef void reduce_rows(
    const T* x,
    const T* dy,
    const Job* job,
    const Tile* t,
    const double* shift,
    double* out1,
    double* out2,
) noexcept nogil:
    cdef T hi_array[BROAD + ROOM]
    cdef T* hi = on_line(&hi_array[0])
    cdef T scale_a_array[BROAD + ROOM]
    cdef T* scale_a = on_line(&scale_a_array[0])
    cdef T scale_b_array[BROAD + ROOM]
    cdef T* scale_b = on_line(&scale_b_array[0])
    cdef T a_array[BROAD + ROOM]
    cdef T* a = on_line(&a_array[0])
    cdef T b_array[BROAD + ROOM]
    cdef T* b = on_line(&b_array[0])
    cdef Py_ssize_t c, i, m = t.c1 - t.c0, w = m * job.S, end = w - m
    cdef Py_ssize_t step = rows_in_sum(job), rows = (t.n1 - t.n0) // step
    cdef Py_ssize_t half = (w * step + 1) // 2
    # Channels-last, the rows of a sweep lie far apart, as streams that memory can follow: from
    # memory 1.4 to 2.5 times as fast as neighbouring rows.
    cdef Py_ssize_t together = FLUSH if job.S > 1 else 4 if job.reduce == SUMS else 2
    cdef Py_ssize_t sweeps = rows // together
    cdef Py_ssize_t apart = sweeps if job.S == 1 else 1
    cdef Py_ssize_t ahead = 1 if job.S == 1 else FLUSH
    if job.reduce == DOTS and job.activation != IDENTITY:
        scale_coefficients(job, t.c0, t.c1, hi + end, scale_a + end, scale_b + end)
        spread(scale_a + end, m, job.S, scale_a)
        spread(scale_b + end, m, job.S, scale_b)
        repeat(scale_a, w, step)
        repeat(scale_b, w, step)
    for c in range(m):
        hi[end + c] = <T> shift[t.c0 + c]
        out1[t.c0 + c] = 0
        out2[t.c0 + c] = 0
    spread(hi + end, m, job.S, hi)
    repeat(hi, w, step)
    if T is float and job.paired_sums:
        unzip(hi, w * step, half, a)
    for i in range(w * step):
        a[i] = 0
        b[i] = 0
    for i in range(sweeps):
        reduce_some(x, dy, job, t.n0 + i * ahead * step, together, apart * step, t.c0 * job.S,
                    w * step, half, hi, scale_a, scale_b, a, b)
        if (i + 1) * together % FLUSH == 0:
            gather_sums(job, a, b, m, step, out1 + t.c0, out2 + t.c0)
    i = t.n0 + sweeps * together * step
    reduce_some(x, dy, job, i, rows - sweeps * together, step, t.c0 * job.S, w * step,
                half, hi, scale_a, scale_b, a, b)
    i = t.n0 + rows * step
    reduce_some(x, dy, job, i, 1, 1, t.c0 * job.S, w * (t.n1 - i),
                half, hi, scale_a, scale_b, a, b)
    gather_sums(job, a, b, m, step, out1 + t.c0, out2 + t.c0)


cdef inline void gather_sums(
    const Job* job, T* a, T* b, Py_ssize_t m, Py_ssize_t step, double* out1, double* out2
) noexcept nogil:
    """Add the columns of m channels to the sums of their channels."""
    cdef T scratch[TILE]
    cdef Py_ssize_t w = m * job.S * step
    if T is float and job.paired_sums:
        zip_up(a, w, (w + 1) // 2, scratch)
        zip_up(b, w, (w + 1) // 2, scratch)
    gather(a, m, job.S, step, out1)
    gather(b, m, job.S, step, out2)


cdef inline Py_ssize_t rows_in_sum(const Job* job) noexcept nogil:
    """Rows that are summed as one row: with few channels, channels-last, vectors stay full."""
    return SUM_ROW // job.C if job.S == 1 and 2 * job.C <= SUM_ROW else 1


cdef inline void reduce_some(
    const T* x, const T* dy, const Job* job,
    Py_ssize_t n, Py_ssize_t rows, Py_ssize_t step, Py_ssize_t i, Py_ssize_t w, Py_ssize_t half,
    const T* hi, const T* scale_a, const T* scale_b, T* a, T* b,
) noexcept nogil:
    """Add values i..i + w of rows n, n + step, ... to the column sums."""
    cdef Py_ssize_t x_row = job.x_row // sizeof(T), dy_row = job.dy_row // sizeof(T)
    if T is float and job.paired_sums and job.reduce == SUMS:
        col_sum_pairs(half_at(x, job.x_row, n, i), step * job.x_row // 2, rows, w, half, hi, a, b)
    elif T is float and job.paired_sums:
        col_dot_pairs(half_at(dy, job.dy_row, n, i), step * job.dy_row // 2,
                      half_at(x, job.x_row, n, i), step * job.x_row // 2, rows, w, half, hi, a, b)
    elif T is float and job.strip_sums and job.reduce == SUMS:
        col_sum_strips(FLOAT16, half_at(x, job.x_row, n, i), step * job.x_row // 2, rows, w,
                       hi, a, b)
    elif T is float and job.strip_sums:
        col_dot_strips(FLOAT16, half_at(dy, job.dy_row, n, i), step * job.dy_row // 2,
                       half_at(x, job.x_row, n, i), step * job.x_row // 2, rows, w, hi, a, b)
    elif job.share != NULL and job.reduce == SUMS:
        masked_rows(x, job, n, rows, step, i, w, hi, a, b)
    elif job.staged and job.reduce == DOTS:
        staged_dots(x, dy, job, n, rows, step, i, w, hi, scale_a, scale_b, a, b)
    elif job.reduce == SUMS:
        col_sums(x + n * x_row + i, step * x_row, rows, w, hi, a, b)
    elif job.added:
        added_dots(x, dy, job, n, rows, step, i, w, hi, scale_a, scale_b, a, b)
    elif job.gated:
        col_dots(dy + n * dy_row + i, step * dy_row, x + n * x_row + i, step * x_row,
                 rows, w, hi, scale_a, scale_b, True, a, b)
    else:
        col_dots(dy + n * dy_row + i, step * dy_row, x + n * x_row + i, step * x_row,
                 rows, w, hi, hi, hi, False, a, b)


cdef void staged_dots(
    const T* x, const T* dy, const Job* job,
    Py_ssize_t n, Py_ssize_t rows, Py_ssize_t step, Py_ssize_t i, Py_ssize_t w,
    const T* hi, const T* scale_a, const T* scale_b, T* a, T* b,
) noexcept nogil:
    """col_dots of what is fetched two rows at a time: the same order, the same bits."""
    cdef T of_x[2 * TILE]
    cdef T of_g[2 * TILE]
    cdef const T* x0
    cdef const T* x1
    cdef Py_ssize_t end = n + rows * step, two = end - 2 * step
    while n <= two:
        x0 = fetch_x(job, x, n, i, w, of_x)
        x1 = fetch_x(job, x, n + step, i, w, of_x + TILE)
        col_dots2(row_gradient(x0, dy, job, n, i, w, hi, scale_a, scale_b, of_g),
                  row_gradient(x1, dy, job, n + step, i, w, hi, scale_a, scale_b, of_g + TILE),
                  x0, x1, w, hi, hi, hi, False, a, b)
        n += 2 * step
    if n < end:
        x0 = fetch_x(job, x, n, i, w, of_x)
        col_dots(row_gradient(x0, dy, job, n, i, w, hi, scale_a, scale_b, of_g), 0, x0, 0, 1, w,
                 hi, hi, hi, False, a, b)


cdef void added_dots(
    const T* x, const T* dy, const Job* job,
    Py_ssize_t n, Py_ssize_t rows, Py_ssize_t step, Py_ssize_t i, Py_ssize_t w,
    const T* hi, const T* scale_a, const T* scale_b, T* a, T* b,
) noexcept nogil:
    """staged_dots of a residual and relu in one loop, 1.2 to 1.5 times as fast in cache."""
    cdef Py_ssize_t x_row = job.x_row // sizeof(T), dy_row = job.dy_row // sizeof(T)
    cdef Py_ssize_t m, end = n + rows * step, two = end - 2 * step
    x += i
    dy += i
    while n <= two:
        m = n + step
        col_dots2_add(dy + n * dy_row, dy + m * dy_row, x + n * x_row, x + m * x_row,
                      residual_at(job, x, n, i), residual_at(job, x, m, i),
                      room(job, n, i, <T*> NULL), room(job, m, i, <T*> NULL),
                      w, hi, scale_a, scale_b, a, b)
        n += 2 * step
    if n < end:
        col_dots_add(dy + n * dy_row, x + n * x_row, residual_at(job, x, n, i),
                     room(job, n, i, <T*> NULL), w, hi, scale_a, scale_b, a, b)


cdef inline const T* row_gradient(
    const T* at_x, const T* dy, const Job* job, Py_ssize_t n, Py_ssize_t i, Py_ssize_t w,
    const T* hi, const T* a, const T* b, T* buffer,
) noexcept nogil:
    """Gradient with respect to z of values i..i + w of row n."""
    cdef T of_z[TILE]
    cdef const T* z = of_z
    cdef const T* g
    if job.inverse:
        z = at_x
    elif job.activation != IDENTITY:
        col_scale(at_x, of_z, w, hi, a, b, <T> (-INFINITY), <T> INFINITY)
        if job.residual != NULL:
            add_residual(job, of_z, n, i, w, <T> (-INFINITY), <T> INFINITY)
    buffer = room(job, n, i, buffer)
    g = gradient(job, dy, z, n, i, w, buffer)
    if job.share != NULL:
        choose(g, shares(job, g, n, i, w, of_z), buffer, w, 0)
        g = buffer
    keep(job, g, n, i, w)
    return g


cdef void reduce_tile(
    const T* x, const T* dy, const Job* job, const Tile* t, Py_ssize_t chunk
) noexcept nogil:
    cdef double* out1 = job.sums + 2 * chunk * job.C
    cdef double* shift = job.pivot if job.reduce == SUMS else <double*> job.mean.data
    if job.runs:
        reduce_runs(x, dy, job, t, shift, out1, out1 + job.C)
    else:
        reduce_rows(x, dy, job, t, shift, out1, out1 + job.C)


cdef void find_pivot(const T* x, const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Mean of SAMPLES values spread evenly over each channel, rounded to T.

    Added in a tree: the sum of eight equal values is then exact, and so is their mean.
    """
    cdef Py_ssize_t n[SAMPLES]
    cdef Py_ssize_t s[SAMPLES]
    cdef double v[SAMPLES]
    cdef Py_ssize_t c, i, at, M = job.N * job.S
    for i in range(SAMPLES):
        at = (M // SAMPLES) * i + (M % SAMPLES) * i // SAMPLES + M // (2 * SAMPLES)
        if job.places != NULL:
            at = job.places[i]
        n[i] = at // job.S
        s[i] = at % job.S
    for c in range(c0, c1):
        for i in range(SAMPLES):
            v[i] = value(job, x, n[i], c * job.S + s[i])
        job.pivot[c] = <T> (0.125 * (
            ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))))


cdef void sum_again(
    const T* x, const Job* job, Py_ssize_t c, double shift, double* s1, double* s2
) noexcept nogil:
    """Sums of x - shift and its square in float64, for the channels that need it.

    Lanes go to the totals every PIECE values: after one huge value a lane would round off every
    small one that follows, all in the same direction.
    """
    cdef T buffer[WIDE]
    cdef double lanes[2 * WIDE]
    cdef double total[2 * WIDE]
    cdef double d, w
    cdef Py_ssize_t n, s, j, m, taken = 0
    cdef const T* run
    cdef const T* share = <const T*> job.share
    for j in range(2 * WIDE):
        lanes[j] = 0
        total[j] = 0
    for n in range(job.N):
        for s in range((job.S + WIDE - 1) // WIDE):
            m = min(WIDE, job.S - s * WIDE)
            run = fetch(job, x, job.x_row, n, c * job.S + s * WIDE, m, buffer)
            for j in range(m):
                w = 1 if share == NULL else share[n * job.S + s * WIDE + j]
                d = run[j] - shift if w != 0 else 0
                lanes[j] += w * d
                lanes[WIDE + j] += w * d * d
            taken += m
            if taken >= PIECE:
                add_lanes(lanes, total)
                taken = 0
    add_lanes(lanes, total)
    s1[0] = across(total)
    s2[0] = across(total + WIDE)


cdef void finish_sums(const T* x, const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Turn the sums about the pivot into mean and m2."""
    cdef double* out1 = job.sums
    cdef double* out2 = job.sums + job.C
    cdef double M = job.M
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
    cdef double* dbeta = job.sums
    cdef double* dgamma = job.sums + job.C
    cdef double r[VECTOR]
    cdef Py_ssize_t c, i, n, v
    for v in range((c1 - c0 + VECTOR - 1) // VECTOR):
        c = c0 + v * VECTOR
        n = min(VECTOR, c1 - c)
        load_xhat_scale(job, c, n, r)
        for i in range(c, c + n):
            dgamma[i] = (dgamma[i] - (mean[i] - <T> mean[i]) * dbeta[i]) * r[i - c]


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
