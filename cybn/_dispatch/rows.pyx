# cython: language_level=3
# cython: cdivision=True
# cython: binding=False
# From the arguments of a public call to a kernel call: layer, RMS, group and instance
# normalization. The steps are those of batch_norm.pyx, but x is divided into rows (forms.py).
#
# N = samples, G = groups of a sample, D = K * S values of a group, S = neighbouring values that
# share a gamma.

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.string cimport memchr, memset

from cybn._dispatch.arguments cimport (
    BETA, DY, GAMMA, MEAN, OUT, VAR, Call, Kernel, X, begin, deliver, launch, moments_of,
    new_vector, replace, rounded, settle, take, take_companion, take_eps, take_output,
    threads_for)
from cybn._dispatch.arrays cimport (
    NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_WRITEABLE, PyArray_CLEARFLAGS, PyArray_DATA, PyArrayObject,
    View, channels_first, fold_rows)
from cybn._kernels.problem cimport FLOAT64
from cybn._kernels.row_problem cimport Kernels, RowProblem, RowTiling, row_tiling

from numpy import ascontiguousarray, errstate, flatnonzero, frombuffer, moveaxis, zeros

from .. import _arguments
from .forms import constant, form_of, ordered

cdef const Kernels* kernels = NULL


def use(capsule):
    """Call the kernels of one instruction level from now on."""
    global kernels
    kernels = <const Kernels*> PyCapsule_GetPointer(capsule, "cybn.kernels")


# ---- the steps ---------------------------------------------------------------------------

cdef object prepare(
    Call* c, RowProblem* p, list held, object x, tuple settings, object gamma, object num_threads
):
    """Take the arguments that both calls have, and return the form of x.

    `settings` are axis, num_groups and eps.
    """
    axis, num_groups, eps = settings
    begin(c, held, x)
    c.rows = True
    form = form_of((<object> c.at[X].used).shape, axis, num_groups)
    dtype = dtype_of(c)
    if eps is None and not p.centred:
        eps = _arguments.EPS[dtype]
    p.eps = take_eps(eps, True)
    p.storage, p.item = c.at[X].view.storage, c.at[X].view.item
    p.gamma = take_parameter(c, GAMMA, "gamma", gamma, form, dtype)
    p.threads = threads_for(c, num_threads)
    return form


cdef object dtype_of(const Call* c):
    """Return the type of the computation."""
    return _arguments.F64 if c.at[X].view.storage == FLOAT64 else _arguments.F32


cdef const void* take_parameter(
    Call* c, int k, str name, object value, object form, object dtype
) except NULL:
    """Take gamma or beta as a vector of the type of the computation; None stands for 1 or 0."""
    cdef View* v = &c.at[k].view
    if value is None:
        replace(c, k, constant(form.values, dtype, name == "gamma"))
        return v.data
    take(c, k, name, value, False)
    given = <object> c.at[k].used
    if given.shape != form.shape:
        each = "a channel" if form.axis else "an element of the normalized axes"
        raise ValueError(
            f"{name} has shape {given.shape}; it must have shape {form.shape}, one value {each}")
    if given.dtype != dtype or not v.flags & NPY_ARRAY_C_CONTIGUOUS:
        with errstate(all="ignore"):        # a value too large for float32 becomes inf
            replace(c, k, given.astype(dtype, order="C"))
    return v.data


cdef int fold_x(Call* c, RowProblem* p, object form) except -1:
    """Fold x into rows; copy it first if necessary."""
    cdef int axis = form.axis, lead = form.lead
    cdef bint last
    c.axis = axis
    for turn in range(3):
        if axis:
            channels_first(&c.at[X].view, axis)
        if fold_rows(&c.at[X].view, lead, axis > 0, &last, &c.fold):
            break
        x = <object> c.at[X].used
        if turn == 0 and axis:
            x = x.copy("K")
        elif axis and axis != x.ndim - 1:
            x = moveaxis(ascontiguousarray(moveaxis(x, axis, 1)), 1, axis)
        else:
            x = ascontiguousarray(x)
        replace(c, X, x)
    p.N, p.G, p.D, p.S = form.samples, form.groups, form.size, form.run
    p.K = p.D // p.S
    p.last = last
    p.x.at, p.x.pitch = c.at[X].view.data, c.fold.pitch
    return 0


