"""Kernel calls on tensors, without autograd and without checks except those of `_dispatch`.

A `Norm` describes the normalization for forward, backward, the custom operators and the formulas of
PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _dispatch, _runtime
from .._moments import Moments
from ._arrays import array, vector
from ._memory import empty

__all__ = ["Inputs", "Norm", "absorb", "backward", "format_of", "forward"]

_ALL = None, None, None, "normalize"  # no mask, no weights, no lengths
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Inputs(NamedTuple):
    """The tensors of a call. `mean` and `var` are None if the call computes them."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None


class Norm(NamedTuple):
    """A kind of normalization and its settings, which do not change from call to call."""

    kind: str  # "batch", "layer", "rms", "group" or "instance"
    eps: float
    dims: int = 0  # the number of last axes that are normalized, for layer and rms
    groups: int = 0  # for group
    activation: str | None = None
    slope: float = 0.01

    def rows(self, x: Tensor) -> tuple[int, int | None, float]:
        """Return the axis, the number of groups and eps as the dispatch takes them."""
        if self.kind == "group":
            return 1, self.groups, self.eps
        if self.kind == "instance":
            return 1, 0, self.eps
        return x.dim() - self.dims, None, self.eps


def format_of(norm: Norm, x: Tensor) -> torch.memory_format:
    """Return the memory format that PyTorch gives the result."""
    if norm.kind in ("layer", "instance") or x.is_contiguous():
        return torch.contiguous_format
    last = _FORMATS.get(x.dim())
    if last is None:
        return torch.contiguous_format
    # Only batch norm does not look at the strides of axes of length 1.
    if (norm.kind == "batch" and x.is_contiguous(memory_format=last)) or _steps_as_last(x):
        return last
    return torch.contiguous_format


def _steps_as_last(x: Tensor) -> bool:
    """Return whether the strides of `x` have the order of channels last; gaps are allowed."""
    steps, shape = x.stride(), x.shape
    if steps[1] == 0:
        return False
    least = 0
    for axis in (1, *range(x.dim() - 1, 1, -1), 0):
        if shape[axis] == 0 or steps[axis] < least:
            return False
        if axis == 0 and least == steps[1]:  # all axes but the channels have size 1
            return False
        least = steps[axis] * max(shape[axis], 1)
    return True


def _threads(x: Tensor) -> int:
    """Return the number of threads for a call. Small calls use one, without asking PyTorch."""
    return torch.get_num_threads() if x.numel() >= _dispatch.SMALL else 1


def forward(norm: Norm, inputs: Inputs) -> tuple[Tensor, Moments | None]:
    """Return y, and the statistics of the batch or the rows, or None if they are given."""
    x, weight, bias, residual, mean, var = inputs
    y = empty(x, format_of(norm, x), brief=False)
    (gamma, _w), (beta, _b) = vector(weight), vector(bias)
    values, out, threads = array(x), array(y), _threads(x)
    if norm.kind != "batch":
        centred = norm.kind != "rms"
        _, moments = _dispatch.normalize_rows(
            values, gamma, beta, norm.rows(x), centred, out, threads
        )
        return y, moments
    added = None if residual is None else array(residual)
    settings = 1, norm.eps, norm.activation, norm.slope
    if mean is None:
        _, moments = _dispatch.forward(values, gamma, beta, added, settings, _ALL, out, threads)
        return y, moments
    (fixed_mean, _m), (fixed_var, _v) = vector(mean), vector(var)
    _dispatch.inference(
        values, fixed_mean, fixed_var, gamma, beta, added, settings, _ALL, out, threads
    )
    return y, None


def backward(
    norm: Norm, dy: Tensor, inputs: Inputs, statistics: Moments | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight, bias and the residual."""
    x, weight, bias, residual, mean, var = inputs
    form = format_of(norm, x)
    dx = empty(x, form, brief=True)
    dy = dy.resolve_conj().resolve_neg()
    (gamma, _w), (beta, _b) = vector(weight), vector(bias)
    gradient, values, out, threads = array(dy), array(x), array(dx), _threads(x)
    if norm.kind != "batch":
        _, dgamma, dbeta = _dispatch.normalize_rows_backward(
            gradient, values, _of_rows, statistics, gamma, norm.rows(x), norm.kind != "rms", out,
            threads,
        )  # fmt: skip
        return dx, torch.from_numpy(dgamma), torch.from_numpy(dbeta), None
    added = dresidual = kept = None
    if residual is not None:
        dresidual = empty(x, form, brief=True)
        added, kept = array(residual), array(dresidual)
    (fixed_mean, _m), (fixed_var, _v) = vector(mean), vector(var)
    settings = 1, norm.eps, norm.activation, norm.slope
    _, dgamma, dbeta, *_rest = _dispatch.backward(
        gradient, values, (fixed_mean, fixed_var) if statistics is None else statistics, gamma,
        beta if norm.activation else None, added, settings, _ALL, False, out, kept, threads,
    )  # fmt: skip
    return dx, torch.from_numpy(dgamma), torch.from_numpy(dbeta), dresidual


def _of_rows(_form: Any, moments: Moments) -> tuple[Any, Any]:
    return moments.mean, moments.m2


def absorb(
    norm: Norm,
    x: Tensor,
    moments: Moments,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float | None,
    counter: Tensor | None = None,
) -> None:
    """Update running statistics and the counter of batches in place, because they may be shared.

    Only one thread does this at a time, and a single call writes all values, so that all of them
    change or none. If momentum is None, all batches that were counted have the same weight.
    """
    mean, m2 = moments.mean, moments.m2
    count = x.numel() // x.shape[1]
    if norm.kind == "instance":  # the mean over the samples, as in PyTorch
        samples = x.shape[0]
        mean, m2 = (v.reshape(samples, -1).mean(0) for v in (mean, m2))
        count //= samples
    with _runtime.turn:
        old = [running_mean.detach(), running_var.detach()]
        (a, _a), (b, _b) = vector(old[0]), vector(old[1])
        counted = [] if counter is None else [counter + 1]
        weight = 1 / float(counted[0]) if momentum is None else momentum
        new = _dispatch.absorb(a, b, mean, m2, count - 1, weight)
        moved = [*(torch.from_numpy(v) for v in new), *counted]
        torch._foreach_copy_(old if counter is None else [*old, counter], moved)
