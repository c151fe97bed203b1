"""The kernels in PyTorch's autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._calls import Inputs, Norm, absorb, backward, forward
from ._formulas import gradients

__all__ = ["Running", "needs_grad", "normalize"]


class Running(NamedTuple):
    """Running statistics that a forward moves, and how far."""

    mean: Tensor
    var: Tensor
    momentum: float | None
    counter: Tensor | None = None  # of batches; where momentum is None, each weighs the same


def normalize(norm: Norm, inputs: Inputs, running: Running | None = None) -> Tensor:
    """Normalize with the mean and variance given, or with those of the batch or the rows.

    Tensors are of types that the kernels know, on the CPU, and strided. `running` moves.
    """
    if torch.is_grad_enabled() and needs_grad(inputs):
        return _Normalize.apply(*inputs, norm, running)
    y, statistics = forward(norm, inputs)
    if running is not None and statistics is not None:
        absorb(norm, inputs.x, statistics, *running)
    return y


class _Normalize(torch.autograd.Function):
    """Statistics move before tensors are saved, as PyTorch's do: a checkpoint may stop there."""

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
            # Training the same module before backward moves its statistics: these must not follow.
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
    """Whether a gradient of the result can be asked for."""
    return any(t is not None and t.requires_grad for t in inputs[:4])


def _is_foreign(dy: Tensor) -> bool:
    """Whether this is not a plain tensor in memory, such as one of torch.vmap's."""
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
    """Return gradients in the types of their inputs: those of half parameters are float32."""
    return tuple(
        g if g is None or t is None or g.dtype is t.dtype else g.to(t.dtype)
        for g, t in zip(found, inputs, strict=False)
    )
