# cython: language_level=3
# cython: cdivision=True
# From the arguments of a public call to a kernel call: batch normalization.
#
# Every call goes this way, whatever is special about it: read the arrays, check, fold to (N, C, S),
# allocate, run. Nothing is written before every check has passed. What the common case does not
# need, such as converting a list, is a function of Python (_arguments.py, _selection.py); it
# raises the error where it finds the fault.
#
# N = everything before the channel axis, C = channels, S = everything after it.

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport INFINITY
from libc.string cimport memcpy, memset

from cybn._dispatch.arrays cimport (
    NPY_ARRAY_WRITEABLE, NPY_DOUBLE, Fold, PyArray_CLEARFLAGS, PyArray_DATA, PyArray_TYPE,
    PyArrayObject, View, apart, by_stride, fold, lies, same_place, same_shape, view_of)
from cybn._kernels.activation cimport (
    GELU, HARDSWISH, LEAKY_RELU, RELU, RELU6, SIGMOID, SILU, TANH, Activation)
from cybn._kernels.problem cimport (
    AGAIN, BY_RUN, IN_DRESIDUAL, IN_DX, STAGED_PIECES, Caches, Route, Tiling, route_of, tiling_of,
    BRAIN, DOTS, FLOAT32, FLOAT64, HALF, NO_SUMS, NO_WRITE, SAMPLES, SCALE, SCALE_DY, SERIAL, SUMS,
    UNSCALE, Kernels, Problem, RowProblem, RowTiling, Rows, Vector, chunks_of, row_tiling)
from cybn._kernels.waiting cimport Patience, Watch, learn, seconds, threads_now

from numpy import ascontiguousarray, copyto, empty, errstate, moveaxis, ndarray, zeros
from numpy import empty_like as any_empty_like

from .. import _arguments
from .._memory import LEAST, empty_like as kept_empty_like
from .._runtime import thread_count
from .._selection import choose, shares_of
from .forms import constant, form_of, ordered

cdef object F32 = _arguments.F32, F64 = _arguments.F64

# What a call may name, and the kernels' number of it. A new activation is a line here.
ACTIVATIONS = {
    "relu": RELU, "relu6": RELU6, "leaky_relu": LEAKY_RELU, "hardswish": HARDSWISH,
    "sigmoid": SIGMOID, "tanh": TANH, "silu": SILU, "gelu": GELU}

SMALL = SERIAL                  # values from which a call is not a small one

cdef const Kernels* kernels = NULL
cdef const Kernels* row_kernels = NULL
cdef Patience patience          # with threads that do not come; zero at the start
cdef int bfloat16 = -1          # NumPy's number of ml_dtypes' type, once an array of it was seen


def use(capsule, row_capsule):
    """Call the kernels of one instruction level from now on."""
    global kernels, row_kernels
    kernels = <const Kernels*> PyCapsule_GetPointer(capsule, "cybn.kernels")
    row_kernels = <const Kernels*> PyCapsule_GetPointer(row_capsule, "cybn.kernels")


# ---- arguments ---------------------------------------------------------------------------

cdef object tensor(str name, object value, View* v, bint half):
    """Return `value` as an aligned array of native floats, itself if it is one; look at it."""
    global bfloat16
    if type(value) is ndarray and view_of(value, v, bfloat16) and (half or v.storage <= FLOAT64):
        return value
    value = _arguments.tensor(name, value, half)
    if not view_of(value, v, bfloat16):
        bfloat16 = PyArray_TYPE(<const PyArrayObject*> value)
        view_of(value, v, bfloat16)
    return value


cdef int axis_of(object axis, const View* x) except -1:
    """Return the channel axis counted from the front."""
    if type(axis) is not int or x.ndim < 2 or not -x.ndim <= axis < x.ndim:
        axis = _arguments.channel_axis_of(tuple(x.shape[i] for i in range(x.ndim)), axis)
    return axis + x.ndim if axis < 0 else axis


cdef int options(
    Problem* p, object activation, object slope, object eps, bint positive
) except -1:
    """Take the activation and eps."""
    cdef tuple known
    if activation is not None:
        known = _arguments.activation(activation, slope, ACTIVATIONS)
        p.activation, p.slope = <Activation> <int> known[0], known[1]
    if type(eps) is not float or not 0 < eps < INFINITY:
        _arguments.check_eps(eps, None if positive else 0)
    p.eps = eps
    return 0


