# cython: language_level=3
# cython: cdivision=True
# cython: binding=False
# From the arguments of a public call to a kernel call: batch normalization.
#
# Each call takes the same steps: read the arguments, check them, fold to (N, C, S), allocate, run.
# Settings that belong together are in one tuple:
#
# settings      (axis, eps, activation, slope)
# selected      (mask, weights, lengths, masked): which values are used, and what the others become
#
# N = everything before the channel axis, C = channels, S = everything after it.

from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport INFINITY, fabs, sqrt
from libc.string cimport memchr, memcpy, memset

from cybn._dispatch.arguments cimport (
    BETA, DY, GAMMA, MEAN, OUT, OUT_RESIDUAL, RESIDUAL, VAR, Call, Kernel, X, begin,
    deliver, frozen, keep_apart, launch, look, moments_of, new_vector, replace, rounded, settle,
    shape_of, take_companion, take_eps, take_output, take_vector, threads_for)
from cybn._dispatch.arrays cimport PyArray_DATA, PyArrayObject, View, fold
from cybn._dispatch.running cimport moved_to, take_running
from cybn._dispatch.shares cimport take_shares
from cybn._kernels.activation cimport (
    GELU, HARDSWISH, LEAKY_RELU, RELU, RELU6, SIGMOID, SILU, TANH, Activation)
from cybn._kernels.problem cimport (
    DOTS, FLOAT64, IN_DX, NO_SUMS, NO_WRITE, SCALE, SCALE_DY, SERIAL, SUMS, UNSCALE, Problem,
    Vector, chunks_of, gradient_of)
from cybn._kernels.row_problem cimport Kernels
from cybn._kernels.statistics cimport beyond, is_finite

from numpy import ascontiguousarray, flatnonzero, frombuffer, ndarray, zeros

from .. import _arguments

# Names of the activations, and their numbers in the kernels. A new activation needs a line here.
ACTIVATIONS = {
    "relu": RELU, "relu6": RELU6, "leaky_relu": LEAKY_RELU, "hardswish": HARDSWISH,
    "sigmoid": SIGMOID, "tanh": TANH, "silu": SILU, "gelu": GELU}

SMALL = SERIAL                  # a call with fewer values is a small one

cdef enum:
    FEW = 1024                  # most channels whose marks are on the stack

cdef const Kernels* kernels = NULL


def use(capsule):
    """Call the kernels of one instruction level from now on."""
    global kernels
    kernels = <const Kernels*> PyCapsule_GetPointer(capsule, "cybn.kernels")


# ---- the steps ---------------------------------------------------------------------------

cdef int prepare(
    Call* c, Problem* p, list held, object x, object gamma, object beta, object residual,
    tuple settings, tuple selected, object num_threads, bint part=False
) except -1:
    """Take the arguments that all calls have; reduce and apply of `p` must be set before.

    `part` means that x is a part of a batch, which may have any number of values.
    """
    axis, eps, activation, slope = settings
    begin(c, held, x)
    p.share = NULL
    p.storage, p.item = c.at[X].view.storage, c.at[X].view.item
    c.axis = axis_of(axis, &c.at[X].view)
    if c.at[X].view.size:
        fold_x(c, p)
    take_shares(c, p, selected)
    if not part:
        check_batch(c, p)
    p.activation, p.slope = <Activation> 0, 0
    if activation is not None:
        number, p.slope = _arguments.activation(activation, slope, ACTIVATIONS)
        p.activation = <Activation> <int> number
    p.eps = take_eps(eps, p.apply == UNSCALE or p.reduce == SUMS)
    take_vector(c, GAMMA, "gamma", gamma, c.at[X].view.shape[c.axis], False, &p.gamma)
    take_vector(c, BETA, "beta", beta, c.at[X].view.shape[c.axis], False, &p.beta)
    p.threads = threads_for(c, num_threads)
    return take_companion(c, RESIDUAL, "residual", residual)


cdef int axis_of(object axis, const View* x) except -1:
    """Return the channel axis counted from the front."""
    if type(axis) is not int or x.ndim < 2 or not -x.ndim <= axis < x.ndim:
        axis = _arguments.channel_axis_of(shape_of(x), axis)
    return axis + x.ndim if axis < 0 else axis


