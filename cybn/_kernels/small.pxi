# Small calls: from the checks to the result in one compiled step.
#
# On (32, 16) the arithmetic takes a fraction of a microsecond, while looking at six arrays from
# Python takes several, and six typed memoryviews one and a half. Here each array costs one
# PyObject_GetBuffer, about 0.06 us. Only the plain case is done: plain arrays of float32 or
# float64, C-contiguous and aligned, of few enough elements for one thread. Anything else is
# refused before anything is written; the caller then takes the long way, which gives the same
# bits, or the error that says what is wrong.

include "buffers.pxi"


cdef bint describe(Job* job, const Py_buffer* x, const Py_buffer* out, Py_ssize_t axis) noexcept:
    """Fill in N, C, S and rows; False where x and out are no such pair."""
    cdef Py_ssize_t i
    if x.ndim < 2 or x.ndim != out.ndim or not -x.ndim <= axis < x.ndim:
        return False
    if not (is_float(x) and is_float(out) and x.format[0] == out.format[0]):
        return False
    if x.buf != out.buf and not apart(x, out):
        return False
    axis += x.ndim if axis < 0 else 0
    job.N = job.S = 1
    job.C = x.shape[axis]
    for i in range(x.ndim):
        if x.shape[i] != out.shape[i]:
            return False
        if i < axis:
            job.N *= x.shape[i]
        elif i > axis:
            job.S *= x.shape[i]
    if job.C == 1:  # one channel is one run, as in _layout
        job.S *= job.N
        job.N = 1
    job.M = <double> job.N * <double> job.S
    job.item = x.itemsize
    job.x_row = job.y_row = job.C * job.S * job.item
    return 0 < job.N * job.C * job.S < SERIAL


cdef bint describe_vector(
    Vector* v, const Py_buffer* view, const Py_buffer* out, Py_ssize_t channels
) noexcept:
    """Fill in one value a channel; False where it is not that, or overlaps out."""
    v.data = view.buf
    v.wide = view.itemsize == sizeof(double)
    return (
        view.ndim == 1 and view.shape[0] == channels and is_float(view) and apart(view, out))


cdef bint small(Job* job, tuple arrays, Py_ssize_t axis) except -1:
    """Do a small call on (x, out, mean, var, gamma, beta, work); False where it is none."""
    cdef Py_buffer view[7]
    cdef Vector* vectors[4]
    cdef int i, taken = 0, flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT
    cdef bint fits = 0 <= job.eps < INFINITY
    vectors[0], vectors[1], vectors[2], vectors[3] = &job.mean, &job.var, &job.gamma, &job.beta
    try:
        for i in range(7):
            if arrays[i] is None and i >= 2:
                continue
            fits = fits and take(
                arrays[i], &view[taken], flags | (PyBUF_WRITABLE if i == 1 else 0))
            if not fits:
                return False
            taken += 1
            if i == 1:
                fits = describe(job, &view[0], &view[1], axis)
            elif 2 <= i < 6:
                fits = describe_vector(vectors[i - 2], &view[taken - 1], &view[1], job.C)
        if not fits:
            return False
        if job.reduce == SUMS:
            job.count = job.N * job.S
            job.sums = <double*> view[taken - 1].buf
            job.pivot = job.sums + 2 * job.C
            job.mean.data = job.sums
            job.var.data = job.sums + job.C
            if job.count < 2 or job.eps == 0:
                return False
        if view[0].itemsize == sizeof(float):
            run(<const float*> view[0].buf, <const float*> view[0].buf, <float*> view[1].buf,
                job, 1, 1)
        else:
            run(<const double*> view[0].buf, <const double*> view[0].buf, <double*> view[1].buf,
                job, 1, 1)
        return True
    finally:
        for i in range(taken):
            PyBuffer_Release(&view[i])


def small_inference(
    x, mean, var, gamma, beta, out, Py_ssize_t axis, double eps,
    int activation=0, double slope=0,
):
    """Return whether batch_norm_inference was a plain small call, and was done."""
    cdef Job job = new_job(NO_SUMS, SCALE, eps)
    set_activation(&job, activation, slope)
    return (
        mean is not None and var is not None
        and small(&job, (x, out, mean, var, gamma, beta, None), axis))


def small_forward(
    x, gamma, beta, out, work, Py_ssize_t axis, double eps,
    int activation=0, double slope=0,
):
    """Return whether batch_norm was a plain small call, and was done; work is (3, C)."""
    cdef Job job = new_job(SUMS, SCALE, eps)
    set_activation(&job, activation, slope)
    return small(&job, (x, out, None, None, gamma, beta, work), axis)