cdef object vector(str name, object value, Py_ssize_t channels, Vector* into, View* v):
    """Return one value a channel as a dense vector of floats; None where it is None."""
    if value is None:
        into.data = NULL
        return None
    value = tensor(name, value, v, False)
    if v.ndim != 1 or v.shape[0] != channels:
        shape = tuple(v.shape[i] for i in range(v.ndim))
        raise ValueError(
            f"{name} has shape {shape}; it must have shape ({channels},), one value a channel")
    if channels > 1 and v.strides[0] != v.item:
        value = value.copy()
        view_of(value, v, bfloat16)
    into.data, into.wide = v.data, v.storage == FLOAT64
    return value


cdef object required(str name, object value, Py_ssize_t channels, Vector* into, View* v):
    """Return a vector that may not be None."""
    if value is None:
        raise TypeError(
            f"{name} is None; it must have shape ({channels},), one value a channel")
    return vector(name, value, channels, into, v)


cdef object companion(str name, object value, object x, const View* like, View* v):
    """Return an array that must have the shape and dtype of x."""
    value = tensor(name, value, v, True)
    if not same_shape(v, like):
        raise ValueError(f"{name} has shape {value.shape}; it must have the shape of x, {x.shape}")
    if v.storage != like.storage:
        raise ValueError(f"{name} is {value.dtype}; it must have the dtype of x, {x.dtype}")
    return value


cdef object new_like(object x, const View* v):
    """Return a new array that lies in memory as x does; large ones take memory used before."""
    return any_empty_like(x, subok=False) if v.size * v.item < LEAST else kept_empty_like(x)


cdef object destination(str name, object out, object x, const View* like, View* v):
    """Return where a result goes; v.data is NULL where it cannot be written in place."""
    if out is None:
        out = new_like(x, like)
        view_of(out, v, bfloat16)
        if not same_shape(v, like):
            raise RuntimeError("x was given another shape during the call, by another thread")
    elif not (
        type(out) is ndarray and view_of(out, v, bfloat16) and v.storage == like.storage
        and same_shape(v, like) and v.flags & NPY_ARRAY_WRITEABLE
    ):
        _arguments.check_destination(name, out, x)
        v.data = NULL
    return out


cdef int guard(
    str name, object out, const View* v, object given, object used, const View* u, bint may_be_input
) except -1:
    """Raise where a result shares memory with an input, as it was given or as it is used."""
    if given is None:
        return 0
    if given is used and v.data != NULL and u.data != NULL:
        if out is given:
            if may_be_input:
                return 0
        elif apart(v, u):
            return 0
        elif may_be_input and v.storage == u.storage and same_shape(v, u) and same_place(v, u):
            return 0
    _arguments.apart(out, given, used, name=name, may_be_input=may_be_input)
    return 0


cdef int threads_for(const View* x, object num_threads) except -1:
    """Threads for a call; a small one has one, and need not ask how many there are."""
    if num_threads is None and x.size < SERIAL:
        return 1
    return thread_count(num_threads)


# ---- arrays as rows ----------------------------------------------------------------------

cdef object folded(Problem* p, object x, View* v, int axis, Fold* f):
    """Take x as (N, C, S), and return it, or a copy where it does not fold in place."""
    if not fold(v, axis, f):
        x = x.copy(order="K")
        view_of(x, v, bfloat16)
        if not fold(v, axis, f):    # a copy of axes with stride 0 may still be out of order
            x = x.copy(order="C")
            view_of(x, v, bfloat16)
            fold(v, axis, f)
    p.N, p.C, p.S = f.N, f.C, f.S
    p.storage, p.item = v.storage, v.item
    p.x.at, p.x.pitch = v.data, f.pitch
    p.M = p.count = <double> f.N * <double> f.S
    p.chunks = chunks_of(f.N, f.C, f.S)
    return x


cdef object beside(object array, View* v, object x, const Fold* f, Rows* rows):
    """Take an input that goes with x, and return it, or a copy that lies in memory as x does."""
    if array is not None:
        if not lies(v, f, False, &rows.pitch):
            copy = any_empty_like(x)
            copyto(copy, array)
            array = copy
            view_of(array, v, bfloat16)
            lies(v, f, False, &rows.pitch)
        rows.at = v.data
    return array


cdef object target(str name, object out, View* v, object x, const Fold* f, Rows* rows):
    """Take an output, and return it, or an array in its place that lies in memory as x does."""
    if v.data == NULL or not lies(v, f, False, &rows.pitch):
        _arguments.check_places(name, out)
        out = any_empty_like(x)
        view_of(out, v, bfloat16)
        lies(v, f, False, &rows.pitch)
    rows.at = v.data
    return out


cdef object select(
    object x, int axis, object mask, object weights, object lengths
):
    """Return which positions count, None where all of them count once."""
    if mask is None and weights is None and lengths is None:
        return None
    return choose(x.shape, axis, mask, weights, lengths)


