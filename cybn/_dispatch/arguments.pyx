# cython: language_level=3
# cython: cdivision=True
# cython: binding=False
# The arguments of a call, handled in the same way by all calls of the dispatch.
#
# take...       check an argument, and convert it if a kernel cannot read it
# take_output   check the array for a result, which must not overlap an input
# settle        describe an array as rows; if its memory layout is not that of x, replace it by a
#               stand-in, a temporary array that has this layout
# deliver       return a result, copied from its stand-in if it has one
#
# Nothing is written before every check has passed.

from cpython.object cimport PyTypeObject
from libc.math cimport INFINITY
from libc.string cimport memcpy

from cybn._dispatch.arrays cimport (
    NPY_ARRAY_ALIGNED, NPY_ARRAY_WRITEABLE, NPY_DOUBLE, NPY_FLOAT, NPY_HALF, PyArray_CLEARFLAGS,
    PyArray_DATA, PyArray_DIMS, PyArray_FLAGS, PyArray_ISNOTSWAPPED, PyArray_NDIM, PyArray_STRIDES,
    PyArray_TYPE, PyArrayObject, apart, channels_first, lies, same_place, same_shape)
from cybn._kernels.problem cimport BRAIN, FLOAT32, FLOAT64, HALF, SERIAL
from cybn._kernels.waiting cimport Patience, Watch, learn, seconds, threads_now

from numpy import copyto, ndarray, shares_memory
from numpy.exceptions import TooHardError

from .. import _arguments
from .._memory import LEAST, empty_like as kept_empty_like
from .._runtime import thread_count

cdef extern from "numpy/arrayobject.h":
    int _import_array() except -1
    Py_ssize_t PyArray_ITEMSIZE(const PyArrayObject*) noexcept
    object PyArray_SimpleNew(int ndim, Py_ssize_t* shape, int kind)
    object PyArray_NewLikeArray(PyArrayObject* like, int order, void* dtype, bint subok)
    enum:
        NPY_KEEPORDER

cdef extern from "Python.h":
    object PyType_GenericAlloc(PyTypeObject* type, Py_ssize_t items)
    int PyObject_GenericSetAttr(object self, object name, object value) except -1

_import_array()

cdef int bfloat16 = -1          # number of this type in NumPy, once a call has had an array of it
cdef object Moments = None      # the class
cdef Patience patience          # whether calls use several threads now; zero at the start


def use_moments(type moments):
    """Set the class of the statistics that calls return."""
    global Moments
    Moments = moments


# ---- inputs ------------------------------------------------------------------------------

cdef int begin(Call* c, list held, object x) except -1:
    """Begin a call whose only argument so far is x, any float array.

    The list `held` must exist as long as the call.
    """
    cdef int k
    for k in range(SLOTS):
        c.at[k].given = c.at[k].used = NULL
    c.axis = c.rows = 0
    c.held = <PyObject*> held
    take(c, X, "x", x, True)
    c.like = c.at[X].used
    return 0


cdef bint look(object array, View* v) noexcept:
    """Fill in the view of an array; return whether a kernel can read it: aligned native floats."""
    cdef const PyArrayObject* a = <const PyArrayObject*> array
    cdef int i, kind = PyArray_TYPE(a)
    v.flags, v.item, v.size = PyArray_FLAGS(a), PyArray_ITEMSIZE(a), 1
    v.data, v.ndim = <char*> PyArray_DATA(a), PyArray_NDIM(a)
    for i in range(v.ndim):
        v.shape[i], v.strides[i] = PyArray_DIMS(a)[i], PyArray_STRIDES(a)[i]
        v.size *= v.shape[i]
    v.ready = v.flags & NPY_ARRAY_ALIGNED and PyArray_ISNOTSWAPPED(a)
    if kind == NPY_FLOAT:
        v.storage = FLOAT32
    elif kind == NPY_DOUBLE:
        v.storage = FLOAT64
    elif kind == NPY_HALF:
        v.storage = HALF
    elif kind == bfloat16:
        v.storage = BRAIN
    else:
        v.ready = False
    return v.ready


cdef tuple shape_of(const View* v):
    return tuple([v.shape[i] for i in range(v.ndim)])


cdef int take(Call* c, int k, str name, object value, bint half) except -1:
    """Take an array of floats, and convert it if a kernel cannot read it."""
    global bfloat16
    cdef Argument* a = &c.at[k]
    a.given = <PyObject*> value
    if not (type(value) is ndarray and look(value, &a.view) and (
            half or a.view.storage <= FLOAT64)):
        value = _arguments.tensor(name, value, half)
        (<list> c.held).append(value)
        if not look(value, &a.view):
            bfloat16 = PyArray_TYPE(<const PyArrayObject*> value)
            look(value, &a.view)
    a.used = <PyObject*> value
    return 0


