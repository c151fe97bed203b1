# cython: language_level=3
# cython: cdivision=True
# cython: binding=False
# From the arguments of a public call to a kernel call: batch normalization.
#
# Each call takes the same steps, whatever is special about it: look at the arrays, check, fold to
# (N, C, S), allocate, run. What travels together comes as one:
#
# settings      (axis, eps, activation, slope)
# selected      (mask, weights, lengths, masked): which positions count, and what becomes of others
#
# N = everything before the channel axis, C = channels, S = everything after it.

from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.string cimport memcpy, memset

from cybn._dispatch.arguments cimport (
    BETA, DY, GAMMA, MEAN, OUT, OUT_RESIDUAL, RESIDUAL, VAR, Call, Kernel, X, begin,
    deliver, frozen, keep_apart, launch, look, moments_of, new_vector, replace, rounded, settle, shape_of,
    take_companion, take_eps, take_output, take_vector, threads_for)
from cybn._dispatch.arrays cimport (
    NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_F_CONTIGUOUS, PyArray_DATA, PyArrayObject, View, fold)
from cybn._dispatch.shares cimport take_shares
from cybn._kernels.activation cimport (
    GELU, HARDSWISH, LEAKY_RELU, RELU, RELU6, SIGMOID, SILU, TANH, Activation)
from cybn._kernels.problem cimport (
    BRAIN, DOTS, FLOAT32, FLOAT64, HALF, NO_SUMS, NO_WRITE, SCALE, SCALE_DY, SERIAL, SUMS, UNSCALE,
    Apply, Caches, Kernels, Problem, Reduce, Route, Storage, Tiling, Vector, chunks_of, route_of,
    tiling_of)

from numpy import ascontiguousarray, ndarray, zeros

from .. import _arguments

# What a call may name, and the kernels' number of it. A new activation is a line here.
ACTIVATIONS = {
    "relu": RELU, "relu6": RELU6, "leaky_relu": LEAKY_RELU, "hardswish": HARDSWISH,
    "sigmoid": SIGMOID, "tanh": TANH, "silu": SILU, "gelu": GELU}

SMALL = SERIAL                  # values from which a call is not a small one

cdef enum:
    MARKED = 2048               # bytes of an array that are remembered one and all
    MARKS = 64                  # values of a larger one that are, about

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
    """Take what all calls have; `p` says already what is to be done.

    A part of a batch may have any number of values.
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
    """Take x as (N, C, S): in place, or a copy where it does not fold."""
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
    """Refuse a batch whose channels have no variance, or no values."""
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


cdef object run(Call* c, Problem* p):
    """Settle where everything lies, and run a kernel; return the array that holds its sums."""
    settle(c, DY, &p.dy)
    settle(c, RESIDUAL, &p.residual)
    settle(c, OUT, &p.y)
    settle(c, OUT_RESIDUAL, &p.dresidual)
    p.count = 1 if p.apply == SCALE_DY or p.apply == SCALE and p.reduce == NO_SUMS else p.M
    sums = None
    if p.reduce != NO_SUMS:
        sums = new_vector((2 * p.chunks + 1) * p.C, True)
        p.sums = <double*> PyArray_DATA(<const PyArrayObject*> sums)
        if p.reduce == SUMS:
            p.mean.data, p.mean.wide = p.sums, True
            p.var.data, p.var.wide = p.sums + p.C, True
    launch(c, <Kernel> kernels.batch_norm, p, &p.threads, &p.watch)
    return sums


# ---- the calls ---------------------------------------------------------------------------

cdef object count_of(const Call* c, const Problem* p):
    """Return how many values a channel has: a float where they are weighted."""
    if p.share == NULL:
        return p.N * p.S
    return c.total if p.weighted else c.counted


cdef object moments_in(const Call* c, const Problem* p):
    """Return the moments that a kernel has left in `sums`."""
    if c.at[X].view.size == 0:
        return moments_of(0, frozen(NULL, 0), frozen(NULL, 0))
    return moments_of(count_of(c, p), frozen(p.sums, p.C), frozen(p.sums + p.C, p.C))


def statistics(x, axis, selected, num_threads):
    """Return the moments of each channel; see `moments`."""
    cdef Call c
    cdef Problem p
    memset(&p, 0, sizeof(p))
    p.reduce, p.apply = SUMS, NO_WRITE
    held = []
    prepare(&c, &p, held, x, None, None, None, (axis, 1.0, None, 0), selected, num_threads)
    _sums = run(&c, &p) if c.at[X].view.size else None
    return moments_in(&c, &p)


def forward(x, gamma, beta, residual, settings, selected, out, num_threads, exchange=None):
    """Return y and the moments of the batch; see `batch_norm`.

    `exchange` is for an x that is a part of a batch. Given how many values a channel has, and their
    count, mean and M2, it returns the mean and the variance to normalize with. It is called when
    every check has passed and nothing of the caller's is written.
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
        return deliver_part(&c, &p, exchange)
    _sums = run(&c, &p) if c.at[X].view.size else None
    return deliver(&c, OUT), moments_in(&c, &p)