cdef object take_shares(
    Problem* p, object positions, const Fold* f, const View* x, bint zeroed
):
    """Tell the problem which positions count; return the array that holds it."""
    cdef const Py_ssize_t* places
    if positions is None:
        return None
    order = tuple(f.order[k] for k in range(x.ndim))
    shares, found, total, p.weighted = shares_of(
        positions, order, p.N, p.S, F64 if p.storage == FLOAT64 else F32)
    p.share = PyArray_DATA(<const PyArrayObject*> shares)
    places = <const Py_ssize_t*> PyArray_DATA(<const PyArrayObject*> found)
    memcpy(p.places, places, SAMPLES * sizeof(Py_ssize_t))
    p.M = total
    p.count = total
    p.zeroed = zeroed
    return shares, found


cdef int check_batch(const View* x, int axis, object positions, int least) except -1:
    """Refuse a batch whose channels have no variance, or no values."""
    if positions is None and x.shape[axis] and x.size >= least * x.shape[axis] and x.size:
        return 0
    _arguments.check_batch(tuple(x.shape[i] for i in range(x.ndim)), axis, positions, least)
    return 0


cdef bint is_zero(object masked) except -1:
    if masked != "normalize" and masked != "zero":
        raise ValueError(f"masked is {masked!r}; it must be 'normalize' or 'zero'")
    return masked == "zero"


# ---- running -----------------------------------------------------------------------------

cdef object run(Problem* p, const View* x):
    """Run a kernel; return the array that holds its sums.

    Other threads may use Python meanwhile, unless that takes as long to arrange.
    """
    cdef Watch watch
    sums = None
    if p.reduce != NO_SUMS:
        sums = empty((2 * p.chunks + 1) * p.C)
        p.sums = <double*> PyArray_DATA(<const PyArrayObject*> sums)
        if p.reduce == SUMS:
            p.mean.data, p.mean.wide = p.sums, True
            p.var.data, p.var.wide = p.sums + p.C, True
    if x.size < SERIAL:
        kernels.batch_norm(p)
        return sums
    p.threads = threads_now(&patience, p.threads)
    p.watch, watch.worked = &watch, 0
    with nogil:
        watch.begun = seconds()
        kernels.batch_norm(p)
        watch.took = seconds() - watch.begun
    if p.threads > 1:
        learn(&patience, &watch)
    return sums


cdef object frozen(const double* values, Py_ssize_t n):
    """Return a read-only array of n values."""
    array = empty(n)
    memcpy(PyArray_DATA(<const PyArrayObject*> array), values, n * sizeof(double))
    PyArray_CLEARFLAGS(<PyArrayObject*> array, NPY_ARRAY_WRITEABLE)
    return array


cdef object rounded(const double* values, Py_ssize_t n, object dtype):
    """Return an array of n values, float32 or float64; beyond float32 they are infinite."""
    cdef Py_ssize_t i
    array = empty(n, dtype)
    data = PyArray_DATA(<const PyArrayObject*> array)
    if PyArray_TYPE(<const PyArrayObject*> array) == NPY_DOUBLE:
        memcpy(data, values, n * sizeof(double))
    else:
        for i in range(n):
            (<float*> data)[i] = <float> values[i]
    return array


cdef object count_of(const Problem* p, object positions):
    return p.N * p.S if positions is None else positions.total


# ---- the calls ---------------------------------------------------------------------------

def forward(
    x, gamma, beta, axis, eps, activation, slope, residual, mask, weights, lengths, masked, out,
    num_threads,
):
    """Return y, and count, mean and M2 of each channel; see `batch_norm`."""
    cdef Problem p
    cdef View vx, vy, vr, vg, vb
    cdef Fold f
    memset(&p, 0, sizeof(p))
    given_x, given_r, given_g, given_b = x, residual, gamma, beta
    zeroed = is_zero(masked)
    x = tensor("x", x, &vx, True)
    at = axis_of(axis, &vx)
    positions = select(x, at, mask, weights, lengths)
    check_batch(&vx, at, positions, 2)
    options(&p, activation, slope, eps, True)
    gamma = vector("gamma", gamma, vx.shape[at], &p.gamma, &vg)
    beta = vector("beta", beta, vx.shape[at], &p.beta, &vb)
    p.threads = threads_for(&vx, num_threads)
    if residual is not None:
        residual = companion("residual", residual, x, &vx, &vr)
    y = destination("out", out, x, &vx, &vy)
    if out is not None:
        guard("out", y, &vy, given_x, x, &vx, True)
        guard("out", y, &vy, given_r, residual, &vr, True)
        guard("out", y, &vy, given_g, gamma, &vg, True)
        guard("out", y, &vy, given_b, beta, &vb, True)
    if vx.size == 0:
        return y, vx.size, empty(0), empty(0)
    p.reduce, p.apply = SUMS, SCALE
    x = folded(&p, x, &vx, at, &f)
    residual = beside(residual, &vr, x, &f, &p.residual)
    into = target("out", y, &vy, x, &f, &p.y)
    _held = take_shares(&p, positions, &f, &vx, zeroed)
    _sums = run(&p, &vx)
    mean, m2 = frozen(p.sums, p.C), frozen(p.sums + p.C, p.C)
    if into is not y:
        copyto(y, into)
    return y, count_of(&p, positions), mean, m2


