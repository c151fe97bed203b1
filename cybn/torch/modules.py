"""PyTorch's batch norms with cybn's kernels, and activations that know when they are done."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from .. import _runtime, functional
from ._function import Options, batch_norm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

# Types of x that the kernels know, and the types of parameters and statistics that go with each.
# Everything else is PyTorch's.
DTYPES = {torch.float32: (torch.float32,), torch.float64: (torch.float64,)}

_PLAIN = (Tensor, nn.Parameter)  # no subclasses: those mean something else by every operation
_DONE = "_cybn_activation_done"


def _watched() -> bool:
    """Whether someone looks at the operations of PyTorch, and must see its own."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )


class _Converted(nn.Module):
    """What stands before a class of PyTorch in the order of bases."""

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what `torch.jit.script` compiles, and puts in this one's place: PyTorch's own."""
        stock = STOCK.get(type(self))
        if stock is None:  # a subclass of the user's
            return self
        twin: nn.Module = object.__new__(stock)
        twin.__dict__ = {k: v for k, v in self.__dict__.items() if k != "follower"}
        return twin

    def _one_step(self, input: fx.Proxy) -> fx.Proxy:
        """Stand in a traced graph as one module, as PyTorch's own classes do."""
        tracer = input.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})


class _BatchNorm(_Converted):
    """Computes with cybn what it can, and leaves the rest to the class after it."""

    follower: tuple[nn.Module] | None = None  # activation computed here; a tuple, so no submodule

    def forward(self, input: Tensor) -> Tensor:  # the name that PyTorch gives it
        """Normalize `input`, of shape (N, C, ...), as PyTorch's module of the same name does."""
        if torch.compiler.is_compiling():
            return super().forward(input)
        if isinstance(input, fx.Proxy):
            return self._one_step(input)
        if type(input) not in _PLAIN or _watched():
            return super().forward(input)
        weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        batch_statistics = self.training or (mean is None and var is None)
        if not self._is_ours(input, batch_statistics, weight, bias, mean, var):
            return super().forward(input)
        follower = self._follower()
        options = Options(float(self.eps), *(() if follower is None else follower._activation()))
        if batch_statistics:
            y, moments = batch_norm(input, weight, bias, None, None, options)
            if self.training and self.track_running_stats:
                self._absorb(moments, mean, var)
        else:
            y, _ = batch_norm(input, weight, bias, mean, var, options)
        if follower is not None:
            setattr(y, _DONE, follower)
        return y

    def _is_ours(self, x: Tensor, batch_statistics: bool, *vectors: Tensor | None) -> bool:
        """Whether the kernels take these; PyTorch has the answer, or the error, where not."""
        self._check_input_dim(x)
        dtypes, channels = DTYPES.get(x.dtype), self.num_features
        if (
            dtypes is None
            or not x.is_cpu
            or x.layout is not torch.strided
            or x.is_neg()
            or x.shape[1] != channels
            or not x.numel() > (channels if batch_statistics else 0)
            or not 0 < self.eps < np.inf
            or (vectors[2] is None) != (vectors[3] is None)
        ):
            return False
        if not all(
            v is None
            or (type(v) in _PLAIN and v.is_cpu and v.dtype in dtypes and v.shape == (channels,))
            for v in vectors
        ):
            return False
        # Statistics that are one number for all channels cannot be written.
        return channels == 1 or not any(v is not None and v.stride() == (0,) for v in vectors[2:])

    def _absorb(self, batch: Any, mean: Tensor | None, var: Tensor | None) -> None:
        """Move the running statistics, in place: they may be shared.

        One thread at a time, and all in one call, so that they move together or not at all.
        """
        with _runtime.turn:
            momentum = self.momentum
            batches = self.num_batches_tracked
            old, new = [], []
            if batches is not None:
                old, new = [batches], [batches + 1]
            if momentum is None:
                momentum = 0.0 if batches is None else 1.0 / float(new[0])
            if mean is not None and var is not None:
                a, b = (np.ascontiguousarray(v.detach().numpy()) for v in (mean, var))
                old += [mean.detach(), var.detach()]
                new += map(torch.from_numpy, functional.absorb(a, b, batch, momentum, 1))
            if old:
                torch._foreach_copy_(old, new)

    def _follower(self) -> Any:
        """Return the activation computed here, unless a hook or a compiled call is in between."""
        if self.follower is None:
            return None
        (follower,) = self.follower
        if not isinstance(follower, _Activation):  # reverted without this one
            return None
        if follower._compiled_call_impl is not None:  # follower.compile(): it cannot see the mark
            return None
        hooked = any(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            for module in (self, follower)
        )
        return None if hooked or nn.modules.module._has_any_global_hook() else follower

    def extra_repr(self) -> str:
        """Return the stock representation, with the activation where one is computed here."""
        text = super().extra_repr()
        return f"{text}, then {type(self.follower[0]).__name__}" if self.follower else text


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for (N, C) and (N, C, L), computed by cybn."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for (N, C, H, W), computed by cybn."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` for (N, C, D, H, W), computed by cybn."""


class _Activation(_Converted):
    """Passes on what a batch norm has activated already, and activates everything else."""

    name = ""

    def forward(self, input: Tensor) -> Tensor:
        """Return the activation of `input`."""
        if torch.compiler.is_compiling():
            return super().forward(input)
        if isinstance(input, fx.Proxy):
            return self._one_step(input)
        if type(input) is Tensor and input.__dict__.get(_DONE) is self:
            del input.__dict__[_DONE]  # this once
            return input
        return super().forward(input)

    def _activation(self) -> tuple[Any, ...]:
        return (self.name,)


class ReLU(_Activation, nn.ReLU):
    """`torch.nn.ReLU` after batch norms that compute it."""

    name = "relu"


class ReLU6(_Activation, nn.ReLU6):
    """`torch.nn.ReLU6` after batch norms that compute it."""

    name = "relu6"


class SiLU(_Activation, nn.SiLU):
    """`torch.nn.SiLU` after batch norms that compute it."""

    name = "silu"


class LeakyReLU(_Activation, nn.LeakyReLU):
    """`torch.nn.LeakyReLU` after batch norms that compute it."""

    name = "leaky_relu"

    def _activation(self) -> tuple[Any, ...]:
        return self.name, float(self.negative_slope)


BATCH_NORMS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
ACTIVATIONS: dict[type, type] = {
    nn.ReLU: ReLU,
    nn.ReLU6: ReLU6,
    nn.SiLU: SiLU,
    nn.LeakyReLU: LeakyReLU,
}
STOCK = {ours: stock for stock, ours in (BATCH_NORMS | ACTIVATIONS).items()}
