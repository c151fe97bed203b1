# Small calls of the family, forward: from the arrays to the result in one compiled step, as for
# batch normalization (plain.pxi). What is no plain case is refused before anything is written.

include "buffers.pxi"


cdef bint alike(const Py_buffer* x, const Py_buffer* out) noexcept:
    """Whether out may take what becomes of x."""
    cdef int i
    if x.ndim != out.ndim or not (is_float(x) and is_float(out) and x.format[0] == out.format[0]):
        return False
    for i in range(x.ndim):
        if x.shape[i] != out.shape[i]:
            return False
    return x.buf == out.buf or apart(x, out)


cdef bint is_vector(const Py_buffer* v, const Py_buffer* out, Py_ssize_t size) noexcept:
    """Whether these are values of the type of out, and not a part of it."""
    return (v.ndim == 1 and v.shape[0] == size and is_float(v) and v.format[0] == out.format[0]
            and apart(v, out))


cdef void run_small(Job* job, const Py_buffer* view) noexcept nogil:
    """Do a call on x, out, gamma, beta and work."""
    job.item = view[0].itemsize
    job.x_row = job.y_row = job.G * job.D * job.item
    job.dy_row = 0
    job.mean = <double*> view[4].buf
    job.m2 = job.mean + job.N * job.G
    job.sums = <double*> job.m2 + job.N * job.G
    job.parts = NULL
    job.storage = NATIVE
    if job.item == sizeof(float):
        run(<const float*> view[0].buf, <const float*> view[0].buf, <float*> view[1].buf,
            <const float*> view[2].buf, <const float*> view[3].buf, job, 1)
    else:
        run(<const double*> view[0].buf, <const double*> view[0].buf, <double*> view[1].buf,
            <const double*> view[2].buf, <const double*> view[3].buf, job, 1)


def small(
    x, out, gamma, beta,
    work,                       # OUT (4, N * G) float64: mean and m2 in rows 0 and 1
    Py_ssize_t N, Py_ssize_t G, Py_ssize_t D, Py_ssize_t S, double eps, bint centred,
):
    """Return whether a forward was a plain small call, and was done."""
    cdef Py_buffer view[5]
    cdef Job job
    cdef int i, taken = 0, flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT
    cdef tuple arrays = (x, out, gamma, beta, work)
    if not 0 < eps < INFINITY or not 0 < N * G * D < SERIAL:
        return False
    job = new_job(N, G, D, S, False, False)
    job.centred = centred
    job.eps = eps
    try:
        for i in range(5):
            if not take(arrays[i], &view[i], flags | (PyBUF_WRITABLE if i in (1, 4) else 0)):
                return False
            taken += 1
        if not (alike(&view[0], &view[1]) and is_vector(&view[2], &view[1], G * job.K)
                and is_vector(&view[3], &view[1], G * job.K)):
            return False
        run_small(&job, view)
        return True
    finally:
        for i in range(taken):
            PyBuffer_Release(&view[i])