def statistics(x, axis, mask, weights, lengths, num_threads):
    """Return count, mean and M2 of each channel; see `moments`."""
    cdef Problem p
    cdef View vx
    cdef Fold f
    memset(&p, 0, sizeof(p))
    x = tensor("x", x, &vx, True)
    at = axis_of(axis, &vx)
    positions = select(x, at, mask, weights, lengths)
    check_batch(&vx, at, positions, 1)
    p.threads = threads_for(&vx, num_threads)
    if vx.size == 0:
        return 0, empty(0), empty(0)
    p.reduce, p.apply = SUMS, NO_WRITE
    x = folded(&p, x, &vx, at, &f)
    _held = take_shares(&p, positions, &f, &vx, False)
    _sums = run(&p, &vx)
    mean, m2 = frozen(p.sums, p.C), frozen(p.sums + p.C, p.C)
    return count_of(&p, positions), mean, m2


def inference(
    x, mean, var, gamma, beta, axis, eps, activation, slope, residual, mask, weights, lengths,
    masked, out, num_threads,
):
    """Return y; see `batch_norm_inference`."""
    cdef Problem p
    cdef View vx, vy, vr, vg, vb, vm, vv
    cdef Fold f
    memset(&p, 0, sizeof(p))
    given_x, given_r, given_g, given_b, given_m, given_v = x, residual, gamma, beta, mean, var
    zeroed = is_zero(masked)
    x = tensor("x", x, &vx, True)
    at = axis_of(axis, &vx)
    positions = select(x, at, mask, weights, lengths)
    options(&p, activation, slope, eps, False)
    mean = required("mean", mean, vx.shape[at], &p.mean, &vm)
    var = required("var", var, vx.shape[at], &p.var, &vv)
    gamma = vector("gamma", gamma, vx.shape[at], &p.gamma, &vg)
    beta = vector("beta", beta, vx.shape[at], &p.beta, &vb)
    p.threads = threads_for(&vx, num_threads)
    if residual is not None:
        residual = companion("residual", residual, x, &vx, &vr)
    y = destination("out", out, x, &vx, &vy)
    if out is not None:
        guard("out", y, &vy, given_x, x, &vx, True)
        guard("out", y, &vy, given_r, residual, &vr, True)
        guard("out", y, &vy, given_m, mean, &vm, True)
        guard("out", y, &vy, given_v, var, &vv, True)
        guard("out", y, &vy, given_g, gamma, &vg, True)
        guard("out", y, &vy, given_b, beta, &vb, True)
    if vx.size == 0:
        return y
    p.reduce, p.apply = NO_SUMS, SCALE
    x = folded(&p, x, &vx, at, &f)
    residual = beside(residual, &vr, x, &f, &p.residual)
    into = target("out", y, &vy, x, &f, &p.y)
    _held = take_shares(&p, positions if zeroed else None, &f, &vx, zeroed)
    p.count = 1
    _sums = run(&p, &vx)
    if into is not y:
        copyto(y, into)
    return y


