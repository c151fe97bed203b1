"""Batch normalization as an autograd function over NumPy views of the tensors' memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional
from .._dispatch import SMALL
from .._moments import Moments
from ._memory import empty_like

__all__ = ["Options", "batch_norm"]

TWICE = (
    "the gradient of a cybn.torch batch norm cannot be differentiated again: it is computed "
    "outside autograd. For second derivatives use PyTorch's own: cybn.torch.revert(model)"
)


class Options(NamedTuple):
    """What does not change from call to call."""

    eps: float
    activation: str | None = None
    slope: float = 0.01

    def keywords(self) -> dict[str, Any]:
        """Return keyword arguments for a forward of `cybn.functional`."""
        if self.activation is None:
            return {"axis": 1, "eps": self.eps}
        return {"axis": 1, "eps": self.eps, "activation": self.activation, "slope": self.slope}


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    options: Options,
) -> tuple[Tensor, Moments | None]:
    """Normalize with `mean` and `var`, or with the statistics of the batch where they are None.

    Tensors are of one float type that the kernels know, on the CPU, and strided.

    Returns
    -------
    y : Tensor
        With the memory format of `x`.
    moments : Moments or None
        Those of the batch, where its statistics were taken.
    """
    arguments = x, weight, bias, mean, var, options
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:3]):
        return _BatchNorm.apply(*arguments)
    return _forward(*arguments)


def _view(t: Tensor | None) -> Any:
    """Return the memory of a tensor as an array, or None for None."""
    return None if t is None else t.detach().numpy()


def _threads(x: Tensor) -> int:
    """Return the threads for a call; small ones take one anyway, and are quicker to say so."""
    return torch.get_num_threads() if x.numel() >= SMALL else 1


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    options: Options,
) -> tuple[Tensor, Moments | None]:
    y = empty_like(x, brief=False)
    array, gamma, beta = _view(x), _view(weight), _view(bias)
    keywords = options.keywords() | {"out": y.numpy(), "num_threads": _threads(x)}
    if mean is None:
        _, moments = functional.batch_norm(array, gamma, beta, **keywords)
        return y, moments
    functional.batch_norm_inference(array, _view(mean), _view(var), gamma, beta, **keywords)
    return y, None


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Moments | None]:
        y, ctx.moments = _forward(x, weight, bias, mean, var, options)
        ctx.options = options
        # Training the same module before backward moves its statistics: these must not follow.
        fixed = (None if t is None else t.clone() for t in (mean, var))
        ctx.save_for_backward(x, weight, bias, *fixed)
        return y, ctx.moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        found = _backward(dy, inputs, ctx.moments, ctx.options)
        wanted = [g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=False)]
        if torch.is_grad_enabled():  # create_graph=True
            wanted = _Once.apply(wanted, dy, *inputs)
        return *wanted, None, None, None


def _backward(
    dy: Tensor, inputs: tuple[Tensor, ...], moments: Moments | None, options: Options
) -> list[Tensor]:
    """Return the gradients of x, weight and bias."""
    x, weight, bias, mean, var = inputs
    dx = empty_like(x, brief=True)
    array, gamma = _view(x), _view(weight)
    keywords = options.keywords() | {"out": dx.numpy(), "num_threads": _threads(x)}
    if options.activation is not None:
        keywords["beta"] = _view(bias)
    dy = dy.numpy(force=True)
    if moments is not None:
        _, *found = functional.batch_norm_backward(dy, array, moments, gamma, **keywords)
    else:
        fixed = _view(mean), _view(var)
        _, *found = functional.batch_norm_inference_backward(dy, array, *fixed, gamma, **keywords)
    return [dx, *map(torch.from_numpy, found)]


class _Once(torch.autograd.Function):
    """Hands gradients out as functions of what they were made of, and refuses to go further."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], *sources: Tensor | None) -> Any:
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(TWICE)
