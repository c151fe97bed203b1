"""Functions that remember nothing: arrays in, arrays out.

Each offers plain calls to a kernel that checks, allocates and computes at once. For all others it
checks the arguments, folds them to (N, C, S), allocates, and calls one kernel. Nothing is written
before every check has passed.

N = everything before the channel axis, C = channels, S = everything after it.
"""

from __future__ import annotations

from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _arguments, _layout, _statistics
from ._arguments import (
    apart,
    channel_axis,
    check_eps,
    companion,
    destination,
    gradient_pair,
    parameters,
    storage,
    tensor,
)
from ._memory import empty_like
from ._runtime import kernels, thread_count
from ._selection import Positions, choose
from ._statistics import measure
from .moments import Moments

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "moments",
]

SMALL: int = kernels.SMALL  # elements from which a call is not a small one

# By storage, as in _arguments: the kernels' names of element types.
_ELEMENTS = {"f": "float", "d": "double", "e": "uint16_t", "E": "uint16_t"}
_PARAMETERS = {"f": "float", "d": "double"}
_STORAGE: dict[str, int] = {"f": 0, "d": 0} | kernels.STORAGE
_ACTIVATIONS: dict[str, int] = kernels.ACTIVATIONS
_NO_ACTIVATION = (0, 0.0)  # what activation_of says of None

_ABSORB: Any
_PLAIN_FORWARD: Any
_PLAIN_INFERENCE: Any
_PLAIN_BACKWARD: Any
_FORWARD: dict[str, Any]
_INFERENCE: dict[str, Any]
_BACKWARD: dict[str, Any]


def _bind(module: ModuleType) -> None:
    """Call the kernels of `module` from now on; keys are storage and the parameters' type."""
    global _ABSORB, _PLAIN_FORWARD, _PLAIN_INFERENCE, _PLAIN_BACKWARD
    global _FORWARD, _INFERENCE, _BACKWARD
    _statistics.bind(module)
    _PLAIN_FORWARD, _PLAIN_INFERENCE = module.plain_forward, module.plain_inference
    _PLAIN_BACKWARD = module.plain_backward
    module.connect(empty_like, thread_count)
    _ABSORB = module.absorb
    _FORWARD, _INFERENCE, _BACKWARD = (
        {e + p: kernel[_ELEMENTS[e], _PARAMETERS[p]] for e in _ELEMENTS for p in _PARAMETERS}
        for kernel in (module.forward, module.inference, module.backward)
    )


