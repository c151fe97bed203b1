"""Ways to normalize by a batch: whole, in parts (ghost batches), and renormalized.

A part is a view of the batch, and its result goes to a view of the output: nothing is copied that
the kernels could read in place.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _arguments, _dispatch, functional
from .._arguments import number
from .._moments import Moments
from ._passes import Way
from ._running import Running

__all__ = ["Renorm", "parts_of"]


def parts_of(size: int | None, limits: Renorm | None, running: Running) -> Way:
    """Return how to normalize ghost batches of `size` samples, renormalized by `limits`, if any."""
    forward = partial(_forward, size=size, limits=limits, running=running)
    return Way(forward, _backward, _merged, inverts=True)


class Renorm:
    """The limits of batch renormalization. Mutable, so that a schedule can change them.

    A layer with ``renorm=`` computes, in training,

    ``y = ((x - mean) / std * r + d) * gamma + beta``,
    ``r = clip(std / running_std, 1 / r_max, r_max)``,
    ``d = clip((mean - running_mean) / running_std, -d_max, d_max)``,

    with ``std = sqrt(var + eps)`` and ``running_std = sqrt(running_var + eps)``, the running
    statistics being those before this batch. Gradients treat r and d as constants. Within the
    limits the result equals that of inference. With ``r_max=1, d_max=0`` it is plain batch
    normalization, with the same bits.

    Parameters
    ----------
    r_max, d_max : float, default 3 and 5
        The limits of r and d in these formulas: at least 1, and at least 0.

    Raises
    ------
    ValueError
        If a limit is out of its range, here or when it is assigned.

    Notes
    -----
    Begin with ``r_max=1, d_max=0``, because the running statistics of a new layer are not yet those
    of the data. The paper uses these limits for 5000 steps, then widens them step by step to the
    defaults, r_max until step 40000 and d_max until step 25000. Layers with the same `Renorm`
    object share its limits.

    References
    ----------
    Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
    Models", 2017.

    Examples
    --------
    >>> import cybn
    >>> limits = cybn.Renorm(r_max=1, d_max=0)
    >>> bn = cybn.BatchNorm2d(64, momentum=0.01, renorm=limits)
    >>> limits.r_max, limits.d_max = 3, 5  # when it has trained for a while
    """

    __slots__ = ("d_max", "r_max")

    r_max: float
    d_max: float

    def __init__(self, r_max: float = 3.0, d_max: float = 5.0) -> None:
        self.r_max = r_max
        self.d_max = d_max

    def __setattr__(self, name: str, value: float) -> None:
        least = {"r_max": 1, "d_max": 0}.get(name)
        if least is None:
            raise AttributeError(f"Renorm has no {name}; it has r_max and d_max")
        limit = number(name, value)
        if not limit >= least:
            raise ValueError(f"{name} is {limit}; it must be at least {least}")
        object.__setattr__(self, name, limit)

    def __repr__(self) -> str:
        return f"Renorm(r_max={self.r_max:g}, d_max={self.d_max:g})"


class Correction(NamedTuple):
    """The renormalization of one batch: xhat becomes xhat * r + d."""

    r: NDArray[np.float64]
    d: NDArray[np.float64]

    @classmethod
    @np.errstate(all="ignore")
    def of(cls, batch: Moments, running: Running, limits: Renorm, eps: float) -> Correction:
        """Return the correction from a batch to the running statistics, within limits."""
        std = np.sqrt(batch.var() + eps)
        std = np.where(np.isinf(std), batch.std(), std)  # the variance may overflow
        running_std = np.sqrt(running.var.astype(np.float64) + eps)
        r = std / running_std
        d = (batch.mean - running.mean) / running_std
        return cls(
            np.clip(r, 1 / limits.r_max, limits.r_max), np.clip(d, -limits.d_max, limits.d_max)
        )

    def compose(
        self, gamma: NDArray[Any] | None, beta: NDArray[Any] | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the scale and shift of xhat that combine the correction, gamma and beta."""
        scale = self.r if gamma is None else self.r * gamma
        shift = self.d if gamma is None else self.d * gamma
        return scale, shift if beta is None else shift + beta


