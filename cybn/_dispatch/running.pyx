# cython: language_level=3
# cython: cdivision=True
# cython: binding=False
# What layers do besides a call: update running statistics, and compute marks, which show whether
# an array that backward will read has changed.

from cpython.object cimport PyObject
from libc.string cimport memcpy

from cybn._dispatch.arguments cimport (
    BETA, GAMMA, MEAN, VAR, Call, look, new_vector, rounded, take_vector)
from cybn._dispatch.arrays cimport (
    NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_F_CONTIGUOUS, PyArray_DATA, PyArrayObject, View)
from cybn._kernels.problem cimport Vector

cdef enum:
    MARKED = 2048               # maximum size in bytes of an array that is remembered as a whole
    MARKS = 64                  # stretches of a larger array, about; two values of each are used
    GOLDEN = 40503              # 2**16 times the golden ratio: multiples are spread evenly


cdef int take_running(
    Call* c, object mean, object var, Py_ssize_t channels, Vector* into_mean, Vector* into_var
) except -1:
    """Take running statistics; both must be of one type."""
    take_vector(c, MEAN, "running_mean", mean, channels, True, into_mean)
    take_vector(c, VAR, "running_var", var, channels, True, into_var)
    if into_mean.wide != into_var.wide:
        raise ValueError(f"mean is {mean.dtype} and var is {var.dtype}; they must be of one type")
    return 0


cdef double moved(const Vector* v, Py_ssize_t c, double to, double weight) noexcept:
    """Return value c of running statistics moved towards `to`; a term of weight 0 is ignored."""
    cdef double old = 0
    if weight < 1:
        old = (<const double*> v.data)[c] if v.wide else (<const float*> v.data)[c]
    return old if weight == 0 else (1 - weight) * old + weight * to


cdef tuple moved_to(
    const Vector* mean, const Vector* var, const double* batch_mean, const double* batch_m2,
    Py_ssize_t channels, double degrees, double weight
):
    """Return running statistics moved towards those of a batch, with one rounding from float64."""
    cdef Py_ssize_t c
    held = new_vector(2 * channels, True)
    cdef double* new = <double*> PyArray_DATA(<const PyArrayObject*> held)
    for c in range(channels):
        new[c] = moved(mean, c, batch_mean[c], weight)
        new[channels + c] = moved(var, c, batch_m2[c] / degrees, weight)
    return rounded(new, channels, mean.wide), rounded(new + channels, channels, mean.wide)


def absorb(mean, var, batch_mean, batch_m2, double degrees, double weight):
    """Return running statistics moved towards those of a batch, with one rounding from float64.

    The first four arguments are vectors of the same length. The variance of the batch is
    `batch_m2` / `degrees`. The new mean and variance have the type of `mean`.
    """
    cdef Call c
    cdef Vector old_mean, old_var, new_mean, new_m2
    held = []
    c.held = <PyObject*> held
    channels = len(mean)
    take_running(&c, mean, var, channels, &old_mean, &old_var)
    take_vector(&c, GAMMA, "batch.mean", batch_mean, channels, True, &new_mean)
    take_vector(&c, BETA, "batch.m2", batch_m2, channels, True, &new_m2)
    if not (new_mean.wide and new_m2.wide):
        raise TypeError("batch.mean and batch.m2 must be float64")
    return moved_to(
        &old_mean, &old_var, <const double*> new_mean.data, <const double*> new_m2.data, channels,
        degrees, weight)


def marks(x, gamma, beta, residual):
    """Return a few values of each array, or all of a small one; most changes show in them."""
    return mark(x), mark(gamma), mark(beta), mark(residual)


cdef object mark(object array):
    """Return values of an array as bytes, or None for None."""
    cdef View v
    cdef double some[4 * MARKS]     # values of any type; there may be more than MARKS stretches
    cdef Py_ssize_t i, at, step
    if array is None:
        return None
    look(array, &v)
    if v.size * v.item > MARKED:
        if v.flags & (NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_F_CONTIGUOUS):
            # Two values of each stretch. The first ones are an odd step apart, so that all samples
            # have some, whatever the order in memory. The others are at another place in each
            # stretch, so that many channels have some.
            step = v.size // MARKS | 1
            for i in range((v.size + step - 1) // step):
                memcpy(<char*> some + 2 * i * v.item, v.data + i * step * v.item, v.item)
                at = min(v.size - 1, i * step + i * GOLDEN % step)
                memcpy(<char*> some + (2 * i + 1) * v.item, v.data + at * v.item, v.item)
            return (<const char*> some)[:2 * (i + 1) * v.item]
        few = array[tuple([slice(None, None, n // 2 or 1) for n in array.shape])]
        return few.tobytes()
    if v.flags & NPY_ARRAY_C_CONTIGUOUS:
        return v.data[:v.size * v.item]
    return array.tobytes()
