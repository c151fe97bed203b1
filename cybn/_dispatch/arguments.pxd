# The arguments of a call of the dispatch, as they were given and as they are used.

from cpython.object cimport PyObject

from cybn._dispatch.arrays cimport Fold, View
from cybn._kernels.problem cimport Rows, Vector
from cybn._kernels.waiting cimport Watch

cdef enum:                  # inputs first: a result must not overlap an argument before it
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
    PyObject* given         # from the caller, or a new array for a result; NULL if there is none
    PyObject* used          # the array that a kernel reads or writes
    View view               # of that array

cdef struct Call:
    Argument at[SLOTS]
    Fold fold               # how x is folded
    int axis                # of the channels; for rows 0 if there are none
    bint rows               # x has rows: channels are taken as axis 1, and rows may have gaps
    Py_ssize_t counted      # unmasked positions, if there is a mask, weights or lengths
    double total            # the sum of their weights
    PyObject* like          # x before it was copied to fold; new results have its memory layout
    PyObject* held          # a list of the arrays that were made for this call only

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
