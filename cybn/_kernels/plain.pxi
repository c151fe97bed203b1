# Plain calls: from the checks to the result in one compiled step.
#
# Looking at six arrays from Python, folding them and making six typed memoryviews takes some 20 us,
# as long as normalizing 100,000 values. So this reads the fields of NumPy's arrays, whose places
# are fixed; it calls nothing of NumPy's C API. Only the plain case is done: plain arrays of float32
# or float64, aligned, dense in any order of their axes; no residual, no mask. Anything else is
# refused, with None, before anything is written; the caller then takes the long way, which gives
# the same bits, or the error that says what is wrong.

from cpython.long cimport PyLong_AsLongAndOverflow
from libc.stdlib cimport free, malloc

from numpy import empty, empty_like, ndarray

cdef object large_like, thread_count    # of rooms above this one

cdef extern from *:
    """
    #define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
    #include <numpy/ndarraytypes.h>
    """
    ctypedef struct PyArrayObject
    enum:
        NPY_FLOAT
        NPY_DOUBLE
        NPY_ARRAY_ALIGNED
        NPY_ARRAY_WRITEABLE
    int PyArray_TYPE(const PyArrayObject*) noexcept
    int PyArray_FLAGS(const PyArrayObject*) noexcept
    bint PyArray_ISNOTSWAPPED(const PyArrayObject*) noexcept
    int PyArray_NDIM(const PyArrayObject*) noexcept
    Py_ssize_t* PyArray_DIMS(const PyArrayObject*) noexcept
    Py_ssize_t* PyArray_STRIDES(const PyArrayObject*) noexcept
    void* PyArray_DATA(const PyArrayObject*) noexcept
    void PyArray_CLEARFLAGS(PyArrayObject*, int) noexcept


def connect(results, threads):
    """Set what makes a large result like an array, and what turns num_threads into a number."""
    global large_like, thread_count
    large_like = results
    thread_count = threads


cdef struct View:
    char* data
    int ndim
    const Py_ssize_t* shape
    const Py_ssize_t* strides
    Py_ssize_t item, values


cdef bint look(object array, View* v, int need=NPY_ARRAY_ALIGNED):
    """Look at a plain array of native, aligned floats; False where it is none."""
    cdef const PyArrayObject* a = <const PyArrayObject*> array
    cdef int i
    if type(array) is not ndarray or PyArray_FLAGS(a) & need != need:
        return False
    if not (PyArray_TYPE(a) in (NPY_FLOAT, NPY_DOUBLE) and PyArray_ISNOTSWAPPED(a)):
        return False
    v.data = <char*> PyArray_DATA(a)
    v.ndim = PyArray_NDIM(a)
    v.shape = PyArray_DIMS(a)
    v.strides = PyArray_STRIDES(a)
    v.item = sizeof(float) if PyArray_TYPE(a) == NPY_FLOAT else sizeof(double)
    v.values = 1
    for i in range(v.ndim):
        v.values *= v.shape[i]
    return True


cdef inline bint apart(const View* a, const View* b) noexcept:
    """Whether two dense arrays share no byte."""
    return (
        a.data + a.values * a.item <= b.data or b.data + b.values * b.item <= a.data)


cdef inline bint alike(const View* a, const View* b) noexcept:
    """Whether two arrays have one type and shape, and lie in memory alike."""
    cdef int i
    if a.ndim != b.ndim or a.item != b.item:
        return False
    for i in range(a.ndim):
        if a.shape[i] != b.shape[i] or (a.strides[i] != b.strides[i] and a.shape[i] != 1):
            return False
    return True


cdef inline Py_ssize_t axis_of(const View* x, Py_ssize_t stride) noexcept:
    """The axis with steps of `stride` bytes, or -1."""
    cdef Py_ssize_t i
    for i in range(x.ndim - 1, -1, -1):
        if x.strides[i] == stride and x.shape[i] > 1:
            return i
    return -1


