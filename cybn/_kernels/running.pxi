# Running statistics: (C,) vectors, so the cost is the call. Buffers are taken as in small.pxi.

cdef void move(
    const T* mean, const T* var, const double* batch_mean, const double* batch_m2,
    Py_ssize_t channels, double degrees, double weight, T* new_mean, T* new_var,
) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        new_mean[c] = <T> ((1 - weight) * mean[c] + weight * batch_mean[c])
        new_var[c] = <T> ((1 - weight) * var[c] + weight * (batch_m2[c] / degrees))


def absorb(mean, var, batch_mean, batch_m2, new_mean, new_var, double degrees, double weight):
    """Move running statistics towards those of a batch, in float64, rounded once.

    All are plain and (C,); `batch_mean` and `batch_m2` are float64, the others of one type, and
    the last two are written. `batch_m2` / `degrees` is the variance that is kept.
    """
    cdef Py_buffer view[6]
    cdef int i, taken = 0
    cdef Py_ssize_t wide
    cdef Py_buffer* v = view
    try:
        for array in (mean, var, batch_mean, batch_m2, new_mean, new_var):
            if not take(array, &view[taken], PyBUF_C_CONTIGUOUS | PyBUF_FORMAT):
                raise TypeError("running statistics must be plain arrays")
            taken += 1
        for i in range(1, 6):
            wide = sizeof(double) if i == 2 or i == 3 else v[0].itemsize
            if v[i].ndim != 1 or v[i].shape[0] != v[0].shape[0] or v[i].itemsize != wide:
                raise ValueError("running statistics must be vectors of one length and type")
        if v[0].itemsize == sizeof(float):
            move(<float*> v[0].buf, <float*> v[1].buf, <double*> v[2].buf, <double*> v[3].buf,
                 v[0].shape[0], degrees, weight, <float*> v[4].buf, <float*> v[5].buf)
        else:
            move(<double*> v[0].buf, <double*> v[1].buf, <double*> v[2].buf, <double*> v[3].buf,
                 v[0].shape[0], degrees, weight, <double*> v[4].buf, <double*> v[5].buf)
    finally:
        for i in range(taken):
            PyBuffer_Release(&view[i])
