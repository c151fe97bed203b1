"""The normalizations as PyTorch's own operations, which it can differentiate any number of times.

They replace the kernels for second derivatives and batched gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._calls import Inputs, Norm

__all__ = ["ACTIVATIONS", "formula", "gradients"]

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda y, _: torch.relu(y),
    "relu6": lambda y, _: functional.relu6(y),
    "leaky_relu": functional.leaky_relu,
    "hardswish": lambda y, _: functional.hardswish(y),
    "sigmoid": lambda y, _: torch.sigmoid(y),
    "tanh": lambda y, _: torch.tanh(y),
    "silu": lambda y, _: functional.silu(y),
    "gelu": lambda y, _: functional.gelu(y),
}


def formula(norm: Norm, inputs: Inputs) -> Tensor:
    """Return what the kernels return, computed by PyTorch."""
    x, weight, bias, residual, mean, var = inputs
    if norm.kind == "batch":
        y = functional.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, norm.eps)
    elif norm.kind == "layer":
        y = functional.layer_norm(x, x.shape[x.dim() - norm.dims :], weight, bias, norm.eps)
    elif norm.kind == "rms":
        y = functional.rms_norm(x, x.shape[x.dim() - norm.dims :], weight, norm.eps)
    elif norm.kind == "group":
        y = functional.group_norm(x, norm.groups, weight, bias, norm.eps)
    else:
        y = functional.instance_norm(x, None, None, weight, bias, eps=norm.eps)
    if residual is not None:
        y = y + residual
    return y if norm.activation is None else ACTIVATIONS[norm.activation](y, norm.slope)


def gradients(
    norm: Norm, dy: Tensor, inputs: Inputs, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the wanted gradients of x, weight, bias and residual.

    They can be differentiated again, with respect to `dy` and the inputs.
    """
    again = torch.is_grad_enabled()
    leaves: list[Any] = [*inputs[:4]]
    with torch.enable_grad():
        # Views, so that an input that is given twice gets a gradient for each argument.
        for i, t in enumerate(leaves):
            if t is not None:
                leaves[i] = t.view_as(t) if again else t.detach().requires_grad_(wanted[i])
        y = formula(norm, inputs._replace(**dict(zip(inputs._fields, leaves, strict=False))))
        sources = [t for t, want in zip(leaves, wanted, strict=True) if want and t is not None]
        found = iter(torch.autograd.grad(y, sources, dy, create_graph=again))
    return tuple(
        next(found) if want and t is not None else None
        for t, want in zip(leaves, wanted, strict=True)
    )