class Part(NamedTuple):
    """The data of one part that backward needs."""

    where: tuple[slice, ...]
    moments: Moments
    correction: Correction | None
    selected: tuple[Any, Any, None, str]  # its mask and weights, if any, and `masked`


def _merged(parts: list[Part]) -> Moments:
    """Return the moments of the whole batch."""
    return reduce(Moments.merge, [part.moments for part in parts])


def _forward(
    x: Any, gamma: Any, beta: Any, residual: Any, settings: Any, selected: Any, out: Any,
    num_threads: int | None, *, size: int | None, limits: Renorm | None, running: Running,
) -> tuple[NDArray[Any], list[Part]]:  # fmt: skip
    """Normalize each part by its own statistics, or renormalize it; see `Way`."""
    axis, eps, *_ = settings
    *places, masked = selected
    x = _arguments.tensor("x", x)
    axis = _arguments.channel_axis(x, axis)
    _arguments.check_eps(eps)
    functional.is_zero(masked)  # raises ValueError if it is not known
    positions = functional.positions_of(x, axis, *places)
    _arguments.check_batch(x.shape, axis, positions and positions.number, 2)
    residual = None if residual is None else _arguments.companion("residual", residual, x)
    y = _dispatch.destination(out, x, (x, residual, gamma, beta))
    parts = []
    for i in _dispatch.cut(x.shape, axis, size, positions):
        chosen = (None, None, None, masked) if positions is None else positions.at(i, masked)
        more: Any = None if residual is None else residual[i], settings, chosen, y[i], num_threads
        correction = None
        if limits is None:
            _, moments = _dispatch.forward(x[i], gamma, beta, *more)
        else:
            moments = _dispatch.statistics(x[i], axis, chosen, num_threads)
            correction = Correction.of(moments, running, limits, eps)
            affine = correction.compose(gamma, beta)
            if np.isinf(moments.m2).any():  # the variance overflows, its root does not
                _dispatch.forward(x[i], *affine, *more)
            else:
                _dispatch.inference(x[i], moments.mean, moments.var(), *affine, *more)
        parts.append(Part(i, moments, correction, chosen))
    return y, parts


def _backward(
    dy: Any, x: Any, parts: list[Part], gamma: Any, beta: Any, residual: Any, settings: Any,
    selected: Any, from_output: bool, out: Any, out_residual: Any, num_threads: int | None,
) -> tuple[NDArray[Any], ...]:  # fmt: skip
    """Return dx, dgamma, dbeta and, if there is a residual, its gradient; see `Way`.

    dgamma and dbeta are sums over the parts, in float64.
    """
    x = _arguments.tensor("x", x)
    dy, axis = _arguments.companion("dy", dy, x), _arguments.channel_axis(x, settings[0])
    dx = _dispatch.destination(out, x, (x, dy, residual, gamma, beta))
    dresidual = None
    if residual is not None:
        inputs = (dx, x, dy, residual)
        dresidual = _dispatch.destination(
            out_residual, x, inputs, "out_residual", may_be_input=False
        )
    ones = np.ones(x.shape[axis])
    dtype = ones.dtype if gamma is None else gamma.dtype
    gamma = ones if gamma is None else gamma.astype(np.float64)  # so that sums come in float64
    gradients = []
    with np.errstate(all="ignore"):  # what is too large for a dtype is infinite, as in the kernels
        for i, moments, correction, chosen in parts:
            affine = (gamma, beta) if correction is None else correction.compose(gamma, beta)
            given: Any = None if residual is None else residual[i], settings, chosen, from_output
            outs: Any = dx[i], None if dresidual is None else dresidual[i], num_threads
            _, dgamma, dbeta, *_ = _dispatch.backward(dy[i], x[i], moments, *affine, *given, *outs)
            if correction is not None:
                dgamma = correction.r * dgamma + correction.d * dbeta  # r and d are constants
            gradients.append(np.array([dgamma, dbeta]))
        dgamma, dbeta = reduce(np.add, gradients).astype(dtype)
    return (dx, dgamma, dbeta) + (() if dresidual is None else (dresidual,))
