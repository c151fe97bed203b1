# What every call of the dispatch holds: its arguments as they were given, and as they are used.

from cpython.object cimport PyObject

from cybn._dispatch.arrays cimport Fold, View
from cybn._kernels.problem cimport Rows, Vector
from cybn._kernels.waiting cimport Watch

cdef enum:                  # inputs first: a result must not lie over what stands before it
    X
    DY
    RESIDUAL
    MEAN
    VAR
    GAMMA
    BETA
    OUT
    OUT_RESIDUAL
    SLOTS

cdef struct Argument:
    PyObject* given         # as the caller gave it, or a result that was made; NULL without one
    PyObject* used          # the array that a kernel reads or writes
    View view               # of that array

cdef struct Call:
    Argument at[SLOTS]
    Fold fold               # how x lies
    int axis                # of the channels; for rows 0 where there are none
    bint rows               # the family: channels count as axis 1, and rows may lie apart
    Py_ssize_t counted      # positions that count, and the sum of their weights, if it is said
    double total
    PyObject* like          # x, before it was copied to fold: new results lie as it does
    PyObject* held          # a list of what was made for this call alone

ctypedef void (*Kernel)(const void* problem) noexcept nogil

cdef int begin(Call* c, list held, object x) except -1
cdef bint look(object array, View* v) noexcept
cdef tuple shape_of(const View* v)
cdef int take(Call* c, int k, str name, object value, bint half) except -1
cdef int take_companion(Call* c, int k, str name, object value) except -1
cdef int take_vector(
    Call* c, int k, str name, object value, Py_ssize_t channels, bint needed, Vector* into
) except -1
cdef double take_eps(object eps, bint positive) except -1
cdef int take_output(Call* c, int k, str name, object out) except -1
cdef int keep_apart(Call* c, int k, str name) except -1
cdef int threads_for(const Call* c, object num_threads) except -1
cdef int replace(Call* c, int k, object array) except -1
cdef int settle(Call* c, int k, Rows* rows) except -1
cdef int launch(
    const Call* c, Kernel kernel, void* problem, int* threads, Watch** watch
) except -1
cdef object deliver(Call* c, int k)
cdef object new_vector(Py_ssize_t n, bint wide)
cdef object frozen(const double* values, Py_ssize_t n)
cdef object rounded(const double* values, Py_ssize_t n, bint wide)
cdef object moments_of(object count, object mean, object m2)
