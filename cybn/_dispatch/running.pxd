from cybn._dispatch.arguments cimport Call
from cybn._kernels.problem cimport Vector

cdef int take_running(
    Call* c, object mean, object var, Py_ssize_t channels, Vector* into_mean, Vector* into_var
) except -1
cdef tuple moved_to(
    const Vector* mean, const Vector* var, const double* batch_mean, const double* batch_m2,
    Py_ssize_t channels, double degrees, double weight
)