cdef bint describe(Job* job, const View* x, Py_ssize_t axis) noexcept:
    """Fill in N, C, S and rows; False where x is empty, or not dense."""
    cdef Py_ssize_t at, inside = 1
    if x.ndim < 2 or not -x.ndim <= axis < x.ndim or x.values <= 0:
        return False
    axis += x.ndim if axis < 0 else 0
    job.C = x.shape[axis]
    job.S = x.values if job.C == 1 else 0  # one channel is one run, as in _layout
    while inside < x.values:
        at = axis_of(x, inside * x.item)
        if at < 0:
            return False
        if at == axis:
            job.S = inside
        inside *= x.shape[at]
    job.N = x.values // (job.C * job.S)
    job.M = <double> job.N * <double> job.S
    job.item = x.item
    job.x_row = job.y_row = job.dy_row = job.C * job.S * job.item
    return True


cdef bint options(Job* job, object eps, tuple act, object num_threads):
    """Fill in eps and the activation; False where one is of another type than it should be."""
    if type(eps) is not float:
        return False
    job.eps = eps
    if not 0 <= job.eps < INFINITY:
        return False
    set_activation(job, act[0], act[1])
    return num_threads is None or (type(num_threads) is int and num_threads > 0)


cdef bint tensor(Job* job, View* v, object x, object axis):
    """Take x; False where it is no plain array, or has no such axis."""
    cdef int overflow = 0
    cdef long at
    if type(axis) is not int or not look(x, v):
        return False
    at = PyLong_AsLongAndOverflow(axis, &overflow)
    return overflow == 0 and describe(job, v, at)


cdef bint result_of(View* v, object out, const View* x):
    """Take where a result like x goes: apart from x, or x itself."""
    return (
        look(out, v, NPY_ARRAY_ALIGNED | NPY_ARRAY_WRITEABLE) and alike(v, x)
        and (v.data == x.data or apart(v, x)))


cdef bint vector_of(Vector* vector, object array, Py_ssize_t channels, const View* out):
    """Take one value a channel, or None; False where it is not that, or overlaps out."""
    cdef View v
    if array is None:
        return True
    if not look(array, &v) or v.ndim != 1 or v.shape[0] != channels:
        return False
    vector.data = v.data
    vector.wide = v.item == sizeof(double)
    return (channels == 1 or v.strides[0] == v.item) and apart(&v, out)


cdef object result(Job* job, View* at_x, View* at_y, object x, object axis, object out):
    """Return where the result goes, `out` or a new array, and take it; None where it will not do.

    A large array is made in Python, where another thread may come between and reshape x, whose
    shape then lies elsewhere: so x is taken again.
    """
    if out is None:
        out = empty_like(x) if at_x.values < SERIAL else large_like(x)
        if not tensor(job, at_x, x, axis):
            return None
    return out if result_of(at_y, out, at_x) else None


cdef int threads_for(const View* x, object num_threads) except -1:
    """Threads for a call; a small one has one, and need not ask how many there are."""
    return 1 if x.values < SERIAL else thread_count(num_threads)


cdef double* new_sums(Job* job, Py_ssize_t chunks) except NULL:
    """Room for the sums of each chunk and the pivots, to be freed; results in its first rows."""
    cdef double* sums = <double*> malloc((2 * chunks + 1) * job.C * sizeof(double))
    if sums == NULL:
        raise MemoryError(f"no memory for the sums of {job.C} channels")
    job.sums = sums
    job.pivot = sums + 2 * chunks * job.C
    return sums


cdef inline void run_plain(
    const View* x, const View* dy, View* y, Job* job, Py_ssize_t chunks, int threads
) noexcept nogil:
    if job.item == sizeof(float):
        run(<const float*> x.data, <const float*> dy.data, <float*> y.data, job, chunks, threads)
    else:
        run(<const double*> x.data, <const double*> dy.data, <double*> y.data, job, chunks, threads)


cdef void run_view(
    const View* x, const View* dy, View* y, Job* job, Py_ssize_t chunks, int threads
):
    """Run; others may use Python meanwhile, unless that takes as long to arrange."""
    if x.values < SERIAL:
        run_plain(x, dy, y, job, chunks, threads)
    else:
        with nogil:
            run_plain(x, dy, y, job, chunks, threads)