def backward(
    dy, x, moments, mean, var, gamma, beta, axis, eps, activation, slope, residual, mask, weights,
    lengths, masked, from_output, out, out_residual, num_threads,
):
    """Return dx, dgamma, dbeta and, where there is a residual, its gradient.

    Through the statistics of the batch where `moments` is a tuple of count, mean and M2; see
    `batch_norm_backward` and `batch_norm_inference_backward`.
    """
    cdef Problem p
    cdef View vx, vd, vy, vr, vk, vg, vb, vm, vv
    cdef Fold f
    memset(&p, 0, sizeof(p))
    through = moments is not None
    given_x, given_d, given_r, given_g, given_b = x, dy, residual, gamma, beta
    given_m, given_v = mean, var
    zeroed = is_zero(masked)
    x = tensor("x", x, &vx, True)
    dy = companion("dy", dy, x, &vx, &vd)
    at = axis_of(axis, &vx)
    positions = select(x, at, mask, weights, lengths)
    if through:
        check_batch(&vx, at, positions, 2)
    options(&p, activation, slope, eps, through)
    channels = vx.shape[at]
    if through:
        _arguments.check_count(moments[0], vx.size // max(1, channels) if positions is None
                               else positions.total, vx.size)
        mean = required("moments.mean", moments[1], channels, &p.mean, &vm)
        var = required("moments.m2", moments[2], channels, &p.var, &vv)
    else:
        mean = required("mean", mean, channels, &p.mean, &vm)
        var = required("var", var, channels, &p.var, &vv)
    gamma = vector("gamma", gamma, channels, &p.gamma, &vg)
    beta = vector("beta", beta, channels, &p.beta, &vb)
    p.threads = threads_for(&vx, num_threads)
    if residual is not None:
        residual = companion("residual", residual, x, &vx, &vr)
    if from_output:
        _arguments.check_invertible(gamma, activation, p.slope, residual)
        p.inverse = True
        p.mean = p.beta         # what y - beta is a multiple of xhat about; 0 where absent
    dx = destination("out", out, x, &vx, &vy)
    if out is not None:
        guard("out", dx, &vy, given_x, x, &vx, True)
        guard("out", dx, &vy, given_d, dy, &vd, True)
        guard("out", dx, &vy, given_r, residual, &vr, True)
        guard("out", dx, &vy, given_m, mean, &vm, True)
        guard("out", dx, &vy, given_v, var, &vv, True)
        guard("out", dx, &vy, given_g, gamma, &vg, True)
        guard("out", dx, &vy, given_b, beta, &vb, True)
    kept = None
    if residual is not None:
        kept = destination("out_residual", out_residual, x, &vx, &vk)
        if out_residual is not None:
            guard("out_residual", kept, &vk, given_x, x, &vx, False)
            guard("out_residual", kept, &vk, given_d, dy, &vd, False)
            guard("out_residual", kept, &vk, given_r, residual, &vr, False)
            guard("out_residual", kept, &vk, given_m, mean, &vm, False)
            guard("out_residual", kept, &vk, given_v, var, &vv, False)
            guard("out_residual", kept, &vk, given_g, gamma, &vg, False)
            guard("out_residual", kept, &vk, given_b, beta, &vb, False)
            guard("out_residual", kept, &vk, dx, dx, &vy, False)
    elif out_residual is not None:
        _arguments.apart(out_residual, given_d, given_x, given_m, given_v, given_g, given_b,
                         name="out_residual", may_be_input=False)
    dtype = F64 if (vg.storage if gamma is not None else vx.storage) == FLOAT64 else F32
    if vx.size == 0:
        empties = dx, zeros(channels, dtype), zeros(channels, dtype)
        return empties if residual is None else (*empties, kept)
    p.reduce, p.apply = DOTS, UNSCALE if through else SCALE_DY
    x = folded(&p, x, &vx, at, &f)
    dy = beside(dy, &vd, x, &f, &p.dy)
    residual = beside(residual, &vr, x, &f, &p.residual)
    into = target("out", dx, &vy, x, &f, &p.y)
    if kept is not None:
        keep = target("out_residual", kept, &vk, x, &f, &p.dresidual)
    _held = take_shares(&p, positions, &f, &vx, zeroed)
    if not through:
        p.count = 1
    _sums = run(&p, &vx)
    results = into, rounded(p.sums + p.C, p.C, dtype), rounded(p.sums, p.C, dtype)
    if into is not dx:
        copyto(dx, into)
    if kept is None:
        return dx, results[1], results[2]
    if keep is not kept:
        copyto(kept, keep)
    return dx, results[1], results[2], kept


# ---- running statistics ------------------------------------------------------------------

cdef inline double at(const View* v, Py_ssize_t c) noexcept:
    """Value c of a vector."""
    if v.storage == FLOAT64:
        return (<const double*> (v.data + c * v.strides[0]))[0]
    return (<const float*> (v.data + c * v.strides[0]))[0]


def absorb(mean, var, batch_mean, batch_m2, double degrees, double weight):
    """Move running statistics towards those of a batch, in float64, rounded once.

    All are vectors of one length; `batch_m2` / `degrees` is the variance that is kept. Returns the
    new mean and variance, in the type of `mean`.
    """
    cdef View vectors[4]
    cdef Py_ssize_t c, i, channels
    mean = tensor("mean", mean, &vectors[0], False)
    var = tensor("var", var, &vectors[1], False)
    batch_mean = tensor("batch.mean", batch_mean, &vectors[2], False)
    batch_m2 = tensor("batch.m2", batch_m2, &vectors[3], False)
    channels = vectors[0].size
    for i in range(4):
        if vectors[i].ndim != 1 or vectors[i].size != channels:
            raise ValueError("running statistics must be vectors of one length")
    if vectors[0].storage != vectors[1].storage:
        raise ValueError(f"mean is {mean.dtype} and var is {var.dtype}; they must be of one type")
    moved = [empty(channels), empty(channels)]
    cdef double* new_mean = <double*> PyArray_DATA(<const PyArrayObject*> moved[0])
    cdef double* new_var = <double*> PyArray_DATA(<const PyArrayObject*> moved[1])
    for c in range(channels):
        new_mean[c] = (1 - weight) * at(&vectors[0], c) + weight * at(&vectors[2], c)
        new_var[c] = (1 - weight) * at(&vectors[1], c) + weight * (at(&vectors[3], c) / degrees)
    if vectors[0].storage == FLOAT64:
        return moved[0], moved[1]
    return rounded(new_mean, channels, F32), rounded(new_var, channels, F32)