cdef int fold_x(Call* c, Problem* p) except -1:
    """Fold x to (N, C, S); copy it first if necessary."""
    for order in "KC":          # a copy of axes with stride 0 may still be out of order
        if fold(&c.at[X].view, c.axis, &c.fold):
            break
        replace(c, X, (<object> c.at[X].used).copy(order))
    else:
        fold(&c.at[X].view, c.axis, &c.fold)
    p.N, p.C, p.S = c.fold.N, c.fold.C, c.fold.S
    p.x.at, p.x.pitch = c.at[X].view.data, c.fold.pitch
    p.M = <double> p.N * <double> p.S
    p.chunks = chunks_of(p.N, p.C, p.S)
    return 0


cdef int check_batch(const Call* c, const Problem* p) except -1:
    """Raise ValueError if the channels of a batch have no variance, or no values."""
    cdef Py_ssize_t least = 2, channels = c.at[X].view.shape[c.axis]
    if p.apply == NO_WRITE:
        least = 1
    elif p.apply == SCALE_DY or p.reduce == NO_SUMS:
        return 0
    if p.share == NULL and channels and c.at[X].view.size >= least * channels:
        return 0
    counted = None if p.share == NULL else c.counted
    _arguments.check_batch(shape_of(&c.at[X].view), c.axis, counted, least)
    return 0


cdef object run(
    Call* c, Problem* p, tuple settings, tuple selected, bint again=False, object statistics=None
):
    """Describe all arrays as rows, run a kernel, and return the array of its sums.

    Channels that the kernel leaves out are written afterwards, by calls with `again`, in which it
    leaves out none. `statistics` are those of the batch, given if x contains y.
    """
    cdef char few[FEW]
    settle(c, DY, &p.dy)
    settle(c, RESIDUAL, &p.residual)
    p.count = 1 if p.apply == SCALE_DY or p.apply == SCALE and p.reduce == NO_SUMS else p.M
    settle(c, OUT, &p.y)
    if p.reduce == DOTS and p.y.at == p.dy.at and loses_dy(p):
        c.at[OUT].view.ready = False
        settle(c, OUT, &p.y)
    settle(c, OUT_RESIDUAL, &p.dresidual)
    sums = None
    if p.reduce != NO_SUMS:
        sums = new_vector((2 * p.chunks + 1) * p.C, True)
        p.sums = <double*> PyArray_DATA(<const PyArrayObject*> sums)
        if p.reduce == SUMS:
            p.mean.data, p.mean.wide = p.sums, True
            p.var.data, p.var.wide = p.sums + p.C, True
    if p.apply == NO_WRITE or again:
        launch(c, <Kernel> kernels.batch_norm, p, &p.threads, &p.watch)
        return sums
    marks = None if p.C <= FEW else bytearray(p.C)
    p.left = &few[0]
    if marks is not None:
        p.left = <char*> marks
    memset(p.left, 0, p.C)
    launch(c, <Kernel> kernels.batch_norm, p, &p.threads, &p.watch)
    if memchr(p.left, 1, p.C) != NULL:
        write_left(c, p, settings, selected, statistics)
    p.left = NULL
    return sums


# ---- channels that a kernel leaves out ---------------------------------------------------

cdef bint loses_dy(const Problem* p) noexcept:
    """Return whether a kernel would overwrite dy with a wrong gradient in a channel it leaves out.

    This may happen if it stores the gradient before the activation in dx, and dx is dy.
    """
    cdef Py_ssize_t i
    cdef double mean, v, size
    if gradient_of(p) != IN_DX:
        return False
    for i in range(p.C):
        mean, v = value_of(&p.mean, i, 0), value_of(&p.var, i, 0) / p.count + p.eps
        size = fabs(value_of(&p.gamma, i, 1) / sqrt(v)) + fabs(value_of(&p.beta, i, 0))
        if p.storage == FLOAT64:
            if beyond(mean, v, True, size, <double> 0):
                return True
        elif beyond(mean, v, True, size, <float> 0):
            return True
    return False


cdef double value_of(const Vector* v, Py_ssize_t i, double absent) noexcept:
    if v.data == NULL:
        return absent
    return (<const double*> v.data)[i] if v.wide else (<const float*> v.data)[i]


cdef object values_of(const Vector* v, object where, double absent):
    """Return values of a vector as a new array of float64."""
    cdef Py_ssize_t i, n = where.size
    cdef const Py_ssize_t* at = <const Py_ssize_t*> PyArray_DATA(<const PyArrayObject*> where)
    values = new_vector(n, True)
    for i in range(n):
        (<double*> PyArray_DATA(<const PyArrayObject*> values))[i] = value_of(v, at[i], absent)
    return values


