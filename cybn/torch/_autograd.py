"""The kernels in PyTorch's autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._calls import Inputs, Norm, absorb, backward, forward
from ._formulas import gradients

__all__ = ["Running", "needs_grad", "normalize"]


class Running(NamedTuple):
    """The running statistics that a forward updates, and their momentum."""

    mean: Tensor
    var: Tensor
    momentum: float | None
    counter: Tensor | None = None  # of batches; if momentum is None, all have the same weight


def normalize(norm: Norm, inputs: Inputs, running: Running | None = None) -> Tensor:
    """Normalize with the mean and variance given, or with those of the batch or the rows.

    Tensors must be strided, on the CPU, and of types that the kernels support. `running` is updated
    in place.
    """
    if torch.is_grad_enabled() and needs_grad(inputs):
        return _Normalize.apply(*inputs, norm, running)
    y, statistics = forward(norm, inputs)
    if running is not None and statistics is not None:
        absorb(norm, inputs.x, statistics, *running)
    return y


class _Normalize(torch.autograd.Function):
    """The kernels with their gradients.

    Running statistics are updated before tensors are saved, as in PyTorch, because
    `torch.utils.checkpoint` may stop a forward when it saves tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        *arguments: Any,
    ) -> Tensor:
        *tensors, norm, running = arguments
        inputs = Inputs(*tensors)
        y, ctx.statistics = forward(norm, inputs)
        if running is not None and ctx.statistics is not None:
            absorb(norm, inputs.x, ctx.statistics, *running)
        ctx.norm = norm
        if inputs.mean is not None and inputs.var is not None:
            # Backward needs these values, also if the module's statistics are updated before it.
            inputs = inputs._replace(mean=inputs.mean.clone(), var=inputs.var.clone())
        ctx.save_for_backward(*inputs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs, wanted = Inputs(*ctx.saved_tensors), ctx.needs_input_grad[:4]
        found: tuple[Tensor | None, ...]
        if torch.is_grad_enabled() or _is_foreign(dy):  # create_graph=True; batched gradients
            found = gradients(ctx.norm, dy, inputs, wanted)
        else:
            found = _typed(backward(ctx.norm, dy, inputs, ctx.statistics), inputs)
        return *(g if want else None for g, want in zip(found, wanted, strict=True)), *[None] * 4


def needs_grad(inputs: Inputs) -> bool:
    """Return whether x, weight, bias or the residual requires a gradient."""
    return any(t is not None and t.requires_grad for t in inputs[:4])


def _is_foreign(dy: Tensor) -> bool:
    """Return whether this is not a plain tensor in memory, but for example one of torch.vmap."""
    return (
        type(dy) is not Tensor
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.is_legacy_batchedtensor(dy)
        or not dy.is_cpu
        or dy.layout is not torch.strided
    )


def _typed(
    found: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Return gradients converted to the types of their inputs, such as from float32 to half."""
    return tuple(
        g if g is None or t is None or g.dtype is t.dtype else g.to(t.dtype)
        for g, t in zip(found, inputs, strict=False)
    )