# ---- what a call would do ----------------------------------------------------------------

WAYS = ("plain", "stream", "float16", "bfloat16")


def layout(x, int axis):
    """Return N, C and S of an array, and whether it is read in place."""
    cdef Problem p
    cdef View v
    cdef Fold f
    memset(&p, 0, sizeof(p))
    tensor("x", x, &v, True)
    used = folded(&p, x, &v, axis + v.ndim if axis < 0 else axis, &f)
    return p.N, p.C, p.S, used is x


def route(
    operation, N, C, S, dtype="f", *, activation=None, residual=False, mask=False, weights=False,
    masked="normalize", in_place=False, from_output=False, threads=1, l2=1 << 20, l3=32 << 20,
):
    """Return which way a call would go, as a dictionary of words.

    Parameters
    ----------
    operation : {"statistics", "forward", "inference", "backward", "inference_backward"}
    N, C, S : int
        As the array folds.
    dtype : {"f", "d", "e", "E"}
        float32, float64, float16 or bfloat16.
    activation, masked, from_output
        As in the call.
    residual, mask, weights, in_place : bool
        Whether there is one; whether the result goes to the place of x.
    threads, l2, l3 : int
        Threads, and bytes of the caches.
    """
    cdef Problem p
    cdef Caches caches
    cdef Tiling t
    cdef Route r
    memset(&p, 0, sizeof(p))
    p.N, p.C, p.S = N, C, S
    p.storage = {"f": FLOAT32, "d": FLOAT64, "e": HALF, "E": BRAIN}[dtype]
    p.item = {"f": 4, "d": 8, "e": 2, "E": 2}[dtype]
    p.reduce = {"inference": NO_SUMS, "statistics": SUMS, "forward": SUMS}.get(operation, DOTS)
    p.apply = {
        "statistics": NO_WRITE, "backward": UNSCALE, "inference_backward": SCALE_DY,
    }.get(operation, SCALE)
    options(&p, activation, 0.01, 1.0, True)
    p.chunks = chunks_of(N, C, S)
    p.x.pitch = p.y.pitch = p.dy.pitch = C * S * p.item
    p.x.at, p.dy.at = <char*> 64, <char*> 128       # places that differ, never looked at
    p.y.at = p.x.at if in_place else <char*> 192
    if residual:
        p.residual.at = <char*> 256
        p.dresidual.at = <char*> 320 if p.reduce == DOTS else NULL
    if mask or weights:
        p.share = &p
        p.weighted, p.zeroed = weights, is_zero(masked)
    p.inverse, p.threads = from_output, threads
    caches.l2, caches.l3 = l2, l3
    t = tiling_of(&p, &caches)
    r = route_of(&p, &t, &caches)
    return {
        "schedule": "owned" if t.owned else "shared",
        "sums": "runs" if r.reduce_by == BY_RUN else "columns",
        "writes": "runs" if r.apply_by == BY_RUN else "columns",
        "sums from": "stages" if r.reduce_from == STAGED_PIECES else "memory",
        "writes from": "stages" if r.apply_from == STAGED_PIECES else "memory",
        "way": WAYS[r.way],
        "gradient": {AGAIN: "again", IN_DRESIDUAL: "in dresidual", IN_DX: "in dx"}.get(
            r.gradient, "given"),
    }


# ---- rows: layer, RMS, group and instance normalization ----------------------------------

cdef void channels_first(View* v, int axis) noexcept:
    """Take an axis for axis 1."""
    cdef Py_ssize_t size = v.shape[axis], stride = v.strides[axis]
    while axis > 1:
        v.shape[axis], v.strides[axis] = v.shape[axis - 1], v.strides[axis - 1]
        axis -= 1
    v.shape[1], v.strides[1] = size, stride


