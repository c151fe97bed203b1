"""Normalizing a batch in parts, each by itself: ghost batches, and renormalized ones.

A part is a view of the batch, and its result goes to a view of the output: nothing is copied that
the kernels could read in place.
"""

from __future__ import annotations

from functools import reduce
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import functional
from .._arguments import channel_axis, companion, destination, tensor
from ..moments import Moments
from ._renorm import Correction, Renorm
from ._running import Running

__all__ = ["Part", "backward", "forward"]


class Part(NamedTuple):
    """What backward needs of one part."""

    where: tuple[slice, ...]
    moments: Moments
    correction: Correction | None


def cut(shape: tuple[int, ...], axis: int, size: int | None) -> list[tuple[slice, ...]]:
    """Return the index of each part: `size` samples each, the last one fewer.

    Where the last would have one value a channel, which has no variance, it joins the one before.
    Samples lie along the first axis that is not the channel axis.
    """
    batch = 1 if axis == 0 else 0
    samples = shape[batch]
    if size is None or size >= samples:
        return [(slice(None),) * len(shape)]
    each = prod(shape) // (shape[axis] * samples)  # values of one channel in one sample
    if size * each < 2:
        raise ValueError(
            f"virtual_batch_size is {size} and x has shape {shape}: one value a channel has no "
            "variance. Give virtual batches of at least 2"
        )
    starts = list(range(0, samples, size))
    if (samples - starts[-1]) * each < 2:
        starts.pop()
    ends = [*starts[1:], samples]
    before = (slice(None),) * batch
    return [(*before, slice(start, end)) for start, end in zip(starts, ends, strict=True)]


def forward(
    x: NDArray[Any],
    gamma: NDArray[Any] | None,
    beta: NDArray[Any] | None,
    *,
    size: int | None,
    limits: Renorm | None,
    running: Running,
    axis: int,
    residual: NDArray[Any] | None,
    out: NDArray[Any] | None,
    **options: Any,
) -> tuple[NDArray[Any], list[Part]]:
    """Normalize each part by its own statistics, or renormalize it; return y and the parts."""
    x = tensor("x", x)
    axis = channel_axis(x, axis)
    functional._check_batch(x, axis)
    residual = None if residual is None else companion("residual", residual, x)
    y = destination(out, x, (x, residual, gamma, beta))
    options["axis"] = axis
    parts = []
    for index in cut(x.shape, axis, size):
        options |= {"out": y[index], "residual": None if residual is None else residual[index]}
        correction = None
        if limits is None:
            _, moments = functional.batch_norm(x[index], gamma, beta, **options)
        else:
            moments = functional.moments(x[index], axis=axis, num_threads=options["num_threads"])
            correction = Correction.of(moments, running, limits, options["eps"])
            scale, shift = correction.compose(gamma, beta)
            functional.batch_norm_inference(
                x[index], moments.mean, moments.var(), scale, shift, **options
            )
        parts.append(Part(index, moments, correction))
    return y, parts


def merged(parts: list[Part]) -> Moments:
    """Return the moments of the whole batch."""
    return reduce(Moments.merge, [part.moments for part in parts])


def backward(
    dy: Any,
    x: NDArray[Any],
    parts: list[Part],
    gamma: NDArray[Any] | None,
    *,
    beta: NDArray[Any] | None,
    axis: int,
    residual: NDArray[Any] | None,
    out: NDArray[Any] | None,
    out_residual: NDArray[Any] | None,
    **options: Any,
) -> tuple[NDArray[Any], ...]:
    """Return dx, dgamma, dbeta and, where there is a residual, its gradient.

    dgamma and dbeta are sums over the parts, in float64.
    """
    dy, x, axis = functional._gradient_pair(dy, x, axis)
    dx = destination(out, x, (x, dy, residual, gamma, beta))
    dresidual = None
    if residual is not None:
        inputs = (dx, x, dy, residual)
        dresidual = destination(out_residual, x, inputs, "out_residual", may_be_input=False)
    ones = np.ones(x.shape[axis])
    dtype = ones.dtype if gamma is None else gamma.dtype
    gamma = ones if gamma is None else gamma.astype(np.float64)  # so that sums come in float64
    options["axis"] = axis
    gradients = []
    for part in parts:
        i, (scale, shift) = part.where, (gamma, beta)
        if part.correction is not None:
            scale, shift = part.correction.compose(gamma, beta)
        options |= {"beta": shift, "out": dx[i]}
        if residual is not None and dresidual is not None:
            options |= {"residual": residual[i], "out_residual": dresidual[i]}
        _, dgamma, dbeta, *_ = functional.batch_norm_backward(
            dy[i], x[i], part.moments, scale, **options
        )
        if part.correction is not None:
            dgamma = part.correction.gradient(dgamma, dbeta)
        gradients.append(np.array([dgamma, dbeta]))
    with np.errstate(all="ignore"):  # what is beyond the dtype is infinite, as in the kernels
        dgamma, dbeta = reduce(np.add, gradients).astype(dtype)
    return (dx, dgamma, dbeta) + (() if dresidual is None else (dresidual,))