cdef int replace(Call* c, int k, object array) except -1:
    """Use another array instead of an argument."""
    (<list> c.held).append(array)
    c.at[k].used = <PyObject*> array
    look(array, &c.at[k].view)
    return 0


cdef int take_companion(Call* c, int k, str name, object value) except -1:
    """Take an array that must have the shape and dtype of x, or None."""
    if value is None:
        return 0
    take(c, k, name, value, True)
    return check_like(c, name, <object> c.at[k].used, &c.at[k].view)


cdef int check_like(Call* c, str name, object array, const View* v) except -1:
    """Raise ValueError unless an array has the shape and dtype of x."""
    cdef const View* x = &c.at[X].view
    like = <object> c.at[X].used
    if not same_shape(v, x):
        raise ValueError(
            f"{name} has shape {array.shape}; it must have the shape of x, {like.shape}")
    if not (v.ready and v.storage == x.storage) and array.dtype != like.dtype:
        raise ValueError(f"{name} is {array.dtype}; it must have the dtype of x, {like.dtype}")
    return 0


cdef int take_vector(
    Call* c, int k, str name, object value, Py_ssize_t channels, bint needed, Vector* into
) except -1:
    """Take one value per channel as a dense vector (channels,), or None unless `needed`."""
    cdef View* v = &c.at[k].view
    if value is None:
        if needed:
            raise TypeError(
                f"{name} is None; it must have shape ({channels},), one value a channel")
        into.data = NULL
        return 0
    take(c, k, name, value, False)
    if v.ndim != 1 or v.shape[0] != channels:
        raise ValueError(
            f"{name} has shape {shape_of(v)}; it must have shape ({channels},), "
            "one value a channel")
    if channels > 1 and v.strides[0] != v.item:
        replace(c, k, (<object> c.at[k].used).copy())
    into.data, into.wide = v.data, v.storage == FLOAT64
    return 0


cdef double take_eps(object eps, bint positive) except -1:
    if type(eps) is not float or not 0 < eps < INFINITY:
        _arguments.check_eps(eps, None if positive else 0)
    return eps


cdef int threads_for(const Call* c, object num_threads) except -1:
    """Return the threads of a call; a small call has one, without looking up how many there are."""
    if num_threads is None and c.at[X].view.size < SERIAL:
        return 1
    return thread_count(num_threads)


# ---- outputs -----------------------------------------------------------------------------

cdef int take_output(Call* c, int k, str name, object out) except -1:
    """Take the array for a result, or make one with the memory layout that x was given in."""
    cdef Argument* a = &c.at[k]
    cdef const View* x = &c.at[X].view
    if out is None:
        like = <object> c.like
        out = new_like(like) if x.size * x.item < LEAST else kept_empty_like(like)
        a.given = <PyObject*> out
        replace(c, k, out)
        if not same_shape(&a.view, x):
            raise RuntimeError("x was given another shape during the call, by another thread")
        return 0
    if not isinstance(out, ndarray) or _arguments.is_masked(out):
        raise TypeError(
            f"{name} is of type {type(out).__name__}; it must be a plain NumPy array")
    a.given = a.used = <PyObject*> out
    look(out, &a.view)
    check_like(c, name, out, &a.view)
    if not a.view.flags & NPY_ARRAY_WRITEABLE:
        raise ValueError(f"{name} is read-only; give an array that may be written to")
    return keep_apart(c, k, name)


def destination(out, x, tuple inputs, str name="out", bint may_be_input=True):
    """Return the array for a result like x that is written in parts: `out`, or a new array."""
    cdef Call c
    cdef int k = OUT if may_be_input else OUT_RESIDUAL
    held = []
    begin(&c, held, x)
    for i, array in enumerate(inputs, X + 1):
        if isinstance(array, ndarray):
            c.at[<int> i].given = <PyObject*> array
            replace(&c, i, array)
    take_output(&c, k, name, out)
    _arguments.check_places(name, <object> c.at[k].given)
    return <object> c.at[k].given


cdef int keep_apart(Call* c, int k, str name) except -1:
    """Raise ValueError if a result overlaps an input; y or dx may be the input itself.

    Inputs are checked as they are used and as they were given, because a copy does not share
    memory with the original.
    """
    cdef Argument* input
    cdef View view
    cdef int i
    cdef bint itself = k == OUT
    for i in range(k):
        input = &c.at[i]
        if input.given == NULL or (itself and c.at[k].given == input.given):
            continue
        over = lies_over(&c.at[k], &input.view, <object> input.used, itself)
        if not over and input.given != input.used and isinstance(<object> input.given, ndarray):
            look(<object> input.given, &view)
            over = lies_over(&c.at[k], &view, <object> input.given, itself)
        if over:
            raise ValueError(
                f"{name} overlaps an input{' in part' * itself}, and would overwrite values not "
                f"yet read; give {'the input itself, or ' * itself}memory of its own")
    return 0


