"""Batch norms of PyTorch on the CPU that normalize by the batch of all processes.

`torch.nn.SyncBatchNorm` rejects tensors on the CPU. The class here accepts them, in a process group
of any backend that gathers CPU tensors, such as gloo, with or without DistributedDataParallel::

    model = cybn.torch.SyncBatchNorm.convert_sync_batchnorm(model)
    model = torch.nn.parallel.DistributedDataParallel(model)

Start the program with ``torchrun --nproc-per-node=2 train.py``. See docs/distributed.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, imported when it is needed

from .. import _dispatch, _ranks, _runtime
from .._moments import Moments
from ._arrays import DTYPES, array, vector
from ._memory import empty
from ._rebind import rebound

__all__ = ["SyncBatchNorm"]

_alone: Any = rebound(nn.modules.batchnorm._BatchNorm.forward)  # as `convert` computes it
_ALL = (None, None, None, "normalize")  # no mask, no weights, no lengths
_OUTSIDE = (
    "cybn.torch.SyncBatchNorm takes tensors on the CPU, outside torch.jit and torch.func; on other "
    "devices use torch.nn.SyncBatchNorm"
)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`torch.nn.SyncBatchNorm` for tensors on the CPU, with exact statistics.

    In training mode y is normalized with the mean and variance of the batch of all processes in the
    group. Processes may have different numbers of samples, or none. Running statistics are bitwise
    equal in all processes.
    `weight.grad` and `bias.grad` are those of each process alone, as in PyTorch, because
    DistributedDataParallel averages all gradients. The gradient of the input includes the
    statistics of the whole batch.

    In eval mode, without a process group, or with a single process, it is a plain batch norm.

    It is not a subclass of `torch.nn.SyncBatchNorm`, because DistributedDataParallel rejects those
    on the CPU.

    Parameters
    ----------
    num_features : int
        The number of channels C.
    eps, momentum, affine, track_running_stats, device, dtype
        As in `torch.nn.SyncBatchNorm`: 1e-5, 0.1, True, True, None and None.
    **options
        Other arguments of `torch.nn.SyncBatchNorm` in the installed PyTorch, such as `bias`.
    process_group : torch.distributed.ProcessGroup, optional
        The processes. None means the default group.

    Notes
    -----
    A training forward and a backward each send 16 bytes per channel. If a process raises an error
    because of its arguments, all raise one, and no running statistics have changed. If a process
    ends early, the others raise an error within the timeout of the process group.

    Examples
    --------
    >>> import torch
    >>> import cybn.torch
    >>> bn = cybn.torch.SyncBatchNorm(8)  # without a process group: a plain batch norm
    >>> bn(torch.ones(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
            **options,
        )
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input has shape {tuple(input.shape)}; it must have at least 2 axes")

    def forward(self, input: Tensor) -> Tensor:  # PyTorch's name for the argument
        """Normalize `input`, of shape (N, C, ...), by the batch of all processes."""
        group = self._group()
        if group is None or not isinstance(input, Tensor):
            return _alone(self, input)
        if torch.jit.is_tracing():
            raise RuntimeError(_OUTSIDE)  # before a graph records the message
        return self._synchronized(input, group)

    @_disable_dynamo
    def _synchronized(self, input: Tensor, group: Any) -> Tensor:
        """Normalize by the batch of all processes. torch.compile breaks its graph here."""
        with _message(group, "forward", self.num_features) as message:
            self._check_input_dim(input)
            y, moments = self._normalize(input, group, message)
        if self.track_running_stats:
            self._absorb(moments)
        return y

    def _absorb(self, batch: Moments) -> None:
        """Update the running statistics in place, because they may be shared."""
        with _runtime.turn:
            old: list[Tensor] = []
            new: list[Tensor] = []
            momentum = self.momentum
            if self.num_batches_tracked is not None:
                old, new = [self.num_batches_tracked], [self.num_batches_tracked + 1]
                momentum = 1 / float(new[0]) if momentum is None else momentum
            if momentum and self.running_mean is not None:
                statistics = [self.running_mean.detach(), self.running_var.detach()]
                mean: Any
                var: Any
                (mean, _m), (var, _v) = map(vector, statistics)
                if momentum == 1:  # the old values, which may be NaN, have weight 0
                    mean = var = np.zeros_like(mean)
                old += statistics
                new += map(
                    torch.from_numpy,
                    _dispatch.absorb(mean, var, batch.mean, batch.m2, batch.count - 1, momentum),
                )
            torch._foreach_copy_(old, new)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Return a model with synchronized batch norms, as `torch.nn.SyncBatchNorm` does.

        Parameters
        ----------
        module : torch.nn.Module
            Its batch norms are replaced by new modules with the same parameters and buffers.
        process_group : torch.distributed.ProcessGroup, optional
            The processes. None means the default group.

        Returns
        -------
        torch.nn.Module
            `module`, or a new module if it is a batch norm itself.
        """
        converted = module
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            converted = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_group,
            )
            converted.weight, converted.bias = module.weight, module.bias
            converted.running_mean, converted.running_var = module.running_mean, module.running_var
            converted.num_batches_tracked = module.num_batches_tracked
            converted.training = module.training
            if hasattr(module, "qconfig"):
                converted.qconfig = module.qconfig
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted

    def _group(self) -> Any:
        """Return the process group, or None in eval mode or without other processes."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def _normalize(self, x: Tensor, group: Any, message: _ranks.Message) -> tuple[Tensor, Moments]:
        vectors = self.weight, self.bias
        if not x.is_cpu or _transformed():
            raise RuntimeError(_OUTSIDE)
        if x.dtype not in DTYPES:
            raise TypeError(
                f"input is {x.dtype}; it must be of one of {', '.join(map(str, DTYPES))}"
            )
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"input has shape {tuple(x.shape)}, with {x.shape[1]} channels; this "
                f"SyncBatchNorm has num_features={self.num_features}"
            )
        return _SyncBatchNorm.apply(x, *vectors, float(self.eps), group, message)


def _message(group: Any, kind: Any, channels: int) -> _ranks.Message:
    """Return a message between the processes of a group."""

    def gather(row: NDArray[np.float64]) -> NDArray[np.float64]:
        rows = torch.zeros(dist.get_world_size(group), row.size, dtype=torch.float64)
        dist.all_gather(list(rows), torch.from_numpy(row), group=group)
        return rows.numpy()

    return _ranks.Message(gather, dist.get_rank(group), kind, channels)


def _transformed() -> bool:
    """Return whether a transform of `torch.func` is active."""
    return bool(torch._C._are_functorch_transforms_active())


def _values(t: Tensor) -> NDArray[Any]:
    """Return an array at the address of a tensor, which may be empty."""
    return array(t) if t.numel() else np.empty(t.shape, DTYPES[t.dtype])


def _form(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.preserve_format


def _settings(eps: float) -> tuple[int, float, None, float]:
    return 1, eps, None, 0.0


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: Any,
        message: _ranks.Message,
    ) -> tuple[Tensor, Moments]:
        y = empty(x, _form(x), brief=False)
        (gamma, _w), (beta, _b) = vector(weight), vector(bias)
        _, moments = _ranks.normalize(
            message, _values(x), gamma, beta, None, _settings(eps), _ALL, _values(y), _threads()
        )
        ctx.save_for_backward(x, weight, bias)
        ctx.moments, ctx.eps, ctx.group = moments, eps, group
        return y, moments

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        own: list[NDArray[np.float64]] = []
        with _message(ctx.group, "backward", len(ctx.moments)) as message:
            x, weight, bias = ctx.saved_tensors  # an error if one was changed in place
            dx = empty(x, _form(x), brief=True)
            dy = dy.resolve_conj().resolve_neg()
            (gamma, _w), settings = vector(weight), _settings(ctx.eps)
            _ranks.through(
                message, _values(dy), _values(x), ctx.moments, gamma, None, None, settings, _ALL,
                False, _values(dx), None, _threads(), own=own,
            )  # fmt: skip
        dbeta, dgamma = map(torch.from_numpy, own[0])
        dweight = None if weight is None else dgamma.to(weight.dtype)
        dbias = None if bias is None else dbeta.to(bias.dtype)
        found = dx, dweight, dbias, None, None, None
        wanted = ctx.needs_input_grad
        return tuple(g if need else None for g, need in zip(found, wanted, strict=True))


def _threads() -> int:
    return torch.get_num_threads()