cdef object array_at(const Call* c, int k):
    return None if c.at[k].given == NULL else <object> c.at[k].used


cdef int write_left(
    Call* c, Problem* p, tuple settings, tuple selected, object statistics
) except -1:
    """Write the channels that a kernel has left out, and correct its sums for them."""
    from . import beyond as left

    cdef Py_ssize_t i
    cdef bint kept = p.reduce == DOTS and p.y.at == p.dy.at and gradient_of(p) == IN_DX
    where = flatnonzero(frombuffer((<const char*> p.left)[:p.C], "b"))
    _, *options = settings
    if kept:                    # dx contains the gradient before the activation
        options[1] = None
    call = left.Channels(
        array_at(c, X), array_at(c, OUT) if kept else array_at(c, DY), array_at(c, RESIDUAL),
        array_at(c, OUT), array_at(c, OUT_RESIDUAL), c.axis, where, values_of(&p.mean, where, 0),
        values_of(&p.var, where, 0), values_of(&p.gamma, where, 1), values_of(&p.beta, where, 0),
        1 if p.count == 1 and p.M != 1 else count_of(c, p),
        p.reduce == SUMS or p.apply == UNSCALE, (c.axis, *options), selected, p.inverse, p.threads,
        None if statistics is None else statistics.std()[where])
    if p.reduce != DOTS:
        std = left.forward(call)
        for i in range(where.size if p.reduce == SUMS else 0):
            p.sums[2 * p.chunks * p.C + <Py_ssize_t> where[i]] = std[i]
        return 0
    dgamma, dbeta = left.backward(call)
    for i in range(where.size):
        p.sums[<Py_ssize_t> where[i]] = dbeta[i]
        p.sums[p.C + <Py_ssize_t> where[i]] = dgamma[i]
    return 0


# ---- the calls ---------------------------------------------------------------------------

cdef object count_of(const Call* c, const Problem* p):
    """Return the number of values of a channel, or with weights their sum, a float."""
    if p.share == NULL:
        return p.N * p.S
    return c.total if p.weighted else c.counted


cdef object moments_in(const Call* c, const Problem* p, tuple selected):
    """Return the moments that a kernel has stored in `sums`."""
    if c.at[X].view.size == 0:
        return moments_of(0, frozen(NULL, 0), frozen(NULL, 0))
    moments = moments_of(count_of(c, p), frozen(p.sums, p.C), frozen(p.sums + p.C, p.C))
    cdef Py_ssize_t i
    for i in range(p.C):
        if p.sums[p.C + i] == INFINITY:
            add_deviations(c, p, moments, selected)
            break
    return moments


cdef int add_deviations(const Call* c, const Problem* p, object moments, tuple selected) except -1:
    """Add standard deviations to moments of which a variance is too large for float64."""
    from .beyond import deviations

    cdef Py_ssize_t i
    if p.apply == NO_WRITE:
        std = deviations(<object> c.at[X].used, c.axis, moments, selected, p.threads)
    else:                       # x may be overwritten, but `write_left` has stored them
        std = moments.std()
        for i in range(p.C):
            if p.sums[p.C + i] == INFINITY and is_finite(p.sums[i]):
                std[i] = p.sums[2 * p.chunks * p.C + i]
    moments._tell(std)
    return 0


def statistics(x, axis, selected, num_threads):
    """Return the moments of each channel; see `moments`."""
    cdef Call c
    cdef Problem p
    memset(&p, 0, sizeof(p))
    p.reduce, p.apply = SUMS, NO_WRITE
    held = []
    prepare(&c, &p, held, x, None, None, None, (axis, 1.0, None, 0), selected, num_threads)
    _sums = run(&c, &p, (), selected) if c.at[X].view.size else None
    return moments_in(&c, &p, selected)


def forward(x, gamma, beta, residual, settings, selected, out, num_threads, exchange=None):
    """Return y and the moments of the batch; see `batch_norm`.

    `exchange` is given if x is a part of a batch. It takes the number of values of a channel, the
    sum of their weights, their mean and M2. It returns the mean and the variance to normalize with.
    It is called after all checks, and before any array of the caller is written.
    """
    cdef Call c
    cdef Problem p
    memset(&p, 0, sizeof(p))
    p.reduce, p.apply = SUMS, SCALE
    held = []
    part = exchange is not None
    prepare(&c, &p, held, x, gamma, beta, residual, settings, selected, num_threads, part)
    take_output(&c, OUT, "out", out)
    if part:
        return deliver_part(&c, &p, settings, selected, exchange)
    _sums = run(&c, &p, settings, selected) if c.at[X].view.size else None
    return deliver(&c, OUT), moments_in(&c, &p, selected)