cdef bint fold_rows(const View* v, int lead, bint grouped, bint* last, Fold* f) noexcept:
    """How an array folds into rows in place: in C order or, grouped, with its channels last."""
    cdef int k
    last[0] = False
    f.split, f.S = lead, 0
    by_stride(v, 0, lead, f.order)
    for k in range(lead, v.ndim):
        f.order[k] = k
    if lies(v, f, True, &f.pitch):
        return True
    if not grouped:
        return False
    last[0] = True
    by_stride(v, 2, v.ndim, f.order)        # into order[2:], and from there one place down
    for k in range(2, v.ndim):
        f.order[k - 1] = f.order[k]
    f.order[v.ndim - 1] = 1
    return lies(v, f, True, &f.pitch)


cdef object take_rows(RowProblem* p, object x, View* v, object form, Fold* f):
    """Take x as rows, and return it, or a copy where it does not fold in place."""
    cdef int axis = form.axis, lead = form.lead
    cdef bint last
    for turn in range(3):
        if axis:
            channels_first(v, axis)
        if fold_rows(v, lead, axis > 0, &last, f):
            break
        if turn == 0 and axis:
            x = x.copy(order="K")
        elif axis and axis != x.ndim - 1:
            x = moveaxis(ascontiguousarray(moveaxis(x, axis, 1)), 1, axis)
        else:
            x = ascontiguousarray(x)
        view_of(x, v, bfloat16)
    p.N, p.G, p.D, p.S = form.samples, form.groups, form.size, form.run
    p.K = p.D // p.S
    p.last = last
    p.storage, p.item = v.storage, v.item
    p.x.at, p.x.pitch = v.data, f.pitch
    return x


cdef object row_input(object array, View* v, object x, int axis, const Fold* f, Rows* rows):
    """Take dy, and return it, or a copy that lies in memory as x does."""
    if axis:
        channels_first(v, axis)
    if not lies(v, f, True, &rows.pitch):
        copy = any_empty_like(x)
        copyto(copy, array)
        array = copy
        view_of(array, v, bfloat16)
        if axis:
            channels_first(v, axis)
        lies(v, f, True, &rows.pitch)
    rows.at = v.data
    return array


cdef object row_output(object out, View* v, object x, int axis, const Fold* f, Rows* rows):
    """Take an output, and return it, or an array in its place that lies in memory as x does."""
    if v.data != NULL and axis:
        channels_first(v, axis)
    if v.data == NULL or not lies(v, f, True, &rows.pitch):
        _arguments.check_places("out", out)
        out = any_empty_like(x)
        view_of(out, v, bfloat16)
        if axis:
            channels_first(v, axis)
        lies(v, f, True, &rows.pitch)
    rows.at = v.data
    return out


cdef object row_vector(str name, object value, object form, object dtype, View* v):
    """Return gamma or beta as a vector of the type that is computed in; 1 or 0 where None."""
    if value is None:
        value = constant(form.values, dtype, name == "gamma")
        view_of(value, v, bfloat16)
        return value
    value = tensor(name, value, v, False)
    if v.ndim == 1 and (<tuple> form.shape) == (v.shape[0],) and v.strides[0] == v.item and (
            (v.storage == FLOAT64) == (dtype is F64)):
        return value
    if value.shape != form.shape:
        each = "a channel" if form.axis else "an element of the normalized axes"
        raise ValueError(
            f"{name} has shape {value.shape}; it must have shape {form.shape}, one value {each}")
    with errstate(all="ignore"):        # a value beyond float32 is inf
        value = value.astype(dtype, order="C")
    view_of(value, v, bfloat16)
    return value


cdef object run_rows(RowProblem* p):
    """Run a kernel on rows; return the array that holds its sums."""
    cdef RowTiling t = row_tiling(p)
    cdef Watch watch
    sums = empty(2 * p.N * p.G * t.slots + (2 * t.chunks * p.G * p.K if p.backward else 0))
    p.sums = <double*> PyArray_DATA(<const PyArrayObject*> sums)
    p.parts = p.sums + 2 * p.N * p.G * t.slots
    if p.N * p.G * p.D < SERIAL:
        row_kernels.rows(p)
        return sums
    p.threads = threads_now(&patience, p.threads)
    p.watch, watch.worked = &watch, 0
    with nogil:
        watch.begun = seconds()
        row_kernels.rows(p)
        watch.took = seconds() - watch.begun
    if p.threads > 1:
        learn(&patience, &watch)
    return sums