cdef object deliver_part(Call* c, Problem* p, object exchange):
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
        _sums = run(c, p)
        mean, m2 = frozen(p.sums, channels), frozen(p.sums + channels, channels)
    use_mean, use_var = exchange(number, count, mean, m2)
    take_vector(c, MEAN, "mean", use_mean, channels, True, &p.mean)
    take_vector(c, VAR, "var", use_var, channels, True, &p.var)
    if some:
        p.reduce, p.apply = NO_SUMS, SCALE
        run(c, p)
    return deliver(c, OUT), moments_of(count, mean, m2)


def learn(
    x, gamma, beta, residual, settings, selected, out, num_threads, running_mean, running_var,
    double weight, Py_ssize_t ddof,
):
    """Return y, the moments of the batch, and running statistics that have moved towards them.

    What a layer does in training: `forward` and `absorb` in one, of which all is checked before
    anything is written.
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
        return deliver(&c, OUT), moments_in(&c, &p), running_mean, running_var
    _sums = run(&c, &p)
    moved = moved_to(&mean, &var, p.sums, p.sums + p.C, p.C, count_of(&c, &p) - ddof, weight)
    return deliver(&c, OUT), moments_in(&c, &p), *moved


def inference(
    x, mean, var, gamma, beta, residual, settings, selected, out, num_threads,
):
    """Return y; see `batch_norm_inference`."""
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
        run(&c, &p)
    return deliver(&c, OUT)


def backward(
    dy, x, statistics, gamma, beta, residual, settings, selected, from_output, out, out_residual,
    num_threads, exchange=None,
):
    """Return dx, dgamma, dbeta and, where there is a residual, its gradient.

    Through the statistics of the batch where `statistics` is `Moments`; constant where it is a
    tuple of mean and variance. See `batch_norm_backward` and `batch_norm_inference_backward`.

    `exchange` is for an x that is a part of the batch, whose moments `statistics` are. Given dbeta
    and dgamma of the part, (2, C) in float64, it returns those of the batch. It is called when
    every check has passed and nothing of the caller's is written.
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
        if c.at[X].view.size and not part:
            _arguments.check_count(statistics.count, count_of(&c, &p))
        take_vector(&c, MEAN, "moments.mean", statistics.mean, channels, True, &p.mean)
        take_vector(&c, VAR, "moments.m2", statistics.m2, channels, True, &p.var)
    else:
        take_vector(&c, MEAN, "mean", statistics[0], channels, True, &p.mean)
        take_vector(&c, VAR, "var", statistics[1], channels, True, &p.var)
    if from_output:
        _arguments.check_invertible(gamma, settings[2], p.slope, residual)
        p.inverse = True
        p.mean = p.beta         # what y - beta is a multiple of xhat about; 0 where absent
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
        _sums = run(&c, &p)
    results = rounded(p.sums + p.C, p.C, wide), rounded(p.sums, p.C, wide)
    if residual is None:
        return deliver(&c, OUT), *results
    return deliver(&c, OUT), *results, deliver(&c, OUT_RESIDUAL)