_bind(kernels)


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    slope: float = 0.01,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: str = "normalize",
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], Moments]:
    """Normalize each channel with the mean and biased variance of this batch.

    ``y = f((x - mean) / sqrt(var + eps) * gamma + beta + residual)`` (Ioffe and Szegedy 2015,
    Algorithm 1), where f is the activation.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, at least 2 axes
        The batch. Read in place where its memory is contiguous in any order of its axes, or
        channels-first and sliced along N; copied first where it is not. Half types (bfloat16 is
        that of ml_dtypes) are widened to float32 as they are read, and results are rounded to
        them, to nearest even; what is beyond their largest value becomes infinite.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each channel, float32 or float64; 1 and 0 where None.
    axis : int, default 1
        The channel axis; negative counts from the end.
    eps : float, default 1e-5
        Added to the variance. Positive.
    activation : {None, "relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu"}
        f, computed before y leaves the cache. NaN stays NaN; relu, relu6 and leaky_relu leave
        -0.0 as it is, and their derivative where their argument is 0 is that of negative ones.
    slope : float, default 0.01
        Of leaky_relu below 0.
    residual : array_like, shape and dtype of `x`, optional
        Added before the activation. Copied first where it does not lie in memory as `x` does.
    mask : array_like of bool, optional
        True where a position counts, in all channels alike: broadcastable to the shape of `x`
        without its channel axis, such as (N, L) for (N, C, L) and (N, L, C); or with as many
        axes as `x`, of size 1 along that one. What does not count is left out of the statistics,
        may be NaN there, and gets no gradient.
    weights : array_like, optional
        How often each position counts: finite, not negative, and of a shape as that of `mask`. A
        weight of 0 masks out. Held in the type that is computed in, float32 for half types too.
    lengths : array_like of int, shape (N,), optional
        How many positions of each sample count, from the front, along the first axis beside those
        of batch and channels, such as L. Where several of the three are given, all must agree.
    masked : {"normalize", "zero"}, default "normalize"
        What y is where a position does not count: normalized like the rest, or 0, also with an
        activation.
    out : ndarray, optional
        Where y goes: shape and dtype of `x`. May be `x` or `residual` itself; must not overlap
        them otherwise. With the memory layout of `x` it is written in place, without a copy.
    num_threads : int, optional
        Threads for this call; `cybn.get_num_threads` where None. Results are the same bits for
        any number.

    Returns
    -------
    y : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    moments : Moments
        Count, mean and M2 of each channel, in float64. Count is N * S, or how many positions
        count, or the sum of the weights, a float.

    Raises
    ------
    TypeError
        If an array is of another dtype.
    ValueError
        If a shape does not fit, a channel has fewer than two values that count, `eps` is not
        positive, `activation` or `masked` is unknown, a weight is negative or not finite, or `out`
        is read-only or overlaps an input in part.

    Notes
    -----
    For float32, mean and variance come from float64 sums of short float32 sums, centred near the
    mean; the error of y stays below ``2**-21 * (|gamma * xhat| + |gamma| + |beta|)`` while the
    mean is no larger than 1e6 standard deviations. Where x is the same few values again and again,
    stretched along an axis or in a periodic pattern, it stays below four times that, as roundings
    then go one way (docs/math.md, 6.5).

    Examples
    --------
    >>> import numpy as np
    >>> import cybn
    >>> y, m = cybn.batch_norm(np.array([[1.0], [3.0]]), eps=1e-12)
    >>> y.ravel().round(6), m.mean, m.var()
    (array([-1.,  1.]), array([2.]), array([1.]))
    """
    act = _NO_ACTIVATION if activation is None else activation_of(activation, slope)
    zero = masked != "normalize" and is_zero(masked)
    if residual is None and mask is None and weights is None and lengths is None:
        done = plain_forward(x, gamma, beta, axis, eps, act, out, num_threads)
        if done is not None:
            return done
    apart(out, x, gamma, beta, residual)
    x = tensor("x", x)
    axis = channel_axis(x, axis)
    positions = choose(x.shape, axis, mask, weights, lengths)
    _check_batch(x, axis, positions)
    check_eps(eps)
    vectors, p = parameters(x.shape[axis], gamma=gamma, beta=beta)
    nt = thread_count(num_threads)
    r = None if residual is None else companion("residual", residual, x)
    y = destination(out, x, (x, r, *vectors))
    if x.size == 0:
        return y, _no_channels(x, axis)
    x, plan = _layout.fold(x, axis)
    target = _layout.like_empty(y, x, plan)
    work = _statistics.work(plan)
    e = storage(x.dtype)
    arrays = plan.view(x), plan.view(target), _folded(r, x, plan)
    chosen = _statistics.shared(positions, x, plan, zero)
    _FORWARD[e + p](*arrays, *vectors, work, eps, *act, *chosen, _STORAGE[e], nt)
    return _deliver(y, target), _moments(plan, work, positions)


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    slope: float = 0.01,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    masked: str = "normalize",
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """Normalize each channel with a given mean and variance.

    ``y = f((x - mean) / sqrt(var + eps) * gamma + beta + residual)``.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, at least 2 axes
        As in `batch_norm`; may be empty.
    mean, var : array_like, shape (C,)
        Mean and variance of each channel, float32 or float64. A float64 mean is used in full
        with float32 data too.
    gamma, beta, axis, activation, slope, residual, out, num_threads
        As in `batch_norm`.
    mask, weights, lengths, masked
        As in `batch_norm`. They matter only with ``masked="zero"``, which puts 0 where a position
        does not count, or has weight 0.
    eps : float, default 1e-5
        Added to the variance. Not negative.

    Returns
    -------
    ndarray
        `out`, or a new array with the dtype and memory layout of `x`.

    Raises
    ------
    TypeError
        If an array is not float32 or float64.
    ValueError
        If a shape does not fit, `eps` is negative, or `out` is read-only or overlaps an input.
    """
    act = _NO_ACTIVATION if activation is None else activation_of(activation, slope)
    zero = masked != "normalize" and is_zero(masked)
    if residual is None and mask is None and weights is None and lengths is None:
        done: NDArray[Any] | None
        done = _PLAIN_INFERENCE(x, mean, var, gamma, beta, axis, eps, act, out, num_threads)
        if done is not None:
            return done
    apart(out, x, mean, var, gamma, beta, residual)
    x = tensor("x", x)
    axis = channel_axis(x, axis)
    positions = choose(x.shape, axis, mask, weights, lengths)
    check_eps(eps, least=0)
    vectors, p = parameters(x.shape[axis], mean=mean, var=var, gamma=gamma, beta=beta)
    nt = thread_count(num_threads)
    r = None if residual is None else companion("residual", residual, x)
    y = destination(out, x, (x, r, *vectors))
    if x.size == 0:
        return y
    x, plan = _layout.fold(x, axis)
    target = _layout.like_empty(y, x, plan)
    e = storage(x.dtype)
    arrays = plan.view(x), plan.view(target), _folded(r, x, plan)
    chosen = _statistics.shared(positions if zero else None, x, plan, zero)
    _INFERENCE[e + p](*arrays, *vectors, plan.chunks, eps, *act, *chosen, _STORAGE[e], nt)
    return _deliver(y, target)


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    slope: float = 0.01,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    from_output: bool = False,
    out: NDArray[Any] | None = None,
    out_residual: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], ...]:
    """Gradients of `batch_norm`: through the mean and the variance of the batch.

    Parameters
    ----------
    dy : array_like, shape and dtype of `x`
        Gradient with respect to y. Copied first where it does not lie in memory as `x` does.
    x : array_like
        The batch given to `batch_norm`.
    moments : Moments
        What `batch_norm` returned for it.
    gamma, beta : array_like, shape (C,), optional
        As given to `batch_norm`. beta matters only with an activation or `from_output`.
    axis, eps, activation, slope, residual, mask, weights, lengths, num_threads
        As given to `batch_norm`. What the activation was given is computed again from `x`. Where a
        position does not count, dy is not looked at, and dx and dresidual are 0, whatever `masked`
        was.
    from_output : bool, default False
        `x` is not the batch but the y that `batch_norm` made of it, for a forward that wrote over
        its input. Needs no activation or leaky_relu, no residual, and no gamma of 0; xhat is then
        known to about ``2**-23 * |y / gamma|`` in float32.
    out : ndarray, optional
        Where dx goes; may be `dy`, `x` or `residual` itself.
    out_residual : ndarray, optional
        Where dresidual goes; must not overlap another array.

    Returns
    -------
    dx : ndarray
        `out`, or a new array with the dtype and memory layout of `x`.
    dgamma, dbeta : ndarray, shape (C,)
        Gradients with respect to gamma and beta, in the dtype of `gamma`; where that is None, of
        `x`, but float32 for half types.
    dresidual : ndarray
        Gradient with respect to the residual: `out_residual` or a new array; only where there
        was a residual.

    Raises
    ------
    TypeError
        If an array is not float32 or float64, or `moments` is no `Moments`.
    ValueError
        If shapes or dtypes do not fit, or `moments` has another count than a channel of `x`.
    """
    act = _NO_ACTIVATION if activation is None else activation_of(activation, slope)
    plain = residual is None and mask is None and weights is None and lengths is None
    if plain and not from_output and out_residual is None and _belong(moments, x):
        given = moments.mean, moments.m2, True
        done = _plain_backward(dy, x, *given, gamma, beta, axis, eps, act, out, num_threads)
        if done is not None:
            return done
    apart(out, dy, x, gamma, beta, residual)
    apart(out_residual, dy, x, gamma, beta, residual, name="out_residual", may_be_input=False)
    dy, x, axis = _gradient_pair(dy, x, axis)
    positions = choose(x.shape, axis, mask, weights, lengths)
    _check_batch(x, axis, positions)
    check_eps(eps)
    if not isinstance(moments, Moments):
        raise TypeError(
            f"moments is of type {type(moments).__name__}; it must be the Moments that "
            "batch_norm returned for x"
        )
    count = x.size // max(1, x.shape[axis]) if positions is None else positions.total
    if x.size and (isinstance(moments.count, np.ndarray) or moments.count != count):
        raise ValueError(
            f"moments has count {moments.count}; a channel of x has {count} values. "
            "Give the Moments that batch_norm returned for this x, and the same mask, weights "
            "and lengths"
        )
    fixed, _ = parameters(x.shape[axis], **{"moments.mean": moments.mean, "moments.m2": moments.m2})
    through = _Through(fixed[0], fixed[1], True, gamma, beta, act, residual, positions, from_output)
    return _backward(dy, x, through, axis, eps, (out, out_residual), num_threads)


