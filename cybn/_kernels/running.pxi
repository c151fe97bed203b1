# Running statistics: (C,) vectors, so the cost is the call. Arrays are looked at as in plain.pxi.

cdef void move(
    const T* mean, const T* var, const double* batch_mean, const double* batch_m2,
    Py_ssize_t channels, double degrees, double weight, T* new_mean, T* new_var,
) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        new_mean[c] = <T> ((1 - weight) * mean[c] + weight * batch_mean[c])
        new_var[c] = <T> ((1 - weight) * var[c] + weight * (batch_m2[c] / degrees))


def absorb(mean, var, batch_mean, batch_m2, double degrees, double weight):
    """Move running statistics towards those of a batch, in float64, rounded once.

    All are (C,); `batch_mean` and `batch_m2` are float64, the others of one type. `batch_m2` /
    `degrees` is the variance that is kept. Returns the new mean and variance; None where `mean`
    or `var` is no plain array.
    """
    cdef Vector old_mean, old_var, of_mean, of_m2
    cdef View v
    if not (look(var, &v) and look(mean, &v)):
        return None
    if batch_mean is None or batch_m2 is None or v.ndim != 1:
        raise TypeError("running statistics must be vectors")
    moved = empty((2, v.values), mean.dtype)
    cdef Py_ssize_t channels = v.values
    cdef bint wide = v.item == sizeof(double)
    look(moved, &v)
    if not (vector_of(&old_mean, mean, channels, &v) and vector_of(&old_var, var, channels, &v)
            and vector_of(&of_mean, batch_mean, channels, &v)
            and vector_of(&of_m2, batch_m2, channels, &v)):
        raise ValueError("running statistics must be contiguous vectors of one length")
    if old_var.wide != wide or not of_mean.wide or not of_m2.wide:
        raise ValueError("running statistics must be of one type, those of a batch float64")
    if wide:
        move(<const double*> old_mean.data, <const double*> old_var.data,
             <const double*> of_mean.data, <const double*> of_m2.data, channels, degrees, weight,
             <double*> v.data, <double*> v.data + channels)
    else:
        move(<const float*> old_mean.data, <const float*> old_var.data,
             <const double*> of_mean.data, <const double*> of_m2.data, channels, degrees, weight,
             <float*> v.data, <float*> v.data + channels)
    return moved[0], moved[1]