def plain_inference(x, mean, var, gamma, beta, axis, eps, tuple act, out, num_threads):
    """Return y of a plain batch_norm_inference, or None."""
    cdef Job job = new_job(NO_SUMS, SCALE, 0)
    cdef View at_x, at_y
    if not (options(&job, eps, act, num_threads) and tensor(&job, &at_x, x, axis)):
        return None
    if mean is None or var is None:
        return None
    out = result(&job, &at_x, &at_y, x, axis, out)
    if out is None:
        return None
    if not (vector_of(&job.mean, mean, job.C, &at_y) and vector_of(&job.var, var, job.C, &at_y)
            and vector_of(&job.gamma, gamma, job.C, &at_y)
            and vector_of(&job.beta, beta, job.C, &at_y)):
        return None
    run_view(&at_x, &at_x, &at_y, &job, chunks_of(job.N, job.C, job.S),
             threads_for(&at_x, num_threads))
    return out


def plain_forward(x, gamma, beta, axis, eps, tuple act, out, num_threads):
    """Return y of a plain batch_norm, a frozen array of mean and m2, and N * S, or None."""
    cdef Job job = new_job(SUMS, SCALE, 0)
    cdef View at_x, at_y, at_work
    cdef Py_ssize_t chunks
    cdef int threads
    cdef double* sums
    if not (options(&job, eps, act, num_threads) and tensor(&job, &at_x, x, axis)):
        return None
    out = result(&job, &at_x, &at_y, x, axis, out)
    if out is None or job.M < 2 or job.eps == 0:
        return None
    if not (vector_of(&job.gamma, gamma, job.C, &at_y)
            and vector_of(&job.beta, beta, job.C, &at_y)):
        return None
    work = empty((2, job.C))
    look(work, &at_work)
    threads = threads_for(&at_x, num_threads)
    chunks = chunks_of(job.N, job.C, job.S)
    sums = new_sums(&job, chunks)
    job.mean.data = job.sums
    job.var.data = job.sums + job.C
    job.count = job.M
    run_view(&at_x, &at_x, &at_y, &job, chunks, threads)
    memcpy(at_work.data, sums, 2 * job.C * sizeof(double))
    free(sums)
    PyArray_CLEARFLAGS(<PyArrayObject*> work, NPY_ARRAY_WRITEABLE)
    return out, work, job.N * job.S


def plain_backward(
    dy, x, mean, var, bint through_statistics, gamma, beta, axis, eps, tuple act, out, num_threads,
):
    """Return dx, dgamma and dbeta of a plain backward, or None."""
    cdef Job job = new_job(DOTS, UNSCALE if through_statistics else SCALE_DY, 0)
    cdef View at_x, at_dy, at_dx, at_mean, into
    cdef Py_ssize_t chunks
    cdef int threads
    cdef double* sums
    if not (options(&job, eps, act, num_threads) and tensor(&job, &at_x, x, axis)):
        return None
    if mean is None or var is None:
        return None
    out = result(&job, &at_x, &at_dx, x, axis, out)
    if out is None or (through_statistics and (job.M < 2 or job.eps == 0)):
        return None
    if not (look(dy, &at_dy) and alike(&at_dy, &at_x)
            and (at_dx.data == at_dy.data or apart(&at_dx, &at_dy))):
        return None
    if not (vector_of(&job.mean, mean, job.C, &at_dx) and vector_of(&job.var, var, job.C, &at_dx)
            and vector_of(&job.gamma, gamma, job.C, &at_dx)
            and vector_of(&job.beta, beta, job.C, &at_dx)):
        return None
    if through_statistics:
        job.count = job.M
    gradients = empty((2, job.C), (x if gamma is None else gamma).dtype)
    look(gradients, &into)
    threads = threads_for(&at_x, num_threads)
    chunks = chunks_of(job.N, job.C, job.S)
    if not job.mean.wide:  # reduce takes them as float64
        means = mean.astype("d")
        look(means, &at_mean)
        job.mean = vector(<const double*> at_mean.data)
    sums = new_sums(&job, chunks)
    run_view(&at_x, &at_dy, &at_dx, &job, chunks, threads)
    if into.item == sizeof(float):
        put_gradients(sums, job.C, <float*> into.data)
    else:
        put_gradients(sums, job.C, <double*> into.data)
    free(sums)
    return out, gradients[0], gradients[1]


cdef inline void put_gradients(const double* sums, Py_ssize_t channels, T* into) noexcept:
    """dbeta and dgamma, in which order sums has them, as dgamma and dbeta."""
    cdef Py_ssize_t c
    for c in range(channels):
        into[c] = <T> sums[channels + c]
        into[channels + c] = <T> sums[c]