cdef object run(Call* c, RowProblem* p, RowTiling* t):
    """Describe all arrays as rows, run a kernel, and return the array of its sums."""
    settle(c, DY, &p.dy)
    settle(c, OUT, &p.y)
    t[0] = row_tiling(p)
    cdef Py_ssize_t rows = 2 * p.N * p.G * t.slots
    cdef Py_ssize_t parts = 2 * t.chunks * p.G * p.K if p.backward else 0
    sums = new_vector(rows + parts + (p.N * p.G + 7) // 8, True)
    p.sums = doubles(sums)
    p.parts = p.sums + rows
    p.left = <char*> (p.parts + parts)
    launch(c, <Kernel> kernels.rows, p, &p.threads, &p.watch)
    return sums


cdef object rows_left(
    Call* c, const RowProblem* p, object form, object mean, object m2, object dy
):
    """Return the rows that a kernel has left out, with their inputs; None if there are none.

    `mean` and `m2` are in the order of the rows in memory.
    """
    if memchr(p.left, 1, p.N * p.G) == NULL:
        return None
    from . import beyond

    marks = frombuffer((<const char*> p.left)[:p.N * p.G], "b")
    marks, mean, m2 = (in_order(c, form, v, False) for v in (marks, mean, m2))
    return beyond.Rows(
        form, flatnonzero(marks), <object> c.at[X].used, dy, <object> c.at[OUT].used, mean, m2,
        <object> c.at[GAMMA].used, None if c.at[BETA].used == NULL else <object> c.at[BETA].used,
        p.eps, p.centred)


cdef double* doubles(object array) noexcept:
    return <double*> PyArray_DATA(<const PyArrayObject*> array)


cdef object in_order(Call* c, object form, object values, bint to_rows):
    """Return one value per row, in the order of memory if `to_rows`, else in that of x's axes."""
    if c.fold.split < 2:
        return values
    order = tuple([c.fold.order[k] for k in range(c.fold.split)])
    return ordered(values, (<object> c.like).shape[:form.lead], order, to_rows)


cdef object freeze(object array):
    PyArray_CLEARFLAGS(<PyArrayObject*> array, NPY_ARRAY_WRITEABLE)
    return array


cdef object write_left(object left):
    """Write y of rows that were left out; return the standard deviations of all rows."""
    from .beyond import forward_rows

    return forward_rows(left)


cdef int add_left(object left, double* parts, Py_ssize_t channels) except -1:
    """Write dx of rows that were left out, and add their share of dgamma and dbeta."""
    from .beyond import backward_rows

    cdef Py_ssize_t i
    dgamma, dbeta = backward_rows(left)
    for i in range(channels):
        parts[i] += <double> dgamma[i]
        parts[channels + i] += <double> dbeta[i]
    return 0


# ---- the calls ---------------------------------------------------------------------------

def normalize_rows(x, gamma, beta, settings, bint centred, out, num_threads):
    """Return y and the moments of the rows, (N * G,); `settings` are axis, num_groups and eps."""
    cdef Call c
    cdef RowProblem p
    cdef RowTiling t
    memset(&p, 0, sizeof(p))
    p.centred = centred
    held = []
    form = prepare(&c, &p, held, x, settings, gamma, num_threads)
    p.beta = take_parameter(&c, BETA, "beta", beta, form, dtype_of(&c))
    take_output(&c, OUT, "out", out)
    if c.at[X].view.size == 0:
        nothing = freeze(zeros(form.rows))
        return deliver(&c, OUT), moments_of(form.size, nothing, nothing)
    fold_x(&c, &p, form)
    mean, m2 = new_vector(form.rows, True), new_vector(form.rows, True)
    p.mean, p.m2 = doubles(mean), doubles(m2)
    _sums = run(&c, &p, &t)
    left = rows_left(&c, &p, form, mean, m2, None)
    std = None if left is None else write_left(left)
    mean, m2 = in_order(&c, form, mean, False), in_order(&c, form, m2, False)
    moments = moments_of(form.size, freeze(mean), freeze(m2))
    if std is not None:
        moments._tell(std)
    return deliver(&c, OUT), moments


def normalize_rows_backward(
    dy, x, check, statistics, gamma, settings, bint centred, out, num_threads,
):
    """Return dx, dgamma and dbeta.

    `check` takes the form and `statistics`, and returns mean and M2 of the rows.
    """
    cdef Call c
    cdef RowProblem p
    cdef RowTiling t
    cdef Py_ssize_t i, k, channels
    cdef bint wide
    memset(&p, 0, sizeof(p))
    p.backward, p.centred = True, centred
    held = []
    form = prepare(&c, &p, held, x, settings, gamma, num_threads)
    if dy is None:
        _arguments.tensor("dy", dy)
    take_companion(&c, DY, "dy", dy)
    if gamma is None:
        wide = c.at[X].view.storage == FLOAT64
    else:
        wide = _arguments.tensor("gamma", gamma, False).dtype == _arguments.F64
    mean, m2 = check(form, statistics)
    take(&c, MEAN, "mean", mean, False)
    take(&c, VAR, "m2", m2, False)
    take_output(&c, OUT, "out", out)
    if c.at[X].view.size == 0:
        dtype = _arguments.F64 if wide else _arguments.F32
        return deliver(&c, OUT), zeros(form.shape, dtype), zeros(form.shape, dtype)
    fold_x(&c, &p, form)
    mean = ascontiguousarray(in_order(&c, form, mean, True))
    m2 = ascontiguousarray(in_order(&c, form, m2, True))
    p.mean, p.m2 = doubles(mean), doubles(m2)
    _sums = run(&c, &p, &t)
    channels = p.G * p.K
    for k in range(1, t.chunks):        # in order
        for i in range(2 * channels):
            p.parts[i] += p.parts[k * 2 * channels + i]
    left = rows_left(&c, &p, form, mean, m2, <object> c.at[DY].used)
    if left is not None:
        add_left(left, p.parts, channels)
    return (
        deliver(&c, OUT), rounded(p.parts, channels, wide).reshape(form.shape),
        rounded(p.parts + channels, channels, wide).reshape(form.shape))
