# Rows of up to SHORT values are turned in L1, BLOCK of them at once: lanes are rows. What a row
# costs by itself, a pivot, two sums across a vector and an end to fill up, is then vectors too.

cdef void turn(
    const Job* job, const T* base, Py_ssize_t pitch, const Span* s, Py_ssize_t g, T* out
) noexcept nogil:
    """Some rows of a group as (D, BLOCK); 0 where there are fewer rows than lanes."""
    cdef T scratch[SHORT]
    cdef const T* at
    cdef Py_ssize_t i, j, rows = s.n1 - s.n0
    if rows < BLOCK:
        for i in range(job.D * BLOCK):
            out[i] = 0
    for i in range(rows):
        at = fetch(job, base, pitch, s.n0 + i, g * job.D, job.D, scratch)
        for j in range(job.D):
            out[j * BLOCK + i] = at[j]


cdef void find_pivots(const T* x, const Job* job, T* shift) noexcept nogil:
    """find_pivot of turned rows."""
    cdef double v[SAMPLES]
    cdef Py_ssize_t i, j
    for j in range(BLOCK):
        for i in range(SAMPLES):
            v[i] = x[job.pivot[i] * BLOCK + j]
        shift[j] = <T> (0.125 * (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))))


cdef void reduce_turned(
    const T* x, const T* dy, const T* gamma, const Job* job, const Span* s, Py_ssize_t g
) noexcept nogil:
    """Fill the one slot of some rows of a group."""
    cdef T of_x[SHORT * BLOCK]
    cdef T of_dy[SHORT * BLOCK]
    cdef T room[SHORT]
    cdef T shift[BLOCK]
    cdef T a[BLOCK]
    cdef T b[BLOCK]
    cdef Py_ssize_t i, row
    check(s.n1 - s.n0 <= BLOCK and job.D <= SHORT and job.slots == 1 and BLOCK == LANES)
    turn(job, x, job.x_row, s, g, of_x)
    for i in range(BLOCK):
        shift[i] = 0
    if job.backward:
        for i in range(s.n1 - s.n0):
            shift[i] = <T> job.mean[(s.n0 + i) * job.G + g]
        turn(job, dy, job.dy_row, s, g, of_dy)
        turned_dots(of_dy, of_x, spread_tile(gamma, job, g, 0, room), job.D, shift, a, b)
    else:
        if job.centred:
            find_pivots(of_x, job, shift)
        turned_sums(of_x, job.D, shift, a, b)
    for i in range(s.n1 - s.n0):
        row = (s.n0 + i) * job.G + g
        if not job.backward:
            (<double*> job.mean)[row] = shift[i]
        job.sums[2 * row] = a[i]
        job.sums[2 * row + 1] = b[i]