cdef object deliver_part(
    Call* c, Problem* p, tuple settings, tuple selected, object exchange
):
    """Return y of a part of a batch, and the moments of the part."""
    cdef Py_ssize_t channels = c.at[X].view.shape[c.axis]
    cdef bint some = c.at[X].view.size > 0
    count, mean, m2 = 0, zeros(channels), zeros(channels)
    number = 0
    if some:
        settle(c, RESIDUAL, &p.residual)
        settle(c, OUT, &p.y)
        count = count_of(c, p)
        number = p.N * p.S if p.share == NULL else c.counted
    if number:
        p.apply = NO_WRITE
        _sums = run(c, p, settings, selected)
        mean, m2 = frozen(p.sums, channels), frozen(p.sums + channels, channels)
    use_mean, use_var = exchange(number, count, mean, m2)
    take_vector(c, MEAN, "mean", use_mean, channels, True, &p.mean)
    take_vector(c, VAR, "var", use_var, channels, True, &p.var)
    if some:
        p.reduce, p.apply = NO_SUMS, SCALE
        run(c, p, settings, selected)
    return deliver(c, OUT), moments_of(count, mean, m2)


def learn(
    x, gamma, beta, residual, settings, selected, out, num_threads, running_mean, running_var,
    double weight, Py_ssize_t ddof,
):
    """Return y, the moments of the batch, and running statistics that have moved towards them.

    A layer calls this in training. It is `forward` and `absorb` in one, and checks all arguments
    before it writes anything.
    """
    cdef Call c
    cdef Problem p
    cdef Vector mean, var
    memset(&p, 0, sizeof(p))
    p.reduce, p.apply = SUMS, SCALE
    held = []
    prepare(&c, &p, held, x, gamma, beta, residual, settings, selected, num_threads)
    take_running(&c, running_mean, running_var, c.at[X].view.shape[c.axis], &mean, &var)
    if p.share != NULL and p.weighted:
        _arguments.check_degrees(c.total, ddof)
    take_output(&c, OUT, "out", out)
    if c.at[X].view.size == 0:
        return deliver(&c, OUT), moments_in(&c, &p, selected), running_mean, running_var
    _sums = run(&c, &p, settings, selected)
    moved = moved_to(&mean, &var, p.sums, p.sums + p.C, p.C, count_of(&c, &p) - ddof, weight)
    return deliver(&c, OUT), moments_in(&c, &p, selected), *moved


def inference(
    x, mean, var, gamma, beta, residual, settings, selected, out, num_threads, bint again=False,
):
    """Return y; see `batch_norm_inference`. `again` is True for channels that were left out."""
    cdef Call c
    cdef Problem p
    memset(&p, 0, sizeof(p))
    p.reduce, p.apply = NO_SUMS, SCALE
    held = []
    prepare(&c, &p, held, x, gamma, beta, residual, settings, selected, num_threads)
    take_vector(&c, MEAN, "mean", mean, c.at[X].view.shape[c.axis], True, &p.mean)
    take_vector(&c, VAR, "var", var, c.at[X].view.shape[c.axis], True, &p.var)
    take_output(&c, OUT, "out", out)
    if c.at[X].view.size:
        run(&c, &p, settings, selected, again)
    return deliver(&c, OUT)