def normalize_rows(
    x, axis, num_groups, gamma, beta, eps, bint centred, out, num_threads,
):
    """Return y, mean and M2 of the rows, (N * G,), and the form; `num_groups` as in form_of."""
    cdef RowProblem p
    cdef View vx, vy, vg, vb
    cdef Fold f
    memset(&p, 0, sizeof(p))
    given_x, given_g, given_b = x, gamma, beta
    x = tensor("x", x, &vx, True)
    form = form_of(x.shape, axis, num_groups)
    wide = vx.storage == FLOAT64
    dtype = F64 if wide else F32
    if eps is None and not centred:
        eps = _arguments.EPS[dtype]
    if type(eps) is not float or not 0 < eps < INFINITY:
        _arguments.check_eps(eps)
    p.eps = eps
    gamma = row_vector("gamma", gamma, form, dtype, &vg)
    beta = row_vector("beta", beta, form, dtype, &vb)
    p.threads = threads_for(&vx, num_threads)
    y = destination("out", out, x, &vx, &vy)
    if out is not None:
        guard("out", y, &vy, given_x, x, &vx, True)
        guard("out", y, &vy, given_g, gamma, &vg, True)
        guard("out", y, &vy, given_b, beta, &vb, True)
    if vx.size == 0:
        return y, zeros(form.rows), zeros(form.rows), form
    p.centred = centred
    x = take_rows(&p, x, &vx, form, &f)
    into = row_output(y, &vy, x, form.axis, &f, &p.y)
    mean, m2 = empty(form.rows), empty(form.rows)
    p.mean = <double*> PyArray_DATA(<const PyArrayObject*> mean)
    p.m2 = <double*> PyArray_DATA(<const PyArrayObject*> m2)
    p.gamma, p.beta = vg.data, vb.data
    _sums = run_rows(&p)
    if into is not y:
        copyto(y, into)
    if f.split > 1:
        order = tuple(f.order[k] for k in range(f.split))
        sizes = x.shape[:form.lead]
        mean, m2 = ordered(mean, sizes, order, False), ordered(m2, sizes, order, False)
    PyArray_CLEARFLAGS(<PyArrayObject*> mean, NPY_ARRAY_WRITEABLE)
    PyArray_CLEARFLAGS(<PyArrayObject*> m2, NPY_ARRAY_WRITEABLE)
    return y, mean, m2, form


def normalize_rows_backward(
    dy, x, axis, num_groups, check, statistics, gamma, eps, bint centred, out, num_threads,
):
    """Return dx, dgamma and dbeta; `check`, given the form, returns mean and M2 of the rows."""
    cdef RowProblem p
    cdef View vx, vd, vy, vg
    cdef Fold f
    cdef RowTiling t
    cdef Py_ssize_t i, k, C
    memset(&p, 0, sizeof(p))
    given_x, given_d, given_g = x, dy, gamma
    x = tensor("x", x, &vx, True)
    dy = companion("dy", dy, x, &vx, &vd)
    form = form_of(x.shape, axis, num_groups)
    dtype = F64 if vx.storage == FLOAT64 else F32
    if eps is None and not centred:
        eps = _arguments.EPS[dtype]
    if type(eps) is not float or not 0 < eps < INFINITY:
        _arguments.check_eps(eps)
    p.eps = eps
    mean, m2 = check(form, statistics)
    result = dtype if gamma is None else _arguments.tensor("gamma", gamma, half=False).dtype
    gamma = row_vector("gamma", gamma, form, dtype, &vg)
    p.threads = threads_for(&vx, num_threads)
    dx = destination("out", out, x, &vx, &vy)
    if out is not None:
        guard("out", dx, &vy, given_x, x, &vx, True)
        guard("out", dx, &vy, given_d, dy, &vd, True)
        guard("out", dx, &vy, given_g, gamma, &vg, True)
        _arguments.apart(dx, mean, m2)
    if vx.size == 0:
        return dx, zeros(form.shape, result), zeros(form.shape, result)
    p.backward, p.centred = True, centred
    x = take_rows(&p, x, &vx, form, &f)
    dy = row_input(dy, &vd, x, form.axis, &f, &p.dy)
    into = row_output(dx, &vy, x, form.axis, &f, &p.y)
    if f.split > 1:
        order = tuple(f.order[k] for k in range(f.split))
        mean, m2 = (ordered(v, x.shape[:form.lead], order, True) for v in (mean, m2))
    mean, m2 = ascontiguousarray(mean, F64), ascontiguousarray(m2, F64)
    p.mean = <double*> PyArray_DATA(<const PyArrayObject*> mean)
    p.m2 = <double*> PyArray_DATA(<const PyArrayObject*> m2)
    p.gamma = vg.data
    _sums = run_rows(&p)
    t = row_tiling(&p)
    C = p.G * p.K
    for k in range(1, t.chunks):        # in order
        for i in range(2 * C):
            p.parts[i] += p.parts[k * 2 * C + i]
    dgamma, dbeta = rounded(p.parts, C, result), rounded(p.parts + C, C, result)
    if into is not dx:
        copyto(dx, into)
    return dx, dgamma.reshape(form.shape), dbeta.reshape(form.shape)