def batch_norm_inference_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    slope: float = 0.01,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    from_output: bool = False,
    out: NDArray[Any] | None = None,
    out_residual: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> tuple[NDArray[Any], ...]:
    """Gradients of `batch_norm_inference`: mean and variance are constants.

    Parameters
    ----------
    dy, x, gamma, beta, axis, eps, activation, slope, residual, from_output, num_threads
        As in `batch_norm_backward`; `x` may be empty.
    mask, weights, lengths
        As in `batch_norm_backward`; weights matter only where they are 0.
    mean, var : array_like, shape (C,)
        As given to `batch_norm_inference`.
    out : ndarray, optional
        Where dx goes; may be `dy`, `x` or `residual` itself.
    out_residual : ndarray, optional
        Where dresidual goes; must not overlap another array.

    Returns
    -------
    dx, dgamma, dbeta, dresidual : ndarray
        As in `batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm_inference`.
    """
    act = _NO_ACTIVATION if activation is None else activation_of(activation, slope)
    plain = residual is None and mask is None and weights is None and lengths is None
    if plain and not from_output and out_residual is None:
        fixed = mean, var, False
        done = _plain_backward(dy, x, *fixed, gamma, beta, axis, eps, act, out, num_threads)
        if done is not None:
            return done
    inputs = dy, x, mean, var, gamma, beta, residual
    apart(out, *inputs)
    apart(out_residual, *inputs, name="out_residual", may_be_input=False)
    dy, x, axis = _gradient_pair(dy, x, axis)
    check_eps(eps, least=0)
    given, _ = parameters(x.shape[axis], mean=mean, var=var)
    wide = [v.astype(np.float64, copy=False) for v in given]
    positions = choose(x.shape, axis, mask, weights, lengths)
    through = _Through(wide[0], wide[1], False, gamma, beta, act, residual, positions, from_output)
    return _backward(dy, x, through, axis, eps, (out, out_residual), num_threads)