cdef bint lies_over(const Argument* out, const View* v, object array, bint itself) except -1:
    """Return whether a result overlaps an array; if `itself`, the same values are no overlap."""
    if out.given == <PyObject*> array:
        return True
    if apart(&out.view, v):
        return False
    if itself and out.view.item == v.item and same_shape(&out.view, v) and (
            same_place(&out.view, v)):
        return False
    try:
        return shares_memory(<object> out.given, array, _arguments.MOST_WORK)
    except TooHardError:
        return True


# ---- memory layout -----------------------------------------------------------------------

cdef int settle(Call* c, int k, Rows* rows) except -1:
    """Describe an array as rows; replace it by a stand-in if it does not have the layout of x."""
    cdef Argument* a = &c.at[k]
    if a.given == NULL or placed(c, a, rows):
        return 0
    stand_in = new_like(<object> c.at[X].used)
    if k < OUT:
        copyto(stand_in, <object> a.used)
    else:
        _arguments.check_places("out" if k == OUT else "out_residual", <object> a.given)
    replace(c, k, stand_in)
    placed(c, a, rows)
    return 0


cdef bint placed(Call* c, Argument* a, Rows* rows) noexcept:
    """Describe an array as rows; return whether a kernel can use it without a copy."""
    if c.rows and c.axis:
        channels_first(&a.view, c.axis)
    rows.at = a.view.data
    return a.view.ready and lies(&a.view, &c.fold, c.rows, &rows.pitch)


cdef object deliver(Call* c, int k):
    """Return the array that the caller gets, with the result in it."""
    out = <object> c.at[k].given
    if c.at[k].given != c.at[k].used:
        copyto(out, <object> c.at[k].used)
    return out


# ---- run a kernel ------------------------------------------------------------------------

cdef int launch(
    const Call* c, Kernel kernel, void* problem, int* threads, Watch** watch
) except -1:
    """Run a kernel; `threads` and `watch` are those of the problem.

    The GIL is released meanwhile, but not for small calls, where this would take as long.
    """
    cdef Watch times
    if c.at[X].view.size < SERIAL:
        kernel(problem)
        return 0
    threads[0] = threads_now(&patience, threads[0])
    if threads[0] > 1:
        watch[0], times.worked, times.begun = &times, 0, seconds()
    with nogil:
        kernel(problem)
    if threads[0] > 1:
        times.took = seconds() - times.begun
        learn(&patience, &times)
    return 0


# ---- new arrays --------------------------------------------------------------------------

cdef object new_like(object x):
    """Return a new array with the memory layout of x."""
    return PyArray_NewLikeArray(<PyArrayObject*> x, NPY_KEEPORDER, NULL, False)


cdef object new_vector(Py_ssize_t n, bint wide):
    """Return a new array (n,) of float64 or float32."""
    return PyArray_SimpleNew(1, &n, NPY_DOUBLE if wide else NPY_FLOAT)


cdef object frozen(const double* values, Py_ssize_t n):
    """Return a read-only array (n,)."""
    array = new_vector(n, True)
    memcpy(PyArray_DATA(<const PyArrayObject*> array), values, n * sizeof(double))
    PyArray_CLEARFLAGS(<PyArrayObject*> array, NPY_ARRAY_WRITEABLE)
    return array


cdef object rounded(const double* values, Py_ssize_t n, bint wide):
    """Return an array (n,) of float64 or float32; values too large for float32 become infinite."""
    cdef Py_ssize_t i
    array = new_vector(n, wide)
    data = PyArray_DATA(<const PyArrayObject*> array)
    if wide:
        memcpy(data, values, n * sizeof(double))
    else:
        for i in range(n):
            (<float*> data)[i] = <float> values[i]
    return array


cdef object moments_of(object count, object mean, object m2):
    """Return `Moments` of read-only arrays."""
    moments = PyType_GenericAlloc(<PyTypeObject*> Moments, 0)
    PyObject_GenericSetAttr(moments, "count", count)
    PyObject_GenericSetAttr(moments, "mean", mean)
    PyObject_GenericSetAttr(moments, "m2", m2)
    PyObject_GenericSetAttr(moments, "_rest", None)
    return moments