cdef object run_part(
    Call* c, Problem* p, double count, bint out_given, bint residual_given, object exchange
):
    """Run a backward whose sums are exchanged before they are used; return their array.

    The gradient before the activation is left where that of the residual goes, or dx: in a
    stand-in, where that is the caller's.
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
    sums = run(c, p)
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
    """Refuse an `out_residual` that lies over an input, though there is no residual."""
    c.at[OUT_RESIDUAL].given = c.at[OUT_RESIDUAL].used = <PyObject*> out_residual
    look(out_residual, &c.at[OUT_RESIDUAL].view)
    keep_apart(c, OUT_RESIDUAL, "out_residual")
    c.at[OUT_RESIDUAL].given = NULL
    return 0


# ---- running statistics ------------------------------------------------------------------

cdef int take_running(
    Call* c, object mean, object var, Py_ssize_t channels, Vector* into_mean, Vector* into_var
) except -1:
    """Take running statistics, which are of one type."""
    take_vector(c, MEAN, "running_mean", mean, channels, True, into_mean)
    take_vector(c, VAR, "running_var", var, channels, True, into_var)
    if into_mean.wide != into_var.wide:
        raise ValueError(f"mean is {mean.dtype} and var is {var.dtype}; they must be of one type")
    return 0


cdef double moved(const Vector* v, Py_ssize_t c, double to, double weight) noexcept:
    """Return value c of running statistics moved towards `to`; a term of weight 0 may be NaN."""
    cdef double old = 0
    if weight < 1:
        old = (<const double*> v.data)[c] if v.wide else (<const float*> v.data)[c]
    return old if weight == 0 else (1 - weight) * old + weight * to


cdef tuple moved_to(
    const Vector* mean, const Vector* var, const double* batch_mean, const double* batch_m2,
    Py_ssize_t channels, double degrees, double weight
):
    """Return running statistics moved towards those of a batch, in float64, rounded once."""
    cdef Py_ssize_t c
    held = new_vector(2 * channels, True)
    cdef double* new = <double*> PyArray_DATA(<const PyArrayObject*> held)
    for c in range(channels):
        new[c] = moved(mean, c, batch_mean[c], weight)
        new[channels + c] = moved(var, c, batch_m2[c] / degrees, weight)
    return rounded(new, channels, mean.wide), rounded(new + channels, channels, mean.wide)


def absorb(mean, var, batch_mean, batch_m2, double degrees, double weight):
    """Move running statistics towards those of a batch, in float64, rounded once.

    All are vectors of one length; `batch_m2` / `degrees` is the variance that is kept. Returns the
    new mean and variance, in the type of `mean`.
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
    """Return a few values of each array, all of a small one: most changes are seen in them."""
    return mark(x), mark(gamma), mark(beta), mark(residual)


cdef object mark(object array):
    """Return values of an array as bytes; None where it is None."""
    cdef View v
    cdef double some[2 * MARKS]     # of any type
    cdef Py_ssize_t i, step
    if array is None:
        return None
    look(array, &v)
    if v.size * v.item > MARKED:
        if v.flags & (NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_F_CONTIGUOUS):
            # An odd step, so that they lie in all samples, and in many channels and positions.
            step = v.size // MARKS | 1
            for i in range((v.size + step - 1) // step):
                memcpy(<char*> some + i * v.item, v.data + i * step * v.item, v.item)
            return (<const char*> some)[:i * v.item + v.item]
        few = array[tuple([slice(None, None, n // 2 or 1) for n in array.shape])]
        return few.tobytes()
    if v.flags & NPY_ARRAY_C_CONTIGUOUS:
        return v.data[:v.size * v.item]
    return array.tobytes()


# ---- what a call would do ----------------------------------------------------------------

WAYS = ("plain", "stream", "float16", "bfloat16")
LOOPS, SOURCES = ("runs", "columns"), ("memory", "stages")
GRADIENTS = ("given", "again", "in dresidual", "in dx")
ITEMS = {"f": (FLOAT32, 4), "d": (FLOAT64, 8), "e": (HALF, 2), "E": (BRAIN, 2)}
OPERATIONS = {
    "statistics": (SUMS, NO_WRITE), "forward": (SUMS, SCALE), "inference": (NO_SUMS, SCALE),
    "backward": (DOTS, UNSCALE), "inference_backward": (DOTS, SCALE_DY)}


def layout(x, int axis):
    """Return N, C and S of an array, and whether it is read in place."""
    cdef Call c
    cdef Problem p
    held = []
    begin(&c, held, x)
    c.axis = axis + c.at[X].view.ndim if axis < 0 else axis
    fold_x(&c, &p)
    return p.N, p.C, p.S, c.at[X].used == c.like


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
    memset(&p, 0, sizeof(p))
    p.N, p.C, p.S = N, C, S
    p.storage, p.item = ITEMS[dtype]
    p.reduce, p.apply = OPERATIONS[operation]
    p.activation = <Activation> <int> _arguments.activation(activation, 0.01, ACTIVATIONS)[0]
    p.slope = 0.01
    p.chunks = chunks_of(N, C, S)
    p.x.at, p.dy.at = <char*> 64, <char*> 128       # places that differ, never looked at
    p.y.at = p.x.at if in_place else <char*> 192
    if residual:
        p.residual.at = <char*> 256
        p.dresidual.at = <char*> 320 if p.reduce == DOTS else NULL
    if mask or weights:
        p.share, p.weighted, p.zeroed = &p, weights, masked == "zero"
    p.inverse, p.threads = from_output, threads
    caches.l2, caches.l3 = l2, l3
    cdef Tiling t = tiling_of(&p, &caches)
    cdef Route r = route_of(&p, &t, &caches)
    return {
        "schedule": "owned" if t.owned else "shared",
        "sums": LOOPS[r.reduce_by],
        "writes": LOOPS[r.apply_by],
        "sums from": SOURCES[r.reduce_from],
        "writes from": SOURCES[r.apply_from],
        "way": WAYS[r.way],
        "gradient": GRADIENTS[r.gradient],
    }