def moments(
    x: ArrayLike,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    num_threads: int | None = None,
) -> Moments:
    """Count, mean and M2 of each channel of `x`, as `batch_norm` computes them.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, at least 2 axes
        At least one value a channel that counts.
    axis, mask, weights, lengths, num_threads
        As in `batch_norm`.

    Returns
    -------
    Moments
        In float64. Merge those of several arrays with `Moments.merge`.

    Raises
    ------
    TypeError
        If `x` is not float32 or float64.
    ValueError
        If `x` has fewer than 2 axes, or no values that count.
    """
    x = tensor("x", x)
    axis = channel_axis(x, axis)
    positions = choose(x.shape, axis, mask, weights, lengths)
    _check_batch(x, axis, positions, least=1)
    nt = thread_count(num_threads)
    if x.size == 0:
        return _no_channels(x, axis)
    return Moments._adopt(*measure(x, axis, nt, positions))


def absorb(
    mean: NDArray[Any], var: NDArray[Any], batch: Moments, weight: float, ddof: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Move running statistics towards those of a batch; what a layer does in training.

    ``(1 - weight) * running + weight * batch``, in float64, rounded once. What weighs nothing is
    not looked at, and may be NaN.

    Parameters
    ----------
    mean, var : ndarray, shape (C,)
        Running mean and variance, of one float type. Not changed.
    batch : Moments
        Of the batch, with more than `ddof` values a channel.
    weight : float
        Of the batch, in [0, 1].
    ddof : int
        1 keeps the unbiased variance of the batch, 0 the biased one.

    Returns
    -------
    mean, var : ndarray, shape (C,)
        New arrays.

    Raises
    ------
    ValueError
        If `batch` has another number of channels.
    """
    if len(batch) != mean.size:
        raise ValueError(f"batch has {len(batch)} channels; it must have {mean.size}")
    if weight == 0:
        return mean.copy(), var.copy()
    if weight == 1:
        mean = var = np.zeros_like(mean)
    moved: tuple[NDArray[Any], NDArray[Any]] | None
    of_batch = batch.mean, batch.m2, batch.count - ddof, weight
    moved = _ABSORB(mean, var, *of_batch)
    if moved is None:  # unpickled into unaligned memory, or mapped from a file
        mean, var = tensor("mean", mean, half=False), tensor("var", var, half=False)
        moved = _ABSORB(mean, var, *of_batch)
        assert moved is not None
    return moved


def activation_of(activation: str | None, slope: float) -> tuple[int, float]:
    """Return the kernels' number of an activation, and the slope; errors where it is unknown."""
    return _arguments.activation(activation, slope, _ACTIVATIONS)


def positions_of(
    x: NDArray[Any],
    axis: int,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> Positions | None:
    """Return which positions of `x` count; None where all of them count once."""
    return choose(x.shape, channel_axis(x, axis), mask, weights, lengths)


def is_zero(masked: str) -> bool:
    """Whether what a mask leaves out becomes 0; ValueError where `masked` is unknown."""
    if masked not in ("normalize", "zero"):
        raise ValueError(f"masked is {masked!r}; it must be 'normalize' or 'zero'")
    return masked == "zero"


# ---- shared ------------------------------------------------------------------------------


def plain_forward(x: Any, *options: Any) -> tuple[NDArray[Any], Moments] | None:
    """Do a plain `batch_norm` in one compiled step; None where it is not one.

    `options` are gamma, beta, axis, eps, what `activation_of` says, out, num_threads.
    """
    done = _PLAIN_FORWARD(x, *options)
    if done is None:
        return None
    y, work, count = done
    return y, Moments._of_frozen(count, work[0], work[1])


def plain_inference(x: Any, *options: Any) -> NDArray[Any] | None:
    """Do a plain `batch_norm_inference`, which see; None where it is not one."""
    y: NDArray[Any] | None = _PLAIN_INFERENCE(x, *options)
    return y


def _plain_backward(dy: Any, x: Any, *options: Any) -> tuple[NDArray[Any], ...] | None:
    """Do a plain backward in one compiled step; None where it is not one.

    `options` are mean, M2 and True, or mean, variance and False; and those of `plain_forward`.
    """
    gradients: tuple[NDArray[Any], ...] | None = _PLAIN_BACKWARD(dy, x, *options)
    return gradients


def _belong(moments: Any, x: Any) -> bool:
    """Whether these may be the moments of `x`, as far as a plain call has to know."""
    return (
        type(moments) is Moments
        and type(x) is np.ndarray
        and type(moments.count) is int
        and moments.count * moments.mean.size == x.size
    )


def _folded(array: NDArray[Any] | None, x: NDArray[Any], plan: _layout.Plan) -> NDArray[Any] | None:
    """Return an array that goes with `x` as (N, C, S), a copy where it lies otherwise."""
    return None if array is None else plan.view(_layout.like(array, x, plan))


def _check_batch(
    x: NDArray[Any], axis: int, positions: Positions | None = None, least: int = 2
) -> None:
    """Refuse a batch whose channels have no variance, or no values."""
    if positions is not None and positions.number < least and x.size:
        raise ValueError(
            f"mask, weights or lengths leave {positions.number} of {positions.shares.size} values "
            f"a channel; at least {least} must count, as one value has no variance. Train with "
            "more values a channel, or normalize with running statistics: eval() on a layer that "
            "has them, or batch_norm_inference"
        )
    count = x.size // x.shape[axis] if x.shape[axis] else least
    if count == 0:
        raise ValueError(f"x has shape {x.shape}: it has no values to take statistics of")
    if count < least:
        raise ValueError(
            f"x has shape {x.shape}: one value a channel has no variance, and would be "
            "normalized to beta whatever it is. Train with more values a channel, or normalize "
            "with running statistics: eval() on a layer that has them, or batch_norm_inference"
        )


def _gradient_pair(
    dy: ArrayLike, x: ArrayLike, axis: int
) -> tuple[NDArray[Any], NDArray[Any], int]:
    dy, x = gradient_pair(dy, x)
    return dy, x, channel_axis(x, axis)


class _Through(NamedTuple):
    """What lies between x and y, for a backward."""

    mean: NDArray[np.float64]
    var: NDArray[np.float64]  # m2 where through_statistics
    through_statistics: bool
    gamma: ArrayLike | None
    beta: ArrayLike | None
    activation: tuple[int, float]
    residual: ArrayLike | None
    positions: Positions | None
    from_output: bool


def _backward(
    dy: NDArray[Any],
    x: NDArray[Any],
    through: _Through,
    axis: int,
    eps: float,
    outs: tuple[NDArray[Any] | None, NDArray[Any] | None],
    num_threads: int | None,
) -> tuple[NDArray[Any], ...]:
    """Check what both backwards share and call the kernel."""
    vectors, p = parameters(x.shape[axis], gamma=through.gamma, beta=through.beta)
    gamma, beta = vectors
    dtype = _gradient_type(through.gamma, x)
    nt = thread_count(num_threads)
    residual = None if through.residual is None else companion("residual", through.residual, x)
    mean, var = through.mean, through.var
    if through.from_output:
        _check_invertible(gamma, through.activation, residual)
        mean = np.zeros(x.shape[axis]) if beta is None else beta.astype(np.float64, copy=False)
    inputs = (x, dy, residual, mean, var, *vectors)
    dx = destination(outs[0], x, inputs)
    dresidual = None
    if residual is not None:
        dresidual = destination(outs[1], x, (dx, *inputs), "out_residual", may_be_input=False)
    if x.size == 0:
        zeros = np.zeros(x.shape[axis], dtype)
        return (dx, zeros, zeros.copy()) + (() if dresidual is None else (dresidual,))
    x, plan = _layout.fold(x, axis)
    target = _layout.like_empty(dx, x, plan)
    kept = None if dresidual is None else _layout.like_empty(dresidual, x, plan)
    work = _statistics.work(plan)
    chosen = _statistics.shared(through.positions, x, plan, zeroed=True)
    e = storage(x.dtype)
    _BACKWARD[e + p](
        plan.view(_layout.like(dy, x, plan)),
        plan.view(x),
        plan.view(target),
        _folded(residual, x, plan),
        None if kept is None else plan.view(kept),
        mean,
        var,
        gamma,
        beta,
        work,
        eps,
        through.through_statistics,
        through.from_output,
        *through.activation,
        *chosen,
        _STORAGE[e],
        nt,
    )
    with np.errstate(all="ignore"):  # a sum beyond float32 is inf, as in the kernels
        gradients = _deliver(dx, target), work[1].astype(dtype), work[0].astype(dtype)
    if dresidual is None or kept is None:
        return gradients
    return (*gradients, _deliver(dresidual, kept))


def _check_invertible(
    gamma: NDArray[Any] | None, activation: tuple[int, float], residual: NDArray[Any] | None
) -> None:
    """Refuse to compute gradients from y where y does not tell what xhat was."""
    number_of, slope = activation
    if residual is not None:
        raise ValueError("residual is given; from_output works without one")
    if number_of and not (number_of == _ACTIVATIONS["leaky_relu"] and slope > 0):
        raise ValueError(
            "from_output needs an activation with an inverse: None, or leaky_relu with a positive "
            "slope. Keep x, and give that"
        )
    if gamma is not None and not np.all(gamma):
        raise ValueError(
            f"gamma is 0 in channel {np.flatnonzero(gamma == 0)[0]}: y does not tell what x was. "
            "Keep x, and give that"
        )


def _gradient_type(gamma: ArrayLike | None, x: NDArray[Any]) -> np.dtype[Any]:
    """Return the dtype of dgamma and dbeta: that of gamma as it was given, or of what x is in."""
    given = x if gamma is None else _arguments.array("gamma", gamma)
    return np.dtype(np.float64 if given.itemsize == 8 else np.float32)


def _no_channels(x: NDArray[Any], axis: int) -> Moments:
    count = prod(size for i, size in enumerate(x.shape) if i != axis)
    return Moments(count, np.empty(0), np.empty(0))


def _moments(plan: _layout.Plan, work: NDArray[np.float64], positions: Positions | None) -> Moments:
    n, _, s = plan.shape
    if plan.chunks > 1:
        work = work[:2].copy()
    work.setflags(write=False)
    return Moments._adopt(n * s if positions is None else positions.total, work[0], work[1])


def _deliver(out: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    """Return `out`, filled from `target` where the kernel could not write to it in place."""
    if out is not target:
        np.copyto(out, target)
    return out