def backward(
    dy, x, statistics, gamma, beta, residual, settings, selected, from_output, out, out_residual,
    num_threads, exchange=None, bint again=False,
):
    """Return dx, dgamma, dbeta and, if there is a residual, its gradient.

    If `statistics` is `Moments`, the gradient goes through the statistics of the batch. If it is a
    tuple of mean and variance, these are constant. See `batch_norm_backward` and
    `batch_norm_inference_backward`.

    `exchange` is given if x is a part of a batch; `statistics` are then those of the batch. It
    takes dbeta and dgamma of the part, (2, C) in float64, and returns those of the batch. It is
    called after all checks, and before any array of the caller is written.
    """
    cdef Call c
    cdef Problem p
    cdef bint wide
    memset(&p, 0, sizeof(p))
    through, part = not isinstance(statistics, tuple), exchange is not None
    p.reduce, p.apply = DOTS, UNSCALE if through else SCALE_DY
    held = []
    prepare(&c, &p, held, x, gamma, beta, residual, settings, selected, num_threads, part)
    channels = c.at[X].view.shape[c.axis]
    if dy is None:
        _arguments.tensor("dy", dy)
    take_companion(&c, DY, "dy", dy)
    if through:
        if c.at[X].view.size and not part and not again:
            _arguments.check_count(statistics.count, count_of(&c, &p))
        take_vector(&c, MEAN, "moments.mean", statistics.mean, channels, True, &p.mean)
        take_vector(&c, VAR, "moments.m2", statistics.m2, channels, True, &p.var)
    else:
        take_vector(&c, MEAN, "mean", statistics[0], channels, True, &p.mean)
        take_vector(&c, VAR, "var", statistics[1], channels, True, &p.var)
    if from_output:
        _arguments.check_invertible(gamma, settings[2], p.slope, residual)
        p.inverse = True
        p.mean = p.beta         # y - beta is a multiple of xhat; 0 if beta is absent
    if residual is None and isinstance(out_residual, ndarray):
        check_unused(&c, out_residual)
    take_output(&c, OUT, "out", out)
    if residual is not None:
        take_output(&c, OUT_RESIDUAL, "out_residual", out_residual)
    wide = c.at[X if gamma is None else GAMMA].view.storage == FLOAT64
    if c.at[X].view.size == 0:
        p.C = channels
        _sums = zeros((2, channels))
        if part:
            _sums = ascontiguousarray(exchange(_sums), _arguments.F64)
        p.sums = <double*> PyArray_DATA(<const PyArrayObject*> _sums)
    elif part:
        _sums = run_part(
            &c, &p, statistics.count, out is not None, out_residual is not None, exchange)
    else:
        told = statistics if through and from_output else None
        _sums = run(&c, &p, settings, selected, again, told)
    results = rounded(p.sums + p.C, p.C, wide), rounded(p.sums, p.C, wide)
    if residual is None:
        return deliver(&c, OUT), *results
    return deliver(&c, OUT), *results, deliver(&c, OUT_RESIDUAL)


cdef object run_part(
    Call* c, Problem* p, double count, bint out_given, bint residual_given, object exchange
):
    """Run a backward pass whose sums are exchanged before they are used; return their array.

    The gradient before the activation is stored in the array for the gradient of the residual, or
    for dx. If that array is the caller's, a stand-in replaces it.
    """
    p.M = count
    if residual_given:
        c.at[OUT_RESIDUAL].view.ready = False
    if c.at[OUT_RESIDUAL].given == NULL and p.activation != <Activation> 0:
        if out_given:
            c.at[OUT].view.ready = False
        settle(c, OUT, &p.y)
        p.dresidual = p.y
    p.apply = NO_WRITE
    sums = run(c, p, (), ())
    own = sums[:2 * p.C].reshape(2, p.C).copy()
    totals = ascontiguousarray(exchange(own), _arguments.F64)
    memcpy(p.sums, PyArray_DATA(<const PyArrayObject*> totals), 2 * p.C * sizeof(double))
    if p.dresidual.at != NULL:
        p.dy = p.dresidual
        p.dresidual.at = NULL
    p.reduce, p.apply = NO_SUMS, UNSCALE
    launch(c, <Kernel> kernels.batch_norm, p, &p.threads, &p.watch)
    return sums


cdef int check_unused(Call* c, object out_residual) except -1:
    """Raise ValueError if `out_residual` overlaps an input, although there is no residual."""
    c.at[OUT_RESIDUAL].given = c.at[OUT_RESIDUAL].used = <PyObject*> out_residual
    look(out_residual, &c.at[OUT_RESIDUAL].view)
    keep_apart(c, OUT_RESIDUAL, "out_residual")
    c.at[OUT_RESIDUAL].given = NULL
    return 0


def layout(x, int axis):
    """Return N, C and S of an array, and whether it is read without a copy."""
    cdef Call c
    cdef Problem p
    held = []
    begin(&c, held, x)
    c.axis = axis + c.at[X].view.ndim if axis < 0 else axis
    fold_x(&c, &p)
    return p.N, p.C, p.S, c.at[X].used == c.like
