"""Small calls, for which PyTorch is faster, so that converted modules leave them to PyTorch.

A call has a higher fixed cost in cybn than in PyTorch, but cybn saves more time the larger the
input is. The borders in between were measured (``pytest bench -k small``) and are constants: which
library computes a call depends on the call's size and mode, but never on measured times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SMALL", "borders_of", "is_small", "quick"]

SMALL = "the call is small: PyTorch is faster"

# PyTorch computes calls with fewer values than these: in evaluation without and with gradients, and
# in training without and with gradients.
Borders = tuple[int, int, int, int]
_BATCH: Borders = (1 << 20, 1 << 20, 1 << 19, 1 << 19)
_BORDERS: dict[type, Borders] = {
    nn.modules.batchnorm._BatchNorm: _BATCH,
    nn.modules.instancenorm._InstanceNorm: (1 << 15, 1 << 16, 1 << 15, 1 << 16),
    nn.GroupNorm: (1 << 20, 1 << 20, 1 << 20, 1 << 20),
    nn.LayerNorm: (1 << 20, 1 << 20, 1 << 20, 1 << 20),
    nn.RMSNorm: (1 << 16, 1 << 15, 1 << 16, 1 << 15),
}


def borders_of(module: nn.Module) -> Borders:
    """Return the borders for the calls of a module."""
    kinds = (found for kind, found in _BORDERS.items() if isinstance(module, kind))
    return next(kinds, _BATCH)  # others are mostly classes of timm and of users


def is_small(module: nn.Module, x: Any) -> bool:
    """Return whether PyTorch is to compute a call outside graphs, and note that for `report`."""
    known = module.__dict__
    borders = known.get("_cybn_borders")
    if (
        borders is None
        or type(x) is not Tensor
        or torch._C._get_tracing_state() is not None
        or x.numel() >= borders[2 * module.training + torch.is_grad_enabled()]
        or not x.is_cpu
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return False
    if known.get("_cybn_reason") is not SMALL:
        known["_cybn_reason"] = SMALL
    return True


# ---- PyTorch's forwards without needless steps; None if PyTorch's own might raise an error -----


def _batch_norm(self: Any, input: Tensor) -> Tensor | None:
    self._check_input_dim(input)
    training, momentum, tracks = self.training, self.momentum, self.track_running_stats
    if training and input.numel() <= input.shape[1]:
        return None
    mean, var = self.running_mean, self.running_var
    by_batch = training or (mean is None and var is None)
    if training and tracks:
        counter = self.num_batches_tracked
        if counter is not None:
            counter.add_(1)
            momentum = 1.0 / float(counter) if momentum is None else momentum
    elif training:
        mean = var = None
    return torch.batch_norm(
        input, self.weight, self.bias, mean, var, by_batch, momentum or 0.0, self.eps, False
    )


def _instance_norm(self: Any, input: Tensor) -> Tensor | None:
    self._check_input_dim(input)
    shape, channels = input.shape, self.num_features
    if len(shape) == self._get_no_batch_dim() or shape[1] != channels:
        return None
    by_sample = self.training or not self.track_running_stats
    if by_sample and input.numel() <= shape[0] * channels:
        return None
    return torch.instance_norm(
        input, self.weight, self.bias, self.running_mean, self.running_var, by_sample,
        self.momentum or 0.0, self.eps, False,
    )  # fmt: skip


def _layer_norm(self: Any, input: Tensor) -> Tensor:
    return torch.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, False)


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    return torch.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _group_norm(self: Any, input: Tensor) -> Tensor | None:
    groups = self.num_groups
    if input.numel() < 2 * groups:
        return None
    return torch.group_norm(input, groups, self.weight, self.bias, self.eps, False)


_QUICK: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    nn.modules.batchnorm._BatchNorm.forward: _batch_norm,
    nn.modules.instancenorm._InstanceNorm.forward: _instance_norm,
    nn.LayerNorm.forward: _layer_norm,
    nn.RMSNorm.forward: _rms_norm,
    nn.GroupNorm.forward: _group_norm,
}


def quick(original: Callable[..., Any]) -> Callable[..., Tensor | None] | None:
    """Return a quick forward for small calls that does what `original` does, or None."""
    return _QUICK.get(original)
