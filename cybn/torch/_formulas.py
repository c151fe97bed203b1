"""The normalizations as PyTorch's own formulas, which it differentiates as often as one likes.

They stand in where the kernels do not go: second derivatives and batched gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._calls import Norm

__all__ = ["ACTIVATIONS", "formula", "gradients"]

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda y, _: torch.relu(y),
    "relu6": lambda y, _: F.relu6(y),
    "leaky_relu": F.leaky_relu,
    "hardswish": lambda y, _: F.hardswish(y),
    "sigmoid": lambda y, _: torch.sigmoid(y),
    "tanh": lambda y, _: torch.tanh(y),
    "silu": lambda y, _: F.silu(y),
    "gelu": lambda y, _: F.gelu(y),
}


def formula(
    norm: Norm,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
) -> Tensor:
    """Return what the kernels return, computed by PyTorch."""
    if norm.kind == "batch":
        y = F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, norm.eps)
    elif norm.kind == "layer":
        y = F.layer_norm(x, x.shape[x.dim() - norm.dims :], weight, bias, norm.eps)
    elif norm.kind == "rms":
        y = F.rms_norm(x, x.shape[x.dim() - norm.dims :], weight, norm.eps)
    elif norm.kind == "group":
        y = F.group_norm(x, norm.groups, weight, bias, norm.eps)
    else:
        y = F.instance_norm(x, None, None, weight, bias, eps=norm.eps)
    if residual is not None:
        y = y + residual
    return y if norm.activation is None else ACTIVATIONS[norm.activation](y, norm.slope)


def gradients(
    norm: Norm,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the wanted gradients of x, weight, bias and residual, differentiable in turn.

    They are functions of `dy` and of the inputs, through the history that those have.
    """
    again = torch.is_grad_enabled()
    inputs: list[Tensor | None] = [x, weight, bias, residual]
    with torch.enable_grad():
        # As views, so that the gradient of an input that is there twice is of one place each.
        for i, t in enumerate(inputs):
            if t is not None:
                inputs[i] = t.view_as(t) if again else t.detach().requires_grad_(wanted[i])
        y = formula(norm, *inputs, mean, var)
        sources = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
        found = iter(torch.autograd.grad(y, sources, dy, create_graph=again))
    return tuple(
        next(found) if want and t is not None else None
        for t, want in zip(inputs, wanted, strict=True)
    )
